"""Everything about a run that is settled before anything of it is started: its data and its plan."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self

from raytune.config.sections.adapter import num_virtual_tokens
from raytune.config.sections.evaluation import suites_of
from raytune.config.sections.model import ModelSection
from raytune.config.sections.row_sources import weighed_sources
from raytune.config.sections.run import RunConfig
from raytune.data.rows.shards import ParallelMap
from raytune.data.templates.tokenizers import open_tokenizer, token_numbers, vocabulary_of
from raytune.errors import ModelError, UserError
from raytune.evaluation.questions import Question
from raytune.hub.snapshot import described, in_lines
from raytune.launch.data.base_here import check_base_early
from raytune.launch.data.reading import show_reading
from raytune.launch.data.stores import DataBuilder
from raytune.model.files.base_content import Content, base_content, refuse_other_base
from raytune.model.files.files import resolve_model_path
from raytune.plan.choosing.choose import choose_plan
from raytune.plan.choosing.setting import Setting, look_at, settle
from raytune.plan.costs.hardware import load_catalogue
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.facts.machine import Machine
from raytune.plan.identity.division import Begun, continued, kept_settings
from raytune.plan.model.base_model import is_on_hub, read_model_shape
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import ObjectivePlan, RunPlan
from raytune.plan.strategies.distillation import TeacherFiles, check_vocabularies, names_base, teacher_section
from raytune.plan.strategies.new_tokens import with_new_tokens
from raytune.plan.strategies.objective import objective_of
from raytune.storage import absolute

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that is ready to start."""

    plan: RunPlan
    questions: list[Question]
    """What both models answer at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base whose config and tokenizer are here."""

    section: ModelSection
    """As it was asked for; one of a hub at its commit."""
    path: str
    """Where transformers finds it."""
    shape: ModelShape

    @classmethod
    def of(cls, model: ModelSection) -> Self:
        """See `described_base`."""
        model, path = described_base(model)
        shape = read_model_shape(model.base, model.revision, trust_remote_code=model.trust_remote_code)
        if model.new_tokens:
            shape = with_new_tokens(shape, model, vocabulary_of(open_tokenizer(path, model.revision, model.trust_remote_code)))
        return cls(section=model, path=path, shape=shape)


def prepare(
    config: RunConfig, machine: Machine, parallel_map: ParallelMap, *, begun: Begun | None = None, base: Base | None = None
) -> Prepared:
    """Refuse what cannot work, tokenise the data (or find it tokenised), and plan.

    Args:
        begun: the run that is to be continued.
        base: of `refuse_without_cluster`.

    Raises:
        UserError: if the config, the model, the data or the machines do not allow the run.
    """
    return Preparation(machine, parallel_map).prepare(config, begun, base)


def refuse_without_cluster(config: RunConfig) -> Base:
    """Refuse what the model does not allow, or what no machine could do, before a cluster is started or joined.

    Returns:
        The base that was looked at.

    Raises:
        UserError: (or PlanError, ModelError) as `prepare` does.
        ClusterError: if a hub has to be asked for the model and does not answer.
    """
    if config.cluster.instance:
        load_catalogue().instance(config.cluster.instance)
    base = Base.of(config.model)
    teacher = teacher_of(config, base)
    look_at(config, base.shape, None, lambda look: look(), teacher=teacher and teacher.shape)
    tried_objective(objective_of(config), base.shape.vocab)
    return base


def teacher_of(config: RunConfig, base: Base) -> Base | None:
    """The model beside the one in training that it learns from; None if there is none.

    Raises:
        UserError: if it has other tokens than the base, or is none.
        ClusterError: if a hub has to be asked for it and does not answer.
    """
    section = teacher_section(config)
    if section is None:
        return None
    if names_base(config):
        model, path = base.section.model_copy(update={"new_tokens": []}), base.path
        shape = read_model_shape(model.base, model.revision, trust_remote_code=model.trust_remote_code)
        return Base(section=model, path=path, shape=shape)
    try:
        teacher = Base.of(section)
    except UserError as error:
        key = "strategy.distillation.teacher"
        said = str(error).replace("model.base", key)
        raise type(error)(said if key in said else f"{key}: {said}", keys=(key,)) from error
    own, theirs = (open_tokenizer(one.path, one.section.revision, one.section.trust_remote_code) for one in (base, teacher))
    num_shared = min(base.shape.vocab, teacher.shape.vocab)
    check_vocabularies(section.base, own.get_vocab(), theirs.get_vocab(), num_shared)
    return teacher


