"""Chat templates of every combination of habits, each with a reference that knows whose every character is.

`Habits` says how a template behaves, `Habits.jinja` is that template, and `reference` renders a conversation in plain Python,
piece by piece. Nothing here asks the code under test, and a test asserts that Jinja and the reference write the same text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import strategies as st

from raytune.data.conversations.conversation import Conversation, Message, Origin

BOS, EOS = "<s>", "</s>"
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|end|>", "<|return|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>"),
    *("[INST]", "[/INST]", "<|thought|>", "<|/thought|>", "<tool_call>", "</tool_call>"),
)

Ends = Literal["same", "other at the last", "once more at the very end", "eos", "next marker", "none"]
ENDS: tuple[Ends, ...] = ("same", "other at the last", "once more at the very end", "eos", "next marker", "none")
CALLS = ("beside", "before", "instead", "hidden")
THOUGHTS = ("kept", "stripped earlier", "stripped", "moved")
REASONING = ("shown", "last only", "hidden")
SYSTEM = ("own turn", "in the first user turn", "not beside tools", "refused")
RESULTS = ("user turns", "one user turn", "own role")
NULL = ("taken", "raises", "printed")

OPENED = "<think>\n"
DEFAULT_SYSTEM = "You help."


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How a template behaves."""

    ends: Ends
    """What ends a turn. "next marker": nothing but the header of the next turn, whose first token a model learns to write."""
    calls: str
    """Where tool calls stand to the text of their turn; "instead": the text is dropped; "hidden": calls and tools are."""
    thoughts: str = "kept"
    """What becomes of `<think>` in content; "moved": into markers of the template's own."""
    reasoning: str = "shown"
    prompt_opens_thought: bool = False
    system: str = "own turn"
    trims: bool = False
    default_system: bool = False
    bos: bool = False
    results: str = "own role"
    null_content: str = "taken"
    arguments_as_text: bool = False

    def header(self, role: str) -> str:
        """What opens a turn."""
        match self.ends:
            case "eos":
                return {"user": "[INST] ", "assistant": "", "system": "[INST] (system) ", "tool": "[INST] (tool) "}[role]
            case "next marker":
                return f"<|{'observation' if role == 'tool' else role}|>\n"
            case "none":
                return f"{role}: "
            case _:
                return f"<|im_start|>{role}\n"

    def end(self, role: str, *, is_last: bool) -> str:
        """What ends a turn, white space behind it included."""
        match self.ends:
            case "eos":
                return EOS if role == "assistant" else " [/INST]"
            case "next marker":
                return ""
            case "none":
                return "\n"
            case "other at the last":
                return "<|return|>" if is_last and role == "assistant" else "<|end|>"
            case _:
                return "<|im_end|>\n"

    @property
    def lead(self) -> str:
        """What stands before every answer and no prompt writes."""
        return " " if self.ends == "eos" else ""

    @property
    def opening(self) -> str:
        """What the generation prompt writes behind an answer's header."""
        return self.lead + OPENED if self.prompt_opens_thought else ""

    @property
    def jinja(self) -> str:
        """The template."""
        return "".join(
            (
                "{{ bos_token }}" if self.bos else "",
                "{% set ns = namespace(question=-1, lead='') %}",
                "{% for m in messages %}{% if m.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}",
                self._jinja_opening(),
                "{% for m in messages %}",
                self._jinja_content(),
                "{% if m.role == 'system' %}",
                self._jinja_system(),
                "{% elif m.role == 'user' %}",
                _text(self.header("user")),
                "{{ ns.lead + content }}{% set ns.lead = '' %}",
                self._jinja_end("user"),
                "{% elif m.role == 'tool' %}",
                self._jinja_result(),
                "{% else %}",
                _text(self.header("assistant") + self.lead),
                self._jinja_answer(),
                self._jinja_end("assistant"),
                "{% endif %}{% endfor %}",
                "{% if add_generation_prompt %}",
                _text(self.header("assistant") + self.opening),
                "{% else %}{{ eos_token }}{% endif %}" if self.ends == "once more at the very end" else "{% endif %}",
            )
        )

    def _jinja_content(self) -> str:
        """Sets `content` to the text of message `m`."""
        null = {
            "taken": "{% set content = m.content or '' %}",
            "raises": "{% set content = '' + m['content'] %}",
            "printed": "{% set content = m.content | string %}",
        }[self.null_content]
        return null + ("{% set content = content | trim %}" if self.trims else "")

    def _jinja_opening(self) -> str:
        """Tools and the default system prompt, where no system turn of the row's own comes first."""
        tools = "" if self.calls == "hidden" else f"{{% if tools %}}{self._jinja_tools()}{{% set offered = true %}}{{% endif %}}"
        helps = _text(self.header("system") + DEFAULT_SYSTEM + self.end("system", is_last=False))
        default = f"{{% if not offered %}}{helps}{{% endif %}}" if self.default_system else ""
        return f"{{% set offered = false %}}{{% if messages[0].role != 'system' %}}{tools}{default}{{% endif %}}"

    def _jinja_tools(self, before: str = "") -> str:
        written = "{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}"
        return f"{_text(self.header('system'))}{before}{_text('# Tools')}{written}{self._jinja_end('system')}"

    def _jinja_system(self) -> str:
        alone = f"{_text(self.header('system'))}{{{{ content }}}}{self._jinja_end('system')}"
        if self.system == "refused":
            return "{{ raise_exception('System role not supported') }}"
        merged = self.system == "in the first user turn"
        first = "{% set ns.lead = content + '\\n\\n' %}" if merged else ""
        if self.calls == "hidden":
            return first or alone
        kept = "" if merged or self.system == "not beside tools" else "{{ content + '\\n\\n' }}"
        return f"{first}{{% if tools %}}{self._jinja_tools(kept)}{{% else %}}{'' if merged else alone}{{% endif %}}"

    def _jinja_result(self) -> str:
        wrapped = "{{ '<tool_response>\\n' + content + '\\n</tool_response>' }}"
        match self.results:
            case "own role":
                return f"{_text(self.header('tool'))}{{{{ content }}}}{self._jinja_end('tool')}"
            case "user turns":
                return f"{_text(self.header('user'))}{wrapped}{self._jinja_end('user')}"
            case _:
                opens = (
                    f"{{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}}{_text(self.header('user'))}{{% else %}}"
                )
                closes = "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}"
                return f"{opens}{_text(chr(10))}{{% endif %}}{wrapped}{closes}{self._jinja_end('user')}{{% endif %}}"

    def _jinja_answer(self) -> str:
        split = "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
        rest = "{% set content = content.split('</think>')[-1].lstrip('\\n') %}"
        has_thought = "{% if '</think>' in content %}"
        thoughts = {
            "kept": "",
            "stripped earlier": f"{{% if loop.index0 < ns.question %}}{has_thought}{rest}{{% endif %}}{{% endif %}}",
            "stripped": f"{has_thought}{rest}{{% endif %}}",
            "moved": f"{has_thought}{split}{rest}{{{{ '<|thought|>' + thought + '<|/thought|>' }}}}{{% endif %}}",
        }[self.thoughts]
        shown = "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}"
        reasoning = {
            "shown": f"{{% if m.reasoning_content %}}{shown}{{% endif %}}",
            "last only": f"{{% if m.reasoning_content and loop.index0 > ns.question %}}{shown}{{% endif %}}",
            "hidden": "",
        }[self.reasoning]
        arguments = "call.function.arguments" if self.arguments_as_text else "(call.function.arguments | tojson)"
        call = (
            '{{ \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' + '
            + arguments
            + " + '}\\n</tool_call>' }}"
        )
        calls = (
            f"{{% for call in m.tool_calls or [] %}}{{% if not loop.first %}}{_text(chr(10))}{{% endif %}}{call}{{% endfor %}}"
        )
        body = {
            "beside": f"{{{{ content }}}}{{% if content and m.tool_calls %}}{_text(chr(10))}{{% endif %}}{calls}",
            "before": f"{calls}{{% if content and m.tool_calls %}}{_text(chr(10))}{{% endif %}}{{{{ content }}}}",
            "instead": f"{{% if m.tool_calls %}}{calls}{{% else %}}{{{{ content }}}}{{% endif %}}",
            "hidden": "{{ content }}",
        }[self.calls]
        return reasoning + thoughts + body

    def _jinja_end(self, role: str) -> str:
        middle, last = self.end(role, is_last=False), self.end(role, is_last=True)
        if middle == last:
            return _text(middle)
        return f"{{% if loop.last %}}{_text(last)}{{% else %}}{_text(middle)}{{% endif %}}"


