"""The data of a run, made ready before any worker exists: tokenised stores, and the questions of its end."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from raytune.config.sections.adapter import num_virtual_tokens
from raytune.config.sections.data import DataSource, QualitySection, named_sources
from raytune.config.sections.evaluation import SuiteSection, is_code, suites_of
from raytune.config.sections.row_sources import (
    asks_in_chats,
    evaluated_sets,
    tested_sets,
    tokenised_sources,
    trained_sources,
    weighed_sources,
)
from raytune.config.sections.run import RunConfig
from raytune.data.conversations.shaping import Shape
from raytune.data.conversations.token_classes import TokenClass, token_classes
from raytune.data.formats.augmenting import Augmentation, augmentation_of
from raytune.data.preview import Previewer
from raytune.data.rows.shards import ParallelMap
from raytune.data.rows.split import EVERY_ROW_TRAINS, Side, Split
from raytune.data.store.borders import measured
from raytune.data.store.build import build_store, tokenising_options
from raytune.data.store.held_out_origins import refuse_made_rows
from raytune.data.store.packing import Packing
from raytune.data.store.request import StoreRequest
from raytune.data.store.store import Store, StoreInfo
from raytune.data.stream.recipe import Recipe, with_files
from raytune.data.templates.front import template_of
from raytune.data.templates.template import ChatTemplate
from raytune.data.templates.text_encoder import TextEncoder
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.errors import DataError
from raytune.evaluation.lm_eval_documents import read_task
from raytune.evaluation.questions import Question, read_questions, read_texts
from raytune.evaluation.suite_metrics import Given, metrics_of
from raytune.launch.data.doubtful_files import doubtful_files
from raytune.launch.data.first_window import first_window
from raytune.launch.data.tokenising import show_tokenising
from raytune.plan.choosing.suites import suite_plan
from raytune.plan.data.augmenting import code_of
from raytune.plan.data.data_limits import refuse_exceeded, verdicts, verdicts_of
from raytune.plan.data.data_report import DataReport, StoreReport
from raytune.plan.data.mixing import EACH_ROW_ONCE, Mixture, loss_weights_of, mixture_of
from raytune.plan.data.split import asked_split
from raytune.plan.data.streaming import StreamPlan, stream_plan
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.run_plan import StorePlan
from raytune.plan.strategies.penalty import ewc_name
from raytune.storage import is_local

STORES_FOLDER = "stores"


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeldOut:
    """Rows that are measured."""

    name: str
    info: StoreInfo
    is_of_all: bool
    """Whether they are of all training sources together."""
    weight: float

    def report(self, names: Sequence[str]) -> StoreReport:
        """Args:
        names: of the training sources.
        """
        return self.info.report.named(names if self.is_of_all else [self.name])


class DataBuilder:
    """Builds everything that a run reads, with the tokenizer and the template that all of it shares.

    Args:
        model_path: folder or hub id whose tokenizer is used.
        row_length: tokens per packed row.
        storage: absolute folder or URL of the run folders; stores go to `data.store`, or `stores` in there.
        parallel_map: does the tokenising.
        num_embeddings: tokens that the model has embeddings for.
    """

    def __init__(
        self,
        config: RunConfig,
        model_path: str,
        row_length: int,
        storage: str,
        parallel_map: ParallelMap,
        *,
        num_embeddings: int,
    ) -> None:
        self._config, self._model_path, self._row_length = config, model_path, row_length
        self._num_embeddings = num_embeddings
        self._parallel_map = parallel_map
        if config.data.store is None and not is_local(storage):
            raise DataError(
                f"storage is {storage}, but tokenised rows are mapped into memory from files. Set data.store to a folder that "
                f"every node mounts, beside the URL for the run folders.",
                keys=("storage",),
            )
        self._folder = config.data.store or f"{storage}/{STORES_FOLDER}"
        model = config.model
        self._tokenizer = open_tokenizer(model_path, model.revision, model.trust_remote_code, model.new_tokens)
        self._template = self._needed_template(self._tokenizer)
        self._chat = ChatTemplate(self._tokenizer, self._template) if self._template else None

    def build(self) -> DataFacts:
        """Tokenise training and validation rows, or find them tokenised by an earlier run.

        Raises:
            DataError: if rows cannot be used, none is left, or more than a limit are not as they should be.
        """
        config, data = self._config, self._config.data
        sources, weighed = trained_sources(config), weighed_sources(config)
        asked = asked_split(data)
        stream = stream_plan(config, tokenizer_fingerprint(self._tokenizer))
        stream = with_files(stream) if stream is not None else None
        split, of_split = measured(asked, sources, self._folder, self._parallel_map)
        if stream is not None:
            train = self._first_window(stream)
        else:
            train = self._store(
                sources,
                "train" if asked.looks_at_rows else "all",
                split,
                mixture=mixture_of(config),
                loss_weights=loss_weights_of(config),
                classes=token_classes(data.token_weights),
                quality=data.quality,
                augmentation=self._augmentation,
            )
        self._refuse_no_copies(train)
        validation = self._measured(evaluated_sets(config), "validation" if data.holds_out else "all", split, train)
        test = self._measured(tested_sets(config), "test" if data.test_fraction else "all", split, train)
        self._refuse_made_rows(train, validation, test)
        # Each document has a gradient of its own, which only one that passes alone gives.
        ewc = self._store(weighed, packing="none") if weighed else None
        learned_from = [train, ewc] if ewc else [train]
        stored = learned_from[1:] if stream else learned_from
        for info in (*stored, *(held_out.info for held_out in (*validation, *test))):
            self._check_tokens(info)
        names = list(named_sources(sources))
        if stream:
            counted = zip(names, train.report.sources, strict=True)
            looked_at = [f"{name}, its first {source.rows - source.augmented} rows" for name, source in counted]
        else:
            looked_at = names
        report = DataReport(
            template=self.template_notes,
            train=train.report.named(looked_at),
            validation={one.name: one.report(names) for one in validation},
            test={one.name: one.report(names) for one in test},
            split=[*of_split, *doubtful_files(data.train, data.validation, data.test)],
            ewc=ewc.report.named(named_sources(weighed)) if ewc else None,
        )
        refuse_exceeded(verdicts(report, config.data))
        return DataFacts(
            report=report,
            train=store_plan_of("train", train),
            validation=tuple(store_plan_of(one.name, one.info, one.weight) for one in validation),
            test=tuple(store_plan_of(one.name, one.info, one.weight) for one in test),
            ewc=store_plan_of(ewc_name(config), ewc) if ewc else None,
            longest_document=max(info.longest_document for info in learned_from),
            template=self._template,
            stream=stream,
        )

    def _first_window(self, stream: StreamPlan) -> StoreInfo:
        """The first window of streamed rows.

        Raises:
            DataError: if it cannot be trained on, or the tokenizer has tokens that the model has no embeddings for.
        """
        config, model = self._config, self._config.model
        if max(self._tokenizer.get_vocab().values()) >= self._num_embeddings:
            raise DataError(
                f"data.streaming: the tokenizer has tokens that {model.base} has no embeddings for, and not all rows are looked "
                f"through for them. Name those that rows have in model.new_tokens, or leave data.streaming out.",
                keys=("data.streaming", "model.new_tokens"),
            )
        recipe = Recipe.of(
            stream,
            template=self._template,
            row_length=self._row_length,
            tokenizer_path=self._model_path,
            tokenizer_revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            new_tokens=model.new_tokens,
            seed=config.training.seed,
        )
        with closing(recipe):
            return first_window(recipe)

    def _measured(
        self, sets: Mapping[str, DataSource | None], side: Side | Literal["all"], split: Split, train: StoreInfo
    ) -> list[_HeldOut]:
        """What is held out, or named, to be measured: a store per source, those from which no row is held out left out.

        Args:
            sets: source by name; None: all training sources together.
            side: of the split; "all": the sources have no training rows.
        """
        sources = trained_sources(self._config)
        counts = dict.fromkeys(sets, 1.0)
        if side != "all":
            if len(sets) > 1:
                counts = _counts_in_training(sets, train.report, side)
            sets = {name: sets[name] for name in counts} or dict.fromkeys(sets and [side])
        else:
            split = EVERY_ROW_TRAINS
        return [
            _HeldOut(
                name=name,
                info=self._store([source] if source else sources, side, split),
                is_of_all=source is None,
                weight=counts.get(name, 1.0),
            )
            for name, source in sets.items()
        ]

    @property
    def _augmentation(self) -> Augmentation | None:
        """What is made of training rows."""
        section = self._config.data.augment
        return augmentation_of(section, code_of(section))

    @property
    def template_notes(self) -> list[str]:
        """What there is to know of the chat template, if there is one."""
        return self._chat.notes if self._chat else []

    def previewer(self, *, is_trained: bool) -> Previewer:
        """What shows rows as they are trained, or as others are measured: without weights, and on no side of a split."""
        config, model = self._config, self._config.model
        asked = asked_split(config.data)
        side, split = "all", EVERY_ROW_TRAINS
        if is_trained and asked.looks_at_rows:
            side, (split, _) = "train", measured(asked, trained_sources(config), self._folder, self._parallel_map)
        classes = token_classes(config.data.token_weights) if is_trained else ()
        options = tokenising_options(
            self._request([], side, split, classes=classes, packing="none"),
            tokenizer_path=self._model_path,
            tokenizer_revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            new_tokens=model.new_tokens,
        )
        return Previewer(
            options=options,
            augmentation=self._augmentation if is_trained else None,
            is_streamed=is_trained and config.data.streaming is not None,
            too_long=config.data.too_long,
            encoder=TextEncoder(self._tokenizer),
            chat=self._chat,
        )

    def questions(self) -> list[Question]:
        """The rows that base and tuned model are measured on at the end of the run, suite by suite."""
        suites = suites_of(self._config.evaluation)
        return [question for key, suite in suites.items() for question in self.questions_of(suite, key)]

    def questions_of(self, suite: SuiteSection, key: str) -> list[Question]:
        """The rows of a suite.

        Args:
            key: of the config, that errors are about.

        Raises:
            DataError: if rows cannot be used or none is left.
            UserError: if a metric cannot be had.
        """
        planned = suite_plan(suite, key)
        metrics = metrics_of(planned, key=key)
        if suite.kind == "lm_eval":
            questions = read_task(suite, key, planned, self._tokenizer)
        elif suite.kind == "loss":
            first = [(source, min(source.max_rows or suite.max_rows, suite.max_rows)) for source in suite.rows]
            rows = [source.model_copy(update={"max_rows": max_rows}) for source, max_rows in first]
            store = Store.open(self._store(rows, packing="none").path)
            refuse_exceeded(verdicts_of({key: store.report}, self._config.data))
            questions = read_texts(suite, key, store, self._tokenizer)
        elif self._chat is None:
            raise DataError(f"{key} needs a chat template to ask with. Set data.template.", keys=(key,))
        else:
            with TemporaryDirectory() as downloads:
                questions = read_questions(suite, key, self._chat, self._tokenizer, metrics, Path(downloads))
        for name in suite.named_metrics:
            if is_code(name):  # one that does not work is found out here rather than after hours of training
                metrics[name].counts([Given(text=questions[0].expected)], [questions[0].expected])
        for number, question in enumerate(questions, 1):
            if question.largest_token >= self._num_embeddings:
                raise self._no_embedding(question.largest_token, f"question {number} of {key}")
        return questions

    def _refuse_no_copies(self, train: StoreInfo) -> None:
        """Refuse an augmentation that comes to nothing.

        Raises:
            DataError: naming its section.
        """
        if self._config.data.augment.copies and not train.report.total("augmented"):
            raise DataError(
                "Nothing was made of any training row: each copy came out as its row is, or data.augment.function returned none. "
                "Change data.augment, or leave it out.",
                keys=("data.augment",),
            )

    def _refuse_made_rows(self, train: StoreInfo, validation: Sequence[_HeldOut], test: Sequence[_HeldOut]) -> None:
        """Refuse what `refuse_made_rows` does, of rows that are held out by name."""
        data = self._config.data
        named = {"data.validation": (data.validation, validation), "data.test": (data.test, test)}
        held_out = {key: sources for key, (sources, _) in named.items() if sources}
        measured = {key: [one.info.report for one in named[key][1]] for key in held_out}
        trained = trained_sources(self._config)
        if data.streaming is not None:  # a source that has none in its first window may have none later (`SourceStream`)
            trained = [source for source, seen in zip(trained, train.report.sources, strict=True) if seen.made]
        refuse_made_rows(train.report, trained, measured, held_out, self._folder)

    def _check_tokens(self, info: StoreInfo) -> None:
        """Refuse a store with tokens that were added to the tokenizer, but not to the model.

        Raises:
            DataError: naming the first of them.
        """
        if max(self._tokenizer.get_vocab().values()) < self._num_embeddings:
            return
        store = Store.open(info.path)
        for row in range(store.num_rows):
            token = int(store.row(row).input_ids.max())
            if token >= self._num_embeddings:
                raise self._no_embedding(token, store.named([row]))

    def _no_embedding(self, token: int, place: str) -> DataError:
        """What is wrong with a token, found at a place."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        return DataError(
            f"The token {name!r} in {place} is number {token} of the tokenizer, but {self._config.model.base} has embeddings for "
            f"{self._num_embeddings} tokens, from 0 on. Name it in model.new_tokens, which gives it a row that is trained; or "
            f"use the tokenizer that belongs to the base."
        )

    def _needed_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The template's text; empty where only plain text is trained, which needs none."""
        are_texts = all(source.format == "text" for source in tokenised_sources(self._config))
        if are_texts and not asks_in_chats(self._config):
            return ""
        return template_of(self._config.data, tokenizer)

    def _store(
        self,
        sources: Sequence[DataSource],
        side: Side | Literal["all"] = "all",
        split: Split = EVERY_ROW_TRAINS,
        *,
        packing: Packing | None = None,
        **training: Any,
    ) -> StoreInfo:
        """Args:
        packing: other than the run's.
        training: as for `_request`.
        """
        model = self._config.model
        request = self._request(sources, side, split, packing=packing or self._config.data.packing, **training)
        return build_store(
            request,
            tokenizer_path=self._model_path,
            tokenizer_revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            new_tokens=model.new_tokens,
            folder=self._folder,
            parallel_map=self._parallel_map,
            watch=show_tokenising,
        )

    def _request(
        self,
        sources: Sequence[DataSource],
        side: Side | Literal["all"],
        split: Split,
        *,
        packing: Packing,
        mixture: Mixture = EACH_ROW_ONCE,
        loss_weights: tuple[float, ...] = (),
        classes: tuple[TokenClass, ...] = (),
        quality: QualitySection | None = None,
        augmentation: Augmentation | None = None,
    ) -> StoreRequest:
        """Args:
        mixture, loss_weights, augmentation: of training sources.
        classes: of tokens with a weight of their own. Held-out rows are measured alike whatever the training loss is of.
        quality: what is looked for among training rows.
        """
        data = self._config.data
        return StoreRequest(
            sources=tuple(sources),
            template=self._template,
            shape=Shape.of(data),
            targets=data.targets if isinstance(data.targets, str) else tuple(data.targets),
            train_empty_thought=data.train_empty_thought,
            token_classes=classes,
            max_length=self._row_length,
            too_long=data.too_long,
            packing=packing,
            num_virtual=0 if packing == "none" else num_virtual_tokens(self._config.adapter),
            on_bad_row=data.on_bad_row,
            tokenizer_fingerprint=tokenizer_fingerprint(self._tokenizer),
            side=side,
            split=split,
            mixture=mixture,
            augmentation=augmentation,
            loss_weights=loss_weights,
            quality=quality,
            held_out=(*data.validation, *data.test) if quality else (),
        )


def _counts_in_training(sets: Iterable[str], trained: StoreReport, side: Side) -> dict[str, float]:
    """How much a target of each source counts in training, by the name of the set that is held out of it; sources of which no row
    is held out have none."""
    counted = zip(sets, trained.sources, strict=True)
    held_out = "test_side" if side == "test" else "other_side"
    return {name: source.loss_weight * source.passes for name, source in counted if getattr(source, held_out)}


def store_plan_of(name: str, info: StoreInfo, weight: float = 1.0) -> StorePlan:
    """A store as the plan names it."""
    return StorePlan(
        name=name,
        path=info.path,
        num_rows=info.rows_per_epoch,
        num_tokens=info.num_tokens,
        num_targets=info.num_targets,
        weight=weight,
    )
