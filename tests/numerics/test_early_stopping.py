"""A run that overfits for real ends where its rule says, resumed or not; its model is the best checkpoint, and a longer patience
goes on. The oracle is written here, and knows the recorded metrics only."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raytune.config.load import config_from
from raytune.config.sections.run import RunConfig
from raytune.launch.attempts.attempts import Failure
from raytune.launch.run import RunFailedError, train_plan
from raytune.launch.state.finished import answer
from raytune.launch.state.record import RunRecord
from raytune.launch.state.result import RunResult
from raytune.metrics.events import read_events
from raytune.plan.run_plan import RunPlan
from raytune.plan.strategies.stopping import rules_of
from raytune.run_folder import RunFolder
from raytune.training.checkpoints.commit import committed
from raytune.training.run import Worker, train
from tests.tiny import store_plan, tiny_plan, tiny_store

NUM_STEPS, EVERY = 40, 2


@dataclass(frozen=True, kw_only=True)
class Material:
    train: Any
    validation: Any


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A handful of rows to be learned by heart, and others."""
    stores = tmp_path_factory.mktemp("stores")
    return Material(
        train=store_plan(tiny_store(stores, max_rows=3, max_length=160)),
        validation=store_plan(tiny_store(stores, "demo:validation", max_rows=4, max_length=160), "validation"),
    )


def asked(storage: Path, **rules: Any) -> RunConfig:
    return config_from(
        {
            "name": "tiny",
            "storage": str(storage),
            "data": {"train": "demo:train", "validation": "demo:validation"},
            "training": rules,
            "cluster": {"max_failures": 0},
        }
    )


def planned(material: Material, config: RunConfig, **changes: Any) -> RunPlan:
    rows = material.train.num_rows
    fields: dict[str, Any] = {
        "storage": config.storage,
        "template": "",  # of the demo's own, which is in its tokenizer
        "data": {"train": material.train, "validation": [material.validation], "row_length": 160},
        "batch": {"workers": 1, "micro_batch_size": 1, "accumulation": 1},
        "optimization": {"num_steps": NUM_STEPS, "num_rows": NUM_STEPS, "learning_rate": 1e-2, "schedule": "linear"},
        "evaluation": {"every_steps": EVERY},
        "checkpoint": {"every_steps": EVERY, "keep_last": 2},
        "stopping": rules_of(config).model_dump(),
    }
    assert rows <= 4, "few rows are learned by heart sooner"
    return tiny_plan(**(fields | changes))


def run(plan: RunPlan, config: RunConfig, dies_after: int | None = None) -> RunResult:
    """What `raytune train` does from the plan on, with workers in this process."""

    def attempt(plan: RunPlan, number: int, check: Callable[[], None]) -> Failure | None:
        made = 0

        def still() -> None:
            nonlocal made
            made += 1
            if made == dies_after:
                raise ConnectionError("the node is gone")

        try:
            train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=number, report=lambda metrics: None, check=still))
        except ConnectionError as error:
            return Failure(attempt=number, rank=0, node=None, kind="TrainingError", message=str(error), traceback="")
        return None

    return train_plan(plan, [], config, attempt=attempt)


def expected_stop(losses: dict[int, float], patience: int) -> int:
    """The step after which a run ends, by the plainest words for it: the last `patience` losses are all no lower than the lowest
    one before them."""
    steps = [step for step in sorted(losses) if step > 0 and step % EVERY == 0]
    for end in range(patience + 1, len(steps) + 1):
        seen = [losses[step] for step in steps[:end]]
        if min(seen[-patience:]) >= min(seen[:-patience]):
            return steps[end - 1]
    return steps[-1]


def validation_losses(result: RunResult) -> dict[int, float]:
    return dict(result.history.series("validation/loss"))


def test_a_run_that_overfits_ends_early_and_resumed_it_ends_alike_and_a_longer_patience_goes_on(
    material: Material, tmp_path: Path
) -> None:
    config = asked(tmp_path / "unbroken", early_stopping={"patience": 3}, overfitting={"patience": 2})
    unbroken = run(planned(material, config), config)
    losses, stopped = validation_losses(unbroken), unbroken.findings.stopped
    assert stopped is not None, losses
    assert stopped.rule == "early_stopping"
    assert stopped.step == max(losses) == expected_stop(losses, 3) < NUM_STEPS
    assert unbroken.best_step == min((step for step in losses if step), key=losses.__getitem__) == stopped.step - 3 * EVERY
    assert unbroken.metrics["validation/loss"] == losses[unbroken.best_step]
    folder = RunFolder(config.storage, "tiny")
    record = RunRecord.read(folder)
    assert record is not None
    assert record.state == "finished"
    assert [e["step"] for e in read_events(folder.events) if e["event"] == "stopped_early"] == [stopped.step]
    # The rates are those of the whole schedule.
    rates = dict(unbroken.history.series("train/learning_rate"))
    assert rates[stopped.step] == pytest.approx(1e-2 * (1 - (stopped.step - 1) / NUM_STEPS))

    # Killed after evaluations that have no checkpoint behind them, and again after the last save, before the model was written.
    config = asked(tmp_path / "broken", early_stopping={"patience": 3}, overfitting={"patience": 2})
    plan = planned(material, config, checkpoint={"every_steps": 2 * EVERY, "keep_last": 2})
    with pytest.raises(RunFailedError):
        run(plan, config, dies_after=stopped.step - EVERY + 1)
    broken = run(plan, config)
    assert validation_losses(broken) == losses
    assert broken.findings == unbroken.findings
    broken_folder = RunFolder(config.storage, "tiny")
    assert max(commit.step for commit in committed(broken_folder)) == stopped.step, "the step that a run ends with is saved"
    Path(broken_folder.result).unlink()
    again = run(plan, config)
    assert again.findings == unbroken.findings
    assert validation_losses(again) == losses, "no step was made: the rule knows what was measured before"

    # The same command only reads the result. A shorter patience, by which it would have ended too, does as well.
    config = asked(tmp_path / "unbroken", early_stopping={"patience": 3}, overfitting={"patience": 2})
    assert run(planned(material, config), config).finished_before
    shorter = asked(tmp_path / "unbroken", early_stopping={"patience": 2})
    assert run(planned(material, shorter), shorter).findings == unbroken.findings

    # A longer one goes on from where the run ended, with the schedule of all steps.
    longer = asked(tmp_path / "unbroken", early_stopping={"patience": 5})
    assert answer(longer, folder) is None
    further = run(planned(material, longer), longer)
    now = validation_losses(further)
    assert {step: now[step] for step in losses} == losses
    assert max(now) == expected_stop(now, 5) > stopped.step
    assert further.findings.stopped is None or further.findings.stopped.step == max(now)
    assert json.loads(Path(folder.run).read_text())["state"] == "finished"
    assert run(planned(material, config), config).finished_before, "by the rule before it had ended too"
