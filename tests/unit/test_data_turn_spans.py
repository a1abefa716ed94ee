"""What is trained of a row is what its assistant writes, with its ends, and nothing else; or the row is refused and told why."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raytune.config.sections.data import DataSection, DataSource
from raytune.config.sections.evaluation import SuiteSection
from raytune.data.conversations.conversation import Conversation, Message, Origin, RowError
from raytune.data.conversations.masking import Targets
from raytune.data.store.build import build_store
from raytune.data.store.store import StoreInfo
from raytune.data.templates.template import ChatTemplate, Rendered
from raytune.data.templates.text import resolve_template
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.errors import DataError
from raytune.evaluation.questions import read_questions
from raytune.plan.data.data_limits import refuse_exceeded, verdicts_of
from tests.tiny import tiny_request, tiny_store, tiny_tokenizer

CASES = Path(__file__).parents[1] / "cases"


def tokenizer_with(*tokens: str, eos: str | None = None) -> PreTrainedTokenizerFast:
    """The demo's tokenizer with more special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    if eos is not None:
        tokenizer.add_special_tokens({"eos_token": eos})
    return tokenizer


def chat(*turns: str | Message, tools: list[Any] | None = None, system: str | None = None) -> Conversation:
    """Questions and answers in turn; a dict stands for itself."""
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    for turn in turns:
        role = "assistant" if messages and messages[-1]["role"] in ("user", "tool") else "user"
        messages.append(turn if isinstance(turn, dict) else {"role": role, "content": turn})
    return Conversation(messages=tuple(messages), tools=tools, origin=Origin("rows.jsonl", 1))


def trained(template: ChatTemplate, row: Conversation, targets: Targets = "assistant") -> list[str]:
    rendered = template.render([row], targets)[0]
    assert isinstance(rendered, Rendered), rendered
    return [rendered.text[start:stop] for start, stop in rendered.targets]


def refusal(template: ChatTemplate, row: Conversation, targets: Targets = "assistant") -> str:
    refused = template.render([row], targets)[0]
    assert isinstance(refused, RowError), refused
    return str(refused)


def call(arguments: Any, content: str | None = None, name: str = "weather") -> Message:
    calls = [{"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


RESULT: Message = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "rain"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}}


# --- The cases ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "template", "num_targets"),
    [("1", "mini.jinja", 13), ("2", "mini.jinja", 15), ("4", "mini.jinja", 38), ("6", "qwen", 76), ("13", "mini.jinja", 11)],
)
def test_as_many_tokens_are_trained_as_the_answers_of_a_case_have(
    case: str, template: str, num_targets: int, tmp_path: Path
) -> None:
    folder = CASES / case
    text = resolve_template(str(folder / template) if template.endswith(".jinja") else template, tiny_tokenizer())
    assert not text.startswith("\ufeff")
    info = tiny_store(tmp_path, str(folder / "rows.jsonl"), max_rows=None, template=text, packing="none")
    assert info.num_targets == num_targets


def test_a_template_that_drops_tool_calls_is_refused_by_name_with_the_field(tmp_path: Path) -> None:
    text = resolve_template("chatml", tiny_tokenizer())
    with pytest.raises(DataError, match=r"rows.jsonl:1: the shipped chat template 'chatml' does not show tool_calls of turn 2"):
        tiny_store(tmp_path, str(CASES / "6" / "rows.jsonl"), max_rows=None, template=text)