def _text(text: str) -> str:
    """Jinja that writes a text as it is."""
    return f"{{{{ {json.dumps(text)} }}}}" if text else ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Where an assistant turn lies in a reference text.

    Attributes:
        turn: index of its message.
        must: first and last place (exclusive) of the characters that have to be trained.
        may: the same of those that may be; what else is trained is wrong.
    """

    turn: int
    must: tuple[int, int]
    may: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Reference:
    """What a template makes of a conversation.

    Attributes:
        text: all of it.
        answers: its assistant turns.
        completed: texts that are as good where nothing ends the last answer: with end-of-text right behind it, which is to be
            trained; white space that is all of an answer may be left out.
        has_to_refuse: why a row must not be trained; empty if it may.
        may_refuse: why a row may be refused although all of it is shown; empty if it must not.
    """

    text: str
    answers: list[Answer]
    has_to_refuse: str
    may_refuse: str
    completed: tuple[str, ...] = ()


def reference(habits: Habits, row: Conversation) -> Reference:
    """Render a conversation and know what of it is the assistant's."""
    texts, bodies = _rendered(habits, row.messages, row.tools)
    text = "".join(texts)
    if habits.ends == "once more at the very end":
        text += EOS
    answers, odd = [], []
    for turn, (start, body) in bodies.items():
        prompt = prompt_of(habits, row, turn)
        is_prefix = text.startswith(prompt)
        stop, furthest = _stop(habits, row.messages, turn, text, start + len(body))
        if is_prefix:
            first = earliest = len(prompt)
        else:
            opening = habits.lead + habits.opening.removeprefix(habits.lead)
            first, earliest = start + _common(opening, body), start
            first += len(text[first:stop]) - len(text[first:stop].lstrip())
            odd += (
                ["an answer without words behind a prompt that is no prefix"] if not _says_something(row.messages[turn]) else []
            )
        # White space at the very end of what is trained is never needed.
        stop = first + len(text[first:stop].rstrip())
        if not text[first:stop].strip():
            odd.append("nothing to train in a turn")
        answers.append(Answer(turn, (first, max(first, stop)), (earliest, max(furthest, stop, earliest))))
    completed = ()
    if habits.ends == "none" and len(row.messages) - 1 in bodies:
        start, body = bodies[len(row.messages) - 1]
        completed = (text[: answers[-1].must[1]] + EOS, *([] if body.strip() else [text[:start] + EOS]))
    return Reference(text, answers, _lost(habits, row), "; ".join([*odd, *_unclear(habits, row)]), completed)


