"""What is trained of a conversation: its system prompt, its last exchanges, its thoughts, and what of it fits into a row."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.sections.data import DataSection, TrainSource
from raytune.data.conversations.conversation import Conversation, Message, Origin
from raytune.data.conversations.long_chats import split_at_turns, without_beginning
from raytune.data.conversations.shaping import AS_IT_IS, Shape, exchanges_of, shaped
from raytune.data.store.build import build_store
from raytune.data.store.store import Store, StoreInfo
from raytune.data.templates.front import template_of
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.errors import DataError
from raytune.plan.data.data_report import store_text
from tests.templates.shapes import tokenizer_for
from tests.tiny import PATIENT, tiny_request

# Shows the thought behind the last question only, and an empty one where there is none: the habits of Qwen3's.
FORGETFUL = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def said(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def chat(*contents: str, system: str | None = None) -> list[Message]:
    """Question and answer in turn."""
    turns = [said(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]
    return [said("system", system), *turns] if system is not None else turns


def row_of(messages: Sequence[Message]) -> Conversation:
    return Conversation(messages=tuple(messages), origin=Origin("r.jsonl", 1))


THINKS = [said("user", "Q1"), said("assistant", "A1", reasoning_content="T1")]
THINKS += [said("user", "Q2"), said("assistant", "A2", reasoning_content="T2")]


def build(folder: Path, chats: Sequence[Sequence[Message]], template: str = FORGETFUL, **changes: Any) -> StoreInfo:
    """A store of chats; `data` are keys of the config, others fields of the request."""
    data = DataSection(train=[TrainSource(path="r.jsonl")], **changes.pop("data", {}))
    tokenizer_for(template).save_pretrained(folder / "tokenizer")
    tokenizer = open_tokenizer(str(folder / "tokenizer"))
    rows = folder / "r.jsonl"
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    request = tiny_request(
        str(rows),
        max_rows=None,
        template=template_of(data, tokenizer),
        shape=Shape.of(data),
        train_empty_thought=data.train_empty_thought,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        **changes,
    )
    return build_store(request, tokenizer_path=str(folder / "tokenizer"), folder=folder / "stores")


def trained(info: StoreInfo, folder: Path) -> list[tuple[str, list[str]]]:
    """Of each document its text and the pieces that are trained, in the order of texts."""
    store, tokenizer = Store.open(info.path), open_tokenizer(str(folder / "tokenizer"))
    found = []
    for number in range(store.num_rows):
        row, start = store.row(number), 0
        for length in row.document_lengths:
            ids, mask = row.input_ids[start : start + length], row.is_target[start : start + length]
            start += length
            marked = "".join(("\1" if is_target else "\2") + chr(token) for token, is_target in zip(ids.tolist(), mask.tolist()))
            runs = ["".join(chr(ord(c)) for c in run if c != "\1") for run in re.findall("(?:\1[^\1\2])+", marked)]
            found.append((tokenizer.decode(ids), [tokenizer.decode([ord(c) for c in run]) for run in runs]))
    return sorted(found)


# --- System prompts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("when", "systems"), [("missing", ["SYS", "own"]), ("always", ["SYS", "SYS"])])
def test_a_system_prompt_stands_in_chats_without_one_or_in_all(when: str, systems: list[str], tmp_path: Path) -> None:
    chats = [chat("Q1", "A1"), chat("Q2", "A2", system="own")]
    info = build(tmp_path, chats, data={"system": "SYS", "system_when": when})
    texts = [text for text, _ in trained(info, tmp_path)]
    assert sorted(re.findall(r"system\n(\w+)<", "".join(texts))) == sorted(systems)
    assert all(text.count("<|im_start|>system") == 1 for text in texts)
    assert info.report.total("systems_given") == systems.count("SYS")
    assert any("with data.system" in line for line in store_text(info.report))


def test_a_model_is_asked_with_the_system_prompt_that_it_was_trained_with_unless_one_is_given() -> None:
    data = DataSection(train=[TrainSource(path="r.jsonl")], system='S "1"\n{{ 2 }} \\ é 😀')
    tokenizer = tokenizer_for(FORGETFUL)
    tokenizer.chat_template = template_of(data, tokenizer)
    asked = tokenizer.apply_chat_template([said("user", "Q")], tokenize=False)
    assert asked == f"<|im_start|>system\n{data.system}<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    own = tokenizer.apply_chat_template(chat("Q", system="own"), tokenize=False)
    assert own == "<|im_start|>system\nown<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    assert template_of(data, tokenizer) == tokenizer.chat_template, "a saved template is not given it twice"


# --- Exchanges -----------------------------------------------------------------------------------------------------------------


def test_the_last_exchanges_are_kept_with_the_system_prompt(tmp_path: Path) -> None:
    info = build(tmp_path, [chat("Q1", "A1", "Q2", "A2", "Q3", "A3", system="S"), chat("Q4", "A4")], data={"max_turns": 2})
    texts = "".join(text for text, _ in trained(info, tmp_path))
    assert all(word in texts for word in ("S", "Q2", "A2", "Q3", "A3", "Q4", "A4"))
    assert "Q1" not in texts
    assert info.report.total("turns_left_out") == 2


ROLES = st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1, max_size=12)


@PATIENT
@given(ROLES)
def test_exchanges_and_their_head_are_the_conversation_and_each_begins_where_somebody_asks(roles: list[str]) -> None:
    messages = [said(role, f"{number}") for number, role in enumerate(roles)]
    head, exchanges = exchanges_of(messages)
    assert [*head, *(turn for exchange in exchanges for turn in exchange)] == messages
    assert all(turn["role"] == "system" for turn in head)
    assert all(exchange[0]["role"] in ("user", "system") for exchange in exchanges[1:])


@PATIENT
@given(ROLES, st.sampled_from(["assistant", ("user",), ("system", "user", "assistant", "tool")]))
def test_one_exchange_at_a_time_trains_each_turn_once_behind_all_that_came_before(roles: list[str], targets: Any) -> None:
    messages = [
        said(role, f"{number}", **({"reasoning": "T"} if role == "assistant" else {})) for number, role in enumerate(roles)
    ]
    found = shaped(row_of(messages), Shape(reasoning="each"), targets)
    trains = [turn["content"] for piece in found.pieces for turn in piece.messages if turn.get("train") is not False]
    assert trains == [turn["content"] for turn in messages]
    for piece in found.pieces:
        assert [turn["content"] for turn in piece.messages] == [f"{number}" for number in range(len(piece.messages))]


def test_a_conversation_that_nothing_is_asked_of_is_the_same_object() -> None:
    row = row_of(THINKS)
    assert shaped(row, AS_IT_IS, "assistant").pieces[0] is row


# --- Thoughts ------------------------------------------------------------------------------------------------------------------


def test_each_thought_is_trained_behind_the_tokens_that_a_model_is_asked_with(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"strips reasoning_content of turn 2.*data\.reasoning: each"):
        build(tmp_path, [THINKS])
    info = build(tmp_path, [THINKS], data={"reasoning": "each"})
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer"))
    for number, (text, pieces) in enumerate(trained(info, tmp_path)):
        assert pieces == [f"<think>\nT{number + 1}\n</think>\n\nA{number + 1}<|im_end|>"]
        asked = tokenizer.apply_chat_template(THINKS[: 2 * number + 1], tokenize=False, add_generation_prompt=True)
        assert text == f"{asked}{pieces[0]}\n"
    total = info.report.total
    assert (total("rows"), total("used"), total("documents"), total("by_exchange"), total("thoughts_not_shown")) == (
        1,
        1,
        2,
        1,
        1,
    )


def test_names_of_speakers_that_the_template_does_not_show_are_told(tmp_path: Path) -> None:
    chats = [
        [said("user", "Q", name="Ada"), said("assistant", "A", name="Bob")],
        [said("user", "Q"), said("assistant", "A, not Bob", name="Bob")],
    ]
    told = "3 turns without the name of who speaks (`name`), which the template does not show"
    shows = FORGETFUL.replace("m.role + '\\n'", "m.role + (' ' + m.name if m.name else '') + '\\n'")
    for number, (template, is_told) in enumerate(((FORGETFUL, True), (shows, False))):
        (folder := tmp_path / str(number)).mkdir()
        info = build(folder, chats, template)
        assert any(told in line for line in store_text(info.report)) == is_told


@pytest.mark.parametrize(
    ("reasoning", "pieces", "left"),
    [("last", ["A1<|im_end|>", "<think>\nT2\n</think>\n\nA2<|im_end|>"], 1), ("none", ["A1<|im_end|>", "EA2<|im_end|>"], 2)],
)
@pytest.mark.parametrize("inside", [False, True])
def test_thoughts_are_left_out_beside_and_inside_of_contents(
    reasoning: str, pieces: list[str], left: int, inside: bool, tmp_path: Path
) -> None:
    rows = THINKS
    template = FORGETFUL
    if inside:  # as plain text, which the template shows as it is
        rows = [
            said(m["role"], f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}") if m["role"] == "assistant" else m
            for m in THINKS
        ]
        template = re.sub(r"\{%- if m.role == 'assistant'.*?endif %\}", "", FORGETFUL)
    info = build(tmp_path, [rows], template, data={"reasoning": reasoning})
    ((_, found),) = trained(info, tmp_path)
    empty = "" if inside else "<think>\n\n</think>\n\n"
    assert found == [piece.replace("E", empty) for piece in pieces]
    assert info.report.total("thoughts_left_out") == left


@pytest.mark.parametrize("is_trained", [True, False])
def test_an_empty_thought_is_trained_or_stands_in_front_of_what_is(is_trained: bool, tmp_path: Path) -> None:
    info = build(tmp_path, [chat("Q", "A")], data={"train_empty_thought": is_trained})
    empty = "<think>\n\n</think>\n\n"
    ((text, pieces),) = trained(info, tmp_path)
    assert text == f"<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n{empty}A<|im_end|>\n"
    assert pieces == [empty * is_trained + "A<|im_end|>"]
    assert info.report.total("empty_thoughts") == is_trained


def test_a_variable_of_the_template_moves_the_empty_thought_into_the_prompt(tmp_path: Path) -> None:
    data = {"template_options": {"enable_thinking": False}}
    info, plain = build(tmp_path, [chat("Q", "A")], data=data), build(tmp_path, [chat("Q", "A")])
    assert info.path != plain.path
    ((text, pieces),) = trained(info, tmp_path)
    assert pieces == ["A<|im_end|>"]
    assert [text] == [text for text, _ in trained(plain, tmp_path)]


# --- What does not fit ---------------------------------------------------------------------------------------------------------

LONG = chat("Q1 é " * 20, "A1 " * 10, "Q2 " * 20, "A2 " * 10, "Q3 " * 20, "A3 " * 10, system="SYS")


def tokens_of(messages: Sequence[Message]) -> int:
    """A byte each, special ones apart."""
    return sum(len(f"{turn['role']}\n{turn['content']}\n".encode()) + 2 for turn in messages)


PLAIN = re.sub(r"\{%- if m.role == 'assistant'.*?endif %\}", "", FORGETFUL)


@pytest.mark.parametrize("limit", [1000, 270, 190])
def test_a_chat_is_split_between_exchanges_each_with_the_system_prompt(limit: int, tmp_path: Path) -> None:
    info = build(tmp_path, [LONG], PLAIN, too_long="split_turns", max_length=limit)
    found = trained(info, tmp_path)
    assert [piece for _, pieces in found for piece in pieces] == [f"{f'A{number} ' * 10}<|im_end|>" for number in (1, 2, 3)]
    assert all(text.startswith("<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nQ") for text, _ in found)
    assert len(found) == {1000: 1, 270: 2, 190: 3}[limit]
    assert info.report.total("split") == (limit < 1000)
    assert info.report.total("cut") == 0
    assert info.longest_document <= limit


def test_an_exchange_that_does_not_fit_alone_is_cut_and_counted(tmp_path: Path) -> None:
    info = build(tmp_path, [LONG], PLAIN, too_long="split_turns", max_length=175)
    assert info.report.total("cut") == 1
    assert info.longest_document == 175


def test_of_the_pieces_of_a_chat_whose_last_answer_is_trained_the_last_one_is_used(tmp_path: Path) -> None:
    info = build(tmp_path, [LONG], PLAIN, too_long="split_turns", max_length=160, targets="last")
    ((_, pieces),) = trained(info, tmp_path)
    assert pieces == [f"{'A3 ' * 10}<|im_end|>"]


@pytest.mark.parametrize(
    ("limit", "questions", "answers"), [(1000, "123", "123"), (270, "23", "23"), (160, "3", "3"), (100, "3", "3"), (64, "", "")]
)
def test_a_chat_loses_its_beginning_and_never_a_part_of_an_answer(
    limit: int, questions: str, answers: str, tmp_path: Path
) -> None:
    rows = [LONG, chat("Q", "A")]
    info = build(tmp_path, rows, PLAIN, too_long="truncate_left", max_length=limit)
    found = [one for one in trained(info, tmp_path) if "SYS" in one[0]]
    assert [piece for _, pieces in found for piece in pieces] == [f"{f'A{number} ' * 10}<|im_end|>" for number in answers]
    assert "".join(sorted({*re.findall(r"Q(\d)", "".join(text for text, _ in found))})) == questions
    total = info.report.total
    assert (total("cut"), total("shortened"), total("dropped")) == (0 < len(answers) < 3, 0 < len(answers) < 3, not answers)
    if limit == 100:  # its question has as many of its last words as fit
        assert info.longest_document == limit
        assert re.search(r"user\n[^<]*Q3 Q3 <", found[0][0])


@pytest.mark.parametrize("too_long", ["split_turns", "truncate_left"])
def test_a_conversation_without_a_question_is_no_exception(too_long: str, tmp_path: Path) -> None:
    rows = [[said("system", "S" * 100)], chat("Q", "A")]
    info = build(tmp_path, rows, PLAIN, too_long=too_long, max_length=50, targets=("system", "assistant"))
    assert info.report.total("used") == (2 if too_long == "split_turns" else 1)
    assert info.report.total("cut") + info.report.total("dropped") == 1


def test_plain_text_keeps_its_last_tokens(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"text": "abcdefghij"}) + "\n")
    tokenizer_for(PLAIN).save_pretrained(tmp_path / "tokenizer")
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer"))
    request = tiny_request(
        str(path), template="", too_long="truncate_left", max_length=4, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)
    )
    info = build_store(request, tokenizer_path=str(tmp_path / "tokenizer"), folder=tmp_path / "stores")
    assert trained(info, tmp_path) == [("hij</s>", ["ij</s>"])]
    assert info.report.total("cut") == 1


@PATIENT
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8), st.integers(1, 60))
def test_pieces_are_the_exchanges_in_order_and_each_has_as_many_as_fit(sizes: list[tuple[int, int]], limit: int) -> None:
    contents = [letter * size for asked, answer in sizes for letter, size in (("q", asked), ("a", answer))]
    row = row_of(chat(*contents, system="ss"))

    def length(piece: Conversation) -> int:
        return sum(len(turn["content"]) for turn in piece.messages)

    pieces = split_at_turns(row, limit, length)
    assert [turn for piece in pieces for turn in piece.messages[1:]] == list(row.messages[1:])
    assert all(piece.messages[0]["content"] == "ss" for piece in pieces)
    for piece, following in zip(pieces, [*pieces[1:], None]):
        assert length(piece) <= limit or len(piece.messages) == 3
        if following is not None:
            assert (
                length(piece) + length(following) - 2 > limit
                or length(piece) + sum(len(turn["content"]) for turn in following.messages[1:3]) > limit
            )
    kept = without_beginning(row, limit, length, lambda text: list(range(len(text))))
    if kept is None:
        assert 2 + len(contents[-1]) + (contents[-2] != "") > limit or 2 + len(contents[-1]) >= limit
    else:
        assert length(kept) <= limit
        assert kept.messages[-1] == row.messages[-1]


@pytest.mark.parametrize("text", [" ", "\n\t"])
def test_a_system_prompt_without_words_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must have words"):
        DataSection(system=text)
