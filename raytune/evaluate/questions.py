"""Held-out rows as questions: the prompt that a model continues, and the answer that the data expects."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from raytune.config.data import DataSource
from raytune.config.evaluation import AnswerMetricName
from raytune.data.conversation import RowError
from raytune.data.shards import Tally, bad_questions_error
from raytune.data.source_rows import read_conversations
from raytune.data.template import ChatTemplate
from raytune.errors import DataError
from raytune.evaluate.answer_metrics import answer_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    prompt: str
    prompt_ids: tuple[int, ...]
    expected: str
    """The last assistant turn."""


def read_questions(
    sources: Sequence[DataSource],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    metrics: Sequence[AnswerMetricName],
    max_rows: int,
    downloads: Path,
) -> list[Question]:
    """Take the first rows of the sources as questions.

    Raises:
        DataError: if rows are bad, do not end with an answer, or end with one that a metric cannot judge by, the first few of
            them with file and line; or there are no rows.
        UserError: if a package that a metric needs is not installed.
    """
    judges = answer_metrics(metrics)
    questions: list[Question] = []
    tally = Tally()
    for conversation in chain.from_iterable(read_conversations(source, downloads, tally) for source in sources):
        if tally.counts["rows"] > max_rows:
            break
        try:
            prompt, expected = template.prompt(conversation), template.expected(conversation)
        except RowError as error:
            tally.add("bad", conversation.origin, str(error))
            continue
        refusals = (f"for {name} {why}" for name, judge in judges.items() if (why := judge.refusal(expected)))
        if refusal := next(refusals, None):
            tally.add("bad", conversation.origin, refusal)
            continue
        questions.append(
            Question(
                prompt=prompt,
                prompt_ids=tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]),  # pyright: ignore[reportArgumentType]
                expected=expected,
            )
        )
    if tally.counts["bad"]:
        raise bad_questions_error(tally)
    if not questions:
        raise DataError(f"evaluation.generation.rows: {', '.join(source.path for source in sources)} hold no rows.")
    return questions


def to_json_lines(questions: Sequence[Question]) -> bytes:
    return "".join(json.dumps(asdict(question)) + "\n" for question in questions).encode()


def from_json_lines(data: bytes) -> list[Question]:
    return [
        Question(prompt=line["prompt"], prompt_ids=tuple(line["prompt_ids"]), expected=line["expected"])
        for line in map(json.loads, data.splitlines())
    ]
