"""Chat templates at work: the text that one makes of a conversation, and what of that text is trained.

Templates need no `{% generation %}` markers: `turn_spans` finds where each answer lies. Most rows are chats whose text is
known from what the template made of a probe, and compared with it letter by letter. Any other row is rendered once more with
marks around its fields, which shows where they lie and which of them are left out. What is not shown cannot be trained, and
is refused. Markers, where a template has them, are obeyed.

Longer than most files, because a template is one object: what it renders, what of that is trained and what is said of it lean on
the same probes.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from raytune.data.conversations.conversation import NOT_FOR_TEMPLATES, Conversation, Message, Origin, RowError
from raytune.data.conversations.fields import EMPTY_THOUGHT, Field, Marks, Span, fields_of, has_reasoning, has_thought
from raytune.data.conversations.masking import Targets, trained_turns, weight_of
from raytune.data.templates.date import date_notes
from raytune.data.templates.rendering import Job, Renderer
from raytune.data.templates.text import SHIPPED, name_of
from raytune.data.templates.turn_ends import TurnEnds
from raytune.data.templates.turn_spans import Answer, TurnSpans, Undelimited
from raytune.errors import DataError

_PLAIN_KEYS = {"role", "content"} | NOT_FOR_TEMPLATES
_PROBE: list[Message] = [{"role": "user", "content": "Probe0user"}, {"role": "assistant", "content": "Probe1assistant"}]
_LONGER_PROBE: list[Message] = [
    *_PROBE,
    {"role": "user", "content": "Probe2user"},
    {"role": "assistant", "content": "Probe3assistant"},
]
_ALL_ASKED = 8
"""Answers of a chat up to which the prompt of each is rendered: of a long chat that would be all its beginnings."""
# What is marked at once: all, or less where a template looks at what is marked and would write another text.
_ALL_KINDS = ("content", "thought", "reasoning", "argument", "name", "tools")
_MARKED_KINDS = (_ALL_KINDS, _ALL_KINDS[:4], _ALL_KINDS[:3], _ALL_KINDS[:2], _ALL_KINDS[:1])


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a template made of a conversation."""

    text: str
    targets: list[Span]
    """Where the trained text lies: start and end of each piece, in characters."""
    weights: list[float]
    """Of each piece: how much its targets count."""
    num_hidden_thoughts: int = 0
    """Thoughts of the conversation that the template does not show."""

    @property
    def num_empty_thoughts(self) -> int:
        """Pieces that begin with one."""
        return sum(EMPTY_THOUGHT.match(self.text, *span) is not None for span in self.targets)


def behind_empty_thoughts(rendered: Rendered) -> Rendered:
    """The same, but what is trained begins behind the empty thoughts."""
    found = ((EMPTY_THOUGHT.match(rendered.text, *span), span) for span in rendered.targets)
    return replace(rendered, targets=[(empty.end() if empty else start, stop) for empty, (start, stop) in found])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """What the template writes around the turns of a plain chat."""

    ask: str
    """Between a question and an answer in the middle of a chat."""
    last_ask: str
    prompt: str
    """The part of both that the generation prompt writes."""
    reply: str
    """Between an answer and the next question."""
    end: str
    """The part of it that ends the answer."""
    behind: str
    """Behind the last answer."""


