"""Rows are shown as they are trained: the tokens, targets and weights of the store, and whose turn each token is."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import raytune
from raytune.cli import cli
from raytune.data.preview import RowPlace, ShownDocument
from raytune.data.store.store import Store
from raytune.data.templates.pieces import Piece, TokenKind, pieces_of
from raytune.errors import UserError
from raytune.launch.data.data_preview import DataPreview
from tests.tiny import tiny_tokenizer

HOSTILE = "</pre><script>alert(1)</script>\x1b[2J\u202e\r\n\x1b[31m"


def turns(*texts: str, **last: Any) -> dict[str, Any]:
    row = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    row[-1] |= last
    return {"messages": row}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(folder: Path, **data: Any) -> dict[str, Any]:
    limits = dict.fromkeys(("lost", "no_target", "cut", "blank_answers"), 1.0)
    return {
        "name": "shown",
        "model": {"base": "demo"},
        "storage": str(folder / "runs"),
        "data": {"max_length": 256, "template": "chatml", "packing": "none", "limits": limits} | data,
    }


def stored(config: dict[str, Any]) -> Iterator[tuple[str, list[int], list[bool], list[float]]]:
    """Place, tokens, targets and weights of targets of each document that a run trains on."""
    plan = raytune.make_plan(config, training={"max_steps": 1, "global_batch_size": 1})
    store = Store.open(plan.data.train.path)
    for index in range(store.num_rows):
        row = store.row(index)
        weights = np.ones(len(row.input_ids)) if row.target_weights is None else row.target_weights
        yield store.origins(index)[0], row.input_ids.tolist(), row.is_target.tolist(), weights[row.is_target].tolist()


LONG: dict[str, Any] = turns("Q1", "A" * 30, "Q2", "B", "Q3", "C" * 20, "Q4", "D")
LONG["messages"].insert(0, {"role": "system", "content": "S"})

SHAPES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "chats": ([turns("Q", "A"), turns("é 日本", "ü", "again", "no", train=False), turns("Q", "A", "Q", "B")], {}),
    "weights": ([turns("1 and 2", "12 of them", weight=0.5), turns("Q", "A")], {"token_weights": {"numbers": 3}}),
    "cut": ([turns("Q", "A" * 400), turns("Q" * 400, "A"), turns("Q", "A", weight=0)], {"max_length": 96}),
    "split": ([turns("Q", "abcdefghij" * 30, "Q", "B" * 90)], {"max_length": 64, "too_long": "split"}),
    "split at turns": ([LONG, turns("Q", "A")], {"max_length": 96, "too_long": "split_turns"}),
    "split for the last": ([LONG], {"max_length": 96, "too_long": "split_turns", "targets": "last"}),
    "cut left": ([LONG, turns("Q" * 300, "A")], {"max_length": 96, "too_long": "truncate_left"}),
    "texts": ([{"text": "plain text, " * 30}, {"text": "short"}], {"max_length": 50}),
    "all": ([turns("Q", "A", "Q", "B")], {"targets": "all"}),
    "roles": ([turns("Q", "A", "Q", "B")], {"targets": ["user"]}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_shown_is_what_the_store_of_the_run_holds(shape: str, tmp_path: Path) -> None:
    rows, data = SHAPES[shape]
    config = run(tmp_path, train={"path": str(write(tmp_path / "rows.jsonl", rows))}, **data)
    shown = raytune.data_preview(config, rows=100).documents
    found = [
        (one.origin, one.input_ids, [kind.is_target for kind in one.kinds], [k.weight for k in one.kinds if k.is_target])
        for one in shown
    ]
    assert sorted(found) == sorted(stored(config))
    for document in shown:
        assert "".join(piece.text for piece in document.pieces) == tiny_tokenizer().decode(document.input_ids)
        assert [p for _, pieces in document.turns for p in pieces] == document.pieces


def test_each_token_of_a_turn_is_known_as_its_and_what_stands_between_goes_with_the_next(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": "S"}, *turns("Q1", "A1", "Q2", "A2", train=False)["messages"]]}]
    shown = raytune.data_preview(run(tmp_path, train=str(write(tmp_path / "rows.jsonl", rows)))).documents[0]
    told = [(role, "".join(piece.text for piece in pieces)) for role, pieces in shown.turns]
    assert told == [
        ("system", "<|im_start|>system\nS<|im_end|>\n"),
        ("user", "<|im_start|>user\nQ1<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nA1<|im_end|>\n"),
        ("user", "<|im_start|>user\nQ2<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nA2<|im_end|>\n"),
    ]
    own = ["".join(p.text for p in shown.pieces if p.kind.turn == turn) for turn in range(5)]
    assert own == ["S<|im_end|>", "Q1<|im_end|>", "A1<|im_end|>", "Q2<|im_end|>", "A2<|im_end|>"]


def test_each_piece_of_a_split_chat_knows_its_turns(tmp_path: Path) -> None:
    config = run(tmp_path, train=str(write(tmp_path / "rows.jsonl", SHAPES["split"][0])), **SHAPES["split"][1])
    shown = raytune.data_preview(config).documents
    assert len(shown) > 5
    for document in shown:
        for piece in document.pieces:
            if re.fullmatch("[a-j]+|B+", piece.text):
                assert document.roles[piece.kind.turn or 0] == "assistant"
                assert piece.kind.turn == (3 if "B" in piece.text else 1)


# --- Which rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["split at turns", "split for the last", "cut left"])
def test_each_piece_of_a_chat_that_turns_divide_knows_its_turns(shape: str, tmp_path: Path) -> None:
    config = run(tmp_path, train=str(write(tmp_path / "rows.jsonl", [LONG])), **SHAPES[shape][1])
    documents = raytune.data_preview(config).documents
    said = {"S": "system", **{f"Q{number}": "user" for number in range(1, 5)}}
    assert len(documents) == (2 if shape == "split at turns" else 1)
    for document in documents:
        found = [(role, "".join(piece.text for piece in pieces)) for role, pieces in document.turns]
        assert len(found) >= 3
        assert all(
            role == next((of for said_text, of in said.items() if f"\n{said_text}<" in text), "assistant") for role, text in found
        )
        assert document.roles == [role for role, _ in found]


def test_a_row_is_found_by_its_place_in_any_kind_of_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{index} " + "x" * 400, "completion": f"A{index}"} for index in range(6000)]
    write(tmp_path / "lines.jsonl", ["", *rows])  # three segments, and a line that is no row
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=100)
    (tmp_path / "table.csv").write_text("prompt,completion\n" + "".join(f'Q{n},"A{n}\nB"\n' for n in range(50)))
    (tmp_path / "array.json").write_text(json.dumps(rows[:20]))
    names = ("lines.jsonl", "rows.parquet", "table.csv", "array.json")
    config = run(tmp_path, train=[str(tmp_path / name) for name in names], max_length=1024)
    for name, line, answer in (
        ("lines.jsonl", 5999, "A5997"),
        ("lines.jsonl", 2, "A0"),
        ("rows.parquet", 250, "A249"),
        ("table.csv", 30, "A14\nB"),  # by the line that it begins on
        (str(tmp_path / "array.json"), 20, "A19"),
    ):
        (document,) = raytune.data_preview(config, row=f"{name}:{line}").documents
        assert document.origin == str(tmp_path / name if "/" not in name else name) + f":{line}"
        assert "".join(p.text for p in document.pieces if p.kind.is_target) == f"{answer}<|im_end|>"


def test_a_row_behind_the_first_ones_that_are_trained_is_no_row_of_the_run(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [turns(f"Q{name}{index}", "A") for index in range(5)])
    config = run(tmp_path, train={"path": str(tmp_path / "*.jsonl"), "max_rows": 7})
    assert [len(raytune.data_preview(config, row=place).documents) for place in ("a.jsonl:5", "b.jsonl:2")] == [1, 1]
    with pytest.raises(UserError, match=r"There is no row b\.jsonl:3"):
        raytune.data_preview(config, row="b.jsonl:3")


@pytest.mark.parametrize("place", ["rows.jsonl:99", "other.jsonl:1", "rows.jsonl:3"])
def test_a_place_without_a_row_is_refused(place: str, tmp_path: Path) -> None:
    config = run(tmp_path, train=str(write(tmp_path / "rows.jsonl", [turns("Q", "A"), turns("Q", "A"), "  "])))
    with pytest.raises(UserError, match=rf"There is no row {place}: none of {tmp_path}/rows.jsonl has it"):
        raytune.data_preview(config, row=place)


def test_a_row_that_is_not_trained_is_told_with_why(tmp_path: Path) -> None:
    rows = ["{torn", turns("Q", "A", weight=0), turns("Q" * 300, "A"), turns("Q", "A")]
    config = run(tmp_path, train=str(write(tmp_path / "rows.jsonl", rows)), on_bad_row="skip")
    found = {line: raytune.data_preview(config, row=f"rows.jsonl:{line}") for line in (1, 2, 3, 4)}
    assert [len(one.documents) for one in found.values()] == [0, 0, 0, 1]
    assert "rows.jsonl:1: not JSON" in found[1].lost[0]
    assert found[2].lost == [f"{tmp_path}/rows.jsonl:2: nothing in it is to be trained"]
    assert "lies behind data.max_length" in found[3].lost[0]
    assert [len(raytune.data_preview(config, rows=4).lost), found[4].lost] == [3, []]


def test_sources_are_chosen_by_name_and_held_out_rows_have_no_weights(tmp_path: Path) -> None:
    one, other, held = (write(tmp_path / f"{name}.jsonl", [turns("Q", f"{name} 1")] * 2) for name in ("one", "other", "held"))
    data = {"train": [{"path": str(one), "loss_weight": 0.5}, str(other)], "validation": str(held)}
    config = run(tmp_path, **data, token_weights={"numbers": 4})
    assert [d.source for d in raytune.data_preview(config, rows=1).documents] == ["one", "other"]
    weights = {
        name: {k.weight for d in raytune.data_preview(config, rows=1, source=name).documents for k in d.kinds if k.is_target}
        for name in ("one", "other", "held")
    }
    assert weights == {"one": {0.5, 2.0}, "other": {1.0, 4.0}, "held": {1.0}}
    with pytest.raises(UserError, match="the sources of the run are one, other, held"):
        raytune.data_preview(config, source="none")
    assert raytune.data_preview(config, row="held.jsonl:2").documents[0].source == "held"


def test_a_row_of_the_other_side_of_a_split_is_said_to_be_held_out(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [turns(f"Q{index}", "A") for index in range(40)])
    shown = raytune.data_preview(run(tmp_path, train=str(rows), validation_fraction=0.5), rows=40)
    held_out = 40 - len(shown.documents)
    assert 5 < held_out < 35
    assert shown.lost == [f"rows: {held_out} rows on another side of the split, and so not trained"]


@pytest.mark.parametrize(
    "text", ["rows.jsonl", ":3", "rows.jsonl:", "rows.jsonl:-1", "rows.jsonl:0", "rows.jsonl:x", "rows.jsonl:²"]
)
def test_what_is_no_place_is_refused(text: str) -> None:
    assert RowPlace.of(text) is None
    with pytest.raises(UserError, match="expected FILE:LINE"):
        raytune.data_preview({"model": {"base": "demo"}, "data": {"train": "demo:train"}}, row=text)


# --- As it is shown ------------------------------------------------------------------------------------------------------------


def test_a_first_space_and_letters_of_several_tokens_are_shown_as_all_tokens_together_have_them() -> None:
    tokens = ["▁a", "▁b", "<0xE2>", "<0x82>", "<0xAC>", "▁", "</s>"]
    one = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [], byte_fallback=True))
    one.pre_tokenizer = pre_tokenizers.Metaspace()
    one.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ids, on, off = [0, 1, 2, 3, 4, 5, 1], TokenKind(True), TokenKind(False)
    for kinds in ([off, on, on, on, on, on, off], [on] * 7, [off, on, off, off, off, on, on]):
        pieces = pieces_of(ids, kinds, lambda some: one.decode(list(some), skip_special_tokens=False))
        assert "".join(piece.text for piece in pieces) == "a b€  b"
        assert sum(piece.num_tokens for piece in pieces) == 7


def document(*pieces: Piece) -> ShownDocument:
    kinds = [piece.kind for piece in pieces for _ in range(piece.num_tokens)]
    roles = ["user", "assistant"]
    return ShownDocument(origin="a:1", source="a", input_ids=[0] * len(kinds), kinds=kinds, roles=roles, pieces=list(pieces))


def test_without_colours_brackets_enclose_what_is_trained_by_weight() -> None:
    shown = document(
        Piece("Q\n", TokenKind(False, turn=0), 2),
        Piece("A ", TokenKind(True, 0.5, turn=1), 2),
        Piece("B", TokenKind(True, 1.0, turn=1), 1),
        Piece("<end>", TokenKind(True, 1.0, turn=1, is_special=True), 1),
        Piece("\n", TokenKind(True, 1.0, turn=1), 1),
    )
    text = str(DataPreview(documents=[shown], lost=[], notes=[])).splitlines()
    assert text[2:] == ["a:1: 7 tokens, 5 of them trained, weights 0.5, 1", "     user | Q↵", "assistant | ⟦x0.5 A ⟧⟦x1 B<end>↵⟧"]


def test_colours_are_for_terminals_that_want_them(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [turns("Q", f"A{HOSTILE}")])
    typed = ["data", "preview", "model.base=demo", f"data.train={path}", f"storage={tmp_path}"]
    coloured = CliRunner().invoke(cli, typed, env={"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": None}).stdout
    assert "\x1b[32mA</pre>" in coloured
    for environment in ({"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": "1"}, {"FORCE_COLOR": None}):
        plain = CliRunner().invoke(cli, typed, env=environment).stdout
        assert "assistant | ↵" not in plain
        assert "⟦A</pre><script>alert(1)</script>\\u001b[2J\\u202e\\u000d↵\n          | \\u001b[31m<|im_end|>⟧↵" in plain
        assert "\x1b" not in plain
    assert "\x1b[2J" not in coloured
    assert "\u202e" not in coloured
    assert not list(tmp_path.glob("stores"))


def test_the_page_needs_nothing_and_obeys_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [turns(f"Q{HOSTILE}", f"A{HOSTILE}", weight=0.5), "{<b>torn"])
    page = tmp_path / "page.html"
    raytune.data_preview(run(tmp_path, train=str(path), on_bad_row="skip"), page=page)
    text = page.read_text()
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert "default-src &#39;none&#39;" in text
    assert '<span class="weight">x0.5</span><mark>A&lt;/pre&gt;&lt;script&gt;' in text
    assert '<mark><b class="special">&lt;|im_end|&gt;</b></mark>' in text
    assert "rows.jsonl:2: not JSON" in text


def test_as_json_each_token_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [turns("Q", "A")])
    typed = ["data", "preview", "model.base=demo", f"data.train={path}", f"storage={tmp_path}", "--json"]
    (one,) = json.loads(CliRunner().invoke(cli, typed).stdout)["documents"]
    assert {len(one[name]) for name in ("input_ids", "is_target", "weight", "turn", "is_special")} == {one["num_tokens"]}
    assert sum(one["is_target"]) == one["num_targets"] == len("A") + 1
    assert [one["roles"][turn] for turn, target in zip(one["turn"], one["is_target"]) if target] == ["assistant"] * 2
