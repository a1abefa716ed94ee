"""Frozen fused experts in 4 bits: which are, what they compute, what is kept of them, and what of them is saved and merged."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from raytune.config.sections.adapter import LoraAdapter, QloraAdapter, own_quantization
from raytune.errors import ModelError
from raytune.model.files.export import save_adapter
from raytune.model.inference import HeldModels, asked_of_run
from raytune.model.kept_base import KeptBase
from raytune.model.load import load_model
from raytune.model.merging.merge import merge_adapter
from raytune.model.packed_experts import packed_experts
from raytune.model.parts.quantize import quantized_modules
from raytune.plan.methods import experts
from raytune.plan.methods.lora_updates import updated_parameters
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.run_plan import RunPlan
from tests.tiny import tiny_plan, tiny_tokenizer
from tests.unit.test_expert_updates import FUSED, saved_base
from tests.unit.test_model_export import CPU, IDS, logits, state, trained
from tests.variants import chequered

FAMILIES = ["mixtral", "qwen2_moe, with a shared expert", "gpt_oss, the other way round"]
FROZEN = QloraAdapter(method="qlora", rank=3, target_modules="attention")
BOTH = ["down_proj", "gate_up_proj"]


def loaded(base: Path, adapter: LoraAdapter = FROZEN, *, kept: KeptBase | None = None, **model: Any) -> Any:
    plan = tiny_plan(model={"path": str(base), **model}, adapter=adapter.model_dump())
    return load_model(plan.model, plan.adapter, device=CPU, seed=0, kept=kept)


def with_expanded_weights(base: Path, model: Any, kind: str = "nf4") -> Any:
    """Plain transformers with what bitsandbytes makes of each weight that a model holds packed."""
    names = [f"{name.removesuffix('.base_layer')}.weight" for name in quantized_modules(model)]
    names += [name.replace(".base_layer.", ".") for name in packed_experts(model)]
    plain = AutoModelForCausalLM.from_pretrained(base)
    for name in names:
        weight = plain.get_parameter(name.removeprefix("base_model.model."))
        weight.data = expanded(weight.data, kind)
    return plain


def expanded(weight: Tensor, kind: str = "nf4", *, double: bool = True) -> Tensor:
    numbers, quant_state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    return functional.dequantize_4bit(numbers, quant_state)


def suffixes(model: Any) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in packed_experts(model)})


WHICH: dict[str, tuple[dict[str, Any], list[str]]] = {
    "frozen": ({"target_modules": "attention"}, BOTH),
    "excluded from a group": ({"exclude_modules": ["mlp.experts"]}, BOTH),
    "one of two excluded": ({"exclude_modules": ["experts.gate_up_proj"]}, ["gate_up_proj"]),
    "one of two named": ({"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, ["gate_up_proj"]),
    "in a group": ({}, []),
    "trained in full": ({"target_modules": "attention", "modules_to_save": ["mlp.experts"]}, []),
    "in 8 bits": ({"target_modules": "attention", "quantization": "int8"}, []),
}


@pytest.mark.parametrize("case", WHICH)
def test_experts_are_packed_if_nothing_changes_them(case: str, tmp_path: Path) -> None:
    section, names = WHICH[case]
    adapter = QloraAdapter(method="qlora", rank=3, **section)
    base = saved_base("qwen3_moe", tmp_path)
    model = loaded(base, adapter)
    assert suffixes(model) == names
    shape, quantization = read_model_shape(str(base)), own_quantization(adapter)
    updated = updated_parameters(adapter, shape)
    planned = {parameter.name for parameter in experts.packed_experts(adapter, shape, quantization, updated)}
    packed = {name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in packed_experts(model)}
    assert packed == planned, "and the plan counts on it"


def test_one_layer_of_experts_may_be_trained_and_the_others_packed(tmp_path: Path) -> None:
    parameters = ["layers.0.mlp.experts.down_proj", "layers.0.mlp.experts.gate_up_proj"]
    section = QloraAdapter(method="qlora", rank=3, target_modules=["q_proj"], target_parameters=parameters)
    model = trained(saved_base("qwen3_moe", tmp_path), section)
    assert {name.split(".layers.")[1].split(".")[0] for name in packed_experts(model)} == {"1"}


@pytest.mark.parametrize("family", FUSED)
def test_packed_experts_compute_what_their_expanded_weights_do(family: str, tmp_path: Path) -> None:
    base = saved_base(family, tmp_path)
    model = loaded(base)
    assert suffixes(model) == BOTH
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.eval()  # that of Phi-3.5-MoE draws between experts while it is trained
    plain = with_expanded_weights(base, model)
    assert (logits(plain) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-3
    # Equal weights, whose fp32 products are summed in another order.
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "double", "dtype"), chequered(["nf4", "fp4"], [True, False], ["fp32", "bf16"]))
def test_experts_are_packed_as_the_config_says(kind: Any, double: bool, dtype: str, tmp_path: Path) -> None:
    adapter = QloraAdapter(
        method="qlora", rank=3, target_modules="attention", quantization=kind, double_quantization=double, quant_storage="uint8"
    )
    base = saved_base("mixtral", tmp_path)
    model = loaded(base, adapter, dtype=dtype, compute_dtype=dtype)
    ours = model.get_parameter(packed_experts(model)[0])
    assert ours.dtype == torch.uint8
    assert ours.quant_state.nested is double
    original = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype]))
    weight = original.get_parameter(packed_experts(model)[0].removeprefix("base_model.model.")).data
    assert functional.dequantize_4bit(ours.data, ours.quant_state).equal(expanded(weight, kind, double=double))


def gradients(model: Any) -> dict[str, Tensor]:
    model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert all(value is not None for value in found.values())
    return found


def test_gradients_are_the_same_whether_experts_are_expanded_again_or_recomputed(tmp_path: Path) -> None:
    base = saved_base("mixtral", tmp_path)
    kept, again = (gradients(started(loaded(base, gradient_checkpointing=recomputes))) for recomputes in (False, True))
    assert max(value.abs().max() for value in kept.values()) > 1e-4
    assert all(value.equal(again[name]) for name, value in kept.items())


def started(model: Any) -> Any:
    """With an update that is not nothing, so that both of its factors have a gradient."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.1, generator=generator)
    return model