def test_the_expected_answer_of_a_call_is_what_the_template_writes(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer, resolve_template("qwen", tokenizer))
    suite = SuiteSection(rows=[DataSource(path=str(CASES / "9" / "questions.jsonl"))])
    (question,) = read_questions(suite, "evaluation.generation", template, tokenizer, {}, tmp_path)
    assert question.expected == '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_the_expected_answer_holds_the_thought_that_is_trained() -> None:
    text = CHATML.replace("%END%", "<|im_end|>\n").replace("%PROMPT%", PROMPT.replace("assistant\n", "assistant\n<think>\n"))
    template = ChatTemplate(tiny_tokenizer(), text)
    assert template.expected(chat("Q1", "<think>\nhm\n</think>\n\nA1")) == "hm\n</think>\n\nA1"
    assert template.expected(chat("Q1", "A1")) == "A1"
    assert template.expected(chat("Q1", " ")) == ""
    empty = CHATML.replace("{{ m.content }}", "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}")
    template = ChatTemplate(tiny_tokenizer(), empty.replace("%END%", "<|im_end|>\n").replace("%PROMPT%", PROMPT))
    assert template.expected(chat("Q1", "A1")) == "<think></think>A1"


def test_the_expected_answer_is_whole_where_a_template_marks_it_in_pieces() -> None:
    """As one of TRL's does: the answer, and behind it the token that ends it."""
    text = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|a|>{% generation %}{{ m.content + '<e>\\n' }}{% endgeneration %}"
        "{% else %}<|u|>{{ m.content + '<e>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|a|>{% else %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
    )
    template = ChatTemplate(tiny_tokenizer(), text)
    assert template.expected(chat("Q1", "A1")) == "A1"
    assert template.expected(chat("Q1", "A1", "Q2", "A2")) == "A2"


def test_a_call_that_is_not_to_be_trained_can_be_asked_for() -> None:
    template = ChatTemplate(tiny_tokenizer(), resolve_template("qwen", tiny_tokenizer()))
    row = chat("Q", call({"city": "Oslo"}) | {"train": False})
    assert template.expected(row) == '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_markers_that_are_no_tokens_are_said() -> None:
    tokenizer = tiny_tokenizer()
    (note,) = ChatTemplate(tokenizer, resolve_template("llama-3", tokenizer)).notes
    assert "<|eot_id|> (10 tokens)" in note
    assert "generation cannot stop" in note
    assert ChatTemplate(tokenizer, resolve_template("qwen", tokenizer)).notes == []
    gpt = tiny_tokenizer()
    gpt._tokenizer = type(gpt._tokenizer).from_str(json.dumps(without_added_tokens(gpt)))
    gpt.eos_token = "a"
    (note,) = ChatTemplate(gpt, resolve_template("qwen", tokenizer)).notes
    assert "<|im_start|> (12 tokens), <|im_end|> (10 tokens)" in note


def without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Any:
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    return description | {"added_tokens": []}


# --- Ends --------------------------------------------------------------------------------------------------------------------

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}%END%{% endfor %}%PROMPT%"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("text", "answers", "stop"),
    [
        # Phi-3: end-of-text once, at the very end.
        (
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}",
            ["A1<|end|>", "A2<|end|>\n</s>"],
            "<|end|>",
        ),
        # gpt-oss: another end for the last one.
        (
            "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
            "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}",
            ["A1<|end|>", "A2<|return|>"],
            "<|return|>",
        ),
        # GLM: the marker of the next turn.
        (
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
            ["A1<|user|>", "A2"],
            "<|user|>",
        ),
        # Qwen1.5: no end behind the last one, whose end is added.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
            "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT,
            ["A1<|im_end|>", "A2<|im_end|>"],
            "<|im_end|>",
        ),
        # Llama 2: what ends a turn and what begins the next stand side by side.
        (
            "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
            [" A1 </s>", " A2 </s>"],
            "</s>",
        ),
        # One that opens the next answer without being asked.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{{ '<|im_start|>assistant\n' }}",
            ["A1<|im_end|>", "A2<|im_end|>"],
            "<|im_end|>",
        ),
    ],
)
def test_an_answer_ends_as_its_template_ends_it_and_before_the_next_turn(text: str, answers: list[str], stop: str) -> None:
    markers = ("<|end|>", "<|return|>", "<|start|>", "<|message|>", "<|user|>", "<|assistant|>", "<s>")
    tokenizer = tokenizer_with(*markers, eos="</s>")
    template = ChatTemplate(tokenizer, text)
    assert trained(template, chat("Q1", "A1", "Q2", "A2")) == answers
    assert trained(template, chat("Q1", "A1", "Q2", "A2"), "last") == answers[1:]
    assert tokenizer.convert_ids_to_tokens(template.stop_ids) == [stop]
    # Answers that stand in questions, that are repeated and that are empty.
    assert trained(template, chat("say A1", "A1", "A1 again", "A2")) == answers
    assert trained(template, chat("Q1", "A1", "Q2", "A1")) == [answers[0], answers[1].replace("A2", "A1")]
    empty = trained(template, chat("Q1", "", "Q2", "A2"))
    assert empty == [answers[0].replace("A1", ""), answers[1]]


