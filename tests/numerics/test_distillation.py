"""Distillation = plain torch with both models' whole logits and autograd, however weights and targets are divided."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune.config.sections.training import Precision
from raytune.plan.costs.memory import memory_parts, tensor_bytes
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.run_plan import DistillationPlan, RunPlan, ZeroStage
from raytune.training.losses.objectives import TEACHER, CrossEntropy, Distillation, TokenTargets
from raytune.training.losses.teacher import base_beneath
from raytune.training.start.start import BatchLoss
from raytune.training.steps.loop import training_steps
from raytune.training.steps.schedule import learning_rate
from tests.numerics.measured_bytes import measure_peak
from tests.numerics.oracles import PROJECTIONS, documents
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    LORA,
    NUM_STEPS,
    QLORA,
    SAME_SUMS,
    Change,
    Material,
    largest_difference,
    relative_difference,
    run,
    start,
    steps_of,
    train,
)
from tests.numerics.strategies import FULL, plain_training, strategy_plan
from tests.numerics.test_freezing_bytes import planned, wide  # noqa: F401
from tests.numerics.test_whole_run import finished
from tests.peft_methods import EVERY
from tests.tiny import save_tiny_model
from tests.variants import variants

BASE: dict[str, Any] = {"distillation": {"teacher": "base", "weight": 0.7, "temperature": 3.0}}
TOP: dict[str, Any] = {"distillation": {"teacher": "base", "weight": 0.7, "temperature": 3.0, "top_k": 5}}


def plain_distillation(logits: Tensor, teacher: Tensor, ids: Tensor, weight: float, T: float, top_k: int | None) -> Tensor:
    """The loss of each target, as the guide defines it."""
    hard = F.cross_entropy(logits, ids, reduction="none")
    num_shared = min(logits.shape[1], teacher.shape[1])
    own, theirs = logits[:, :num_shared], teacher[:, :num_shared]
    if top_k is not None:
        kept = theirs.argsort(dim=1, descending=True)[:, :top_k]
        own, theirs = own.gather(1, kept), theirs.gather(1, kept)
    soft = F.kl_div(F.log_softmax(own / T, 1), F.softmax(theirs / T, 1), reduction="none").sum(1)
    return (1 - weight) * hard + weight * T**2 * soft


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another size and other weights, sharper than the one that learns."""
    folder = tmp_path_factory.mktemp("teacher")
    return save_tiny_model(folder, seed=3, tied=False, hidden_size=48, num_hidden_layers=3, initializer_range=0.2)


def other(teacher: Path, **more: Any) -> dict[str, Any]:
    return {"distillation": {"teacher": str(teacher), "weight": 0.7, "temperature": 3.0} | more}


def plain_loss(teacher: Path, weight: float, temperature: float, top_k: int | None = None) -> Callable[..., Tensor]:
    """Of a document, with a whole teacher beside the model."""
    taught: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()

    def loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
        is_target = labels[0, 1:] >= 0
        with torch.no_grad():
            theirs = taught(input_ids=ids, use_cache=False).logits[0, :-1][is_target]
        own = model(input_ids=ids, use_cache=False).logits[0, :-1][is_target]
        return plain_distillation(own, theirs, labels[0, 1:][is_target], weight, temperature, top_k).sum()

    return loss


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "who", "top_k", "chunk"),
    [
        ("lora", "base", 5, 7),
        ("full", "other", None, None),
        pytest.param("lora", "base", None, None, marks=SLOW),
        pytest.param("full", "other", None, 7, marks=SLOW),
        pytest.param("full", "other", 5, None, marks=SLOW),
        pytest.param("full", "base", None, None, marks=SLOW),
        pytest.param("full", "base", 5, 7, marks=SLOW),
        pytest.param("lora", "other", None, 7, marks=SLOW),
        pytest.param("lora", "other", 5, None, marks=SLOW),
    ],
)
def test_steps_equal_plain_torch_with_a_whole_teacher(
    method: str, who: str, top_k: int | None, chunk: int | None, material: Material, teacher: Path
) -> None:
    section = {"teacher": "base" if who == "base" else str(teacher), "weight": 0.7, "temperature": 3.0, "top_k": top_k}
    plan = strategy_plan(material, {"distillation": section}, FULL if method == "full" else LORA, loss={"chunk_tokens": chunk})
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM") if method == "lora" else None
    plainly = plain_loss(material.model if who == "base" else teacher, 0.7, 3.0, top_k)
    losses, weights = plain_training(plan, lambda name: True, lora=lora, loss_of=plainly)
    ours = train(plan)
    assert relative_difference(ours.losses, losses) <= SAME_SUMS
    named = {name.replace(".default.", ".").removeprefix("base_model.model."): value for name, value in weights.items()}
    found = {name.replace(".default.", ".").removeprefix("base_model.model."): value for name, value in ours.weights.items()}
    assert found.keys() == named.keys()
    assert max((found[name] - named[name]).abs().max() for name in named) <= 2 * SAME_SUMS


