"""Rows of a suite as questions: the prompt that a model continues, and the answer that the data expects or the choices that there
are; or a text whose loss is measured."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from raytune.config.sections.data import DataSource
from raytune.config.sections.evaluation import SuiteKind, SuiteSection
from raytune.data.conversations.conversation import Conversation, RowError
from raytune.data.rows.choices import ChoiceRow, read_choices
from raytune.data.rows.shards import Tally, bad_questions_error
from raytune.data.rows.source_rows import read_conversations
from raytune.data.store.store import Store
from raytune.data.templates.template import ChatTemplate
from raytune.errors import DataError
from raytune.evaluation.suite_metrics import SuiteMetric
from raytune.plan.run_plan import SuitePlan

MOST_LABELS = 100
SHOWN_CHARACTERS = 500
"""Of a text whose loss is measured, in samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    suite: str
    prompt: str
    prompt_ids: tuple[int, ...]
    """Of a text whose loss is measured: all of it."""
    expected: str = ""
    """The last assistant turn; of choices the right one."""
    choices: tuple[str, ...] = ()
    choice_ids: tuple[tuple[int, ...], ...] = ()
    """What each choice adds to the prompt."""
    targets: tuple[int, ...] = ()
    """Places of the tokens that a loss is of."""
    document: str = ""
    """Of a task of lm_eval: its row and what its task is like, as JSON."""
    requests: tuple[str, ...] = ()
    """What lm_eval asks of a model about it, as JSON: a kind of request, and its arguments."""

    @property
    def largest_token(self) -> int:
        return max(chain(self.prompt_ids, *self.choice_ids), default=0)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A row before it is rendered."""

    conversation: Conversation
    """With the right answer as its last turn."""
    choices: tuple[str, ...] = ()


def _read_chats(source: DataSource, downloads: Path, tally: Tally) -> Iterator[_Asked]:
    return map(_Asked, read_conversations(source, downloads, tally))


def _read_choices(source: DataSource, downloads: Path, tally: Tally) -> Iterator[_Asked]:
    return map(_chat_of, read_choices(source, downloads, tally))


def _chat_of(row: ChoiceRow) -> _Asked:
    turns = ({"role": "user", "content": row.question}, {"role": "assistant", "content": row.choices[row.right]})
    return _Asked(Conversation(messages=turns, origin=row.origin), row.choices)


_READ: Mapping[SuiteKind, Callable[[DataSource, Path, Tally], Iterator[_Asked]]] = {
    "answers": _read_chats,
    "labels": _read_chats,
    "choices": _read_choices,
}


def read_questions(
    suite: SuiteSection,
    key: str,
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    metrics: Mapping[str, SuiteMetric],
    downloads: Path,
) -> list[Question]:
    """Take the first rows of a suite that asks as questions.

    Args:
        key: of the config, that errors are about.

    Raises:
        DataError: if rows are bad, do not end with an answer, or end with one that a metric cannot judge by, the first few of
            them with file and line; or there are no rows.
    """
    examples = _rows(suite, suite.examples, f"{key}.examples", downloads, Tally())
    tally = Tally()
    found: list[tuple[_Asked, str, str]] = []
    for asked in _first(suite, suite.rows, downloads, tally):
        try:
            asked = replace(asked, conversation=_with_context(suite, asked.conversation, examples))
            prompt, expected = template.prompt(asked.conversation), template.expected(asked.conversation)
            if asked.choices:
                expected = str(asked.conversation.messages[-1]["content"])
            refusals = (f"for {name} {why}" for name, metric in metrics.items() if (why := metric.refusal(expected)))
            if refusal := next(refusals, None):
                raise RowError(refusal)
        except RowError as error:
            tally.add("bad", asked.conversation.origin, str(error))
            continue
        found.append((asked, prompt, expected))
    _refuse_bad(tally, f"{key}.rows", suite.rows, found)
    if suite.kind == "answers":
        return [
            Question(suite=suite.title, prompt=prompt, prompt_ids=ids_of(tokenizer, prompt), expected=expected)
            for _, prompt, expected in found
        ]
    labels = _labels(key, [expected for _, _, expected in found]) if suite.kind == "labels" else ()
    questions = []
    for asked, prompt, expected in found:
        try:
            questions.append(_of_choices(suite.title, asked, prompt, expected, labels or asked.choices, template, tokenizer))
        except RowError as error:
            tally.add("bad", asked.conversation.origin, str(error))
    _refuse_bad(tally, f"{key}.rows", suite.rows, questions)
    return questions


def read_texts(suite: SuiteSection, key: str, store: Store, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """The documents of a store, one in each of its rows, as texts whose loss is measured, in the order of their files.

    Raises:
        DataError: if there are none.
    """
    order = {file: place for place, file in enumerate(store.files)}
    places = [(order[file], line, row) for row in range(store.num_rows) for file, line in store.sources(row)]
    questions = []
    for _, _, number in sorted(places)[: suite.max_rows]:
        row = store.row(number)
        ids = row.input_ids.tolist()
        if targets := row.is_target.nonzero()[0].tolist():
            text = str(tokenizer.decode(ids))[:SHOWN_CHARACTERS]
            questions.append(Question(suite=suite.title, prompt=text, prompt_ids=tuple(ids), targets=tuple(targets)))
    if not questions:
        raise DataError(f"{key}.rows: {_paths(suite.rows)} hold nothing whose loss could be measured.", keys=(f"{key}.rows",))
    return questions


def to_json_lines(questions: Sequence[Question]) -> bytes:
    return "".join(json.dumps({name: value for name, value in asdict(one).items() if value}) + "\n" for one in questions).encode()


def from_json_lines(data: bytes) -> list[Question]:
    def of_line(line: dict[str, Any]) -> Question:
        choice_ids = tuple(map(tuple, line.get("choice_ids", ())))
        lists = {name: tuple(line.get(name, ())) for name in ("prompt_ids", "choices", "targets", "requests")}
        return Question(**{"prompt": "", **line, **lists, "choice_ids": choice_ids})

    return [of_line(json.loads(line)) for line in data.splitlines()]


def by_suite(suites: Sequence[SuitePlan], questions: Sequence[Question]) -> dict[str, list[Question]]:
    """The questions of each suite, in their order."""
    return {suite.name: [one for one in questions if one.suite == suite.name] for suite in suites}


# --- Details -----------------------------------------------------------------------------------------------------------------


def _first(suite: SuiteSection, sources: Sequence[DataSource], downloads: Path, tally: Tally) -> Iterator[_Asked]:
    for asked in chain.from_iterable(_READ[suite.kind](source, downloads, tally) for source in sources):
        if tally.counts["rows"] > suite.max_rows:
            return
        yield asked


def _rows(suite: SuiteSection, sources: Sequence[DataSource], key: str, downloads: Path, tally: Tally) -> list[Conversation]:
    """The conversations of examples, one more than are shown: the asked row is not shown itself."""
    most = None if suite.num_examples is None else suite.num_examples + 1
    found = []
    for asked in chain.from_iterable(_READ[suite.kind](source, downloads, tally) for source in sources):
        if asked.conversation.messages[-1:] and asked.conversation.messages[-1]["role"] == "assistant":
            found.append(asked.conversation)
        else:
            tally.add("bad", asked.conversation.origin, "its last turn is not an answer, which an example has to show")
        if len(found) == most:
            break
    if sources:
        _refuse_bad(tally, key, sources, found)
    return found


def _with_context(suite: SuiteSection, row: Conversation, examples: Sequence[Conversation]) -> Conversation:
    """A row behind the suite's system message and its examples."""
    own = row.messages[:1] if row.messages and row.messages[0]["role"] == "system" else ()
    if own and suite.system:
        raise RowError("has a system message of its own beside the suite's (system)")
    system = ({"role": "system", "content": suite.system},) if suite.system else own
    turns = row.messages[len(own) :]
    others = [_without_system(example) for example in examples if _without_system(example) != turns][: suite.num_examples]
    if suite.num_examples is not None and len(others) < suite.num_examples:
        raise RowError(f"of {suite.num_examples} examples (num_examples) there are {len(others)} besides the row itself")
    return replace(row, messages=(*system, *chain.from_iterable(others), *turns))


