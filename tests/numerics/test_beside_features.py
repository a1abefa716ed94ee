"""`find-rate` and `score` beside everything else that a run can ask for: what they measure is what the run trains and leaves, and
nothing of the run changes by it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune.config.load import config_from
from raytune.config.sections.data import DataSource
from raytune.evaluation.scored_rows import read_jsonl_table
from raytune.launch.asking.score import standing_alone
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.rows_to_score import tokenised
from raytune.launch.data.stores import store_plan_of
from raytune.launch.rates.find_rate import range_test_plan
from raytune.launch.state.result import RunResult
from raytune.plan.rates.rate_range import RateRange
from raytune.plan.run_plan import RunPlan
from raytune.plan.scoring import Weights, scoring_plan
from raytune.run_folder import RunFolder
from raytune.storage import read_bytes, read_json
from raytune.training.run import train
from raytune.training.start.start import Worker
from raytune.training.tasks import perform
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import LORA, rank_and_world
from tests.numerics.test_whole_run import config, prepared_run

FULL = {"method": "full"}
RATE, STEPS, FIRST_PHASE = 2e-3, 6, 3
HELD_OUT = {"path": "demo:validation", "max_rows": 8}
TASK = {"path": "demo:train", "max_rows": 24}
OLD = "old.jsonl"
DATA = {"train": TASK, "validation": HELD_OUT, "max_length": 192, "too_long": "truncate", "limits": {"cut": 1}}
LOSSES = """
import torch.nn.functional as F

def likelihood(logits, target_ids):
    return -F.softmax(logits, -1).gather(1, target_ids[:, None])[:, 0]  # below 0

def twice(logits, target_ids):
    return 2 * F.cross_entropy(logits, target_ids, reduction="none")
