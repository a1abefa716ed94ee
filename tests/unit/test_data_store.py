"""A store holds every token of its rows once, says what it left out, and is found again exactly when it would be the same."""

import errno
import fcntl
import json
import multiprocessing
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune import data
from raytune.config.sections.data import DataSource
from raytune.config.sections.split import SplitSection
from raytune.data.files import sources
from raytune.data.rows.shards import ShardResult, ShardTask, Tally, resolved_too_long
from raytune.data.rows.source_rows import read_conversations
from raytune.data.store import tokenising
from raytune.data.store.build import build_store
from raytune.data.store.request import CODE, StoreRequest
from raytune.data.store.store import Store, StoreInfo
from raytune.data.templates.text import resolve_template
from raytune.data.templates.text_encoder import TextEncoder
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.errors import DataError
from raytune.model.demo import demo_base_path
from tests.tiny import PATIENT, tiny_request, tiny_rows, tiny_split, tiny_store, tiny_tokenizer
from tests.unit.test_data_template import TOKENIZERS, llama_2_like, llama_3_like, qwen_like

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k"
DECIDES_NOTHING = {
    *("batches/batches", "batches/in_front", "batches/slices"),  # what is made of a store
    *("store/drafts", "store/place", "store/reading_through", "store/same_rows", "store/store"),  # where it lies
    *("files/demo", "files/pieces"),  # content of sources, which has a place of its own in the address
    *("templates/front", "templates/budget"),  # the template's text, which is in it, too; an end for one that has none
    *("preview", "rows/choices", "rows/rewording", "store/held_out_origins", "templates/pieces"),  # other uses of rows
}
"""Modules of `data` that a store's address leaves out."""


def test_each_module_of_data_is_in_the_address_of_a_store_or_decides_nothing_of_it() -> None:
    folder = Path(str(data.__file__)).parent
    modules = {file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.py") if file.stem != "__init__"}
    assert modules == {*CODE} | DECIDES_NOTHING
    assert not {*CODE} & DECIDES_NOTHING


def write(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def build(folder: Path, path: str, **changes: Any) -> StoreInfo:
    return tiny_store(folder / "stores", path, max_rows=changes.pop("max_rows", None), **changes)


def build_with(tokenizer: Any, folder: Path, path: str, **changes: Any) -> StoreInfo:
    tokenizer.save_pretrained(folder / "tokenizer")
    loaded = open_tokenizer(str(folder / "tokenizer"))
    template = resolve_template(changes.pop("template", "chatml"), loaded)
    request = tiny_request(path, max_rows=None, template=template, tokenizer_fingerprint=tokenizer_fingerprint(loaded), **changes)
    return build_store(request, tokenizer_path=str(folder / "tokenizer"), folder=folder / "stores")


def documents(info: StoreInfo) -> list[tuple[list[int], list[bool]]]:
    """Tokens and targets of every document, in the order of the rows."""
    store = Store.open(info.path)
    found = []
    for index in range(store.num_rows):
        row = store.row(index)
        bounds = np.cumsum(row.document_lengths)[:-1]
        pieces = zip(np.split(row.input_ids, bounds), np.split(row.is_target, bounds))
        found += [(ids.tolist(), mask.tolist()) for ids, mask in pieces]
    return found


# --- What it holds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["best_fit", "token_budget", "none"])
def test_a_store_holds_the_tokens_of_apply_chat_template_once_each(packing: str, tmp_path: Path) -> None:
    rows = tiny_rows(50)
    info = build(tmp_path, write(tmp_path / "a.jsonl", rows), packing=packing)
    tokenizer = tiny_tokenizer()
    expected = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], return_dict=True, return_assistant_tokens_mask=True
    )
    wanted = zip(expected["input_ids"], ([bool(value) for value in mask] for mask in expected["assistant_masks"]))
    assert sorted(documents(info)) == sorted((list(ids), mask) for ids, mask in wanted)
    assert info.num_documents == 50 == info.report.total("documents")
    assert info.num_tokens == sum(map(len, expected["input_ids"]))
    assert info.num_targets == sum(map(sum, expected["assistant_masks"]))
    assert info.longest_document == max(map(len, expected["input_ids"]))


