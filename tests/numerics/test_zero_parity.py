"""Sharded = unsharded: the same steps on two ranks, at every ZeRO stage, as in one plain process."""

import shutil
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from raytune.errors import CheckpointError, ModelError
from raytune.plan.run_plan import RunPlan
from raytune.training.engines.engine import HeldBytes
from tests.numerics.processes import RankError, run_on_ranks
from tests.numerics.runs import (
    LORA,
    QLORA,
    SAME_SUMS,
    Change,
    Material,
    Outcome,
    Spoil,
    largest_difference,
    make_plan,
    outcome,
    relative_difference,
    run,
    start,
    steps_of,
    train,
    train_spoiled,
)
from tests.variants import variants

ADAPTERS = {"full": {"method": "full"}, "lora": LORA}
# One unit in the last of bf16's eight bits.
BF16_UNIT = 2**-8
BF16 = {"precision": "bf16", "model": {"dtype": "bf16", "compute_dtype": "bf16"}}


@pytest.fixture(scope="module")
def alone(material: Material) -> Callable[[str], Outcome]:
    """What one plain process has, by adapter."""
    return cache(lambda adapter: train(make_plan(material, adapter=ADAPTERS[adapter])))


@pytest.mark.parametrize(
    ("stage", "adapter"),
    variants([(0, "lora"), (1, "full"), (2, "lora"), (3, "full"), (3, "lora")], [(0, "full"), (1, "lora"), (2, "full")]),
)
def test_every_stage_on_two_ranks_equals_one_plain_process(
    stage: int, adapter: str, material: Material, alone: Callable[[str], Outcome]
) -> None:
    sharded = run(make_plan(material, workers=2, stage=stage, adapter=ADAPTERS[adapter]))
    assert sharded[0].numbers == sharded[1].numbers
    assert relative_difference(sharded[0].losses, alone(adapter).losses) <= SAME_SUMS
    assert largest_difference(sharded[0], alone(adapter)) <= SAME_SUMS
    norms = [[numbers.grad_norm for numbers in outcome.numbers] for outcome in (sharded[0], alone(adapter))]
    assert relative_difference(*norms) <= SAME_SUMS
    assert max(norms[1]) > 0.5  # the clip did something


@pytest.mark.parametrize(
    "where", variants([{"offload_optimizer": "cpu", "offload_parameters": "cpu"}], [{"offload_optimizer": "cpu"}])
)
@pytest.mark.parametrize("stage", variants([3], [2]))
def test_offload_changes_no_number(
    stage: int, where: dict[str, str], material: Material, alone: Callable[[str], Outcome]
) -> None:
    if stage == 2 and "offload_parameters" in where:
        pytest.skip("only stage 3 shards weights, so only there can they be offloaded")
    # Without it, two ranks equal one plain process: above.
    here = alone("full")
    offloaded = run(make_plan(material, workers=2, engine={"kind": "zero", "zero_stage": stage} | where))[0]
    assert relative_difference(offloaded.losses, here.losses) <= SAME_SUMS
    assert largest_difference(offloaded, here) <= SAME_SUMS


def train_and_show_masters(plan: RunPlan) -> tuple[Outcome, float]:
    """A run, and the share of its fp32 master weights that bf16 could not hold."""
    from deepspeed.utils import safe_get_full_fp32_param

    engine, loss_sum, batches_of = start(plan)
    numbers = [result.read(engine) for result in steps_of(plan, engine, loss_sum, batches_of)]
    masters = torch.cat([safe_get_full_fp32_param(parameter).flatten() for parameter in engine.model.parameters()])
    return outcome(engine, numbers), (masters != masters.bfloat16().float()).float().mean().item()


