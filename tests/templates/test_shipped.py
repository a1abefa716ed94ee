"""Shipped templates of families of models write what those families' own do, and train what an assistant says and how it ends.

Own templates: as TRL ships them (the extra `test`); for Mistral, texts that mistral-common 1.8.5 wrote of the same conversations
with its tekken tokenizer of version 3 (`encode_instruct`). For Phi-4, Granite and the prompt of DeepSeek V3 there is none here.
"""

from datetime import date
from typing import Any

import pytest

from raytune.data.conversations.conversation import Conversation, Message, Origin, RowError
from raytune.data.templates.rendering import Renderer
from raytune.data.templates.template import ChatTemplate, Rendered
from raytune.data.templates.text import SHIPPED, TEMPLATES_FOLDER
from tests.templates.shapes import SHAPES, Unrendered, plainly_rendered, tokenizer_for
from tests.templates.twins import twins_folder
from tests.unit.test_data_template import EXPECTED

FOLDER = twins_folder()

NO_CALLS = {shape for shape in SHAPES if "call" in shape}
# Ours -> TRL's; the shapes that ours refuses, where TRL's has tools or drops something without a word; those whose text is
# another on purpose.
OWN: dict[str, tuple[str, set[str], set[str]]] = {
    "qwen-3": ("qwen3", set(), set()),
    "llama-3.1": ("llama3_1", {"call, text", "text, call last"}, set()),
    "gemma": ("gemma3", set(), set()),
    "glm-4.5": ("glm4moe", set(), set()),
    "gpt-oss": ("gptoss", NO_CALLS, set()),
    "deepseek-r1": ("deepseek_r1_distill", NO_CALLS, {*SHAPES} - NO_CALLS - {"user last"}),  # the last answer has its thought
    "deepseek": ("deepseekv3", NO_CALLS, {"thought", "thoughts", "answer in thought"}),  # which is plain text to V3
}


def shipped(name: str) -> str:
    return (TEMPLATES_FOLDER / f"{name}.jinja").read_text()


def written(template: str, shape: str, *, asked: bool = False) -> str | None:
    """Text of a shape, or its prompt for the last turn; None: it is refused."""
    row = SHAPES[shape]
    try:
        return plainly_rendered(template, row, num_turns=len(row.messages) - 1 if asked else None)[0]
    except Unrendered:
        return None


@pytest.mark.skipif(FOLDER is None, reason="trl is not installed")
@pytest.mark.parametrize("name", OWN)
def test_texts_and_prompts_are_those_of_the_familys_own_template(name: str) -> None:
    assert FOLDER is not None
    theirs, refused, others = OWN[name]
    own = (FOLDER / f"{theirs}.jinja").read_text()
    ours = ("{{- bos_token }}" if "bos_token" in own else "") + shipped(name)
    if name == "gpt-oss":
        ours = f"{{% set current_date = '{date.today()}' %}}\n{ours}"
    for shape in SHAPES:
        if shape in refused:
            assert written(ours, shape) is None, shape
        elif shape not in others:
            assert written(ours, shape) == written(own, shape), shape
        if shape not in refused and name != "deepseek":
            assert written(ours, shape, asked=True) == written(own, shape, asked=True), shape
    assert any(written(own, shape) is not None for shape in {*SHAPES} - refused - others) or name == "deepseek-r1"


TOOL = (
    '[{"type": "function", "function": {"name": "forecast", "description": "D1x", "parameters": {"type": "object", "properties": '
    '{"city": {"type": "string", "description": "a city"}}, "required": ["city"]}}}]'
)
CALL_1, CALL_2 = (f'{{"name": "forecast", "arguments": {{"city": "G{n}x"}}, "id": "call0000{n}"}}' for n in (1, 2))
RESULT_1, RESULT_2 = (f'[TOOL_RESULTS]{{"content": "R{n}x", "call_id": "call0000{n}"}}[/TOOL_RESULTS]' for n in (1, 2))
OFFERED = f"[AVAILABLE_TOOLS]{TOOL}[/AVAILABLE_TOOLS]"
OF_MISTRAL_COMMON = {
    "single": "<s>[INST]U1x[/INST]A1x</s>",
    "system": "<s>[INST]U1x[/INST]A1x</s>[INST]S1x\n\nU2x[/INST]A2x</s>",
    "call": f"<s>{OFFERED}[INST]U1x[/INST][TOOL_CALLS][{CALL_1}]</s>{RESULT_1}A1x</s>",
    "call, turn": f"<s>[INST]U1x[/INST][TOOL_CALLS][{CALL_1}]</s>{RESULT_1}A1x</s>{OFFERED}[INST]U2x[/INST]A2x</s>",
    "two calls": f"<s>{OFFERED}[INST]U1x[/INST][TOOL_CALLS][{CALL_1}, {CALL_2}]</s>{RESULT_1}{RESULT_2}A1x</s>",
}