def prompt_of(habits: Habits, row: Conversation, turn: int) -> str:
    """The text that a model continues with a turn."""
    texts, _ = _rendered(habits, row.messages[:turn], row.tools)
    return "".join(texts) + habits.header("assistant") + habits.opening


def _rendered(
    habits: Habits, messages: Sequence[Message], tools: list[Any] | None
) -> tuple[list[str], dict[int, tuple[int, str]]]:
    """The pieces of a text, and for each assistant turn where its header ends and what stands behind it."""
    pieces, bodies = [BOS] if habits.bos else [], {}
    question = max((turn for turn, message in enumerate(messages) if message["role"] == "user"), default=-1)
    tools = None if habits.calls == "hidden" else tools
    listed = "# Tools" + "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools or ())
    lead = ""

    def turn_of(role: str, content: str) -> str:
        return habits.header(role) + content + habits.end(role, is_last=False)

    if messages and messages[0]["role"] != "system":
        if tools:
            pieces.append(turn_of("system", listed))
        elif habits.default_system:
            pieces.append(turn_of("system", DEFAULT_SYSTEM))
    for turn, message in enumerate(messages):
        content = message.get("content") or ""
        content = content.strip() if habits.trims else content
        match message["role"]:
            case "system" if habits.system == "in the first user turn":
                lead = f"{content}\n\n"
                pieces += [turn_of("system", listed)] if tools else []
            case "system" if habits.system == "not beside tools":
                pieces.append(turn_of("system", listed if tools else content))
            case "system":
                pieces.append(turn_of("system", f"{content}\n\n{listed}" if tools else content))
            case "user":
                pieces.append(turn_of("user", lead + content))
                lead = ""
            case "tool":
                pieces.append(_result(habits, messages, turn, content))
            case _:
                header = habits.header("assistant")
                body = habits.lead + _body(habits, message, content, is_earlier=turn < question)
                bodies[turn] = (sum(map(len, pieces)) + len(header), body)
                pieces.append(header + body + habits.end("assistant", is_last=turn == len(messages) - 1))
    return pieces, bodies


