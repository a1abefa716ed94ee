"""`sweep`: which values are tried for which keys, in what order, and which trials are stopped early."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from raytune.config.sections.section import Auto, NonNegativeInt, PositiveFloat, PositiveInt, Section, Text

KINDS = ("choice", "grid", "uniform", "log_uniform", "integer", "log_integer", "expression")
"""The ways to draw a value; a dimension has exactly one of them."""

MAX_STEPS = 1_000_000

ConfigKey = Annotated[str, Field(title="a config key")]
"""A dotted key of a run config. A mapping with such names has one level, however many dots they have."""

_Options = Annotated[list[Any], Field(min_length=1, title="a list of values", examples=[[4, 8]])]
_Range = Annotated[list[float], Field(min_length=2, max_length=2, title="two numbers [low, high]", examples=[[1.0, 2.0]])]
_IntegerRange = Annotated[list[int], Field(min_length=2, max_length=2, title="two integers [low, high]", examples=[[4, 16]])]
_Expression = Annotated[Text, Field(title="an expression such as 2 * adapter.rank", examples=["2 * adapter.rank"])]

_Condition = Annotated[Text, Field(title="a condition such as adapter.rank >= 16", examples=["adapter.rank >= 16"])]


class Dimension(Section):
    """How the values of one key are drawn: one of `choice`, `grid`, `uniform`, `log_uniform`, `integer`, `log_integer` and
    `expression`."""

    choice: _Options | None = None
    """Values of which each is as likely as the others. A plain list means the same."""
    grid: _Options | None = None
    """Values that are all tried, with every draw of the other keys."""
    uniform: _Range | None = None
    """A number between two others."""
    log_uniform: _Range | None = None
    """A number between two others above 0, its logarithm spread evenly: for learning rates."""
    integer: _IntegerRange | None = None
    """An integer between two others, both included."""
    log_integer: _IntegerRange | None = None
    """An integer between two others above 0, its logarithm spread evenly."""
    expression: _Expression | None = None
    """A value that follows from other keys. Plain text means the same."""
    step: PositiveInt | PositiveFloat | None = None
    """Only low + k * step, up to the high end (with `uniform` and `integer`)."""
    when: _Condition | None = None
    """The key is drawn only where this is true; elsewhere the run's own value holds."""

    @property
    def kind(self) -> str:
        """The one of `KINDS` that this is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @model_validator(mode="after")
    def _is_one_kind(self) -> "Dimension":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"takes one of {', '.join(KINDS)}, got {' and '.join(given) or 'none of them'}")
        if self.step is not None and self.kind not in ("uniform", "integer"):
            raise ValueError(f"step goes with uniform and integer, not with {self.kind}")
        if self.step is not None and self.kind == "integer" and self.step != int(self.step):
            raise ValueError(f"step {self.step:g} of an integer must be an integer")
        if self.kind in ("uniform", "log_uniform", "integer", "log_integer"):
            low, high = getattr(self, self.kind)
            if not low < high:
                raise ValueError(f"{self.kind} goes from low to high, got [{low:g}, {high:g}]")
            if self.kind.startswith("log_") and low <= 0:
                raise ValueError(f"{self.kind} needs a low end above 0, got {low:g}")
            if self.kind == "uniform" and not high - low < float("inf"):
                raise ValueError(f"the range [{low:g}, {high:g}] is too wide")
            if self.step is not None and self.step > high - low:
                raise ValueError(f"step {self.step:g} is wider than the range [{low:g}, {high:g}]")
            if self.step is not None and (high - low) / self.step > MAX_STEPS:
                raise ValueError(f"step {self.step:g} is too fine for the range [{low:g}, {high:g}]; leave it out")
        return self


def _as_dimension(value: object) -> object:
    if isinstance(value, list):
        return {"choice": value}
    return {"expression": value} if isinstance(value, str) else value


_Dimension = Annotated[
    Dimension,
    BeforeValidator(_as_dimension, json_schema_input_type=list[Any] | str | Dimension),
    Field(title="a list of values, an expression, or one of choice, grid, uniform, log_uniform, integer, log_integer: ..."),
]


class _Rungs(Section):
    """What the rules that compare trials at rungs have in common."""

    unit: Literal["steps", "tokens"] = "steps"
    """What `grace` counts: optimizer steps, or tokens that were trained."""
    grace: PositiveInt | Auto = "auto"
    """How much of its budget a trial has for certain: no trial is stopped before. `auto`: the budget divided by
    `reduction_factor` three times (by 27 without one), at least 1."""


class AshaStopping(_Rungs):
    """ASHA (Li et al. 2020): at each rung the best 1 / reduction_factor go on; nobody waits for anybody."""

    method: Literal["asha"] = "asha"
    """Stop at each rung all but the best 1 / `reduction_factor` of the trials that reached it so far."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One trial in this many goes on at a rung, and each rung is this many times the one before."""


