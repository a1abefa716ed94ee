"""A chat template at work: messages in, text out. In which form a template takes tool calls is asked of it once, by trying."""

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from threading import Lock
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from raytune.data.conversations.conversation import NOT_FOR_TEMPLATES, Message, RowError
from raytune.data.templates.budget import check_length, check_rendered, within_budget
from raytune.errors import DataError

PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Probe tool",
        "parameters": {"type": "object", "properties": {"probe": {"type": "string", "description": "Probe"}}},
    },
}
"""Offered to templates while they are being asked what they do."""

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""With which a template says what of its text is to be trained."""

# transformers keeps one compiled template per text. While it notes where the markers of one rendering lie, it takes those of any
# other thread's rendering for the same text's.
_ONE_AT_A_TIME = Lock()


@dataclass(frozen=True, slots=True)
class Job:
    messages: Sequence[Message]
    tools: list[Any] | None = None
    opens_answer: bool = False
    """Whether the text ends with the generation prompt."""


@dataclass(frozen=True, slots=True)
class _CallForm:
    """How a template takes a turn that calls tools."""

    arguments_as_text: bool
    """JSON in a string, as OpenAI sends it, rather than an object."""
    content: str | None
    """What stands for a content that is null or empty; None: no such key."""


def call_turn(value: str, content: str | None = None) -> Message:
    """An assistant turn that calls the probe's tool with a value."""
    function = {"name": "probe_tool", "arguments": {"probe": value}}
    # Some templates insist on an id of nine letters or digits.
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "probecall", "type": "function", "function": function}],
    }


