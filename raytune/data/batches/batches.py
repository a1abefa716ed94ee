"""From packed rows to tensors: documents laid end to end, without padding.

Shapes: N tokens of the micro-batch, D documents, M targets.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from raytune.data.store.order import positions_of_step, share_of_rank
from raytune.data.store.store import PackedRow, Store

_TENSORS = (
    *("input_ids", "position_ids", "cumulative_lengths"),
    *("target_positions", "target_ids", "target_weights", "token_positions"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one rank sees in one forward pass."""

    input_ids: Tensor
    """(1, N) int64."""
    position_ids: Tensor
    """(1, N) int64; starts again at 0 with each document."""
    cumulative_lengths: Tensor
    """(D + 1,) int32: where each document begins, and N."""
    max_document_length: int
    target_positions: Tensor
    """(M,) int64: where in N the hidden state is that predicts each target, one before the target and in the same document."""
    target_ids: Tensor
    """(M,) int64."""
    target_weights: Tensor | None = None
    """(M,) fp32: how much each target counts in the loss; None: all count alike, each as 1."""
    num_targets_in_step: int
    """Targets of the whole global batch (in evaluation: of all evaluated rows), over all ranks and micro-steps."""
    weight_in_step: float | None = None
    """Sum of the weights of those; None where each is 1."""
    rows: tuple[int, ...]
    """Rows of the store, for messages."""
    token_positions: Tensor | None = None
    """(N,) int64: with virtual tokens in front of each document, where its own tokens lie among them (data.in_front)."""
    num_virtual_keys: int = 0
    """Of each document, where keys and values alone have virtual tokens."""

    @property
    def num_tokens(self) -> int:
        """That pass through the layers."""
        return self.position_ids.shape[1]

    @property
    def num_targets(self) -> int:
        return self.target_ids.shape[0]

    @property
    def step_weight(self) -> float:
        """What the loss of the step is divided by: the sum of the weights of its targets, 1 where it has none."""
        return (self.num_targets_in_step if self.weight_in_step is None else self.weight_in_step) or 1

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; copies from pinned memory do not wait."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which a GPU copies while it computes."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, **{name: move(tensor) for name in _TENSORS if (tensor := getattr(self, name)) is not None})


class TrainingRows(Protocol):
    """Packed rows by their number: those of a store, or of a stream as far as they are at hand."""

    def rows_at(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """The rows at positions of the run, which ascend."""
        ...

    def row(self, index: int) -> PackedRow: ...

    def targets_of(self, rows: np.ndarray) -> np.ndarray:
        """Targets of each of some rows."""
        ...

    def weights_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Sum of the weights of the targets of each of some rows; None where every target weighs 1."""
        ...

    def named(self, rows: Iterable[int]) -> str:
        """Rows in words that a user finds them by."""
        ...


def step_batches(
    store: TrainingRows,
    *,
    step: int,
    rank: int,
    world: int,
    micro_batch_size: int,
    accumulation: int,
    num_rows_in_run: int,
    seed: int,
) -> list[Batch]:
    """This rank's micro-batches of one optimizer step, `accumulation` of them.

    Args:
        step: counted from 0.
        num_rows_in_run: positions that the run visits (epochs x rows of one). The last step may reach beyond them: those
            rows are there, so that every rank has something to compute, but carry no targets.
        seed: of the data order.
    """
    in_step = positions_of_step(step, world * micro_batch_size * accumulation)
    rows = store.rows_at(in_step, seed)
    counts = in_step < num_rows_in_run
    step_totals = _Totals.of(store, rows[counts])
    batches = []
    for micro_step in range(accumulation):
        share = share_of_rank(micro_step=micro_step, rank=rank, world=world, micro_batch_size=micro_batch_size)
        batches.append(_make_batch(store, rows[share].tolist(), counts[share].tolist(), step_totals))
    return batches


def num_evaluation_batches(num_rows: int, *, world: int, micro_batch_size: int, max_rows: int | None) -> int:
    """Batches that every rank gets from `evaluation_batches`."""
    return -(-min(num_rows, max_rows or num_rows) // (world * micro_batch_size))


def evaluation_batches(store: Store, *, rank: int, world: int, micro_batch_size: int, max_rows: int | None) -> Iterator[Batch]:
    """The first rows of a store in order, divided over the ranks; every rank gets as many batches, the tail without targets."""
    num_rows = min(store.num_rows, max_rows or store.num_rows)
    totals = _Totals.of(store, np.arange(num_rows))
    for index in range(num_evaluation_batches(store.num_rows, world=world, micro_batch_size=micro_batch_size, max_rows=max_rows)):
        first = (index * world + rank) * micro_batch_size
        positions = range(first, first + micro_batch_size)
        yield _make_batch(store, [p % num_rows for p in positions], [p < num_rows for p in positions], totals)


def lone_batches(store: Store, rows: Sequence[int], *, rank: int, world: int) -> Iterator[Batch]:
    """This rank's share of some rows, each in a batch of its own; every rank gets as many, the tail without targets."""
    for first in range(0, len(rows), world):
        position = first + rank
        counts = position < len(rows)
        row = rows[position if counts else 0]
        yield _make_batch(store, [row], [counts], _Totals.of(store, np.array([row])))


@dataclass(frozen=True, slots=True)
class _Totals:
    """Of all targets of a step, or of an evaluation."""

    num_targets: int
    weight: float | None

    @classmethod
    def of(cls, store: TrainingRows, rows: np.ndarray) -> "_Totals":
        weights = store.weights_of(rows)
        return cls(int(store.targets_of(rows).sum()), None if weights is None else float(weights.sum()))


def _make_batch(store: TrainingRows, rows: Sequence[int], counts: Sequence[bool], totals: _Totals) -> Batch:
    """Lay rows end to end.

    Args:
        counts: whether each row's targets carry loss.
    """
    contents = [store.row(row) for row in rows]
    lengths_D = np.concatenate([row.document_lengths for row in contents])
    cumulative_D1 = np.zeros(len(lengths_D) + 1, np.int32)
    np.cumsum(lengths_D, out=cumulative_D1[1:])
    input_ids_N = np.concatenate([row.input_ids for row in contents]).astype(np.int64)
    position_ids_N = np.arange(len(input_ids_N)) - np.repeat(cumulative_D1[:-1], lengths_D)
    is_target_N = np.concatenate([row.is_target & counted for row, counted in zip(contents, counts, strict=True)])
    targets_M = np.flatnonzero(is_target_N)
    weights = [] if totals.weight is None else [_weights_of(row) for row in contents]
    return Batch(
        input_ids=torch.from_numpy(input_ids_N).unsqueeze(0),
        position_ids=torch.from_numpy(position_ids_N).unsqueeze(0),
        cumulative_lengths=torch.from_numpy(cumulative_D1),
        max_document_length=int(lengths_D.max()),
        target_positions=torch.from_numpy(targets_M - 1),
        target_ids=torch.from_numpy(input_ids_N[targets_M]),
        target_weights=torch.from_numpy(np.concatenate(weights)[targets_M]) if weights else None,
        num_targets_in_step=totals.num_targets,
        weight_in_step=totals.weight,
        rows=tuple(rows),
    )


def _weights_of(row: PackedRow) -> np.ndarray:
    return np.ones(len(row.input_ids), np.float32) if row.target_weights is None else row.target_weights