class ChatTemplate:
    """A template and the tokenizer whose special tokens it writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        """
        Raises:
            DataError: if the text is no template, or has no way to tell an answer from what surrounds it.
        """
        self.text = text
        self._name = name_of(text, tokenizer)
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer, text, self._name)
        self._ends = TurnEnds(self._renderer, tokenizer)
        try:
            self._renderer.apply([_PROBE], None, False)
        except TemplateSyntaxError as error:
            raise DataError(f"data.template: line {error.lineno} is not Jinja: {(error.message or '').rstrip('.')}.") from error
        except DataError:
            raise
        except Exception:  # a template may refuse the probe and still be right for the rows
            return
        probe = Conversation(messages=tuple(_PROBE), origin=Origin("probe", 1))
        if isinstance(rendered := self.render([probe], "assistant")[0], RowError):
            raise DataError(f"data.template: {rendered}")

    @property
    def roles_without_names(self) -> frozenset[str]:
        return self._renderer.roles_without_names

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer or a tool call: the first special ones behind the last turn of a conversation.

        Empty where the template ends turns with text that is no token. What ends earlier turns does not count where the last one
        has an end of its own: it may stand between the parts of one answer, too.
        """
        answer, call = self._ends.last("assistant") or "", self._ends.last("call") or ""
        middle, middle_call = self._ends.behind("assistant", "user", False), self._ends.behind("call", "tool", False)
        stops = [
            self._ends.first_special(answer) or self._ends.first_special(middle.stop if middle else ""),
            self._ends.last_special(call) or self._ends.last_special(middle_call.stop if middle_call else ""),
        ]
        if not stops[0] and not answer.strip() and self._eos:
            stops[0] = self._eos
        vocabulary = self._tokenizer.get_vocab()
        return list(dict.fromkeys(vocabulary[stop] for stop in stops if stop in vocabulary))

    @cached_property
    def notes(self) -> list[str]:
        """What a user should know of how this template trains and would not see from it."""
        notes = []
        text = self._renderer.one(Job(_PROBE))
        written = self._ends.markers_in(text) if isinstance(text, str) else []
        notes += date_notes(self.text, text) if isinstance(text, str) else []
        foreign = {marker: len(ids) for marker in written if len(ids := self._ids(marker)) > 1}
        cannot_stop = "" if self.stop_ids else " No token ends an answer, so that generation cannot stop where it ends."
        if foreign:
            listed = ", ".join(f"{marker} ({count} tokens)" for marker, count in foreign.items())
            notes.append(
                f"{self._name} writes markers that are no tokens of this tokenizer, trained as plain text: {listed}.{cannot_stop}"
            )
        elif cannot_stop:
            notes.append(f"{self._name} ends answers with text that is no token.{cannot_stop}")
        rendered = self.render([Conversation(messages=tuple(_PROBE), origin=Origin("probe", 1))], "assistant")[0]
        if isinstance(rendered, Rendered) and isinstance(text, str) and rendered.text != text:
            appended = rendered.text[len(text.rstrip()) :].strip()
            notes.append(f"{self._name} does not end the last answer of a chat; {appended!r} is put behind it and trained.")
        if header := self._trained_header:
            notes.append(
                f"{self._name} has no generation prompt (add_generation_prompt changes nothing), so that a model is asked "
                f"without {header!r} and trained to write it in front of each answer."
            )
        end = self._ends.behind("assistant", "user", False)
        if self._ends.last("assistant") is not None and self._ends.next_marker:
            notes.append(
                f"{self._name} ends an answer with the marker of the next turn ({self._ends.next_marker}). The last answer of "
                f"a chat has none behind it, so its end is not trained; a copy of the template that writes one there trains it."
            )
        if end is not None and not end.stop and self._ends.tail("assistant", "user", False) is not None:
            notes.append(f"{self._name} does not end answers that another turn follows; only the text of those is trained.")
        return notes

    @property
    def _trained_header(self) -> str:
        """What is trained in front of an answer because the template has no generation prompt; empty if it has one."""
        asked, plain, text = self._renderer.texts([Job(_PROBE[:1], None, True), Job(_PROBE[:1]), Job(_PROBE)])
        rendered = self.render([Conversation(messages=tuple(_PROBE), origin=Origin("probe", 1))], "assistant")[0]
        if asked != plain or isinstance(asked, RowError) or isinstance(text, RowError) or isinstance(rendered, RowError):
            return ""
        return rendered.text[rendered.targets[0][0] : rendered.text.find(_PROBE[1]["content"])].strip()

    def render(self, conversations: Sequence[Conversation], targets: Targets) -> list[Rendered | RowError]:
        """Render conversations and find the text that carries loss.

        Returns:
            For each conversation its text and targets, or why it cannot be trained with this template.
        """
        texts = self._renderer.texts([Job(row.messages, row.tools) for row in conversations])
        plain = [self._plain_answers(row, text) if isinstance(text, str) else None for row, text in zip(conversations, texts)]
        turns = [_turns_to_find(row, targets) for row in conversations]
        unknown = [
            set() if answers is not None and row_turns <= answers.keys() else row_turns
            for row_turns, answers in zip(turns, plain)
        ]
        prompts = self._prompts(conversations, [() if len(row_turns) > _ALL_ASKED else row_turns for row_turns in unknown])
        rendered: list[Rendered | RowError] = []
        for index, (row, text, row_turns, answers) in enumerate(zip(conversations, texts, turns, plain, strict=True)):
            if isinstance(text, RowError):
                rendered.append(text)
                continue
            try:
                if answers is None or unknown[index]:
                    answers = self._answers(row, text, row_turns, prompts[index])
                trained = [(answer, weight_of(row.messages[turn])) for turn in sorted(row_turns) for answer in answers[turn]]
                hidden = 0 if answers is plain[index] else _num_hidden(row, text)  # a plain chat has no thoughts
                rendered.append(_assembled(text, trained, targets, hidden))
            except Undelimited as error:
                rendered.append(
                    RowError(
                        f"{self._name} cannot be used for training as it is: {error}. Put {{% generation %}} and "
                        f"{{% endgeneration %}} around its answers, or set data.template to one of {', '.join(SHIPPED)}"
                    )
                )
            except RowError as error:
                rendered.append(error)
        return rendered

    def prompt(self, conversation: Conversation) -> str:
        """The text that a model continues with the last answer of the conversation, which is left out.

        Raises:
            RowError: if the last turn is not an answer, or the template cannot render the ones before it.
        """
        *before, last = conversation.messages or ({"role": None},)
        if last["role"] != "assistant" or not before:
            raise RowError("its last turn is not an answer to something, which there has to be to ask for it")
        text = self._renderer.one(Job(before, conversation.tools, True))
        if isinstance(text, RowError):
            raise text
        return text

    def prompts(self, conversation: Conversation, turns: Sequence[int]) -> list[str | RowError]:
        """The generation prompts for turns of a conversation, in the order given, or why there is none."""
        found = self._prompts([conversation], [set(turns)])[0]
        return [found[turn] for turn in turns]

    def expected(self, conversation: Conversation) -> str:
        """The last answer as a model that has learned the template writes it, special tokens aside.

        That of an answer in words is its content, unless the template writes words in front of it (an empty thought, say), which
        a tuned model then writes too. A thought or a tool call is what the template makes of it.

        Raises:
            RowError: if the template cannot render it.
        """
        last = conversation.messages[-1]
        content = str(last.get("content") or "").strip()
        asked_for = {key: value for key, value in last.items() if key != "train"}  # it need not be trained to be asked for
        rendered = self.render([replace(conversation, messages=(*conversation.messages[:-1], asked_for))], "last")[0]
        if isinstance(rendered, RowError):
            raise rendered
        # A template may mark an answer in several pieces, of which the last may be the token that ends it.
        written = "".join(rendered.text[start:stop] for start, stop in rendered.targets)
        at = written.find(content)
        if not last.get("tool_calls") and at >= 0 and not written[:at].strip():
            return content
        return str(self._tokenizer.decode(self._ids(written), skip_special_tokens=True)).strip()

    # --- Plain chats ---------------------------------------------------------------------------------------------------------

    def _plain_answers(self, row: Conversation, text: str) -> dict[int, list[Answer]] | None:
        """The answers of a chat whose text is, letter by letter, its turns and what the frame puts around them.

        Letter by letter from the end, so that it does not matter what stands in the turns. None if the row is more than a chat,
        or its text is another.
        """
        frame, first = self._frame, int(row.messages[:1] != () and row.messages[0]["role"] == "system")
        turns = row.messages[first:]
        if frame is None or row.tools is not None or not turns or len(turns) % 2:
            return None
        pieces, spans = [], {}
        length = 0
        for index, message in enumerate(turns):
            content, is_answer = message.get("content"), index % 2 == 1
            is_last = index == len(turns) - 1
            if (
                message["role"] != ("assistant" if is_answer else "user")
                or not message.keys() <= _PLAIN_KEYS
                or not isinstance(content, str)
                or (is_answer and has_thought(content))
            ):
                return None
            glue = (
                (frame.behind if is_last else frame.reply) if is_answer else (frame.ask, frame.last_ask)[index == len(turns) - 2]
            )
            if is_answer:
                stop = length + len(content) + len(frame.behind.rstrip() if is_last else frame.end)
                spans[first + index] = (length - len(pieces[-1]) + len(frame.prompt), stop)
            pieces += [content, glue]
            length += len(content) + len(glue)
        if not text.endswith("".join(pieces)):
            return None
        before = len(text) - length
        if first and str(row.messages[0].get("content") or "").strip() not in text[:before]:
            return None
        return {turn: [Answer(before + start, before + stop)] for turn, (start, stop) in spans.items()}

    @cached_property
    def _frame(self) -> _Frame | None:
        """What stands around the turns of a probe; None if the template has no such frame or its last answer is left open."""
        end = self._ends.behind("assistant", "user", False)
        text, prompt = self._renderer.texts([Job(_LONGER_PROBE), Job(_LONGER_PROBE[:1], None, True)])
        if self._renderer.has_markers or end is None or not end.stop or not (isinstance(text, str) and isinstance(prompt, str)):
            return None
        pieces = re.split("|".join(message["content"] for message in _LONGER_PROBE), text)
        _, found, asked = prompt.rpartition(_LONGER_PROBE[0]["content"])
        if len(pieces) != len(_LONGER_PROBE) + 1 or not found:
            return None
        _, ask, reply, last_ask, behind = pieces
        is_regular = ask.startswith(asked) and last_ask.startswith(asked) and reply.startswith(end.text)
        if not is_regular or not behind.strip() or self._ends.adds_turn("assistant"):
            return None
        return _Frame(ask=ask, last_ask=last_ask, prompt=asked, reply=reply, end=end.text, behind=behind)

    # --- Any row -------------------------------------------------------------------------------------------------------------

    def _answers(
        self, row: Conversation, text: str, turns: set[int], prompts: Mapping[int, str | RowError]
    ) -> dict[int, list[Answer]]:
        """The trained pieces of each turn.

        Raises:
            RowError: if a turn cannot be told apart, or something that the row has is not shown.
        """
        blocks = self._renderer.generation_blocks(row.messages, row.tools) if self._renderer.has_markers else []
        try:
            places = self._places(row, text, turns)
        except Undelimited:
            in_order = [turn for turn, message in enumerate(row.messages) if message["role"] == "assistant"]
            if len(blocks) != len(in_order) or not turns <= {*in_order}:
                raise
            return {turn: [Answer(*block)] for turn, block in zip(in_order, blocks) if turn in turns}

        def up_to(num_messages: int) -> str | RowError:
            return self._renderer.one(Job(row.messages[:num_messages], row.tools))

        found = TurnSpans(row, text, places, self._ends, up_to, self._eos)
        said = sorted(turn for turn in turns if row.messages[turn]["role"] == "assistant")
        starts = self._starts(row, found, said, prompts)
        answers = {}
        for turn in turns:
            if row.messages[turn]["role"] != "assistant":
                answers[turn] = [Answer(*found.other(turn))]
            elif self._renderer.has_markers:
                answers[turn] = found.marked(turn, blocks, starts[turn])
            else:
                answers[turn] = [found.answer(turn, starts[turn])]
        return answers

    def _prompts(
        self, conversations: Sequence[Conversation], turns: Sequence[Collection[int]]
    ) -> list[dict[int, str | RowError]]:
        """For each conversation the generation prompts of its trained answers, by turn; all are rendered at once."""
        wanted = [
            (index, turn)
            for index, row in enumerate(conversations)
            for turn in turns[index]
            if turn > 0 and conversations[index].messages[turn]["role"] == "assistant"
        ]
        texts = self._renderer.texts([Job(conversations[i].messages[:turn], conversations[i].tools, True) for i, turn in wanted])
        nothing_before = RowError("no turn comes before it")
        prompts: list[dict[int, str | RowError]] = [dict.fromkeys(row_turns, nothing_before) for row_turns in turns]
        for (index, turn), text in zip(wanted, texts, strict=True):
            prompts[index][turn] = text
        return prompts

    def _starts(
        self, row: Conversation, found: TurnSpans, turns: Sequence[int], prompts: Mapping[int, str | RowError]
    ) -> dict[int, int]:
        """Where answers begin.

        Of those of a long chat in front of which stands the same, the first, the middle and the last are asked for. Where they
        begin at one place behind that, so do the others: not all beginnings of the chat are rendered.

        Args:
            prompts: of the answers; of more than are all asked for none.
        """
        begins = found.marked_start if self._renderer.has_markers else found.start
        if len(turns) <= _ALL_ASKED:
            return {turn: begins(turn, prompts[turn]) for turn in turns}

        def asked(some: Collection[int]) -> dict[int, int]:
            prompts = self._prompts([row], [some])[0]
            return {turn: begins(turn, prompts[turn]) for turn in sorted(some)}

        gaps = {turn: gap for turn in turns if (gap := found.in_front(turn))}
        alike: dict[tuple[str, ...], list[int]] = {}
        for turn, gap in gaps.items():
            alike.setdefault(gap.kind, []).append(turn)
        starts = asked({turn for same in alike.values() for turn in (same[0], same[len(same) // 2], same[-1])})
        for same in alike.values():
            behind = {starts[turn] - gaps[turn].start for turn in same if turn in starts}
            if len(behind) == 1 and 0 <= (offset := behind.pop()) <= gaps[same[0]].length:
                starts |= {turn: gaps[turn].start + offset for turn in same}
        return starts | asked({*turns} - starts.keys())

    def _places(self, row: Conversation, text: str, trained: set[int]) -> dict[Field, list[Span]]:
        """Where the fields of a row lie in its text.

        Raises:
            RowError: if the text cannot be told apart, or leaves out something that the row has.
        """
        fields = fields_of(row)
        marks = Marks.absent_from(text)
        if marks is None:
            raise RowError("has all the signs with which raytune looks for a turn in the text, ⸨0⸩ ⦗0⦘ ⟬0⟭; take one of them out")
        for kinds in _MARKED_KINDS:
            marked_fields = [field for field in fields if field.kind in kinds]
            messages, tools = marks.around(marked_fields, row)
            marked = self._renderer.one(Job(messages, tools))
            if isinstance(marked, RowError):
                continue
            without, places = marks.taken_out(marked, marked_fields)
            if without == text:
                for field in fields:
                    is_shown = _is_shown(field, row, text, places) if field.kind in kinds else field.text in text
                    if not is_shown:
                        self._refuse_hidden(field, row, trained)
                return places
        raise Undelimited("what it writes changes with the words of a turn, so that they cannot be found in its text")

    def _refuse_hidden(self, field: Field, row: Conversation, trained: set[int]) -> None:
        """A thought in a turn that is not trained may be left out, as a model's own template does; anything else is missed.

        Raises:
            RowError: naming the field and the template.
        """
        if field.turn is None:
            raise RowError(f"{self._name} does not show the tools that the row offers. {_OTHER_TEMPLATE}")
        is_thought = field.kind in ("thought", "reasoning")
        if is_thought and field.turn not in trained:
            return
        role = row.messages[field.turn]["role"]
        what = f"{field.name} of turn {field.turn + 1} ({role})"
        if is_thought and any(message["role"] == "assistant" for message in row.messages[field.turn + 1 :]):
            raise RowError(
                f"{self._name} strips {what}, so that it cannot be trained. If it keeps the thoughts of the last answer, "
                f"data.reasoning: each trains every answer as the last one, data.targets: last that one alone; data.reasoning: "
                f"last leaves out the thoughts of earlier ones"
            )
        if is_thought:
            raise RowError(
                f"{self._name} strips {what}, so that it cannot be trained. Take the thoughts out of the rows, or {_OTHER}"
            )
        raise RowError(f"{self._name} does not show {what}. {_OTHER_TEMPLATE}")

    @property
    def _eos(self) -> str:
        eos: Any = self._tokenizer.eos_token
        return eos or ""

    def _ids(self, text: str) -> list[int]:
        ids: Any = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


_OTHER = "set data.template to a template that shows them"
_OTHER_TEMPLATE = "Take it out of the row, or set data.template to a template that shows it"


def _num_hidden(row: Conversation, text: str) -> int:
    if not any(map(has_reasoning, row.messages)):
        return 0
    return sum(field.kind in ("thought", "reasoning") and field.text not in text for field in fields_of(row))


def _turns_to_find(row: Conversation, targets: Targets) -> set[int]:
    """The turns whose place is needed; where all text is trained, the last answer, whose end may be missing."""
    if targets != "all":
        return set(trained_turns(row.messages, targets))
    return {len(row.messages) - 1} if row.messages[-1]["role"] == "assistant" else set()


def _assembled(text: str, answers: Sequence[tuple[Answer, float]], targets: Targets, num_hidden: int) -> Rendered:
    """The text with its trained pieces.

    Args:
        answers: each with the weight of its turn.
        num_hidden: thoughts that are not in the text.
    """
    missing = next((answer for answer, _ in answers if answer.missing), None)
    if missing is not None:
        text = text[: missing.stop] + missing.missing
    if targets == "all":
        return Rendered(text, [(0, len(text))], [1.0], num_hidden)
    pieces = sorted(((answer.start, answer.stop + len(answer.missing)), weight) for answer, weight in answers)
    if any(stop > start for ((_, stop), _), ((start, _), _) in pairwise(pieces)):
        raise Undelimited("it does not say where one of several answers in a row ends and the next begins")
    return Rendered(text, [span for span, _ in pieces], [weight for _, weight in pieces], num_hidden)


def _is_shown(field: Field, row: Conversation, text: str, places: Mapping[Field, list[Span]]) -> bool:
    """Whether a field comes out, and whole where it is what an assistant says. Case and white space are the template's."""
    if field not in places:
        return False
    if (
        field.kind not in ("content", "thought", "reasoning")
        or field.turn is None
        or row.messages[field.turn]["role"] != "assistant"
    ):
        return True
    said = "".join(field.text.casefold().split())
    return any("".join(text[start:stop].casefold().split()) == said for start, stop in places[field])
