"""`training.divergence`: a guard that looks out for spikes of the training loss and of the gradient norm."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune.config.sections.section import PositiveFloat, PositiveInt, Section

Policy = Literal["warn", "skip", "stop", "roll_back"]


class DivergenceSection(Section):
    """Guards against divergence. A value of a logged step is a spike if it is above the median of the logged values before it by
    more than `threshold` robust standard deviations (1.4826 times the median absolute deviation). Loss and gradients that are
    not finite end the run with or without it, unless the policy is `roll_back`."""

    policy: Policy = "warn"
    """`warn`: say so, in the log, in the events and with the result. `skip`: do not make the update of any step whose gradient
    norm is a spike. `stop`: end the run, naming step, ranks and rows. `roll_back`: go back to the newest checkpoint before the
    spikes and train from there at a lower rate; at a value that is not finite as well."""
    watch: Literal["loss", "grad_norm", "both"] = "both"
    """Where spikes are looked for: `train/loss`, `train/grad_norm` (before clipping), or either. `skip` looks at the norm."""
    threshold: PositiveFloat = 6.0
    """Robust standard deviations above the median from which on a value is a spike. They count as 1 % of the median at least."""
    window: Annotated[int, Field(ge=4)] = 64
    """Logged steps (`training.logging_steps`) that median and deviation are of; spikes among them count as well, so that a level
    that stays is soon an ordinary one. Nothing is a spike before there are 16, or as many as the window has."""
    patience: PositiveInt = 3
    """Logged steps in a row with a spike before it is divergence. Less than half of `window`."""
    rate_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """What the learning rate is multiplied by from where the run goes back to, each time again. The rows are trained again."""
    max_roll_backs: PositiveInt = 3
    """Times that the run goes back at most; then it ends as with `stop`."""

    @model_validator(mode="after")
    def _patience_can_be_reached(self) -> "DivergenceSection":
        if 2 * self.patience >= self.window:
            raise ValueError(
                f"patience {self.patience} is not less than half of window {self.window}: so many spikes in a row are the median"
            )
        if self.policy == "skip" and self.watch == "loss":
            raise ValueError("policy skip looks at the gradient norm before each update, so watch cannot be loss")
        return self
