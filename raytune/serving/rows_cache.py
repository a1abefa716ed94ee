"""Keys and values of rows that come and go, in one batch: padded on the left, so that all of them end in the same column.

Shapes: B rows, H heads, C columns, D width of a head, T new tokens of each row.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from raytune.plan.saved.serving import MOST_UNUSED, SPARE_COLUMNS


def windows_of(config: PretrainedConfig) -> list[int | None] | None:
    """The window of each layer that keeps keys and values, None: it keeps all. None if a layer keeps something else, such as a
    state, whose rows cannot be padded and put side by side here."""
    layers = DynamicCache(config=config).layers
    kinds = {DynamicLayer: lambda layer: None, DynamicSlidingWindowLayer: lambda layer: layer.sliding_window}
    if not layers or any(type(layer) not in kinds for layer in layers):
        return None
    return [kinds[type(layer)](layer) for layer in layers]


class RowsCache(Cache):
    """What transformers' models take for `past_key_values`. It begins without rows; its first keys say how many there are."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__(layers=[_RowsLayer(window) for window in windows])
        self._rows: list[Any] = self.layers

    @property
    def width(self) -> int:
        """Columns so far: tokens of the longest row."""
        return self._rows[0].width

    @property
    def num_bytes(self) -> int:
        """Held, with what is unused."""
        return sum(one.nbytes for layer in self._rows if layer.is_initialized for one in (layer.keys, layer.values))

    def take_in(self, other: "RowsCache") -> None:
        """Append the rows of another cache of the same model, which is not used again."""
        for layer, its in zip(self._rows, other._rows, strict=True):
            layer.take_in(its)

    def keep(self, order: Sequence[int], width: int) -> None:
        """Keep some rows.

        Args:
            order: for each place, the row that is there now; each of them is there already, or comes from behind them all.
            width: of the longest.
        """
        for layer in self._rows:
            layer.keep(order, width)


class _RowsLayer(CacheLayerMixin):
    """Of one layer of a model: the first rows of two tensors [B, H, C, D] are in use, in columns that end at `_end`.

    What is in columns that a row has not reached is finite, and masked.
    """

    keys: Any
    values: Any

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.is_sliding = window is not None
        # A token sees itself and what is kept.
        self._most_kept = None if window is None else window - 1
        self.num_rows = self.width = self._end = 0

    @property
    def _kept(self) -> int:
        """Columns that the next token may see."""
        return self.width if self._most_kept is None else min(self.width, self._most_kept)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.num_rows = len(key_states)
        columns = key_states.shape[-2] + SPARE_COLUMNS
        self.keys, self.values = (
            one.new_zeros(one.shape[0], one.shape[1], columns, one.shape[3]) for one in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert len(key_states) == self.num_rows
        new, kept = key_states.shape[-2], self._kept
        if self._end + new > self.keys.shape[-2]:
            self._lay_out(self.keys.shape[0], new)
        first, self._end = self._end - kept, self._end + new
        self.width += new
        self.keys[: self.num_rows, :, self._end - new : self._end] = key_states
        self.values[: self.num_rows, :, self._end - new : self._end] = value_states
        return self.keys[: self.num_rows, :, first : self._end], self.values[: self.num_rows, :, first : self._end]

    def take_in(self, other: "_RowsLayer") -> None:
        before, had = self.num_rows, self._kept
        self.num_rows += other.num_rows
        self.width = max(self.width, other.width)
        if self.num_rows > self.keys.shape[0] or self._kept > self._end:
            self._lay_out(self.num_rows, 0, num_full=before, had=had)
        theirs = min(other._kept, self._kept)
        for own, its in ((self.keys, other.keys), (self.values, other.values)):
            own[:before, :, self._end - self._kept : self._end - had] = 0
            own[before : self.num_rows, :, self._end - self._kept : self._end - theirs] = 0
            own[before : self.num_rows, :, self._end - theirs : self._end] = its[
                : other.num_rows, :, other._end - theirs : other._end
            ]

    def keep(self, order: Sequence[int], width: int) -> None:
        for place, row in enumerate(order):
            if place != row:
                assert row >= len(order), "else it would be written over before it is read"
                self.keys[place] = self.keys[row]
                self.values[place] = self.values[row]
        self.num_rows, self.width = len(order), width
        needed = self.num_rows * (self._kept + SPARE_COLUMNS)
        if self.keys.shape[0] * self.keys.shape[2] > MOST_UNUSED * needed:
            self._lay_out(self.num_rows, 0)

    def _lay_out(self, num_rows: int, new: int, *, num_full: int | None = None, had: int | None = None) -> None:
        """Make room for this many rows, and for new columns, in tensors that begin with what is kept."""
        full, had = self.num_rows if num_full is None else num_full, self._kept if had is None else had
        first, end = self._end - had, self._kept
        for name in ("keys", "values"):
            old = getattr(self, name)
            laid = old.new_zeros(num_rows, old.shape[1], end + new + SPARE_COLUMNS, old.shape[3])
            laid[:full, :, end - had : end] = old[:full, :, first : self._end]
            setattr(self, name, laid)
        self._end = end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._kept + query_length, self.width - self._kept

    def get_seq_length(self) -> int:
        return self.width

    def get_max_length(self) -> int:
        return -1 if self._most_kept is None else self._most_kept + 1
