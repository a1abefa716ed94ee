"""What is wrong with a run, as far as it can be found without its cluster: everything at once; nothing is started, nothing left.

Opens the tokenizer and reads the first rows of each source. Names and numbers alone are checked while a config is loaded
(`check --fast`).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from raytune.config.sections.augment import AugmentSection
from raytune.config.sections.data import DataSource, QualitySection, TokenWeightsSection, TrainSource
from raytune.config.sections.data_limits import waived
from raytune.config.sections.evaluation import suites_of
from raytune.config.sections.model import ModelSection
from raytune.config.sections.row_sources import row_sources
from raytune.config.sections.run import RunConfig
from raytune.config.sections.split import SplitSection
from raytune.config.sections.training import SCHEDULE_FREE
from raytune.data.files.source_files import DEMO_ROWS, find_files
from raytune.data.files.sources import scan
from raytune.data.rows.source_rows import readings_of
from raytune.errors import ModelError, RaytuneError, UserError
from raytune.hub.cache import default_hub_cache
from raytune.launch.cluster.address import named_address
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.base_here import check_base_early
from raytune.launch.data.doubtful_files import doubtful_files
from raytune.launch.data.prepare import Base, refuse_unknown_tokens, teacher_of, tried_objective
from raytune.launch.data.stores import DataBuilder
from raytune.launch.state.begun import begun_for
from raytune.launch.state.callbacks import load_callbacks
from raytune.launch.state.gauges import refuse_unseen
from raytune.launch.state.record import refuse_changed_settings
from raytune.missing import OPTIONAL, install_command
from raytune.model.files.base_check import check_base
from raytune.model.files.files import local_files, resolve_model_path
from raytune.object_store import once
from raytune.plan.choosing.choose import choose_plan
from raytune.plan.choosing.requirements import choose_row_length, most_tokens
from raytune.plan.choosing.setting import look_at, settle
from raytune.plan.costs.hardware import load_catalogue
from raytune.plan.data.data_limits import refuse_exceeded, verdicts_of
from raytune.plan.data.data_report import losses_text
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.facts.machine import Machine
from raytune.plan.model.base_model import find_config
from raytune.plan.model.shapes import ModelShape
from raytune.plan.strategies.distillation import planned_teacher, teacher_section
from raytune.plan.strategies.new_tokens import planned_base
from raytune.plan.strategies.objective import objective_of
from raytune.run_folder import RunFolder
from raytune.storage import absolute, exists, is_local, local_path, refuse_unusable
from raytune.tracking.trackers import away, refuse_unready
from raytune.units import format_seconds

SAMPLE_ROWS = 2000
"""Rows of each source that are read and tokenised at most."""

_TOKENISED = ("data.train", "data.validation", "data.test", "strategy.replay.data", "strategy.ewc.data")
"""Keys of rows that a run tokenises."""

_NONE_HELD_OUT: Mapping[str, Any] = {
    **{"validation": [], "test": [], "fold": None},
    **{"validation_fraction": 0.0, "test_fraction": 0.0},
}
"""Keys of `data` for rows that are looked at as if all of them were trained. Columns that decide sides are needed."""

Result = TypeVar("Result")


@dataclass(slots=True)
class Findings:
    """What was found so far."""

    errors: list[UserError] = field(default_factory=list)
    """Each once."""
    looked_at: list[str] = field(default_factory=list)
    not_looked_at: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    """What of the rows is not trained as it is written; nothing that stops a run."""
    another_run: str = ""
    """Why the run of that name that is there would not be continued."""
    seconds: float = 0.0

    def of(self, look: Callable[[], Result], *, keys: tuple[str, ...] = ()) -> Result | None:
        """What a look gives; None if it ends with an error of the user's, which is kept.

        Args:
            keys: that such an error is about, if it does not carry them.
        """
        try:
            return look()
        except UserError as error:
            error.keys = error.keys or keys
            if str(error) not in {str(known) for known in self.errors}:
                self.errors.append(error)
        except RaytuneError as error:  # a disk or a bucket that does not answer is not the config's fault
            self.not_looked_at.append(str(error))
        return None

    def to_json(self) -> dict[str, Any]:
        """Of a run without errors."""
        return {name: value for name, value in asdict(self).items() if name != "errors"}

    def __str__(self) -> str:
        """What was looked at, and in how long; what was not; what becomes of rows."""
        lines = [f"Looked at {', '.join(self.looked_at)}, in {format_seconds(self.seconds)}."]
        lines += [f"Not looked at: {'; '.join(self.not_looked_at)}."] if self.not_looked_at else []
        lines += [f"`train` would refuse the name. {self.another_run}"] if self.another_run else []
        return "\n".join([*lines, *(["Of these rows:"] if self.losses else []), *(f"  {line}" for line in self.losses)])


def check_run(config: RunConfig) -> Findings:
    """Look at everything that a run names: storage, packages, machines, model, adapter, tokenizer, template and rows."""
    began, found = time.monotonic(), Findings()
    is_elsewhere = config.cluster.address is not None  # files may then lie where the cluster is
    if not is_elsewhere:
        found.of(lambda: refuse_unusable(absolute(config.storage)), keys=("storage",))
        if config.data.store:
            found.of(lambda: refuse_unusable(config.data.store or ""), keys=("data.store",))
    found.of(lambda: _look_at_run_of_that_name(config, found), keys=("storage",))
    found.of(lambda: _refuse_missing_packages(config))
    found.of(lambda: load_callbacks(config.callbacks))
    found.of(lambda: refuse_unready(config.tracking, absolute(config.storage)))
    found.of(lambda: refuse_unseen(config))
    found.not_looked_at += [why] if (why := away(config.tracking)) else []
    address = named_address(config.cluster)
    machine = None if address and not config.cluster.instance else found.of(lambda: _machine(config))
    found.not_looked_at += [f"the machines of {address}"] if address else []
    if is_elsewhere and not _has_config(config.model):
        found.not_looked_at.append(f"model {config.model.base} (not on this machine)")
        shape = None
    else:
        shape = found.of(lambda: _shape(config), keys=("model.base",))
    teacher = None
    if shape is not None:
        teacher = found.of(lambda: _teacher(config, found))
        look_at(config, shape, machine, found.of, teacher=teacher)
        found.of(lambda: tried_objective(objective_of(config), shape.vocab), keys=("strategy.objective",))
        found.looked_at.append(f"model {config.model.base} ({shape.model_type})")
    here = {key: _first_rows(source) for key, source in _sources(config) if _is_here(source, is_elsewhere)}
    found.not_looked_at += [f"{source.path} (not on this machine)" for key, source in _sources(config) if key not in here]
    model_path = shape and found.of(lambda: _path_of_base(config), keys=("model.base",))
    if shape is None or model_path is None:
        _look_at_formats(here, found)
    else:
        _look_at_rows(_Reading(config, shape, model_path, teacher), here, machine, found)
    found.seconds = time.monotonic() - began
    return found


def _look_at_run_of_that_name(config: RunConfig, found: Findings) -> None:
    folder = RunFolder(absolute(config.storage), config.name)
    with once():
        is_there = exists(folder.plan)
    try:
        if is_there:
            refuse_changed_settings(folder, config)
            begun_for(config, folder)
    except UserError as error:  # it is the name that is taken; everything else may be right
        if not error.keys:
            raise
        found.another_run = str(error)


def _refuse_missing_packages(config: RunConfig) -> None:
    if config.training.optimizer in SCHEDULE_FREE and find_spec("schedulefree") is None:
        raise UserError(
            f"training.optimizer {config.training.optimizer} needs the package schedulefree, which the Python of this process "
            f"does not have. Install it on every node: {install_command(OPTIONAL['schedulefree'])}",
            keys=("training.optimizer",),
        )
    if config.training.liger is True and find_spec("liger_kernel") is None:
        raise UserError(
            f"training.liger needs the package liger-kernel, which the Python of this process does not have. Install it on every "
            f"node: {install_command(OPTIONAL['liger_kernel'])}",
            keys=("training.liger",),
        )


def _machine(config: RunConfig) -> Machine:
    section = config.cluster
    if section.instance is None:
        return this_machine(section)
    catalogue = load_catalogue()
    instance = catalogue.instance(section.instance)
    return Machine.rented(instance, catalogue.gpu_of(instance), section.nodes)


def _shape(config: RunConfig) -> ModelShape:
    if config.cluster.instance:  # a plan for machines that are yet to be rented needs no model here, and a check of it neither
        return planned_base(config.model)
    return Base.of(config.model).shape


def _teacher(config: RunConfig, found: Findings) -> ModelShape | None:
    """Shape of a model beside the one in training; None if there is none, or none here."""
    section = teacher_section(config)
    if section is None:
        return None
    if config.cluster.instance:
        return planned_teacher(config)
    if config.cluster.address is not None and not _has_config(section):
        found.not_looked_at.append(f"teacher {section.base} (not on this machine)")
        return None
    teacher = teacher_of(config, Base.of(config.model))
    assert teacher is not None
    check_base(teacher.path, teacher.section.revision, teacher.section.trust_remote_code)
    found.looked_at.append(f"teacher {section.base} ({teacher.shape.model_type})")
    return teacher.shape


def _path_of_base(config: RunConfig) -> str | None:
    """Where the base's files are; None if they are yet to be downloaded."""
    model = config.model
    path = resolve_model_path(model.base, model.revision)
    check_base_early(model, path)
    return path if local_files(path, model.revision) else None


