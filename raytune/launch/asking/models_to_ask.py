"""Models that a user names to have them measured: a run, a whole model or an adapter, each with what rows are read by for it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from raytune.config.sections.adapter import FullAdapter, num_virtual_tokens
from raytune.config.sections.evaluation import SUITE_NAME, SuiteSection
from raytune.config.sections.model import ModelSection, is_written_as_path
from raytune.config.sections.run import RunConfig
from raytune.config.sections.training import Precision
from raytune.data.templates.front import template_of
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.errors import DataError, ModelError, RaytuneError, UserError
from raytune.evaluation.asked_rows import Prompter
from raytune.evaluation.questions import Question
from raytune.launch.asking.score import RunToScore, run_to_score
from raytune.launch.data.base_here import refuse_changed_base
from raytune.launch.data.prepare import described_base
from raytune.launch.data.stores import DataBuilder
from raytune.model.files.base_check import check_base
from raytune.model.files.export import ADAPTER_CONFIG
from raytune.model.files.pretrained import load_config
from raytune.model.files.saved_adapter import adapter_config, answers_padded, changes_of_base, refuse_unfit_adapter
from raytune.model.inference import asked_of_run
from raytune.model.parts.rope import saved_rope
from raytune.plan.choosing.requirements import choose_row_length
from raytune.plan.model.base_model import is_on_hub, model_files, read_model_shape
from raytune.plan.model.rope import reach
from raytune.plan.model.shapes import ModelShape
from raytune.plan.saved.asked_model import AskedModel, plain_model
from raytune.storage import absolute, exists, is_local, local_path

BASE = "base"
_PRECISIONS: Mapping[Any, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """What rows are read by for a model."""

    config: RunConfig
    tokenizer: str
    """Folder or hub id."""
    row_length: int
    """Tokens of a text at most whose loss is measured."""
    vocab: int
    """Tokens that the model has embeddings for."""
    knows_turns: bool = True
    """Whether its chat template is one that it was trained with, as far as is known."""

    def opened(self) -> PreTrainedTokenizerBase:
        model = self.config.model
        return open_tokenizer(self.tokenizer, model.revision, model.trust_remote_code, model.new_tokens)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Text of the chat template that turns are written in; empty: there is none.

        Raises:
            DataError: if the one that is named is none.
        """
        data = self.config.data
        if not self.knows_turns or (data.template == "auto" and not tokenizer.chat_template):
            return ""
        return template_of(data, tokenizer)

    def questions(self, suites: RunConfig, by_key: Mapping[str, SuiteSection], scratch: str) -> list[Question]:
        """The rows of suites, in their order.

        Args:
            suites: a config that has these suites and nothing else.
            scratch: folder for what is tokenised.

        Raises:
            UserError: if rows cannot be used, none is left, or they need a template that is not there.
        """
        data = self.config.data.model_copy(update={"store": f"{scratch}/stores"})
        config = self.config.model_copy(update={"data": data, "evaluation": suites.evaluation})
        try:
            builder = DataBuilder(config, self.tokenizer, self.row_length, scratch, map, num_embeddings=self.vocab)
            return [question for key, suite in by_key.items() for question in builder.questions_of(suite, key)]
        except DataError as error:
            if "data.template" not in str(error):
                raise
            raise DataError(f"{error} Here that is the option --template.", keys=error.keys) from error

    @property
    def same_rows(self) -> tuple[str, str, int]:
        """Equal for readers that make the same of rows."""
        tokenizer = self.opened()
        return tokenizer_fingerprint(tokenizer), self.template(tokenizer), self.row_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model that is measured."""

    asked: AskedModel
    source: str
    """The run, or the folder, that it is of."""
    reader: Reader
    vocab: int
    """Tokens that it has embeddings for."""
    positions: int
    """That a prompt and its answer have together; virtual tokens have others."""

    @property
    def name(self) -> str:
        return self.asked.name

    def prompter(self, *, in_turns: bool = True) -> Prompter:
        """What writes prompts for it.

        Args:
            in_turns: in its chat template, if it has one; else texts are continued as they are.

        Raises:
            DataError: if the template that is named is none.
        """
        tokenizer = self.reader.opened()
        template = self.reader.template(tokenizer) if in_turns else ""
        return Prompter(tokenizer, template, vocab=self.vocab, positions=self.positions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What a user names, in words of the command line."""

    model: str
    base: str | None = None
    adapters: Mapping[str, str] | None = None
    compare: str | None = None
    template: str = "auto"
    dtype: Precision | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ToAsk:
    """Models that are measured beside each other."""

    subjects: tuple[Subject, ...]
    pairs: tuple[tuple[str, str], ...]
    """Names of those that are compared, the earlier one first."""
    run: RunToScore | None
    """If the first of them is that of a run."""
    title: str
    """For the name of a folder."""

    def without_base(self) -> "ToAsk":
        """The same without the base, where it only lies below others."""
        others = tuple(one for one in self.subjects if one.name != BASE)
        return replace(self, subjects=others or self.subjects, pairs=())


