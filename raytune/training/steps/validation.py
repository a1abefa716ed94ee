"""Loss, perplexity and bits per byte on held-out rows, per data set and over all of them: on those of validation on the way, on
those of the test once, at the end."""

from collections.abc import Sequence
from typing import Self

from raytune.data.batches.batches import evaluation_batches
from raytune.data.batches.slices import Seat
from raytune.data.store.store import Store
from raytune.evaluation.perplexity import bits_per_byte, perplexity
from raytune.plan.data.split import TEST
from raytune.plan.run_plan import RunPlan, StorePlan
from raytune.training.engines.engine import Engine
from raytune.training.steps.loop import LossSum, evaluate_loss

VALIDATION = "validation"


class HeldOut:
    """Sets of rows that are measured. False if there are none."""

    def __init__(
        self, name: str, sets: Sequence[StorePlan], max_rows: int | None, plan: RunPlan, engine: Engine, loss_sum: LossSum
    ) -> None:
        """Args:
        name: that metrics begin with.
        max_rows: packed rows of each set, at most.
        """
        self._name, self._max_rows = name, max_rows
        self._batch, self._engine, self._loss_sum = plan.batch, engine, loss_sum
        self._sets = [(each, Store.open(each.path)) for each in sets]

    @classmethod
    def validation(cls, plan: RunPlan, engine: Engine, loss_sum: LossSum) -> Self:
        return cls(VALIDATION, plan.data.validation, plan.evaluation.max_rows, plan, engine, loss_sum)

    @classmethod
    def test(cls, plan: RunPlan, engine: Engine, loss_sum: LossSum) -> Self:
        return cls(TEST, plan.data.test, None, plan, engine, loss_sum)

    def __bool__(self) -> bool:
        return bool(self._sets)

    def measure(self) -> dict[str, float]:
        """Metrics of the model that the run would leave now: of the weights, or of their average. All ranks call it.

        In the loss over all sets each target of each set counts by its weight and by that of the set; where weights differ, bits
        per byte are those of the mean target.
        """
        with self._engine.averaged():
            return self._measure()

    def _measure(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        seat = Seat.of(self._batch, self._engine.rank, self._engine.world_size)
        loss_sum, weight, num_targets, num_bytes = 0.0, 0.0, 0, 0
        for each, store in self._sets:
            batches = evaluation_batches(
                store,
                rank=seat.group,
                world=seat.num_groups,
                micro_batch_size=self._batch.micro_batch_size,
                max_rows=self._max_rows,
            )
            measured = evaluate_loss(self._engine, map(seat.own, batches), self._loss_sum)
            own_bytes = int(store.num_bytes_of_row[: self._max_rows].sum())
            loss_sum += measured.loss * measured.weight * each.weight
            weight += measured.weight * each.weight
            num_targets += measured.num_targets
            num_bytes += own_bytes
            if len(self._sets) > 1:
                metrics |= _named(f"{self._name}/{each.name}", measured.loss, measured.num_targets, own_bytes)
        return _named(self._name, loss_sum / weight, num_targets, num_bytes) | metrics


def _named(prefix: str, loss: float, num_targets: int, num_bytes: int) -> dict[str, float]:
    return {
        f"{prefix}/loss": loss,
        f"{prefix}/perplexity": perplexity(loss),
        f"{prefix}/bits_per_byte": bits_per_byte(loss, num_targets, num_bytes),
    }