class Renderer:
    """A template and the tokenizer whose special tokens it writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, name: str = "the chat template") -> None:
        """
        Args:
            name: of the template, in messages.

        Raises:
            DataError: if it is longer than any template.
        """
        self.text = text
        self._tokenizer = tokenizer
        self._name = name
        self.has_markers = MARKERS.search(text) is not None
        self._in_turn: AbstractContextManager[Any] = _ONE_AT_A_TIME if self.has_markers else nullcontext()
        check_length(text, name)

    def texts(self, jobs: Sequence[Job]) -> list[str | RowError]:
        """Render many, the usual ones without tools all at once."""
        texts: list[str | RowError] = [RowError("")] * len(jobs)
        for opens_answer in (False, True):
            together = [i for i, job in enumerate(jobs) if job.opens_answer == opens_answer and job.tools is None]
            try:
                rendered: Iterable[str | RowError] = self.apply([jobs[i].messages for i in together], None, opens_answer)
            except DataError:
                raise
            except Exception:  # one of them cannot be rendered: which one, and why, shows when each is rendered alone
                rendered = [self.one(jobs[i]) for i in together]
            for i, text in zip(together, rendered, strict=True):
                texts[i] = text
        for i, job in enumerate(jobs):
            if job.tools is not None:
                texts[i] = self.one(job)
        return texts

    def one(self, job: Job) -> str | RowError:
        try:
            return self.apply([job.messages], job.tools, job.opens_answer)[0]
        except DataError:
            raise
        except Exception as error:  # a template can fail in any way: its own words are the best there are
            return RowError(f"the chat template cannot render it: {str(error) or type(error).__name__}")

    def apply(self, chats: Sequence[Sequence[Message]], tools: list[Any] | None, opens_answer: bool) -> list[str]:
        """Render chats that share their tools; whatever a template raises comes through.

        Raises:
            DataError: if the template takes more than it may.
        """
        if not chats:
            return []
        return self._apply([[self._prepared(message) for message in chat] for chat in chats], tools, opens_answer)

    def generation_blocks(self, messages: Sequence[Message], tools: list[Any] | None) -> list[tuple[int, int]]:
        """Where the text lies that stands in `{% generation %}` blocks."""
        variables: dict[str, Any] = dict(self._tokenizer.special_tokens_map)
        chat = [{key: value for key, value in self._prepared(message).items() if value is not None} for message in messages]
        with self._in_turn:
            rendered: Any = within_budget(
                lambda: render_jinja_template(
                    conversations=[chat], tools=tools, chat_template=self.text, return_assistant_tokens_mask=True, **variables
                ),
                self._name,
            )
        return rendered[1][0]

    def _apply(self, chats: list[list[Message]], tools: list[Any] | None, opens_answer: bool) -> list[str]:
        with self._in_turn:
            texts: Any = within_budget(
                lambda: self._tokenizer.apply_chat_template(
                    chats, tools=tools, chat_template=self.text, tokenize=False, add_generation_prompt=opens_answer
                ),
                self._name,
                len(chats),
                sum(map(len, chats)),
            )
        check_rendered(max(map(len, texts), default=0), self._name)
        return texts

    def _prepared(self, message: Message) -> Message:
        """A message in the form that the template takes. How a turn is trained is none of its business."""
        prepared = {key: value for key, value in message.items() if key not in NOT_FOR_TEMPLATES}
        if prepared.get("tool_calls"):
            prepared = _in_form(prepared, self._call_form)
        return _in_parts(prepared) if self._takes_parts else prepared

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template, as those of some vision models do, shows content as a list of parts and not as text."""
        asked: Message = {"role": "user", "content": "ProbeValue"}
        as_text, as_parts = self._attempt([asked], None), self._attempt([_in_parts(asked)], None)
        return "ProbeValue" not in as_text and "ProbeValue" in as_parts

    @cached_property
    def roles_without_names(self) -> frozenset[str]:
        """Whose turns come out without the name of who speaks (`name`)."""
        return frozenset(role for role in ("system", "user", "assistant") if self._hides_name(role))

    def _hides_name(self, role: str) -> bool:
        roles = ("system", "user", "assistant") if role == "system" else ("user", "assistant")
        chat: list[Message] = [{"role": one, "content": "Probe"} for one in roles]
        text = self.one(Job([turn | {"name": "ProbeName"} if turn["role"] == role else turn for turn in chat]))
        return isinstance(text, str) and "ProbeName" not in text

    @cached_property
    def _call_form(self) -> _CallForm:
        """The form in which a call comes out whole: not as Python writes it, not quoted twice, no "None" for no content.

        Templates that offer tools may take another path than without, and so may a call that has been answered: the form that
        works most often counts, then the one that is rendered at all most often, and among equals the first.
        """
        forms = [_CallForm(as_text, content) for as_text, content in product((False, True), (None, ""))]
        return max(forms, key=self._merits)

    def _merits(self, form: _CallForm) -> tuple[int, int]:
        """How often a call in a form comes out whole, and how often the template renders it."""
        call = [{"role": "user", "content": "Probe"}, _in_form(call_turn("ProbeValue"), form)]
        result = {"role": "tool", "tool_call_id": "probecall", "name": "probe_tool", "content": "Probe"}
        chats = [call, [*call, result, {"role": "assistant", "content": "Probe"}]]
        if self._takes_parts:
            chats = [[_in_parts(message) for message in chat] for chat in chats]
        texts = [self._attempt(chat, tools) for chat in chats for tools in (None, [PROBE_TOOL])]
        whole = (
            text.count("ProbeValue") == 1 and "probe_tool" in text and not re.search(r"\bNone\b|'probe': '|\\+\"probe", text)
            for text in texts
        )
        return sum(whole), sum(map(bool, texts))

    def _attempt(self, chat: list[Message], tools: list[Any] | None) -> str:
        try:
            return self._apply([chat], tools, False)[0]
        except DataError:
            raise
        except Exception:  # this form is not the template's
            return ""


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _in_form(message: Message, form: _CallForm) -> Message:
    calls = [_call_in_form(call, form) for call in message["tool_calls"]]
    message = message | {"tool_calls": calls}
    if not message.get("content"):
        message.pop("content", None)
        if form.content is not None:
            message["content"] = form.content
    return message


def _call_in_form(call: Any, form: _CallForm) -> Any:
    if isinstance(function := call.get("function"), dict):
        return call | {"function": _call_in_form(function, form)}
    if form.arguments_as_text and isinstance(call.get("arguments"), dict):
        return call | {"arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return call
