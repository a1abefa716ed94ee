"""Weights of turns reach the batch: through template, tokens, pieces of long rows, packing, shards, stores and division."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytune.data.batches.batches import Batch, evaluation_batches, step_batches
from raytune.data.conversations.shaping import Shape
from raytune.data.store import row_file
from raytune.data.store.store import WEIGHTS_COLUMN, Store, batches_of
from raytune.data.templates.text import resolve_template
from tests.tiny import PATIENT, tiny_rows, tiny_store, tiny_tokenizer

CHATML = resolve_template("chatml", tiny_tokenizer())


def turn(role: str, content: str, weight: float | None = None) -> dict[str, Any]:
    return {"role": role, "content": content} | ({} if weight is None else {"weight": weight})


def chat(*answers: tuple[str, float | None]) -> dict[str, Any]:
    return {"messages": [one for text, weight in answers for one in (turn("user", "Q"), turn("assistant", text, weight))]}


def opened(folder: Path, rows: Iterable[Any], **changes: Any) -> Store:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Store.open(tiny_store(folder / "stores", str(path), max_rows=None, **({"template": CHATML} | changes)).path)


def weighed_text(store: Store) -> list[tuple[str, float]]:
    """Runs of targets of one weight over all rows, as text; the tokens are bytes."""
    tokenizer, runs = tiny_tokenizer(), []
    for index in range(store.num_rows):
        row = store.row(index)
        weights = np.ones(len(row.input_ids), np.float32) if row.target_weights is None else row.target_weights
        before: float | None = None
        for token, is_target, weight in zip(row.input_ids.tolist(), row.is_target, weights.tolist()):
            if not is_target:
                before = None
            elif weight == before:
                runs[-1][0].append(token)
            else:
                runs.append(([token], weight))
                before = weight
    return [(str(tokenizer.decode(tokens)), weight) for tokens, weight in runs]


def test_each_target_has_the_weight_of_its_turn(tmp_path: Path) -> None:
    store = opened(tmp_path, [chat(("half", 0.5), ("none", 0), ("one", 1), ("thrice", 3)), chat(("plain", None))])
    assert weighed_text(store) == [
        ("half<|im_end|>", 0.5),
        ("one<|im_end|>", 1.0),
        ("thrice<|im_end|>", 3.0),
        ("plain<|im_end|>", 1.0),
    ]
    assert store.report.total("weighted_turns") == 2
    assert store.report.total("skipped_turns") == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"shape": Shape(reasoning="each")}, [("a<|im_end|>", 0.5), ("c<|im_end|>", 1.0), ("d<|im_end|>", 3.0)]),
        ({"shape": Shape(max_turns=2)}, [("c<|im_end|>", 1.0), ("d<|im_end|>", 3.0)]),
        ({"too_long": "split_turns", "max_length": 60}, [("a<|im_end|>", 0.5), ("c<|im_end|>", 1.0), ("d<|im_end|>", 3.0)]),
        ({"too_long": "truncate_left", "max_length": 40}, [("d<|im_end|>", 3.0)]),
    ],
)
def test_weights_stay_with_their_turns_whatever_is_made_of_a_chat(changes: Any, expected: Any, tmp_path: Path) -> None:
    row = chat(("a", 0.5), ("b", 0), ("c", 1), ("d", 3))
    row["messages"][1]["content"] = "<think></think>a" if "shape" in changes else "a"
    store = opened(tmp_path, [row], **changes)
    assert sorted((text.replace("<think></think>", ""), weight) for text, weight in weighed_text(store)) == expected


def test_roles_other_than_the_answers_are_weighed_where_they_are_trained(tmp_path: Path) -> None:
    rows = [{"messages": [turn("system", "S", 2), turn("user", "Q", 0.25), turn("assistant", "A")]}]
    weights = dict(weighed_text(opened(tmp_path, rows, targets=("system", "user", "assistant"))))
    assert sorted(weights.values()) == [0.25, 1.0, 2.0]
    assert next(text for text, weight in weights.items() if weight == 0.25).startswith("Q")


def test_pieces_of_a_split_row_keep_the_weights(tmp_path: Path) -> None:
    rows = [chat(("a" * 40, 0.5), ("b" * 40, 2), ("c" * 40, None))]
    whole = opened(tmp_path, rows)
    pieces = opened(tmp_path, rows, max_length=37, too_long="split")
    assert pieces.info.num_documents > 3
    for store in (whole, pieces):
        together = {letter: sum(text.count(letter) * (text[0] == letter) for text, _ in weighed_text(store)) for letter in "abc"}
        assert together == dict.fromkeys("abc", 40)
        assert {text[0]: weight for text, weight in weighed_text(store) if text[0] in "abc"} == {"a": 0.5, "b": 2.0, "c": 1.0}


def test_a_store_without_weights_has_no_column_for_them(tmp_path: Path) -> None:
    for rows in (tiny_rows(5), [chat(("A", 1), ("B", 0)), chat(("C", 1.0))]):
        store = opened(tmp_path, rows)
        assert store.weight_of_row is None
        first = next(batches_of(Path(store.info.path) / "rows-00000.arrow"))
        assert WEIGHTS_COLUMN not in first.schema.names
        assert all(store.row(index).target_weights is None for index in range(store.num_rows))


def batches_of_step(store: Store, world: int, micro: int, accumulation: int, num_rows: int = 1000) -> list[Batch]:
    division = {"world": world, "micro_batch_size": micro, "accumulation": accumulation}
    return [
        batch
        for rank in range(world)
        for batch in step_batches(store, step=0, rank=rank, num_rows_in_run=num_rows, seed=1, **division)
    ]


WEIGHTS = st.sampled_from([None, 0, 0.125, 0.3, 1, 7])


@PATIENT
@given(
    rows=st.lists(st.lists(WEIGHTS, min_size=1, max_size=3), min_size=1, max_size=12),
    packing=st.sampled_from(["best_fit", "token_budget", "none"]),
    shards=st.booleans(),
)
def test_packing_shards_and_division_change_no_weight(
    rows: list[list[float | None]], packing: str, shards: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    said = [("always", 0.5), *((f"r{row}a{at}", weight) for row, answers in enumerate(rows) for at, weight in enumerate(answers))]
    chats = [chat(said[0]), *(chat(*((f"r{row}a{at}", w) for at, w in enumerate(answers))) for row, answers in enumerate(rows))]
    with pytest.MonkeyPatch.context() as patch:
        if shards:  # so that weighted rows and others come from different shards, in record batches of their own
            patch.setattr("raytune.data.store.tokenising._DOCUMENTS_AT_ONCE", 1)
            patch.setattr(row_file, "_TOKENS_PER_RECORD_BATCH", 1)
        store = opened(folder, chats, packing=packing, max_length=128)
        found = {text.removesuffix("<|im_end|>"): weight for text, weight in weighed_text(store)}
    expected = {text: 1.0 if weight is None else float(np.float32(weight)) for text, weight in said if weight != 0}
    assert found == expected
    assert store.weight_of_row is not None
    total = sum(weight * len(f"{text}<") for text, weight in expected.items())  # a token per byte, and one that ends the turn
    assert store.weight_of_row.sum() == pytest.approx(total)
    for world, micro, accumulation in ((1, 4, 1), (2, 1, 2), (2, 2, 1)):
        batches = batches_of_step(store, world, micro, accumulation, store.num_rows)
        weights = [batch.target_weights for batch in batches if batch.target_weights is not None]
        assert len(weights) == len(batches)
        assert all(one.dtype == torch.float32 and len(one) == batch.num_targets for one, batch in zip(weights, batches))
        assert len({batch.step_weight for batch in batches}) == 1
        assert batches[0].step_weight == pytest.approx(float(torch.cat(weights).double().sum()))


def test_rows_beyond_the_end_of_the_run_weigh_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path, [chat((f"answer {i}", 0.5)) for i in range(8)], packing="none")
    batches = batches_of_step(store, 2, 2, 1, num_rows=3)
    assert store.weight_of_row is not None
    assert batches[0].step_weight == pytest.approx(3 * store.weight_of_row[0])
    assert sum(batch.num_targets for batch in batches) == 3 * store.num_targets_of_row[0]


def test_an_evaluation_is_divided_by_the_weight_of_what_it_looks_at(tmp_path: Path) -> None:
    store = opened(tmp_path, [chat(("a", 0.5)), chat(("b", 2)), chat(("c", 4))], packing="none")
    batches = list(evaluation_batches(store, rank=0, world=1, micro_batch_size=1, max_rows=2))
    assert [batch.step_weight for batch in batches] == [2 * 0.5 + 2 * 2] * 2


def test_without_weights_a_step_is_divided_by_its_number_of_targets(tmp_path: Path) -> None:
    (batch,) = batches_of_step(opened(tmp_path, tiny_rows(5)), 1, 2, 1)
    assert batch.target_weights is None
    assert batch.step_weight == batch.num_targets_in_step == batch.num_targets


def test_weights_move_with_their_batch(tmp_path: Path) -> None:
    (batch,) = batches_of_step(opened(tmp_path, [chat(("a", 0.5))]), 1, 1, 1)
    moved = batch.to("meta").target_weights
    assert moved is not None
    assert moved.device.type == "meta"
