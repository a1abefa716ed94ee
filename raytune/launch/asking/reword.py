"""`raytune data reword`: training rows in other words, written by a model of the user's own, to be listed in `data.train` beside
those that they were made of.

Only what a run would train on is asked about. Each new row holds its origin (`data.origins`), so that it is trained exactly where
that is, in every later split. The model is asked as by `raytune generate`, and what it answered is kept as there.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from raytune.config.sections.augment import CONTENT, Part
from raytune.config.sections.row_sources import trained_sources
from raytune.config.sections.run import RunConfig
from raytune.data.files.readers import FileRow, read_segment
from raytune.data.files.source_files import find_files
from raytune.data.files.sources import scan
from raytune.data.formats.origins import content_of, origin_of
from raytune.data.rows.rewording import FAULTS, Fault, RowToReword, Turn, Written, turns_to_reword, versions_of
from raytune.data.rows.shards import Tally, bad_rows_error
from raytune.data.rows.source_rows import conversation_of, readings_of
from raytune.data.rows.split import position_of
from raytune.data.store.borders import measured
from raytune.data.store.held_out_origins import contents_in
from raytune.data.templates.tokenizers import open_tokenizer
from raytune.errors import DataError, UserError
from raytune.evaluation.asked_rows import AskedRow
from raytune.evaluation.sampling import refuse_none
from raytune.launch.asking.generate import AnsweredRow, HowToAnswer, ToAnswer, generate, ready_to_answer
from raytune.launch.asking.kept_answers import changed_cluster
from raytune.launch.asking.models_to_ask import ToAsk
from raytune.launch.data.prepare import Base
from raytune.plan.data.split import asked_split
from raytune.storage import absolute
from raytune.units import format_count, format_seconds

_NOT_ASKED = {
    "held_out": "held out by the split",
    "test_side": "held out for the test",
    "measured": "in data.validation or data.test too",
    "of_others": "made of others themselves",
    "wordless": "without words of a part that is to be reworded",
    "bad": "that cannot be used",
    "beyond": "beyond --limit",
}
"""Rows that the model is not asked about, by how they are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HowToReword:
    """What is asked of which rows."""

    ask: str
    """With CONTENT in it, for which a text stands."""
    parts: tuple[Part, ...] = ("user",)
    per_row: int = 1
    """Versions of each row."""
    limit: int | None = None
    """Rows at most, drawn of all by their content."""
    seed: int = 0
    """Of that drawing; a larger limit keeps the rows of a smaller one."""
    answering: HowToAnswer = field(default_factory=HowToAnswer)

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: if what is asked cannot be.
        """
        if self.ask.count(CONTENT) != 1:
            raise UserError(f"--ask must have {CONTENT} once, for which the text of a row stands; got {self.ask!r}.")
        if unknown := next((part for part in self.parts if part not in get_args(Part)), None):
            raise UserError(f"--part is {unknown!r}, expected one of {', '.join(get_args(Part))}.")
        if not self.parts or ("text" in self.parts and len(set(self.parts)) > 1):
            raise UserError(
                "--part names turns of chats (system, user, assistant), or text for plain documents: a file has rows of one "
                "kind. Reword the two apart, each with an --output of its own."
            )
        refuse_none("per_row", self.per_row)
        if self.limit is not None:
            refuse_none("limit", self.limit)
        if self.per_row > 1 and self.answering.sampling is None:
            raise UserError(
                f"{self.per_row} versions of a row would all be the likeliest answer, and so the same. Set a --temperature."
            )


@dataclass(frozen=True, slots=True)
class _Question:
    """What a prompt is for."""

    row: int
    version: int
    turn: Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class ToReword:
    """Rows and a model that are ready."""

    how: HowToReword
    rows: tuple[RowToReword, ...]
    questions: tuple[_Question, ...]
    """One for each row of `to_answer`."""
    to_answer: ToAnswer
    specials: tuple[str, ...]
    """Texts of special tokens, of the model and of the base that is to be trained."""
    num_read: int
    not_asked: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewording:
    """What became of the rows.

    Attributes:
        output: file with the new rows.
        model: run or folder of the model that was asked.
        num_rows: that were read.
        not_asked: of them, by reason.
        num_asked: rows that the model was asked about.
        num_versions: that it was asked for, of all of them.
        num_kept: versions that are in the file.
        dropped: the others, by reason.
        refused: prompts that are none for the model, as `file:line: why`.
        num_tokens: that were written now.
        seconds: that this took, with the loading of the model.
    """

    output: str
    model: str
    num_rows: int
    not_asked: Mapping[str, int]
    num_asked: int
    num_versions: int
    num_kept: int
    dropped: Mapping[Fault, int]
    refused: tuple[str, ...]
    num_tokens: int
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What a person reads."""
        lines = [f"{self.num_rows:,} rows read, {self.num_asked:,} of them asked about"]
        lines += [f"  {count:,} not, {_NOT_ASKED[why]}" for why, count in self.not_asked.items()]
        lines.append(f"{self.num_kept:,} of {self.num_versions:,} versions kept")
        lines += _dropped_lines(self.dropped, self.refused)
        if self.num_tokens:
            speed = format_count(self.num_tokens / max(self.seconds, 1e-9))
            took = f"{format_count(self.num_tokens)} tokens in {format_seconds(self.seconds)}"
            lines.append(f"{took}, {speed} tokens/s with the start of the model")
        return [*lines, f"rows: {self.output}", "List the file in data.train, beside the rows that they were made of."]

    def to_json(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "model": self.model,
            "num_rows": self.num_rows,
            "not_asked": dict(self.not_asked),
            "num_asked": self.num_asked,
            "num_versions": self.num_versions,
            "num_kept": self.num_kept,
            "dropped": dict(self.dropped),
            "refused": list(self.refused),
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
        }


