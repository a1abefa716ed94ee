"""Keys and values of rows that come and go are those that each row would have alone, and take what the plan says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raytune.errors import PlanError
from raytune.evaluation.answer_text import AnswerText
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.saved.serving import LEAST_CACHED, MOST_UNUSED, SPARE_COLUMNS, most_cached_tokens
from raytune.serving.batches import PaddedBatch, Row
from raytune.serving.requests import Request
from raytune.serving.rows_cache import RowsCache, windows_of
from tests.served import BASES
from tests.tiny import PATIENT, tiny_tokenizer

HEADS, WIDTH = 2, 3
WINDOWS = (None, 5)


def row_of(length: int, mark: int) -> Row:
    """A row with keys of so many tokens, whose ids are its mark."""
    request = Request(id=str(mark), model="any", prompt=(mark,), max_new_tokens=1_000)
    return Row(request=request, deliver=print, ids=[mark] * (length + 1), text=AnswerText(tiny_tokenizer(), (), ()))


def states(row: Row, first: int, last: int) -> Tensor:
    """Keys that say whose they are, and where."""
    return (torch.arange(first, last) + 1000.0 * row.ids[0])[None, :, None].expand(HEADS, last - first, WIDTH)


def filled(rows: list[Row]) -> PaddedBatch:
    batch = PaddedBatch(rows, WINDOWS)
    longest = max(len(row.ids) - 1 for row in rows)
    padded = torch.stack(
        [
            torch.cat([torch.zeros(HEADS, longest - len(row.ids) + 1, WIDTH), states(row, 0, len(row.ids) - 1)], dim=1)
            for row in rows
        ]
    )
    for layer in range(len(WINDOWS)):
        batch.cache.update(padded, -padded, layer)
    return batch


def step(batch: PaddedBatch) -> None:
    """A token for each row; what the model would see of each is its own, up to the window."""
    new = torch.stack([states(row, len(row.ids) - 1, len(row.ids)) for row in batch.rows])
    for layer, window in enumerate(WINDOWS):
        kv_length, offset = batch.cache.get_mask_sizes(1, layer)
        keys, values = batch.cache.update(new, -new, layer)
        assert keys.shape[-2] == kv_length
        assert offset + kv_length == batch.cache.get_seq_length(layer)
        for place, row in enumerate(batch.rows):
            seen = min(len(row.ids), window or len(row.ids))
            assert keys[place, :, -seen:].equal(states(row, len(row.ids) - seen, len(row.ids)))
        assert values.equal(-keys)
        assert keys.isfinite().all()
    for row in batch.rows:
        row.ids.append(row.ids[0])


@PATIENT
@given(st.data())
def test_rows_keep_their_keys_whoever_comes_and_goes(data: st.DataObject) -> None:
    lengths = st.lists(st.integers(1, 90), min_size=1, max_size=4)
    batch, number = filled([row_of(length, mark) for mark, length in enumerate(data.draw(lengths))]), 10
    for _ in range(data.draw(st.integers(1, 6))):
        match data.draw(st.sampled_from(["step", "many", "join", "leave"])):
            case "step":
                step(batch)
            case "many":
                for _ in range(70):
                    step(batch)
            case "join":
                batch.take_in(filled([row_of(length, number + mark) for mark, length in enumerate(data.draw(lengths))]))
                number += 10
            case "leave" if len(batch.rows) > 1:
                batch.keep(data.draw(st.lists(st.sampled_from(batch.rows), min_size=1, unique_by=id)))
            case _:
                pass
        assert batch.cache.width == max(len(row.ids) for row in batch.rows) - 1
        per_place = 2 * 4 * HEADS * WIDTH * len(WINDOWS)
        assert batch.cache.num_bytes <= MOST_UNUSED * len(batch.rows) * (batch.cache.width + SPARE_COLUMNS) * per_place + 1
    step(batch)


def test_layers_that_keep_states_are_no_rows_side_by_side() -> None:
    assert windows_of(BASES["llama"]()) == [None, None]
    assert windows_of(BASES["mistral, which has a window"]()) == [8, 8]
    assert windows_of(BASES["gemma3, some of whose layers have a window"]()) == [8, None, 8]
    assert windows_of(BASES["lfm2"]()) is None
    assert windows_of(BASES["mamba2"]()) is None


def test_the_plan_counts_what_a_cache_holds() -> None:
    shape = read_model_shape("demo")
    rows, columns = 5, 100
    cache = RowsCache([None] * shape.num_layers)
    keys = torch.zeros(rows, shape.kv_heads, columns, shape.head_dim)
    for layer in range(shape.num_layers):
        cache.update(keys, keys, layer)
    room = MOST_UNUSED * cache.num_bytes
    assert most_cached_tokens(int(room) + 1, shape, 4) == rows * (columns + SPARE_COLUMNS)
    with pytest.raises(PlanError, match=f"{LEAST_CACHED} are the least to serve with"):
        most_cached_tokens(1_000_000, shape, 4)
