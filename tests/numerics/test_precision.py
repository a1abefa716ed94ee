"""fp16, the compiled model, and evaluation: what PlainEngine does besides fp32 steps."""

import math

import pytest
import torch
from torch import Tensor, nn

from raytune.data.batches.batches import Batch
from raytune.errors import TrainingError
from raytune.model.attention.attention import model_inputs
from raytune.model.load import load_model
from raytune.plan.run_plan import RunPlan
from raytune.training.engines.engine import INITIAL_LOSS_SCALE
from raytune.training.engines.optimizer import build_optimizer
from raytune.training.losses.losses import attach_loss
from raytune.training.steps.loop import evaluate_loss, step_seed
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    LORA,
    QLORA,
    SAME_SUMS,
    Change,
    Material,
    Outcome,
    Spoil,
    batches_of_rank,
    make_plan,
    relative_difference,
    start,
    steps_of,
    train,
    train_spoiled,
    until_stopped,
)
from tests.variants import variants

CPU = torch.device("cpu")
FP16 = {"precision": "fp16", "model": {"compute_dtype": "fp16"}}
# One unit in the last of fp16's eleven bits.
FP16_UNIT = 2**-11


def test_fp16_scales_its_loss_and_stays_near_fp32(material: Material) -> None:
    exact, fp16 = train(make_plan(material)), train(make_plan(material, **FP16))
    assert fp16.losses != exact.losses
    assert relative_difference(fp16.losses, exact.losses) <= FP16_UNIT
    assert {numbers.loss_scale for numbers in fp16.numbers} == {INITIAL_LOSS_SCALE}
    assert fp16.dtypes == {torch.float32}


def test_an_fp16_overflow_on_one_rank_skips_the_step_on_all_and_halves_the_scale(material: Material) -> None:
    plan = make_plan(material, workers=2, **FP16)
    outcomes = run_on_ranks(train_spoiled, 2, plan, Spoil(step=2, rank=1, what="gradient"))
    for message, outcome in outcomes:
        assert message == ""
        assert [numbers.updated for numbers in outcome.numbers] == [True, True, False, True]
        assert [numbers.loss_scale for numbers in outcome.numbers][1:4] == [INITIAL_LOSS_SCALE, *[INITIAL_LOSS_SCALE / 2] * 2]
        assert all(math.isfinite(loss) for loss in outcome.losses)


def train_fp16_shards(plan: RunPlan, stage: int, spoil: Spoil) -> tuple[str, Outcome]:
    """The same on shards. DeepSpeed believes that no CPU computes in fp16; PyTorch does."""
    from deepspeed.accelerator import get_accelerator

    from raytune.training.engines.deepspeed_json import deepspeed_config
    from raytune.training.engines.zero_engine import ZeroEngine

    get_accelerator().is_fp16_supported = lambda: True
    zero = plan.model_copy(update={"engine": plan.engine.model_copy(update={"kind": "zero", "zero_stage": stage})})
    on_gpu = zero.model_copy(update={"cluster": plan.cluster.model_copy(update={"device": "cuda"})})
    in_fp32 = zero.model_copy(update={"precision": "fp32"})
    config = deepspeed_config(in_fp32) | {"fp16": deepspeed_config(on_gpu)["fp16"]}
    model = load_model(plan.model, plan.adapter, device=CPU, seed=plan.seed)
    optimizer = build_optimizer(model, plan.optimization, device=CPU)
    engine = ZeroEngine(model, optimizer, config, precision="fp16", device=CPU)
    layer = attach_loss(engine.model, None)
    return until_stopped(
        plan,
        engine,
        lambda module, batch: layer.loss_sum(module, batch, model_inputs(batch, "varlen")),
        batches_of_rank(plan),
        spoil,
    )