CASES: dict[str, dict[str, Any]] = {
    "frozen": {"target_modules": "attention"},
    "one of two": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "quantization": "fp4"},
}


@pytest.mark.parametrize(("family", "case"), chequered(FAMILIES, [*CASES]))
def test_the_merged_model_computes_what_was_trained_over_packed_experts(family: str, case: str, tmp_path: Path) -> None:
    base = saved_base(family, tmp_path / "base")
    adapter = QloraAdapter(method="qlora", rank=3, **CASES[case])
    model = trained(base, adapter)
    # In training mode, because bitsandbytes repacks 4-bit weights for CPU inference.
    expected = logits(model.train())
    save_adapter(model, state(model), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "exact", base=str(base))
    merge_adapter(tmp_path / "adapter", tmp_path / "original", base=str(base), dequantise=False)
    exact, original = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("exact", "original"))
    # The update is part of the weights here and was beside them there: fp32 roundings of every layer, a tenth of what NF4 does.
    torch.testing.assert_close(logits(exact), expected, rtol=1e-4, atol=1e-4)
    assert (logits(original) - expected).abs().max() > 1e-3
    plain: Any = PeftModel.from_pretrained(with_expanded_weights(base, model, adapter.quantization), str(tmp_path / "adapter"))
    plain.merge_and_unload().save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=key)  # fp32 products, summed over the rank


def test_experts_that_lie_in_several_files_merge_as_in_one(tmp_path: Path) -> None:
    base = saved_base("mixtral", tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "sharded")
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 3
    model = trained(base, FROZEN)
    save_adapter(model, state(model), tmp_path / "adapter")
    for name in ("base", "sharded"):
        merge_adapter(tmp_path / "adapter", tmp_path / f"merged {name}", base=str(tmp_path / name), any_base=True)
    one, several = (load_file(tmp_path / f"merged {name}" / "model.safetensors") for name in ("base", "sharded"))
    assert one.keys() == several.keys()
    assert all(value.equal(several[key]) for key, value in one.items())


def test_an_adapter_from_when_experts_stayed_whole_merges_as_it_was_trained(tmp_path: Path) -> None:
    base = saved_base("mixtral", tmp_path / "base")
    model = trained(base, FROZEN)
    save_adapter(model, state(model), tmp_path / "adapter")
    file = tmp_path / "adapter" / "base_quantization.json"
    record = json.loads(file.read_text())
    assert record.pop("parameters") == [name.removeprefix("base_model.model.") for name in packed_experts(model)]
    file.write_text(json.dumps(record))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    merged, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    assert all(merged[name].equal(value) for name, value in before.items() if ".experts." in name)


def test_experts_that_a_base_does_not_have_are_not_merged_in_silence(tmp_path: Path) -> None:
    base = saved_base("mixtral", tmp_path / "base")
    model = trained(base, FROZEN)
    save_adapter(model, state(model), tmp_path / "adapter")
    file = tmp_path / "adapter" / "base_quantization.json"
    file.write_text(file.read_text().replace("layers.1.mlp.experts.down_proj", "layers.7.mlp.experts.down_proj"))
    with pytest.raises(ModelError, match=r"1 layers .*under their names, first model.layers.7.mlp.experts.down_proj"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(base))


def test_a_kept_base_serves_only_adapters_that_leave_the_same_experts_alone(tmp_path: Path) -> None:
    base = saved_base("qwen3_moe", tmp_path)
    kept = KeptBase()
    first = loaded(base, FROZEN, kept=kept)
    second = loaded(base, FROZEN.model_copy(update={"rank": 2, "target_modules": ["q_proj"]}), kept=kept)
    assert second.get_input_embeddings() is first.get_input_embeddings()
    assert logits(second).equal(logits(loaded(base)))
    third = loaded(base, QloraAdapter(method="qlora", rank=2), kept=kept)
    assert third.get_input_embeddings() is not second.get_input_embeddings()
    assert packed_experts(third) == []
    fourth = loaded(base, FROZEN, kept=kept)
    assert suffixes(fourth) == BOTH


def each_asked(plan: RunPlan, folder: Path) -> Iterator[Any]:
    """Base and tuned model of a run, one after the other."""
    with HeldModels(CPU) as models:
        for one in asked_of_run(plan, str(folder)):
            with models.asked(one) as loaded:
                yield loaded.model.train()


def test_answers_are_written_by_the_experts_of_training(tmp_path: Path) -> None:
    base = saved_base("mixtral", tmp_path / "base")
    model = trained(base, FROZEN)
    save_adapter(model, state(model), tmp_path / "adapter")
    model.generation_config.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    plan = tiny_plan(model={"path": str(base)}, adapter=FROZEN.model_dump())
    before, tuned = (logits(model) for model in each_asked(plan, tmp_path / "adapter"))
    assert before.equal(logits(loaded(base).train()))
    assert tuned.equal(logits(model.train()))