def _look_at_formats(here: Mapping[str, DataSource], found: Findings) -> None:
    """Whether sources have rows of a known format: all that can be told without a tokenizer."""
    found.not_looked_at.append("tokenizer and tokens, since the files of the model are not here")
    for key, source in here.items():
        scanned = found.of(
            lambda source=source: [scan(file, source.max_rows) for file in find_files(source, Path())], keys=(key,)
        )
        if scanned and found.of(lambda source=source, scanned=scanned: readings_of([source], [scanned]), keys=(key,)):
            found.looked_at.append(f"the first row of {source.path}")


@dataclass(frozen=True, slots=True)
class _Reading:
    """What rows are read with."""

    config: RunConfig
    shape: ModelShape
    model_path: str
    teacher: ModelShape | None

    def builder(
        self,
        scratch: str,
        replayed: Sequence[DataSource] = (),
        weighed: Sequence[DataSource] = (),
        **data: Any,
    ) -> DataBuilder:
        """As of the run, with other sources, and a folder of its own for what is tokenised."""
        replay, ewc = self.config.strategy.replay, self.config.strategy.ewc
        strategy = {
            "replay": replay.model_copy(update={"data": replayed}) if replay and replayed else None,
            "ewc": ewc.model_copy(update={"data": weighed}) if ewc and weighed else None,
        }
        sections = {
            "data": self.config.data.model_copy(update={**data, "store": scratch}),
            "strategy": self.config.strategy.model_copy(update=strategy),
        }
        run = self.config.model_copy(update=sections)
        return DataBuilder(run, self.model_path, self.row_length, scratch, map, num_embeddings=self.shape.vocab)

    @property
    def is_elsewhere(self) -> bool:
        return self.config.cluster.address is not None

    @property
    def row_length(self) -> int:
        """Of the run; the model's limit where it asks for more than that."""
        wanted, most = self.config.data.max_length, max(1, most_tokens(self.config, self.shape))
        return choose_row_length(self.config, self.shape) if wanted == "auto" else min(wanted, most)

    def open(self) -> DataBuilder:
        """The run's own tokenizer, template and folders."""
        storage = absolute(self.config.storage)
        return DataBuilder(self.config, self.model_path, self.row_length, storage, map, num_embeddings=self.shape.vocab)