def models_to_ask(named: Named) -> ToAsk:
    """Look at all models that a user names, before anything is started.

    Raises:
        UserError: if one of them is none, does not fit its base, or is a run that has not finished.
    """
    first, run = _of_model(named)
    base = next((one for one in first if one.name == BASE), None)
    if named.adapters and base is None:
        base = replace(first[0], asked=first[0].asked.named(BASE))
        first = [base]
    for one in first:
        if one.name in (named.adapters or {}):
            raise UserError(f"--adapter gives the name {one.name!r} to another model than {one.source}, whose name it is here.")
    added = [_of_adapter(named, path, name, base)[-1] for name, path in (named.adapters or {}).items()]
    other = [_other(named)] if named.compare else []
    subjects = _differently_named([*first, *added, *other])
    main = subjects[len(first) - 1].name
    pairs = [(subjects[0].name, one.name) for one in subjects[1:]]
    if other and main != subjects[0].name:
        pairs.append((main, subjects[-1].name))
    title = "-against-".join([_title(named.model), *([_title(named.compare)] if named.compare else [])])
    for one in subjects:
        _refuse_unfit(one)
    return ToAsk(subjects=tuple(subjects), pairs=tuple(pairs), run=run, title=title)


def adapter_over(base: Subject, path: str, name: str) -> Subject:
    """An adapter more over a base that has been looked at.

    Raises:
        UserError: if it is none, or does not fit.
    """
    subject = _laid_over(base, Path(path).expanduser().resolve(), name)[-1]
    _refuse_unfit(subject)
    return subject


def _refuse_unfit(one: Subject) -> None:
    if one.asked.adapter and is_local(one.asked.adapter):
        refuse_unfit_adapter(one.asked)


def _of_model(named: Named) -> tuple[list[Subject], RunToScore | None]:
    """The first model with its base, if it has one."""
    if _is_run(named.model):
        if named.base is not None:
            raise UserError(
                f"--base is {named.base}, but {named.model} is a run, whose base is the one that it was trained on. Leave --base "
                f"out, or name the model of the run: {named.model.rstrip('/')}/model"
            )
        run = run_to_score(named.model)
        return _of_run(run), run
    if _is_adapter(named.model):
        return _of_adapter(named, named.model, _title(named.model), None), None
    whole = _of_whole(named, named.model, _title(named.model))
    if named.base is None:
        return [whole], None
    base = _of_whole(named, named.base, BASE)
    found = whole.asked.model.path
    stops = found if (Path(found) / "generation_config.json").is_file() else None
    _refuse_other_tokens(base, whole.reader)
    # Asked in the words of the tuned model, as at the end of a run.
    asked = base.asked.model_copy(update={"stops": stops, "tokenizer": found})
    return [replace(base, asked=asked, reader=whole.reader), whole], None


def _other(named: Named) -> Subject:
    """The model that is put beside the first one, without its base."""
    assert named.compare is not None
    title = _title(named.compare)
    if _is_run(named.compare):
        return _of_run(run_to_score(named.compare))[-1]
    if _is_adapter(named.compare):
        return _of_adapter(replace(named, base=None), named.compare, title, None)[-1]
    return _of_whole(named, named.compare, title)


