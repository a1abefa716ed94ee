"""How a chat template ends a turn, learned by asking it: the same turn once as the last one, once with another behind it.

What both texts have in common behind the turn is its end; what only the second has is the header of the turn that follows. Where
they have nothing in common, the template leaves the last turn open or ends it in its own way, and a turn in the middle ends with
the first special token behind it: its own end, or the marker of the next role, which is what a model of that family writes.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from raytune.data.conversations.conversation import Message, RowError
from raytune.data.templates.rendering import PROBE_TOOL, Job, Renderer, call_turn

SPECIAL_LOOK = (
    r"<\|[^|<>\s]{1,60}\|?>|<[^|<>\s]{1,60}\|>|<｜[^｜<>]{1,60}｜>|\[\|[^|\]\s]{1,60}\|\]|</?s>"
    r"|<(?:eos|bos|[a-z]+_of_[a-z]+)>|\[/?[A-Z_]{3,60}\]"
)
"""What special tokens look like, whether the tokenizer has them or not."""

_TAG = re.compile(r"</?[^<>\s]{1,60}>")
# The beginning of a marker: texts that differ inside of one have not begun to differ where their letters do.
_OPEN_MARKER = re.compile(r"[<\[(⟨【｜|/{]+\w*$")


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The end of a turn that another turn follows (or none).

    Attributes:
        text: what stands behind the turn up to its end, white space in front of it included, none behind it. Empty: nothing does.
        stop: the part of it to look for where the turn's own text does not end right before it.
    """

    text: str
    stop: str


