"""best.yaml is the winner's run: every value of the space is in it, and training it plans the same run."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytune.config.load import load_config
from raytune.config.sections.run import RunConfig
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.plan.identity.identity import identity_of
from raytune.run_folder import SweepFolder
from raytune.sweeps.planner import Planner
from raytune.sweeps.space import run_value
from raytune.sweeps.trial import Trial
from raytune.sweeps.winner import best_yaml
from tests.sweep_cases import sweep_result, trial_result

SPACE = {
    "adapter.rank": {"choice": [8, 16, 32]},  # 16 is the default
    "adapter.alpha": "2 * adapter.rank",
    "adapter.dropout": {"choice": [0.0, 0.1], "when": "adapter.rank >= 16"},
    "training.lr_scheduler_type": {"choice": ["cosine", "linear"]},  # cosine is the default
    "training.learning_rate": {"log_uniform": [1e-4, 1e-2]},
    "evaluation.max_rows": {"choice": [None, 4]},  # None is the default
}
KEYS = tuple(SPACE)


def sweep_of(tmp_path: Path) -> RunConfig:
    (tmp_path / "under.yaml").write_text(
        "data: {train: {path: 'demo:train', max_rows: 20}, validation_fraction: 0.2, max_length: 512}\n"
        "training: {max_steps: 10, weight_decay: 0.1, seed: 3}\nadapter: {method: lora, bias: none}\n"
        "evaluation: {generation: {rows: 'demo:test', max_rows: 2}}\n"
    )
    config: dict[str, Any] = {
        "name": "s",
        "storage": str(tmp_path / "runs"),
        "training": {"logging_steps": 2},
        "evaluation": {"generation": None},
        "sweep": {"run": str(tmp_path / "under.yaml"), "space": SPACE, "trials": 4},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(config))
    return load_config([tmp_path / "sweep.yaml"])


def values(rank: int, rows: int | None) -> dict[str, Any]:
    conditional = {"adapter.dropout": 0.0} if rank >= 16 else {}
    return {
        "adapter.rank": rank,
        "adapter.alpha": 2 * rank,
        **conditional,
        "training.lr_scheduler_type": "cosine",
        "training.learning_rate": 0.0012345678,
        "evaluation.max_rows": rows,
    }


@pytest.mark.parametrize(("rank", "rows"), [(16, None), (8, 4)])
def test_it_holds_every_value_of_the_space_and_plans_the_run_of_the_trial(rank: int, rows: int | None, tmp_path: Path) -> None:
    config, trial = sweep_of(tmp_path), Trial(number=0, values=values(rank, rows))
    planner = Planner(config, SweepFolder(str(tmp_path / "runs"), "s"), this_machine(config.cluster), map)
    result = sweep_result([trial_result(0, trial.values, ((10, 1.0),))], keys=KEYS)
    text = best_yaml(planner.winner(trial), result)
    (tmp_path / "best.yaml").write_text(text)
    loaded = load_config([tmp_path / "best.yaml"])
    assert {key: run_value(loaded, key) for key in trial.values} == trial.values
    assert loaded == planner.winner(trial)
    for key in (
        *trial.values,
        "training.weight_decay",
        "training.seed",
        "training.max_steps",
        "data.max_length",
        "adapter.method",
    ):
        assert f"{key.rpartition('.')[2]}:" in text, "written, be it the default or not"
    assert ("without adapter.dropout" in text) == (rank == 8)
    again = prepare(loaded, this_machine(loaded.cluster), map).plan
    assert identity_of(again) == identity_of(planner.plan(trial))


def test_no_value_leaves_its_comment(tmp_path: Path) -> None:
    config = sweep_of(tmp_path)
    odd = trial_result(0, {"data.template": "chatml\ntraining: {seed: 9}"}, ((10, 1.0),))
    text = best_yaml(config.model_copy(update={"sweep": None}), sweep_result([odd]))
    (tmp_path / "best.yaml").write_text(text)
    assert load_config([tmp_path / "best.yaml"]).training.seed == 3
