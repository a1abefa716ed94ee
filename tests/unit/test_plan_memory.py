"""Bytes of a run against published figures, against what autograd keeps, and against what an engine holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune.config.sections.adapter import Adapter, FullAdapter, LoraAdapter, QloraAdapter, own_quantization
from raytune.config.sections.training import Optimizer, Precision
from raytune.model.adapters import add_adapter
from raytune.model.demo import demo_config
from raytune.plan.choosing.snapshot import SPARE
from raytune.plan.costs.activations import layer_activation_bytes
from raytune.plan.costs.memory import bytes_in, checkpoint_bytes, memory_parts, saved_by_ranks
from raytune.plan.costs.workload import Workload
from raytune.plan.methods import trained_by
from raytune.plan.model.architectures import model_shape
from raytune.plan.model.shapes import ModelShape
from raytune.training.checkpoints.snapshot import HostMemory, Snapshot
from raytune.training.engines.optimizer import build_optimizer
from raytune.training.engines.plain_engine import PlainEngine
from tests.tiny import tiny_plan
from tests.unit.plan_cases import DEMO, LLAMA_3_8B, LLAMA_3_70B
from tests.unit.test_meta_shape import OTHERS, shape_by_building
from tests.unit.test_plan_shapes import CONFIGS
from tests.variants import chequered

FULL = FullAdapter(method="full")


def workload(shape: ModelShape = LLAMA_3_8B, adapter: Adapter = FULL, **changes: Any) -> Workload:
    values = {
        "engine": "plain" if changes.get("zero_stage", 0) == 0 else "zero",
        "zero_stage": 0,
        "workers": 1,
        "offload_optimizer": "none",
        "offload_parameters": "none",
        "precision": "bf16",
        "optimizer": "adamw",
        "attention": "varlen",
        "has_checkpointing": False,
        "accumulation": 1,
        "num_tokens": 2048,
        "num_targets": 2048,
        "chunk_tokens": None,
        "is_on_gpu": True,
    }
    quantization = own_quantization(adapter)
    trained = trained_by(adapter, shape, quantization)
    return Workload(shape=shape, trained=trained, quantization=quantization, **(values | changes))


def by_part(work: Workload) -> dict[str, int]:
    return {part.name: part.num_bytes for part in memory_parts(work)}


def test_mixed_precision_adam_takes_the_published_bytes_per_parameter() -> None:
    """ZeRO's 2 weights + 2 gradients + 12 optimizer; docs/performance.md has the same, and 18 with fp32 gradients."""
    parameters = LLAMA_3_8B.num_parameters
    sharded = by_part(workload(zero_stage=1))
    assert [sharded[name] / parameters for name in ("weights", "optimizer")] == [2, 12]
    assert sharded["gradients"] / parameters == 2
    plain = by_part(workload())
    assert [plain[name] / parameters for name in ("weights", "gradients", "optimizer")] == [4, 4, 8]
    embeddings = LLAMA_3_8B.parameters_by_kind["embedding"]
    small = by_part(workload(optimizer="adamw_8bit"))
    assert small["optimizer"] == pytest.approx(2 * (parameters - embeddings) + 8 * embeddings, rel=0.02)


def test_a_70b_base_in_nf4_has_the_published_size() -> None:
    """docs/performance.md: 39.5 GB with bf16 embeddings and head."""
    adapter = QloraAdapter(method="qlora", rank=1, target_modules="attention")
    work = workload(LLAMA_3_70B, adapter, zero_stage=2)
    base = by_part(work)["weights"] - 2 * work.trained.num_trainable
    per_quantised = (base - 2 * (LLAMA_3_70B.num_parameters - LLAMA_3_70B.num_quantizable)) / LLAMA_3_70B.num_quantizable
    assert per_quantised == pytest.approx(0.516, abs=0.0005)
    assert base / 1e9 == pytest.approx(39.5, abs=0.1)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_zero_stages_divide_what_they_should(workers: int) -> None:
    whole = by_part(workload(zero_stage=1, workers=1))
    for stage in (1, 2, 3):
        parts = by_part(workload(zero_stage=stage, workers=workers))
        parameters = LLAMA_3_8B.num_parameters
        assert parts["optimizer"] == round(12 * parameters / workers)
        assert parts["gradients"] == round(2 * parameters / (workers if stage >= 2 else 1))
        norms = 2 * (2 * 32 + 1) * 4096 * (1 - 1 / workers) if stage == 3 else 0  # which stay whole
        assert parts["weights"] == round(whole["weights"] / (workers if stage == 3 else 1) + norms)