def _look_at_rows(reading: _Reading, here: Mapping[str, DataSource], machine: Machine | None, found: Findings) -> None:
    """Open the tokenizer and the template, tokenise the first rows of each source, and plan where these say enough."""
    if found.of(reading.open) is None:
        return
    found.of(lambda: refuse_unknown_tokens(reading.config, reading.model_path))
    found.looked_at.append("its tokenizer and template")
    facts, asked = {}, dict(_sources(reading.config))
    with TemporaryDirectory() as scratch:
        quality = _quality_here(reading)
        for key, source in here.items():
            facts[key] = found.of(partial(_alone_in, reading, scratch, key, source, quality), keys=(key,))
            found.of(partial(_judge, reading, key, asked[key], facts[key], found))
        for report in (one.report for one in facts.values() if one and one.report):
            found.looked_at.append(f"{report.train.total('rows')} rows of {report.train.sources[0].name}")
            found.losses += [line for line in losses_text(report) if line not in found.losses]
        of = {what: [one for key, one in here.items() if key.startswith(what)] for what in _TOKENISED}
        found.losses += found.of(lambda: doubtful_files(of["data.train"], of["data.validation"], of["data.test"])) or []
        for key, suite in suites_of(reading.config.evaluation).items():
            if all(_is_here(source, reading.is_elsewhere) for source in (*suite.rows, *suite.examples)):
                few = suite.model_copy(update={"max_rows": min(suite.max_rows, SAMPLE_ROWS)})
                found.of(partial(reading.builder(scratch).questions_of, few, key), keys=(f"{key}.rows",))
        if machine is not None and not found.errors and _say_enough(reading.config, facts):
            found.of(lambda: _plan(reading, here, machine, scratch, are_whole=_are_whole(reading.config, facts)))
            found.looked_at.append("the plan")


def _quality_here(reading: _Reading) -> QualitySection | None:
    """What is looked for among the first training rows, in benchmarks that are here."""
    if (quality := reading.config.data.quality) is None:
        return None
    return quality.model_copy(
        update={"benchmarks": [source for source in quality.benchmarks if _is_here(source, reading.is_elsewhere)]}
    )