# --- what is told of it


def told_of(plan: RunPlan) -> list[tuple[float, float | None]]:
    """Loss, and the teacher's part of it, of every step."""
    engine, loss, batches_of = start(plan)
    assert isinstance(loss, BatchLoss)
    steps = training_steps(
        engine,
        batches_of,
        loss,
        lambda step: learning_rate(step, plan.optimization),
        start=0,
        stop=NUM_STEPS,
        seed=plan.seed,
        part_sum=loss.take_divergence,
    )
    numbers = [result.read(engine) for result in steps]
    return [(one.loss, one.distillation) for one in numbers]


@pytest.mark.parametrize(("top_k", "chunk"), [pytest.param(None, None, marks=SLOW), (5, 7)])
def test_the_teachers_part_of_a_step_is_that_of_plain_torch(
    top_k: int | None, chunk: int | None, material: Material, teacher: Path
) -> None:
    plan = strategy_plan(material, other(teacher, top_k=top_k), FULL, loss={"chunk_tokens": chunk})
    whole, hard = plain_loss(teacher, 0.7, 3.0, top_k), plain_loss(teacher, 0.0, 3.0)
    parts, counts = [0.0], [0]

    def loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
        minimised = whole(model, ids, labels)
        with torch.no_grad():
            parts[-1] += (minimised - 0.3 * hard(model, ids, labels)).item()
        counts[-1] += int((labels[0, 1:] >= 0).sum())
        return minimised

    def next_step(trained: Any) -> None:
        parts.append(0.0)
        counts.append(0)

    losses, _ = plain_training(plan, lambda name: True, loss_of=loss, after_step=next_step)
    told = told_of(plan)
    assert [one for one, _ in told] == pytest.approx(losses, rel=SAME_SUMS)
    # The oracle's is a difference of two larger sums.
    expected = [part / count for part, count in zip(parts[:-1], counts[:-1], strict=True)]
    assert [part for _, part in told] == pytest.approx(expected, rel=3 * SAME_SUMS)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_tell_what_one_does(stage: int, material: Material, teacher: Path) -> None:
    alone = told_of(strategy_plan(material, other(teacher), LORA, loss={"chunk_tokens": 16}))
    plan = strategy_plan(material, other(teacher), LORA, workers=2, stage=stage, loss={"chunk_tokens": 16})
    both = run_on_ranks(told_of, 2, plan)
    assert both[0] == both[1]
    for one, same in zip(both[0], alone, strict=True):
        assert one == pytest.approx(same, rel=SAME_SUMS)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("has_targets", [True, False])
def test_weights_of_targets_count_in_what_is_told(
    chunk: int | None, has_targets: bool, material: Material, teacher: Path
) -> None:
    engine, loss, batches_of = start(strategy_plan(material, other(teacher), LORA, loss={"chunk_tokens": chunk}))
    assert isinstance(loss, BatchLoss)
    batch = batches_of(0)[0]
    if not has_targets:
        batch = replace(batch, target_positions=batch.target_positions[:0], target_ids=batch.target_ids[:0])
    weights = 3 * torch.rand(len(batch.target_ids), generator=torch.Generator().manual_seed(0))
    batch = replace(batch, target_weights=weights)
    whole = sum(loss(engine.module, batch).item() for _ in range(2))
    told, then = loss.take_divergence(), loss.take_divergence()
    assert told is not None
    assert then is None
    hard = 2 * loss.cross_entropy(engine.module, batch).item()
    # A difference of two fp32 sums that are larger.
    assert told.item() == pytest.approx(whole - 0.3 * hard, rel=1e-5)


def test_a_run_writes_the_teachers_part_down_and_one_without_a_teacher_has_none(tmp_path: Path) -> None:
    training = {"max_steps": 3, "global_batch_size": 2, "learning_rate": 2e-3, "logging_steps": 1}
    strategy = {"distillation": {"teacher": "base", "weight": 0.3}}
    taught = finished(tmp_path / "taught", {"strategy": strategy, "training": training})
    alone = finished(tmp_path / "alone", {"training": training})
    losses, parts = (dict(taught.history.series(f"train/{name}")) for name in ("loss", "distillation"))
    assert list(parts) == [1, 2, 3]
    assert parts[1] == pytest.approx(0, abs=1e-6), "beneath an adapter that has changed nothing yet"
    assert 0 < parts[3] < losses[3]
    assert not list(alone.history.series("train/distillation"))


# --- the objective


