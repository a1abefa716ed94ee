"""The data of a run, made ready before any worker exists: tokenised stores, and the questions of its end."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from transformers import PreTrainedTokenizerBase

from raytune.config.adapter import num_virtual_tokens
from raytune.config.data import DataSource, named_sources
from raytune.config.evaluation import SuiteSection, is_code, suites_of
from raytune.config.row_sources import asks_in_chats, evaluated_sets, tokenised_sources, trained_sources, weighed_sources
from raytune.config.run import RunConfig
from raytune.data.build import ParallelMap, build_store
from raytune.data.packing import Packing
from raytune.data.split import Side
from raytune.data.store import Store, StoreInfo
from raytune.data.store_request import StoreRequest
from raytune.data.stream import Recipe
from raytune.data.template import ChatTemplate
from raytune.data.template_text import resolve_template
from raytune.data.token_classes import TokenClass, token_classes
from raytune.data.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.errors import DataError
from raytune.evaluation.lm_eval_documents import read_task
from raytune.evaluation.questions import Question, read_questions, read_texts
from raytune.evaluation.suite_metrics import Given, metrics_of
from raytune.launch.first_window import first_window
from raytune.launch.tokenising import show_tokenising
from raytune.plan.data_facts import DataFacts
from raytune.plan.data_report import DataReport, StoreReport
from raytune.plan.mixing import EACH_ROW_ONCE, Mixture, loss_weights_of, mixture_of
from raytune.plan.penalty import ewc_name
from raytune.plan.run_plan import StorePlan
from raytune.plan.streaming import StreamPlan, stream_plan
from raytune.plan.suites import suite_plan
from raytune.storage import is_local

STORES_FOLDER = "stores"


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
            DataError: if rows cannot be used or none is left.
        """
        config, is_split = self._config, bool(self._config.data.validation_fraction)
        sources, sets, weighed = trained_sources(config), evaluated_sets(config), weighed_sources(config)
        classes = token_classes(config.data.token_weights)
        stream = stream_plan(config, tokenizer_fingerprint(self._tokenizer))
        if stream is not None:
            train = self._first_window(stream)
        else:
            train = self._store(sources, "train" if is_split else "all", mixture_of(config), loss_weights_of(config), classes)
        counts = _counts_in_training(sets, train.report) if is_split and len(sets) > 1 else dict.fromkeys(sets, 1.0)
        sets = {name: sets[name] for name in counts} or dict.fromkeys(sets and ["validation"])
        side = "validation" if is_split else "all"
        measured = {name: self._store([source] if source else sources, side) for name, source in sets.items()}
        # Each document has a gradient of its own, which only one that passes alone gives.
        ewc = self._store(weighed, "all", packing="none") if weighed else None
        learned_from = [train, ewc] if ewc else [train]
        for info in (*([] if stream else [train]), *([ewc] if ewc else []), *measured.values()):
            self._check_tokens(info)
        names = list(named_sources(sources))
        in_report = [f"{name}, its first {stream.window} rows" for name in names] if stream else names
        return DataFacts(
            report=DataReport(
                template=self._chat.notes if self._chat else [],
                train=train.report.named(in_report),
                validation={name: info.report.named([name] if sets[name] else names) for name, info in measured.items()},
                ewc=ewc.report.named(named_sources(weighed)) if ewc else None,
            ),
            train=store_plan_of("train", train),
            validation=tuple(store_plan_of(name, info, counts.get(name, 1.0)) for name, info in measured.items()),
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
        return first_window(stream, recipe, accepts_other_prompts=config.data.on_prompt_mismatch == "accept")

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
            store = Store.open(self._store(rows, "all", packing="none").path)
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
        return resolve_template(self._config.data.template, tokenizer)

    def _store(
        self,
        sources: Sequence[DataSource],
        side: Side | Literal["all"],
        mixture: Mixture = EACH_ROW_ONCE,
        loss_weights: tuple[float, ...] = (),
        classes: tuple[TokenClass, ...] = (),
        packing: Packing | None = None,
    ) -> StoreInfo:
        """Args:
        classes: of tokens with a weight of their own. Held-out rows are measured alike whatever the training loss is of.
        packing: other than the run's.
        """
        data, model = self._config.data, self._config.model
        packing = packing or data.packing
        request = StoreRequest(
            sources=tuple(sources),
            template=self._template,
            targets=data.targets if isinstance(data.targets, str) else tuple(data.targets),
            token_classes=classes,
            max_length=self._row_length,
            too_long=data.too_long,
            packing=packing,
            num_virtual=0 if packing == "none" else num_virtual_tokens(self._config.adapter),
            on_bad_row=data.on_bad_row,
            on_prompt_mismatch=data.on_prompt_mismatch,
            tokenizer_fingerprint=tokenizer_fingerprint(self._tokenizer),
            side=side,
            validation_fraction=data.validation_fraction,
            mixture=mixture,
            loss_weights=loss_weights,
        )
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


def _counts_in_training(sets: Iterable[str], trained: StoreReport) -> dict[str, float]:
    """How much a target of each source counts in training, by the name of the set that is held out of it; sources of which no row
    is held out have none."""
    counted = zip(sets, trained.sources, strict=True)
    return {name: source.loss_weight * source.passes for name, source in counted if source.other_side}


def store_plan_of(name: str, info: StoreInfo, weight: float = 1.0) -> StorePlan:
    """A store as the plan names it."""
    return StorePlan(
        name=name,
        path=info.path,
        num_rows=info.num_rows,
        num_tokens=info.num_tokens,
        num_targets=info.num_targets,
        weight=weight,
    )
