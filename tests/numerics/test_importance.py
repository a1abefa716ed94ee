"""EWC = plain torch: importance is the mean squared gradient of documents, however weights and documents are divided, and the
penalty on the way by it is added as if it stood in the loss."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from raytune.data.batches.batches import lone_batches
from raytune.data.store.order import rows_at
from raytune.data.store.store import Store
from raytune.errors import TrainingError
from raytune.metrics.events import read_events
from raytune.plan.costs.memory import memory_parts
from raytune.plan.run_plan import RunPlan, StorePlan, ZeroStage
from raytune.plan.scoring import Weights, scoring_plan
from raytune.plan.strategies.penalty import importance_bytes
from raytune.run_folder import RunFolder
from raytune.storage import file_sizes
from raytune.training.start.importance import estimated, hold_by_importance
from raytune.training.start.start import Started, Worker
from tests.numerics.oracles import document_loss, documents
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    SAME_SUMS,
    Change,
    Material,
    Outcome,
    largest_difference,
    outcome,
    relative_difference,
    start,
    steps_of,
)
from tests.numerics.strategies import plain_training, strategy_plan
from tests.numerics.test_freezing_bytes import planned, wide  # noqa: F401
from tests.numerics.test_whole_run import finished
from tests.peak import peak_bytes
from tests.tiny import save_tiny_model, store_plan, tiny_store
from tests.unit.plan_cases import CPU
from tests.variants import variants

NUM_DOCUMENTS = 7
"""Of 12; a number that neither two nor three ranks share evenly."""
L2_SP, STRENGTH = 10.0, 20.0
EWC: dict[str, Any] = {"ewc": {"strength": STRENGTH, "data": "demo:validation"}}
BOTH = EWC | {"l2_sp": {"strength": L2_SP}}
ABOVE: dict[str, Any] = {"freeze": {"embeddings": True, "first_layers": 1}}
TRAINED_ABOVE = ("model.layers.1.", "model.norm.")


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> StorePlan:
    folder = tmp_path_factory.mktemp("general")
    return store_plan(tiny_store(folder, "demo:validation", max_rows=12, max_length=288, packing="none"), "general")


@pytest.fixture(scope="module")
def odd(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Weights whose numbers two ranks cannot share evenly, so that shards are filled up, and a tied head."""
    folder = tmp_path_factory.mktemp("odd")
    shape: dict[str, Any] = {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
    return replace(material, model=save_tiny_model(folder, **shape))


def ewc_plan(material: Material, general: StorePlan, strategy: dict[str, Any] = EWC, **changes: Any) -> RunPlan:
    plan = strategy_plan(material, strategy, **changes)
    optimization = plan.optimization.model_copy(update={"ewc_documents": NUM_DOCUMENTS})
    return plan.model_copy(
        update={"data": plan.data.model_copy(update={"ewc": general}), "optimization": optimization, "name": "held"}
    )


def started(plan: RunPlan) -> tuple[Started, Any]:
    engine, loss, batches_of = start(plan)
    worker = Worker(rank=engine.rank, world_size=engine.world_size, device_index=0, attempt=1, report=lambda values: None)
    folder = RunFolder(plan.storage, plan.name)
    return Started(plan=plan, worker=worker, folder=folder, engine=engine, loss=loss), batches_of  # pyright: ignore


def plain_importance(plan: RunPlan, is_trained: Any = lambda name: True) -> dict[str, Tensor]:
    """The mean of squared gradients, a document at a time, by transformers and autograd."""
    model: Any = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    assert plan.data.ewc is not None
    store, count = Store.open(plan.data.ewc.path), plan.optimization.ewc_documents
    trained = {name: parameter for name, parameter in model.named_parameters() if is_trained(name)}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in trained.items()}
    for row in rows_at(torch.arange(count).numpy(), store.num_rows, plan.seed).tolist():
        (batch,) = lone_batches(store, [row], rank=0, world=1)
        ((ids, labels),) = documents(batch)
        gradients = torch.autograd.grad(document_loss(model, ids, labels), list(trained.values()))
        for name, gradient in zip(trained, gradients, strict=True):
            sums[name] += gradient.double().square()
    return {name: (total / count).float() for name, total in sums.items()}


