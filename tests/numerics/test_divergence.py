"""A guarded run that diverges for real equals plain torch that skips, or goes back with a lower rate: alone, on two ranks at
every ZeRO stage, and resumed wherever it is killed. The oracle decides by its own rule, in numpy."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raytune.data.batches.batches import step_batches
from raytune.data.store.store import Store
from raytune.errors import TrainingError
from raytune.metrics.events import read_events
from raytune.metrics.history import History
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import read_json
from raytune.training.checkpoints.commit import committed
from raytune.training.run import Worker, train
from raytune.training.steps.stopping import Findings
from tests.numerics.oracles import PROJECTIONS, document_loss, documents
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import LORA, QLORA, SAME_SUMS, Material, make_plan, with_long_rows
from tests.variants import variants

SAVE_EVERY, WINDOW, MOST = 2, 4, 3
FULL: dict[str, Any] = {"method": "full"}
SKIP: dict[str, Any] = {"policy": "skip", "window": WINDOW, "patience": 1}
BACK: dict[str, Any] = {"policy": "roll_back", "window": WINDOW, "patience": 1}


def guarded(
    material: Material,
    storage: Path,
    guard: dict[str, Any] | None,
    adapter: dict[str, Any] = FULL,
    *,
    rate: float = 1e-2,
    num_steps: int = 14,
    **changes: Any,
) -> RunPlan:
    """A plan whose rate is too high: loss and gradient of full training explode at step 12."""
    return make_plan(
        material,
        storage=str(storage),
        template="",  # of the demo's own, which is in its tokenizer
        adapter=adapter,
        optimization={
            "num_steps": num_steps,
            "num_rows": 8 * num_steps,
            "learning_rate": rate,
            "schedule": "constant",
            "warmup_steps": 2,
            "epsilon": 1e-6,
            "max_grad_norm": 0.0,
            "weight_decay": 0.1,
        },
        checkpoint={"every_steps": SAVE_EVERY, "keep_last": 3},
        divergence=guard,
        **changes,
    )


@dataclass
class Outcome:
    """What is left of a run."""

    losses: dict[int, float]
    norms: dict[int, float]
    weights: dict[str, Tensor]
    skipped: list[int] = field(default_factory=list)
    roll_backs: list[tuple[int, int]] = field(default_factory=list)
    """(step that went wrong, step that was gone back to)."""


def run(plan: RunPlan, attempt: int = 1, check: Callable[[], None] = lambda: None) -> Outcome:
    train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=attempt, report=lambda metrics: None, check=check))
    return left_by(plan)


def left_by(plan: RunPlan) -> Outcome:
    folder = RunFolder(plan.storage, plan.name)
    history, events = History.read(folder.metrics), read_events(folder.events)
    name = "model" if plan.adapter.method == "full" else "adapter_model"
    return Outcome(
        losses=dict(history.series("train/loss")),
        norms=dict(history.series("train/grad_norm")),
        weights=load_file(Path(folder.model) / f"{name}.safetensors"),
        skipped=[event["step"] for event in events if event["event"] == "update_skipped"],
        roll_backs=[(back.bad_step, back.to) for back in history.roll_backs],
    )


def assert_equal(outcome: Outcome, other: Outcome) -> None:
    assert outcome.losses == other.losses
    assert outcome.norms == other.norms
    assert outcome.roll_backs == other.roll_backs
    assert outcome.weights.keys() == other.weights.keys()
    for name, value in outcome.weights.items():
        assert torch.equal(value, other.weights[name]), name


@pytest.fixture(scope="module")
def material(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """With rows on which training diverges in the same way in whatever order numbers are added."""
    return with_long_rows(material, tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def skipping(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Of one unbroken process."""
    return run(guarded(material, tmp_path_factory.mktemp("skip"), SKIP))


