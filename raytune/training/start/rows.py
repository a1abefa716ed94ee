"""The rows that a run trains on, on this rank: of its store, or streamed."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from raytune.data.batches.batches import TrainingRows
from raytune.data.store.store import Store
from raytune.data.stream.recipe import Recipe
from raytune.data.stream.stream import Position, Stream
from raytune.plan.run_plan import RunPlan
from raytune.training.checkpoints.checkpoint import Report


@contextmanager
def training_rows(plan: RunPlan, position: Mapping[str, Any] | None = None) -> Iterator[TrainingRows]:
    """The rows, for as long as steps are made.

    Args:
        position: of a stream, as `position_after` gave it at or before the first step that is made; None: its beginning.
    """
    if plan.data.stream is None:
        yield Store.open(plan.data.train.path)
        return
    with closing(Stream(recipe_of(plan), Position.of(position) if position else None)) as stream:
        yield stream


def recipe_of(plan: RunPlan) -> Recipe:
    """What a plan streams."""
    assert plan.data.stream is not None
    model = plan.model
    return Recipe.of(
        plan.data.stream,
        template=plan.template,
        row_length=plan.data.row_length,
        tokenizer_path=model.path,
        tokenizer_revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        new_tokens=model.new_tokens,
        seed=plan.seed,
    )


def position_after(step: int, plan: RunPlan, rows: TrainingRows) -> dict[str, Any] | None:
    """Where a run that has made so many steps goes on reading; None: a store needs no position."""
    if not isinstance(rows, Stream):
        return None
    return rows.position_of(step * plan.batch.global_batch_size).to_json()


def tell_what_was_read(rows: TrainingRows, step: int, report: Report) -> None:
    """Report what of a stream was read so far; what became of the rows of a store was said before."""
    if isinstance(rows, Stream):
        report("rows_streamed", step=step, **rows.counts, by_source=rows.counts_by_source)