def _result(habits: Habits, messages: Sequence[Message], turn: int, content: str) -> str:
    if habits.results == "own role":
        return habits.header("tool") + content + habits.end("tool", is_last=False)
    wrapped = f"<tool_response>\n{content}\n</tool_response>"
    together = habits.results == "one user turn"
    follows = together and turn > 0 and messages[turn - 1]["role"] == "tool"
    goes_on = together and turn + 1 < len(messages) and messages[turn + 1]["role"] == "tool"
    opens = "\n" if follows else habits.header("user")
    return opens + wrapped + ("" if goes_on else habits.end("user", is_last=False))


def _body(habits: Habits, message: Message, content: str, *, is_earlier: bool) -> str:
    """What an answer says between its header and its end."""
    before = ""
    if "</think>" in content and habits.thoughts != "kept":
        thought = content.split("</think>")[0].split("<think>")[-1].strip("\n")
        rest = content.split("</think>")[-1].lstrip("\n")
        if habits.thoughts == "moved":
            before, content = f"<|thought|>{thought}<|/thought|>", rest
        elif habits.thoughts == "stripped" or is_earlier:
            content = rest
    reasoning = message.get("reasoning_content")
    if reasoning and (habits.reasoning == "shown" or (habits.reasoning == "last only" and not is_earlier)):
        before = f"<think>\n{reasoning}\n</think>\n\n{before}"
    calls = "\n".join(
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
        f"{json.dumps(call['function']['arguments'], ensure_ascii=False)}}}\n</tool_call>"
        for call in message.get("tool_calls") or ()
    )
    if habits.calls == "hidden" or not calls:
        return before + content
    if habits.calls == "instead":
        return before + calls
    parts = [content, calls] if habits.calls == "beside" else [calls, content]
    return before + "\n".join(part for part in parts if part)


