"""What must hold for a key of a run config to be read: other keys, and what they are. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from raytune.config.sections.data import FILE_ENDINGS, DataSource, ending_of
from raytune.config.sections.evaluation import SuiteKind, SuiteSection
from raytune.config.sections.model import is_written_as_path
from raytune.config.sections.quantization import KEYS, LEAVES_BASE, contradiction, held_base
from raytune.config.sections.row_sources import asks_in_chats, tokenised_sources, trained_sources
from raytune.config.sections.run import RunConfig
from raytune.config.sections.section import Section
from raytune.config.sections.strategy import DistillationSection
from raytune.config.sections.while_training import WhileTrainingSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What must hold for a key to be read."""

    keys: tuple[str, ...]
    """Keys that decide it."""
    holds: Callable[[RunConfig, Section], bool]
    """Of a config, and the section that the key lies in."""
    otherwise: Callable[[RunConfig], str]
    """Why nothing reads the key, after "but"."""
    remedy: str
    """What else to do besides leaving the key out."""
    is_said: bool = False
    """Nothing is lost without the key, as where another one is documented to win: people lay it over a run for a while, or keep
    what their machines have in an overlay. Said by the plan, not refused."""


def choice(key: str, values: tuple[Any, ...]) -> Need:
    """A key has one of some values."""

    def value_of(config: RunConfig) -> Any:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        return value

    return Need(
        keys=(key,),
        holds=lambda config, section: value_of(config) in values,
        otherwise=lambda config: f"{key} {value_of(config)} does not read it",
        remedy=f"set {key} to {' or '.join(str(value) for value in values)}",
    )


def _may_be_far(source: DataSource) -> bool:
    """Whether rows may lie behind a URL or on a hub: a path that says neither that it is a file nor that it is here may."""
    path = source.path
    if "://" in path:
        return not path.startswith("file://")
    return ending_of(path) not in FILE_ENDINGS and not path.startswith((".", "/", "~", "demo:"))


def is_given(key: str, what: str, *, example: str) -> Need:
    """A key that has no value by default has one."""
    section, name = key.split(".")
    return Need(
        keys=(key,),
        holds=lambda config, _: getattr(getattr(config, section), name, None) is not None,
        otherwise=lambda config: f"{what} without {key}",
        remedy=f"set {key}, for example to {example}",
    )


def not_beside(key: str) -> Need:
    """A key that wins is not there."""
    section, name = key.split(".")
    return Need(
        keys=(key,),
        holds=lambda config, _: getattr(getattr(config, section), name) is None,
        otherwise=lambda config: f"{key} ({getattr(getattr(config, section), name)}) wins over it",
        remedy=f"leave out {key}",
        is_said=True,
    )


def instead_of(key: str) -> Need:
    """A key that says the same in another unit is not there."""
    value_of = attrgetter(key)
    return Need(
        keys=(key,),
        holds=lambda config, _: value_of(config) is None,
        otherwise=lambda config: f"{key} ({value_of(config):g}) says so in epochs",
        remedy=f"leave out {key}",
    )


def guard(*policies: str) -> Need:
    """The guard against divergence has one of some policies."""

    def policy_of(config: RunConfig) -> str | None:
        return config.training.divergence and config.training.divergence.policy

    return Need(
        keys=("training.divergence.policy",),
        holds=lambda config, _: policy_of(config) in policies,
        otherwise=lambda config: f"training.divergence.policy {policy_of(config)} does not read it",
        remedy=f"set training.divergence.policy to {' or '.join(policies)}",
    )


def suite(*kinds: SuiteKind) -> Need:
    """The suite is of one of some kinds."""
    return Need(
        keys=("evaluation.suites.kind",),
        holds=lambda _, section: isinstance(section, SuiteSection) and section.kind in kinds,
        otherwise=lambda config: f"only suites of kind {' or '.join(kinds)} read it",
        remedy=f"set kind to {' or '.join(kinds)}",
    )


SUITE_EXAMPLES = Need(
    keys=("evaluation.suites.examples",),
    holds=lambda _, section: isinstance(section, SuiteSection) and bool(section.examples),
    otherwise=lambda config: "the suite has no examples",
    remedy="name their rows as examples",
)
SUITE_DRAWS = Need(
    keys=("evaluation.suites.temperature",),
    holds=lambda _, section: isinstance(section, SuiteSection) and section.temperature is not None,
    otherwise=lambda config: "nothing is drawn without a temperature: each token is the likeliest one",
    remedy="set temperature, for example to 1.0",
)
SUITE_NO_BEAMS = Need(
    keys=("evaluation.suites.num_beams",),
    holds=lambda _, section: isinstance(section, SuiteSection) and section.num_beams == 1,
    otherwise=lambda config: "a search for the likeliest answer (num_beams) draws nothing",
    remedy="set num_beams to 1",
)
SUITE_BERTSCORE = Need(
    keys=("evaluation.suites.metrics",),
    holds=lambda _, section: isinstance(section, SuiteSection) and "bertscore" in section.named_metrics,
    otherwise=lambda config: "bertscore is not among the suite's metrics",
    remedy="add it to metrics",
)