def refuse_unknown_tokens(config: RunConfig, path: str) -> None:
    """Refuse tokens whose rows are to be trained and that the tokenizer does not have.

    Args:
        path: of the base, as transformers finds it.

    Raises:
        ModelError: naming the first.
    """
    named, model = getattr(config.adapter, "trainable_tokens", "auto"), config.model
    if named != "auto" and named:
        token_numbers(open_tokenizer(path, model.revision, model.trust_remote_code, model.new_tokens), named)


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


def refuse_blind_teacher(teacher: Base, setting: Setting) -> None:
    """Refuse a teacher whose architecture has not the attention of the run.

    Raises:
        ModelError: naming the kinds that it has.
    """
    # These load torch, for runs with a teacher.
    from raytune.model.attention.attention import check_attention
    from raytune.model.files.pretrained import load_config, model_class

    section = teacher.section
    config = load_config(teacher.path, section.revision, section.trust_remote_code)
    own_class = model_class(teacher.path, config, revision=section.revision, trust_remote_code=section.trust_remote_code)
    try:
        check_attention(own_class, config, setting.attention, packs=not setting.shape.why_lone)
    except ModelError as error:
        key = "strategy.distillation.teacher"
        raise ModelError(f"{key} {section.base}: {error}", keys=(key,)) from error


def tried_objective(objective: ObjectivePlan | None, vocab: int) -> ObjectivePlan | None:
    """See `user_objective.tried`. Without a loss of the user's own a driver loads no compiler: two seconds."""
    if objective is None:
        return None
    from raytune.training.losses.user_objective import tried

    return tried(objective, vocab)


class Preparation:
    """Prepares runs that may differ in any setting. Data that several of them read is looked at once."""

    def __init__(self, machine: Machine, parallel_map: ParallelMap) -> None:
        self._machine, self._parallel_map = machine, parallel_map
        self._data: dict[str, tuple[DataFacts, list[Question]]] = {}
        self._contents: dict[tuple[str, str | None], Content] = {}

    def prepare(self, config: RunConfig, begun: Begun | None = None, base: Base | None = None) -> Prepared:
        """See `prepare`."""
        machine = self._machine
        if config.cluster.instance:
            catalogue = load_catalogue()
            instance = catalogue.instance(config.cluster.instance)  # which must be known, whatever machines are there
            machine = machine.known_as(instance, catalogue.gpu_of(instance)) if machine.num_gpus else machine
        base = base or Base.of(config.model)
        config = continued(config, begun) if begun else config
        config = config.model_copy(update={"model": base.section})
        storage = absolute(config.storage)
        teacher = teacher_of(config, base)
        objective = tried_objective(objective_of(config), base.shape.vocab)
        with _as_it_began(begun):
            setting = settle(config, base.shape, machine, begun, teacher and teacher.shape, objective)
        refuse_unknown_tokens(config, base.path)
        content = self.base(base.section)
        files = teacher and self._teacher(teacher, setting)
        read = [config.data, config.strategy.replay, base.section, suites_of(config.evaluation), setting.row_length, storage]
        read.append(num_virtual_tokens(config.adapter))  # which rows leave room for
        read.append(weighed_sources(config))
        if (key := repr(read)) not in self._data:
            num_embeddings = base.shape.vocab
            builder = DataBuilder(
                config, base.path, setting.row_length, storage, self._parallel_map, num_embeddings=num_embeddings
            )
            self._data[key] = builder.build(), builder.questions()
        facts, questions = self._data[key]
        with _as_it_began(begun):
            plan = choose_plan(setting, facts, model_path=base.path, storage=storage, content=content, teacher=files)
        return Prepared(plan=plan, questions=questions)

    def _teacher(self, teacher: Base, setting: Setting) -> TeacherFiles:
        """A teacher whose files hold what its config describes, and which can see rows as the model does."""
        refuse_blind_teacher(teacher, setting)
        section = teacher.section
        return TeacherFiles(path=teacher.path, revision=section.revision, content=self.base(section))

    def base(self, model: ModelSection) -> Content:
        """The content of a base whose files hold the model that its config describes.

        Raises:
            ModelError: if they do not, or are others than those that a run before this one was prepared for.
        """
        path = resolve_model_path(model.base, model.revision)
        key = (path, model.revision)
        if key not in self._contents:  # headers first: to hash the files is to read them
            check_base_early(model, path)
        content = base_content(path, model.revision, trust_remote_code=model.trust_remote_code, watch=partial(show_reading, path))
        refuse_other_base(path, self._contents.setdefault(key, content), content)
        return content


@contextmanager
def _as_it_began(begun: Begun | None) -> Iterator[None]:
    """Refusals of a run that is continued say what of it is kept, though nobody wrote that."""
    try:
        yield
    except UserError as error:
        if begun is None:
            raise
        raise type(error)(f"{error} {kept_settings(begun)}", keys=error.keys) from error