def _of_run(run: RunToScore) -> list[Subject]:
    folder, plan = run.folder, run.plan
    if run.record.state != "finished":
        raise UserError(
            f"Run {folder.name!r} in {folder.storage} has not finished (it is {run.record.state}), and its checkpoints hold the "
            f"state of training, not a model that can be loaded by itself. The same `raytune train` goes on with it; `raytune "
            f"score` measures losses under its best checkpoint."
        )
    if not any(exists(f"{folder.model}/{name}") for name in ("config.json", ADAPTER_CONFIG)):
        raise UserError(
            f"The model of run {folder.name!r} is gone: {folder.model} holds none. Train it again under another name."
        )
    refuse_changed_base(plan.model)
    local = is_local(folder.model)
    data = run.config.data.model_copy(update={"template": "auto" if local else run.config.data.template})
    model = run.config.model.model_copy(update={"revision": None if local else plan.model.revision})
    shape = read_model_shape(plan.model.path, plan.model.revision, trust_remote_code=plan.model.trust_remote_code)
    vocab = shape.vocab if plan.model.num_embeddings is None else plan.model.num_embeddings
    positions = reach(plan.model.rope, shape.max_positions)
    reader = Reader(
        config=run.config.model_copy(update={"data": data, "model": model}),
        tokenizer=str(local_path(folder.model)) if local else plan.model.path,
        row_length=plan.data.row_length,
        vocab=vocab,
        knows_turns=bool(plan.template),
    )
    base, tuned = asked_of_run(plan, folder.model, base=BASE, tuned=folder.name)
    of_base = Subject(asked=base, source=plan.model.path, reader=reader, vocab=vocab, positions=positions)
    left = positions - num_virtual_tokens(plan.adapter)
    return [of_base, replace(of_base, asked=tuned, source=folder.path, positions=left)]


