"""Chat templates: which one, the text it makes of a conversation, and where in that text each turn lies.

Templates need no `{% generation %}` markers. An answer begins where the template's own generation prompt for the turns before it
ends, since that is where the model will begin to write; it ends with the end-of-turn text that the template puts behind answers.
Where a template's prompt is no prefix of the whole text (a template that opens a thought, say), the turn is found by marking its
content with characters that no text has, and checking that nothing else changed. Markers, where a template has them, are obeyed.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from raytune.data.conversation import Conversation, Message, Origin, RowError
from raytune.data.masking import Targets, trained_turns
from raytune.errors import DataError, ModelError
from raytune.plan.base_model import model_files

TEMPLATES_FOLDER = Path(__file__).with_name("templates")
SHIPPED = tuple(sorted(path.stem for path in TEMPLATES_FOLDER.glob("*.jinja")))

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MAX_TEMPLATE_BYTES = 1 << 20
# transformers keeps one compiled template per text, which can follow the markers of one rendering only.
_ONE_AT_A_TIME = Lock()
# Private-use characters stand around a turn's content while it is being looked for.
_MARK_PAIRS = (("\ue0f0", "\ue0f1"), ("\uf8e0", "\uf8e1"), ("\U000f0000", "\U000f0001"))
# What each role's end-of-turn text is learned from.
_PROBES = {"system": ("system",), "user": ("user",), "assistant": ("user", "assistant"), "tool": ("user", "assistant", "tool")}


def open_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can say where in the text its tokens lie.

    Raises:
        ModelError: if there is none at that path, or it is not backed by the `tokenizers` library.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_files(path), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"There is no usable tokenizer at '{path}': {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer at '{path}' is a {type(tokenizer).__name__}, which is not backed by the `tokenizers` library. "
            f"Convert it once: AutoTokenizer.from_pretrained(path, use_fast=True).save_pretrained(folder)."
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything in a tokenizer that decides which tokens a text becomes. Its chat template is not part of it."""
    parts = [_backend(tokenizer).to_str(), json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer by itself puts a beginning-of-text token before a text."""
    ids = _backend(tokenizer).encode("a").ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def resolve_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text behind `data.template`: "auto" (the tokenizer's own), the name of a shipped one, or a file.

    A shipped template begins with the beginning-of-text token exactly if the tokenizer itself begins texts with one.

    Raises:
        DataError: if the tokenizer has none, there is no such file, or the template needs a token that the tokenizer lacks.
    """
    if template == "auto":
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer '{tokenizer.name_or_path}' has no chat template, and data.template is 'auto'. "
                f"Set data.template to the one that the model was trained with ({', '.join(SHIPPED)}) or to a Jinja file; "
                f"if the rows are plain documents, give their source format: text."
            )
        text = tokenizer.get_chat_template()
    elif template in SHIPPED:
        text = (TEMPLATES_FOLDER / f"{template}.jinja").read_text()
        if adds_bos(tokenizer):
            text = "{{- bos_token }}" + text
    else:
        path = Path(template).expanduser()
        if not path.is_file():
            raise DataError(f"data.template is '{template}', which is neither a file nor one of {', '.join(SHIPPED)}.")
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise DataError(f"data.template: {path} has {path.stat().st_size} bytes, which is no chat template.")
        try:
            text = path.read_text()
        except UnicodeDecodeError as error:
            raise DataError(f"data.template: {path} is not UTF-8: {error}.") from error
    if re.search(r"\beos_token\b", text) and tokenizer.eos_token is None:
        raise DataError(
            f"The chat template ends turns with eos_token, but the tokenizer '{tokenizer.name_or_path}' has none, so a model "
            f"would never learn to stop. Set eos_token in its tokenizer_config.json, or choose another data.template."
        )
    return text


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a template made of a conversation."""

    text: str
    targets: list[tuple[int, int]]
    """Where the trained text lies: start and end of each piece, in characters."""


class ChatTemplate:
    """A template and the tokenizer whose special tokens it writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        """
        Raises:
            DataError: if the text is no template, or has no way to tell an answer from what surrounds it.
        """
        self.text = text
        self._tokenizer = tokenizer
        self._has_markers = _MARKERS.search(text) is not None
        self._ends: dict[str, str] = {}
        self._ends = {role: self._end_of_turn(roles) for role, roles in _PROBES.items()}
        self._frame = self._learned_frame()
        self._patterns = {role: re.compile(r"\s*" + re.escape(end)) for role, end in self._ends.items() if end}
        probe = _probe(_PROBES["assistant"])
        try:
            self._apply([list(probe.messages)], None, False)
        except TemplateSyntaxError as error:
            raise DataError(f"data.template: line {error.lineno} is not Jinja: {error.message}.") from error
        except Exception:  # a template may refuse the probe and still be right for the rows
            pass
        if isinstance(rendered := self.render([probe], "assistant")[0], _Undelimited):
            raise DataError(f"data.template: {rendered}")

    @property
    def stop_ids(self) -> list[int]:
        """The token that ends an answer, if the template's end of turn begins with a special token of its own."""
        end = self._ends["assistant"]
        ids: Any = self._tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
        return ids[:1] if ids and ids[0] in self._tokenizer.added_tokens_decoder else []

    def render(self, conversations: Sequence[Conversation], targets: Targets) -> list[Rendered | RowError]:
        """Render conversations and find the text that carries loss.

        Returns:
            For each conversation its text and targets, or why the template cannot render it.
        """
        texts = self._texts([(list(row.messages), row.tools, False) for row in conversations])
        if targets == "all":
            return [text if isinstance(text, RowError) else Rendered(text, [(0, len(text))]) for text in texts]
        turns = [trained_turns(row.messages, targets) for row in conversations]
        closing = [
            self._closing_answer(row, text) if row_turns == [len(row.messages) - 1] and isinstance(text, str) else None
            for row, text, row_turns in zip(conversations, texts, turns, strict=True)
        ]
        prompts = self._prompts(conversations, [[] if span else turns[index] for index, span in enumerate(closing)])
        rendered: list[Rendered | RowError] = []
        for row, text, row_turns, span, row_prompts in zip(conversations, texts, turns, closing, prompts, strict=True):
            if isinstance(text, RowError):
                rendered.append(text)
            else:
                rendered.append(Rendered(text, [span]) if span else self._found(row, text, row_turns, row_prompts, targets))
        return rendered

    def prompt(self, conversation: Conversation) -> str:
        """The text that a model continues with the last answer of the conversation, which is left out.

        Raises:
            RowError: if the last turn is not an answer, or the template cannot render the ones before it.
        """
        *before, last = conversation.messages or ({"role": None},)
        if last["role"] != "assistant" or not before:
            raise RowError("its last turn is not an answer to something")
        text = self._texts([(before, conversation.tools, True)])[0]
        if isinstance(text, RowError):
            raise text
        return text

    def _found(
        self, row: Conversation, text: str, turns: list[int], prompts: dict[int, str | RowError], targets: Targets
    ) -> Rendered | RowError:
        spans = []
        try:
            answers = [turn for turn in turns if row.messages[turn]["role"] == "assistant"]
            if self._has_markers and answers:
                spans += self._marked_spans(row, text, prompts[answers[0]] if targets == "last" else "")
            for turn in turns:
                if row.messages[turn]["role"] != "assistant":
                    spans.append(self._turn_span(row, turn, text))
                elif not self._has_markers:
                    spans.append(self._answer_span(row, turn, text, prompts[turn]))
        except RowError as error:
            return error
        return Rendered(text, sorted(spans))

    def _prompts(self, conversations: Sequence[Conversation], turns: list[list[int]]) -> list[dict[int, str | RowError]]:
        """For each conversation the generation prompts of its trained answers, by turn; all are rendered at once."""
        wanted = [
            (index, turn)
            for index, row in enumerate(conversations)
            for turn in turns[index]
            if turn > 0 and conversations[index].messages[turn]["role"] == "assistant"
        ]
        texts = self._texts([(list(conversations[i].messages[:turn]), conversations[i].tools, True) for i, turn in wanted])
        nothing_before = RowError("no turn comes before it")
        prompts: list[dict[int, str | RowError]] = [dict.fromkeys(row_turns, nothing_before) for row_turns in turns]
        for (index, turn), text in zip(wanted, texts, strict=True):
            prompts[index][turn] = text
        return prompts

    def _closing_answer(self, row: Conversation, text: str) -> tuple[int, int] | None:
        """Where the last answer lies if question, answer and what stands around them are the end of the text, letter by letter.

        True of nearly every row with one answer, and it saves rendering the prompt. None if it cannot be told this way.
        """
        if self._frame is None or len(row.messages) < 2:
            return None
        question, answer = row.messages[-2:]
        content = answer.get("content")
        if (question["role"], answer["role"]) != ("user", "assistant") or answer.keys() != {"role", "content"}:
            return None
        between, gap, behind = self._frame
        if not text.endswith(f"{question.get('content')}{between}{gap}{content}{behind}"):
            return None
        return len(text) - len(f"{gap}{content}{behind}"), len(text) - len(behind) + len(behind.rstrip())

    def _learned_frame(self) -> tuple[str, str, str] | None:
        """The text between a question and the end of the prompt, from there to the answer, and behind it; of a probe."""
        probe = _probe(_PROBES["assistant"])
        question, answer = (message["content"] for message in probe.messages)
        text, prompt = self._texts([(list(probe.messages), None, False), (list(probe.messages[:1]), None, True)])
        if self._has_markers or not (isinstance(text, str) and isinstance(prompt, str) and text.startswith(prompt)):
            return None
        _, found_question, between = prompt.rpartition(question)
        gap, found_answer, behind = text[len(prompt) :].partition(answer)
        return (between, gap, behind) if found_question and found_answer and behind.strip() else None

    def _answer_span(self, row: Conversation, turn: int, text: str, prompt: str | RowError) -> tuple[int, int]:
        """What the model writes in an assistant turn: from the end of the prompt to the end of the end-of-turn text."""
        message = row.messages[turn]
        content = (message.get("content") or "").strip()
        if isinstance(prompt, str) and text.startswith(prompt):
            start = len(prompt)
            found = text.find(content, start)
            content_end = found + len(content) if found >= 0 else start
        else:
            start, content_end = self._content_span(row, turn, text)
            found = start
        pattern = self._patterns.get("assistant")
        if found >= 0 and not message.get("tool_calls"):
            if pattern is None:
                return start, content_end
            if end := pattern.match(text, content_end):
                return start, end.end()
        # Tool calls follow the content, or the template rewrote the content: the turn ends where its rendering ends.
        up_to = text if turn == len(row.messages) - 1 else self._texts([(list(row.messages[: turn + 1]), row.tools, False)])[0]
        if isinstance(up_to, str) and text.startswith(up_to):
            return start, max(content_end, len(up_to.rstrip()))
        if pattern is not None and (end := pattern.search(text, content_end)):
            return start, end.end()
        raise _Undelimited(f"it does not say where the answer in turn {turn + 1} ends")

    def _turn_span(self, row: Conversation, turn: int, text: str) -> tuple[int, int]:
        """The content of a turn of any role and its end-of-turn text."""
        start, end = self._content_span(row, turn, text)
        pattern = self._patterns.get(row.messages[turn]["role"])
        behind = pattern.match(text, end) if pattern else None
        return start, behind.end() if behind else end

    def _content_span(self, row: Conversation, turn: int, text: str) -> tuple[int, int]:
        """Where the content of a turn lies, outer white space aside; shown by marking it and seeing nothing else change."""
        content = row.messages[turn].get("content") or ""
        core = content.strip()
        before = content[: len(content) - len(content.lstrip())]
        left, right = next((pair for pair in _MARK_PAIRS if pair[0] not in text and pair[1] not in text), ("", ""))
        marked = [dict(message) for message in row.messages]
        marked[turn]["content"] = f"{before}{left}{core}{right}{content[len(before) + len(core) :]}"
        shown = self._texts([(marked, row.tools, False)])[0]
        if isinstance(shown, str) and left and shown.count(left) == shown.count(right) == 1:
            start, end = shown.index(left), shown.index(right) - 1
            if shown.replace(left, "").replace(right, "") == text and (end > start) == (core != ""):
                return start, end
        raise _Undelimited(f"it does not say where the {row.messages[turn]['role']}'s text in turn {turn + 1} begins and ends")

    def _marked_spans(self, row: Conversation, text: str, last_prompt: str | RowError) -> list[tuple[int, int]]:
        """The pieces in `{% generation %}` blocks, each with the end-of-turn text right behind it.

        Args:
            last_prompt: only pieces behind this prompt count; if it is no prefix of the text, only the last piece does.
        """
        variables: dict[str, Any] = dict(self._tokenizer.special_tokens_map)
        with _ONE_AT_A_TIME:
            rendered: Any = render_jinja_template(
                conversations=[[_without_nulls(message) for message in row.messages]],
                tools=row.tools,
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **variables,
            )
        pattern = self._patterns.get("assistant")
        spans: list[tuple[int, int]] = []
        for start, end in rendered[1][0]:
            behind = pattern.match(text, end) if pattern else None
            spans.append((start, behind.end() if behind else end))
        if isinstance(last_prompt, RowError) or not text.startswith(last_prompt):
            return spans[-1:]
        return [(max(start, len(last_prompt)), end) for start, end in spans if end > len(last_prompt)]

    def _texts(self, jobs: list[tuple[list[Message], list[Any] | None, bool]]) -> list[str | RowError]:
        """Render (messages, tools, whether a generation prompt follows), the usual ones without tools all at once."""
        texts: list[str | RowError] = [RowError("")] * len(jobs)
        for opens_answer in (False, True):
            together = [i for i, (_, tools, opens) in enumerate(jobs) if opens == opens_answer and tools is None]
            try:
                rendered: Iterable[str | RowError] = self._apply([jobs[i][0] for i in together], None, opens_answer)
            except Exception:  # one of them cannot be rendered: which one, and why, shows when each is rendered alone
                rendered = [self._text(*jobs[i]) for i in together]
            for i, text in zip(together, rendered, strict=True):
                texts[i] = text
        for i, job in enumerate(jobs):
            if job[1] is not None:
                texts[i] = self._text(*job)
        return texts

    def _text(self, messages: list[Message], tools: list[Any] | None, opens_answer: bool) -> str | RowError:
        try:
            return self._apply([messages], tools, opens_answer)[0]
        except Exception as error:  # a template can fail in any way: its own words are the best there are
            return RowError(f"the chat template cannot render it: {str(error) or type(error).__name__}")

    def _apply(self, chats: list[list[Message]], tools: list[Any] | None, opens_answer: bool) -> list[str]:
        if not chats:
            return []
        return self._tokenizer.apply_chat_template(  # pyright: ignore[reportReturnType]
            chats, tools=tools, chat_template=self.text, tokenize=False, add_generation_prompt=opens_answer
        )

    def _end_of_turn(self, roles: tuple[str, ...]) -> str:
        """The text behind the last of these turns, without white space around it; empty if there is none or it cannot be told."""
        probe = _probe(roles)
        text = self._text(list(probe.messages), None, False)
        content = probe.messages[-1]["content"]
        return text.rpartition(content)[2].strip() if isinstance(text, str) and content in text else ""


class _Undelimited(RowError):
    """The template, rather than the row, is what has to change."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the chat template cannot be used for training as it is: {what}. Put {{% generation %}} and {{% endgeneration %}} "
            f"around the answers in the template, or set data.template to one of {', '.join(SHIPPED)}"
        )


def _probe(roles: tuple[str, ...]) -> Conversation:
    messages = tuple({"role": role, "content": f"Probe{index}of{role}"} for index, role in enumerate(roles))
    return Conversation(messages=messages, origin=Origin("probe", 1))


def _without_nulls(message: Message) -> Message:
    return {key: value for key, value in message.items() if value is not None}


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer of the `tokenizers` library below, with neither padding nor truncation left on by an earlier call."""
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    backend.no_truncation()
    backend.no_padding()
    return backend
