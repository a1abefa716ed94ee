"""Between logged steps our code asks the device for no value, and copies nothing to it that has to be waited for.

On a CPU nothing has to be waited for; but what would be on a GPU can be seen there, by the operations that read values and by who
calls them.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from raytune.model.adapters.token_rows import RowsAlone
from raytune.plan.run_plan import RunPlan
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import LORA, Change, Material, make_plan, start, steps_of

ATEN = torch.ops.aten
READING = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default}
"""Operations that wait for the device: their result, or its shape, is a value."""
INDEXING = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default}
"""So do these, where an index is a mask."""
READING_IN_PYTHON = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
"""The same without an operation, on a CPU."""
COPYING = {torch.tensor, torch.as_tensor}
"""Where a device is named, they copy to it from memory that is not pinned."""

LOOKING = "raytune/training/steps/loop.py: look"
"""On a CPU every step is looked at, on a GPU those that are logged."""
IS_INVALID = "deepspeed/runtime/utils.py: is_invalid_grad_norm"
MASKS = "deepspeed/runtime/utils.py: mask_nan_or_inf_with_val_inplace"
OVERFLOWS = "deepspeed/runtime/zero/stage_1_and_2.py: has_overflow"
OF_DEEPSPEED = {
    0: set(),
    1: {IS_INVALID, MASKS, OVERFLOWS},
    2: {IS_INVALID, MASKS, OVERFLOWS},
    3: {IS_INVALID, "deepspeed/runtime/zero/stage3.py: get_grad_norm_direct"},
}
"""What DeepSpeed 0.19 reads in each step, by stage (docs/performance.md)."""


class Waits:
    """Counts who would wait for a device while it is entered, by file and function."""

    def __init__(self) -> None:
        self.askers: Counter[str] = Counter()
        self._modes = (_Calls(self.askers), _Operations(self.askers))

    def __enter__(self) -> "Waits":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Calls(TorchFunctionMode):
    def __init__(self, askers: Counter[str]) -> None:
        super().__init__()
        self._askers = askers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READING_IN_PYTHON or (func in COPYING and kwargs.get("device") is not None):
            self._askers[_asker(sys._getframe(1))] += 1
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, askers: Counter[str]) -> None:
        super().__init__()
        self._askers = askers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING or (func in INDEXING and any(one is not None and one.dtype == torch.bool for one in args[1])):
            self._askers[_asker(sys._getframe(1))] += 1
        return func(*args, **(kwargs or {}))


def _asker(frame: FrameType | None) -> str:
    """The innermost function that is not torch's own."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path != Path(__file__):
            parts = path.parts
            own = next((index for index, part in enumerate(parts) if part in ("raytune", "site-packages")), -1)
            first = own if own >= 0 and parts[own] == "raytune" else own + 1
            return f"{'/'.join(parts[first:])}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


def askers_of(plans: Sequence[RunPlan]) -> list[Counter[str]]:
    """Of the second and third step of each plan, of which none is read in between. The first makes what is made once."""
    found = []
    for plan in plans:
        engine, loss_sum, batches_of = start(plan)
        batches = [batches_of(step) for step in range(3)]
        steps = steps_of(plan, engine, loss_sum, batches.__getitem__, Change(stop=3))
        next(steps)
        with Waits() as waits:
            list(steps)
        found.append(waits.askers)
        engine.release()
    return found


BF16: dict[str, Any] = {
    "precision": "bf16",
    "model": {"attention": "sdpa", "dtype": "bf16", "compute_dtype": "bf16"},
    "batch": {"micro_batch_size": 1},  # products in 16 bits take long on a CPU
}
FULL: dict[str, Any] = BF16 | {"model": BF16["model"] | {"dtype": "fp32"}}
IN_CHUNKS: dict[str, Any] = {"loss": {"chunk_tokens": 16}}
ROWS: dict[str, Any] = {"adapter": LORA | {"trainable_tokens": ["<|im_end|>"]}}


@pytest.mark.parametrize(
    "changes",
    [FULL, BF16 | IN_CHUNKS | {"adapter": LORA}, BF16 | {"adapter": LORA | {"dropout": 0.1}, "model": BF16["model"]}],
    ids=["full", "lora in chunks", "lora with dropout"],
)
def test_steps_of_whole_weights_ask_for_nothing(changes: dict[str, Any], material: Material) -> None:
    (askers,) = askers_of([make_plan(material, **changes)])
    assert {*askers} == {LOOKING}


def test_sharded_steps_ask_for_nothing_but_what_deepspeed_asks_for(material: Material) -> None:
    stages = (0, 1, 2, 3)
    buckets = {"engine": {"kind": "plain", "zero_stage": 0, "buckets": {"reduce_elements": 2000}}}
    ways: tuple[dict[str, Any], ...] = (IN_CHUNKS | buckets | {"adapter": LORA}, IN_CHUNKS | {"adapter": LORA}, {}, IN_CHUNKS)
    plans = [make_plan(material, workers=2, stage=stage, **BF16 | way) for stage, way in zip(stages, ways)]
    for rank in run_on_ranks(askers_of, 2, plans):
        of_deepspeed = [{asker for asker in askers if asker.startswith("deepspeed/")} for askers in rank]
        assert [{*askers} - of_library for askers, of_library in zip(rank, of_deepspeed)] == [{LOOKING}] * 4
        assert dict(zip(stages, of_deepspeed)) == OF_DEEPSPEED


def test_what_waits_is_seen() -> None:
    values = torch.arange(3.0)
    for wait in (
        lambda: values[0].item(),
        lambda: bool(values[0]),
        lambda: float(values[0]),
        lambda: values.tolist(),
        lambda: values.cpu(),
        lambda: values[values > 1],
        lambda: values.nonzero(),
        lambda: torch.tensor([1.0], device="cpu"),
        lambda: torch.as_tensor(1.0, device="cpu"),
    ):
        with Waits() as waits:
            wait()
        assert waits.askers.total() >= 1
    with Waits() as waits:
        _ = torch.where(values.isfinite(), 1.0, 0.0) + torch.full((), 2.0, device="cpu") + values.to("cpu", non_blocking=True)
    assert not waits.askers


def test_rows_of_tokens_know_their_numbers_without_a_copy_in_each_pass(material: Material) -> None:
    plan = make_plan(material, **BF16 | ROWS)
    (askers,) = askers_of([plan])
    assert {*askers} == {LOOKING}
    engine, *_ = start(plan)
    layers = [module for module in engine.model.modules() if isinstance(module, RowsAlone)]
    assert layers
    assert not any("numbers_of" in name for name in engine.model.state_dict()), "nothing that is saved"
