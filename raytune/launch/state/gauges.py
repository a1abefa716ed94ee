"""What a run measures as gauges of Ray, which each node's endpoint for Prometheus has as long as the command trains."""

from functools import cached_property
from typing import TYPE_CHECKING

from raytune.config.sections.run import RunConfig
from raytune.config.sections.tracking import TrackingSection
from raytune.errors import UserError
from raytune.launch.cluster.address import named_address
from raytune.launch.state.callbacks import RunEvent
from raytune.plan.run_plan import RunPlan

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

METRIC, STEP, STEPS, RUNNING = "raytune_metric", "raytune_step", "raytune_steps", "raytune_running"
"""Names of gauges; Ray puts `ray_` before them."""


def refuse_unseen(config: RunConfig) -> None:
    """Refuse gauges of a command that is on no node of its cluster, where nothing reads them.

    Raises:
        UserError: naming the key.
    """
    if config.tracking.prometheus and (named_address(config.cluster) or "").startswith("ray://"):
        raise UserError(
            "tracking.prometheus sets gauges on the node of the command, and by ray:// it is on none. Name the cluster as "
            "host:port on one of its nodes, submit the run as a job (raytune submit), or leave tracking.prometheus out.",
            keys=("tracking.prometheus",),
        )


def gauges_of(section: TrackingSection, plan: RunPlan) -> "Gauges":
    return Gauges(run=section.run_name or plan.name, group=section.group or "", num_steps=plan.optimization.num_steps)


class Gauges:
    """A callback that holds the newest values of a run. What is not finite is not exported by Ray.

    Args:
        run, group: what they are told apart by.
        num_steps: that the run makes.
    """

    def __init__(self, *, run: str, group: str, num_steps: int) -> None:
        self._labels, self._num_steps = {"run": run, "group": group}, num_steps

    def __call__(self, event: RunEvent) -> None:
        metric, step, steps, running = self._gauges
        for name, value in event.metrics.items():
            metric.set(value, tags=self._labels | {"metric": name})
        if event.step is not None:
            step.set(event.step, tags=self._labels)
        steps.set(self._num_steps, tags=self._labels)
        running.set(float(not event.is_last), tags=self._labels)

    @cached_property
    def _gauges(self) -> "tuple[Gauge, Gauge, Gauge, Gauge]":
        """Made at the first event, when the command has joined Ray."""
        from ray.util.metrics import Gauge  # loads Ray, which who only looks for `refuse_unseen` does without

        own = tuple(self._labels)
        return (
            Gauge(METRIC, "The newest value of a metric of a run.", tag_keys=(*own, "metric")),
            Gauge(STEP, "Optimizer steps that a run has made, by its newest line or event.", tag_keys=own),
            Gauge(STEPS, "Optimizer steps that a run makes in all.", tag_keys=own),
            Gauge(RUNNING, "1 while a run trains, 0 when it has ended.", tag_keys=own),
        )