def _stop(habits: Habits, messages: Sequence[Message], turn: int, text: str, body_end: int) -> tuple[int, int]:
    """Where the end of a turn ends that has to be trained, and how far one may train."""
    is_last = turn == len(messages) - 1
    end = habits.end("assistant", is_last=is_last)
    follower = "" if is_last else messages[turn + 1]["role"]
    header = habits.header("user" if follower == "tool" and habits.results != "own role" else follower) if follower else ""
    if habits.ends == "next marker":
        stop = body_end + len(header.rstrip())
        return stop, stop
    if habits.ends == "none":  # the next speaker's name may count as the end
        return body_end, body_end + len(end) + len(header.rstrip())
    furthest = len(text) if habits.ends == "once more at the very end" and is_last else body_end + len(end)
    return body_end + len(end.rstrip()), furthest


def _lost(habits: Habits, row: Conversation) -> str:
    """What of a conversation the template leaves out, or why it raises."""
    question = max((turn for turn, message in enumerate(row.messages) if message["role"] == "user"), default=-1)
    system = row.messages[0]["role"] == "system" and bool((row.messages[0]["content"]).strip())
    if row.messages[0]["role"] == "system" and habits.system == "refused":
        return "System role not supported"
    if system and row.tools and habits.system == "not beside tools" and habits.calls != "hidden":
        return "system"
    if row.tools and habits.calls == "hidden":
        return "tools"
    for turn, message in enumerate(row.messages):
        if message.get("tool_calls") and habits.calls == "hidden":
            return "tool_calls"
        if message.get("tool_calls") and habits.calls == "instead" and _without_thought(message.get("content") or "").strip():
            return "content"
        if (message.get("reasoning_content") or "").strip() and habits.reasoning == "hidden":
            return "reasoning_content"
        if turn > question and habits.thoughts == "stripped" and _thought(message.get("content") or "").strip():
            return "think"
    return ""


def _unclear(habits: Habits, row: Conversation) -> list[str]:
    """Why a row may be refused all the same."""
    question = max((turn for turn, message in enumerate(row.messages) if message["role"] == "user"), default=-1)
    why = []
    for turn, message in enumerate(row.messages):
        content = message.get("content") or ""
        if turn < question and habits.thoughts.startswith("stripped") and _thought(content):
            why.append("thoughts of earlier turns are left out")
        if turn < question and habits.reasoning == "last only" and message.get("reasoning_content"):
            why.append("reasoning of earlier turns is left out")
        if message.get("tool_calls") and habits.calls == "instead" and _thought(content):
            why.append("a thought beside a call is left out")
        if any(special in content for special in (*SPECIAL, BOS, EOS)):
            why.append("a text holds the template's own markers")
        if message.get("content", "") is None and habits.null_content == "printed":
            why.append("null content is printed")
        if habits.thoughts.startswith("stripped") and "</think>" in content and not _thought(content).strip():
            why.append("an empty thought is left out")
    if habits.ends == "none":
        why.append("nothing ends a turn")
    return why


def _says_something(message: Message) -> bool:
    content = message.get("content") or ""
    said = (_thought(content), _without_thought(content), message.get("reasoning_content") or "")
    return bool(message.get("tool_calls")) or any(text.strip() for text in said)


def _thought(content: str) -> str:
    return content.split("</think>")[0].split("<think>")[-1] if "</think>" in content else ""


def _without_thought(content: str) -> str:
    return content.split("</think>")[-1]


