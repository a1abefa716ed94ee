"""`strategy`: which of the parameters that a method trains stay as they are, how fast each of the others learns, and what holds
them near the base; and what is minimised."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from raytune.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, Section, Text
from raytune.config.user_code import CodeName

Pattern = Annotated[Text, Field(examples=["self_attn"])]
"""A regular expression for the whole name of a module, or for its last parts; or a word for a group of modules."""


class FreezeSection(Section):
    """What stays as it is. What is frozen has no gradient and no optimizer state, and is in no checkpoint."""

    embeddings: bool = False
    """Freeze the embeddings, and with them an output head that is tied to them."""
    first_layers: NonNegativeInt = 0
    """Freeze this many layers, from the first one; with `lora` and the like: updates in the layers above only. Embeddings are
    frozen by a key of their own, and as long as they are trained, backward passes run through all layers."""
    modules: Annotated[list[Pattern], Field(examples=[["mlp"]])] = []
    """Freeze modules whose name, or that of a module that holds them, matches: a regular expression for a whole name or its last
    parts (`mlp`, `layers\\.[0-3]\\..*_proj`), or one of the words `head`, `embeddings` and `norms`."""
    train_only: Annotated[list[Pattern], Field(examples=[["head", "norms"]])] = []
    """Freeze all but what matches, named as in `modules`: `[head, norms]` extracts features with the base and trains what reads
    them."""


class PhaseSection(Section):
    """A part of the run, from where it begins to where the next one does; the first begins with the run."""

    from_epoch: Annotated[NonNegativeFloat | None, Field(examples=[1.0])] = None
    """The phase begins with the first step all of whose rows come after this many epochs (`0.5`: half of the rows)."""
    from_step: Annotated[NonNegativeInt | None, Field(examples=[200])] = None
    """The phase begins after this many steps."""
    from_fraction: Annotated[float, Field(ge=0, lt=1, examples=[0.5])] | None = None
    """The phase begins after this share of all steps, rounded up."""
    last_layers: NonNegativeInt | Literal["all"]
    """How many layers are trained, counted from the last one, with the output head and the norm before it; 0: these two alone.
    `all`: embeddings too, and all that `strategy.freeze` leaves. A head that is tied to the embeddings is trained with them."""
    learning_rate: Annotated[PositiveFloat | None, Field(examples=[2e-5])] = None
    """Peak rate in this phase, in place of `training.learning_rate`; the schedule shapes it as it shapes that one."""
    warmup_steps: NonNegativeInt = 0
    """Steps at the beginning of the phase over which the rate rises from 0; the first phase has the run's own warm-up."""


class L2SPSection(Section):
    """L2-SP (Li et al. 2018): the loss has a penalty on the squared way of all trained weights from those of the base."""

    strength: NonNegativeFloat
    """Half of this is added per squared unit of a weight's way: strength / 2 * sum (w - w0)^2. 0: no penalty."""


class ObjectiveSection(Section):
    """A loss of your own in place of cross-entropy."""

    function: CodeName
    """`module:function` or `file.py:function`; a module is looked for beside this file, in the working directory and among those
    that are installed. The function is given the logits of some targets (targets x vocabulary, fp32) and their token ids, and
    returns the loss of each target, which autograd can follow. A class is a `TokenLoss` (`raytune explain user_code`)."""
    options: Annotated[dict[str, Any], Field(examples=[{"gamma": 2.0}])] = {}
    """Further arguments of the function, by name."""


def _as_objective(value: object) -> object:
    if value == CROSS_ENTROPY:
        return None
    return {"function": value} if isinstance(value, str) else value


CROSS_ENTROPY = "cross_entropy"
Objective = Annotated[
    ObjectiveSection | None,
    BeforeValidator(_as_objective, json_schema_input_type=str | ObjectiveSection | None),
    Field(
        title=f"{CROSS_ENTROPY}, a function as module:function or file.py:function, or a section (function, options)",
        examples=[{"function": "my_losses.py:focal", "options": {"gamma": 2.0}}],
    ),
]

UNFREEZE_EXAMPLE = [{"last_layers": 1}, {"from_epoch": 1, "last_layers": "all"}]


class StrategySection(Section):
    freeze: FreezeSection = FreezeSection()
    """What stays as it is of the parameters that the method would train."""
    unfreeze: Annotated[list[PhaseSection], Field(examples=[UNFREEZE_EXAMPLE])] = []
    """Phases of a run that trains the last layers first, and more of the model in each phase (with `full`). Gradients, optimizer
    state and checkpoints are of what a phase trains; the optimizer state of what is trained already is kept."""
    layer_rate_decay: Annotated[float, Field(gt=0, le=1, examples=[0.9])] = 1.0
    """Each layer learns at this share of the rate of the layer above it: the output head and the norm before it at the full rate,
    the last layer at this share of it, and the embeddings, below the first layer, slowest. 1: all at one rate."""
    rate_scales: Annotated[dict[Pattern, PositiveFloat], Field(examples=[{"embeddings": 0.1}])] = {}
    """Factors of the learning rate of modules whose name matches, named as in `freeze.modules`. Where several match, and with
    `layer_rate_decay` and LoRA+, all factors are multiplied."""
    weight_decay_of: Annotated[dict[Pattern, NonNegativeFloat], Field(examples=[{"head": 0.0}])] = {}
    """Weight decay, in place of `training.weight_decay`, of modules whose name matches, named as in `freeze.modules`; the first
    match counts. Biases and magnitudes (DoRA) have none, and norms only where a name is their own or the word `norms`."""
    objective: Objective = None
    """What is minimised: `cross_entropy`, or a loss of your own. Rows that are held out are measured by `cross_entropy` in any
    case, so that their loss stays comparable; `train/loss` is of the objective."""
    l2_sp: Annotated[L2SPSection | None, Field(examples=[{"strength": 0.01}])] = None
    """Hold trained weights near those of the base, so that less of what it can do is forgotten (with `full`). `train/loss` is
    without the penalty, which is `train/penalty`."""