@pytest.fixture(scope="module")
def back(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Of one unbroken process."""
    return run(guarded(material, tmp_path_factory.mktemp("back"), BACK))


# --- The oracle --------------------------------------------------------------------------------------------------------------


def is_spike(before: list[float], value: float, threshold: float) -> bool:
    last = np.array(before[-WINDOW:])
    if len(last) < WINDOW:
        return False
    deviation = 1.4826 * np.median(np.abs(last - np.median(last)))
    return value > np.median(last) + threshold * max(deviation, 0.01 * np.median(last))


def plain_model(plan: RunPlan) -> Any:
    if plan.adapter.method == "full":
        return AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    quantized: dict[str, Any] = {}
    if plan.model.quantization:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_storage=torch.float32,
        )
        quantized = {"quantization_config": config, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32, **quantized)
    torch.manual_seed(plan.seed)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))


def plain(plan: RunPlan) -> Outcome:
    """A plan's rows, a document at a time, by torch's AdamW."""
    assert plan.divergence is not None
    policy, threshold = plan.divergence.policy, plan.divergence.threshold
    model, settings, store = plain_model(plan), plan.optimization, Store.open(plan.data.train.path)
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [parameter for parameter in trained.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in trained.values() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, eps=settings.epsilon)

    def state() -> Any:
        return copy.deepcopy(({name: value.detach() for name, value in trained.items()}, optimizer.state_dict()))

    out, saved, factor, step = Outcome({}, {}, {}), {0: state()}, 1.0, 0
    while step < settings.num_steps:
        batches = step_batches(
            store, step=step, rank=0, world=1, micro_batch_size=8, accumulation=1, num_rows_in_run=10**6, seed=plan.seed
        )
        num_targets = sum(batch.target_ids.numel() for batch in batches)
        loss: Any = sum(document_loss(model, ids, labels) for batch in batches for ids, labels in documents(batch)) / num_targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), math.inf).item()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, step / settings.warmup_steps) * factor
        step += 1
        before = [[*seen.values()] for seen in (out.losses, out.norms)]
        out.losses[step], out.norms[step] = loss.item(), norm
        if policy == "skip" and is_spike(before[1], norm, threshold):
            out.skipped.append(step)
        else:
            optimizer.step()
        optimizer.zero_grad()
        if policy == "roll_back" and (is_spike(before[0], loss.item(), threshold) or is_spike(before[1], norm, threshold)):
            bad_step, step = step, max(known for known in saved if known < step - 1)
            weights, optimizer_state = copy.deepcopy(saved[step])
            for name, value in weights.items():
                trained[name].data.copy_(value)
            optimizer.load_state_dict(optimizer_state)
            factor *= plan.divergence.rate_factor
            out.roll_backs.append((bad_step, step))
            assert len(out.roll_backs) <= MOST, out.roll_backs
            for seen in (out.losses, out.norms, saved):
                for gone in [known for known in seen if known > step]:
                    del seen[gone]
        elif step % SAVE_EVERY == 0:
            saved[step] = state()
    out.weights = {name.replace(".default.", "."): value.detach() for name, value in trained.items()}
    return out


def assert_close(outcome: Outcome, other: Outcome) -> None:
    assert outcome.skipped == other.skipped
    assert outcome.roll_backs == other.roll_backs
    assert outcome.losses.keys() == other.losses.keys()
    difference = max(abs(value / other.losses[step] - 1) for step, value in outcome.losses.items())
    assert difference < SAME_SUMS, (difference, outcome.losses, other.losses)


# --- Claims ------------------------------------------------------------------------------------------------------------------

GENTLE: dict[str, Any] = SKIP | {"threshold": 0.5}
"""Finds spikes where training is stable: adapters that explode are too chaotic to be compared with another order of additions."""


@pytest.mark.parametrize(
    ("guard", "adapter", "rate", "num_steps"),
    variants(
        [(BACK, LORA, 0.05, 9)],
        [
            (SKIP, FULL, 1e-2, 14),
            (GENTLE, LORA, 3e-3, 10),
            (BACK, FULL, 1e-2, 14),
            (GENTLE | {"threshold": 0.2}, QLORA, 3e-3, 10),
            (BACK | {"rate_factor": 0.1}, QLORA, 0.1, 11),
        ],
    ),
    ids=lambda value: value.get("policy", value.get("method")) if isinstance(value, dict) else "",
)
def test_a_guarded_run_equals_plain_torch(
    guard: dict[str, Any], adapter: dict[str, Any], rate: float, num_steps: int, material: Material, tmp_path: Path
) -> None:
    plan = guarded(material, tmp_path, guard, adapter, rate=rate, num_steps=num_steps)
    expected, outcome = plain(plan), run(plan)
    assert expected.skipped or expected.roll_backs, "nothing diverged"
    assert_close(outcome, expected)


def test_without_spikes_a_guard_changes_no_bit(material: Material, tmp_path: Path) -> None:
    def calm(name: str, guard: dict[str, Any] | None) -> Outcome:
        return run(guarded(material, tmp_path / name, guard, rate=1e-3, num_steps=6))

    off = calm("off", None)
    for policy in ("warn", "skip", "stop", "roll_back"):
        guard = {"policy": policy, "window": WINDOW, "patience": 1, "threshold": 1000.0}
        assert_equal(calm(policy, guard), off)
    first = json.loads(Path(RunFolder(str(tmp_path / "off"), "tiny").metrics).read_text().splitlines()[1])
    assert "train/skipped" not in first


def train_both_here(plans: list[RunPlan]) -> None:
    for plan in plans:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        train(plan, Worker(rank=rank, world_size=world_size, device_index=rank, attempt=1, report=lambda metrics: None))


@pytest.mark.parametrize("stage", variants([3], [0, 1, 2]))
def test_two_ranks_at_every_stage_equal_one(
    stage: int, material: Material, skipping: Outcome, back: Outcome, tmp_path: Path
) -> None:
    plans = [guarded(material, tmp_path / f"both-{guard['policy']}", guard, workers=2, stage=stage) for guard in (SKIP, BACK)]
    run_on_ranks(train_both_here, 2, plans)
    for plan, expected in zip(plans, (skipping, back), strict=True):
        assert_close(left_by(plan), expected)


def kill(plan: RunPlan, attempt: int, num_steps: int) -> None:
    """Train until so many steps of the attempt are made, and die before anybody looks at the last one."""
    made = 0

    def still() -> None:
        nonlocal made
        made += 1
        if made == num_steps:
            raise ConnectionError("the node is gone")

    with pytest.raises(ConnectionError):
        run(plan, attempt, still)


def run_killed(plan: RunPlan, dies_at: list[int]) -> Outcome:
    """Train in attempts, each of which is killed after so many steps; the last one is not."""
    for attempt, num_steps in enumerate(dies_at, start=1):
        kill(plan, attempt, num_steps)
    return run(plan, len(dies_at) + 1)


def test_a_killed_run_ends_as_the_unbroken_one_that_skipped(material: Material, skipping: Outcome, tmp_path: Path) -> None:
    broken = run_killed(guarded(material, tmp_path, SKIP), [13, 2])  # among steps that are skipped
    assert_equal(broken, skipping)


@pytest.mark.parametrize("behind", variants([[1, 3]], [[0], [4]]), ids=str)
def test_a_killed_run_ends_as_the_unbroken_one_wherever_it_is_killed(
    behind: list[int], material: Material, back: Outcome, tmp_path: Path
) -> None:
    """In the step that goes wrong; after the first save behind the roll back; and right behind that and once more."""
    bad_step = back.roll_backs[0][0]
    plan = guarded(material, tmp_path, BACK)
    assert_equal(run_killed(plan, [bad_step + behind[0], *behind[1:]]), back)
    rates = dict(History.read(RunFolder(plan.storage, plan.name).metrics).series("train/learning_rate"))
    assert (rates[min(to for _, to in back.roll_backs)], rates[14]) == (1e-2, 1e-2 * 0.5 ** len(back.roll_backs))


def test_a_run_killed_in_the_middle_of_a_roll_back_goes_back_again(material: Material, back: Outcome, tmp_path: Path) -> None:
    bad_step, to = back.roll_backs[0]
    plan = guarded(material, tmp_path / "broken", BACK)
    kill(plan, 1, bad_step + 1)  # by now it has gone back, and made a step
    # As it stands between uncommitting and the line that says so.
    folder = RunFolder(plan.storage, plan.name)
    lines = Path(folder.metrics).read_text().splitlines(keepends=True)
    cut = next(index for index, line in enumerate(lines) if "rate_factor" in line)
    Path(folder.metrics).write_text("".join(lines[:cut]))
    assert max(commit.step for commit in committed(folder)) == to
    assert_equal(run(plan, attempt=2), back)


def test_a_run_that_keeps_diverging_ends_with_cause_rows_and_what_was_tried(material: Material, tmp_path: Path) -> None:
    for policy, words in (("stop", []), ("roll_back", ["rolled back 1 time before", "step 10 with 1 of the rate"])):
        # The same rate again meets the same spike again.
        guard = BACK | {"policy": policy} | ({"rate_factor": 1.0, "max_roll_backs": 1} if policy == "roll_back" else {})
        with pytest.raises(TrainingError) as caught:
            run(guarded(material, tmp_path / policy, guard))
        assert type(caught.value) is TrainingError, "its name says that it is not tried again"
        for word in ["The run diverges: train/grad_norm", "step 12, rank 0: ", *words]:
            assert word in str(caught.value), str(caught.value)


def test_a_loss_that_is_not_finite_is_rolled_back_too(material: Material, tmp_path: Path) -> None:
    # Rows of huge embeddings are not at hand; a rate that is far too high makes weights whose loss is not finite.
    plan = guarded(material, tmp_path, BACK | {"rate_factor": 1e-33, "threshold": 1e30}, rate=1e30, num_steps=6)
    outcome = run(plan)
    ((bad_step, to),) = outcome.roll_backs
    assert to < bad_step - 1
    assert all(map(math.isfinite, outcome.losses.values()))
    found = Findings.from_json(read_json(RunFolder(plan.storage, plan.name).result)).divergence
    assert [noted.step for noted in found] == [bad_step]