def _common(one: str, other: str) -> int:
    """Length of the text that two texts begin with, of whole tokens."""
    length = next((index for index, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    for text in (one, other):
        for token in (*SPECIAL, "<think>"):
            at = text.rfind(token, 0, length + len(token) - 1)
            length = at if 0 <= at < length < at + len(token) else length
    return length


# --- Strategies ---------------------------------------------------------------------------------------------------------------

# What shows everything comes twice as often, or nearly every row would be refused.
HABITS = st.builds(
    Habits,
    ends=st.sampled_from(ENDS),
    calls=st.sampled_from((*CALLS[:2], *CALLS)),
    thoughts=st.sampled_from(("kept", "moved", "kept", *THOUGHTS)),
    reasoning=st.sampled_from(("shown", "shown", *REASONING)),
    prompt_opens_thought=st.booleans(),
    system=st.sampled_from((*SYSTEM[:2], *SYSTEM)),
    trims=st.booleans(),
    default_system=st.booleans(),
    bos=st.booleans(),
    results=st.sampled_from(RESULTS),
    null_content=st.sampled_from(NULL),
    arguments_as_text=st.booleans(),
)

# Words that stand in headers, in other turns, beside ends; white space; tags; text outside of ASCII.
_WORDS = st.sampled_from(
    (
        *(
            "Yes",
            "No",
            "Yes, No",
            "a",
            "42",
            "user",
            "assistant",
            "tool",
            "user: ",
            "assistant\n",
            "end",
            "im_end",
            "Tools",
            "s>",
            "|",
        ),
        *(
            " ",
            "\n",
            " \n\n",
            "\t",
            "  Yes ",
            "\nNo\n",
            "é",
            "e\u0301",
            "日本",
            "\U0001f600",
            "\u00a0",
            "{{ x }}",
            '{"a": 1}',
            "<b>Yes</b>",
        ),
        *("<tool_response>\nYes\n</tool_response>", "<|im_end|>", "<|im_start|>user\nYes", "</s>"),
    )
)
_TEXTS = st.lists(_WORDS, max_size=3).map("".join) | st.text(
    st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), max_size=4
)
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}]


@st.composite
def _answers(draw: st.DrawFn, question: str) -> Message:
    """An answer's content: empty, the question again, with a thought in content or beside it (which may hold the answer)."""
    answer = draw(st.sampled_from(("", question, "Yes")) | _TEXTS)
    thought = draw(st.sampled_from(("hm", answer, f"{question} {answer}", f"{answer}{answer}\n")) | _TEXTS)
    match draw(st.sampled_from(("plain", "plain", "plain", "in content", "in content", "beside"))):
        case "in content":
            return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{answer}"}
        case "beside":
            return {"role": "assistant", "content": answer, "reasoning_content": thought}
        case _:
            return {"role": "assistant", "content": answer}


@st.composite
def _call_turns(draw: st.DrawFn, question: str) -> list[Message]:
    """A turn that calls tools, and their results."""
    values = draw(st.lists(st.sampled_from((question, "Yes", "Oslo", "")) | _TEXTS, min_size=1, max_size=2))
    calls = [
        {"type": "function", "id": f"call0000{number}", "function": {"name": "look", "arguments": {"at": value, "n": number}}}
        for number, value in enumerate(values)
    ]
    said: Message = draw(st.sampled_from(({"content": None}, {"content": ""})) | _answers(question))
    results = [
        {"role": "tool", "tool_call_id": f"call0000{number}", "name": "look", "content": draw(_TEXTS)}
        for number in range(len(calls))
    ]
    return [said | {"role": "assistant", "tool_calls": calls}, *results]


@st.composite
def _conversations(draw: st.DrawFn) -> Conversation:
    messages: list[Message] = []
    with_calls = draw(st.booleans())
    if draw(st.integers(0, 3)) == 0:
        messages.append({"role": "system", "content": draw(_TEXTS)})
    for _ in range(draw(st.integers(1, 3))):
        question = draw(_TEXTS)
        messages.append({"role": "user", "content": question})
        for _ in range(draw(st.integers(0, 2)) if with_calls else 0):
            messages += draw(_call_turns(question))
        messages.append(draw(_answers(question)))
    shortest = next(turn for turn, message in enumerate(messages) if message["role"] == "assistant") + 1
    messages = messages[: draw(st.integers(shortest, len(messages)))] if draw(st.integers(0, 2)) == 0 else messages
    has_calls = any(message.get("tool_calls") for message in messages)
    tools = TOOLS if draw(st.integers(0, 9)) < (9 if has_calls else 1) else None
    return Conversation(messages=tuple(messages), tools=tools, origin=Origin("generated.jsonl", 1))


CONVERSATIONS = _conversations()
