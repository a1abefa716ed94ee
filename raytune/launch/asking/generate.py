"""`raytune generate`: rows of files answered by models on the workers of a cluster, a line per answer in the order of the rows.
What is answered is kept beside the output until that is whole, so that the same command goes on."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raytune.config.sections.cluster import ClusterSection
from raytune.config.sections.data import DataSource
from raytune.data.conversations.conversation import Message, RowError
from raytune.data.rows.shards import NUM_EXAMPLES, Tally
from raytune.errors import DataError, UserError
from raytune.evaluation.answers import Chunk, chunks_of
from raytune.evaluation.asked_rows import AskedRow, Prompter, read_asked_rows, rows_of_prompts, with_system
from raytune.evaluation.questions import Question
from raytune.evaluation.sampling import refuse_none
from raytune.evaluation.suite_metrics import Given
from raytune.launch.asking.kept_answers import answers_of, cluster_to_ask, content_of_chunk, hash_of
from raytune.launch.asking.models_to_ask import Named, ToAsk, models_to_ask
from raytune.plan.run_plan import SamplingPlan, SuitePlan
from raytune.run_folder import EvaluationFolder
from raytune.storage import absolute, exists, read_json, remove_folder, write_bytes, write_json

UNFINISHED = ".unfinished"
"""Behind the name of the output: the folder of what is answered so far."""

Prompt = str | Sequence[Message] | Mapping[str, Any]
"""A question, turns, or a row in the format `messages`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HowToAnswer:
    """How rows are asked and answers written."""

    max_new_tokens: int = 256
    sampling: SamplingPlan | None = None
    """None: the likeliest token each time."""
    num_beams: int = 1
    batch_size: int = 32
    """Answers written at once by one worker. None depends on it."""
    system: str | None = None
    """System message instead of those of the rows."""
    in_turns: bool = True
    """Whether models that have a chat template are asked in it; else they continue texts as they are."""

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: if a number is less than 1.
        """
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            refuse_none(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A row that a model was not asked."""

    model: str | None
    """None: none was, since the row cannot be read."""
    place: str
    """`file:line: why`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredRow:
    """What a model was asked, and what it answered."""

    model: str
    file: str
    row: int
    """Line or number in the file, from 1."""
    prompt: tuple[Message, ...] | str
    """Turns, or the text that was continued."""
    answer: str
    finish: str
    """`stop`: the model ended it; `length`: it is as long as it was allowed to be."""
    tokens: int
    """Of the answer, without the one that ends it."""
    prompt_tokens: int
    expected: Any = None
    """The answer that the row has, if any."""
    tools: list[Any] | None = None

    def to_json(self) -> dict[str, Any]:
        given = {"expected": self.expected, "tools": self.tools}
        return {
            "model": self.model,
            "file": self.file,
            "row": self.row,
            "prompt": self.prompt if isinstance(self.prompt, str) else list(self.prompt),
            "answer": self.answer,
            "finish": self.finish,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
        } | {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Rows and what models answered.

    Attributes:
        output: the file; None: there is none.
        models: name -> the run, or the folder, that it is of.
        rows: in the order of the files, each with the answers of all models.
        num_rows: that were read.
        refused: rows that a model was not asked, in their order.
        num_shortened: answers that had room for fewer tokens than they were allowed.
        num_tokens_now: of the answers that were written now, and not found written.
        seconds: that this took, with the loading of models.
    """

    output: str | None
    models: Mapping[str, str]
    rows: tuple[AnsweredRow, ...]
    num_rows: int
    refused: tuple[Refused, ...]
    num_shortened: int = 0
    num_tokens_now: int = 0
    seconds: float = 0.0

    @property
    def lines(self) -> list[str]:
        """A summary for people."""
        ended = sum(row.finish == "stop" for row in self.rows)
        who = f"{len(self.models)} models" if len(self.models) > 1 else next(iter(self.models))
        cut = f", {len(self.rows) - ended} cut at their length" if ended < len(self.rows) else ""
        lines = [f"{len(self.rows)} answers of {who} to {self.num_rows} rows: {ended} ended by the model{cut}"]
        if self.num_shortened:
            lines.append(f"{self.num_shortened} had fewer positions left than --max-new-tokens, and room for so much only")
        return [*lines, *_refused_lines(self.refused), *([f"answers: {self.output}"] if self.output else [])]

    def to_json(self) -> dict[str, Any]:
        """A summary; the answers are in the output."""
        return {
            "output": self.output,
            "models": dict(self.models),
            "rows": self.num_rows,
            "answers": len(self.rows),
            "ended": sum(row.finish == "stop" for row in self.rows),
            "tokens": sum(row.tokens for row in self.rows),
            "shortened": self.num_shortened,
            "refused": [{"model": one.model, "row": one.place} for one in self.refused],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ToAnswer:
    """Models and rows that are ready to be answered."""

    to_ask: ToAsk
    how: HowToAnswer
    rows: tuple[AskedRow, ...]
    prompts: Mapping[str, Mapping[int, "RowPrompt"]]
    """By model and number of the row; without those that it cannot be asked."""
    num_rows: int
    """That were read."""
    refused: tuple[Refused, ...]
    cluster: ClusterSection


@dataclass(frozen=True, slots=True)
class RowPrompt:
    """A row for one model."""

    turns: tuple[Message, ...] | str
    ids: tuple[int, ...] = field(repr=False)
    room: int
    """Tokens that the answer may have."""


def prepare_answers(
    named: Named,
    rows: Sequence[DataSource],
    how: HowToAnswer,
    *,
    prompts: Sequence[Prompt] = (),
    base_too: bool = False,
    address: str | None = None,
    workers: int | None = None,
) -> ToAnswer:
    """Read all rows as prompts of each model, before anything is started.

    Args:
        rows: as `data.train` names them.
        prompts: more of them, that are in no file.
        base_too: whether the base below other models is asked as well.
        address, workers: as for `prepare_evaluation`.

    Raises:
        UserError: if there are no models, or no row can be asked.
    """
    found = models_to_ask(named)
    to_ask = found if base_too else found.without_base()
    tally = Tally(most_examples=sys.maxsize)
    with TemporaryDirectory() as downloads:
        asked = [*read_asked_rows(rows, Path(downloads), tally), *rows_of_prompts(prompts, tally)]
    refused = [Refused(model=None, place=place) for place in tally.examples.get("bad", [])]
    cluster = cluster_to_ask(to_ask.run, address, workers)
    return ready_to_answer(to_ask, asked, how, cluster, num_rows=tally.counts["rows"], refused=refused)


def ready_to_answer(
    to_ask: ToAsk,
    asked: Sequence[AskedRow],
    how: HowToAnswer,
    cluster: ClusterSection,
    *,
    num_rows: int,
    refused: Sequence[Refused] = (),
) -> ToAnswer:
    """Rows as prompts of each model.

    Args:
        num_rows: that were read for them.
        refused: those of which no model is asked.

    Raises:
        UserError: if no row can be asked.
    """
    refused = list(refused)
    of_models: dict[str, dict[int, RowPrompt]] = {}
    known: dict[Any, tuple[dict[int, RowPrompt], list[str]]] = {}
    for one in to_ask.subjects:
        if (reads := (one.reader.same_rows, one.vocab, one.positions)) not in known:
            prompter = one.prompter(in_turns=how.in_turns)
            if how.system is not None and not prompter.asks_in_turns:
                raise UserError(
                    f"--system is a turn, and {one.name} is asked without a chat template. Leave it out, or name a --template."
                )
            known[reads] = _prompts(prompter, asked, how)
        of_models[one.name], places = known[reads]
        refused += [Refused(model=one.name, place=place) for place in places]
    if not any(of_models.values()):
        raise DataError("\n".join([*_refused_lines(refused), "There is no row that could be asked."]))
    return ToAnswer(
        to_ask=to_ask,
        how=how,
        rows=tuple(asked),
        prompts=of_models,
        num_rows=num_rows,
        refused=tuple(refused),
        cluster=cluster,
    )


def to_json_lines(rows: Sequence[AnsweredRow]) -> bytes:
    return "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows).encode()


def generate(
    prepared: ToAnswer, output: str | None = None, *, content_of: Callable[[Sequence[AnsweredRow]], bytes] = to_json_lines
) -> Answers:
    """Answer what was prepared, or go on with it.

    Args:
        output: file. None: there is none, and nothing is kept.
        content_of: what is written there; by default a line of JSON per answer.

    Raises:
        UserError: before anything is started, if the file is there, or answers of something else.
        RaytuneError: if the workers failed; what was answered is kept.
    """
    chunks = {name: chunks_for(prepared, name) for name in prepared.prompts}
    with ExitStack() as stack:
        if output is None:
            folder = EvaluationFolder(stack.enter_context(TemporaryDirectory()))
        else:
            folder = _folder_for(prepared, chunks, output)
        tasks = [(one.asked, chunk) for one in prepared.to_ask.subjects for chunk in chunks[one.name]]
        written_now, began_s = list[Given](), time.monotonic()
        found = answers_of(
            tasks, prepared.cluster, prepared.to_ask.run, folder.chunk, lambda of_chunk: written_now.extend(of_chunk.values())
        )
    given = {(one.name, row): each for (one, _), of_chunk in zip(tasks, found, strict=True) for row, each in of_chunk.items()}
    rows = answered_rows(prepared, given)
    prompts = [prompt for of_model in prepared.prompts.values() for prompt in of_model.values()]
    answers = Answers(
        output=None if output is None else absolute(output),
        models={one.name: one.source for one in prepared.to_ask.subjects},
        rows=tuple(rows),
        num_rows=prepared.num_rows,
        refused=prepared.refused,
        num_shortened=sum(prompt.room < prepared.how.max_new_tokens for prompt in prompts),
        num_tokens_now=sum(one.num_tokens or 0 for one in written_now),
        seconds=time.monotonic() - began_s,
    )
    if answers.output is not None:
        write_bytes(answers.output, content_of(rows))
        remove_folder(folder.path, answers.output.rpartition("/")[0])
    return answers


def chunks_for(prepared: ToAnswer, model: str) -> list[Chunk]:
    """The rows of a model in chunks; those with less room than they are allowed apart, by what they have."""
    how, prompts = prepared.how, prepared.prompts[model]
    by_room = sorted(prompts, key=lambda number: -prompts[number].room)
    chunks: list[Chunk] = []
    for room, numbers in groupby(by_room, key=lambda number: prompts[number].room):
        suite = SuitePlan(
            name="rows",
            metrics=(),
            batch_size=how.batch_size,
            max_new_tokens=room,
            num_beams=how.num_beams,
            sampling=how.sampling,
        )
        questions = {number: Question(suite="rows", prompt="", prompt_ids=prompts[number].ids) for number in numbers}
        chunks += chunks_of(suite, questions)
    return chunks


def answered_rows(prepared: ToAnswer, given: Mapping[tuple[str, int], Given]) -> list[AnsweredRow]:
    """All answers, row by row, of each the models in their order.

    Args:
        given: by model and number of the row.
    """
    rows = []
    for number, row in enumerate(prepared.rows):
        for model, prompts in prepared.prompts.items():
            if (prompt := prompts.get(number)) is None:
                continue
            answer = given[model, number]
            rows.append(
                AnsweredRow(
                    model=model,
                    file=row.origin.file,
                    row=row.origin.line,
                    prompt=prompt.turns,
                    answer=answer.text,
                    finish="stop" if answer.has_ended else "length",
                    tokens=answer.num_tokens or 0,
                    prompt_tokens=len(prompt.ids),
                    expected=row.expected,
                    tools=row.tools,
                )
            )
    return rows


def _prompts(prompter: Prompter, rows: Sequence[AskedRow], how: HowToAnswer) -> tuple[dict[int, RowPrompt], list[str]]:
    """Rows as prompts, by their numbers; and the places of those that are none, with the reason."""
    prompts, places = {}, []
    for number, row in enumerate(rows):
        turns = prompter.turns_of(row)
        if not isinstance(turns, str):
            turns = with_system(turns, how.system)
        try:
            ids = prompter.prompt_ids(turns, row.tools)
        except RowError as error:
            places.append(f"{row.origin}: {error}")
        else:
            prompts[number] = RowPrompt(turns, ids, prompter.room(ids, how.max_new_tokens))
    return prompts, places


def _folder_for(prepared: ToAnswer, chunks: Mapping[str, Sequence[Chunk]], output: str) -> EvaluationFolder:
    """Where finished chunks lie until the output is whole.

    Raises:
        UserError: if that would take another one's place.
    """
    path = absolute(output)
    folder = EvaluationFolder(f"{path}{UNFINISHED}")
    identity = {
        "models": [one.asked.model_dump(mode="json") for one in prepared.to_ask.subjects],
        "rows": {name: hash_of([content_of_chunk(chunk) for chunk in of_model]) for name, of_model in chunks.items()},
    }
    if not exists(folder.identity):
        if exists(path):
            raise UserError(f"--output is {output}, which is there already. Name another file, or move that one away.")
        write_json(folder.identity, identity)
    elif read_json(folder.identity) != identity:
        raise UserError(
            f"{folder.path} holds answers to other rows, of other models, or written in another way. Name another --output, or "
            f"remove that folder."
        )
    return folder


def _refused_lines(refused: Sequence[Refused]) -> list[str]:
    """How many rows were not asked, and the first few of them."""
    if not refused:
        return []
    several = len({one.model for one in refused if one.model}) > 1
    shown = [f"  {f'{one.model}: ' if several and one.model else ''}{one.place}" for one in refused[:NUM_EXAMPLES]]
    more = [f"  and {len(refused) - len(shown)} more"] if len(refused) > len(shown) else []
    return [f"{len(refused)} not asked:", *shown, *more]
