"""The gate between rows and training: what becomes of rows against `data.limits` and the policies beside it. Pure.

One table of rules over the counts of a `DataReport`. Who builds the data of a run refuses what exceeds one, whether its stores
were just made or found; `raytune data check` shows all verdicts instead.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

from raytune.config.sections.data import DataSection
from raytune.config.sections.data_limits import LimitsSection, waived
from raytune.errors import DataError
from raytune.plan.data.data_report import DataReport, SourceReport, StoreReport, source_label, stores_of
from raytune.plan.data.row_lengths import length_of_share

PROMPT_MISMATCH = 0.02
"""Of the compared answers of a source. More than that is how its rows or the template are made, and not a stray row."""
LOST = {
    "bad": "{row}",
    "no_target": "{row}: no target",
    "cut_off": "{row}: its targets lie behind data.max_length",
    "dropped": "{row}: longer than data.max_length",
}
"""Counts of rows that are not trained at all, and how a row of each is told."""

_PLACE = re.compile(r"(.+?:\d+)(?:: |$)", re.DOTALL)


class Policies(Protocol):
    """What a config says of rows that are not as they should be: `data`, or the part of it that workers know."""

    @property
    def limits(self) -> LimitsSection: ...

    @property
    def on_bad_row(self) -> str: ...

    @property
    def on_prompt_mismatch(self) -> str: ...

    @property
    def too_long(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What may not be true of too many rows of a source."""

    name: str
    """As its count is called in `SourceReport`, and its limit in `data.limits`."""
    key: str
    limit: Callable[[Policies], float | None]
    """Share that is let pass; None where the config does not ask."""
    count: Callable[[SourceReport], int]
    of: Callable[[SourceReport], int]
    """How many there are in all."""
    unit: str
    are: str
    """What is true of those that are counted."""
    why: str
    fix: str
    waiver: str
    """What to set where it is as it should be."""
    examples: Callable[[SourceReport], Sequence[str]]
    """The first of them, with file and line."""


def _limit(name: str) -> Callable[[Policies], float]:
    return lambda data: getattr(data.limits, name)


def _rule(name: str, are: str, why: str, fix: str, **changes: Any) -> Rule:
    """A rule of `data.limits` over all rows that were read for this use."""
    usual: dict[str, Any] = {
        "name": name,
        "key": f"data.limits.{name}",
        "limit": _limit(name),
        "count": attrgetter(name),
        "of": lambda source: source.rows - source.held_out - source.filtered,
        "unit": "rows",
        "are": are,
        "why": why,
        "fix": fix,
        "waiver": f"data.limits.{name} to {{share}}",
        "examples": lambda source: source.examples.get(name, []),
    }
    return Rule(**(usual | changes))


