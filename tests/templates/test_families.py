"""Small templates, each with the odd habit of a family of models, and what of the shapes they may train, written down by hand."""

import json
import re
from functools import cache

import pytest

from raytune.data.conversations.conversation import RowError
from raytune.data.templates.template import ChatTemplate, Rendered
from raytune.errors import DataError
from tests.templates.shapes import SHAPES, tokenizer_for

ALL = "{% for m in messages %}"
END = "{% endfor %}"
CALL = "{{ c.function.name }}{{ c.function.arguments | tojson }}"
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}"


def prompt(text: str, otherwise: str = "") -> str:
    return "{% if add_generation_prompt %}" + text + ("{% else %}" + otherwise if otherwise else "") + "{% endif %}"


# The template, whose lines are joined without anything between; then for shapes the regular expressions that their trained pieces
# match one by one, or the word that the refusal has to name. What an optional group holds may be trained or not.
FAMILIES: dict[str, tuple[tuple[str, ...], dict[str, list[str] | str]]] = {
    "end-of-text once, behind the conversation": (
        (ALL, "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", END, prompt("<|assistant|>\n", "{{ eos_token }}")),
        {
            "turns": ["A1x<|end|>", "A2x<|end|>", "A3x<|end|>(\n</s>)?"],
            "empty": ["<|end|>", "A2x<|end|>(\n</s>)?"],
            "user last": ["A1x<|end|>"],
            "reasoning": "reasoning_content",
            "call": "tool_calls|tools",
        },
    ),
    "channels, another end at the last turn, calls with an end of their own": (
        (
            "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}",
            ALL,
            "{% if m.role == 'assistant' %}",
            "{% if m.reasoning_content %}<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>",
            "{% endif %}",
            "{% if m.tool_calls %}{% set c = m.tool_calls[0] %}",
            "<|start|>assistant to=functions.{{ c.function.name }}<|channel|>commentary<|message|>",
            "{{ c.function.arguments | tojson }}<|call|>",
            "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}",
            "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endif %}",
            "{% elif m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|message|>{{ m.content }}<|end|>",
            "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}",
            END,
            prompt("<|start|>assistant"),
        ),
        {
            "turns": [f"<|channel|>final<|message|>{text}" for text in ("A1x<|end|>", "A2x<|end|>", "A3x<|return|>")],
            "reasoning": [
                "<|channel|>analysis<|message|>T1x<|end|><|start|>assistant<|channel|>final<|message|>A1x<|return|>",
            ],
            "call, turn": [
                ' to=functions.forecast<|channel|>commentary<|message|>{"city": "G1x"}<|call|>',
                "<|channel|>final<|message|>A1x<|end|>",
                "<|channel|>final<|message|>A2x<|return|>",
            ],
            "call, text": "content",
            "two calls": "tool_calls",
        },
    ),
    "the marker of the next role is the end": (
        (
            "[gMASK]<sop>",
            TOOLS,
            ALL,
            "{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content or '' }}",
            f"{{% for c in m.tool_calls or [] %}}<tool_call>{CALL}</tool_call>{{% endfor %}}",
            "{% elif m.role == 'tool' %}<|observation|>\n{{ m.content }}{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}",
            END,
            prompt("<|assistant|>"),
        ),
        {
            "turns": ["\nA1x<|user|>", "\nA2x<|user|>", "\nA3x"],
            "empty": ["\n?<|user|>", "\nA2x"],
            "repeated": ["\nA1x<|user|>", "\nA1x"],
            "answer in thought": ["\n<think>\nT1x, so A1x.\n</think>\n\nA1x"],
            "thoughts": ["\n<think>\nT1x\n</think>\n\nA1x<|user|>", "\n<think>\nT2x\n</think>\n\nA2x"],
            "call, turn": ['\n<tool_call>forecast{"city": "G1x"}</tool_call><|observation|>', "\nA1x<|user|>", "\nA2x"],
            "two calls": [
                '\n<tool_call>forecast{"city": "G1x"}</tool_call><tool_call>forecast{"city": "G2x"}</tool_call><|observation|>',
                "\nA1x",
            ],
        },
    ),
    "a second end between turns only": (
        (
            ALL,
            "<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>",
            "<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>",
            "{% if not loop.last %}<|END_OF_TURN_TOKEN|>{% endif %}",
            "{% else %}<|USER_TOKEN|>{{ m.content }}<|END_OF_TURN_TOKEN|>{% endif %}",
            END,
            prompt("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>"),
        ),
        {
            "turns": [
                "A1x<|END_RESPONSE|>(<|END_OF_TURN_TOKEN|>)?",
                "A2x<|END_RESPONSE|>(<|END_OF_TURN_TOKEN|>)?",
                "A3x<|END_RESPONSE|>(<|END_OF_TURN_TOKEN|>)?",
            ],
            "empty last": ["A1x<|END_RESPONSE|>(<|END_OF_TURN_TOKEN|>)?", "<|END_RESPONSE|>(<|END_OF_TURN_TOKEN|>)?"],
        },
    ),
    "thoughts are stripped, the prompt opens one, arguments are pasted as text": (
        (
            "{{ bos_token }}",
            ALL,
            "{% if m.role == 'assistant' %}<|Assistant|>",
            "{% if m.tool_calls %}{{ m.content or '' }}",
            "{% for c in m.tool_calls %}<|calls|>{{ c.function.name + '\n' + c.function.arguments }}<|/calls|>{% endfor %}",
            "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}{{ eos_token }}",
            "{% elif m.role == 'tool' %}<|result|>{{ m.content }}<|/result|>",
            "{% elif m.role == 'user' %}<|User|>{{ m.content }}{% else %}{{ m.content }}{% endif %}",
            END,
            prompt("<|Assistant|><think>\n"),
        ),
        {
            "turns": ["A1x</s>", "A2x</s>", "A3x</s>"],
            "empty": ["</s>", "A2x</s>"],
            "thought": "think",
            "answer in thought": "think",
            "call": "tools",
            "call, no tools": ['<|calls|>forecast\n{"city": "G1x"}<|/calls|></s>', "A1x</s>"],
        },
    ),
    "refuses rows without tools": (
        (
            "{% if not tools %}{{ raise_exception('needs tools') }}{% endif %}",
            "<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n",
            ALL,
            "<|im_start|>{{ m.role }}\n",
            "{% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>",
            "{% elif m.tool_calls %}{% for c in m.tool_calls %}<tool_call>\n" + CALL + "\n</tool_call>{% endfor %}",
            "{% else %}{{ m.content }}{% endif %}<|im_end|>\n",
            END,
            prompt("<|im_start|>assistant\n"),
        ),
        {
            "single": "needs tools",
            "call, turn": [
                '<tool_call>\nforecast{"city": "G1x"}\n</tool_call><|im_end|>',
                "A1x<|im_end|>",
                "A2x<|im_end|>",
            ],
            "call, text": "content",
            "call last": ['<tool_call>\nforecast{"city": "G1x"}\n</tool_call><|im_end|>'],
        },
    ),
    "the system turn goes into the first question, roles have other names": (
        (
            "{{ bos_token }}{% set ns = namespace(first='') %}",
            ALL,
            "{% if m.role == 'system' %}{% set ns.first = m.content + '\n\n' %}",
            "{% elif m.role == 'tool' %}{{ raise_exception('no role tool') }}",
            "{% else %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n{{ ns.first }}{% set ns.first = '' %}",
            "{{ m.content | trim }}<end_of_turn>\n{% endif %}",
            END,
            prompt("<start_of_turn>model\n"),
        ),
        {
            "system": ["A1x<end_of_turn>", "A2x<end_of_turn>"],
            "white space": ["A1x<end_of_turn>", "A2x<end_of_turn>"],
            "call, text": "no role tool|tool",
            "text, call last": "tool",
        },
    ),
    "results stand in the turn that called, before its text": (
        (
            TOOLS,
            ALL,
            "{% if m.role != 'tool' %}<|turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n",
            f"{{% for c in m.tool_calls or [] %}}<|call>{CALL}<call|>{{% endfor %}}",
            "{% if m.tool_calls and not loop.last %}{% set next = messages[loop.index0 + 1] %}",
            "{% if next.role == 'tool' %}<|tool_response>{{ next.content }}<tool_response|>{% endif %}{% endif %}",
            "{{ m.content or '' }}<turn|>\n{% endif %}",
            END,
            prompt("<|turn>model\n"),
        ),
        {
            "turns": ["A1x<turn|>", "A2x<turn|>", "A3x<turn|>"],
            "call, text": "turn",
            "text, call last": ['<|call>forecast{"city": "G1x"}<call|>A1x<turn|>'],
        },
    ),
    "nothing ends a turn": (
        (
            ALL,
            "{% if m.role == 'user' %}### User:\n{{ m.content }}\n\n",
            "{% elif m.role == 'assistant' %}### Assistant:\n{{ m.content }}{% endif %}",
            END,
            prompt("### Assistant:\n"),
        ),
        {
            "turns": ["A1x(### User:)?", "A2x(### User:)?", "A3x(</s>)?"],
            "system": "system",
        },
    ),
    "the last answer is left open": (
        (
            ALL,
            "<|im_start|>{{ m.role }}\n{{ m.content }}",
            "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}",
            END,
            prompt("<|im_start|>assistant\n"),
        ),
        {
            "turns": ["A1x<|im_end|>", "A2x<|im_end|>", "A3x<|im_end|>"],
            "user last": ["A1x<|im_end|>"],
        },
    ),
    "an answer is opened unasked": (
        (
            ALL,
            "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>",
            END,
            "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
        ),
        {
            "turns": ["A1x<|eot_id|>", "A2x<|eot_id|>", "A3x<|eot_id|>"],
            "empty": ["<|eot_id|>", "A2x<|eot_id|>"],
            "repeated": ["A1x<|eot_id|>", "A1x<|eot_id|>"],
        },
    ),
    "the prompt takes the place of white space between turns": (
        (
            ALL,
            "{{ '<|' + m.role + '|>\\n' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}",
            "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '\\n' }}{% endif %}",
            END,
        ),
        {
            "turns": ["A1x</s>", "A2x</s>", "A3x</s>"],
            "empty": ["</s>", "A2x</s>"],
            "repeated": ["A1x</s>", "A1x</s>"],
        },
    ),
    "markers in square brackets": (
        (
            ALL,
            "[|{{ m.role }}|]{{ m.content }}{% if m.role == 'assistant' %}[|endofturn|]{% endif %}\n",
            END,
            prompt("[|assistant|]"),
        ),
        {
            "system": ["A1x[|endofturn|]", "A2x[|endofturn|]"],
            "white space": ["\n A1x\n [|endofturn|]", " A2x \n[|endofturn|]"],
        },
    ),
    "text in parts": (
        (
            ALL,
            "{{ m.role | capitalize }}:",
            "{% for part in m.content %}{% if part.type == 'text' %} {{ part.text }}{% endif %}{% endfor %}",
            "<end_of_utterance>\n",
            END,
            prompt("Assistant:"),
        ),
        {"turns": [" A1x<end_of_utterance>", " A2x<end_of_utterance>", " A3x<end_of_utterance>"]},
    ),
}