def test_what_is_known_of_a_chat_letter_by_letter_equals_what_marks_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    rows = [
        chat("Q1", "A1"),
        chat("", "A1", "A1", ""),
        chat(" Q\n", "\n A \n", "Q", "Q", system="S"),
        chat("<|im_end|>", "<|im_end|>\n"),
    ]
    for name in ("chatml", "qwen", "llama-3", "plain", "alpaca", "mistral", "llama-2", "gemma"):
        template = ChatTemplate(tokenizer, resolve_template(name, tokenizer))
        quick = [template.render([row], "assistant")[0] for row in rows]
        monkeypatch.setattr(template, "_frame", None)
        assert [template.render([row], "assistant")[0] for row in rows] == quick


def test_an_answer_that_also_stands_in_its_thought_is_trained_to_its_end() -> None:
    template = ChatTemplate(tiny_tokenizer(), CHATML.replace("%END%", "<|im_end|>\n").replace("%PROMPT%", PROMPT))
    answer = "<think>\nis it A1? A1<|im_end|>\n</think>\n\nA1"
    assert trained(template, chat("Q1", answer)) == [f"{answer}<|im_end|>"]
    assert trained(template, chat("Q1", answer, "Q2", answer)) == [f"{answer}<|im_end|>"] * 2


# --- What is not shown -------------------------------------------------------------------------------------------------------

STRIPS_EARLIER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip() }}<|im_end|>\n{% endfor %}" + PROMPT
)