def _of_whole(named: Named, path: str, name: str) -> Subject:
    section = _section(named, path)
    section, found = _described(section)
    check_base(found, section.revision, section.trust_remote_code)
    model = plain_model(
        found, _dtype(named, found, section), revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    shape = read_model_shape(found, section.revision, trust_remote_code=section.trust_remote_code)
    return Subject(
        asked=AskedModel(name=name, model=model),
        source=found,
        reader=_reader(named, section, found, shape),
        vocab=shape.vocab,
        positions=shape.max_positions,
    )


def _of_adapter(named: Named, path: str, name: str, base: Subject | None) -> list[Subject]:
    """An adapter behind its base.

    Args:
        base: that it is laid over; None: the one that the user or the adapter names.
    """
    folder = Path(path).expanduser().resolve()
    if base is None:
        named_base = named.base or adapter_config(folder).base_model_name_or_path
        if not named_base:
            raise ModelError(f"{folder / ADAPTER_CONFIG} does not name its base model. Name it with --base.")
        base = _of_whole(named, named_base, BASE)
        model = base.asked.model.model_copy(update={"rope": saved_rope(folder)})
        positions = reach(model.rope, base.positions)
        base = replace(base, asked=base.asked.model_copy(update={"model": model}), positions=positions)
    return _laid_over(base, folder, name)


def _laid_over(base: Subject, folder: Path, name: str) -> list[Subject]:
    """A base, asked as an adapter in a folder is, and that adapter over it."""
    config = adapter_config(folder)
    has_tokenizer, has_stops = ((folder / file).is_file() for file in ("tokenizer_config.json", "generation_config.json"))
    path_of_base = base.asked.model.path
    path_of_base = path_of_base if is_on_hub(path_of_base) else model_files(path_of_base)
    if changes := changes_of_base(folder, path_of_base, base.asked.model.revision or config.revision):
        raise ModelError(
            f"The adapter in {folder} was trained on another base than {base.source} holds now:\n{changes}\nWhat would be "
            f"measured is not what was trained. Name the base that it was trained on with --base."
        )
    reader = base.reader
    if has_tokenizer:
        section = reader.config.model.model_copy(update={"revision": None})
        reader = replace(reader, config=reader.config.model_copy(update={"model": section}), tokenizer=str(folder))
        _refuse_other_tokens(base, reader)
    asked = base.asked.model_copy(
        update={
            "stops": str(folder) if has_stops else base.asked.stops,
            "tokenizer": str(folder) if has_tokenizer else base.asked.tokenizer,
            "can_pad": base.asked.can_pad and answers_padded(config),
        }
    )
    tuned = asked.model_copy(update={"name": name, "adapter": str(folder)})
    own = replace(base, asked=asked, reader=reader)
    left = own.positions - (getattr(config, "num_virtual_tokens", None) or 0)
    return [own, replace(own, asked=tuned, source=str(folder), positions=left)]


def _refuse_other_tokens(base: Subject, reader: Reader) -> None:
    """Refuse to ask a base in the tokens of another model, whose rows it would read as other texts."""

    def tokens_of(one: Reader) -> dict[str, int]:
        model = one.config.model
        return open_tokenizer(one.tokenizer, model.revision, model.trust_remote_code).get_vocab()

    own, of_rows = tokens_of(base.reader), tokens_of(reader)
    if other := next((text for text, number in own.items() if of_rows.get(text) != number), None):
        raise ModelError(
            f"The base {base.source} has other tokens than {reader.tokenizer}: {other!r} is token {own[other]}, and "
            f"{of_rows.get(other, 'none')} there, so that it would read rows as other texts. Name the base that belongs to the "
            f"model with --base; a model that is asked in tokens of its own is named with --compare."
        )


def _reader(named: Named, section: ModelSection, found: str, shape: ModelShape) -> Reader:
    config = RunConfig(model=section, adapter=FullAdapter(method="full"))
    config = config.model_copy(update={"data": config.data.model_copy(update={"template": named.template})})
    return Reader(config=config, tokenizer=found, row_length=choose_row_length(config, shape), vocab=shape.vocab)


def _section(named: Named, path: str) -> ModelSection:
    is_folder = Path(path).expanduser().is_dir()
    base = str(Path(path).expanduser().resolve()) if is_folder else path
    return ModelSection(base=base, trust_remote_code=named.trust_remote_code and is_folder)


def _described(section: ModelSection) -> tuple[ModelSection, str]:
    path = section.base
    if is_written_as_path(path) and not Path(path).expanduser().is_dir():
        raise UserError(f"{path} is neither the folder of a run, nor that of a model or an adapter: there is no such folder.")
    try:
        return described_base(section)
    except RaytuneError as error:
        what = "" if Path(path).expanduser().is_dir() else f" There is no folder {path} on this machine."
        raise type(error)(f"{path} is neither a run nor a model that can be loaded: {error}{what}") from error


def _dtype(named: Named, path: str, section: ModelSection) -> Precision:
    """That a model is loaded in: what the user says, or that of its files."""
    if named.dtype is not None:
        return named.dtype
    return _PRECISIONS.get(load_config(path, section.revision, section.trust_remote_code).dtype, "fp32")


def _is_run(path: str) -> bool:
    return exists(f"{absolute(path)}/run.json")


def _is_adapter(path: str) -> bool:
    return (Path(path).expanduser() / ADAPTER_CONFIG).is_file()


def _title(path: str) -> str:
    """What a model is called that its user gave no name: its folder; that of a run for the model in it."""
    *above, last = [part for part in absolute(path).split("/") if part]
    own = above[-1] if last == "model" and above else last
    return re.sub(r"[^\w.-]+", "-", own).strip("-.") or "model"


def _differently_named(subjects: Sequence[Subject]) -> list[Subject]:
    """Subjects of which no two have a name; one that has one already is numbered."""
    found: list[Subject] = []
    for one in subjects:
        if not re.match(SUITE_NAME, one.name):
            raise UserError(f"{one.name!r} is no name for a model: letters, digits and . _ - are.")
        names = {other.name for other in found}
        candidates = (one.name if number == 1 else f"{one.name}-{number}" for number in range(1, len(subjects) + 1))
        name = next(name for name in candidates if name not in names)
        found.append(replace(one, asked=one.asked.named(name)))
    return found
