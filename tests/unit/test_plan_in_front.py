"""Methods that lay virtual tokens in front of documents, in a plan: what is trained, how long rows are, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM

from raytune.config.load import config_from
from raytune.config.sections.adapter import Adapter
from raytune.config.sections.quantization import HeldBase
from raytune.data.store.packing import PACKINGS, pack
from raytune.errors import ModelError, PlanError, UserError
from raytune.launch.data.prepare import Preparation
from raytune.model.adapters import add_adapter
from raytune.plan.choosing.requirements import choose_row_length
from raytune.plan.describe import plan_table, plan_text
from raytune.plan.methods import METHODS, expert_notes, trained_by
from raytune.plan.model.architectures import model_shape
from tests.hybrids import HYBRIDS
from tests.peft_methods import IN_FRONT
from tests.tiny import PATIENT
from tests.unit.plan_cases import CPU, DEMO, LLAMA_3_8B, gpus, planned
from tests.unit.test_meta_shape import OTHERS, shape_by_building
from tests.unit.test_plan_shapes import CONFIGS

FAMILIES = ["llama", "llama with biases", "gemma3", "phi3", "gpt2", "gpt_neox", "qwen3", "mixtral", "qwen2_moe"]


def section(method: str, **changes: Any) -> Any:
    return TypeAdapter(Adapter).validate_python(IN_FRONT[method].section | changes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", IN_FRONT)
def test_what_is_trained_is_exactly_what_peft_trains(method: str, family: str) -> None:
    has_width = "encoder_hidden_size" in IN_FRONT[method].section
    for changes in ({}, {"num_virtual_tokens": 1}, *([{"encoder_hidden_size": "auto"}] if has_width else [])):
        adapter = section(method, **changes)
        model: Any = add_adapter(AutoModelForCausalLM.from_config(CONFIGS[family]), adapter, revision=None, seed=0)
        trained = trained_by(adapter, model_shape(CONFIGS[family].to_dict(), "x"))
        counts: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                counts[name.rpartition(".")[0]] = counts.get(name.rpartition(".")[0], 0) + parameter.numel()
        assert {part.name: part.num_parameters for part in trained.parts} == counts


@pytest.mark.parametrize("method", IN_FRONT)
def test_a_plan_says_what_is_trained_and_where_virtual_tokens_lie(method: str) -> None:
    plan = planned(gpus(1, 80), LLAMA_3_8B, adapter=IN_FRONT[method].section)
    said = dict(plan_table(plan))["method"]
    assert said.startswith(f"{plan.adapter.method}, 5 virtual tokens "), said
    assert "5 virtual tokens lie in front of each document" in plan_text(plan)
    assert plan.optimization.weight_decay == 0
    assert 1e-3 <= plan.optimization.learning_rate <= 1e-2
    assert plan.notes == planned(gpus(1, 80), LLAMA_3_8B, adapter=IN_FRONT[method].section).notes


def test_virtual_tokens_take_positions_of_the_model() -> None:
    def length(num_virtual: int, wanted: int | str = "auto", **data: Any) -> int:
        adapter = {"method": "prompt_tuning", "num_virtual_tokens": num_virtual}
        config = config_from({"data": {"train": "demo:train", "max_length": wanted} | data, "adapter": adapter})
        return choose_row_length(config, DEMO)

    most = DEMO.max_positions
    assert length(20) == min(2048, most - 20)
    assert length(20, most - 20) == most - 20
    with pytest.raises(
        UserError, match=rf"{most} positions, of which adapter.num_virtual_tokens takes 20. Set data.max_length to {most - 20} or"
    ):
        length(20, most - 19)
    assert length(most - 1) == 1
    with pytest.raises(UserError, match=r"adapter\.num_virtual_tokens is"):
        length(most)


def test_rows_are_longer_by_virtual_tokens_where_these_pass_through_layers() -> None:
    def size(adapter: dict[str, Any], max_length: int) -> int:
        training = {"per_device_train_batch_size": 1}
        plan = planned(CPU, DEMO, adapter=adapter, data={"max_length": max_length}, training=training)
        return next(part.num_bytes for part in plan.memory if part.name == "activations of a layer")

    virtual = {"num_virtual_tokens": 100}
    prompt = size({"method": "prompt_tuning", **virtual}, 400)
    assert prompt == size({"method": "prompt_tuning", "num_virtual_tokens": 1}, 499)
    assert (
        size({"method": "prompt_tuning", "num_virtual_tokens": 1}, 400)
        < size({"method": "prefix_tuning", **virtual}, 400)
        < prompt
    )


@pytest.mark.parametrize("packing", PACKINGS)
@PATIENT
@given(lengths=st.lists(st.integers(1, 64), max_size=100), num_virtual=st.integers(0, 40))
def test_packed_rows_have_room_for_the_virtual_tokens_of_all_their_documents(
    packing: Any, lengths: list[int], num_virtual: int
) -> None:
    rows = pack(lengths, 64, packing, num_virtual=num_virtual)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(sum(lengths[one] + num_virtual for one in row) <= 64 + num_virtual for row in rows)


def test_a_prefix_is_never_computed_again() -> None:
    """Where `auto` would recompute activations to fit, it looks for another way."""
    few = {"per_device_train_batch_size": 8, "global_batch_size": 8}
    prompt = planned(gpus(1, 40), LLAMA_3_8B, adapter={"method": "prompt_tuning"}, training=few)
    assert prompt.model.gradient_checkpointing
    with pytest.raises(PlanError, match=r"What would fit: training\.per_device_train_batch_size=1"):
        planned(gpus(1, 40), LLAMA_3_8B, adapter={"method": "prefix_tuning"}, training=few)


@pytest.mark.parametrize(
    ("adapter", "others", "message"),
    [
        (
            {"method": "prefix_tuning"},
            {"training": {"gradient_checkpointing": True}},
            "Set it to false or auto, or adapter.method to",
        ),
        ({"method": "prefix_tuning", "encoder_hidden_size": 8}, {}, "Set adapter.projection to true"),
        (
            {"method": "prompt_tuning"},
            {"training": {"neftune_noise_alpha": 5}},
            "Set it to 0, or adapter.method to prefix_tuning",
        ),
        ({"method": "p_tuning"}, {"training": {"neftune_noise_alpha": 5}}, "Set it to 0"),
        ({"method": "p_tuning"}, {"strategy": {"layer_rate_decay": 0.9}}, "nothing in layers is trained"),
        (
            {"method": "prompt_tuning"},
            {"strategy": {"freeze": {"first_layers": 1}}},
            "has no effect: adapter.method prompt_tuning trains nothing",
        ),
        (
            {"method": "p_tuning"},
            {"strategy": {"rate_scales": {"self_attn": 0.1}}},
            r"What is trained: embedding, mlp_head\.0, mlp_head\.2, mlp_head\.4",
        ),
        (
            {"method": "prompt_tuning"},
            {"strategy": {"freeze": {"train_only": ["prompt_encoder"]}}},
            "is for what is trained module by module",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused_with_what_can(adapter: dict[str, Any], others: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(CPU, DEMO, adapter=adapter, **others)


@pytest.mark.parametrize("name", OTHERS)
def test_a_prefix_is_refused_or_is_as_wide_as_the_keys_of_every_layer(name: str) -> None:
    config = config_from({"data": {"train": "demo:train"}, "adapter": {"method": "prefix_tuning"}})
    shape, adapter = shape_by_building(OTHERS[name]), section("prefix_tuning")
    if shape.why_lone or "falcon" in name:
        with pytest.raises(ModelError, match=r"Set adapter.method to prompt_tuning or lora"):
            METHODS["prefix_tuning"].check(adapter, config, HeldBase(quantization=None), shape)
        return
    METHODS["prefix_tuning"].check(adapter, config, HeldBase(quantization=None), shape)
    model: Any = add_adapter(AutoModelForCausalLM.from_config(OTHERS[name]).eval(), adapter, revision=None, seed=0)
    assert trained_by(adapter, shape).num_trainable == sum(one.numel() for one in model.parameters() if one.requires_grad)
    if name != "phi":  # a tiny one rotates half of 6 numbers, in pairs
        assert model(input_ids=torch.arange(3, 9)[None], use_cache=False).logits.shape[1] == 6


def test_models_without_attention_have_no_number_of_heads_to_tell_peft() -> None:
    config = config_from({"data": {"train": "demo:train"}, "adapter": {"method": "prompt_tuning"}})
    shape = shape_by_building(HYBRIDS["mamba"]())
    with pytest.raises(ModelError, match=r"this mamba model has none\. Set adapter\.method to lora"):
        METHODS["prompt_tuning"].check(section("prompt_tuning"), config, HeldBase(quantization=None), shape)


def test_trials_with_other_virtual_tokens_have_rows_of_their_own(tmp_path: Path) -> None:
    preparation = Preparation(CPU, map)
    rows = []
    for adapter in ({"method": "lora"}, {"method": "prompt_tuning"}, {"method": "prompt_tuning", "num_virtual_tokens": 60}):
        data = {"train": {"path": "demo:train", "max_rows": 40}, "max_length": 1000}
        plan = preparation.prepare(config_from({"data": data, "adapter": adapter, "storage": str(tmp_path)})).plan
        rows.append(plan.data.train.num_rows)
        assert plan.data.row_length == 1000
    assert rows[0] < rows[1] < rows[2]


@pytest.mark.parametrize("method", IN_FRONT)
def test_fused_experts_stay_as_they_are_and_the_plan_says_so(method: str) -> None:
    shape = model_shape(CONFIGS["mixtral"].to_dict(), "x")
    assert "They are not trained" in expert_notes(section(method), shape, trained_by(section(method), shape), None)[0]