@pytest.mark.parametrize(("num_teacher", "top_k"), [(11, None), (13, None), (9, None), (11, 4), (13, 1), (9, 50)])
def test_loss_and_gradient_are_those_of_autograd(num_teacher: int, top_k: int | None) -> None:
    """Full and in chunks; with weights; where one of the two has more tokens than the other."""
    generator = torch.Generator().manual_seed(0)
    logits, theirs = (3 * torch.randn((40, size), generator=generator) for size in (11, num_teacher))
    ids = torch.randint(0, 9, (40,), generator=generator)
    weights = torch.rand(40, generator=generator) * 3
    exact = logits.double().requires_grad_()
    each = plain_distillation(exact, theirs.double(), ids, 0.6, 2.5, top_k)
    expected = (each * weights.double()).sum()
    expected.backward()
    objective = Distillation(0.6, 2.5, top_k, lambda hidden: hidden)
    targets = TokenTargets(ids, weights, {TEACHER: theirs})
    parts = [targets.chunk(slice(0, 17)), targets.chunk(slice(17, 40))]
    found = [
        objective.loss_and_gradient(part_logits, part, with_gradient=True)
        for part_logits, part in zip((logits[:17], logits[17:]), parts)
    ]
    in_full = logits.clone().requires_grad_()
    loss = objective.loss(in_full, targets)
    (loss / 3).backward()
    assert exact.grad is not None
    assert in_full.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sum(one.item() for one, _ in found) == pytest.approx(expected.item(), rel=1e-6)
    assert (3 * in_full.grad - exact.grad).abs().max() <= 2e-6
    assert (torch.cat([gradient for _, gradient in found if gradient is not None]) - exact.grad).abs().max() <= 2e-6
    assert (objective.losses(logits, targets) - each).abs().max() <= 1e-5


def test_a_teacher_that_is_the_model_adds_nothing() -> None:
    """And one that rules tokens out is followed to 0, without a NaN."""
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
    ids = torch.tensor([1, 2])
    same = TokenTargets(ids, None, {TEACHER: logits})
    loss, gradient = Distillation(1.0, 2.0, None, lambda hidden: hidden).loss_and_gradient(logits, same, with_gradient=True)
    assert gradient is not None
    assert (loss.item(), gradient.abs().max().item()) == (0, 0)
    sure = TokenTargets(ids, None, {TEACHER: torch.tensor([[-torch.inf, 2.0, -torch.inf], [-torch.inf, -torch.inf, 3.0]])})
    loss, gradient = Distillation(1.0, 1.0, None, lambda hidden: hidden).loss_and_gradient(logits, sure, with_gradient=True)
    hard, hard_gradient = CrossEntropy().loss_and_gradient(logits, same, with_gradient=True)
    assert gradient is not None
    assert hard_gradient is not None
    assert loss.item() == pytest.approx(hard.item(), rel=1e-6), "cross-entropy is the divergence from who is sure"
    assert (gradient - hard_gradient).abs().max() <= 1e-6


# --- who teaches


SECTIONS: dict[str, dict[str, Any]] = {
    "dropout": LORA | {"dropout": 0.3},
    "dora": LORA | {"use_dora": True},
    "whole modules": LORA | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "updated head": LORA | {"target_modules": ["q_proj", "lm_head"]},
    "rows": LORA | {"trainable_tokens": ["a", "b"]},
    "qlora": QLORA,
} | {name: method.section for name, method in EVERY.items()}
NF4 = {"format": "nf4", "compute_dtype": "fp32", "quant_storage": "uint8"}
DEFAULT = ("dropout", "whole modules", "updated head", "rows", "qlora", "bottleneck", "prompt_tuning", "prefix_tuning")


@pytest.mark.parametrize("name", [pytest.param(one, marks=() if one in DEFAULT else SLOW) for one in SECTIONS])
def test_the_base_teaches_as_it_was_whatever_was_trained_over_it(name: str, material: Material, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, tied=False, attention_dropout=0.2) if name != "rows" else material.model
    held = {"quantization": NF4} if name == "qlora" else {}
    plan = strategy_plan(replace(material, model=model), BASE, SECTIONS[name], optimization={"learning_rate": 0.02}, model=held)
    engine, loss_sum, batches_of = start(plan)
    batch = batches_of(0)[0]
    assert plan.distillation is not None
    teacher = base_beneath(plan.distillation, plan.model, engine.model)

    def logits() -> Tensor:
        lesson = teacher.teach(engine.module, batch)
        return lesson.objective.teacher_logits(lesson.extras[TEACHER])

    before = logits()
    trains = [parameter.requires_grad for parameter in engine.model.parameters()]
    losses = [result.read(engine).loss for result in steps_of(plan, engine, loss_sum, batches_of, Change(stop=3))]
    assert losses[2] != losses[0], "something was learned"
    assert logits().equal(before)
    assert engine.model.training
    assert trains == [parameter.requires_grad for parameter in engine.model.parameters()]
    if not held:
        alone: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        theirs = [alone(input_ids=ids, use_cache=False).logits[0, :-1][labels[0, 1:] >= 0] for ids, labels in documents(batch)]
        assert (torch.cat(theirs) - before).abs().max() <= 1e-5


