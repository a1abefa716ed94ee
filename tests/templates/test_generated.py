"""In generated templates, what is trained is exactly what the assistant writes and its end, or the row is refused."""

import json
from dataclasses import replace
from functools import cache
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from raytune.data.conversations.conversation import Conversation, Message, RowError
from raytune.data.templates.template import ChatTemplate, Rendered
from raytune.errors import DataError
from tests.templates.generated import (
    BOS,
    CALLS,
    CONVERSATIONS,
    ENDS,
    EOS,
    HABITS,
    NULL,
    RESULTS,
    SPECIAL,
    Ends,
    Habits,
    Reference,
    prompt_of,
    reference,
)
from tests.tiny import PATIENT, tiny_tokenizer


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    special = tiny_tokenizer()
    special.add_special_tokens({"additional_special_tokens": list(SPECIAL), "bos_token": BOS, "eos_token": EOS})
    return special


@cache
def template_of(habits: Habits) -> ChatTemplate | DataError:
    try:
        return ChatTemplate(tokenizer(), habits.jinja)
    except DataError as error:
        return error


def fault_in(habits: Habits, row: Conversation) -> str:
    """What is wrong with what we train of a row; empty if nothing is."""
    template, expected = template_of(habits), reference(habits, row)
    found = template if isinstance(template, DataError) else template.render([row], "assistant")[0]
    if isinstance(found, RowError | DataError):
        if expected.has_to_refuse or expected.may_refuse:
            return ""
        return f"refused though nothing is unclear: {found}"
    if expected.has_to_refuse:
        return f"trained, and the template does not show '{expected.has_to_refuse}': {_trained(found)}"
    if found.text in expected.completed:
        expected = _with_text(expected, found.text)
    if found.text != expected.text:
        return f"the text is {found.text!r} and should be {expected.text!r}"
    if fault := _mask_fault(found, expected):
        return fault
    assert isinstance(template, ChatTemplate)
    last = template.render([row], "last")[0]
    if not isinstance(last, Rendered):
        return f"with targets 'last' it is refused: {last}"
    return _mask_fault(last, Reference(expected.text, expected.answers[-1:], "", ""))


def _with_text(expected: Reference, completed: str) -> Reference:
    *answers, last = expected.answers
    start = min(last.must[0], len(completed) - len(EOS))
    last = replace(last, must=(start, len(completed)), may=(min(last.may[0], start), len(completed)))
    return replace(expected, text=completed, answers=[*answers, last])


def _mask_fault(found: Rendered, expected: Reference) -> str:
    trained = {index for start, end in found.targets for index in range(start, end)}
    must = {index for answer in expected.answers for index in range(*answer.must)}
    may = {index for answer in expected.answers for index in range(*answer.may)} | must
    if must <= trained <= may:
        return ""
    return f"trained {_trained(found)} and should {[expected.text[slice(*answer.must)] for answer in expected.answers]}"


def _trained(found: Rendered) -> list[str]:
    return [found.text[start:end] for start, end in found.targets]


def holds(habits: Habits, row: Conversation) -> None:
    fault = fault_in(habits, row)
    assert not fault, f"{fault}\n{habits}\n{json.dumps(row.messages, ensure_ascii=False)}\n{habits.jinja}"


def _plain(message: Message, *, arguments_as_text: bool) -> Message:
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message.get("tool_calls") or ()
    ]
    return message | {"content": message.get("content") or ""} | ({"tool_calls": calls} if calls and arguments_as_text else {})


@settings(PATIENT, max_examples=3 * settings().max_examples, derandomize=True)
@given(HABITS, CONVERSATIONS)
def test_the_reference_writes_what_jinja_writes(habits: Habits, row: Conversation) -> None:
    expected = reference(habits, row)
    messages = [_plain(message, arguments_as_text=habits.arguments_as_text) for message in row.messages]

    def rendered(num_turns: int | None = None) -> str:
        texts: Any = render_jinja_template(
            conversations=[messages[:num_turns]],
            tools=row.tools,
            chat_template=habits.jinja,
            add_generation_prompt=num_turns is not None,
            bos_token=BOS,
            eos_token=EOS,
        )
        return texts[0][0]

    if expected.has_to_refuse == "System role not supported":
        with pytest.raises(Exception, match="System role not supported"):
            rendered()
        return
    assert rendered() == expected.text
    for answer in expected.answers:
        assert rendered(answer.turn) == prompt_of(habits, row, answer.turn)


