"""Masks are exact for every shipped template and for templates of others, without `{% generation %}` markers."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from raytune.data.conversations.conversation import Conversation, Message, Origin, RowError
from raytune.data.conversations.masking import Targets
from raytune.data.rows.documents import Document, encoded_chats
from raytune.data.templates.template import ChatTemplate, Rendered
from raytune.data.templates.text import TEMPLATES_FOLDER, resolve_template
from raytune.data.templates.text_encoder import TextEncoder
from raytune.data.templates.tokenizers import adds_bos, open_tokenizer, tokenizer_fingerprint
from raytune.errors import DataError, ModelError
from tests.tiny import PATIENT, tiny_rows, tiny_tokenizer
from tests.variants import chequered

CORPUS = [message["content"] for row in tiny_rows(200) for message in row["messages"]] + [
    "<|im_start|>user\n### Instruction: [INST] assistant Ünïcödé \U0001f600 日本語 \n\n  spaces\tand tabs"
] * 20
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]


@cache
def llama_2_like() -> PreTrainedTokenizerFast:
    """As SentencePiece converted: white space is U+2581, unknown characters fall back to bytes, <s> is put in front."""
    normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    names = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *trained.get_vocab()]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizer
    backend.add_special_tokens(["<unk>", *SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def llama_3_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a split by regular expression, <s> in front."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ?[^\\s]+|\\s+", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    _train_byte_level(backend)
    vocabulary = backend.get_vocab()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@cache
def qwen_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE over NFC text, nothing put in front."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    _train_byte_level(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def _train_byte_level(backend: Tokenizer) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)


TOKENIZERS = {"bytes": tiny_tokenizer, "llama-2": llama_2_like, "llama-3": llama_3_like, "qwen": qwen_like}


def conversation(*turns: tuple[str, str] | Message, tools: list[Any] | None = None) -> Conversation:
    messages = tuple(turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]} for turn in turns)
    return Conversation(messages=messages, tools=tools, origin=Origin("test.jsonl", 1))


def template_of(name: str, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate(tokenizer, resolve_template(name, tokenizer))


def trained_text(template: ChatTemplate, row: Conversation, targets: Targets = "assistant") -> list[str]:
    rendered = template.render([row], targets)[0]
    assert isinstance(rendered, Rendered), rendered
    return [rendered.text[start:end] for start, end in rendered.targets]


FOUR_TURNS = conversation(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao"))

# What the whole text is and what of it an assistant writes, with <s> and </s> as the tokenizer's own.
EXPECTED = {
    "chatml": (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>\n",
        ["Hello<|im_end|>", "Ciao<|im_end|>"],
    ),
    "llama-2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST] Ciao </s>",
        [" Hello </s>", " Ciao </s>"],
    ),
    "llama-3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nCiao<|eot_id|>",
        ["Hello<|eot_id|>", "Ciao<|eot_id|>"],
    ),
    "mistral": ("<s>[INST] Be brief.\n\nHi[/INST] Hello</s>[INST] Bye[/INST] Ciao</s>", [" Hello</s>", " Ciao</s>"]),
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nCiao<end_of_turn>\n",
        ["Hello<end_of_turn>", "Ciao<end_of_turn>"],
    ),
    "alpaca": (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\nCiao</s>",
        ["Hello</s>", "Ciao</s>"],
    ),
    "plain": ("<s>Be brief.HiHello</s>ByeCiao</s>", ["Hello</s>", "Ciao</s>"]),
}
EXPECTED["qwen"] = EXPECTED["chatml"]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_text_and_targets_of_shipped_templates_are_as_written_down(name: str) -> None:
    template = template_of(name, llama_3_like())
    text, answers = EXPECTED[name]
    rendered = template.render([FOUR_TURNS], "assistant")[0]
    assert isinstance(rendered, Rendered)
    assert rendered.text == text
    assert trained_text(template, FOUR_TURNS) == trained_text(template, FOUR_TURNS, "completion") == answers
    assert trained_text(template, FOUR_TURNS, "last") == answers[1:]
    assert trained_text(template, FOUR_TURNS, "all") == [text]
    assert trained_text(template, FOUR_TURNS, ("assistant",)) == answers


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_turns_of_other_roles_are_their_content_and_what_ends_them(name: str) -> None:
    users = trained_text(template_of(name, llama_3_like()), FOUR_TURNS, ("user",))
    end = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama-3": "<|eot_id|>", "gemma": "<end_of_turn>"}
    end |= {"llama-2": " [/INST]", "mistral": "[/INST]"}
    assert users == [f"Hi{end.get(name, '')}", f"Bye{end.get(name, '')}"]
    system = trained_text(template_of(name, llama_3_like()), FOUR_TURNS, ("system",))
    assert len(system) == 1
    assert system[0].startswith("Be brief.")


BEGIN, END = "{%- generation %}", "{%- endgeneration %}"
CHATML_TURN = "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
CHATML_MARKED = (
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}"
    f"{BEGIN}{{{{- message.content + '<|im_end|>' }}}}{END}{{{{- '\\n' }}}}"
    "{%- else %}{{- message.content + '<|im_end|>\\n' }}{%- endif %}"
)
LLAMA_3_CONTENT = "{{- (message.content | trim) + '<|eot_id|>' }}"
# In each shipped template, the text that writes answers and what has to stand there for transformers' own mask.
MARKED = {
    "chatml": (CHATML_TURN, CHATML_MARKED),
    "qwen": (CHATML_TURN, CHATML_MARKED),
    "llama-3": (
        LLAMA_3_CONTENT,
        f"{{%- if message.role == 'assistant' %}}{BEGIN}{LLAMA_3_CONTENT}{END}{{%- else %}}{LLAMA_3_CONTENT}{{%- endif %}}",
    ),
    "gemma": (
        "{{- (message.content | trim) + '<end_of_turn>\\n' }}",
        f"{{%- if message.role == 'assistant' %}}{BEGIN}{{{{- (message.content | trim) + '<end_of_turn>' }}}}{END}"
        "{{- '\\n' }}"
        "{%- else %}{{- (message.content | trim) + '<end_of_turn>\\n' }}{%- endif %}",
    ),
    "plain": (
        "{{- message.content }}\n    {%- if message.role == 'assistant' %}\n        {{- eos_token }}\n    {%- endif %}",
        f"{{%- if message.role == 'assistant' %}}{BEGIN}{{{{- message.content + eos_token }}}}{END}"
        "{%- else %}{{- message.content }}{%- endif %}",
    ),
    "llama-2": (
        "{{- ' ' + (message.content | trim) + ' ' + eos_token }}",
        f"{BEGIN}{{{{- ' ' + (message.content | trim) + ' ' + eos_token }}}}{END}",
    ),
    "mistral": ("{{- ' ' + message.content + eos_token }}", f"{BEGIN}{{{{- ' ' + message.content + eos_token }}}}{END}"),
    "alpaca": (
        "{{- '### Response:\\n' + message.content + eos_token }}",
        f"{{{{- '### Response:\\n' }}}}{BEGIN}{{{{- message.content + eos_token }}}}{END}",
    ),
}


def marked(name: str) -> str:
    """The shipped template with `{% generation %}` markers."""
    text = (TEMPLATES_FOLDER / f"{name}.jinja").read_text()
    old, new = MARKED[name]
    assert text.count(old) == 1
    return text.replace(old, new)


TEXTS = st.lists(
    st.sampled_from(
        (
            *("user", "assistant", "model", "a", "Hello", " ", "\n", "  \n", "\t", "\u00a0", "\u200d", "0", "{{ x }}"),
            *("<|im_end|>", "</s>", "[/INST]", "<|eot_id|>", "### Response:\n", '{"a": [1, 2]}'),
            *("é", "e\u0301", "日本", "\U0001f600"),
        )
    )
    | st.text(max_size=4),
    max_size=6,
).map("".join)
CHATS = st.tuples(st.none() | TEXTS.filter(len), st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)).map(
    lambda chat: conversation(
        *([("system", chat[0])] if chat[0] is not None else []),
        *(turn for question, answer in chat[1] for turn in (("user", question), ("assistant", answer))),
    )
)


def tokens_and_mask(template: ChatTemplate, tokenizer: Any, row: Conversation, targets: Targets) -> tuple[list[int], list[bool]]:
    (document,) = encoded_chats([(row, 0)], TextEncoder(tokenizer), template, targets)
    assert isinstance(document, Document), document
    return document.input_ids.tolist(), document.is_target.tolist()


@pytest.mark.parametrize(("name", "kind"), chequered(sorted(EXPECTED), [*TOKENIZERS]))
def test_tokens_and_masks_equal_those_of_transformers_on_a_marked_template(name: str, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    template = template_of(name, tokenizer)
    oracle = ("{{- bos_token }}" if adds_bos(tokenizer) else "") + marked(name)

    @settings(PATIENT, derandomize=True)
    @given(CHATS)
    def holds(row: Conversation) -> None:
        # transformers 5.23 takes an answer that ends in token 0 for one that ends nowhere, and marks the rest of the text.
        assume(name != "plain" or row.messages[0]["content"])
        expected = tokenizer.apply_chat_template(
            list(row.messages), chat_template=oracle, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = tokens_and_mask(template, tokenizer, row, "assistant")
        assert ids == expected["input_ids"]
        assert ids == tokenizer.apply_chat_template(list(row.messages), chat_template=template.text)["input_ids"]
        wanted = [bool(value) for value in expected["assistant_masks"]]
        wanted[0] = False
        differing = [index for index, (ours, theirs) in enumerate(zip(mask, wanted)) if ours != theirs]
        assert not differing, (tokenizer.convert_ids_to_tokens(ids), differing)
        assert trained_text(template, row, "last") == trained_text(template, row)[-1:]

    holds()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_markers_in_a_template_give_the_same_mask_as_none(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    for name in ("chatml", "llama-2", "gemma"):
        with_markers = ChatTemplate(tokenizer, marked(name))
        without = ChatTemplate(tokenizer, (TEMPLATES_FOLDER / f"{name}.jinja").read_text())
        for targets in ("assistant", "last", ("user", "assistant")):
            assert trained_text(with_markers, FOUR_TURNS, targets) == trained_text(without, FOUR_TURNS, targets)


def test_markers_that_leave_out_the_end_of_the_turn_are_extended_over_it() -> None:
    template = ChatTemplate(
        tiny_tokenizer(),
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}</turn>{% endfor %}",
    )
    assert trained_text(template, FOUR_TURNS) == ["Hello</turn>", "Ciao</turn>"]


@pytest.mark.parametrize("name", sorted(EXPECTED))
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_never_begins_with_two_bos_and_begins_with_one_if_the_tokenizer_adds_one(name: str, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids, _ = tokens_and_mask(template_of(name, tokenizer), tokenizer, FOUR_TURNS, "assistant")
    if adds_bos(tokenizer):
        assert ids[0] == tokenizer.bos_token_id != ids[1]
    else:
        assert tokenizer.bos_token_id is None


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_prompt_for_generation_is_what_comes_before_the_answer(name: str) -> None:
    template = template_of(name, llama_3_like())
    prompt = template.prompt(FOUR_TURNS)
    assert prompt + EXPECTED[name][1][1] == EXPECTED[name][0].rstrip("\n")


# --- Templates of others -----------------------------------------------------------------------------------------------------

# Drops earlier thoughts and opens an empty one before the last answer, as Qwen3 does.
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\\n' + (m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '') }}
{{- '\\n</think>\\n\\n' + content }}
{%- else %}{{- content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def test_templates_that_rewrite_earlier_answers_are_masked_exactly() -> None:
    template = ChatTemplate(tiny_tokenizer(), THINKING)
    thoughts = ("<think>\nhm\n</think>\n\nHello", "<think>\nwell\n</think>\n\nCiao")
    row = conversation(("user", "Hi"), ("assistant", thoughts[0]), ("user", "Bye"), ("assistant", thoughts[1]))
    assert trained_text(template, row, "last") == [thoughts[1] + "<|im_end|>"]
    assert trained_text(template, FOUR_TURNS) == ["Hello<|im_end|>", "<think>\n\n</think>\n\nCiao<|im_end|>"]


def test_a_generation_prompt_that_opens_a_thought_does_not_spoil_the_mask() -> None:
    """Where history shows answers without the thought that the prompt opens, the prompt is no prefix of the text."""
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    row = conversation(("user", "think"), ("assistant", "<b>Hello</b>"), ("user", "assistant"), ("assistant", "think"))
    assert trained_text(ChatTemplate(tiny_tokenizer(), text), row) == ["<b>Hello</b><|im_end|>", "think<|im_end|>"]


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("llama-3", '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'),
        ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]</s>'),
        ("qwen", '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'),
    ],
)
def test_shipped_templates_write_tool_calls_as_their_family_does(name: str, calls: str) -> None:
    row = conversation(
        ("user", "Weather?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "rain"},
        ("assistant", "It rains."),
        tools=[TOOL],
    )
    template = template_of(name, llama_3_like())
    first, last = trained_text(template, row)
    assert first == calls
    assert last.strip() == f"It rains.{calls[calls.rindex('<') :]}"
    rendered = template.render([row], "assistant")[0]
    assert isinstance(rendered, Rendered)
    assert "of a city" in rendered.text
    assert "rain" in rendered.text


def test_tool_calls_are_part_of_the_answer() -> None:
    template = template_of("qwen", tiny_tokenizer())
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    row = conversation(
        ("user", "Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        ("tool", "rain"),
        {"role": "assistant", "content": "Let me look again.", "tool_calls": [call, call]},
        ("tool", "sun"),
        ("tool", "wind"),
        ("assistant", "Mixed."),
        tools=tools,
    )
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert trained_text(template, row) == [
        f"{written}<|im_end|>",
        f"Let me look again.\n{written}\n{written}<|im_end|>",
        "Mixed.<|im_end|>",
    ]
    rendered = template.render([row], "assistant")[0]
    assert isinstance(rendered, Rendered)
    assert '"name": "weather", "parameters"' in rendered.text
    assert trained_text(template, row, ("tool",))[0].startswith("rain\n</tool_response>")


def test_where_a_template_ends_no_answer_the_last_one_is_ended_with_end_of_text_and_that_is_said() -> None:
    template = ChatTemplate(
        tiny_tokenizer(),
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    )
    assert trained_text(template, FOUR_TURNS) == ["Hello", "Ciao<|im_end|>"]
    appended, unended = template.notes
    assert "'<|im_end|>' is put behind it and trained" in appended
    assert "does not end answers that another turn follows" in unended
    assert template.stop_ids == [tiny_tokenizer().eos_token_id]


def test_an_answer_without_a_question_is_found_too() -> None:
    template = template_of("chatml", tiny_tokenizer())
    row = conversation(("assistant", "assistant"), ("user", "Hi"), ("assistant", "Hello"))
    assert trained_text(template, row) == ["assistant<|im_end|>", "Hello<|im_end|>"]


def test_a_row_that_the_template_refuses_is_a_bad_row_and_its_neighbours_are_not() -> None:
    template = template_of("gemma", tiny_tokenizer())
    rows = [FOUR_TURNS, conversation(("user", "a"), ("user", "b"), ("assistant", "c")), FOUR_TURNS]
    first, refused, last = template.render(rows, "assistant")
    assert first == last
    assert isinstance(first, Rendered)
    assert isinstance(refused, RowError)
    assert "turns must alternate" in str(refused)


def test_a_template_that_cannot_tell_answers_is_refused_with_the_fix() -> None:
    twice_and_backwards = "{% for m in messages | reverse %}{{ m.content + m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"\{% generation %\} and .* data.template to one of alpaca, chatml"):
        ChatTemplate(tiny_tokenizer(), twice_and_backwards)


def test_a_template_that_writes_an_answer_twice_is_refused() -> None:
    with pytest.raises(DataError, match="more than once"):
        ChatTemplate(tiny_tokenizer(), "{% for m in messages %}{{ m.content }}/{{ m.content }}</turn>{% endfor %}")


def test_templates_are_found_by_name_by_file_and_in_the_tokenizer(tmp_path: Any) -> None:
    tokenizer = tiny_tokenizer()
    assert resolve_template("auto", tokenizer) == tokenizer.chat_template
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    assert resolve_template(str(tmp_path / "mine.jinja"), tokenizer) == "{{ messages[0].content }}"
    with pytest.raises(DataError, match="'chat-ml', which is neither a file nor one of alpaca, chatml"):
        resolve_template("chat-ml", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template, and data"):
        resolve_template("auto", tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="ends turns with eos_token, but the tokenizer"):
        resolve_template("plain", tokenizer)


def test_a_template_with_a_syntax_error_is_refused() -> None:
    with pytest.raises(DataError, match="line 1 is not Jinja"):
        ChatTemplate(tiny_tokenizer(), "{% for m in messages %}")


def test_a_missing_tokenizer_is_named(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="no usable tokenizer at"):
        open_tokenizer(str(tmp_path))


def test_the_fingerprint_of_a_tokenizer_follows_its_tokens_and_not_its_chat_template() -> None:
    one, same, other = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    same.chat_template = "{{ messages }}"
    other.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(same) != tokenizer_fingerprint(other)


WITHOUT_A_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_template_without_a_generation_prompt_says_that_its_header_is_trained() -> None:
    with_prompt = WITHOUT_A_PROMPT + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    without, template = ChatTemplate(qwen_like(), WITHOUT_A_PROMPT), ChatTemplate(qwen_like(), with_prompt)
    assert trained_text(without, FOUR_TURNS, "last") == ["<|im_start|>assistant\nCiao<|im_end|>"]
    assert trained_text(template, FOUR_TURNS, "last") == ["Ciao<|im_end|>"]
    assert template.notes == []
    (note,) = without.notes
    assert "no generation prompt" in note
    assert "'<|im_start|>assistant' and trained to write it" in note


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_shipped_templates_have_a_generation_prompt_or_no_header(name: str) -> None:
    assert not [note for note in template_of(name, qwen_like()).notes if "generation prompt" in note]


def test_answers_that_a_template_runs_together_are_trained_once_each_or_refused() -> None:
    """One turn for answers that follow each other."""
    merging = (
        "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% else %}"
        "{% if loop.previtem.role == 'assistant' %}\n\n{% else %}<|im_start|>assistant\n{% endif %}{{ m.content }}"
        "{% if loop.last or loop.nextitem.role != 'assistant' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = ChatTemplate(qwen_like(), merging)
    row = conversation(("user", "Hi"), ("assistant", "One"), ("assistant", "One One"), ("user", "One"), ("assistant", "One"))
    assert trained_text(template, row) == ["One", "One One<|im_end|>", "One<|im_end|>"]
    excepted = conversation(("user", "Hi"), {"role": "assistant", "content": "One", "train": False}, ("assistant", "Two"))
    assert trained_text(template, excepted) == ["Two<|im_end|>"]
    blank = template.render([conversation(("user", "Hi"), ("assistant", ""), ("assistant", ""))], "assistant")[0]
    assert isinstance(blank, RowError)
    assert "where one of several answers in a row ends" in str(blank)