def _alone_in(reading: _Reading, scratch: str, key: str, source: DataSource, quality: QualitySection | None) -> DataFacts:
    """The first rows of a source, whatever limits say of them: they may be others than most.

    Args:
        quality: what is looked for among training rows.
    """
    rows = {"train": [_alone(source)], **_NONE_HELD_OUT, "limits": waived()}
    looked_for = quality if key.startswith("data.train") else None
    return reading.builder(scratch, **rows, **_not_read_of(key), quality=looked_for).build()


def _judge(reading: _Reading, key: str, source: DataSource, facts: DataFacts | None, found: Findings) -> None:
    """Hold all rows of a source, as it is written, against the limits; of the first ones alone, say what would exceed one.

    Raises:
        DataError: if a run would be refused.
    """
    if facts is None or facts.report is None:
        return
    judged = verdicts_of({key.rpartition(".")[0]: facts.report.train}, reading.config.data)
    if _is_whole(source, facts):
        refuse_exceeded(judged)
    exceeded = (verdict.text.splitlines()[0] for verdict in judged if verdict.is_exceeded)
    found.losses += [f"a run stops if all rows are as these: {line.removesuffix(':')}" for line in exceeded]


def _not_read_of(key: str) -> dict[str, Any]:
    """What rows that are looked at as if they were trained do not have of the config, where they are none of those."""
    untrained = {"token_weights": TokenWeightsSection(), "augment": AugmentSection(), "streaming": None}
    of_training = {} if key.startswith("data.train") else untrained
    return of_training if key.startswith(("data.train", "strategy.replay")) else of_training | {"split": SplitSection()}


def _plan(reading: _Reading, here: Mapping[str, DataSource], machine: Machine, scratch: str, *, are_whole: bool) -> None:
    """Plan the run on the rows that were read."""
    train, validation, test, replayed, weighed = (
        [source for key, source in here.items() if key.startswith(f"{rows}.")] for rows in _TOKENISED
    )
    rows: dict[str, Any] = {"train": train, "validation": validation, "test": test, "quality": _quality_here(reading)}
    rows["limits"] = waived()  # which were judged, source by source
    if not are_whole:  # the first rows of a file may have one time, or one label
        rows["split"] = SplitSection()
    facts = reading.builder(scratch, replayed=replayed, weighed=weighed, **rows).build()
    setting = settle(reading.config, reading.shape, machine, teacher=reading.teacher)
    choose_plan(setting, facts, model_path=reading.model_path, storage=scratch)


def _say_enough(config: RunConfig, facts: Mapping[str, DataFacts | None]) -> bool:
    """Whether the first rows decide the plan: where they are all of them, or the number of steps is given."""
    are_there = facts.keys() == dict(_sources(config)).keys()
    return are_there and (config.training.max_steps is not None or _are_whole(config, facts))


def _are_whole(config: RunConfig, facts: Mapping[str, DataFacts | None]) -> bool:
    return all(_is_whole(source, facts.get(key)) for key, source in _sources(config))


def _sources(config: RunConfig) -> Iterator[tuple[str, DataSource]]:
    """Sources of rows that are trained, evaluated or weighed by, by their key."""
    rows = row_sources(config)
    return ((f"{key}.{position}", source) for key in _TOKENISED for position, source in enumerate(rows[key]))


def _is_here(source: DataSource, is_elsewhere: bool) -> bool:
    """Whether a source is to be read here, which needs no network.

    Args:
        is_elsewhere: whether its files may lie with the cluster, so that a missing one is no mistake.
    """
    if source.path.startswith("demo:"):
        return True
    if not is_local(source.path):
        return False
    try:
        (file, *_) = find_files(source, Path())
    except UserError:
        return not is_elsewhere
    return file.kind != "dataset" or local_path(file.path).exists()


def _has_config(model: ModelSection) -> bool:
    try:
        find_config(model.base, model.revision, default_hub_cache())
    except ModelError:
        return False
    return True


def _alone(source: DataSource) -> TrainSource:
    """A source as the only one that is trained on, which nothing is weighed against."""
    return TrainSource(**{name: getattr(source, name) for name in DataSource.model_fields})


def _first_rows(source: DataSource) -> DataSource:
    return source.model_copy(update={"max_rows": min(source.max_rows or SAMPLE_ROWS, SAMPLE_ROWS)})


def _is_whole(source: DataSource, facts: DataFacts | None) -> bool:
    """Whether all rows of a source were among the first ones."""
    if facts is None or facts.report is None:
        return False
    num_rows = facts.report.train.total("rows")
    return num_rows < SAMPLE_ROWS or source.max_rows == num_rows or DEMO_ROWS.get(source.path.removeprefix("demo:")) == num_rows