# --- however it is divided


@pytest.mark.parametrize("who", variants(["beside"], ["beneath"]))
@pytest.mark.parametrize("stage", [pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3])
def test_every_stage_on_two_ranks_equals_one_plain_process(stage: int, who: str, material: Material, teacher: Path) -> None:
    strategy, adapter = (BASE, LORA) if who == "beneath" else (other(teacher), FULL)
    alone = train(strategy_plan(material, strategy, adapter, loss={"chunk_tokens": 16}))
    plan = strategy_plan(material, strategy, adapter, workers=2, stage=stage, loss={"chunk_tokens": 16})
    sharded = run(plan)
    assert sharded[0].numbers == sharded[1].numbers
    assert relative_difference(sharded[0].losses, alone.losses) <= SAME_SUMS
    assert [one.grad_norm for one in sharded[0].numbers] == pytest.approx([one.grad_norm for one in alone.numbers], rel=1e-5)
    assert largest_difference(sharded[0], alone) <= 3 * SAME_SUMS


@pytest.mark.parametrize(
    ("stage", "who"),
    [
        (3, "beside"),
        pytest.param(0, "beneath", marks=SLOW),
        pytest.param(0, "beside", marks=SLOW),
        pytest.param(3, "beneath", marks=SLOW),
    ],
)
def test_resumed_equals_unbroken(stage: int, who: str, material: Material, teacher: Path, tmp_path: Path) -> None:
    adapter = LORA | {"dropout": 0.1}
    plan = strategy_plan(material, BASE if who == "beneath" else other(teacher, top_k=8), adapter, stage=stage)
    unbroken = run(plan)[0]
    run(plan, Change(stop=3, save=tmp_path))
    resumed = run(plan, Change(start=3, load=tmp_path / "rank-0"))[0]
    assert resumed.numbers == unbroken.numbers[3:]
    assert largest_difference(resumed, unbroken) == 0


# --- its bytes

WAYS: list[tuple[str, ZeroStage, Precision, str, int | None]] = [
    ("updates above", 0, "bf16", "beneath", None),
    ("updates above", 0, "bf16", "beside", 64),
    ("upper half", 0, "fp32", "beside", None),
    ("updates above", 3, "bf16", "beneath", 64),
    ("updates above", 3, "bf16", "beside", 64),
]


@pytest.mark.parametrize("way", [pytest.param(one, marks=() if one in WAYS[:2] else SLOW) for one in WAYS])
def test_every_rank_takes_the_planned_bytes(way: tuple[Any, ...], wide: Material, tmp_path: Path) -> None:  # noqa: F811
    """Within 5 % at the fullest moment of a step; at stage 3 without what it may have gathered."""
    method, stage, precision, who, chunk = way
    work, plan = planned(wide, method, stage, precision)
    big = LlamaConfig(vocab_size=2048, hidden_size=384, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8)
    AutoModelForCausalLM.from_config(big).save_pretrained(tmp_path)
    teacher = read_model_shape(str(tmp_path)) if who == "beside" else work.shape
    work = replace(work, chunk_tokens=chunk, teacher=teacher, teacher_is_beside=who == "beside", workers=2 if stage else 1)
    beside = plan.model.model_copy(update={"path": str(tmp_path), "dtype": precision, "frozen": [], "lowest_layer": 0})
    distillation = DistillationPlan(weight=0.5, temperature=2.0, top_k=None, teacher=beside if who == "beside" else None)
    changes = {"distillation": distillation, "loss": plan.loss.model_copy(update={"chunk_tokens": chunk})}
    for measured in run_on_ranks(measure_peak, work.workers, plan.model_copy(update=changes)):
        parts = memory_parts(replace(work, num_tokens=measured.num_tokens, num_targets=measured.num_targets))
        assert tensor_bytes(parts) > 0.95 * measured.num_bytes
        kept = [part for part in parts if not part.name.startswith("gathered weights")]
        assert tensor_bytes(kept) < 1.05 * measured.num_bytes


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=SLOW)])
def test_weight_0_is_none(stage: int, material: Material) -> None:
    off = {"distillation": {"teacher": "/nowhere", "weight": 0.0}}
    none, zero = (run(strategy_plan(material, strategy, LORA, stage=stage))[0] for strategy in ({}, off))
    assert zero.numbers == none.numbers
    assert zero.held == none.held
    assert largest_difference(zero, none) == 0