class TurnEnds:
    """What is learned of a template's turns.

    A turn's kind is its role, or "call" for an answer that calls tools.
    """

    def __init__(self, renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._renderer = renderer
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        self._specials = {token for token, special in added.items() if special} | set(tokenizer.all_special_tokens)
        self._added = set(added)
        literal = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._markers = re.compile("|".join([*map(re.escape, literal), SPECIAL_LOOK]))
        self._learned: dict[tuple[str, str, bool], TurnEnd | None] = {}
        self._tails: dict[tuple[str, str | None, bool], str | None] = {}

    def behind(self, kind: str, follower: str, with_tools: bool) -> TurnEnd | None:
        """The end of a turn of a kind before a turn of a role; None if the template does not say."""
        key = (kind, follower, with_tools)
        if key not in self._learned:
            self._learned[key] = self._learn(*key)
        return self._learned[key]

    def last(self, kind: str, with_tools: bool = False) -> str | None:
        """All that stands behind a turn of a kind at the end of a conversation; None if the template refuses one."""
        return self.tail(kind, None, with_tools)

    @cached_property
    def next_marker(self) -> str:
        """The marker of the next turn, where that is what ends an answer: it opens questions, and no other turn."""
        end = self.behind("assistant", "user", False)
        asked = self.asked("assistant", False)
        opening = self._renderer.one(Job(_probe("user")[0]))
        if (
            end is None
            or not end.stop
            or (self.last("assistant") or "").strip()
            or asked is None
            or isinstance(opening, RowError)
        ):
            return ""
        opens_questions = end.stop in opening.partition("Probe0user")[0] and not asked.lstrip().startswith(end.stop)
        return end.stop if opens_questions else ""

    def asked(self, kind: str, with_tools: bool) -> str | None:
        """What the template's generation prompt writes behind a turn of a kind; None if it cannot be told."""
        before, own = _probe(kind)
        prompt = self._renderer.one(Job(before, [PROBE_TOOL] if with_tools else None, True))
        return prompt.rpartition(own)[2] if isinstance(prompt, str) and own in prompt else None

    def adds_turn(self, kind: str, with_tools: bool = False) -> bool:
        """Whether the template opens another turn behind the last one, or writes one, with nobody asking for it."""
        return self.holds_turn(self.last(kind, with_tools) or "")

    def holds_turn(self, behind: str) -> bool:
        """Whether there are words behind a second special token in what stands behind a turn: the first one ends the turn."""
        specials = [found for found in self._markers.finditer(behind) if self._is_special(found[0])]
        if len(specials) < 2:
            return False
        words = _TAG.sub("", self._markers.sub("", behind[specials[1].end() :]))
        return any(letter.isalnum() for letter in words)

    def first_special(self, text: str) -> str | None:
        """The first special token of the tokenizer in a text."""
        return next((marker for marker in self.markers_in(text) if marker in self._specials), None)

    def last_special(self, text: str) -> str | None:
        """The special token of the tokenizer that ends a text, white space aside."""
        last = self._last_marker(text.rstrip())
        return last[0] if last and self.ends_with_special(text) and last[0] in self._specials else None

    def ends_with_special(self, text: str) -> bool:
        """Whether a text ends with a special token, white space aside. The closing tag of a call is none, token or not."""
        last = self._last_marker(text.rstrip())
        is_closing = last is not None and last[0].startswith("</") and last[0] != "</s>"
        return last is not None and last.end() == len(text.rstrip()) and self._is_special(last[0]) and not is_closing

    def _is_special(self, marker: str) -> bool:
        """Whether it is a special token, or looks like one and the tokenizer lacks it."""
        return marker in self._specials or marker not in self._added

    def markers_in(self, text: str) -> list[str]:
        return [found[0] for found in self._markers.finditer(text)]

    def common(self, one: str, other: str) -> int:
        """Length of the text that two texts begin with, not counting a part of a marker or of a word."""
        length = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
        for text in (one, other):
            for found in self._markers.finditer(text):
                if found.start() < length < found.end():
                    length = found.start()
        if length < min(len(one), len(other)):  # both go on, and differ
            if opened := _OPEN_MARKER.search(one[:length]):
                length = opened.start()
            while length > 0 and one[length - 1].isalnum() and (one[length].isalnum() or other[length].isalnum()):
                length -= 1
        return length

    def _learn(self, kind: str, follower: str, with_tools: bool) -> TurnEnd | None:
        middle, last = self.tail(kind, follower, with_tools), self.tail(kind, None, with_tools)
        if middle is None:
            if last is None:
                return None
            middle = last
        common = 0 if last is None or self.adds_turn(kind, with_tools) else self.common(middle, last)
        end = middle[:common].rstrip()
        if kind not in ("assistant", "call"):
            return TurnEnd(end, end.strip())
        answer = self.behind("assistant", "user", with_tools) if kind == "call" else None
        if kind == "call" and answer and answer.stop and answer.stop in end:
            return TurnEnd(end, answer.stop)
        is_whole = bool(end.strip()) if kind == "assistant" else self.ends_with_special(end)
        if not is_whole and (next_marker := self._marker_at(middle, common)):
            end = middle[: next_marker.end()]
        if kind == "assistant":
            return TurnEnd(end, end.strip())
        closing = self._last_marker(end)
        return TurnEnd(end, closing[0] if closing and self.ends_with_special(end) else "")

    def tail(self, kind: str, follower: str | None, with_tools: bool) -> str | None:
        """The text from the end of a probe's turn to the text of the one behind it, or to the end."""
        before, own = _probe(kind)
        tools = [PROBE_TOOL] if with_tools else None
        key = (kind, follower, with_tools)
        if key not in self._tails:
            attempts = [[], [{"role": "assistant", "content": "Probe4assistant"}]] if follower else [[]]
            following: list[Message] = [_follower(follower)] if follower else []
            texts = (self._renderer.one(Job([*before, *following, *more], tools)) for more in attempts)
            found = (
                _between(text, own, following[0]["content"] if following else None)
                for text in texts
                if not isinstance(text, RowError)
            )
            self._tails[key] = next((tail for tail in found if tail is not None), None)
        return self._tails[key]

    def _marker_at(self, text: str, start: int) -> re.Match[str] | None:
        """The special token that begins there, white space aside."""
        at = start + len(text[start:]) - len(text[start:].lstrip())
        return self._markers.match(text, at)

    def _last_marker(self, text: str) -> re.Match[str] | None:
        return max(self._markers.finditer(text), key=lambda found: found.end(), default=None)


def _probe(kind: str) -> tuple[list[Message], str]:
    """A conversation that ends with a turn of a kind, and the last words of that turn."""
    question = {"role": "user", "content": "Probe0user"}
    match kind:
        case "system":
            return [{"role": "system", "content": "Probe0system"}], "Probe0system"
        case "user":
            return [question], "Probe0user"
        case "assistant":
            return [question, {"role": "assistant", "content": "Probe1assistant"}], "Probe1assistant"
        case "call":
            return [question, call_turn("Probe1value")], "Probe1value"
        case _:
            return [question, call_turn("Probe1value"), _follower("tool")], "Probe2tool"


def _follower(role: str) -> Message:
    message: Message = {"role": role, "content": f"Probe2{role}"}
    return message | {"tool_call_id": "probecall", "name": "probe_tool"} if role == "tool" else message


def _between(text: str, own: str, following: str | None) -> str | None:
    stop = len(text) if following is None else text.rfind(following)
    start = text.rfind(own, 0, max(stop, 0))
    return text[start + len(own) : stop] if start >= 0 else None