def average(kind: str) -> Need:
    """The average of weights is of a kind."""

    def kind_of(config: RunConfig) -> str | None:
        return config.training.averaging and config.training.averaging.kind

    return Need(
        keys=("training.averaging.kind",),
        holds=lambda config, _: kind_of(config) == kind,
        otherwise=lambda config: f"training.averaging.kind {kind_of(config)} does not read it",
        remedy=f"set training.averaging.kind to {kind}",
    )


HELD_OUT = Need(
    keys=("data.validation_fraction", "data.fold", "data.test_fraction"),
    holds=lambda config, _: config.data.holds_out or bool(config.data.test_fraction),
    otherwise=lambda config: "no training row is held out",
    remedy="give data.validation_fraction, data.fold or data.test_fraction",
)
VALIDATION = Need(
    keys=("data.validation", "data.validation_fraction", "data.fold"),
    holds=lambda config, _: bool(config.data.validation) or config.data.holds_out,
    otherwise=lambda config: "nothing is evaluated: there is neither data.validation nor data.validation_fraction",
    remedy="give one of the two",
)
VALIDATION_OR_SUITES = Need(
    keys=(*VALIDATION.keys, "evaluation.while_training"),
    holds=lambda config, section: VALIDATION.holds(config, section) or config.evaluation.while_training is not None,
    otherwise=lambda config: (
        "nothing is evaluated while training goes on: there is neither data.validation nor data.validation_fraction nor "
        "evaluation.while_training"
    ),
    remedy="give one of them",
)
NO_TRIALS_MEASURED = Need(
    keys=("sweep",),
    holds=lambda config, _: config.sweep is None,
    otherwise=lambda config: "trials of a sweep measure between steps, so that each of them is compared by what it has come to",
    remedy="train one run (sweep=null)",
)
BESIDE_WORKERS = Need(
    keys=("evaluation.while_training.where",),
    holds=lambda _, section: isinstance(section, WhileTrainingSection) and section.where != "between_steps",
    otherwise=lambda config: "nothing is measured beside the workers: evaluation.while_training.where is between_steps",
    remedy="set that to auto or spare",
)
ONE_RUN = Need(
    keys=(),
    holds=lambda config, _: config.sweep is None,
    otherwise=lambda config: "trials of a sweep are always continued",
    remedy="train one run (sweep=null)",
)
NO_SWEEP = Need(
    keys=("sweep",),
    holds=lambda config, _: config.sweep is None,
    otherwise=lambda config: "what is told is about one run, and a sweep has many at once",
    remedy="train one run (sweep=null)",
)
TRACKED = Need(
    keys=("tracking",),
    holds=lambda config, _: config.tracking.tells_anybody,
    otherwise=lambda config: "no tracker is named",
    remedy="name one, for example tracking.tensorboard={}",
)
KEEPS_RUNS = Need(
    keys=("tracking",),
    holds=lambda config, _: bool(config.tracking.chosen),
    otherwise=lambda config: "no tracker is named that keeps runs",
    remedy="name one, for example tracking.tensorboard={}",
)
KEEPS_MODELS = Need(
    keys=("tracking.mlflow", "tracking.wandb"),
    holds=lambda config, _: bool(config.tracking.mlflow or config.tracking.wandb),
    otherwise=lambda config: "only MLflow and W&B keep models",
    remedy="name one of them, for example tracking.mlflow={}",
)
NVME = Need(
    keys=("training.zero.offload_optimizer", "training.zero.offload_parameters"),
    holds=lambda config, _: "nvme" in (config.training.zero.offload_optimizer, config.training.zero.offload_parameters),
    otherwise=lambda config: "nothing is offloaded to nvme",
    remedy="set training.zero.offload_optimizer to nvme",
    is_said=True,
)


def agrees(name: str) -> Need:
    """A preset says nothing else of the base."""

    def said_by_preset(config: RunConfig) -> str:
        field, sentence = contradiction(config.model, config.adapter) or ("", "")
        return sentence if field == name else ""

    return Need(
        keys=("adapter.method", f"adapter.{KEYS[name][1]}"),
        holds=lambda config, _: not said_by_preset(config),
        otherwise=said_by_preset,
        remedy=LEAVES_BASE,
    )


def _held_in_four_bits(config: RunConfig, _: Section) -> bool:
    if contradiction(config.model, config.adapter):
        return True  # it is said of the key that contradicts
    quantization = held_base(config.model, config.adapter).quantization
    return quantization is not None and quantization.is_4_bit


def _does_not_read(config: RunConfig) -> str:
    held = held_base(config.model, config.adapter)
    return f"{held.key('format')} {held.quantization.format if held.quantization else config.model.quantization} does not read it"


def four_bits(section: str) -> Need:
    """The base is held in 4 bits."""
    return Need(
        keys=("model.quantization", "adapter.quantization", "adapter.method"),
        holds=_held_in_four_bits,
        otherwise=_does_not_read,
        remedy=f"set {section}.quantization to nf4 or fp4",
    )


