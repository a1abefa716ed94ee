"""Where each turn of a conversation lies in the text that a template made of it. Pure: texts and places in, spans out.

An answer begins where the template's own generation prompt for the turns before it ends, since that is where the model will begin
to write. It ends with its end-of-turn text, which is looked for between the answer's last words and the first words of the next
turn, and nowhere else.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from raytune.data.conversations.conversation import Conversation, RowError
from raytune.data.conversations.fields import Field, Span
from raytune.data.templates.turn_ends import TurnEnd, TurnEnds

# A prompt and a text share a header if they share this many characters of it.
_MIN_HEADER = 3


class Undelimited(RowError):
    """The template, rather than the row, is what has to change."""


@dataclass(frozen=True, slots=True)
class Answer:
    start: int
    stop: int
    missing: str = ""
    """The end of turn that the template leaves out behind the last turn; it is put behind `stop`, and trained."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Between the last words of a turn and the first ones of the answer that follows it."""

    start: int
    length: int
    kind: tuple[str, ...]
    """What it says, and between which kinds of turns."""


class TurnSpans:
    """The turns of one conversation.

    Args:
        places: where its fields lie in `text`; fields that the template does not show are absent.
        up_to: the text of the first n messages.
        eos: what ends a last answer that the template never ends; empty if the tokenizer has no such token.
    """

    def __init__(
        self,
        row: Conversation,
        text: str,
        places: Mapping[Field, Sequence[Span]],
        ends: TurnEnds,
        up_to: Callable[[int], str | RowError],
        eos: str,
    ) -> None:
        self._row, self._text, self._ends, self._up_to, self._eos = row, text, ends, up_to, eos
        self._with_tools = row.tools is not None
        self._own: dict[int, list[Span]] = {}
        self._repeated = {field.turn for field, spans in places.items() if field.kind not in ("name", "tools") and len(spans) > 1}
        for field, spans in places.items():
            # The name of a tool may be written elsewhere too; it says nothing about where a turn lies if anything else does.
            if field.turn is not None and field.kind != "name":
                self._own.setdefault(field.turn, []).append((spans[0][0], spans[0][1] + field.tag))
        for field, spans in places.items():
            if field.turn is not None and field.turn not in self._own:
                self._own[field.turn] = [spans[0]]
        # Turns whose first field is what they say: other words may stand before the name of a tool that is called.
        self._says_first = {
            turn
            for turn, own in self._own.items()
            if any(
                spans[0][0] == min(own)[0]
                for field, spans in places.items()
                if field.turn == turn and field.kind not in ("name", "argument")
            )
        }

    def answer(self, turn: int, start: int) -> Answer:
        """What the model writes in an assistant turn.

        Args:
            start: where that begins.

        Raises:
            RowError: if the text does not show where the turn begins and ends, or holds another turn in the middle of it.
        """
        own = self._own.get(turn)
        if turn in self._repeated:
            raise Undelimited(f"it writes the answer in turn {turn + 1} more than once")
        lower = max((stop for _, stop in own), default=start) if own else start
        others = [(other, span) for other, spans in self._own.items() if other != turn for span in spans]
        if inside := next((other for other, (at, _) in others if start <= at < lower), None):
            role = self._row.messages[inside]["role"]
            raise Undelimited(f"it writes turn {inside + 1} ({role}) in the middle of the answer in turn {turn + 1}")
        upper = min((at for _, (at, _) in others if at >= lower), default=len(self._text))
        if turn == len(self._row.messages) - 1:
            return self._last(turn, start, lower)
        return Answer(start, self._stop_between(turn, self._row.messages[turn + 1]["role"], lower, upper))

    def marked(self, turn: int, blocks: Sequence[Span], written: int) -> list[Answer]:
        """What `{% generation %}` blocks hold of an assistant turn, each with the end-of-turn text right behind it.

        What the generation prompt writes, a header in the block, is not the model's and not trained.

        Args:
            written: where what the prompt writes ends.

        Raises:
            RowError: if they hold nothing of it.
        """
        lower, upper = self._bounds(turn)
        own = [
            (max(start, written), stop)
            for start, stop in self._blocks_of(turn, blocks)
            if lower <= start < max(upper, lower + 1) and stop >= written
        ]
        if not own:
            raise RowError(f"the {{% generation %}} blocks of its chat template leave out the answer in turn {turn + 1}")
        is_last = turn == len(self._row.messages) - 1
        follower = "user" if is_last else self._row.messages[turn + 1]["role"]
        stops = [end.stop for end in self._possible_ends(turn, follower) if end.stop]
        ends = [re.compile(r"\s*" + re.escape(stop)) for stop in stops]
        answers = []
        for start, stop in own:
            behind = next((found for end in ends if (found := end.match(self._text, stop))), None)
            answers.append(Answer(start, behind.end() if behind else stop))
        if (
            is_last
            and not self._text[(stop := answers[-1].stop) :].strip()
            and not self._text[:stop].rstrip().endswith(tuple(stops))
        ):
            answers[-1] = replace(answers[-1], missing=self._completion(turn))
        return answers

    def in_front(self, turn: int) -> Gap | None:
        """What stands in front of an answer; None if the answer shows no words."""
        if turn == 0 or not (own := self._own.get(turn)):
            return None
        start, stop = self._bounds(turn)[0], min(own)[0]
        return Gap(start, stop - start, (self._text[start:stop], self._kind(turn - 1), self._kind(turn)))

    def _blocks_of(self, turn: int, blocks: Sequence[Span]) -> list[Span]:
        """The blocks that may be a turn's: its own where there are as many as answers, else all without another turn's words."""
        answers = [index for index, message in enumerate(self._row.messages) if message["role"] == "assistant"]
        if len(blocks) == len(answers):
            by_turn = dict(zip(answers, blocks))
            if all(answer not in self._own or self._says(answer, block) for answer, block in by_turn.items()):
                return [by_turn[turn]]
        others = [other for other in self._own if other != turn]
        return [block for block in blocks if self._says(turn, block) or not any(self._says(other, block) for other in others)]

    def _says(self, turn: int, block: Span) -> bool:
        """Whether a block holds some of a turn's words."""
        return any(start < block[1] and stop > block[0] for start, stop in self._own.get(turn, ()))

    def _bounds(self, turn: int) -> Span:
        """From the last words of what comes before a turn to the first words of what follows it."""
        own = self._own.get(turn, [])
        others = [(other, span) for other, spans in self._own.items() if other != turn for span in spans]
        if own:
            first, last = min(own)[0], max(stop for _, stop in own)
            lower = max((stop for _, (_, stop) in others if stop <= first), default=0)
        else:
            lower = last = max((stop for other, (_, stop) in others if other < turn), default=0)
        return lower, min((start for _, (start, _) in others if start >= last), default=len(self._text))

    def other(self, turn: int) -> Span:
        """The content of a turn of any role and its end-of-turn text."""
        role = self._row.messages[turn]["role"]
        if not (own := self._own.get(turn)):
            raise Undelimited(f"it does not say where the {role}'s text in turn {turn + 1} begins and ends")
        start, stop = min(own)[0], max(stop for _, stop in own)
        end = self._ends.behind(role, "assistant", self._with_tools)
        behind = re.compile(r"\s*" + re.escape(end.stop)).match(self._text, stop) if end and end.stop else None
        return start, behind.end() if behind else stop

    def marked_start(self, turn: int, prompt: str | RowError) -> int:
        """As `start`; where an answer that is marked has no words, as far as its prompt goes."""
        if self._own.get(turn):
            return self.start(turn, prompt)
        lower, upper = self._bounds(turn)
        asked = len(prompt) if isinstance(prompt, str) and self._text.startswith(prompt) else lower
        return asked if lower <= asked <= upper else lower

    def start(self, turn: int, prompt: str | RowError) -> int:
        """Where an answer begins; behind the turns before it, whatever a prompt for another answer, or no words, suggest.

        Args:
            prompt: the generation prompt for the turns before it, or why there is none.

        Raises:
            Undelimited: if the text does not show it.
        """
        start = self._header_stop(turn, prompt)
        is_asked = isinstance(prompt, str) and len(prompt) == start and self._text.startswith(prompt)
        if turn == 0 or (is_asked and self._row.messages[turn - 1]["role"] != "assistant"):
            return start
        shown, own = self._up_to(turn), self._own.get(turn)
        first = min(own)[0] if own else len(self._text)
        if isinstance(shown, str) and self._text.startswith(shown) and len(shown) <= first:
            start = max(start, len(shown))
        if self._row.messages[turn - 1]["role"] == "assistant" and (before := self._own.get(turn - 1)) and own:
            with suppress(Undelimited):
                start = max(start, self._stop_between(turn - 1, "assistant", max(stop for _, stop in before), first))
        return start

    def _header_stop(self, turn: int, prompt: str | RowError) -> int:
        own = self._own.get(turn)
        first = min(own)[0] if own else None
        if isinstance(prompt, str) and self._text.startswith(prompt) and (first is None or len(prompt) <= first):
            return len(prompt)
        before, behind = self._bounds(turn)
        # Prompt and text part in the header of the answer, or behind it, if they still agree where the prompt opens it.
        if isinstance(prompt, str) and isinstance(shown := self._up_to(turn), str):
            length, opened = self._ends.common(prompt, self._text), self._ends.common(shown, prompt)
            if before <= opened < length and (first is None or length <= first):
                return length
        asked = self._ends.asked(self._kind(turn - 1), self._with_tools) if turn > 0 else None
        if asked is not None:
            header = self._header_end(asked, self._text[before : behind if first is None else first])
            if header is not None:
                return before + header
        if first is None or turn not in self._says_first:
            raise Undelimited(f"it does not say where the answer in turn {turn + 1} begins")
        return first

    def _header_end(self, asked: str, gap: str) -> int | None:
        """How far a prompt, which differs from the text, has written the gap in front of an answer; None if it cannot be told.

        The header of an answer is the longest end of the prompt that stands in the gap, or else the most that a place in the gap
        and the prompt have in common.
        """
        for at in range(len(asked) - _MIN_HEADER + 1):
            header = asked[at:]
            if (found := gap.rfind(header)) >= 0 and any(letter.isalnum() for letter in header):
                return found + len(header)
        places = [found.start() for found in re.finditer(f"(?={re.escape(asked[:_MIN_HEADER])})", gap)] if asked else []
        ends = [(self._ends.common(asked, gap[at:]), at) for at in places]
        common, at = max(ends, default=(0, 0))
        return at + common if asked[:common].strip() else None

    def _last(self, turn: int, start: int, lower: int) -> Answer:
        text = self._text
        if self._ends.adds_turn(self._kind(turn), self._with_tools):
            stop = self._stop_between(turn, "user", lower, len(text))
            if self._ends.holds_turn(text[lower:stop]):
                raise Undelimited(f"it writes words of its own behind the answer in turn {turn + 1}")
            return Answer(start, stop)
        behind = text[lower:].rstrip()
        if self._is_call(turn):
            stops = {end.stop for end in self._possible_ends(turn, "tool") if end.stop}
            is_open = not self._ends.ends_with_special(behind) and not any(stop in behind for stop in stops)
        else:
            is_open = not behind
        stop = lower + len(behind) if behind else len(text[:lower].rstrip())
        return Answer(start, max(start, stop), self._completion(turn) if is_open else "")

    def _completion(self, turn: int) -> str:
        """What a last answer lacks that the template leaves open: the end that its other answers have, else end-of-text.

        Nothing where answers end with the marker of the next turn: which turn that would be is not for us to say.
        """
        if self._ends.next_marker:
            return ""
        for end in self._possible_ends(turn, "tool" if self._is_call(turn) else "user"):
            if end.stop:
                return end.stop if self._is_call(turn) else end.text
        return self._eos

    def _stop_between(self, turn: int, follower: str, lower: int, upper: int) -> int:
        """Where the end of an answer ends, between its last words and the first words of the next turn."""
        possible = self._possible_ends(turn, follower)
        between = self._text[lower:upper]
        for end in possible:
            if end.stop and (found := re.match(r"\s*" + re.escape(end.stop), between)):
                return lower + found.end()
        for end in possible:
            if end.stop and (at := between.find(end.stop)) >= 0:
                return lower + at + len(end.stop)
        is_call = self._is_call(turn)
        shown = (
            RowError("") if self._ends.adds_turn("call" if is_call else "assistant", self._with_tools) else self._up_to(turn + 1)
        )
        common = self._ends.common(self._text, shown) if isinstance(shown, str) else 0
        stop = len(self._text[: min(common, upper)].rstrip())
        if stop <= lower:
            if possible and not possible[0].stop and not is_call:  # the template ends no answer
                return lower
            raise Undelimited(f"it does not say where the answer in turn {turn + 1} ends")
        return stop

    def _possible_ends(self, turn: int, follower: str) -> list[TurnEnd]:
        """What may end an answer, the likeliest first."""
        kinds = [("call", follower), ("call", "tool")] if self._is_call(turn) else [("assistant", follower)]
        found = [self._ends.behind(kind, next_role, self._with_tools) for kind, next_role in [*kinds, ("assistant", "user")]]
        return [end for end in found if end is not None]

    def _kind(self, turn: int) -> str:
        return "call" if self._is_call(turn) else self._row.messages[turn]["role"]

    def _is_call(self, turn: int) -> bool:
        return bool(self._row.messages[turn].get("tool_calls"))