@pytest.mark.parametrize("stage", variants([3], [1, 2]))
def test_bf16_shards_have_fp32_masters_and_stay_near_fp32(stage: int, material: Material) -> None:
    exact = train(make_plan(material))
    bf16, finer_than_bf16 = run_on_ranks(train_and_show_masters, 2, make_plan(material, workers=2, stage=stage, **BF16))[0]
    assert relative_difference(bf16.losses, exact.losses) <= BF16_UNIT
    assert finer_than_bf16 > 0.9
    assert bf16.dtypes == {torch.bfloat16}
    num_trained = sum(value.numel() for value in bf16.weights.values())
    # Two moments and a master of 4 bytes each, on half of the parameters.
    assert bf16.held.optimizer == pytest.approx(12 * num_trained / 2, rel=0.01)
    assert bf16.held.weights == pytest.approx(2 * num_trained / (2 if stage == 3 else 1), rel=0.05)


def test_bf16_without_shards_trains_fp32_weights_and_stays_near_fp32(material: Material) -> None:
    exact = train(make_plan(material))
    plan = make_plan(material, workers=2, precision="bf16", model={"dtype": "fp32", "compute_dtype": "bf16"})
    bf16 = run(plan)[0]
    assert bf16.losses != exact.losses
    assert relative_difference(bf16.losses, exact.losses) <= BF16_UNIT
    assert bf16.dtypes == {torch.float32}


@pytest.mark.parametrize("stage", variants([3], [0, 2]))
def test_qlora_equals_bitsandbytes_and_peft_in_a_plain_loop(stage: int, material: Material) -> None:
    from tests.numerics.oracles import plain_qlora_losses

    plan = make_plan(material, workers=2, stage=stage, adapter=QLORA)
    assert relative_difference(run(plan)[0].losses, plain_qlora_losses(make_plan(material, adapter=QLORA))) <= SAME_SUMS


@pytest.mark.slow  # the rank that fails is waited for
def test_dora_of_4_bit_weights_works_below_stage_3_only(material: Material) -> None:
    """Why the plan refuses it there (plan.stages)."""
    dora = QLORA | {"use_dora": True}
    assert len(run(make_plan(material, workers=2, stage=2, adapter=dora))[0].losses) > 0
    with pytest.raises(RankError, match="'Params4bit' object has no attribute 'ds_status'"):
        run(make_plan(material, workers=2, stage=3, adapter=dora))


def held_before_the_step(plans: list[RunPlan]) -> list[HeldBytes]:
    """What a rank holds of each plan between backward and step, after one whole step."""
    found = []
    for plan in plans:
        engine, loss_sum, batches_of = start(plan)
        for batch in batches_of(0):
            engine.backward(loss_sum(engine.module, batch) / batch.num_targets_in_step)
        engine.step(1e-3)
        for batch in batches_of(1):
            engine.backward(loss_sum(engine.module, batch) / batch.num_targets_in_step)
        found.append(engine.held_bytes())
    return found


def test_each_stage_divides_what_it_promises_to_divide(material: Material) -> None:
    plans = [make_plan(material, workers=2, stage=stage) for stage in (0, 1, 2, 3)]
    held = [*zip(*run_on_ranks(held_before_the_step, 2, plans), strict=True)]
    weights = held[0][0].weights
    assert [held[stage][rank].weights for stage in (0, 1, 2) for rank in (0, 1)] == [weights] * 6
    assert [held[3][rank].weights for rank in (0, 1)] == pytest.approx([weights / 2] * 2, rel=0.01)
    for rank in (0, 1):
        gradients = [held[stage][rank].gradients for stage in (0, 1, 2, 3)]
        # Stage 2 keeps the parameter that lies across the border of two shards whole on one of them.
        assert gradients == pytest.approx([weights, weights, weights / 2, weights / 2], rel=0.2)
    # Plain: two moments of 4 bytes. ZeRO: two moments and a master, on half of the parameters.
    optimizer = [held[stage][0].optimizer for stage in (0, 1, 2, 3)]
    assert optimizer == pytest.approx([2 * weights, 1.5 * weights, 1.5 * weights, 1.5 * weights], rel=0.01)