def _without_system(row: Conversation) -> tuple[dict[str, Any], ...]:
    return tuple(message for message in row.messages if message["role"] != "system")


def _labels(key: str, expected: Sequence[str]) -> tuple[str, ...]:
    labels = tuple(sorted(set(expected)))
    if not 2 <= len(labels) <= MOST_LABELS:
        raise DataError(
            f"{key}.rows expect {len(labels)} different answers, which are the labels of a suite of kind labels. It has 2 to "
            f"{MOST_LABELS}; set kind to answers to let the model write.",
            keys=(f"{key}.kind", f"{key}.rows"),
        )
    return labels


def _of_choices(
    name: str,
    asked: _Asked,
    prompt: str,
    expected: str,
    choices: tuple[str, ...],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
) -> Question:
    """A question with each choice as the template writes it behind the prompt, without the end of its turn.

    Raises:
        RowError: if it does not write them as they are.
    """
    *before, last = asked.conversation.messages
    answered = [replace(asked.conversation, messages=(*before, {**last, "content": choice})) for choice in choices]
    prompt_ids, choice_ids = ids_of(tokenizer, prompt), []
    for choice, rendered in zip(choices, template.render(answered, "last"), strict=True):
        if isinstance(rendered, RowError):
            raise rendered
        start, stop = rendered.targets[-1]
        if (at := rendered.text.find(choice, start, stop)) < 0:
            raise RowError(f"the template does not write the choice {choice!r} as it is")
        written = rendered.text[start : at + len(choice)]
        together = ids_of(tokenizer, prompt + written)
        is_begun = together[: len(prompt_ids)] == prompt_ids  # else a token spans both, which a model that is asked never sees
        choice_ids.append(together[len(prompt_ids) :] if is_begun else ids_of(tokenizer, written))
    return Question(
        suite=name, prompt=prompt, prompt_ids=prompt_ids, expected=expected, choices=choices, choice_ids=tuple(choice_ids)
    )


def _refuse_bad(tally: Tally, key: str, sources: Sequence[DataSource], found: Sequence[object]) -> None:
    if tally.counts["bad"]:
        raise bad_questions_error(tally, key)
    if not found:
        raise DataError(f"{key}: {_paths(sources)} hold no rows.", keys=(key,))


def _paths(sources: Sequence[DataSource]) -> str:
    return ", ".join(source.path for source in sources)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tuple(ids)
