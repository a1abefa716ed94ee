"""`training.averaging`: the model of a run is an average of its weights over steps."""

from typing import Annotated, Literal

from pydantic import Field

from raytune.config.sections.section import Auto, PositiveInt, Section


class AveragingSection(Section):
    """Averages the trained weights over steps, in fp32, beside training, which it leaves as it is. The average is the model:
    validation measures it, the best checkpoint is chosen by it, and it is what the run saves in the end."""

    kind: Literal["ema", "last"] = "ema"
    """`ema`: the weights after all steps, each counting `decay` times as much as those after it. `last`: the plain mean of the
    weights after the last steps; until these begin, the model is the weights as they are."""
    decay: Annotated[Annotated[float, Field(gt=0, lt=1)] | Auto, Field(examples=[0.999])] = "auto"
    """What weights count for, as a share of those that are averaged after them: about the last 1 / (1 - decay) are in the
    average. The start of the run does not linger in it: the shares of what was averaged add up to 1 from the first on. `auto`:
    about the last tenth of the run."""
    last_steps: Annotated[PositiveInt | Auto, Field(examples=[100])] = "auto"
    """Steps at the end of the run whose weights are averaged. `auto`: the last quarter."""
    every_steps: PositiveInt = 1
    """Steps between two weights that are averaged: with `ema` multiples of it, with `last` counted back from the last step."""
