"""`checkpoint`: when state is saved and what is kept."""

from typing import Annotated, Literal

from pydantic import Field

from raytune.config.sections.section import Auto, Duration, NonNegativeInt, PositiveFloat, PositiveInt, Section, Text


class CheckpointSection(Section):
    every_steps: PositiveInt | Auto = "auto"
    """Steps between two saves. `auto`: with every evaluation, so that the best one can be kept. If it neither divides
    `evaluation.every_steps` nor is a multiple of it, each of these saves is evaluated as well."""
    every_epochs: Annotated[PositiveFloat, Field(examples=[1])] | None = None
    """Passes over the training rows between two saves, instead of `every_steps`; as `evaluation.every_epochs`."""
    every: Duration | None = None
    """Save as well at the first logged step (`training.logging_steps`) at which this much time has passed since the last save.
    For safety only: such a save is not evaluated, and so never the best one, unless an evaluation is due."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_best: NonNegativeInt = 1
    """Best checkpoints by `metric` that are kept as well. The final model is the best one."""
    metric: Text = "validation/loss"
    """Metric that ranks checkpoints. Without validation rows the last one is the best."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger metric is better."""
    in_background: bool | Auto = "auto"
    """Copy what is saved into memory of the host, and write its files while training goes on. `auto`: where the plan finds the
    memory, which never changes how the run is divided. true: refuse the run where it does not. false: training waits."""
    resume: bool = True
    """Continue an unfinished run of the same name from its newest checkpoint. false: refuse instead."""