def test_higher_stages_and_checkpointing_never_take_more() -> None:
    for has_checkpointing in (False, True):
        totals = [
            bytes_in(memory_parts(workload(zero_stage=stage, workers=8, has_checkpointing=has_checkpointing)), "device")
            for stage in (1, 2, 3)
        ]
        assert totals == sorted(totals, reverse=True)
    with_, without = by_part(workload(has_checkpointing=True)), by_part(workload())
    assert with_["activations"] < without["activations"] / 5


def test_offloading_moves_bytes_to_the_host() -> None:
    kept = memory_parts(workload(zero_stage=3, workers=4))
    moved = memory_parts(workload(zero_stage=3, workers=4, offload_optimizer="cpu", offload_parameters="cpu"))
    on_host = {part.name: part.num_bytes for part in moved if part.place == "host"}
    assert set(on_host) == {"weights", "gradients", "optimizer", "update"}
    assert sum(on_host.values()) - on_host["update"] == bytes_in(kept, "device") - bytes_in(moved, "device")
    on_cpu = memory_parts(workload(zero_stage=3, workers=4, offload_optimizer="cpu", is_on_gpu=False))
    assert {part.place for part in on_cpu} == {"device"}, "which is the host's memory"
    on_disk = memory_parts(workload(zero_stage=3, workers=4, offload_optimizer="nvme"))
    assert {part.name for part in on_disk if part.place == "nvme"} == {"optimizer"}


def test_chunks_bound_the_logits() -> None:
    whole, chunked = workload(num_tokens=8192, num_targets=8192), workload(num_tokens=8192, num_targets=8192, chunk_tokens=256)
    assert by_part(chunked)["logits and loss"] < by_part(whole)["logits and loss"] / 10


# Wide enough that activations dwarf what has a fixed size, such as the rotary embedding's tables.
WIDE = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
READ: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen3": WIDE,
    "gemma3": WIDE,
    "phi3": WIDE,
    "gpt2": {"n_embd": 128, "n_head": 8, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8},
    "mixtral": WIDE | {"num_local_experts": 4},
    "qwen2_moe": WIDE | {"num_experts": 4, "moe_intermediate_size": 352, "shared_expert_intermediate_size": 400},
}
BUILT = ("olmo2", "granite", "cohere", "stablelm", "phi", "starcoder2", "glm", "granitemoe")


ADAPTERS: dict[str, Adapter] = {"full": FULL, "lora": LoraAdapter(rank=8)}


