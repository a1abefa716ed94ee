"""A teacher in a plan: what it costs, what is refused, and what makes another run."""

from pathlib import Path
from typing import Any

import pytest

from raytune.config.load import load_config
from raytune.errors import ModelError, PlanError, UserError
from raytune.launch.data.prepare import refuse_without_cluster
from raytune.plan.ahead import plan_ahead
from raytune.plan.choosing.choose import choose_plan
from raytune.plan.choosing.setting import settle
from raytune.plan.describe import plan_table
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.identity.settings import changes_in_keys
from raytune.plan.model.architectures import model_shape
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import RunPlan
from raytune.plan.strategies.distillation import TeacherFiles, check_vocabularies, teacher_section
from tests.tiny import save_tiny_model, tiny_tokenizer
from tests.unit.plan_cases import CPU, DEMO, LLAMA_3_8B, LLAMA_3_70B, config, data, gpus

LORA = {"method": "lora", "rank": 8}
FULL = {"method": "full"}


def planned(
    adapter: dict[str, Any],
    distillation: dict[str, Any] | None,
    *,
    machine: Any = CPU,
    shape: ModelShape = DEMO,
    teacher: ModelShape | None = None,
    content: str = "as it was",
    **sections: Any,
) -> RunPlan:
    asked = config(adapter=adapter, strategy={"distillation": distillation}, **sections)
    section = teacher_section(asked)
    files = section and TeacherFiles(path=f"/models/{section.base}", revision=None, content={"weights": content})
    setting = settle(asked, shape, machine, teacher=(teacher or shape) if section else None)
    return choose_plan(setting, data(), model_path="/models/base", storage="/runs", content={"weights": "base"}, teacher=files)


def bytes_of(plan: RunPlan) -> dict[str, int]:
    return {part.name: part.num_bytes for part in plan.memory}


# --- planned


def test_the_base_beneath_an_adapter_is_no_second_copy() -> None:
    none, taught = planned(LORA, None), planned(LORA, {"teacher": "base"})
    assert taught.distillation is not None
    assert taught.distillation.teacher is None
    assert bytes_of(taught)["weights"] == bytes_of(none)["weights"]
    assert "weights of the teacher" not in bytes_of(taught)
    assert dict(plan_table(taught))["teacher"].startswith(
        "the frozen base beneath the adapter, no second copy; loss: 0.5 x cross"
    )


@pytest.mark.parametrize(
    ("adapter", "is_beneath"),
    [
        (FULL, False),
        (LORA, True),
        ({"method": "qlora"}, True),
        (LORA | {"init": "pissa"}, False),
        (LORA | {"init": "eva"}, True),
        (LORA | {"bias": "all"}, False),
        ({"method": "prompt_tuning"}, True),
    ],
)
def test_the_base_is_loaded_twice_where_the_first_one_changes(adapter: dict[str, Any], is_beneath: bool) -> None:
    section = teacher_section(config(adapter=adapter, model={"base": "demo"}, strategy={"distillation": {"teacher": "base"}}))
    assert (None if section is None else section.base) == (None if is_beneath else "demo")