@pytest.fixture(scope="module")
def after_three_steps(material: Material) -> Callable[[int], Outcome]:
    """What rank 0 of two has after three steps, by stage."""
    return cache(lambda stage: run(make_plan(material, workers=2, stage=stage), Change(stop=3))[0])


@pytest.mark.parametrize(
    ("stage", "what"),
    variants([(0, "loss"), (3, "gradient")], [(0, "gradient"), (3, "loss"), *product((1, 2), ("loss", "gradient"))]),
)
def test_a_number_that_is_not_finite_stops_all_ranks_before_the_update(
    stage: int, what: str, material: Material, after_three_steps: Callable[[int], Outcome]
) -> None:
    plan = make_plan(material, workers=2, stage=stage)
    before = after_three_steps(stage)
    (message, after), (other_message, _) = run_on_ranks(train_spoiled, 2, plan, Spoil(step=3, rank=1, what=what))
    assert message == other_message
    assert f"The {what} of step 4 is not finite" in message
    assert "rank 1: inf on rows" in message if what == "loss" else "every loss is finite" in message
    assert largest_difference(after, before) == 0
    assert len(after.numbers) == 3


def test_bf16_at_every_stage_stops_too(material: Material) -> None:
    for stage in (1, 2, 3):
        outcomes = run_on_ranks(
            train_spoiled, 2, make_plan(material, workers=2, stage=stage, **BF16), Spoil(step=1, rank=0, what="gradient")
        )
        assert all("The gradient of step 2 is not finite" in message for message, _ in outcomes)


def adapter_on_each_rank(plan: RunPlan) -> list[tuple[str, tuple[int, ...] | None]]:
    engine, _, _ = start(plan)
    return [(name, None if value is None else tuple(value.shape)) for name, value in engine.trainable_state(torch.bfloat16)]


def test_stage_3_gathers_the_adapter_alone_and_on_rank_0_alone(material: Material) -> None:
    plain = dict(adapter_on_each_rank(make_plan(material, adapter=LORA)))
    first, second = run_on_ranks(adapter_on_each_rank, 2, make_plan(material, workers=2, stage=3, adapter=LORA))
    assert dict(first) == plain
    assert all("lora_" in name for name, _ in first)
    assert [name for name, _ in second] == [name for name, _ in first]
    assert {shape for _, shape in second} == {None}


def load_state(plan: RunPlan, folder: Path) -> None:
    engine, _, _ = start(plan)
    engine.load(folder)


class _Payload:
    """Pickles to a call, as an attacker's file would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def spoil_and_load(plan: RunPlan, folder: Path) -> None:
    engine, _, _ = start(plan)
    engine.save(folder)
    dist.barrier()
    if engine.rank == 0:
        for file in (folder / "zero").glob("*_optim_states.pt"):
            torch.save({"optimizer_state_dict": _Payload(folder / "was_here")}, file)
    dist.barrier()
    load_state(plan, folder)


def test_a_pickle_in_a_checkpoint_is_not_executed(material: Material, tmp_path: Path) -> None:
    outcomes = run_on_ranks(spoil_and_load, 2, make_plan(material, workers=2, stage=2), tmp_path)
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("adapter", [LORA, QLORA], ids=["lora", "nf4"])
@pytest.mark.parametrize("change", ["missing", "shape"])
def test_every_rank_refuses_a_base_that_lacks_a_tensor_or_has_one_of_another_shape(
    change: str, adapter: dict, material: Material, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    base = shutil.copytree(material.model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    matrix = tensors.pop(name)
    save_file(tensors | ({name: matrix[:60]} if change == "shape" else {}), base / "model.safetensors", {"format": "pt"})
    plan = make_plan(material, workers=2, stage=3, adapter=adapter)
    outcomes = run(plan.model_copy(update={"model": plan.model.model_copy(update={"path": str(base)})}))
    assert [type(outcome) for outcome in outcomes] == [ModelError, ModelError]
    assert all(name in str(outcome) for outcome in outcomes)
