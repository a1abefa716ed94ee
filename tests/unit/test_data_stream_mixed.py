"""Several streamed sources have the parts of the targets that were asked for, as a plain loop over their rows deals them out."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune.config.sections.data import TrainSource
from raytune.config.sections.data_limits import LimitsSection
from raytune.data.store.store import Store
from raytune.data.stream.recipe import Recipe
from raytune.data.stream.stream import Position, Stream, Window, rows_per_turn, windows_from
from raytune.errors import DataError
from raytune.plan.data.streaming import StreamedSource
from tests.tiny import tiny_rows, tiny_store, tiny_tokenizer
from tests.unit.test_data_stream import SEED, recipe

PARTS = {"short": 1.0, "long": 2.5, "few": 0.5}
TEXTS = {
    "short": [f"short {number}" for number in range(400)],
    "long": [f"long {number} {'words ' * (3 + number % 9)}" for number in range(90)],
    "few": [f"few {number}" for number in range(7)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name, texts in TEXTS.items():
        half = len(texts) // 2
        for part, some in enumerate((texts[:half], texts[half:])):
            (folder / f"{name}-{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    return folder


def mixed(folder: Path, window: int, **changes: Any) -> Recipe:
    sources = [
        TrainSource(path=str(folder / f"{name}-*.jsonl"), format="text", proportion=part, **changes.pop(name, {}))
        for name, part in PARTS.items()
    ]
    fields: dict[str, Any] = {"packing": "none"} | changes
    return recipe(folder, window, sources=[StreamedSource(source=one) for one in sources], **fields)


def texts(window: Window) -> list[str]:
    decode = tiny_tokenizer().decode
    rows = [window.rows.row(row).input_ids for row in range(window.rows.num_rows)]
    return [str(decode(row, skip_special_tokens=True)) for row in rows]


def dealt(num_windows: int, window: int) -> list[list[str]]:
    """What each window has, by a loop over rows that knows the targets of each."""
    tokenizer = tiny_tokenizer()
    per_turn = rows_per_turn(window, len(PARTS))
    at, had = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    windows = []
    for _ in range(num_windows):
        found: list[str] = []
        while len(found) < window:
            name = min(PARTS, key=lambda one: had[one] / PARTS[one])
            for _ in range(min(per_turn, window - len(found))):
                text = TEXTS[name][at[name]]
                found.append(text)
                had[name] += len(tokenizer(text).input_ids)  # of its own nothing foretells the first, but the end is one too
                at[name] += 1
                if at[name] == len(TEXTS[name]):
                    at[name] = 0
                    break
        windows.append(found)
    return windows


@pytest.mark.parametrize("window", [40, 150])
def test_sources_take_turns_by_their_proportions_of_the_targets(window: int, folder: Path) -> None:
    made = mixed(folder, window)
    unbroken = list(islice(windows_from(made, Position()), 9))
    assert [Counter(texts(one)) for one in unbroken] == [Counter(one) for one in dealt(9, window)]
    total = sum(PARTS.values())
    for one in unbroken[1:]:
        targets = [counts["targets"] for counts in one.after.counts]
        longest = rows_per_turn(window, 3) * max(len(text) + 2 for texts in TEXTS.values() for text in texts)
        for number, part in zip(targets, PARTS.values()):
            assert abs(number - part / total * sum(targets)) <= longest
    assert unbroken[-1].after.counts[2]["passes"] > 2, "a small source begins again behind its last row"
    for index in (1, 4, 6):
        position = Position.of(json.loads(json.dumps(unbroken[index].position.to_json())))
        again = list(islice(windows_from(made, position), 3))
        assert [texts(one) for one in again] == [texts(one) for one in unbroken[index : index + 3]]
        assert [one.after for one in again] == [one.after for one in unbroken[index : index + 3]]


def test_of_sources_of_equal_rows_a_window_of_all_is_a_store_in_each_of_its_epochs(tmp_path: Path) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    for name in weights:
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {number:03}\n" for number in range(60)))
    sources = [
        TrainSource(path=str(tmp_path / f"{name}.txt"), proportion=1.0, loss_weight=weight) for name, weight in weights.items()
    ]
    info = tiny_store(tmp_path / "stores", sources=tuple(sources), loss_weights=tuple(weights.values()))
    store, stream = Store.open(info.path), Stream(recipe(tmp_path, 180, sources=[StreamedSource(source=one) for one in sources]))
    for positions in np.array_split(np.arange(3 * store.num_rows), store.num_rows):
        own, theirs = stream.rows_at(positions, SEED), store.rows_at(positions, SEED)
        assert stream.targets_of(own).tolist() == store.targets_of(theirs).tolist()
        own_weights, their_weights = stream.weights_of(own), store.weights_of(theirs)
        assert own_weights is not None
        assert their_weights is not None
        assert own_weights.tolist() == their_weights.tolist()
        for one, other in zip(own.tolist(), theirs.tolist()):
            assert np.array_equal(stream.row(one).input_ids, store.row(other).input_ids)
            own_weights, their_weights = stream.row(one).target_weights, store.row(other).target_weights
            assert own_weights is not None
            assert their_weights is not None
            assert np.array_equal(own_weights, their_weights)
    assert {name: counts["rows"] for name, counts in stream.counts_by_source.items()} == dict.fromkeys(weights, 180)
    assert stream.counts["rows"] == 540
    stream.close()


def test_limits_are_held_against_each_source_by_itself(tmp_path: Path) -> None:
    good = [{"messages": row["messages"]} for row in tiny_rows(300)]
    bad = [*tiny_rows(10), *({"messages": row["messages"][:1]} for row in tiny_rows(10))]
    for name, rows in (("good", good), ("bad", bad)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        TrainSource(path=str(tmp_path / f"{name}.jsonl"), proportion=part) for name, part in (("good", 30.0), ("bad", 1.0))
    ]
    windows = windows_from(recipe(tmp_path, 100, sources=[StreamedSource(source=one) for one in sources]), Position())
    with pytest.raises(DataError, match=r"bad, as far as it was read\): \d+ of \d+ rows .* have no target.*\n.*bad\.jsonl:11"):
        list(islice(windows, 20))


def test_a_source_without_a_row_to_train_on_is_refused_rather_than_read_for_ever(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(30)))
    (tmp_path / "asks.jsonl").write_text("".join(json.dumps({"messages": row["messages"][:1]}) + "\n" for row in tiny_rows(5)))
    sources = [TrainSource(path=str(tmp_path / f"{name}.jsonl"), proportion=1.0) for name in ("good", "asks")]
    made = recipe(tmp_path, 64, sources=[StreamedSource(source=one) for one in sources], limits=LimitsSection(no_target=1.0))
    with pytest.raises(DataError, match=r"No row of .*asks\.jsonl can be trained on: of \d+ rows 0 are bad, \d+ have no target"):
        next(windows_from(made, Position()))
