"""`raytune data rank`: rows without answers by how unsure a run's model is of them, so that the first are the ones to annotate.

The model answers each row by its likeliest tokens, and the workers' score task says what it holds of its own answer: the mean
negative log-likelihood of the answer's tokens and of its end (sequence likelihood by length, Malinin and Gales 2021).
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raytune.config.sections.data import DataSource
from raytune.errors import UserError
from raytune.evaluation.scored_rows import ScoredRow
from raytune.launch.asking.generate import AnsweredRow, HowToAnswer, generate, prepare_answers
from raytune.launch.asking.models_to_ask import Named
from raytune.launch.asking.score import RunToScore, score
from raytune.storage import absolute, exists, remove_folder, write_bytes
from raytune.units import format_count


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedRow:
    """A row that the model was asked."""

    asked: AnsweredRow
    """With the model's own answer."""
    uncertainty: float
    """Mean negative log-likelihood of that answer per token, in nats."""

    def to_json(self) -> dict[str, Any]:
        """What a person needs to answer it: the place, the prompt, the model's own answer."""
        asked = self.asked.to_json()
        kept = {name: asked[name] for name in ("file", "row", "prompt", "tools", "answer", "finish", "expected") if name in asked}
        return {"uncertainty": self.uncertainty, **kept}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Rows by uncertainty, the least certain first.

    Attributes:
        output: the file with the first of them.
        rows: those in it.
        num_rows: that were read.
        num_ranked: of which an uncertainty is known.
        mean: of all those.
    """

    run: str
    output: str
    rows: tuple[RankedRow, ...]
    num_rows: int
    num_ranked: int
    mean: float

    @property
    def lines(self) -> list[str]:
        """What a person reads."""
        lost = self.num_rows - self.num_ranked
        without = f"; {format_count(lost)} could not be asked or scored" if lost else ""
        first, last = self.rows[0].uncertainty, self.rows[-1].uncertainty
        return [
            f"{format_count(self.num_ranked)} of {format_count(self.num_rows)} rows ranked by uncertainty{without}: "
            f"{self.mean:.4f} nats per token of the model's own answers in the mean",
            f"the {len(self.rows)} least certain, {first:.4f} to {last:.4f}: {self.output}",
        ]

    def to_json(self) -> dict[str, Any]:
        """The facts without the rows, which are in the file."""
        return {
            "run": self.run,
            "output": self.output,
            "num_rows": self.num_rows,
            "num_ranked": self.num_ranked,
            "num_written": len(self.rows),
            "mean": self.mean,
        }


def rank(
    run: RunToScore,
    sources: Sequence[DataSource],
    *,
    top: int,
    output: str,
    max_new_tokens: int = 256,
    address: str | None = None,
) -> Ranking:
    """Rank rows under the final model of a run, and write the least certain to a file.

    Args:
        sources: with answers or without.
        top: rows that are written.
        output: a file for a line of JSON per row, which must not be there yet.
        max_new_tokens: of an answer.
        address: as for `prepare_answers`.

    Raises:
        UserError: before anything is started, if the run has no final model or no chat template, or no row can be asked.
        RaytuneError: if the workers failed.
    """
    if exists(output):
        raise UserError(f"--output is {output}, which is there already. Name another file, or move that one away.")
    if not run.plan.template:
        raise UserError(
            "The run was trained on plain text: there are no answers that it could be unsure of. `raytune score` ranks texts."
        )
    if run.config.data.targets == "all":
        raise UserError("The run trains whole texts (data.targets: all), prompts with answers. `raytune score` ranks whole rows.")
    how = HowToAnswer(max_new_tokens=max_new_tokens)
    prepared = prepare_answers(Named(model=run.folder.path), sources, how, address=address)
    answers = generate(prepared)
    scratch = f"{run.folder.scores}/ranked-{uuid.uuid4().hex[:12]}"
    try:
        pairs = f"{scratch}/pairs.jsonl"
        write_bytes(pairs, "".join(json.dumps(as_pair(row), ensure_ascii=False) + "\n" for row in answers.rows).encode())
        scores = score(as_asked(run), [DataSource(path=pairs, format="messages")], output=f"{scratch}/scores.jsonl")
    finally:
        remove_folder(scratch, run.folder.scores)
    ranked = ranked_rows(answers.rows, scores.rows)
    first = tuple(ranked[:top])
    write_bytes(absolute(output), "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in first).encode())
    return Ranking(
        run=run.folder.path,
        output=absolute(output),
        rows=first,
        num_rows=answers.num_rows,
        num_ranked=len(ranked),
        mean=sum(row.uncertainty for row in ranked) / len(ranked),
    )


def as_asked(run: RunToScore) -> RunToScore:
    """The run with nothing that would score an answer behind another prompt, or in another form, than the model wrote it in."""
    as_it_is = {"system": None, "max_turns": None, "reasoning": "keep", "train_empty_thought": True}
    data = run.config.data.model_copy(update=as_it_is | {"too_long": "drop"})
    return replace(run, config=run.config.model_copy(update={"data": data}))


def as_pair(row: AnsweredRow) -> Mapping[str, Any]:
    """A row with the model's answer, which alone carries loss."""
    asked = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
    before = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in asked]
    tools = {"tools": row.tools} if row.tools else {}
    return {"messages": [*before, {"role": "assistant", "content": row.answer}], **tools}


def ranked_rows(answers: Sequence[AnsweredRow], scores: Sequence[ScoredRow]) -> list[RankedRow]:
    """Answered rows with a score, the least certain first; of equal ones the earlier.

    Args:
        scores: of the answers' pairs, whose rows are the answers' numbers from 1.
    """
    found = [RankedRow(asked=answers[one.row - 1], uncertainty=one.loss) for one in sorted(scores, key=lambda one: one.row)]
    return sorted(found, key=lambda row: -row.uncertainty)