@cache
def template_of(family: str) -> ChatTemplate | DataError:
    text = "".join(FAMILIES[family][0])
    try:
        return ChatTemplate(tokenizer_for(text), text)
    except DataError as error:
        return error


@pytest.mark.parametrize(("family", "shape"), [(family, shape) for family, (_, shapes) in FAMILIES.items() for shape in shapes])
def test_an_odd_habit_trains_what_is_written_down_or_names_the_cause(family: str, shape: str) -> None:
    template, expected = template_of(family), FAMILIES[family][1][shape]
    found = template if isinstance(template, DataError) else template.render([SHAPES[shape]], "assistant")[0]
    if isinstance(expected, str):
        assert isinstance(found, RowError | DataError), json.dumps(found.text)
        assert re.search(expected, str(found)), found
        return
    assert isinstance(found, Rendered), found
    trained = [found.text[start:end] for start, end in found.targets]
    assert len(trained) == len(expected), trained
    for text, pattern in zip(trained, expected):
        assert re.fullmatch(_literal_but_for_groups(pattern), text), (text, pattern)


def _literal_but_for_groups(pattern: str) -> str:
    """`(x)?` and `\\n?` are regular expressions; all else stands for itself."""
    parts = re.split(r"(\([^()]*\)\?|\n\?)", pattern)
    kept = [part if index % 2 else re.escape(part) for index, part in enumerate(parts)]
    return "".join(f"({re.escape(part[1:-2])})?" if part.startswith("(") and part.endswith(")?") else part for part in kept)
