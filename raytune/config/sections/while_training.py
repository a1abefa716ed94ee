"""`evaluation.while_training`: suites that are measured while training goes on, and where."""

from typing import Annotated, Literal

from pydantic import Field

from raytune.config.sections.section import Auto, Duration, NonNegativeInt, PositiveFloat, PositiveInt, Section, Text

Where = Literal["auto", "spare", "between_steps"]


class WhileTrainingSection(Section):
    """Measures suites on the model as it is after certain steps, from files that plain transformers and PEFT load, as at the end.
    What they come to stands in the metrics as SUITE/METRIC (`gsm8k/numeric_match`), with the step that it is of: it may rank
    checkpoints, end the run early and compare trials of a sweep."""

    every_steps: PositiveInt | Auto = "auto"
    """Steps between two measurements. `auto`: as evaluations (`evaluation.every_steps`). The last step is always measured too;
    and, where a suite's metric ranks checkpoints, what is saved by step, unless one of the two numbers divides the other."""
    every_epochs: Annotated[PositiveFloat, Field(examples=[0.5])] | None = None
    """Passes over the training rows between two measurements, instead of `every_steps`; as `evaluation.every_epochs`."""
    at_start: bool = True
    """Measure before the first step too, so that the curve begins at the base model."""
    suites: Annotated[list[Text], Field(examples=[["gsm8k"]])] = []
    """Names of those that are measured; `evaluation.generation` is called `generation`. Default: all of them."""
    where: Where = "auto"
    """`spare`: an actor on CPUs and GPUs that no worker has measures the newest weights, and leaves out those that it has no time
    for; training never waits for it. `between_steps`: the workers do, each a share of the rows, and training waits. `auto`:
    `spare` where the cluster has enough beside the workers, else `between_steps`. Trials of a sweep measure between steps."""
    num_cpus: PositiveInt = 1
    """CPUs of the actor."""
    num_gpus: NonNegativeInt | Auto = "auto"
    """GPUs of the actor, of which it uses one; 0: it measures on CPUs. `auto`: one where workers have GPUs."""
    wait_at_end: Duration = 600.0
    """How long the run waits after its last step for what the actor still measures; only where a suite's metric ranks
    checkpoints, since nothing else hangs on it."""
