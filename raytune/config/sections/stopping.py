"""`training.early_stopping` and `training.overfitting`: rules that look at evaluations, and may end a run early."""

from typing import Annotated, Literal

from pydantic import Field

from raytune.config.sections.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section, Text


class EarlyStoppingSection(Section):
    """Ends a run whose metric gets no better. Counted are evaluations by `evaluation.every_steps` or `every_epochs`, not the one
    before the first step."""

    patience: PositiveInt = 3
    """Evaluations in a row without a better value, after the last of which the run ends. The learning rate follows the schedule
    of all steps until then."""
    min_delta: NonNegativeFloat = 0.0
    """A value is better if it beats the last better one by more than this."""
    metric: Text = "validation/loss"
    """Metric that is looked at. Which checkpoint becomes the model is `checkpoint.metric`'s matter."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger metric is better."""


class OverfittingSection(Section):
    """Tells overfitting: the validation loss rises while the training loss falls, or is further above it than is wanted.
    Evaluations are counted as for `early_stopping`; the training loss of each is the mean of the logged steps since the one
    before."""

    policy: Literal["warn", "stop"] = "warn"
    """`warn`: say so, in the log, in the events and with the result. `stop`: also end the run."""
    patience: PositiveInt = 3
    """Evaluations in a row at which the validation loss rises, or the gap is too wide, before it is overfitting."""
    max_gap: Annotated[PositiveFloat, Field(examples=[0.5])] | None = None
    """Nats by which the validation loss may be above the training loss. Without a value only a rising loss counts: rows that are
    harder than those of training have a gap from the start. Refused where the two losses are not of the same: another loss, rows
    that count otherwise (`data.validation` beside replay or weights of sources), or an average of the weights."""
