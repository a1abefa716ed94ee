"""How a run is divided over machines, and how it is divided again when it goes on: on other ones, its identity stays. Pure.

What a run computes is its `identity`; everything in here may change between two attempts at it, as far as its newest checkpoint
can be loaded that way. Replicated state (ZeRO stage 0) fits any number of workers, shards only as many as saved them.
"""

from dataclasses import dataclass
from typing import Self

from raytune.config.sections.model import Attention
from raytune.config.sections.run import RunConfig
from raytune.config.sections.training import Offload, Precision, TrainingSection
from raytune.errors import PlanError, UserError
from raytune.plan.run_plan import RunPlan, ZeroStage
from raytune.plan.value import Plan


class Division(Plan):
    """What each machine does of a run."""

    workers: int
    zero_stage: ZeroStage
    shards_base: bool = False
    copy_over: int = 1
    micro_batch_size: int
    accumulation: int
    sequence_parallel: int = 1
    offload_optimizer: Offload
    offload_parameters: Offload
    gradient_checkpointing: bool
    attention: Attention
    compile: bool
    tf32: bool
    liger: bool
    loss_chunk_tokens: int | None
    weights: Precision
    """Dtype that the loaded weights are kept in."""

    @classmethod
    def of(cls, plan: RunPlan) -> Self:
        return cls(
            workers=plan.batch.workers,
            zero_stage=plan.engine.zero_stage,
            shards_base=plan.engine.shards_base,
            copy_over=plan.engine.copy_over,
            micro_batch_size=plan.batch.micro_batch_size,
            accumulation=plan.batch.accumulation,
            sequence_parallel=plan.batch.sequence_parallel,
            offload_optimizer=plan.engine.offload_optimizer,
            offload_parameters=plan.engine.offload_parameters,
            gradient_checkpointing=plan.model.gradient_checkpointing,
            attention=plan.model.attention,
            compile=plan.model.compile,
            tf32=plan.tf32,
            liger=plan.model.liger,
            loss_chunk_tokens=plan.loss.chunk_tokens,
            weights=plan.model.dtype,
        )

    def changes_to(self, other: Self) -> str:
        """What is divided otherwise, in words; empty if nothing is."""
        old, new = self.model_dump(mode="json"), other.model_dump(mode="json")
        return ", ".join(f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a saved training state is cut."""

    zero_stage: int
    world_size: int
    precision: Precision

    @property
    def is_sharded(self) -> bool:
        return self.zero_stage > 0

    def loads(self, saved: "Layout") -> bool:
        """Whether an engine with this layout can load a state that was saved with another."""
        is_alike = (saved.zero_stage, saved.precision) == (self.zero_stage, self.precision)
        return is_alike and (not saved.is_sharded or saved.world_size == self.world_size)

    def __str__(self) -> str:
        return f"{self.world_size} worker{'s' * (self.world_size != 1)} at ZeRO stage {self.zero_stage} in {self.precision}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A run that is there, and is to be continued or answered."""

    plan: RunPlan
    layout: Layout | None
    """Of its newest checkpoint; None: it has none, so that every division is possible."""

    @property
    def rows_per_step(self) -> int:
        return self.plan.batch.global_batch_size

    @property
    def sharded_over(self) -> int | None:
        """Workers that alone can load the newest checkpoint; None: any number can."""
        return self.layout.world_size if self.layout and self.layout.is_sharded else None


def continued(config: RunConfig, begun: Begun) -> RunConfig:
    """The config with which a run goes on: what would be chosen for the machines at hand, and decides what is computed, stays
    as it was chosen when the run began; so does what its newest checkpoint decides.

    Raises:
        PlanError: if the config asks for a division that the run cannot go on with, or other rows per step; with the way out.
    """
    training, cluster = config.training, config.cluster
    kept: dict[str, object] = {}
    if training.precision == "auto":
        kept["precision"] = begun.plan.precision
    _refuse_other_offload(training, begun)
    if begun.layout is not None:
        saved = begun.layout.zero_stage
        if training.zero.stage not in ("auto", saved):
            raise only_as(begun, f"training.zero.stage is {training.zero.stage}", f"training.zero.stage to {saved}")
        kept["zero"] = training.zero.model_copy(update={"stage": saved})
    if (ranks := begun.sharded_over) is not None:
        if cluster.workers not in ("auto", ranks):
            raise only_as(begun, f"cluster.workers is {cluster.workers}", f"cluster.workers to {ranks}")
        cluster = cluster.model_copy(update={"workers": ranks})
    if training.global_batch_size == "auto":
        _refuse_other_rows(training, cluster.workers, begun.rows_per_step)
        kept["global_batch_size"] = begun.rows_per_step
    return config.model_copy(update={"training": training.model_copy(update=kept), "cluster": cluster})


def most_that_divide(rows_per_step: int, workers: int, training: TrainingSection) -> int:
    """As many workers as there are places for, or fewer, so that each has the same number of whole forward passes."""
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    unit = (1 if micro == "auto" else micro) * (1 if accumulation == "auto" else accumulation)
    size = training.sequence_parallel_size
    groups = (number for number in range(1, workers // size + 1) if rows_per_step % (number * unit) == 0)
    return size * max(groups, default=workers // size) or workers


def kept_settings(begun: Begun) -> str:
    """What `continued` keeps, as a sentence: it explains refusals whose settings nobody wrote."""
    kept = f"training.global_batch_size {begun.rows_per_step}, training.precision {begun.plan.precision}"
    kept += f", with checkpoints of {begun.layout}" if begun.layout else ""
    return (
        f"Run {begun.plan.name!r} goes on as it began: {kept}. Without these it is another run: give it another name (name=...)."
    )


def only_as(begun: Begun, asked: str, back: str) -> PlanError:
    """That the newest checkpoint allows no other division.

    Args:
        asked: what would have to load it, as the beginning of a sentence.
        back: what to set, and to what.
    """
    return PlanError(
        f"{asked}, but the newest checkpoint of run {begun.plan.name!r} was saved by {begun.layout}, and can be loaded only so. "
        f"Set {back} to continue it, or give a new run another name (name=...)."
    )


def _refuse_other_offload(training: TrainingSection, begun: Begun) -> None:
    """State that lies in files of a node's disk is saved as such, and loaded into no other place."""
    for name in ("offload_optimizer", "offload_parameters"):
        asked, was = getattr(training.zero, name), getattr(begun.plan.engine, name)
        if begun.layout is not None and asked != was and "nvme" in (asked, was):
            raise only_as(begun, f"training.zero.{name} is {asked}", f"training.zero.{name} to {was}")


def _refuse_other_rows(training: TrainingSection, workers: int | str, rows: int) -> None:
    """Refuse a written division that makes other rows per step than the run has."""
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    written = [
        (key, value)
        for key, value in (
            ("cluster.workers", workers),
            ("training.per_device_train_batch_size", micro),
            ("training.gradient_accumulation_steps", accumulation),
        )
        if isinstance(value, int)
    ]
    product = 1
    for key, value in written:
        product *= value // training.sequence_parallel_size if key == "cluster.workers" else value
    if rows % product == 0 and (len(written) < 3 or product == rows):
        return
    asked = " x ".join(f"{key} {value}" for key, value in written)
    *others, last = written
    unit = product // last[1]
    if len(written) == 3 and rows % unit == 0:
        out = f"Set {last[0]} to {rows // unit}, or leave it out"
    else:
        out = f"Leave {last[0]} out, or set it to a divisor of {rows // unit if others and rows % unit == 0 else rows}"
    raise UserError(
        f"The run that is there makes {rows} row{'s' * (rows != 1)} per step, but {asked} makes {product}"
        f"{'' if len(written) == 3 else ', times a whole number'}. {out}, to continue it; with other rows per step it is another "
        f"run (name=...).",
        keys=tuple(key for key, _ in written),
    )
