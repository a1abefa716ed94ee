"""Each method of PEFT = plain PEFT, written here without our training code: curve, ZeRO's stages, files, merging, a resume."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raytune.errors import ModelError
from raytune.model.files.export import save_adapter
from raytune.model.inference import load_saved
from raytune.model.load import load_model
from raytune.model.merging.merge import merge_adapter
from raytune.plan.costs.memory import checkpoint_bytes, memory_parts, tensor_bytes
from raytune.plan.methods import trained_by
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.run_plan import RunPlan, ZeroStage
from raytune.training.engines.engine import HeldBytes
from tests.numerics.measured_bytes import measure_all, measure_peaks, of_one_process
from tests.numerics.oracles import adapted_losses
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    SAME_SUMS,
    Change,
    Material,
    Outcome,
    largest_difference,
    make_plan,
    outcome,
    relative_difference,
    run,
    start,
    steps_of,
    train,
    with_long_rows,
)
from tests.numerics.test_plan_bytes import persisted_activations
from tests.numerics.test_plan_bytes import planned as planned_bytes
from tests.peft_methods import EVERY, IN_FRONT, METHODS
from tests.tiny import save_tiny_model
from tests.variants import variants

CPU = torch.device("cpu")
IDS = torch.arange(3, 60)[None]
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
    bnb_4bit_quant_storage=torch.uint8,
)
SLOW = pytest.mark.slow
# Norms have no inputs and outputs; PEFT warns of them in every use.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    # AdaLoRA's, which PEFT 0.21 takes for LoRA's when it looks for the layers of a pattern.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
]


def plan_of(method: str, material: Material, **changes: Any) -> RunPlan:
    row = EVERY[method]
    return make_plan(material, adapter=row.section, optimization={"learning_rate": row.rate, "weight_decay": 0.0}, **changes)


@cache
def run_alone(method: str, material: Material) -> tuple[Any, Outcome]:
    """One plain process: the engine as it ends, and what it saw."""
    plan = plan_of(method, material)
    engine, loss_sum, batches_of = start(plan)
    numbers = [result.read(engine) for result in steps_of(plan, engine, loss_sum, batches_of)]
    return engine, outcome(engine, numbers)


def plain_losses(plan: RunPlan, method: str, **base: Any) -> list[float]:
    model: Any = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32, **base)
    torch.manual_seed(plan.seed)
    row = EVERY[method]
    return adapted_losses(row.adapted(model), plan, row.penalty, row.after_step)


LIKE_OTHERS = ("boft", "projected prefix_tuning", "adalora")
"""Trained on several ranks too, or by the code of another one."""


@pytest.mark.parametrize("method", variants([name for name in EVERY if name not in LIKE_OTHERS], LIKE_OTHERS))
def test_the_curve_is_plain_peft_s(method: str, material: Material) -> None:
    losses = run_alone(method, material)[1].losses
    assert relative_difference(losses, plain_losses(plan_of(method, material), method)) <= SAME_SUMS
    assert losses[-1] < losses[0] - 0.005, "something was learned"


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name == "ia3" else SLOW) for name, row in EVERY.items() if row.takes_nf4]
)
def test_the_curve_is_plain_peft_s_over_a_base_in_nf4(method: str, material: Material) -> None:
    quantization = {"format": "nf4", "compute_dtype": "fp32", "quant_storage": "uint8"}
    plan = plan_of(method, material)
    plan = plan_of(method, material, model=plan.model.model_dump() | {"quantization": quantization})
    plain = plain_losses(plan, method, quantization_config=NF4, device_map={"": "cpu"})
    assert relative_difference(train(plan).losses, plain) <= SAME_SUMS


OVER_NF4 = [*(name for name, row in METHODS.items() if row.takes_nf4), *IN_FRONT]
OFTEN_OVER_NF4 = ["vera", "prefix_tuning"]
OFTEN_DIVIDED = ["vera", "adalora", "bottleneck", "prefix_tuning"]


@pytest.mark.parametrize("method", variants(OFTEN_OVER_NF4, [name for name in OVER_NF4 if name not in OFTEN_OVER_NF4]))
def test_over_nf4_in_bf16_an_engine_of_deepspeed_learns_what_a_plain_one_does(method: str, material: Material) -> None:
    """Within what bf16 rounds: one has masters and no autocast, the other autocast."""
    quantization = {"format": "nf4", "compute_dtype": "bf16", "quant_storage": "bf16"}
    held = {"path": str(material.model), "dtype": "bf16", "compute_dtype": "bf16", "quantization": quantization}
    plans = [plan_of(method, material, stage=stage, precision="bf16", model=held) for stage in (0, 1)]
    few = Change(stop=2)  # products in 16 bits take long on a CPU
    plain, sharded = train(plans[0], few).losses, run(plans[1], few)[0].losses
    assert relative_difference(sharded, plain) <= 2e-3


@pytest.mark.parametrize("stage", variants([3], [0, 1, 2]))
@pytest.mark.parametrize("method", variants(OFTEN_DIVIDED, [name for name in EVERY if name not in OFTEN_DIVIDED]))
def test_every_stage_on_two_ranks_equals_one_plain_process(method: str, stage: int, material: Material) -> None:
    alone = run_alone(method, material)[1]
    sharded = run(plan_of(method, material, workers=2, stage=stage))
    assert sharded[0].numbers == sharded[1].numbers
    assert relative_difference(sharded[0].losses, alone.losses) <= SAME_SUMS
    assert largest_difference(sharded[0], alone) <= EVERY[method].same_weights


@pytest.mark.parametrize("method", variants(OFTEN_DIVIDED, [name for name in EVERY if name not in OFTEN_DIVIDED]))
def test_a_base_of_which_no_layer_stays_gathered_computes_the_same(method: str, material: Material) -> None:
    """As a large base does at stage 3: DeepSpeed lets go of a layer's weights as soon as it has computed."""
    alone = run_alone(method, material)[1]
    lets_go = {"zero_optimization": {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}}
    lets_go["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    plan = plan_of(method, material, stage=3)
    plan = plan.model_copy(update={"engine": plan.engine.model_copy(update={"deepspeed_overrides": lets_go})})
    assert relative_difference(run(plan, Change(stop=2))[0].losses, alone.losses[:2]) <= SAME_SUMS


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=SLOW)])
@pytest.mark.parametrize("method", variants(OFTEN_DIVIDED, [name for name in EVERY if name not in OFTEN_DIVIDED]))
def test_resumed_equals_unbroken(method: str, stage: int, material: Material, tmp_path: Path) -> None:
    plan = plan_of(method, material, stage=stage)
    unbroken = run_alone(method, material)[1] if stage == 0 else run(plan)[0]
    (train if stage == 0 else run)(plan, Change(stop=2, save=tmp_path))
    change = Change(start=2, load=tmp_path / "rank-0")
    resumed = train(plan, change) if stage == 0 else run(plan, change)[0]
    assert resumed.losses == unbroken.losses[2:]
    assert largest_difference(resumed, unbroken) == 0


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_computes_the_same_in_plain_peft_and_merged(method: str, material: Material, tmp_path: Path) -> None:
    engine, seen = run_alone(method, material)
    path = str(material.model)
    save_adapter(engine.model, seen.weights, tmp_path / "adapter")
    ours = logits(engine.model.eval())
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    before = logits(base)
    plain = METHODS[method].reloaded(base, tmp_path / "adapter").eval()
    assert (ours - before).abs().max() > 1e-2
    assert (ours - logits(plain)).abs().max() <= SAME_SUMS
    loaded: Any = load_saved(plan_of(method, material), tmp_path / "adapter", device=CPU)
    assert {name for name, one in loaded.named_parameters() if one.requires_grad} == {*seen.weights}
    assert (ours - logits(loaded.eval())).abs().max() <= SAME_SUMS
    if unmerged := METHODS[method].why_unmerged:
        with pytest.raises(ModelError, match=unmerged):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        return
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    as_peft: Any = plain
    for name, value in as_peft.merge_and_unload().state_dict().items():
        assert (merged.state_dict()[name] - value).abs().max() <= SAME_SUMS, name
    assert (ours - logits(merged)).abs().max() <= 1e-5, "sums in another order"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def own_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_plain_peft_s_and_computes_what_the_base_does(method: str, material: Material) -> None:
    plan = plan_of(method, material)
    ours: Any = load_model(plan.model, plan.adapter, device=CPU, seed=plan.seed)
    base: Any = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    before = logits(base)
    assert (logits(ours.eval()) - before).abs().max() == 0
    torch.manual_seed(plan.seed)
    theirs = {own_name(name): one for name, one in METHODS[method].adapted(base).named_parameters() if one.requires_grad}
    trained = {own_name(name): one for name, one in ours.named_parameters() if one.requires_grad}
    assert trained.keys() == theirs.keys()
    assert all(trained[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("method", EVERY)
def test_an_engine_holds_the_planned_bytes(method: str, material: Material, tmp_path: Path) -> None:
    seen = run_alone(method, material)[1]
    shape = read_model_shape(str(material.model))
    trained = trained_by(plan_of(method, material).adapter, shape)
    assert trained.num_trainable == sum(value.numel() for value in seen.weights.values())
    work = of_one_process(shape, trained)
    planned = {part.name: part.num_bytes for part in memory_parts(work)}
    held: HeldBytes = seen.held
    counters = 4 * len(seen.weights)
    assert planned["weights"] == pytest.approx(held.weights, rel=1e-6)
    assert planned["gradients"] == 4 * trained.num_trainable
    assert planned["optimizer"] == held.optimizer - counters, "a step counter per parameter besides"
    assert checkpoint_bytes(work) == 12 * trained.num_trainable + 8 * trained.num_followed


LARGER: dict[str, dict[str, Any]] = {"lokr": {"rank": 8}, "loha": {"rank": 8}, "vera": {"rank": 64}, "oft": {"block_size": 32}}
LARGER |= {"adalora": {"rank": 8, "initial_rank": 12}}
"""As large beside the base as they are of larger models."""
WAYS: list[tuple[str, bool]] = [
    (method, checkpointing)
    for method in EVERY
    for checkpointing in (False, True)
    if not (checkpointing and "prefix_tuning" in method)
]


@SLOW
@pytest.mark.timeout(3000)  # half an hour of a busy machine for all three
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_rank_takes_the_planned_bytes(stage: ZeroStage, material: Material, tmp_path: Path) -> None:
    """Within 5 %, activations and the fullest moment of a step, but at stage 3, which gathers weights when it likes."""
    wide = replace(with_long_rows(material, tmp_path), model=tmp_path / "model")
    sizes = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "head_dim": 16}
    save_tiny_model(wide.model, tied=False, **sizes | {"num_attention_heads": 8, "num_key_value_heads": 4})
    # Two rows: what is kept of weights is little beside them.
    cases = [
        planned_bytes(wide, stage, EVERY[method].section | LARGER.get(method, {}), has_checkpointing=checkpointing, num_rows=2)
        for method, checkpointing in WAYS
    ]
    plans = [plan for _, plan in cases]
    works = []
    for way, (work, _), held in zip(WAYS, cases, run_on_ranks(measure_all, 2, plans, timeout_s=1400)[0]):
        counted = {"num_tokens": held.num_tokens, "num_targets": held.num_targets, "num_virtual_keys": held.num_virtual_keys}
        works.append(replace(work, **counted))
        assert persisted_activations(works[-1]) == pytest.approx(held.activations, rel=0.05), way
    for way, work, peak in zip(WAYS, works, run_on_ranks(measure_peaks, 2, plans, timeout_s=1400)[0]):
        if work.zero_stage < 3:
            planned = tensor_bytes(memory_parts(work))
            assert planned == pytest.approx(peak.num_bytes, rel=0.05), way