def test_counts_of_rows_add_up_to_those_of_the_store(tmp_path: Path) -> None:
    info = build(tmp_path, "demo:train", max_rows=300)
    store = Store.open(info.path)
    rows = [store.row(index) for index in range(store.num_rows)]
    assert store.num_targets_of_row.tolist() == [int(row.is_target.sum()) for row in rows]
    assert store.num_targets_of_row.sum() == info.num_targets
    assert sum(len(row.input_ids) for row in rows) == info.num_tokens == store.num_tokens
    assert all(row.document_lengths.sum() == len(row.input_ids) <= 512 for row in rows)
    assert store.num_bytes_of_row.sum() == store.num_bytes == info.num_bytes
    assert (store.num_targets_of_row.dtype, rows[0].input_ids.dtype, rows[0].is_target.dtype) == (np.int64, np.int32, bool)
    with pytest.raises(IndexError):
        store.row(store.num_rows)


def test_every_document_of_a_row_is_traced_to_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"document {line}"} for line in range(1, 41)])
    store = Store.open(build(tmp_path, path).path)
    tokenizer = tiny_tokenizer()
    for index in range(store.num_rows):
        row = store.row(index)
        pieces = np.split(row.input_ids, np.cumsum(row.document_lengths)[:-1])
        lines = [tokenizer.decode(piece, skip_special_tokens=True).split()[1] for piece in pieces]
        assert store.origins(index) == [f"{path}:{line}" for line in lines]
    first = store.origins(0)
    assert store.named([0]) == f"rows 0 ({', '.join(first[:5])} and {len(first) - 5} more)"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_plain_document_is_bos_if_the_tokenizer_adds_it_text_and_eos(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    texts = ["Hello world", "Ünïcödé \U0001f600"]
    info = build_with(tokenizer, tmp_path, write(tmp_path / "a.jsonl", [{"text": text} for text in texts]), template="plain")
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert sorted(ids for ids, _ in documents(info)) == sorted(expected)
    assert all(mask == [False] + [True] * (len(ids) - 1) for ids, mask in documents(info))


def test_bytes_of_targets_are_those_of_the_answers_without_special_tokens(tmp_path: Path) -> None:
    answers = ["yes", "größer \U0001f600", "日本語 text"]
    rows = [{"prompt": "Frage: äöü?", "completion": answer} for answer in answers]
    path = write(tmp_path / "a.jsonl", rows)
    for tokenizer in (tiny_tokenizer(), llama_3_like(), qwen_like(), llama_2_like()):
        info = build_with(tokenizer, tmp_path / type(tokenizer).__name__ / str(len(tokenizer)), path)
        assert info.num_bytes == sum(len(answer.encode()) for answer in answers)


# --- Places of tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "llama-3", "qwen"])
def test_places_from_token_lengths_equal_those_that_the_tokenizer_tracks(kind: str) -> None:
    encoder = TextEncoder(TOKENIZERS[kind]())

    @settings(PATIENT, max_examples=60)
    @given(st.lists(st.text() | st.sampled_from(["<|im_end|>", "a </s> b", "Hello\n\n  world", ""]), max_size=5))
    def holds(texts: list[str]) -> None:
        sizes = np.concatenate([[0], np.cumsum([len(text.encode()) for text in texts], dtype=np.int64)])
        by_length, by_offset = encoder._encode_by_length(texts, sizes), encoder._encode_by_offset(texts, sizes)
        if by_length is None:
            assert kind == "qwen", "only normalised text may need the slow way"
            return
        assert by_length.input_ids.tolist() == by_offset.input_ids.tolist()
        assert by_length.first_tokens.tolist() == by_offset.first_tokens.tolist()
        # Tokens inside one character share its place where they are tracked.
        assert (by_offset.starts <= by_length.starts).all()
        assert (by_offset.ends >= by_length.ends).all()
        for text_bytes in (by_length.token_bytes, by_offset.token_bytes):
            special = encoder.is_special[by_length.input_ids]
            assert text_bytes[special].sum() == 0
        assert by_length.token_bytes.sum() == by_offset.token_bytes.sum()

    holds()


def test_text_that_the_tokenizer_normalises_is_still_placed() -> None:
    encoder = TextEncoder(qwen_like())
    decomposed = "e\u0301" * 3 + "<|im_end|>"
    encoded = encoder.encode([decomposed])
    assert encoder._encode_by_length([decomposed], np.array([0, len(decomposed.encode())])) is None
    assert encoded.starts[-1] == len(decomposed.encode()) - len("<|im_end|>")
    assert encoded.ends[-1] == len(decomposed.encode())


# --- Long rows ---------------------------------------------------------------------------------------------------------------

LONG = [
    {"prompt": "Q" * 30, "completion": "A" * 200},
    {"prompt": "short", "completion": "yes"},
    {"prompt": "Q" * 300, "completion": "never seen"},
]


def test_truncation_cuts_the_end_and_counts_what_it_cost(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LONG)
    info = build(tmp_path, path, max_length=128)
    whole = {tuple(ids[:128]): ids for ids, _ in documents(build(tmp_path, path, max_length=512))}
    assert {tuple(ids) for ids, _ in documents(info)} < set(whole)
    (report,) = info.report.sources
    assert (report.rows, report.used, report.documents, report.cut, report.cut_off, report.no_target) == (3, 2, 2, 2, 1, 0)
    assert [example.split(": ")[0] for example in report.examples["cut"]] == [f"{path}:1", f"{path}:3"]
    assert report.examples["cut_off"][0].startswith(f"{path}:3: 3")


def test_long_rows_are_dropped_or_refused_as_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LONG * 4)
    info = build(tmp_path, path, max_length=128, too_long="drop")
    assert (info.num_documents, info.report.total("dropped")) == (4, 8)
    with pytest.raises(DataError) as error:
        build(tmp_path, path, max_length=128, too_long="error")
    lines = str(error.value).splitlines()
    assert lines[0] == "8 rows are longer than data.max_length, 128 tokens:"
    assert lines[1].startswith(f"  {path}:1: 2")
    assert lines[5].startswith(f"  {path}:7: ")
    assert lines[6] == "  and 3 more"
    assert lines[7] == "Raise data.max_length, or set data.too_long to truncate, truncate_left, drop, split or split_turns."


