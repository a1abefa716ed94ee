"""What a model makes of rows of a suite, a chunk at a time.

Chunks depend on the suite and its rows alone, and a row passes through a model with those of its chunk only: so numbers are the
same to the last bit however many workers share the chunks, and whoever asks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raytune.config.sections.evaluation import SuiteKind
from raytune.evaluation.generation import write_answers
from raytune.evaluation.likelihood import Scored, log_likelihoods
from raytune.evaluation.lm_eval_answers import answer_requests
from raytune.evaluation.questions import Question
from raytune.evaluation.suite_metrics import Given
from raytune.model.inference import Loaded
from raytune.plan.run_plan import SuitePlan

Rows = Mapping[int, Question]
"""Questions by their number in the suite."""
Answered = dict[str, dict[int, Given]]
"""What a model made of rows, by suite and number."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that pass through a model together."""

    suite: SuitePlan
    rows: Rows


def all_chunks(suites: Sequence[SuitePlan], asked: Mapping[str, Sequence[Question]]) -> list[Chunk]:
    """The rows of all suites in chunks, suite by suite.

    Args:
        asked: the questions of each suite.
    """
    return [chunk for suite in suites for chunk in chunks_of(suite, dict(enumerate(asked[suite.name])))]


def chunks_of(suite: SuitePlan, rows: Rows) -> list[Chunk]:
    """The rows of a suite, as many together as pass at once: neighbours in length, so that little is padded."""
    by_length = sorted(rows, key=lambda number: len(rows[number].prompt_ids))
    parts = [by_length[start : start + suite.batch_size] for start in range(0, len(rows), suite.batch_size)]
    return [Chunk(suite, {number: rows[number] for number in part}) for part in parts]


def together(parts: Sequence[Answered], asked: Mapping[str, Sequence[Question]]) -> dict[str, list[Given]]:
    """What a model made of all rows of each suite, in their order, of parts that have each row once."""
    found = {suite: {number: given for part in parts for number, given in part.get(suite, {}).items()} for suite in asked}
    return {suite: [found[suite][number] for number in range(len(questions))] for suite, questions in asked.items()}


def answer(loaded: Loaded, suite: SuitePlan, chunk: Rows) -> dict[int, Given]:
    """What a model makes of a chunk."""
    return _ANSWER[suite.kind](loaded, suite, chunk)


def _write(loaded: Loaded, suite: SuitePlan, chunk: Rows) -> dict[int, Given]:
    answers = write_answers(
        loaded.model,
        loaded.tokenizer,
        [question.prompt_ids for question in chunk.values()],
        max_new_tokens=suite.max_new_tokens,
        batch_size=suite.batch_size,
        num_beams=suite.num_beams,
        sampling=suite.sampling,
        rows=list(chunk),
        kept=loaded.kept_tokens,
        can_pad=loaded.can_pad,
    )
    return {
        number: Given(text=one.text, num_tokens=one.num_tokens, has_ended=one.has_ended)
        for number, one in zip(chunk, answers, strict=True)
    }


def _choose(loaded: Loaded, suite: SuitePlan, chunk: Rows) -> dict[int, Given]:
    scored = [
        Scored([*question.prompt_ids, *ids], range(len(question.prompt_ids), len(question.prompt_ids) + len(ids)))
        for question in chunk.values()
        for ids in question.choice_ids
    ]
    found = iter(log_likelihoods(loaded.model, scored, batch_size=suite.batch_size))
    return {number: chosen(question, [next(found) for _ in question.choices]) for number, question in chunk.items()}


def chosen(question: Question, log_likelihoods: Sequence[float]) -> Given:
    """The likeliest of a question's choices; of equally likely ones the first."""
    per_character = [value / len(choice) for value, choice in zip(log_likelihoods, question.choices, strict=True)]
    return Given(
        text=question.choices[log_likelihoods.index(max(log_likelihoods))],
        per_character=question.choices[per_character.index(max(per_character))],
        numbers=tuple(log_likelihoods),
    )


def _lose(loaded: Loaded, suite: SuitePlan, chunk: Rows) -> dict[int, Given]:
    scored = [Scored(question.prompt_ids, question.targets) for question in chunk.values()]
    found = log_likelihoods(loaded.model, scored, batch_size=suite.batch_size)
    return {
        number: Given(
            text=f"loss {-value / len(question.targets):.4f} over {len(question.targets)} targets",
            numbers=(-value, float(len(question.targets))),
        )
        for (number, question), value in zip(chunk.items(), found, strict=True)
    }


_ANSWER: Mapping[SuiteKind, Callable[[Loaded, SuitePlan, Rows], dict[int, Given]]] = {
    "answers": _write,
    "choices": _choose,
    "labels": _choose,
    "loss": _lose,
    "lm_eval": answer_requests,
}