@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("ends", ENDS)
def test_the_assistants_parts_and_their_ends_are_trained_or_the_row_is_refused(ends: Ends, calls: str) -> None:
    # The same examples in every run, and others in every cell, which derandomize would not give.
    @seed(crc32(f"{ends}, {calls}".encode()))
    @settings(PATIENT, max_examples=settings().max_examples // 2, database=None, report_multiple_bugs=False)
    @given(st.builds(_with, HABITS, st.just(ends), st.just(calls)), CONVERSATIONS)
    def property_holds(habits: Habits, row: Conversation) -> None:
        holds(habits, row)

    property_holds()


@settings(PATIENT, database=None)
@given(HABITS, st.lists(CONVERSATIONS, min_size=4, max_size=8))
def test_of_long_chats_too_of_which_not_every_beginning_is_rendered(habits: Habits, rows: list[Conversation]) -> None:
    first, *others = rows
    behind = [message for row in others for message in row.messages if message["role"] != "system"]
    tools = next((row.tools for row in rows if row.tools), None)
    holds(habits, replace(first, messages=(*first.messages, *behind), tools=tools))


@pytest.mark.slow
@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("ends", ENDS)
def test_the_assistants_parts_and_their_ends_are_trained_in_many_more_templates(ends: Ends, calls: str) -> None:
    @settings(PATIENT, max_examples=300)
    @given(st.builds(_with, HABITS, st.just(ends), st.just(calls)), CONVERSATIONS)
    def property_holds(habits: Habits, row: Conversation) -> None:
        holds(habits, row)

    property_holds()


def _with(habits: Habits, ends: Ends, calls: str) -> Habits:
    return replace(habits, ends=ends, calls=calls)


PLAIN_HABITS = [
    Habits(ends=ends, calls=calls, results=results, null_content=null, arguments_as_text=as_text)
    for ends in ENDS
    if ends != "none"
    for calls in ("beside", "before")
    for results, null, as_text in zip(RESULTS, NULL[:2] * 2, (False, True, False))
]


@pytest.mark.parametrize("habits", PLAIN_HABITS, ids=lambda habits: f"{habits.ends}, {habits.calls}, {habits.results}")
def test_templates_that_show_everything_refuse_nothing(habits: Habits) -> None:
    """A judge that lets everything be refused would be content with a trainer that refuses everything."""

    @seed(crc32(str(habits).encode()))
    @settings(PATIENT, max_examples=settings().max_examples // 3, database=None, report_multiple_bugs=False)
    @given(CONVERSATIONS)
    def property_holds(row: Conversation) -> None:
        holds(habits, row)
        assert not reference(habits, row).has_to_refuse

    property_holds()


@pytest.mark.parametrize("ends", [ends for ends in ENDS if ends != "none"])
def test_the_stop_token_is_what_ends_the_last_answer(ends: Ends) -> None:
    template = template_of(Habits(ends=ends, calls="beside"))
    assert isinstance(template, ChatTemplate)
    stop = {"same": "<|im_end|>", "once more at the very end": "<|im_end|>", "other at the last": "<|return|>"}
    stop |= {"eos": EOS, "next marker": "<|user|>"}
    assert tokenizer().convert_tokens_to_ids(stop[ends]) in template.stop_ids


@settings(PATIENT, max_examples=2 * settings().max_examples, derandomize=True)
@given(HABITS, CONVERSATIONS)
def test_the_prompt_is_what_the_template_writes_before_the_last_answer(habits: Habits, row: Conversation) -> None:
    template, expected = template_of(habits), reference(habits, row)
    turn = len(row.messages) - 1
    if isinstance(template, DataError) or row.messages[turn]["role"] != "assistant" or expected.has_to_refuse:
        return
    try:
        prompt = template.prompt(row)
    except RowError:
        assert expected.may_refuse
        return
    assert prompt == prompt_of(habits, row, turn)