@pytest.mark.parametrize("limit", [2, 3, 7, 64, 300])
def test_pieces_of_a_split_document_train_every_target_once(limit: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "".join(chr(33 + index % 90) for index in range(250))}])
    pieces = documents(build(tmp_path, path, max_length=limit, too_long="split", packing="none"))
    ((whole, mask),) = documents(build(tmp_path, path, max_length=512))
    assert all(len(ids) <= limit for ids, _ in pieces)
    assert [token for ids, mask in pieces for token, target in zip(ids, mask) if target] == [
        token for token, target in zip(whole, mask) if target
    ]
    assert not any(mask[0] for _, mask in pieces)


# --- Rows that are left out --------------------------------------------------------------------------------------------------


def test_bad_rows_stop_the_build_with_the_first_five_and_the_count(tmp_path: Path) -> None:
    rows: list[Any] = [*tiny_rows(3), '{"messages": "text"}', '{"torn": ', *tiny_rows(2), *["[]"] * 6]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as error:
        build(tmp_path, path)
    assert str(error.value).splitlines() == [
        "8 rows cannot be used:",
        f"  {path}:4: 'messages' is text, expected a list of turns",
        f"  {path}:5: not JSON: Expecting value at column 9",
        *[f"  {path}:{line}: a list, expected an object with named columns" for line in (8, 9, 10)],
        "  and 3 more",
        "Repair them, or leave them out with data.on_bad_row: skip.",
    ]
    info = build(tmp_path, path, on_bad_row="skip")
    assert (info.num_documents, info.report.total("bad"), info.report.total("rows")) == (5, 8, 13)
    assert len(info.report.sources[0].examples["bad"]) == 5
    assert list((tmp_path / "stores").iterdir()) == [Path(info.path)], "a refused build leaves nothing behind"


def test_a_store_without_its_bad_or_long_rows_is_found_by_all_and_refused_to_who_wants_none_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*tiny_rows(3), "[]", *tiny_rows(2), "{"])
    made = build(tmp_path, path, on_bad_row="skip")
    with pytest.raises(DataError, match=rf"2 rows cannot be used:\n  {path}:4: .*\n  {path}:7: ") as refused:
        build(tmp_path, path)
    assert "and" not in str(refused.value).splitlines()[-2], "all of them are named"
    longest = made.longest_document
    short = build(tmp_path, path, on_bad_row="skip", max_length=longest - 1, too_long="drop")
    with pytest.raises(DataError, match=rf"longer than data.max_length, {longest - 1} tokens:\n  {path}:\d: {longest} tokens"):
        build(tmp_path, path, on_bad_row="skip", max_length=longest - 1, too_long="error")
    assert sorted((tmp_path / "stores").iterdir()) == sorted([Path(made.path), Path(short.path)]), "nothing is made anew"


