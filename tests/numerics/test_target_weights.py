"""What weights do to a loss: those of 1 nothing at all, bit for bit; others what the definition says, on every engine."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raytune.config.sections.adapter import LoraAdapter
from raytune.data.batches.batches import Batch, step_batches
from raytune.data.store.store import Store
from raytune.plan.run_plan import RunPlan
from raytune.training.losses.losses import attach_loss
from raytune.training.losses.objectives import TokenTargets
from tests.numerics.oracles import PROJECTIONS
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    LORA,
    SAME_SUMS,
    Change,
    Material,
    Outcome,
    largest_difference,
    make_plan,
    outcome,
    relative_difference,
    run,
    short_rows,
    start,
    steps_of,
    train,
)
from tests.numerics.test_losses import MODELS, assert_same_gradients, build, gradients, inputs_of, make_batch
from tests.tiny import store_plan, tiny_store
from tests.variants import variants


def ones(batch: Batch) -> Batch:
    weights = torch.ones(batch.num_targets)
    return replace(batch, target_weights=weights, weight_in_step=float(batch.num_targets_in_step))


@pytest.mark.parametrize("chunk_tokens", [None, 7])
@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_1_change_no_bit_of_the_loss_and_its_gradients(kind: str, chunk_tokens: int | None) -> None:
    model = build(kind)
    layer = attach_loss(model, chunk_tokens)
    for batch in (make_batch(23), make_batch(0)):
        without = layer.loss_sum(model, batch, inputs_of(batch))
        expected = gradients(model, without)
        with_ones = layer.loss_sum(model, ones(batch), inputs_of(batch))
        assert torch.equal(with_ones, without)
        found = gradients(model, with_ones)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
        with torch.no_grad():
            evaluated = [layer.loss_sum(model, one, inputs_of(batch)) for one in (batch, ones(batch))]
        assert torch.equal(*evaluated)


@pytest.mark.parametrize("how", ["bf16 weights", "bf16 autocast", "fp16 autocast"])
@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_weights_of_1_change_no_bit_in_16_bits_either(how: str, chunk_tokens: int | None) -> None:
    model, batch = build("saved head"), make_batch(23)
    if how == "bf16 weights":
        model.bfloat16()
    layer, found = attach_loss(model, chunk_tokens), []
    for one in (batch, ones(batch)):
        with torch.autocast("cpu", torch.float16 if how.startswith("fp16") else torch.bfloat16, enabled="autocast" in how):
            loss = layer.loss_sum(model, one, inputs_of(batch))
        found.append([loss, *gradients(model, loss).values()])
    assert all(torch.equal(*pair) for pair in zip(*found))


@pytest.mark.parametrize("chunk_tokens", [None, 7])
@pytest.mark.parametrize("kind", MODELS)
def test_weighted_losses_and_gradients_are_those_of_the_definition(kind: str, chunk_tokens: int | None) -> None:
    model, batch = build(kind), make_batch(23)
    weights = torch.rand(23, generator=torch.Generator().manual_seed(5)) * 3
    weights[4] = 0.0
    logits = model(**inputs_of(batch)).logits[0][batch.target_positions].float()
    losses = F.cross_entropy(logits, batch.target_ids, reduction="none")
    theirs = gradients(model, (losses * weights).sum())
    layer = attach_loss(model, chunk_tokens)
    loss = layer.loss_sum(model, replace(batch, target_weights=weights), inputs_of(batch))
    torch.testing.assert_close(loss, (losses * weights).sum(), rtol=2e-6, atol=0)  # 23 fp32 terms (1.2e-7) in another order
    assert_same_gradients(gradients(model, loss), theirs, atol=3e-6)  # weights of up to 3
    # The loss of each target alone knows no weight, and lets go of the graph.
    each = layer.losses(model, replace(batch, target_weights=weights), inputs_of(batch))
    torch.testing.assert_close(each, losses, rtol=2e-6, atol=1e-6)  # logits of a few fp32 ulp, and losses near 0
    assert not each.requires_grad
    assert layer.losses(model, make_batch(0), inputs_of(batch)).shape == (0,)


@pytest.mark.parametrize("weight", [1e-6, 1e-3, 1e6])
def test_weights_of_all_alike_change_nothing_in_fp16_whatever_they_are(weight: float) -> None:
    """Their sum divides them out; on the way no product may be 0 or infinite for them."""
    model, batch = build("saved head").half(), make_batch(23)
    layer, found = attach_loss(model, 7), []
    for each in (1.0, weight):
        weighted = replace(batch, target_weights=torch.full((23,), each))
        loss = layer.loss_sum(model, weighted, inputs_of(batch)) / (23 * each)
        found.append(gradients(model, loss * 1024))  # as an engine scales it
    alone, others = found
    assert all(gradient.isfinite().all() and gradient.any() for gradient in others.values())
    for name, gradient in alone.items():
        torch.testing.assert_close(others[name], gradient, rtol=2e-3, atol=1e-4)  # two units of fp16, of sums of 23


class Distillation:
    """An objective of its own: the Kullback-Leibler divergence from a teacher, whose logits come as an extra."""

    def losses(self, logits_CV: Tensor, targets: TokenTargets) -> Tensor:
        teacher = torch.log_softmax(targets.extras["teacher"], -1)
        return F.kl_div(torch.log_softmax(logits_CV.float(), -1), teacher, log_target=True, reduction="none").sum(-1)

    def loss(self, logits_CV: Tensor, targets: TokenTargets) -> Tensor:
        losses = self.losses(logits_CV, targets)
        return losses.sum() if targets.weights_C is None else losses @ targets.weights_C

    def loss_and_gradient(self, logits_CV: Tensor, targets: TokenTargets, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        with torch.enable_grad():
            logits_CV = logits_CV.detach().requires_grad_()
            loss = self.loss(logits_CV, targets)
        return loss.detach(), torch.autograd.grad(loss, logits_CV)[0] if with_gradient else None


@pytest.mark.parametrize("chunk_tokens", [None, 7])
@pytest.mark.parametrize("kind", ["tied", "adapted head", "saved head", "soft cap"])
def test_another_objective_is_given_its_extras_chunk_by_chunk(kind: str, chunk_tokens: int | None) -> None:
    model, batch = build(kind), make_batch(23)
    random = torch.Generator().manual_seed(1)
    teacher, weights = torch.randn(23, 97, generator=random), torch.rand(23, generator=random)
    logits = model(**inputs_of(batch)).logits[0][batch.target_positions].float()
    expected = (F.softmax(teacher, -1) * (teacher.log_softmax(-1) - logits.log_softmax(-1))).sum(-1) @ weights
    theirs = gradients(model, expected)
    layer = attach_loss(model, chunk_tokens, Distillation())
    weighted = replace(batch, target_weights=weights)
    loss = layer.loss_sum(model, weighted, inputs_of(batch), {"teacher": teacher})
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)  # 23 fp32 terms (1.2e-7) in another order
    assert_same_gradients(gradients(model, loss), theirs, atol=1e-6)


# --- On engines

HEADS: dict[str, dict[str, Any]] = {
    "full, tied": {"adapter": {"method": "full"}},
    "head saved": {"adapter": LORA | {"modules_to_save": ["lm_head"]}},
    "head adapted": {"adapter": LORA | {"target_modules": ["q_proj", "lm_head"]}},
}
CASES = [("full, tied", None), ("head saved", 64), ("head adapted", None)]
OTHERS = [(kind, chunk_tokens) for kind in HEADS for chunk_tokens in (None, 64) if (kind, chunk_tokens) not in CASES]
"""Each head with the other way; both ways of each are held to the bit on one process above."""


def plan_of(kind: str, chunk_tokens: int | None, material: Material, **division: Any) -> RunPlan:
    return make_plan(material, loss={"chunk_tokens": chunk_tokens}, **HEADS[kind], **division)


def train_on(plan: RunPlan, change: Callable[[Batch], Batch]) -> Outcome:
    engine, loss_sum, batches_of = start(plan)

    def changed(step: int) -> Sequence[Batch]:
        return [change(batch) for batch in batches_of(step)]

    found = outcome(engine, [result.read(engine) for result in steps_of(plan, engine, loss_sum, changed, Change(stop=2))])
    engine.release()
    return found


def with_and_without_ones(plans: Sequence[RunPlan]) -> list[tuple[Outcome, Outcome]]:
    return [(train_on(plan, lambda batch: batch), train_on(plan, ones)) for plan in plans]


@pytest.mark.parametrize("cases", variants([CASES], [(OTHERS,)]), ids=["some cases", "other cases"])
@pytest.mark.parametrize("stage", variants([3], [0, 2]))
def test_weights_of_1_change_no_bit_of_a_run(stage: int, cases: list[tuple[str, int | None]], material: Material) -> None:
    plans = [plan_of(kind, chunk_tokens, material, workers=2, stage=stage) for kind, chunk_tokens in cases]
    for case, (without, with_ones) in zip(cases, run_on_ranks(with_and_without_ones, 2, plans)[0]):
        assert with_ones.numbers == without.numbers, case
        assert largest_difference(with_ones, without) == 0, case


@pytest.fixture(scope="module")
def weighted(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Rows whose answers weigh 0.25, 1 or 3."""
    folder = tmp_path_factory.mktemp("weighted")
    rows = short_rows(40)
    for index, row in enumerate(rows):
        for message in row["messages"]:
            if message["role"] == "assistant":
                message["weight"] = (0.25, 1, 3)[index % 3]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(material, store=store_plan(tiny_store(folder / "stores", str(path), max_rows=None, max_length=144)))


