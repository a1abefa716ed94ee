"""What `training.zero.overrides` may not set is refused before the data is read."""

from typing import Any

import pytest

from raytune.errors import UserError
from raytune.plan.choosing.setting import settle
from raytune.plan.identity.deepspeed_keys import KNOWN_KEYS, OWNED_KEYS, REMOVED_KEYS, UNREAD_KEYS
from tests.unit.plan_cases import CPU, DEMO, config, gpus, planned


def check(overrides: dict[str, Any], **zero: Any) -> None:
    settle(config(training={"zero": {"overrides": overrides, **zero}}), DEMO, CPU)


def nested(key: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` for `a.b`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_what_deepspeed_removed_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"sets {key}, which DeepSpeed 0.19 has removed"):
        check(nested(key, {"enabled": True}))


@pytest.mark.parametrize("key", OWNED_KEYS)
def test_what_raytune_decides_is_refused_with_its_own_word(key: str) -> None:
    with pytest.raises(UserError, match=f"sets {key}, which raytune decides.*{OWNED_KEYS[key] or 'delete it'}"):
        check(nested(key, 1))


def test_our_list_of_removed_keys_is_deepspeeds() -> None:
    from deepspeed.runtime import config as deepspeed_own

    theirs = {*deepspeed_own._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    theirs |= {f"zero_optimization.{key}" for key in deepspeed_own._REMOVED_ZERO_CONFIG_KEYS}
    assert theirs == set(REMOVED_KEYS)


def test_other_keys_are_left_to_deepspeed() -> None:
    check({"zero_optimization": {"sub_group_size": 7}, "steps_per_print": 3, "wandb": {"any": 1}})
    check({"zero_optimization": {"offload_optimizer": {"pin_memory": False}}}, offload_optimizer="cpu")
    check({"zero_optimization": {"stage3_max_live_parameters": 7}})
    check({"zero_optimization": {"stage3_max_live_parameters": 7}}, stage=3)


@pytest.mark.parametrize(
    ("overrides", "zero", "message"),
    [
        ({"steps_per_prnt": 1}, {}, "sets steps_per_prnt, which DeepSpeed does not know. Did you mean steps_per_print?"),
        ({"sub_group_size": 7}, {}, "sets sub_group_size, .* Did you mean zero_optimization.sub_group_size?"),
        ({"nonsense": {"a": 1}}, {}, "sets nonsense, which DeepSpeed does not know. Delete it."),
        ({"zero_optimization": {"sub_group": 7}}, {}, "zero_optimization.sub_group, .* Did you mean .*sub_group_size?"),
        ({"fp16": {"loss_scal": 0}}, {}, "sets fp16.loss_scal, .* Did you mean fp16.loss_scale?"),
        ({"dataloader_drop_last": True}, {}, "sets dataloader_drop_last, which nothing would read"),
        ({"activation_checkpointing": {"a": 1}}, {}, "set training.gradient_checkpointing"),
        (
            {"zero_optimization": {"offload_param": {"pin_memory": True}}},
            {"offload_optimizer": "cpu"},
            "training.zero.offload_parameters is none, so that nothing would read it",
        ),
        ({"zero_optimization": {"stage3_max_live_parameters": 7}}, {"stage": 2}, "stage 3 alone reads, but .*stage is 2"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, {"stage": 1}, "stage 3 alone reads, but .*stage is 1"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, {"stage": 3}, "Set training.zero.copy_per_node instead"),
    ],
)
def test_what_nothing_would_read_is_refused(overrides: dict[str, Any], zero: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(overrides, **zero)


def test_overrides_of_a_stage_that_was_not_chosen_are_said() -> None:
    overrides = {"zero_optimization": {"stage3_max_live_parameters": 7, "sub_group_size": 7}}
    sentence = "which does not read zero_optimization.stage3_max_live_parameters of training.zero.overrides."
    below = planned(gpus(2), training={"zero": {"overrides": overrides}})
    assert below.engine.zero_stage < 3
    (said,) = (reason for reason in below.reasons if "does not read" in reason)
    assert said == f"training.zero.stage is {below.engine.zero_stage}, {sentence}"
    sharded = planned(gpus(2), training={"zero": {"overrides": overrides, "stage": 3}})
    assert not any("does not read" in reason for reason in sharded.reasons)


def test_overrides_of_another_precision_or_of_disks_that_are_not_used_are_said() -> None:
    overrides = {"fp16": {"initial_scale_power": 10}, "aio": {"block_size": 4096}}
    reasons = planned(gpus(2), training={"precision": "bf16", "zero": {"overrides": overrides}}).reasons
    assert "training.precision is bf16, which does not read fp16.initial_scale_power of training.zero.overrides." in reasons
    assert "Nothing is offloaded to nvme, so that nothing reads aio of training.zero.overrides." in reasons
    in_fp16 = planned(gpus(2), training={"precision": "fp16", "zero": {"overrides": {"fp16": {"initial_scale_power": 10}}}})
    assert not any("does not read" in reason for reason in in_fp16.reasons)


class Asked(dict):
    """A dictionary that notes which keys are asked for."""

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.names: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "Asked":
        return self


def test_our_lists_of_keys_are_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    asked = Asked({"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1})
    DeepSpeedConfig(asked)
    decided = {key.partition(".")[0] for key in (*OWNED_KEYS, *REMOVED_KEYS) if "." not in key} | {*UNREAD_KEYS, "bfloat16"}
    assert asked.names - decided == set(KNOWN_KEYS[""])
    sections = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    for name, section in sections.items():
        fields = section.model_fields.items()
        theirs = {field.alias or key for key, field in fields if not (field.json_schema_extra or {}).get("deprecated")}
        ours = {key.rpartition(".")[2] for key in OWNED_KEYS if key.rpartition(".")[0] == name}
        ours |= {key.split(".")[1] for key in OWNED_KEYS if key.startswith(f"{name}.")}
        assert theirs - ours == set(KNOWN_KEYS[name]) - ours, name