@pytest.mark.parametrize("stage", variants([3], [1, 2]))
def test_fp16_shards_skip_an_overflow_and_stop_at_a_bad_loss(stage: int, material: Material) -> None:
    plan = make_plan(material, workers=2, precision="fp16", model={"dtype": "fp16", "compute_dtype": "fp16"})
    exact = train(make_plan(material))
    for message, outcome in run_on_ranks(train_fp16_shards, 2, plan, stage, Spoil(step=2, rank=1, what="gradient")):
        assert message == ""
        assert [numbers.updated for numbers in outcome.numbers] == [True, True, False, True]
        assert [numbers.loss_scale for numbers in outcome.numbers][1:4] == [INITIAL_LOSS_SCALE, *[INITIAL_LOSS_SCALE / 2] * 2]
        assert relative_difference(outcome.losses[:3], exact.losses[:3]) <= FP16_UNIT
        assert outcome.dtypes == {torch.float16}
    for message, outcome in run_on_ranks(train_fp16_shards, 2, plan, stage, Spoil(step=2, rank=1, what="loss")):
        assert "The loss of step 3 is not finite (rank 1: inf on rows" in message
        assert len(outcome.numbers) == 2


def test_a_loss_that_is_not_finite_stops_fp16_too(material: Material) -> None:
    message, outcome = train_spoiled(make_plan(material, **FP16), Spoil(step=2, rank=0, what="loss"))
    assert "The loss of step 3 is not finite (rank 0: inf on rows" in message
    assert len(outcome.numbers) == 2


def test_fp16_that_overflows_at_every_scale_stops(material: Material) -> None:
    plan = make_plan(material, batch={"accumulation": 1, "micro_batch_size": 1}, **FP16)
    engine, loss_sum, batches_of = start(plan)

    def overflowing(module: nn.Module, batch: Batch) -> Tensor:
        loss = loss_sum(module, batch)
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    skipped = []
    with pytest.raises(TrainingError, match=r"The gradient of step 17 is not finite .* loss scale 0.5"):
        skipped += [result.read(engine).updated for result in steps_of(plan, engine, overflowing, batches_of, Change(stop=30))]
    assert not any(skipped)


@pytest.mark.parametrize("adapter", [LORA | {"dropout": 0.5}, QLORA | {"dropout": 0.5}], ids=["lora", "qlora"])
def test_evaluation_has_no_dropout_and_leaves_training_as_it_was(adapter: dict, material: Material) -> None:
    plan = make_plan(material, adapter=adapter)
    engine, loss_sum, batches_of = start(plan)
    list(steps_of(plan, engine, loss_sum, batches_of))  # an adapter that does nothing would drop out unseen
    losses = [evaluate_loss(engine, batches_of(0), loss_sum) for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0].num_targets == batches_of(0)[0].num_targets_in_step
    assert all(module.training for module in engine.model.modules())
    quiet = sum(loss_sum(engine.module, batch).item() for batch in batches_of(0)) / losses[0].num_targets
    assert quiet != losses[0].loss  # training drops out again


def evaluate(plan: RunPlan) -> float:
    engine, loss_sum, batches_of = start(plan)
    return evaluate_loss(engine, batches_of(0), loss_sum).loss


def test_evaluation_weighs_every_target_the_same_over_all_ranks(material: Material) -> None:
    alone = evaluate(make_plan(material))
    divided = run_on_ranks(evaluate, 2, make_plan(material, workers=2, stage=3))
    assert divided[0] == divided[1]
    assert relative_difference(divided, [alone] * 2) <= SAME_SUMS


def test_seeds_differ_between_steps_ranks_and_runs() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(8)}
    assert len(seeds) == 5 * 50 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.slow  # a cold compiler takes a minute
def test_a_compiled_model_trains_like_the_eager_one(material: Material) -> None:
    compiled = train(make_plan(material, model={"compile": True}))
    # Fused kernels add in another order, in every layer.
    assert relative_difference(compiled.losses, train(make_plan(material)).losses) <= 10 * SAME_SUMS