RULES = (
    _rule(
        "bad",
        "cannot be read or rendered",
        "Nothing of them is trained.",
        "Repair them.",
        key="data.on_bad_row",
        limit=lambda data: 0.0 if data.on_bad_row == "error" else None,
        waiver="data.on_bad_row to skip",
    ),
    _rule(
        "dropped",
        "are longer than data.max_length",
        "Nothing of them is trained.",
        "Raise data.max_length (95 % of the rows have at most {most} tokens).",
        key="data.too_long",
        limit=lambda data: 0.0 if data.too_long == "error" else None,
        waiver="data.too_long to truncate, drop or split",
    ),
    _rule(
        "lost",
        "are not trained at all",
        "A model that is trained on the rest may be another one than was meant.",
        "Repair what is lost, or see data.on_bad_row, data.targets, data.max_length and data.too_long.",
        count=lambda source: sum(getattr(source, name) for name in LOST),
        examples=lambda source: [form.format(row=row) for name, form in LOST.items() for row in source.examples.get(name, [])],
    ),
    _rule(
        "no_target",
        "have no target",
        "Nothing in them is to be trained, as if they were not there.",
        "See whether data.targets means the roles that these rows have, and whether they give their turns weight 0.",
    ),
    _rule(
        "cut",
        "lose trained tokens behind data.max_length",
        "A model that sees answers end anywhere learns to end them anywhere.",
        "Raise data.max_length (95 % of the rows have at most {most} tokens), or set data.too_long to drop or split.",
        count=lambda source: 0 if source.format == "text" else source.cut,
    ),
    _rule(
        "unending",
        "end in a target that is no special token",
        "A model that is not trained to end its turn does not stop.",
        "Choose a data.template whose end of turn is a token of this tokenizer and stands behind the last answer, too; "
        "model.new_tokens makes a text one token.",
        of=attrgetter("used"),
    ),
    _rule(
        "double_bos",
        "begin with two beginning-of-text tokens",
        "No prompt will begin so.",
        "Take the token out of the rows, or out of data.template.",
    ),
    _rule(
        "prompt_trained",
        "have their question trained, though data.targets does not ask for that",
        "A model learns to write questions, and what it is to answer has the smaller part in the loss.",
        "Give chats as turns (format messages, or prompt_completion with a prompt and a completion), and answers without their "
        "question.",
    ),
    _rule(
        "blank_answers",
        "have a trained answer, or a text, that is empty or only white space",
        "A model learns to say nothing.",
        "Leave them out, or see whether data.train.columns names the right column.",
    ),
    _rule(
        "prompts_differ",
        "are trained behind other tokens than their prompt has",
        "A tuned model would be asked what it was not taught.",
        "Move white space from the end of a prompt to the beginning of its answer, write what the prompt opens (a thought, say) "
        "into the answers, or choose another data.template.",
        key="data.on_prompt_mismatch",
        limit=lambda data: PROMPT_MISMATCH if data.on_prompt_mismatch == "error" else None,
        of=attrgetter("prompts_compared"),
        unit="compared answers",
        waiver="data.on_prompt_mismatch to accept",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A rule, and what there is of it in a source."""

    rule: Rule
    use: str
    """What the rows are read for: training, validation, ..."""
    source: str
    count: int
    of: int
    limit: float
    examples: tuple[str, ...]
    """The first rows, with file and line."""
    most: int
    """Tokens that 95 % of the rows have at most."""

    @property
    def share(self) -> float:
        return self.count / self.of if self.of else 0.0

    @property
    def is_exceeded(self) -> bool:
        return self.share > self.limit

    @property
    def line(self) -> str:
        """Count, share and limit."""
        word = "STOPS" if self.is_exceeded else "ok"
        counted = f"{self.count} of {self.of} {self.rule.unit}"
        return f"{word:5}  {self.rule.name:14}  {counted}, {_percent(self.share)}; {self.rule.key}: {_percent(self.limit)}"

    @property
    def text(self) -> str:
        """What is wrong, which rows come first, why it matters and what to do."""
        rule, rows = self.rule, list(self.examples)
        more = [f"and {self.count - len(rows)} more"] if self.count > len(rows) and rows else []
        waiver = rule.waiver.format(share=f"{math.ceil(100 * self.share) / 100:g}")
        fix = rule.fix.format(most=self.most)
        return "\n".join(
            [
                f"{source_label(self.use, self.source)}: {self.count} of {self.of} {rule.unit} ({_percent(self.share)}) "
                f"{rule.are}, more than {_percent(self.limit)} ({rule.key}):",
                *(f"  {row}" for row in [*rows, *more]),
                f"{rule.why} {fix} If it is as it should be, set {waiver}.",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.use,
            "source": self.source,
            "rule": self.rule.name,
            "key": self.rule.key,
            "count": self.count,
            "of": self.of,
            "share": self.share,
            "limit": self.limit,
            "is_exceeded": self.is_exceeded,
            "examples": list(self.examples),
        }


def verdicts(report: DataReport, data: DataSection) -> list[Verdict]:
    """What `data.limits` and the policies beside it say of the rows of a run.

    The sides that a split holds out are not judged: their rows are of the same files as those that are.
    """
    of_split = [*(report.validation.values() if data.holds_out else ()), *(report.test.values() if data.test_fraction else ())]
    judged = {use: store for use, store in stores_of(report) if not any(store is side for side in of_split)}
    return verdicts_of(judged, data)


def verdicts_of(stores: Mapping[str, StoreReport], data: Policies) -> list[Verdict]:
    """Args:
    stores: by what their rows are read for.
    """
    return [
        _verdict(rule, limit, use, source)
        for use, store in stores.items()
        for source in store.sources
        for rule in RULES
        if (limit := rule.limit(data)) is not None
    ]


def refuse_exceeded(found: Sequence[Verdict]) -> None:
    """Refuse rows of which more than a limit are not as they should be.

    Raises:
        DataError: with count, share, limit, the first rows, why it matters and what to do, of each limit that is exceeded.
    """
    exceeded = [verdict for verdict in found if verdict.is_exceeded]
    if not exceeded:
        return
    first = next((match[1] for verdict in exceeded for row in verdict.examples if (match := _PLACE.match(row))), None)
    look = [f"`raytune data preview CONFIG --row {first}` shows how the first one is trained."] if first else []
    keys = dict.fromkeys(verdict.rule.key for verdict in exceeded)
    raise DataError("\n".join([*(verdict.text for verdict in exceeded), *look]), keys=tuple(keys))


def without_limits(data: DataSection) -> DataSection:
    """The same rows, whatever becomes of them: what would stop a run is left out and counted."""
    too_long = "drop" if data.too_long == "error" else data.too_long
    policies = {"on_bad_row": "skip", "on_prompt_mismatch": "accept", "too_long": too_long}
    return data.model_copy(update=policies | {"limits": waived()})


def _verdict(rule: Rule, limit: float, use: str, source: SourceReport) -> Verdict:
    return Verdict(
        rule=rule,
        use=use,
        source=source.name,
        count=rule.count(source),
        of=rule.of(source),
        limit=limit,
        examples=tuple(rule.examples(source)),
        most=length_of_share(source.lengths, 0.95),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