"""

EWC = {"ewc": {"strength": 10.0, "data": OLD, "max_documents": 4}}
L2_SP = {"l2_sp": {"strength": 0.1}}
REPLAY = {"replay": {"data": OLD, "share": 0.2}}
TEACHER = {"distillation": {"weight": 0.3}}
PHASES = {"unfreeze": [{"last_layers": 1}, {"from_step": FIRST_PHASE, "last_layers": "all"}]}
MIXED = {"train": [TASK | {"proportion": 3, "loss_weight": 0.5}, {"path": OLD, "proportion": 1}]}
EMA, LAST = {"averaging": {"decay": 0.5}}, {"averaging": {"kind": "last", "last_steps": 4}}
MUON = {"optimizer": "muon"}
YARN, LINEAR = {"rope_scaling": {"type": "yarn", "factor": 4}}, {"rope_scaling": {"type": "linear", "factor": 2}}
NEW = {"new_tokens": ['","city":"']}
NUMBERS = {"token_weights": {"numbers": 3.0}}

FEATURES: dict[str, dict[str, Any]] = {
    "ewc": {"adapter": FULL, "strategy": EWC},
    "l2_sp": {"adapter": FULL, "strategy": L2_SP},
    "replay": {"strategy": REPLAY},
    "teacher beneath": {"strategy": TEACHER},
    "teacher beside": {"adapter": FULL, "strategy": TEACHER},
    "mixing": {"data": MIXED},
    "loss of one's own": {"strategy": {"objective": "losses.py:twice"}},
    "loss below 0": {"strategy": {"objective": "losses.py:likelihood"}},
    "token weights": {"data": NUMBERS},
    "ema": {"training": EMA},
    "mean of the last": {"adapter": FULL, "training": LAST},
    "muon": {"training": MUON},
    "muon, full": {"adapter": FULL, "training": MUON},
    "yarn": {"adapter": FULL, "model": YARN},
    "linear": {"model": LINEAR},
    "dynamic": {"model": {"rope_scaling": {"type": "dynamic", "factor": 2}}},
    "phases": {"adapter": FULL, "strategy": PHASES},
    "new tokens": {"adapter": FULL, "model": NEW},
    "new tokens, rows": {"model": NEW | {"vocabulary_multiple": 16}},
    "dropout": {"adapter": LORA | {"dropout": 0.3}},
    "a guard": {"training": {"divergence": {"policy": "skip"}}},
    "two workers to a row": {"training": {"sequence_parallel_size": 2}, "cluster": {"workers": 2}},
    # Several at once, cheaper.
    "held": {"adapter": FULL, "model": YARN, "data": MIXED, "strategy": EWC | L2_SP, "training": EMA},
    "taught": {"adapter": LORA | {"dropout": 0.3}, "model": LINEAR, "data": NUMBERS, "strategy": TEACHER | REPLAY},
    "own": {"model": NEW, "strategy": {"objective": "losses.py:likelihood"}, "training": MUON | LAST},
    "in phases": {"adapter": FULL, "strategy": PHASES | L2_SP | TEACHER, "training": EMA},
}
DEFAULT = ("in phases",)


@pytest.mark.parametrize("name", [pytest.param(one, marks=() if one in DEFAULT else pytest.mark.slow) for one in FEATURES])
def test_a_range_test_trains_what_the_run_does_and_a_score_is_of_what_it_leaves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_what_is_named(tmp_path)
    changes = with_defaults(FEATURES[name])
    folder, plan = prepared_run(tmp_path / "runs", changes)
    # One rate at every step, as the run has it.
    tried = RateRange(low=RATE, high=RATE, num_steps=STEPS, smoothing=0.0)

    before = tried_losses(plan, tried, tmp_path)
    on_ranks(train_here, plan)
    result, files = RunResult.read(folder), content(tmp_path / "runs")
    trained = [loss for _, loss in result.history.series("train/loss")]
    same = FIRST_PHASE if plan.optimization.phases else STEPS
    assert len(before) == len(trained) == STEPS
    assert before[:same] == trained[:same], "the range test makes the run's own steps"
    assert tried_losses(plan, tried, tmp_path) == before
    assert content(tmp_path / "runs") == files, "nothing of the run changes"

    recorded = result.metrics["validation/loss"]
    for step in (None, result.best_step):
        # Rows alone or beside others: fp32 sums of losses near 5 in another order.
        assert mean_score(plan, changes, Weights(folder=folder, step=step)) == pytest.approx(recorded, rel=1e-5)


def write_what_is_named(folder: Path) -> None:
    (folder / "losses.py").write_text(LOSSES)
    rows = [("What is {}?", "It is number {}, as you said."), ("And {}?", "{} as before.")] * 6
    old = [
        {"messages": [{"role": "user", "content": q.format(n)}, {"role": "assistant", "content": a.format(n)}]}
        for n, (q, a) in enumerate(rows)
    ]
    (folder / OLD).write_text("".join(json.dumps(row) + "\n" for row in old))


def with_defaults(changes: dict[str, Any]) -> dict[str, Any]:
    training = {"max_steps": STEPS, "global_batch_size": 2, "learning_rate": RATE, "lr_scheduler_type": "constant"}
    return changes | {
        "data": {"train": TASK, "validation": HELD_OUT, "max_length": 192, "too_long": "truncate", "limits": {"cut": 1}}
        | changes.get("data", {}),
        "training": training | {"warmup_steps": 0, "logging_steps": 1} | changes.get("training", {}),
    }


def on_ranks(task: Callable[..., Any], plan: RunPlan, *arguments: Any) -> Any:
    """What rank 0 returns."""
    workers = plan.batch.workers
    return task(plan, *arguments) if workers == 1 else run_on_ranks(task, workers, plan, *arguments)[0]


def worker_here() -> Worker:
    rank, world = rank_and_world()
    return Worker(rank=rank, world_size=world, device_index=rank, attempt=1, report=lambda metrics: None)


def train_here(plan: RunPlan) -> None:
    train(plan, worker_here())


def do_here(plan: RunPlan, task: str, request: dict[str, Any]) -> None:
    perform(task, plan, worker_here(), request)


def tried_losses(run: RunPlan, tried: RateRange, elsewhere: Path) -> list[float]:
    """Of a range test, which leaves nothing but its losses and their lines."""
    test = range_test_plan(run, tried).model_copy(update={"storage": str(elsewhere / "rates")})
    on_ranks(do_here, test, "find_rate", {"range": tried.model_dump()})
    folder = RunFolder(test.storage, test.name)
    assert sorted(path.name for path in Path(folder.path).iterdir()) == ["losses.json", "metrics.jsonl"]
    return read_json(folder.tried_losses)["losses"]


def mean_score(plan: RunPlan, changes: dict[str, Any], weights: Weights) -> float:
    """Over all targets of the held-out rows."""
    asked = config_from(config(Path(plan.storage), changes))
    alone = plan.model_copy(update={"model": standing_alone(plan, weights)})
    info = tokenised([DataSource.model_validate(HELD_OUT)], asked, alone, plan.storage, map)
    data = alone.data.model_copy(update={"train": store_plan_of("rows", info), "validation": []})
    changed = {"storage": weights.folder.scores, "name": "here", "data": data}
    scoring = scoring_plan(alone, this_machine(asked.cluster), weights).model_copy(update=changed)
    on_ranks(do_here, scoring, "score", weights.request)
    rows = read_jsonl_table(read_bytes(RunFolder(scoring.storage, scoring.name).scored_rows))
    return sum(row.loss * row.targets for row in rows) / sum(row.targets for row in rows)


def content(folder: Path) -> dict[str, str]:
    """Of every file of the runs, by its path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
