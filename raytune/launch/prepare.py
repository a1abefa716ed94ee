"""Everything about a run that is settled before anything of it is started: its data and its plan."""

import logging
from dataclasses import dataclass
from functools import partial

from raytune.config.model import ModelSection
from raytune.config.run import RunConfig
from raytune.data.build import ParallelMap
from raytune.evaluate.questions import Question
from raytune.hub.snapshot import described, in_lines
from raytune.launch.reading import show_reading
from raytune.launch.stores import DataBuilder
from raytune.model.base_check import check_base
from raytune.model.base_content import Content, base_content, refuse_other_base
from raytune.model.files import resolve_model_path
from raytune.plan.base_model import is_on_hub, read_model_shape
from raytune.plan.choose import choose_plan
from raytune.plan.hardware import load_catalogue
from raytune.plan.machine import DataFacts, Machine
from raytune.plan.requirements import check_before_data, checks_before_data, choose_row_length
from raytune.plan.run_plan import RunPlan
from raytune.storage import absolute

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that is ready to start."""

    plan: RunPlan
    questions: list[Question]
    """What both models answer at its end."""


def prepare(config: RunConfig, machine: Machine, parallel_map: ParallelMap) -> Prepared:
    """Refuse what cannot work, tokenise the data (or find it tokenised), and plan.

    Raises:
        UserError: if the config, the model, the data or the machines do not allow the run.
    """
    return Preparation(machine, parallel_map).prepare(config)


def refuse_without_cluster(config: RunConfig) -> None:
    """Refuse what the model does not allow, or what no machine could do, before a cluster is started or joined.

    Raises:
        UserError: (or PlanError, ModelError) as `prepare` does.
        ClusterError: if a hub has to be asked for the model and does not answer.
    """
    if config.cluster.instance:
        load_catalogue().instance(config.cluster.instance)
    model, _ = described_base(config.model)
    shape = read_model_shape(model.base, model.revision, trust_remote_code=model.trust_remote_code)
    for check in checks_before_data(config, shape, None):
        check()


def described_base(model: ModelSection) -> tuple[ModelSection, str]:
    """A base whose config and tokenizer are here, a hub's at its commit, and where transformers finds it.

    Raises:
        ModelError: if there is no such base.
        ClusterError: if a hub has to be asked for it and does not answer.
    """
    path = resolve_model_path(model.base, model.revision)
    if not is_on_hub(path):
        return model, path
    commit = described(path, model.revision, with_code=model.trust_remote_code, report=in_lines(_log.warning))
    return model.model_copy(update={"revision": commit}), path


class Preparation:
    """Prepares runs that may differ in any setting. Data that several of them read is looked at once."""

    def __init__(self, machine: Machine, parallel_map: ParallelMap) -> None:
        self._machine, self._parallel_map = machine, parallel_map
        self._data: dict[str, tuple[DataFacts, list[Question]]] = {}
        self._contents: dict[tuple[str, str | None], Content] = {}

    def prepare(self, config: RunConfig) -> Prepared:
        """See `prepare`."""
        machine = self._machine
        if config.cluster.instance:
            catalogue = load_catalogue()
            instance = catalogue.instance(config.cluster.instance)  # which must be known, whatever machines are there
            machine = machine.known_as(instance, catalogue.gpu_of(instance)) if machine.num_gpus else machine
        model = config.model
        model, model_path = described_base(model)
        shape = read_model_shape(model.base, model.revision, trust_remote_code=model.trust_remote_code)
        check_before_data(config, shape, machine)
        content = self.base(model)
        config = config.model_copy(update={"model": model})
        storage = absolute(config.storage)
        row_length = choose_row_length(config, shape)
        read = [config.data, model, config.evaluation.generation, row_length, storage]
        if (key := repr(read)) not in self._data:
            builder = DataBuilder(config, model_path, row_length, storage, self._parallel_map, num_embeddings=shape.vocab)
            self._data[key] = builder.build(), builder.questions()
        facts, questions = self._data[key]
        plan = choose_plan(config, shape, machine, facts, model_path=model_path, storage=storage, content=content)
        return Prepared(plan=plan, questions=questions)

    def base(self, model: ModelSection) -> Content:
        """The content of a base whose files hold the model that its config describes.

        Raises:
            ModelError: if they do not, or are others than those that a run before this one was prepared for.
        """
        path = resolve_model_path(model.base, model.revision)
        key = (path, model.revision)
        if key not in self._contents:  # headers first: to hash the files is to read them
            check_base(path, model.revision, model.trust_remote_code)
        content = base_content(path, model.revision, trust_remote_code=model.trust_remote_code, watch=partial(show_reading, path))
        refuse_other_base(path, self._contents.setdefault(key, content), content)
        return content