@pytest.mark.parametrize("shape", OF_MISTRAL_COMMON)
def test_nemos_texts_are_those_of_mistral_common(shape: str) -> None:
    assert written("{{- bos_token }}" + shipped("mistral-nemo"), shape) == OF_MISTRAL_COMMON[shape]


def test_texts_of_families_that_nobody_else_writes_here_are_as_written_down() -> None:
    assert written(shipped("phi-4"), "system") == (
        "<|im_start|>system<|im_sep|>S1x<|im_end|><|im_start|>user<|im_sep|>U1x<|im_end|><|im_start|>assistant<|im_sep|>A1x<|im_end|>"
        "<|im_start|>user<|im_sep|>U2x<|im_end|><|im_start|>assistant<|im_sep|>A2x<|im_end|>"
    )
    assert written(shipped("granite"), "single") == (
        "<|start_of_role|>user<|end_of_role|>U1x<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>A1x<|end_of_text|>\n"
    )
    assert written(shipped("deepseek"), "system", asked=True) == (
        "S1x<｜User｜>U1x<｜Assistant｜>A1x<｜end▁of▁sentence｜><｜User｜>U2x<｜Assistant｜>"
    )


# --- What is trained -----------------------------------------------------------------------------------------------------------

QWEN_CALL = '<tool_call>\n{{"name": "forecast", "arguments": {{"city": "{}"}}}}\n</tool_call><|im_end|>'
GLM_CALL = "<tool_call>forecast\n<arg_key>city</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"
EMPTY = "<think>\n\n</think>\n\n"
# The trained pieces of a shape, one by one, or a word of its refusal. White space around an answer and its end is not compared.
TRAINED: dict[str, dict[str, list[str] | str]] = {
    "qwen-3": {
        "turns": ["A1x<|im_end|>", "A2x<|im_end|>", f"{EMPTY}A3x<|im_end|>"],
        "reasoning": ["<think>\nT1x\n</think>\n\nA1x<|im_end|>"],
        "reasonings": "data.reasoning",
        "call": [QWEN_CALL.format("G1x"), f"{EMPTY}A1x<|im_end|>"],
        "call, reasoning": [f"<think>\nT1x\n</think>\n\n{QWEN_CALL.format('G1x')}", f"{EMPTY}A1x<|im_end|>"],
    },
    "llama-3.1": {
        "turns": ["A1x<|eot_id|>", "A2x<|eot_id|>", "A3x<|eot_id|>"],
        "call": ['{"name": "forecast", "parameters": {"city": "G1x"}}<|eot_id|>', "A1x<|eot_id|>"],
        "call, text": "no text beside",
        "reasoning": "reasoning_content",
    },
    "mistral-nemo": {
        "turns": ["A1x</s>", "A2x</s>", "A3x</s>"],
        "system": ["A1x</s>", "A2x</s>"],
        "call": [f"[TOOL_CALLS][{CALL_1}]</s>", "A1x</s>"],
        "two calls": [f"[TOOL_CALLS][{CALL_1}, {CALL_2}]</s>", "A1x</s>"],
    },
    "phi-4": {"turns": ["A1x<|im_end|>", "A2x<|im_end|>", "A3x<|im_end|>"], "call": "no tools", "reasoning": "reasoning_content"},
    "granite": {"turns": [f"A{n}x<|end_of_text|>" for n in (1, 2, 3)], "call, no tools": "no tools", "reasoning": "reasoning"},
    "deepseek": {
        "turns": [f"A{n}x<｜end▁of▁sentence｜>" for n in (1, 2, 3)],
        "thought": ["<think>\nT1x\n</think>\n\nA1x<｜end▁of▁sentence｜>"],
        "call": "no tools",
    },
    "deepseek-r1": {
        "reasoning": ["T1x\n</think>\n\nA1x<｜end▁of▁sentence｜>"],
        "thought": ["T1x\n</think>\n\nA1x<｜end▁of▁sentence｜>"],
        "turns": ["A1x<｜end▁of▁sentence｜>", "A2x<｜end▁of▁sentence｜>", "</think>\n\nA3x<｜end▁of▁sentence｜>"],
        "reasonings": "data.reasoning",
    },
    "glm-4.5": {
        "turns": ["<think></think>\nA1x<|user|>", "<think></think>\nA2x<|user|>", "<think></think>\nA3x"],
        "reasoning": ["<think>T1x</think>\nA1x"],
        "call": [f"<think></think>\n{GLM_CALL.format('G1x')}<|observation|>", "<think></think>\nA1x"],
    },
    "gpt-oss": {
        "turns": [f"<|channel|>final<|message|>{text}" for text in ("A1x<|end|>", "A2x<|end|>", "A3x<|return|>")],
        "reasoning": ["<|channel|>analysis<|message|>T1x<|end|><|start|>assistant<|channel|>final<|message|>A1x<|return|>"],
        "reasonings": "data.reasoning",
        "call": "no tools",
    },
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_an_assistant_says_and_how_it_ends_is_trained_and_nothing_else(name: str) -> None:
    template = ChatTemplate(tokenizer_for(shipped(name)), shipped(name))
    for shape, expected in TRAINED[name].items():
        found = template.render([SHAPES[shape]], "assistant")[0]
        if isinstance(expected, str):
            assert isinstance(found, RowError), shape
            assert expected in str(found), shape
        else:
            assert isinstance(found, Rendered), (shape, found)
            assert [found.text[start:stop].strip() for start, stop in found.targets] == expected, shape


def test_every_shipped_template_is_compared_with_something() -> None:
    assert {*EXPECTED} | {*TRAINED} == {*SHIPPED}


@pytest.mark.parametrize("name", ["qwen-3", "glm-4.5", "mistral-nemo", "llama-3.1", "deepseek-r1"])
def test_work_for_a_chat_of_many_turns_grows_with_them_and_each_answer_is_trained_as_in_a_short_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_calls = name not in ("deepseek-r1", "llama-3.1")
    template = ChatTemplate(tokenizer_for(shipped(name)), shipped(name))
    num_rendered = 0
    apply = Renderer._apply

    def counted(renderer: Renderer, chats: list[list[Message]], *how: Any) -> list[str]:
        nonlocal num_rendered
        num_rendered += sum(map(len, chats))
        return apply(renderer, chats, *how)

    monkeypatch.setattr(Renderer, "_apply", counted)

    def trained(num_exchanges: int) -> list[str]:
        rendered = template.render([_exchanges(num_exchanges, with_calls=with_calls)], "assistant")[0]
        assert isinstance(rendered, Rendered), rendered
        return [rendered.text[slice(*span)] for span in rendered.targets]

    answers, short = trained(60), trained(3)
    per_exchange = len(short) // 3
    before, num_rendered = num_rendered, 0
    assert len(answers) == 60 * per_exchange == (120 if with_calls else 60)
    middle = short[per_exchange : 2 * per_exchange]
    for number in range(1, 59):
        own = answers[per_exchange * number : per_exchange * (number + 1)]
        assert own == [text.replace("N1x", f"N{number}x") for text in middle]
    trained(120)
    assert num_rendered < 2.2 * before


def _exchanges(number: int, *, with_calls: bool) -> Conversation:
    """Of each a question, a call with its result, and an answer, or a thought in the last one."""
    messages: list[Message] = []
    for index in range(number):
        name = f"N{index}x"
        messages.append({"role": "user", "content": f"Where is {name}?"})
        if with_calls:
            call = {"type": "function", "id": "call00001", "function": {"name": "forecast", "arguments": {"city": name}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": "call00001", "name": "forecast", "content": f"of {name}"})
        is_last = index == number - 1
        thought = "<think>\nHm.\n</think>\n\n" if is_last and not with_calls else ""
        messages.append({"role": "assistant", "content": f"{thought}It is {name}."})
    tools = SHAPES["call"].tools if with_calls else None
    return Conversation(messages=tuple(messages), tools=tools, origin=Origin("long.jsonl", 1))