def prepare_rewording(
    config: RunConfig, to_ask: ToAsk, how: HowToReword, *, address: str | None = None, workers: int | None = None
) -> ToReword:
    """Choose the rows and write the prompts, before anything is started.

    Args:
        config: of a run, whose training rows are meant.
        to_ask: the model that is asked.
        address, workers: as for `prepare_evaluation`, instead of those of the config.

    Raises:
        UserError: if rows cannot be used, or there is none to ask about.
    """
    to_ask = to_ask.without_base()
    rows, tally = _rows_of(config, how)
    base = Base.of(config.model)
    model = base.section
    trained = open_tokenizer(base.path, model.revision, model.trust_remote_code, model.new_tokens)
    not_asked = {why: tally.counts[why] for why in _NOT_ASKED if tally.counts[why]}
    if not rows:
        why = "; ".join(f"{count} {_NOT_ASKED[why]}" for why, count in not_asked.items())
        raise DataError(f"There is no row to reword: of {tally.counts['rows']} rows {why}.", keys=("data.train",))
    to_ask, own = _showing_specials(to_ask)
    questions = [
        _Question(number, version, turn)
        for number, row in enumerate(rows)
        for version in range(how.per_row)
        for turn in row.turns
    ]
    asked = [
        AskedRow(origin=rows[one.row].conversation.origin, text=how.ask.replace(CONTENT, rows[one.row].text_of(one.turn)))
        for one in questions
    ]
    cluster = changed_cluster(config.cluster, address, workers)
    to_answer = ready_to_answer(to_ask, asked, how.answering, cluster, num_rows=len(asked))
    return ToReword(
        how=how,
        rows=tuple(rows),
        questions=tuple(questions),
        to_answer=_whole_rows(to_answer, questions),
        specials=tuple(sorted(_specials(trained) | own)),
        num_read=tally.counts["rows"],
        not_asked=not_asked,
    )


def reword(prepared: ToReword, output: str) -> Rewording:
    """Have the model write, or go on with it, and write the rows that are worth training.

    Args:
        output: file, which must not be there yet.

    Raises:
        UserError: before anything is started, if it is there, or answers to something else; behind it, if no version is kept.
        RaytuneError: if the workers failed; what was answered is kept.
    """
    refused = tuple(one.place for one in prepared.to_answer.refused)

    def lines_of(answers: Sequence[AnsweredRow]) -> bytes:
        kept, dropped = made_rows(prepared, answers)
        if not kept:
            raise DataError("\n".join(["No version of any row is worth training:", *_dropped_lines(dropped, refused)]))
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in kept).encode()

    answers = generate(prepared.to_answer, output, content_of=lines_of)
    kept, dropped = made_rows(prepared, answers.rows)
    (source,) = answers.models.values()
    return Rewording(
        output=absolute(output),
        model=source,
        num_rows=prepared.num_read,
        not_asked=prepared.not_asked,
        num_asked=len(prepared.rows),
        num_versions=len(prepared.rows) * prepared.how.per_row,
        num_kept=len(kept),
        dropped={fault: dropped[fault] for fault in FAULTS if dropped[fault]},
        refused=refused,
        num_tokens=answers.num_tokens_now,
        seconds=answers.seconds,
    )


def made_rows(prepared: ToReword, answers: Sequence[AnsweredRow]) -> tuple[list[Mapping[str, Any]], Counter[Fault]]:
    """New rows of answers, in the order of those that they are of, and how many versions are dropped for what."""
    (subject,) = prepared.to_answer.to_ask.subjects
    made_by = {"model": subject.source, "ask": prepared.how.ask}
    kept, dropped = list[Mapping[str, Any]](), Counter[Fault]()
    for row, versions in zip(prepared.rows, _by_row(prepared, subject.name, answers), strict=True):
        for made in versions_of(row, versions, prepared.specials, made_by):
            if isinstance(made, str):
                dropped[made] += 1
            else:
                kept.append(made)
    return kept, dropped