def weight_in_file(file: str, line: int) -> float:
    """Of the rows of `weighted`."""
    return (0.25, 1, 3)[(line - 1) % 3]


def plain_losses(plan: RunPlan, weight_of: Callable[[str, int], float] = weight_in_file) -> list[float]:
    """Weighted training written with transformers, peft and torch alone.

    Args:
        weight_of: each target of a file's line.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    torch.manual_seed(plan.seed)
    if isinstance(plan.adapter, LoraAdapter):
        rank, alpha = plan.adapter.rank, int(plan.adapter.alpha)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = plan.optimization
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=betas, eps=settings.epsilon, weight_decay=0.0)
    store, losses = Store.open(plan.data.train.path), []
    for step in range(3):
        batches = step_batches(
            store, step=step, rank=0, world=1, micro_batch_size=8, accumulation=1, num_rows_in_run=10**6, seed=plan.seed
        )
        loss, total = torch.zeros(()), 0.0
        for batch in batches:
            weights = [weight_of(*source) for row in batch.rows for source in store.sources(row)]
            bounds = batch.cumulative_lengths.tolist()
            is_target = torch.zeros(batch.num_tokens, dtype=torch.bool)
            is_target[batch.target_positions + 1] = True
            for weight, (first, last) in zip(weights, pairwise(bounds), strict=True):
                ids = batch.input_ids[:, first:last]
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                each = F.cross_entropy(logits, ids[0, 1:], reduction="none")[is_target[first + 1 : last]]
                loss, total = loss + weight * each.sum(), total + weight * len(each)
        loss = loss / total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("adapter", [{"method": "full"}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("chunk_tokens", [None, 64])
def test_a_weighted_run_is_that_of_plain_torch(chunk_tokens: int | None, adapter: dict, weighted: Material) -> None:
    # Above the roots of Adam's second moments its epsilon makes a step of its first moments alone, in which a loss of another
    # scale shows and rounding is not amplified.
    settings = {
        "num_steps": 3,
        "learning_rate": 0.3,
        "epsilon": 1.0,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "schedule": "constant",
    }
    plan = make_plan(weighted, adapter=adapter, loss={"chunk_tokens": chunk_tokens}, optimization=settings)
    losses = train(plan).losses[:3]
    assert relative_difference(losses, plain_losses(plan)) <= SAME_SUMS
    assert losses[2] != losses[0]


@pytest.mark.parametrize(("workers", "accumulation", "stage"), variants([(1, 8, 0), (2, 4, 3)], [(2, 2, 0), (2, 2, 2)]))
def test_the_curve_of_a_weighted_run_does_not_depend_on_its_division(
    workers: int, accumulation: int, stage: int, weighted: Material
) -> None:
    whole = train(make_plan(weighted, accumulation=1, adapter=LORA))
    divided = run(make_plan(weighted, workers=workers, accumulation=accumulation, stage=stage, adapter=LORA))
    assert relative_difference(divided[0].losses, whole.losses) <= SAME_SUMS
    assert largest_difference(divided[0], whole) <= SAME_SUMS


def test_weights_change_what_is_learned_and_what_is_measured(weighted: Material, material: Material) -> None:
    assert relative_difference(train(make_plan(weighted)).losses, train(make_plan(material)).losses) > 1e-4
