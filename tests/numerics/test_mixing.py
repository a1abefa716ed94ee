"""A run on a mixture of weighed sources = plain torch, however it is divided and interrupted; the measures of its sources."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune.config.sections.data import DataSource
from raytune.plan.data.mixing import Mixture
from raytune.plan.run_plan import RunPlan
from tests.numerics.runs import (
    LORA,
    SAME_SUMS,
    Change,
    Material,
    largest_difference,
    make_plan,
    relative_difference,
    run,
    short_rows,
    train,
)
from tests.numerics.test_target_weights import plain_losses
from tests.numerics.test_whole_run import finished
from tests.tiny import store_plan, tiny_store
from tests.variants import variants

WEIGHTS = {"task": 2.0, "code": 0.25, "general": 1.0}
MIXTURE = Mixture(proportions=(2.0, 1.0), num_replayed=1, replay_share=0.25)


@pytest.fixture(scope="module")
def mixed(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Few rows of a task, which are seen several times, more of code, and some of what is replayed."""
    folder = tmp_path_factory.mktemp("mixed")
    for seed, (name, num_rows) in enumerate((("task", 9), ("code", 30), ("general", 80)), 1):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short_rows(num_rows, seed)))
    sources = tuple(DataSource(path=str(folder / f"{name}.jsonl")) for name in WEIGHTS)
    weights = tuple(WEIGHTS.values())
    info = tiny_store(folder / "stores", sources=sources, mixture=MIXTURE, loss_weights=weights, max_length=144)
    assert [source.passes > 2 for source in info.report.sources] == [True, False, False]
    return replace(material, store=store_plan(info))


def mixed_plan(mixed: Material, adapter: dict[str, Any], **changes: Any) -> RunPlan:
    # Above the roots of Adam's second moments its epsilon makes a step of its first moments alone, in which a loss of another
    # scale shows and rounding is not amplified.
    settings = {"num_steps": 3, "learning_rate": 0.3, "epsilon": 1.0, "weight_decay": 0.0, "warmup_steps": 0}
    return make_plan(mixed, adapter=adapter, optimization=settings | {"schedule": "constant"}, **changes)


@pytest.mark.parametrize("adapter", [{"method": "full"}, LORA], ids=["full", "lora"])
def test_a_weighed_mixture_is_that_of_plain_torch(adapter: dict[str, Any], mixed: Material) -> None:
    plan = mixed_plan(mixed, adapter)
    losses = train(plan).losses[:3]
    expected = plain_losses(plan, lambda file, line: WEIGHTS[Path(file).stem])
    assert relative_difference(losses, expected) <= SAME_SUMS
    assert relative_difference(losses, plain_losses(plan, lambda file, line: 1.0)) > 1e-4


@pytest.mark.parametrize(
    ("stage", "workers"),
    [
        pytest.param(0, 2, marks=pytest.mark.slow),
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(2, 4, marks=pytest.mark.slow),
        (3, 2),
    ],
)
def test_a_mixture_does_not_depend_on_its_division(stage: int, workers: int, mixed: Material) -> None:
    alone = train(make_plan(mixed, accumulation=1, adapter=LORA))
    divided = run(make_plan(mixed, workers=workers, stage=stage, adapter=LORA))[0]
    assert relative_difference(divided.losses, alone.losses) <= SAME_SUMS
    assert largest_difference(divided, alone) <= 3 * SAME_SUMS


@pytest.mark.parametrize("stage", variants([0], [3]))
def test_a_mixture_resumed_is_one_unbroken(stage: int, mixed: Material, tmp_path: Path) -> None:
    plan = make_plan(mixed, stage=stage, adapter=LORA)
    unbroken = run(plan)[0]
    run(plan, Change(stop=3, save=tmp_path))
    resumed = run(plan, Change(start=3, load=tmp_path / "rank-0"))[0]
    assert resumed.numbers == unbroken.numbers[3:]
    assert largest_difference(resumed, unbroken) == 0


def test_what_is_held_out_of_each_source_is_measured_and_counts_as_in_training(tmp_path: Path) -> None:
    sources = [
        {"path": "demo:train", "max_rows": 60, "name": "task", "proportion": 1},
        {"path": "demo:test", "max_rows": 100, "name": "other", "proportion": 1, "loss_weight": 0.25},
    ]
    replay = {"data": {"path": "demo:validation", "name": "old"}, "share": 0.2}
    data = {"train": sources, "validation": [], "validation_fraction": 0.2}
    result = finished(tmp_path, {"data": data, "strategy": {"replay": replay}})
    sets = {store.name: store for store in result.plan.data.validation}
    assert set(sets) == {"task", "other", "old"}
    losses = {name: result.history.series(f"validation/{name}/loss")[-1][1] for name in sets}
    counts = {name: store.weight * store.num_targets for name, store in sets.items()}
    overall = result.history.series("validation/loss")[-1][1]
    assert overall == pytest.approx(sum(losses[name] * counts[name] for name in sets) / sum(counts.values()), rel=1e-9)
    assert len(set(losses.values())) == 3