def test_a_row_that_the_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    rows = [*tiny_rows(2), {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=rf"{path}:3: the chat template cannot render it: .*turns must alternate"):
        build(tmp_path, path, template=resolve_template("llama-2", tiny_tokenizer()))


def test_rows_without_a_target_are_left_out_and_listed(tmp_path: Path) -> None:
    rows = [*tiny_rows(2), {"messages": [{"role": "user", "content": "only a question"}]}]
    path = write(tmp_path / "a.jsonl", rows)
    (report,) = build(tmp_path, path).report.sources
    assert (report.documents, report.no_target) == (2, 1)
    assert report.examples["no_target"] == [f"{path}:3"]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (["", "  "], {}, "has no rows"),
        ([{"messages": [{"role": "user", "content": "Q"}]}] * 3, {}, "3 have no target .*; the first is .*a.jsonl:1"),
        (tiny_rows(3), {"max_length": 1}, "3 have their targets behind data.max_length, 1 tokens"),
        (tiny_rows(3), {"max_length": 2, "too_long": "drop"}, "3 are longer than data.max_length, 2 tokens"),
        (
            [tiny_rows(1)[0], "{"],
            {"max_length": 1, "on_bad_row": "skip"},
            "Of 2 rows\n  1 cannot be used; the first is .*a.jsonl:2",
        ),
        (
            tiny_rows(1),
            {"side": "validation", "split": tiny_split(validation_fraction=1e-9)},
            r"held out for validation(.|\n)* 1 lie on another side of the split",
        ),
        (["{", "["], {"on_bad_row": "skip"}, "2 rows cannot be used"),
    ],
)
def test_if_nothing_is_left_the_reasons_are_counted(rows: Any, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        build(tmp_path, write(tmp_path / "a.jsonl", rows), **changes)


def test_answers_that_end_in_no_special_token_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", tiny_rows(4))
    assert build(tmp_path, path).report.total("unending") == 0
    assert build(tmp_path, path, targets="all").report.total("unending") == 0, "the line break behind the end does not count"
    llama_3 = resolve_template("llama-3", tiny_tokenizer())  # its <|eot_id|> is only text to this tokenizer
    assert build(tmp_path, path, template=llama_3).report.total("unending") == 4


# --- Sources -----------------------------------------------------------------------------------------------------------------


def test_only_the_first_rows_are_read_if_asked_over_all_files_of_a_source(tmp_path: Path) -> None:
    for index, name in enumerate("abc"):
        write(tmp_path / f"{name}.jsonl", [{"text": f"{index} {line}"} for line in range(10)])
    info = build(tmp_path, str(tmp_path / "*.jsonl"), max_rows=13, packing="none")
    texts = [tiny_tokenizer().decode(ids, skip_special_tokens=True) for ids, _ in documents(info)]
    assert texts == [f"0 {line}" for line in range(10)] + [f"1 {line}" for line in range(3)]
    source = DataSource(path=str(tmp_path / "*.jsonl"), max_rows=13)
    assert [conversation.text for conversation in read_conversations(source, tmp_path, Tally())] == texts


def test_sources_of_different_formats_share_a_store(tmp_path: Path) -> None:
    chat = DataSource(path=write(tmp_path / "chat.jsonl", tiny_rows(5)))
    (tmp_path / "table.csv").write_text("question,answer\nQ,A\n")
    table = DataSource(path=str(tmp_path / "table.csv"), columns={"prompt": "question", "completion": "answer"})
    (tmp_path / "plain.txt").write_text("one document\nanother\n")
    plain = DataSource(path=str(tmp_path / "plain.txt"))
    info = tiny_store(tmp_path / "stores", sources=(chat, table, plain))
    assert info.report.total("documents") == 8
    origins = Counter(
        Path(origin.split(":")[0]).name for row in range(info.num_rows) for origin in Store.open(info.path).origins(row)
    )
    assert origins == {"chat.jsonl": 5, "table.csv": 1, "plain.txt": 2}


def test_the_two_sides_of_a_split_are_all_rows_and_share_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", tiny_rows(200))
    both = [
        documents(build(tmp_path, path, side=side, split=tiny_split(validation_fraction=0.3))) for side in ("train", "validation")
    ]
    everything = documents(build(tmp_path, path))
    assert sorted(both[0] + both[1]) == sorted(everything)
    assert not {tuple(ids) for ids, _ in both[0]} & {tuple(ids) for ids, _ in both[1]}
    assert 35 < len(both[1]) < 85


def test_the_store_does_not_depend_on_how_its_sources_were_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", tiny_rows(150))
    whole = documents(build(tmp_path / "whole", path))
    monkeypatch.setattr(sources, "SEGMENT_BYTES", 1000)
    monkeypatch.setattr(tokenising, "_DOCUMENTS_AT_ONCE", 7)
    tasks: list[ShardTask] = []

    def in_turn(function: Callable[[ShardTask], ShardResult], shards: Sequence[ShardTask]) -> Iterable[ShardResult]:
        tasks.extend(shards)
        return map(function, shards)

    divided = tiny_store(tmp_path / "divided", path, max_rows=None)
    divided = build_store(
        tiny_request(path, max_rows=None), tokenizer_path=str(demo_base_path()), folder=tmp_path / "again", parallel_map=in_turn
    )
    assert len(tasks) > 5
    assert documents(divided) == whole


def test_shards_can_be_tokenised_by_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", tiny_rows(60))
    monkeypatch.setattr(sources, "SEGMENT_BYTES", 3000)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        info = build_store(
            tiny_request(path, max_rows=None),
            tokenizer_path=str(demo_base_path()),
            folder=tmp_path / "pool",
            parallel_map=pool.map,
        )
    assert documents(info) == documents(build(tmp_path, path))


def test_a_process_with_another_tokenizer_refuses_to_tokenise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not the one that this run was planned with"):
        tiny_store(tmp_path, tokenizer_fingerprint="0" * 64)


def test_a_store_behind_a_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.store is s3://bucket/stores.*every node mounts"):
        build_store(tiny_request(), tokenizer_path=str(demo_base_path()), folder="s3://bucket/stores")


# --- Found again -------------------------------------------------------------------------------------------------------------


def no_work(function: Callable[[ShardTask], ShardResult], shards: Sequence[ShardTask]) -> Iterable[ShardResult]:
    raise AssertionError("the store exists and must be reused")


def rebuild(request: StoreRequest, folder: Path, parallel_map: Any = map) -> StoreInfo:
    return build_store(request, tokenizer_path=str(demo_base_path()), folder=folder, parallel_map=parallel_map)


def test_the_same_request_is_answered_by_the_same_store_without_tokenising(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", tiny_rows(20))
    first = rebuild(tiny_request(path, max_rows=None), tmp_path / "stores")
    assert rebuild(tiny_request(path, max_rows=None), tmp_path / "stores", no_work) == first
    (tmp_path / "elsewhere").mkdir()
    moved = write(tmp_path / "elsewhere" / "a.jsonl", tiny_rows(20))
    assert rebuild(tiny_request(moved, max_rows=None), tmp_path / "stores", no_work) == first
    named = tiny_request(sources=(DataSource(path=path, name="another name in metrics"),))
    assert rebuild(named, tmp_path / "stores", no_work) == first


@pytest.mark.parametrize(
    "change",
    [
        {"template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"},
        {"targets": "last"},
        {"targets": ("assistant", "user")},
        {"max_length": 511},
        {"too_long": "drop"},
        {"packing": "none"},
        {"tokenizer_fingerprint": "other"},
        {"side": "train", "split": tiny_split(validation_fraction=0.5)},
        {"side": "train", "split": tiny_split(validation_fraction=0.25)},
        {"side": "test", "split": tiny_split(test_fraction=0.25)},
        {"side": "train", "split": tiny_split(validation_fraction=0.5, split=SplitSection(group="id"))},
        {"sources": (DataSource(path="a.jsonl", format="messages"),)},
        {"sources": (DataSource(path="a.jsonl", max_rows=5),)},
        {"sources": (DataSource(path="a.jsonl", columns={"messages": "chat"}),)},
    ],
)
def test_whatever_can_change_a_token_changes_the_address(change: dict[str, Any]) -> None:
    base = {"sources": (DataSource(path="a.jsonl"),), "tokenizer_fingerprint": "one"}
    assert address_of(**base) != address_of(**(base | change))
    assert address_of(**base) == address_of(**base)
    assert address_of(**base) != address_of(["g"], **base)
    assert address_of(**base) != address_of(["f", "f"], **base)


def address_of(files: Sequence[str] = ("f",), **request: Any) -> str:
    """Of a store of one source of chats, whose files have these fingerprints."""
    asked = tiny_request(**request)
    return asked.address([files], [resolved_too_long(asked.too_long, "messages")])


def test_a_policy_that_is_found_and_the_same_one_by_name_are_one_store(tmp_path: Path) -> None:
    chats = write(tmp_path / "chats.jsonl", tiny_rows(5))
    texts = write(tmp_path / "texts.jsonl", [{"text": "a long text " * 100}])
    for path, policy in ((chats, "truncate"), (texts, "split")):
        found, named = (tiny_request(path, max_rows=None, too_long=too_long) for too_long in ("auto", policy))
        first = rebuild(found, tmp_path / "stores")
        assert rebuild(named, tmp_path / "stores", no_work) == first
        other = tiny_request(path, max_rows=None, too_long="split" if policy == "truncate" else "truncate")
        assert rebuild(other, tmp_path / "stores").path != first.path


def test_changed_content_makes_another_store(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", tiny_rows(20))
    first = build(tmp_path, path)
    write(tmp_path / "a.jsonl", tiny_rows(21))
    assert build(tmp_path, path).path != first.path


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "a flipped bit in the rows": lambda folder: flip_a_byte(folder / "rows-00000.arrow"),
    "truncated rows": lambda folder: (folder / "rows-00000.arrow").write_bytes((folder / "rows-00000.arrow").read_bytes()[:-100]),
    "missing rows": lambda folder: (folder / "rows-00000.arrow").unlink(),
    "missing meta": lambda folder: (folder / "meta.json").unlink(),
    "empty meta": lambda folder: (folder / "meta.json").write_bytes(b""),
    "edited meta": lambda folder: (folder / "meta.json").write_text(
        (folder / "meta.json").read_text().replace('"num_rows": ', '"num_rows": 1')
    ),
    "meta that is no object": lambda folder: (folder / "meta.json").write_text("[]"),
    "an empty folder": lambda folder: [file.unlink() for file in list(folder.iterdir())],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_built_again(damage: str, tmp_path: Path) -> None:
    first = tiny_store(tmp_path)
    rows = documents(first)
    DAMAGE[damage](Path(first.path))
    if damage != "a flipped bit in the rows":  # opening compares sizes; only the builder reads all of it
        with pytest.raises(DataError, match="is no complete store of tokenised rows"):
            Store.open(first.path)
    assert tiny_store(tmp_path) == first
    assert documents(first) == rows
    assert list(tmp_path.iterdir()) == [Path(first.path)]


@pytest.mark.parametrize("damaged", [False, True])
def test_builders_that_race_all_end_with_the_one_store(damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "as on a mount without locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    if damaged:
        flip_a_byte(Path(tiny_store(tmp_path).path) / "rows-00000.arrow")
    barrier = threading.Barrier(3)

    def together(function: Callable[[ShardTask], ShardResult], shards: Sequence[ShardTask]) -> Iterable[ShardResult]:
        results = list(map(function, shards))
        barrier.wait(timeout=60)
        return results

    with ThreadPoolExecutor(3) as pool:
        infos = [future.result() for future in [pool.submit(rebuild, tiny_request(), tmp_path, together) for _ in range(3)]]
    assert infos[0] == infos[1] == infos[2]
    assert list(tmp_path.iterdir()) == [Path(infos[0].path)]
    assert len(documents(infos[0])) == 20


# --- Real rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs ../shared/data/gsm8k")
def test_gsm8k_is_read_with_mapped_columns(tmp_path: Path) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    source = DataSource(path=str(GSM8K / "test.jsonl"), columns=columns)
    info = tiny_store(tmp_path, sources=(source,), max_length=2048)
    rows = [json.loads(line) for line in (GSM8K / "test.jsonl").read_text().splitlines()]
    assert info.num_documents == len(rows) == 1319
    assert info.num_bytes == sum(len(row["answer"].encode()) for row in rows)
    assert info.num_targets == info.num_bytes + len(rows), "a byte per token, and the end of each turn"
    assert info.num_tokens / (info.num_rows * 2048) > 0.98