HUB_MODEL = Need(
    keys=("model.base",),
    holds=lambda config, _: config.model.base != "demo" and not is_written_as_path(config.model.base),
    otherwise=lambda config: f"model.base {config.model.base} is no model of the hub, and has no revisions",
    remedy="name a hub id as model.base",
    is_said=True,
)
HUB_TEACHER = Need(
    keys=("strategy.distillation.teacher",),
    holds=lambda _, section: (
        isinstance(section, DistillationSection)
        and section.teacher not in ("base", "demo")
        and not is_written_as_path(section.teacher)
    ),
    otherwise=lambda config: "this teacher is no model of the hub, and has no revisions",
    remedy="name a hub id as strategy.distillation.teacher",
)
TEACHER_BESIDE = Need(
    keys=("strategy.distillation.teacher",),
    holds=lambda _, section: isinstance(section, DistillationSection) and section.teacher != "base",
    otherwise=lambda config: "the teacher is the base, for which model.trust_remote_code says it",
    remedy="name a model as strategy.distillation.teacher",
)
MANY_SPLITS = Need(
    keys=("data.train", "data.validation", "data.test", "strategy.replay.data", "strategy.ewc.data", "evaluation"),
    holds=lambda config, section: isinstance(section, DataSource) and _has_splits(section.path),
    otherwise=lambda config: "this path is a file or a pattern, which has no splits",
    remedy="name a hub data set or a folder as path",
)
CHAT = Need(
    keys=("data.train", "data.validation", "data.test", "strategy.replay", "strategy.ewc.data", "evaluation"),
    holds=lambda config, _: asks_in_chats(config) or any(source.format != "text" for source in tokenised_sources(config)),
    otherwise=lambda config: "all rows are plain text (format: text), which no template is laid around",
    remedy="give the rows another format",
)


SEVERAL_SOURCES = Need(
    keys=("data.train", "strategy.replay"),
    holds=lambda config, _: len(trained_sources(config)) > 1,
    otherwise=lambda config: "there is one source of training rows, and sources count against each other",
    remedy="name another one in data.train",
)
LOOKED_FOR_NEAR = Need(
    keys=("data.quality.near_duplicates", "data.quality.leaks"),
    holds=lambda config, _: (
        config.data.quality is not None and not config.data.quality.near_duplicates == config.data.quality.leaks == "ignore"
    ),
    otherwise=lambda config: "data.quality looks neither for near duplicates nor for leaks",
    remedy="set data.quality.near_duplicates to keep, drop or error",
)
BENCHMARKS = Need(
    keys=("data.quality.benchmarks",),
    holds=lambda config, _: config.data.quality is not None and bool(config.data.quality.benchmarks),
    otherwise=lambda config: "data.quality.benchmarks names no rows",
    remedy="name some",
)
FAR_ROWS = Need(
    keys=("data.train",),
    holds=lambda config, _: any(map(_may_be_far, config.data.train)),
    otherwise=lambda config: "all of data.train lies in mounted files, which are read as they are",
    remedy="name rows behind a URL, or of a hub",
)
TO_BE_MIXED = Need(
    keys=("data.train",),
    holds=lambda config, _: len(config.data.train) > 1,
    otherwise=lambda config: "data.train has one source, and nothing to mix it with",
    remedy="name another one",
)
NO_PASSES = Need(
    keys=("data.train",),
    holds=lambda config, _: all(source.passes is None for source in config.data.train),
    otherwise=lambda config: "a source of data.train has passes, which say how they are mixed",
    remedy="leave out the passes",
)
REPEATS = Need(
    keys=("data.mixing.until",),
    holds=lambda config, _: config.data.mixing.until == "all_exhausted",
    otherwise=lambda config: "data.mixing.until is first_exhausted, with which an epoch passes over no source more than once",
    remedy="leave out data.mixing.until",
)
NO_PROPORTIONS = Need(
    keys=("data.train",),
    holds=lambda config, _: all(source.proportion is None for source in config.data.train),
    otherwise=lambda config: "each source of data.train has a proportion, which says how they are mixed",
    remedy="leave out the proportions",
)
MIXED = Need(
    keys=("data.train", "data.mixing.temperature"),
    holds=lambda config, _: (
        config.data.mixing.temperature is not None or any(source.proportion is not None for source in config.data.train)
    ),
    otherwise=lambda config: "there are neither proportions nor data.mixing.temperature, which ask for a mixture",
    remedy="give each source of data.train a proportion",
)


def is_ranked_by(name: str) -> Need:
    """What ranks trials ranks their checkpoints."""
    return Need(
        keys=("sweep",),
        holds=lambda config, _: config.sweep is None or getattr(config.checkpoint, name) == getattr(config.sweep, name),
        otherwise=lambda config: f"trials and their checkpoints are ranked by sweep.{name}, {getattr(config.sweep, name)}",
        remedy=f"set sweep.{name} to it",
    )


def _has_splits(path: str) -> bool:
    """Whether a path may be a hub data set or a folder, as far as its name tells."""
    return not set("*?") & set(path) and not path.startswith("demo:") and ending_of(path) not in FILE_ENDINGS


ADAMW = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon", "schedule_free_adamw")