STRIPS_THOUGHTS = """{%- for message in messages %}
{%- set text = message.content %}
{%- if message.role == 'assistant' and '</think>' in text and not (KEEPS and loop.last) %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\n' + text + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def test_a_thought_that_the_prompt_opens_is_a_thought_too() -> None:
    row = chat("Q", "why\n</think>\n\nA", "R", "how\n</think>\n\nB")
    strips = ChatTemplate(tiny_tokenizer(), STRIPS_THOUGHTS.replace("KEEPS", "false"))
    assert "strips the thought (</think>) in content of turn 2" in refusal(strips, row)
    keeps_last = ChatTemplate(tiny_tokenizer(), STRIPS_THOUGHTS.replace("KEEPS", "true"))
    assert "data.targets: last that one alone" in refusal(keeps_last, row)
    assert trained(keeps_last, row, "last") == ["how\n</think>\n\nB<|im_end|>"]


ONE_TURN = """{%- for message in messages %}
{%- set goes_on = message.role == 'assistant' and not loop.first and messages[loop.index0 - 1].role == 'assistant' %}
{{- ('' if goes_on else '<|im_start|>' + message.role + '\n') + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'assistant' %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


@pytest.mark.parametrize("words", [("A", "B"), ("", "B"), ("A", ""), ("", "")])
def test_answers_that_a_template_joins_into_one_turn_share_no_text(words: tuple[str, str]) -> None:
    template = ChatTemplate(tiny_tokenizer(), ONE_TURN)
    first, second = ({"role": "assistant", "content": content} for content in words)
    assert trained(template, chat("Q", first, second)) == [f"{content}<|im_end|>" for content in words]
    assert trained(template, chat("Q", first | {"train": False}, second)) == [f"{words[1]}<|im_end|>"]
    assert trained(template, chat("Q", first, second | {"train": False})) == [f"{words[0]}<|im_end|>"]


OPEN_LAST = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content }}
{%- if not (loop.last and message.role == 'assistant') or not add_generation_prompt %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'assistant' %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def test_an_answer_behind_another_does_not_begin_with_the_end_of_that_one() -> None:
    template = ChatTemplate(tiny_tokenizer(), OPEN_LAST)
    first, second = ({"role": "assistant", "content": content} for content in ("A", "B"))
    (kept,) = trained(template, chat("Q", first | {"train": False}, second))
    assert kept.endswith("B<|im_end|>")
    assert kept.count("<|im_end|>") == 1
    assert trained(template, chat("Q", first, second | {"train": False})) == ["A<|im_end|>"]


MARKED_WITH_HEADERS = """{%- for message in messages %}
{%- if message.role == 'assistant' %}
{% generation %}{{- '<|im_start|>assistant\n' + message.content + '<|im_end|>\n' }}{% endgeneration %}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
MARKED = MARKED_WITH_HEADERS.replace(
    "{% generation %}{{- '<|im_start|>assistant\n' + message.content",
    "{{- '<|im_start|>assistant\n' }}{% generation %}{{- message.content",
)


@pytest.mark.parametrize("text", [MARKED, MARKED_WITH_HEADERS], ids=["headers outside", "headers inside"])
@pytest.mark.parametrize("between", [[], [""]], ids=["one behind the other", "an empty question between"])
@pytest.mark.parametrize("words", [("A", "B"), ("A", ""), ("", "B"), ("", "")])
def test_marked_blocks_belong_to_one_turn_each(words: tuple[str, str], between: list[str], text: str) -> None:
    first, second = ({"role": "assistant", "content": content} for content in words)
    questions: list[Message] = [{"role": "user", "content": content} for content in between]
    template = ChatTemplate(tiny_tokenizer(), text)

    def ends(*turns: Message) -> list[str]:
        return [answer.strip() for answer in trained(template, chat("Q", *turns))]

    assert ends(first, *questions, second) == [f"{content}<|im_end|>" for content in words]
    assert ends(first | {"train": False}, *questions, second) == [f"{words[1]}<|im_end|>"]
    assert ends(first, *questions, second | {"train": False}) == [f"{words[0]}<|im_end|>"]


def test_signs_that_look_like_our_own_marks_are_trained_or_named() -> None:
    template = ChatTemplate(tiny_tokenizer(), resolve_template("qwen", tiny_tokenizer()))
    row = chat("Q ⸨0⸩ ⦗ ⟬", call({"city": "⦗x⦘"}), RESULT, "⸨1⸩ ⟬⟭", tools=[TOOL])
    assert trained(template, row)[1] == "⸨1⸩ ⟬⟭<|im_end|>"
    assert "has all the signs" in refusal(template, chat("⸨0⸩ ⦗0⦘ ⟬0⟭", call({"city": "x"}), RESULT, "A"))


def test_a_thought_that_the_template_strips_is_the_named_cause_and_targets_last_the_way_out() -> None:
    template = ChatTemplate(tiny_tokenizer(), STRIPS_EARLIER)
    row = chat("Q1", "<think>hm</think>A1", "Q2", "<think>so</think>A2")
    message = refusal(template, row)
    assert "strips the thought (<think>) in content of turn 2" in message
    assert "data.targets: last" in message
    assert "generation %}" not in message
    assert trained(template, row, "last") == ["<think>so</think>A2<|im_end|>"]


def test_reasoning_is_trained_where_it_is_shown_and_refused_where_it_is_not() -> None:
    row = chat("Q1", {"role": "assistant", "content": "A1", "reasoning_content": "because"})
    plain = ChatTemplate(tiny_tokenizer(), resolve_template("chatml", tiny_tokenizer()))
    assert "strips reasoning_content of turn 2" in refusal(plain, row)
    shows = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
    )
    assert trained(ChatTemplate(tiny_tokenizer(), shows), row) == ["[because]A1<|im_end|>"]


def test_tools_and_a_system_turn_beside_them_have_to_come_out() -> None:
    beside = CHATML.replace("%END%", "<|im_end|>\n").replace("%PROMPT%", PROMPT)
    template = ChatTemplate(tiny_tokenizer(), beside)
    assert "does not show the tools" in refusal(template, chat("Q1", "A1", tools=[TOOL]))
    instead = (
        "{% if tools %}{{ tools | tojson }}{% set messages = messages | rejectattr('role', 'equalto', 'system') %}{% endif %}"
        + beside
    )
    template = ChatTemplate(tiny_tokenizer(), instead)
    assert trained(template, chat("Q1", "A1", tools=[TOOL])) == ["A1<|im_end|>"]
    assert "does not show content of turn 1 (system)" in refusal(template, chat("Q1", "A1", tools=[TOOL], system="Be brief."))


def test_tool_results_inside_of_an_answer_are_never_trained() -> None:
    scans_ahead = (
        "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n"
        "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.city }}){% endfor %}"
        "{% if m.tool_calls and not loop.last and loop.nextitem.role == 'tool' %}[{{ loop.nextitem.content }}]{% endif %}"
        "{{ m.content or '' }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT
    )
    template = ChatTemplate(tiny_tokenizer(), scans_ahead)
    assert "writes turn 3 (tool) in the middle of the answer in turn 2" in refusal(
        template, chat("Q1", call({"city": "Oslo"}, "I look."), RESULT, "It rains.")
    )


# --- Calls -------------------------------------------------------------------------------------------------------------------

CALLS = {
    "object": "{{ c.function.arguments | tojson }}",
    "text": "{{ '' + c.function.arguments }}",
    "printed": "{{ c.function.arguments }}",
    "either": "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
}
CONTENT = {"strict": "{{ '' + m['content'] }}", "printed": "{{ m.content | string }}", "lenient": "{{ m.content or '' }}"}


@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("arguments", CALLS)
def test_a_call_is_rendered_in_the_form_that_the_template_takes(arguments: str, content: str) -> None:
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + CONTENT[content] + "{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function.name }} " + CALLS[arguments] + "</call>{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
    )
    template = ChatTemplate(tiny_tokenizer(), text)
    row = chat("Q1", call({"city": "Oslo", "days": 2}), RESULT, "It rains.", "Q2", call({"days": 3}))
    assert trained(template, row) == [
        '<call>weather {"city": "Oslo", "days": 2}</call><|im_end|>',
        "It rains.<|im_end|>",
        '<call>weather {"days": 3}</call><|im_end|>',
    ]
    assert trained(template, chat("Q1", call({"city": "Oslo"}, "I look.")))[0].startswith("I look.<call>")


def test_a_call_whose_end_is_the_marker_of_a_result_is_trained_with_it() -> None:
    text = (
        "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}</tool_call>{{ c.function.name }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = tokenizer_with("<|user|>", "<|assistant|>", "<|observation|>")
    template = ChatTemplate(tokenizer, text)
    assert trained(template, chat("Q1", call({"city": "Oslo"}), RESULT, "It rains.", "Q2", "A2")) == [
        '<tool_call>{"city": "Oslo"}</tool_call>weather<|observation|>',
        "It rains.<|user|>",
        "A2",
    ]
    assert tokenizer.convert_ids_to_tokens(template.stop_ids) == ["<|user|>", "<|observation|>"]


def test_turns_that_the_row_takes_out_of_training_are_shown_and_not_trained() -> None:
    template = ChatTemplate(tiny_tokenizer(), resolve_template("qwen", tiny_tokenizer()))
    row = chat("Q1", {"role": "assistant", "content": "BAD", "train": False}, "Q2", "A2")
    rendered = template.render([row], "assistant")[0]
    assert isinstance(rendered, Rendered)
    assert "BAD" in rendered.text
    assert "train" not in rendered.text


def test_a_template_of_a_vision_model_takes_its_text_in_parts() -> None:
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n"
        "{% endfor %}" + PROMPT
    )
    assert trained(ChatTemplate(tiny_tokenizer(), text), chat("Q1", "A1", "Q2", "A2")) == ["A1<|im_end|>", "A2<|im_end|>"]


def test_blocks_of_a_marked_template_do_not_train_what_the_prompt_writes_and_can_be_left_out_by_turn() -> None:
    text = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT
    )
    template = ChatTemplate(tiny_tokenizer(), text)
    assert trained(template, chat("Q1", "A1", "Q2", "A2")) == ["A1<|im_end|>", "A2<|im_end|>"]
    assert trained(template, chat("Q1", "A1", "Q2", "A2"), "last") == ["A2<|im_end|>"]
    only_last = text.replace("m.role == 'assistant' %}", "m.role == 'assistant' and loop.last %}", 1)
    assert "leave out the answer in turn 2" in refusal(ChatTemplate(tiny_tokenizer(), only_last), chat("Q1", "A1", "Q2", "A2"))


# --- Prompts -----------------------------------------------------------------------------------------------------------------


def merging_model(folder: Path) -> str:
    """A tokenizer that takes a space into the word behind it, as most do; the folder."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([path.read_text() for path in (CASES / "12").glob("*.jsonl")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    return str(folder)


def case_12(name: str, folder: Path, **changes: Any) -> StoreInfo:
    path = merging_model(folder / "tokenizer")
    tokenizer = open_tokenizer(path)
    request = tiny_request(
        str(CASES / "12" / f"{name}.jsonl"),
        max_rows=None,
        template=resolve_template("plain", tokenizer),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        **changes,
    )
    return build_store(request, tokenizer_path=path, folder=str(folder / "stores"))


def admit(info: StoreInfo, **data: Any) -> None:
    refuse_exceeded(verdicts_of({"training": info.report}, DataSection(**data)))


def test_answers_behind_other_tokens_than_their_prompts_stop_the_run_with_an_example(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        admit(case_12("space_in_prompt", tmp_path))
    message = str(refused.value)
    assert "(space_in_prompt.jsonl): 8 of 8 compared answers (100 %) are trained behind other tokens" in message
    assert "space_in_prompt.jsonl:1: asked with the tokens ' Answer|:| ', trained behind ' Answer|:| red" in message
    assert "data.on_prompt_mismatch to accept" in message


def test_a_waiver_goes_on_and_says_how_many(tmp_path: Path) -> None:
    info = case_12("space_in_prompt", tmp_path)
    admit(info, on_prompt_mismatch="accept")
    (source,) = info.report.sources
    assert (source.prompts_differ, source.prompts_compared) == (8, 8)
    (source,) = case_12("space_in_answer", tmp_path).report.sources
    assert (source.prompts_differ, source.prompts_compared) == (0, 8)


def test_a_prompt_that_opens_a_thought_which_rows_do_not_have_stops_the_run(tmp_path: Path) -> None:
    opens = CHATML.replace("%END%", "<|im_end|>\n").replace("%PROMPT%", PROMPT.replace("assistant\n", "assistant\n<think>\n"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat("Q1", "A1").messages}) + "\n")
    with pytest.raises(DataError, match=r"1 of 1 compared answers \(100 %\) are trained behind other"):
        admit(tiny_store(tmp_path / "stores", str(tmp_path / "rows.jsonl"), template=opens))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat("Q1", "<think>\nhm\n</think>\n\nA1").messages}) + "\n")
    info = tiny_store(tmp_path / "stores", str(tmp_path / "rows.jsonl"), template=opens)
    admit(info)
    assert info.num_targets == len("hm\n</think>\n\nA1") + 1