def whole_importance(began: Started) -> dict[str, Tensor]:
    """What an engine holds weights by, put together by what puts weights together, whose place it takes."""
    engine: Any = began.engine
    if began.plan.engine.kind == "plain":
        return {name: held.importance for name, held in engine._held.items()}
    from deepspeed.utils import safe_get_full_fp32_param

    for group, master in engine._masters().items():
        master.data.copy_(engine._held[group].importance)
    trained = [(name, parameter) for name, parameter in engine.model.named_parameters() if parameter.requires_grad]
    return {name: safe_get_full_fp32_param(parameter) for name, parameter in trained}  # pyright: ignore[reportReturnType]


def assert_alike(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = SAME_SUMS) -> None:
    """Relative to the largest of each parameter: gradients are sums of large numbers, which may cancel."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert value.max() > 0, name
        assert (ours[name] - value).abs().max() <= tolerance * value.max(), name


@dataclass(frozen=True, kw_only=True)
class Divided:
    """What a rank saw of a run under EWC."""

    importance: dict[str, Tensor]
    unbroken: Outcome
    resumed: Outcome
    """From step 3 on, by another engine."""
    events: list[str]
    """Of the first, the second and a third start."""


def divided(plans: list[RunPlan], folder: Path) -> list[Divided]:
    return [_divided(plan, folder / str(index)) for index, plan in enumerate(plans)]


def _divided(plan: RunPlan, folder: Path) -> Divided:
    plan = plan.model_copy(update={"storage": str(folder)})
    events: list[str] = []
    unbroken = held_run(plan, Change(), events)[1]
    held_run(plan, Change(stop=3, save=folder / "state"), events)
    began, resumed = held_run(plan, Change(start=3, load=folder / "state"), events)
    return Divided(importance=whole_importance(began), unbroken=unbroken, resumed=resumed, events=events)


def held_run(plan: RunPlan, change: Change, events: list[str]) -> tuple[Started, Outcome]:
    """Train on this rank, from where weights are held by their importance."""
    began, batches_of = started(plan)
    hold_by_importance(began, lambda event, **facts: events.append(event))
    engine = began.engine
    if change.load:
        engine.load(change.load)
    numbers = [result.read(engine) for result in steps_of(plan, engine, began.loss, batches_of, change)]
    if change.save:
        engine.save(change.save)
        engine.gather_objects(None)  # until all of it is there
    return began, outcome(engine, numbers)


def penalties(run: Outcome) -> list[float]:
    return [numbers.penalty or 0.0 for numbers in run.numbers]


class PlainPenalty:
    """1/2 sum (l2_sp + ewc F) (w - w0)^2, of which autograd makes the gradient."""

    def __init__(self, model: Path, importance: dict[str, Tensor], l2_sp: float) -> None:
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._base = {name: parameter.detach() for name, parameter in base.named_parameters()}
        self._importance, self._l2_sp = importance, l2_sp
        self.values: list[float] = []

    def __call__(self, trained: dict[str, nn.Parameter]) -> Tensor:
        costs = [
            ((self._l2_sp + STRENGTH * self._importance[name]) * (parameter - self._base[name]).square()).sum()
            for name, parameter in trained.items()
        ]
        value = torch.stack(costs).sum() / 2
        self.values.append(value.item())
        return value


@pytest.mark.parametrize("freeze", [{}, ABOVE], ids=["all", "above frozen layers"])
def test_steps_equal_plain_torch_with_the_penalty_in_the_loss(
    freeze: dict[str, Any], material: Material, general: StorePlan, tmp_path: Path
) -> None:
    strategy = (EWC | freeze) if freeze else BOTH
    plan = ewc_plan(material, general, strategy, storage=str(tmp_path))

    def is_trained(name: str) -> bool:
        return not freeze or name.startswith(TRAINED_ABOVE)

    penalty = PlainPenalty(material.model, plain_importance(plan, is_trained), 0 if freeze else L2_SP)
    losses, weights = plain_training(plan, is_trained, penalty=penalty)
    ours = held_run(plan, Change(), [])[1]
    assert relative_difference(ours.losses, losses) <= SAME_SUMS
    assert penalties(ours) == pytest.approx(penalty.values, rel=1e-5, abs=1e-9)
    assert ours.weights.keys() == weights.keys()
    assert max((ours.weights[name] - weights[name]).abs().max() for name in weights) <= 2 * SAME_SUMS
    assert penalty.values[-1] > 1e-3


def check_divided(results: list[list[Divided]], alone: Outcome, expected: dict[str, Tensor]) -> None:
    for of_ranks in results:
        first = of_ranks[0]
        for one in of_ranks:
            assert_alike(one.importance, expected)
            assert one.unbroken.numbers == first.unbroken.numbers
            assert one.resumed.numbers == one.unbroken.numbers[3:]
            assert one.events == ["importance_started", "importance_estimated"], "the later two read what the first one kept"
        assert largest_difference(first.resumed, first.unbroken) == 0
        assert relative_difference(first.unbroken.losses, alone.losses) <= SAME_SUMS
        assert penalties(first.unbroken) == pytest.approx(penalties(alone), rel=1e-4, abs=1e-9)
        assert largest_difference(first.unbroken, alone) <= 3 * SAME_SUMS


@pytest.mark.parametrize(("workers", "stages"), variants([(2, (0, 3))], [(2, (1, 2)), (1, (0, 1, 2, 3))]))
def test_every_stage_equals_plain_torch_and_goes_on_as_unbroken(
    workers: int, stages: tuple[int, ...], odd: Material, general: StorePlan, tmp_path: Path
) -> None:
    """Of documents that ranks do not share evenly, and weights whose numbers they do not either; with a tied head."""
    plans = [ewc_plan(odd, general, BOTH, workers=workers, stage=stage) for stage in stages]
    alone = held_run(ewc_plan(odd, general, BOTH, storage=str(tmp_path / "alone")), Change(), [])[1]
    ranks = run_on_ranks(divided, workers, plans, tmp_path)
    check_divided([[rank[index] for rank in ranks] for index in range(len(stages))], alone, plain_importance(plans[0]))


def importance_of(plan: RunPlan) -> dict[str, Tensor]:
    began = started(plan)[0]
    began.engine.weigh(estimated(began))
    return whole_importance(began)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_ranks_share_documents(stage: int, odd: Material, general: StorePlan) -> None:
    """Activations are recomputed, at stage 3 in a backward pass of their own, and the tied head sees chunks."""
    plan = ewc_plan(odd, general, stage=stage, checkpointing=True, loss={"chunk_tokens": 16})
    plan = plan.model_copy(update={"batch": plan.batch.model_copy(update={"workers": 3})})
    expected = plain_importance(plan)
    for importance in run_on_ranks(importance_of, 3, plan):
        assert_alike(importance, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_under_bf16_importance_is_near_that_of_fp32(stage: int, odd: Material, general: StorePlan) -> None:
    """bf16 has three digits, of which squares lose one; sums over documents are in fp32."""
    model = {"dtype": "bf16" if stage else "fp32", "compute_dtype": "bf16"}
    plan = ewc_plan(odd, general, workers=2, stage=stage, precision="bf16", model=model)
    for importance in run_on_ranks(importance_of, 2, plan):
        for name, value in plain_importance(plan).items():
            assert importance[name].dtype == torch.float32
            assert importance[name].sum() == pytest.approx(value.sum().item(), rel=0.05), name


def test_nothing_is_dropped_and_no_noise_added(material: Material, general: StorePlan) -> None:
    """Where activations are recomputed, which a model does in training only; and the loss is computed in chunks."""
    noisy = {"neftune_noise_alpha": 5.0}
    chunks = {"chunk_tokens": 16}
    plan = ewc_plan(replace(material, model=material.with_dropout), general, checkpointing=True, model=noisy, loss=chunks)
    began, _ = started(plan)
    before = {name: module.training for name, module in began.engine.model.named_modules()}
    assert_alike(estimated(began), plain_importance(plan))
    assert {name: module.training for name, module in began.engine.model.named_modules()} == before


def test_what_is_kept_counts_only_while_it_is_what_is_asked_for(material: Material, general: StorePlan, tmp_path: Path) -> None:
    plan = ewc_plan(material, general, storage=str(tmp_path))

    def told(of: RunPlan) -> str:
        facts: list[dict[str, Any]] = []
        hold_by_importance(started(of)[0], lambda event, **more: facts.append({"event": event} | more))
        return " ".join(fact["why"] for fact in facts if fact["event"] == "importance_again") or str(len(facts))

    assert told(plan) == "2"
    assert told(plan) == "0"
    file = tmp_path / "held" / "importance" / "rank-0.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\0\0\0\1")
    assert told(plan) == f"{file} is damaged"
    assert file.read_bytes() == content
    file.unlink()
    assert told(plan) == f"{file} is missing"
    fewer = plan.optimization.model_copy(update={"ewc_documents": 3})
    assert "another strategy.ewc.max_documents" in told(plan.model_copy(update={"optimization": fewer}))


def test_what_is_not_finite_is_refused_with_its_rows(material: Material, general: StorePlan) -> None:
    began, _ = started(ewc_plan(material, general))
    model: Any = began.engine.model
    model.model.norm.weight.data.fill_(math.inf)
    with pytest.raises(TrainingError, match=r"The loss of rows .*demo:validation:.* of strategy.ewc.data is not finite"):
        estimated(began)


CASES: list[tuple[str, ZeroStage, str]] = [("upper half", 0, "bf16"), ("upper half", 2, "bf16"), ("head", 3, "fp32")]


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """On one rank."""

    held: int
    estimating: int
    stepping: int


def measure(plans: list[RunPlan]) -> list[Bytes]:
    return [_measure(plan) for plan in plans]


def _measure(plan: RunPlan) -> Bytes:
    began, batches_of = started(plan)
    engine, shares = began.engine, {}
    estimating = peak_bytes(engine.device, lambda: shares.update(estimated(began)))
    engine.weigh(shares)
    steps = steps_of(plan, engine, began.loss, batches_of, Change(stop=2))
    next(steps)
    stepping = peak_bytes(engine.device, lambda: next(steps))
    result = Bytes(held=engine.held_bytes().penalty, estimating=estimating, stepping=stepping)
    engine.release()
    return result


@pytest.mark.slow
def test_every_rank_holds_the_planned_bytes_and_estimates_in_fewer_than_a_step(wide: Material, general: StorePlan) -> None:  # noqa: F811
    works, plans = [], []
    for case in CASES:
        work, plan = planned(wide, *case)
        settings = {"ewc_strength": 1.0, "ewc_documents": 2}
        changes = {
            "optimization": plan.optimization.model_copy(update=settings),
            "data": plan.data.model_copy(update={"ewc": general}),
        }
        works.append(replace(work, holds_weights=True, weighs_importance=True))
        plans.append(plan.model_copy(update=changes))
    ranks = run_on_ranks(measure, 2, plans)
    for index, (case, work) in enumerate(zip(CASES, works)):
        parts = {part.name: part.num_bytes for part in memory_parts(work)}
        for rank in ranks:
            assert parts["weights of the base"] + parts["importance of weights"] == pytest.approx(rank[index].held, rel=0.02), (
                case
            )
            assert rank[index].estimating <= rank[index].stepping, case


def test_a_run_keeps_its_importance_and_is_scored_without_one(tmp_path: Path) -> None:
    ewc = {"strength": STRENGTH, "data": {"path": "demo:test", "max_rows": 9}, "max_documents": 5}
    # A base whose names and shapes are few bytes beside its weights.
    result = finished(tmp_path, {"model": {"base": "demo"}, "adapter": {"method": "full"}, "strategy": {"ewc": ewc}})
    recorded = dict(result.history.series("train/penalty"))
    assert recorded[1] == 0, "nothing has moved before the first update"
    assert recorded[6] > 1e-6
    assert {rank["penalty"] for rank in result.held_bytes} == {8 * result.plan.num_trainable}
    folder = RunFolder(result.plan.storage, result.plan.name)
    estimates = [event for event in read_events(folder.events) if event["event"] == "importance_estimated"]
    assert [event["documents"] for event in estimates] == [5]
    assert result.plan.data_report is not None
    assert result.plan.data_report.ewc is not None
    assert result.plan.data_report.ewc.total("used") == 9
    assert scoring_plan(result.plan, CPU, Weights(folder=folder, step=None)).optimization.ewc_strength == 0
    # Names and shapes stand before the numbers.
    assert file_sizes(folder.importance)["rank-0.safetensors"] == pytest.approx(importance_bytes(result.plan), rel=0.01)