def test_a_teacher_beside_is_planned_whole_or_divided_with_its_time() -> None:
    def plan(stage: int, distillation: dict[str, Any] | None) -> RunPlan:
        training = {"zero": {"stage": stage}, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
        machine = gpus(8, memory_gib=10_000)
        return planned(LORA, distillation, machine=machine, shape=LLAMA_3_8B, teacher=LLAMA_3_70B, training=training)

    whole, divided = (plan(stage, {"teacher": "big"}) for stage in (2, 3))
    assert bytes_of(whole)["weights of the teacher"] == 2 * LLAMA_3_70B.num_parameters
    assert bytes_of(divided)["weights of the teacher"] == round(2 * LLAMA_3_70B.num_parameters / 8)
    assert "head of the teacher" in bytes_of(divided)
    assert "head of the teacher" not in bytes_of(whole)


def test_a_step_takes_as_much_longer_as_a_forward_pass_of_the_teacher_does() -> None:
    def seconds(distillation: dict[str, Any] | None) -> float:
        sections: dict[str, Any] = {
            "model": {"base": "Qwen/Qwen3-8B"},
            "adapter": LORA,
            "cluster": {"instance": "p5.48xlarge"},
            "data": {"train": "s3://bucket/rows.jsonl"},
            "training": {"zero": {"stage": 2}, "gradient_checkpointing": False, "per_device_train_batch_size": 1},
        }
        plan = plan_ahead(config(**sections, strategy={"distillation": distillation}), 10_000_000)
        assert plan.step_time is not None
        return plan.step_time.compute_s

    # Of LoRA's two passes of as many products, a third comes on top.
    assert 1.4 < seconds({"teacher": "base"}) / seconds(None) < 1.5
    assert seconds({"teacher": "Qwen/Qwen3-8B"}) == seconds({"teacher": "base"})


def test_weight_0_is_none_and_said_to_be() -> None:
    none, off = planned(FULL, None), planned(FULL, {"teacher": "nowhere", "weight": 0})
    assert off.model_copy(update={"notes": none.notes}) == none
    assert "strategy.distillation.weight is 0: there is no teacher, and none is loaded." in off.notes


def test_a_machine_without_room_for_the_teacher_is_told_what_would_fit() -> None:
    machine = gpus(1, memory_gib=80, host_gib=100)
    planned(LORA, {"teacher": "base"}, machine=machine, shape=LLAMA_3_8B)
    with pytest.raises(PlanError, match=r"weights of the teacher 131 GiB.*What would fit"):
        planned(
            LORA,
            {"teacher": "big"},
            machine=gpus(8, memory_gib=80),
            shape=LLAMA_3_8B,
            teacher=LLAMA_3_70B,
            cluster={"workers": 1},
        )


# --- refused


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ("model: {new_tokens: [<tool>]}\nstrategy:\n  distillation: {teacher: base}", "new_tokens", "unknown to the teacher"),
        (
            "strategy:\n  distillation: {teacher: base, trust_remote_code: true}",
            "strategy.distillation.trust_remote_code",
            "model.trust_remote_code says it",
        ),
        ("strategy:\n  distillation: {teacher: ./a, revision: main}", "strategy.distillation.revision", "has no revisions"),
        (
            "strategy:\n  distillation: {teacher: me/it, trust_remote_code: true}",
            "strategy.distillation",
            "strategy.distillation.revision to be a full 40-digit",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_its_place(text: str, key: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{text}\ndata: {{train: demo:train}}\n" + ("" if "model:" in text else "model: {base: demo}\n"))
    with pytest.raises(UserError) as caught:
        settle(load_config([path]), DEMO, CPU)
    assert said in str(caught.value)
    assert key in str(caught.value)


def test_a_teacher_with_fewer_positions_or_a_state_is_refused() -> None:
    short = model_shape({**LLAMA, "max_position_embeddings": 512}, "short")
    with pytest.raises(UserError, match=r"Rows have 2048 tokens.*512 positions.*Set data.max_length to 512"):
        planned(LORA, {"teacher": "short"}, teacher=short)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


def test_other_tokens_are_refused_with_their_names() -> None:
    own = {"a": 0, "b": 1, "c": 2}
    check_vocabularies("t", own, dict(own), 3)
    with pytest.raises(UserError, match=r"2 tokens differ, such as 'c' \(2 here, 3 there\), 'd' \(absent here, 2 there\)"):
        check_vocabularies("t", own, {"a": 0, "b": 1, "d": 2, "c": 3}, 4)
    with pytest.raises(UserError, match=r"Token number 2 has no logit in one of the two models, which share 2"):
        check_vocabularies("t", own, dict(own), 2)


def test_a_folder_is_looked_at_before_anything_starts(tmp_path: Path) -> None:
    teacher = save_tiny_model(tmp_path / "teacher")
    sections: dict[str, Any] = {"model": {"base": "demo"}, "data": {"train": "demo:train"}, "adapter": LORA}

    def look(teacher: Path) -> None:
        refuse_without_cluster(config(**sections, strategy={"distillation": {"teacher": str(teacher)}}))

    with pytest.raises(UserError, match=r"Rows have 2048 tokens, and the teacher .* has 512 positions"):
        look(teacher)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(teacher)
    with pytest.raises(UserError, match=r"has another vocabulary .* 1 tokens differ, such as '<new>' \(absent here"):
        look(teacher)
    (teacher / "config.json").unlink()
    with pytest.raises(ModelError, match=r"strategy.distillation.teacher: .*holds no config.json"):
        look(teacher)
    with pytest.raises(ModelError, match=r"^strategy.distillation.teacher .*nowhere is not a folder"):
        look(tmp_path / "nowhere")


# --- identity


@pytest.mark.parametrize(
    ("now", "keys"),
    [
        (None, {"teacher", "weight", "temperature"}),
        ({"weight": 0.3}, {"weight"}),
        ({"temperature": 1.0}, {"temperature"}),
        ({"top_k": 5}, {"top_k"}),
        ({"teacher": "another"}, {"teacher"}),
        ({"teacher": "base"}, {"teacher"}),
    ],
)
def test_another_teacher_or_share_of_it_is_another_run_told_in_its_key(now: dict[str, Any] | None, keys: set[str]) -> None:
    was = {"teacher": "one", "weight": 0.5, "temperature": 2.0}
    after = None if now is None else was | now
    plans = [planned(LORA, section, content=str(section and section["teacher"])) for section in (was, after)]
    configs = [config(adapter=LORA, strategy={"distillation": section}) for section in (was, after)]
    changes = changes_in_keys(plans[0], plans[1], configs[0], configs[1])
    assert {change[0] for change in changes} == {f"strategy.distillation.{key}" for key in keys}


def test_a_teacher_is_known_by_its_content() -> None:
    one, moved, changed = (
        planned(LORA, {"teacher": name}, content=content) for name, content in (("one", "a"), ("moved", "a"), ("one", "b"))
    )
    assert identity_of(one) == identity_of(moved)
    assert differences(identity_of(one), identity_of(changed))


def test_a_run_from_before_there_were_teachers_goes_on() -> None:
    now = identity_of(planned(LORA, None))
    before = {name: value for name, value in now.items() if name != "distillation"}
    assert not differences(before, now)
