"""The model that a run leaves is worth on its test what plain transformers make of it, and nothing of the run depends on that."""

from pathlib import Path
from typing import Any

import pytest

from raytune.launch.state.result import RunResult
from raytune.metrics.history import History
from tests.numerics.processes import run_on_ranks
from tests.numerics.saved_models import loss_by_plain_transformers
from tests.numerics.test_whole_run import LORA, finished, prepared_run, train_rank
from tests.variants import variants

TEST = {"data": {"test": {"path": "demo:test", "max_rows": 10}}}
EARLIER = {
    "training": {"learning_rate": 2e-3, "max_steps": 4, "global_batch_size": 2},
    "evaluation": {"every_steps": 1},
    "checkpoint": {"mode": "max"},  # the loss falls: an earlier one is "best"
}
PHASES = [{"last_layers": 1}, {"from_step": 3, "last_layers": "all"}]
VARIANTS: dict[str, dict[str, Any]] = {
    "the best is not the last": EARLIER,
    "the best is of a phase that has passed": EARLIER | {"strategy": {"unfreeze": PHASES}, "adapter": {"method": "full"}},
    "a teacher": EARLIER | {"strategy": {"distillation": {"teacher": "base", "weight": 0.3}}},
    "averaged": {"training": {"averaging": {"kind": "last"}, "max_steps": 4, "global_batch_size": 2}, "adapter": LORA},
    "chunked loss": {"training": {"loss": "chunked", "max_steps": 4}, "adapter": {"method": "full"}},
}


def on_test_rows(result: RunResult) -> float:
    """By plain transformers."""
    data = result.plan.data.model_copy(update={"validation": result.plan.data.test})
    return loss_by_plain_transformers(result.plan.model_copy(update={"data": data}), result.model_path)


@pytest.mark.parametrize("variant", variants(list(VARIANTS)[:2], list(VARIANTS)[2:]))
def test_the_model_that_is_left_has_the_loss_of_the_test(variant: str, tmp_path: Path) -> None:
    result = finished(tmp_path, TEST | VARIANTS[variant])
    if "best" in variant:
        assert result.best_step < 4
    assert on_test_rows(result) == pytest.approx(result.metrics["test/loss"], rel=2e-5)
    assert result.metrics["test/loss"] != result.metrics["validation/loss"]
    (sentence,) = [words for words in result.words if "On the test" in words]
    assert f"loss {result.metrics['test/loss']:.4f}" in sentence


def test_nothing_of_a_run_depends_on_its_test(tmp_path: Path) -> None:
    """Its rows are of a file of their own, so that the training rows are the same."""
    with_test, without = (finished(tmp_path / name, EARLIER | test) for name, test in (("with", TEST), ("without", {})))
    assert with_test.best_step == without.best_step
    assert {name for name in with_test.metrics if name.startswith("test/")} == {
        "test/loss",
        "test/perplexity",
        "test/bits_per_byte",
    }
    assert not any(name.startswith("test/") for point in with_test.history.points for name in point.values)
    for name in ("train/loss", "validation/loss"):
        assert with_test.history.series(name) == without.history.series(name)


@pytest.mark.parametrize("stage", variants([2], [0, 1, 3]))
def test_two_workers_measure_what_one_does(stage: int, tmp_path: Path) -> None:
    changes = EARLIER | TEST | {"adapter": {"method": "full"}}
    changes |= {"cluster": {"workers": 2}, "training": EARLIER["training"] | {"zero": {"stage": stage}}}
    folder, plan = prepared_run(tmp_path, changes)
    run_on_ranks(train_rank, 2, plan)
    result = RunResult.read(folder)
    assert History.read(folder.metrics).last_step == 4
    assert on_test_rows(result) == pytest.approx(result.metrics["test/loss"], rel=2e-5)


def test_several_sets_count_by_their_targets(tmp_path: Path) -> None:
    sources = [{"path": "demo:test", "max_rows": 7, "name": "one"}, {"path": "demo:validation", "max_rows": 3, "name": "test"}]
    result = finished(tmp_path, {"data": {"test": sources}, "training": {"max_steps": 2}})
    targets = {store.name: store.num_targets for store in result.plan.data.test}
    assert list(targets) == ["one", "main"], "test/loss is that of all"
    overall = sum(result.metrics[f"test/{name}/loss"] * count for name, count in targets.items()) / sum(targets.values())
    assert result.metrics["test/loss"] == pytest.approx(overall, rel=1e-12)