# --- Rows --------------------------------------------------------------------------------------------------------------------


def _rows_of(config: RunConfig, how: HowToReword) -> tuple[list[RowToReword], Tally]:
    """The rows to ask about in their order, and how many there are of others."""
    tally = Tally()
    with TemporaryDirectory() as scratch:
        rows = enumerate(_trained_rows(config, how, Path(scratch), tally))
        if how.limit is None:
            found = list(rows)
        else:
            found = heapq.nsmallest(how.limit, rows, key=lambda one: position_of(f"{how.seed}/{content_of(one[1].values)}"))
    if tally.counts["bad"] and config.data.on_bad_row == "error":
        raise bad_rows_error(tally)
    tally.counts["held_out"] = tally.counts["other_side"] + tally.counts["origin_held_out"]
    tally.counts["beyond"] = tally.counts["fitting"] - len(found)
    return [row for _, row in sorted(found, key=lambda one: one[0])], tally


def _trained_rows(config: RunConfig, how: HowToReword, scratch: Path, tally: Tally) -> Iterator[RowToReword]:
    """The rows of `data.train` that a run trains on, and that have words to reword."""
    data = config.data
    asked = asked_split(data)
    split, _ = measured(asked, trained_sources(config), scratch)
    elsewhere = contents_in([*data.validation, *data.test], scratch)
    for source in data.train:
        scanned = [scan(file, source.max_rows) for file in find_files(source, scratch)]
        (reading,) = readings_of([source], [scanned])
        segments = [segment for file in scanned for segment in file.segments]
        in_files = ((segment.file.name, row) for segment in segments for row in read_segment(segment))
        for name, row in islice(in_files, source.max_rows):
            found = conversation_of(row, reading, name, tally, "train" if asked.looks_at_rows else "all", split)
            if found is None:
                continue
            assert isinstance(row, FileRow)
            turns = turns_to_reword(found, how.parts)
            if origin_of(row.values) is not None:
                tally.add("of_others")
            elif elsewhere and position_of(content_of(row.values)) in elsewhere:
                tally.add("measured")
            elif not turns:
                tally.add("wordless")
            else:
                tally.add("fitting")
                yield RowToReword(values=row.values, conversation=found, turns=turns)


# --- Prompts and answers -----------------------------------------------------------------------------------------------------


def _showing_specials(to_ask: ToAsk) -> tuple[ToAsk, set[str]]:
    """The model with answers in which special tokens can be seen, and the texts of those that are none of its words."""
    (subject,) = to_ask.subjects
    found = _specials(subject.reader.opened())
    shown = tuple(sorted(found.union(subject.asked.kept_tokens)))
    asked = subject.asked.model_copy(update={"kept_tokens": shown})
    return replace(to_ask, subjects=(replace(subject, asked=asked),)), found.difference(subject.asked.kept_tokens)


def _specials(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {token for token in added.union(tokenizer.all_special_tokens) if token.strip()}


def _whole_rows(to_answer: ToAnswer, questions: Sequence[_Question]) -> ToAnswer:
    """The same without prompts of rows of which another part cannot be asked."""
    ((name, prompts),) = to_answer.prompts.items()
    lost = {one.row for number, one in enumerate(questions) if number not in prompts}
    whole = {number: prompt for number, prompt in prompts.items() if questions[number].row not in lost}
    if not whole:
        raise DataError(f"There is no row of which all parts could be asked; the first is {to_answer.refused[0].place}")
    return replace(to_answer, prompts={name: whole})


def _by_row(prepared: ToReword, model: str, answers: Sequence[AnsweredRow]) -> list[list[dict[Turn, Written]]]:
    """Answers by row, version and turn."""
    found: list[list[dict[Turn, Written]]] = [[{} for _ in range(prepared.how.per_row)] for _ in prepared.rows]
    for number, answer in zip(prepared.to_answer.prompts[model], answers, strict=True):
        question = prepared.questions[number]
        found[question.row][question.version][question.turn] = Written(answer.answer, answer.finish == "stop")
    return found


def _dropped_lines(dropped: Mapping[Fault, int], refused: Sequence[str]) -> list[str]:
    first = {"not asked": f"; the first is {refused[0]}" if refused else ""}
    return [
        f"  {dropped[fault]:,} dropped, {words}{first.get(fault, '')}" for fault, words in FAULTS.items() if dropped.get(fault)
    ]
