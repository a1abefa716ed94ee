"""What is wrong with a run, as far as it can be found without its cluster: everything at once; nothing is started, nothing left.

Opens the tokenizer and reads the first rows of each source. Names and numbers alone are checked while a config is loaded
(`check --fast`).
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from raytune.config.data import DataSource
from raytune.config.evaluation import GenerationSection
from raytune.config.run import RunConfig
from raytune.data.sources import DEMO_ROWS, find_files
from raytune.errors import RaytuneError, UserError
from raytune.launch.cluster import named_address, this_machine
from raytune.launch.record import refuse_changed_settings
from raytune.launch.stores import DataBuilder
from raytune.model.base_check import check_base
from raytune.model.files import local_files, resolve_model_path
from raytune.plan.base_model import read_model_shape
from raytune.plan.choose import choose_plan
from raytune.plan.data_report import losses_text
from raytune.plan.hardware import load_catalogue
from raytune.plan.machine import DataFacts, Machine
from raytune.plan.references import planned_shape
from raytune.plan.requirements import checks_before_data, choose_row_length
from raytune.plan.shapes import ModelShape
from raytune.run_folder import RunFolder
from raytune.storage import absolute, is_local, local_path, refuse_unusable
from raytune.units import format_seconds

SAMPLE_ROWS = 2000
"""Rows of each source that are read and tokenised at most."""

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
    found.of(lambda: refuse_unusable(absolute(config.storage)), keys=("storage",))
    found.of(lambda: refuse_unusable(config.data.store or "."), keys=("data.store",))
    try:
        refuse_changed_settings(RunFolder(absolute(config.storage), config.name), config)
    except RaytuneError as error:  # it is the name that is taken; everything else may be right
        found.another_run = str(error)
    found.of(lambda: _refuse_missing_packages(config))
    address = named_address(config.cluster)
    machine = None if address and not config.cluster.instance else found.of(lambda: _machine(config))
    found.not_looked_at += [f"the machines of {address}"] if address else []
    shape = found.of(lambda: _shape(config), keys=("model.base",))
    if shape is not None:
        for check in checks_before_data(config, shape, machine):
            found.of(check)
        found.looked_at.append(f"model {config.model.base} ({shape.model_type})")
        _look_at_rows(config, shape, machine, found)
    found.seconds = time.monotonic() - began
    return found


def _refuse_missing_packages(config: RunConfig) -> None:
    if config.training.liger and find_spec("liger_kernel") is None:
        raise UserError("training.liger needs the package liger-kernel, which is not installed here: pip install liger-kernel.")


def _machine(config: RunConfig) -> Machine:
    section = config.cluster
    if section.instance is None:
        return this_machine(section)
    catalogue = load_catalogue()
    instance = catalogue.instance(section.instance)
    return Machine.rented(instance, catalogue.gpu_of(instance), section.nodes)


def _shape(config: RunConfig) -> ModelShape:
    model = config.model
    # A plan for machines that are yet to be rented needs no model here, and a check of it neither.
    read = planned_shape if config.cluster.instance else read_model_shape
    return read(model.base, model.revision, trust_remote_code=model.trust_remote_code)


def _look_at_rows(config: RunConfig, shape: ModelShape, machine: Machine | None, found: Findings) -> None:
    """Open the tokenizer and the template, tokenise the first rows of each source, and plan where these say enough."""
    model = config.model
    model_path = found.of(lambda: resolve_model_path(model.base, model.revision), keys=("model.base",))
    if model_path is None:
        return
    if local_files(model_path, model.revision) is None:
        found.not_looked_at.append("tokenizer and rows, since the files of the model are not here")
        return
    found.of(lambda: check_base(model_path, model.revision, model.trust_remote_code), keys=("model.base",))
    row_length = found.of(lambda: choose_row_length(config, shape)) or shape.max_positions
    here = {key: _first_rows(source) for key, source in _sources(config) if _is_here(source)}
    found.not_looked_at += [f"{source.path} (not on this machine)" for key, source in _sources(config) if key not in here]
    with TemporaryDirectory() as scratch:

        def builder(generation: GenerationSection | None = None, **data: Any) -> DataBuilder:
            run = config.model_copy(
                update={
                    "data": config.data.model_copy(update={**data, "store": scratch}),
                    "evaluation": config.evaluation.model_copy(update={"generation": generation}),
                }
            )
            return DataBuilder(run, model_path, row_length, scratch, map, num_embeddings=shape.vocab)

        def alone(source: DataSource) -> DataBuilder:
            return builder(train=[source], validation=[], validation_fraction=0.0)

        storage = absolute(config.storage)
        if found.of(lambda: DataBuilder(config, model_path, row_length, storage, map, num_embeddings=shape.vocab)) is None:
            return
        found.looked_at.append("its tokenizer and template")
        facts = {key: found.of(lambda source=source: alone(source).build(), keys=(key,)) for key, source in here.items()}
        for report in (one.report for one in facts.values() if one and one.report):
            found.looked_at.append(f"{report.train.total('rows')} rows of {report.train.sources[0].name}")
            found.losses += [line for line in losses_text(report) if line not in found.losses]
        generation = config.evaluation.generation
        if generation is not None and all(_is_here(source) for source in generation.rows):
            few = generation.model_copy(update={"max_rows": min(generation.max_rows, SAMPLE_ROWS)})
            found.of(lambda: builder(few).questions(), keys=("evaluation.generation.rows",))
        says_enough = config.training.max_steps is not None or all(
            map(_is_whole, dict(_sources(config)).values(), facts.values())
        )
        if machine is not None and not found.errors and len(here) == len(dict(_sources(config))) and says_enough:
            train, validation = (
                [here[key] for key in here if key.startswith(f"data.{side}")] for side in ("train", "validation")
            )
            whole = found.of(lambda: builder(train=train, validation=validation).build(), keys=("data.train",))
            if whole is not None:
                plan = found.of(lambda: choose_plan(config, shape, machine, whole, model_path=model_path, storage=scratch))
                found.looked_at += ["a plan"] if plan else []


def _sources(config: RunConfig) -> Iterator[tuple[str, DataSource]]:
    """Sources of rows that are trained or evaluated, by their key."""
    for side in ("train", "validation"):
        for position, source in enumerate(getattr(config.data, side)):
            yield f"data.{side}.{position}", source


def _is_here(source: DataSource) -> bool:
    """Whether reading a source needs no network."""
    return source.path.startswith("demo:") or (is_local(source.path) and not _is_hub_id(source))


def _is_hub_id(source: DataSource) -> bool:
    try:
        (file, *_) = find_files(source, local_path("."))
    except UserError:
        return False
    return file.kind == "dataset" and not local_path(file.path).exists()


def _first_rows(source: DataSource) -> DataSource:
    return source.model_copy(update={"max_rows": min(source.max_rows or SAMPLE_ROWS, SAMPLE_ROWS)})


def _is_whole(source: DataSource, facts: DataFacts | None) -> bool:
    """Whether all rows of a source were among the first ones."""
    if facts is None or facts.report is None:
        return False
    num_rows = facts.report.train.total("rows")
    return num_rows < SAMPLE_ROWS or source.max_rows == num_rows or DEMO_ROWS.get(source.path.removeprefix("demo:")) == num_rows