class HyperbandStopping(_Rungs):
    """Hyperband (Li et al. 2018), Ray Tune's: groups of trials with different first rungs, in case early losses mislead."""

    method: Literal["hyperband"]
    """Groups with different first rungs; within a group, trials wait at a rung until all are there, and the best
    1 / `reduction_factor` go on."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One trial in this many goes on at a rung, and each rung is this many times the one before."""


class MedianStopping(_Rungs):
    """Median stopping (Golovin et al. 2017)."""

    method: Literal["median"]
    """Stop a trial whose best value is worse than the median of the others' running averages at the same point."""


class NoStopping(Section):
    """Every trial is trained to its end."""

    method: Literal["none"]
    """Train every trial to its end."""


Stopping = Annotated[AshaStopping | HyperbandStopping | MedianStopping | NoStopping, Field(discriminator="method")]


class SweepSection(Section):
    run: Annotated[Text, Field(examples=["../recipes/quickstart.yaml"])] | None = None
    """Config file that this one is laid over, relative to this file. It is read when this file is; a loaded config holds its
    keys instead of its name."""
    space: Annotated[
        dict[ConfigKey, _Dimension],
        Field(
            min_length=1,
            title="a mapping of config keys to how their values are drawn",
            examples=[{"adapter.rank": {"choice": [4, 8]}}],
        ),
    ]
    """Keys that differ between trials, each with how its values are drawn: `adapter.rank: {choice: [4, 8]}`. A plain list is a
    choice; plain text is an expression over other keys (`adapter.alpha: 2 * adapter.rank`)."""
    first: Annotated[list[dict[ConfigKey, Any]], Field(examples=[[{"adapter.rank": 4}]])] = []
    """Points of the space that are tried first; keys that one leaves out are drawn. They count as trials, unless there is a
    `grid`, which is always complete."""
    trials: PositiveInt = 16
    """How many points are tried; with `grid` keys, how many draws of the other keys are crossed with the grid. A larger number
    keeps the trials that a smaller one had. A space with fewer points is tried in full."""
    search: Literal["random", "optuna"] = "random"
    """Who chooses the points: independent draws, or Optuna's TPE, which looks at the results so far."""
    stopping: Stopping = AshaStopping()
    """Which trials are stopped before their end: `method` is `asha`, `hyperband`, `median` or `none`."""
    metric: Text = "validation/loss"
    """Metric that ranks trials."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger metric is better."""
    seed: NonNegativeInt = 0
    """Seed of the draws. The seed of training is `training.seed`, the same for all trials unless it is in the space."""
    max_concurrent: PositiveInt | Auto = "auto"
    """Trials that run at once. `auto`: as many as the cluster has room for."""

    @model_validator(mode="after")
    def _search_goes_with_the_rest(self) -> "SweepSection":
        if self.search == "optuna" and self.stopping.method == "hyperband":
            raise ValueError("hyperband draws all trials before the first has ended, so optuna would learn nothing; use asha")
        grid = next((key for key, dimension in self.space.items() if dimension.grid is not None), None)
        if self.search == "optuna" and grid is not None:
            raise ValueError(f"a grid is tried in full, but optuna chooses what it tries; make {grid} a choice")
        return self