@pytest.mark.parametrize(("family", "method", "precision"), chequered([*READ, *BUILT], [*ADAPTERS], ["fp32", "bf16"]))
def test_planned_activations_are_those_that_autograd_keeps(family: str, method: str, precision: Precision) -> None:
    """Within 20 %, of tensors saved in the layers of transformers' models, PlainEngine's casts of weights included."""
    adapter = ADAPTERS[method]
    config_class = type(CONFIGS[family] if family in READ else OTHERS[family])
    config = config_class(**({"num_hidden_layers": 2, "vocab_size": 101, "pad_token_id": 0} | READ.get(family, WIDE)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if not isinstance(adapter, FullAdapter):
        model = add_adapter(model.to(torch.bfloat16 if precision == "bf16" else torch.float32), adapter, revision=None, seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    shape = model_shape(config.to_dict(), "x") if family in READ else shape_by_building(config)
    work = workload(shape, adapter, precision=precision, num_tokens=512)
    planned = shape.num_layers * layer_activation_bytes(work)
    casts = by_part(work).get("weights in compute precision", 0)
    assert planned + casts == pytest.approx(saved_bytes(model, precision, num_tokens=512), rel=0.2)


def saved_bytes(model: Any, precision: Precision, num_tokens: int) -> int:
    """Bytes of all tensors, but weights, that autograd keeps in a forward pass without the head."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    body = getattr(model, "base_model", model)
    body = getattr(body, "model", body).base_model if hasattr(model, "peft_config") else model.base_model
    ids = torch.zeros((1, num_tokens), dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        output = body(input_ids=ids, position_ids=torch.arange(num_tokens)[None], use_cache=False)[0]
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)


@pytest.mark.parametrize("adapter", [FULL, LoraAdapter(rank=8)], ids=["full", "lora"])
def test_a_plain_engine_holds_the_planned_weights_gradients_and_optimizer(adapter: Adapter) -> None:
    model = AutoModelForCausalLM.from_config(demo_config())
    if isinstance(adapter, LoraAdapter):
        model = add_adapter(model, adapter, revision=None, seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    engine = PlainEngine(model, optimizer, precision="fp32", max_grad_norm=1.0, device=torch.device("cpu"))
    ids = torch.zeros((1, 8), dtype=torch.long)
    engine.backward(engine.module(input_ids=ids).logits.sum())
    parts = by_part(workload(DEMO, adapter, precision="fp32", is_on_gpu=False))
    assert parts["gradients"] == engine.held_bytes().gradients
    engine.step(1e-3)
    held = engine.held_bytes()
    assert parts["weights"] == held.weights
    num_step_counters = len(trained)
    assert parts["optimizer"] == held.optimizer - 4 * num_step_counters


@pytest.mark.parametrize(("method", "optimizer"), chequered([*ADAPTERS], ["adamw", "adamw_8bit", "adafactor", "lion"]))
def test_a_checkpoint_of_a_plain_engine_has_the_planned_size(method: str, optimizer: Optimizer, tmp_path: Path) -> None:
    """Within 3 %: headers of safetensors, Adam's step counters, code tables of 8-bit Adam."""
    # Wide, because 8-bit Adam keeps small matrices in 32 bits; with an embedding of weight, because it keeps those so too.
    config = demo_config(hidden_size=512, intermediate_size=1024, num_hidden_layers=2, vocab_size=4096)
    adapter = FULL if method == "full" else LoraAdapter(rank=64)
    model: Any = AutoModelForCausalLM.from_config(config)
    if isinstance(adapter, LoraAdapter):
        model = add_adapter(model, adapter, revision=None, seed=0)
    settings = tiny_plan(optimization={"optimizer": optimizer}).optimization
    device = torch.device("cpu")
    engine = PlainEngine(
        model, build_optimizer(model, settings, device=device), precision="fp32", max_grad_norm=1.0, device=device
    )
    engine.backward(engine.module(input_ids=torch.zeros((1, 8), dtype=torch.long)).logits.sum())
    engine.step(1e-3)
    engine.save(tmp_path)
    saved = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    work = workload(model_shape(config.to_dict(), "x"), adapter, precision="fp32", optimizer=optimizer)
    assert checkpoint_bytes(work) == pytest.approx(saved, rel=0.03)
    # And what it is copied into is enough.
    memory = HostMemory(round(SPARE * saved_by_ranks(work)[0]), device)
    planned = memory.num_bytes
    engine.save(tmp_path / "copied", Snapshot(memory))
    assert memory.num_bytes == planned


def test_a_checkpoint_has_the_published_bytes_per_parameter() -> None:
    """ZeRO, section 3: 4 of masters and 8 of moments, sharded or not; 2 of bf16 weights where every rank holds them whole."""
    parameters = LLAMA_3_8B.num_parameters
    assert checkpoint_bytes(workload()) == 12 * parameters
    assert [checkpoint_bytes(workload(zero_stage=stage, workers=8)) / parameters for stage in (1, 2, 3)] == [14, 14, 12]


DROPPED: list[tuple[str, str, dict[str, float], str]] = [
    ("gpt2", "hidden", {"resid_pdrop": 0.1}, "sdpa"),
    ("phi3", "hidden", {"resid_pdrop": 0.1}, "sdpa"),
    ("llama", "attention", {"attention_dropout": 0.1}, "sdpa"),
    ("gpt2", "attention", {"attn_pdrop": 0.1}, "sdpa"),
    ("llama", "attention", {"attention_dropout": 0.1}, "eager"),
    ("gpt_neox", "attention", {"attention_dropout": 0.1}, "eager"),
]


@pytest.mark.parametrize(("family", "kind", "rates", "attention"), DROPPED)
def test_masks_of_dropout_are_planned(family: str, kind: str, rates: dict[str, float], attention: str) -> None:
    """What autograd keeps on top of the same model without it: within 10 %."""
    shape = model_shape(type(CONFIGS[family])(**READ[family]).to_dict(), "x")
    kept = {}
    for dropped in ({}, rates):
        sizes: dict[str, Any] = READ[family] | {"num_hidden_layers": 3, "vocab_size": 101, "pad_token_id": 0} | dropped
        config = type(CONFIGS[family])(**sizes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
        kept[bool(dropped)] = saved_bytes(model, "fp32", num_tokens=128)
    works = [
        workload(shape, precision="fp32", num_tokens=128, attention=attention, is_on_gpu=False, drops=drops)
        for drops in (frozenset(), frozenset({kind}))
    ]
    without, with_masks = (3 * layer_activation_bytes(work) for work in works)
    assert with_masks - without == pytest.approx(kept[True] - kept[False], rel=0.1)


def test_a_kernel_of_a_gpu_draws_masks_of_attention_again() -> None:
    drops = frozenset({"attention"})
    assert by_part(workload(drops=drops)) == by_part(workload())
    assert by_part(workload(drops=drops, attention="eager")) != by_part(workload(attention="eager"))
