"""`strategy`: which of the parameters that a method trains stay as they are, how fast each of the others learns, what holds them
near the base, which earlier rows are trained again, whom the model learns from beside its rows; and what is minimised."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from raytune.config.sections.data import Sources
from raytune.config.sections.model import check_code_is_pinned
from raytune.config.sections.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Text
from raytune.config.sections.user_code import CodeName

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


class EWCSection(Section):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): as L2-SP, but the way of each weight counts by how much rows that
    the base knows depend on it."""

    strength: NonNegativeFloat
    """Half of this is added per squared unit of a weight's way, times its importance: strength / 2 * sum F (w - w0)^2. 0: no
    penalty, and nothing is estimated."""
    data: Sources
    """Rows that the base knows and is not to forget: one source or a list, read and tokenised as those of `data.train` are.
    Importance is estimated from them before the first step, and kept in the run folder."""
    max_documents: PositiveInt = 500
    """Documents that importance is estimated from, drawn by `training.seed` where the rows have more. Each takes a forward and a
    backward pass of its own; they are divided among the workers."""

    @model_validator(mode="after")
    def _has_rows(self) -> "EWCSection":
        if not self.data:
            raise ValueError("strategy.ewc.data needs at least one source")
        return self


class ReplaySection(Section):
    """Rows of earlier tasks, or of general data, among those of the new one, so that less of what they taught is forgotten."""

    data: Sources
    """The rows that are seen again: one source or a list, as in `data.train`."""
    share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Their share of all targets of an epoch: 0.1 is one replayed target in ten. They are a part of these rows, the same in each
    epoch, or these rows several times where they are few. 0: none."""


class DistillationSection(Section):
    """Knowledge distillation (Hinton et al. 2015): at each target a part of the loss is how far the model is from a teacher, and
    not only from the text. The loss is (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || model)."""

    teacher: Text = "base"
    """`base`: the base as it was, so that less of what it can do is forgotten; beneath an adapter that is no second copy. Or a
    better model with the same tokens: a local folder, or a Hugging Face hub id."""
    revision: Text | None = None
    """Branch, tag or commit of a teacher of the hub, as `model.revision`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the teacher, as `model.trust_remote_code`."""
    weight: Annotated[Fraction, Field(examples=[0.5])] = 0.5
    """Share of the teacher in the loss, from 0 (none: then it is not loaded) to 1 (the teacher alone)."""
    temperature: PositiveFloat = 2.0
    """What the logits of both are divided by before they are compared: above 1, unlikely tokens count for more."""
    top_k: Annotated[PositiveInt | None, Field(examples=[64])] = None
    """Compare only the tokens that the teacher finds likeliest at a target, as many as this: the probabilities of each model are
    made to sum to 1 among them. None: all tokens."""

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> "DistillationSection":
        if self.trust_remote_code and self.teacher != "base":
            check_code_is_pinned("strategy.distillation", self.teacher, self.revision)
        return self


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
    ewc: Annotated[EWCSection | None, Field(examples=[{"strength": 100.0, "data": "general.jsonl"}])] = None
    """Hold trained weights near those of the base by how much other rows depend on each (with `full`); beside `l2_sp`, both
    count. `train/penalty` has the sum."""
    replay: ReplaySection | None = None
    """Mix rows of earlier tasks, or of general data, into the training rows."""
    distillation: Annotated[DistillationSection | None, Field(examples=[{"teacher": "base", "weight": 0.5}])] = None
    """Learn from a teacher beside the rows: from the base itself, or from a better model. `train/loss` is all that is minimised;
    `validation/loss` stays cross-entropy."""
