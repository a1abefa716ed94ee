"""States in memory of the host: copies are what was there, whatever becomes of that, and the memory is used again."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytune.config.sections.training import Optimizer
from raytune.errors import CheckpointError
from raytune.training.checkpoints.snapshot import ALIGNMENT, LEAST_BLOCK_BYTES, HostMemory, Snapshot
from raytune.training.engines.optimizer import build_optimizer
from raytune.training.engines.plain_engine import PlainEngine
from raytune.training.engines.state_files import fill_with_tensors
from tests.tiny import tiny_plan

CPU = torch.device("cpu")


def in_file(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def addresses(value: dict[str, Tensor]) -> list[int]:
    return [tensor.untyped_storage().data_ptr() for tensor in value.values()]


def test_a_copy_is_saved_as_the_original_was_and_keeps_its_numbers() -> None:
    flat = torch.randn(1000)
    adorned = nn.Parameter(torch.ones(3))
    adorned.note = "kept"  # pyright: ignore[reportAttributeAccessIssue]
    shared = {"step": torch.tensor(5.0)}
    value: dict[str, Any] = {
        "flat": flat,
        "views": [flat[:10], flat[10:40].view(5, 6).T],
        "halves": torch.randn(7).to(torch.bfloat16),
        "codes": torch.arange(5, dtype=torch.uint8),
        "master": torch.randn(4, requires_grad=True),
        "parameter": nn.Parameter(torch.randn(2, 3), requires_grad=False),
        "adorned": adorned,
        "empty": torch.empty(0),
        "storage": torch.arange(3).untyped_storage(),
        "one": shared,
        "again": shared,
        "values": (1, 2.5, "name", None, {"nested": torch.Size([2, 3])}),
    }
    before = in_file(value)
    copy = HostMemory(0, CPU).copy(value)
    with torch.no_grad():
        for tensor in (flat, value["halves"], value["master"], value["parameter"], adorned, shared["step"]):
            tensor.zero_()
    assert in_file(copy) == before
    assert copy["views"][1].untyped_storage().data_ptr() == copy["flat"].untyped_storage().data_ptr()
    assert copy["one"] is copy["again"]


def test_memory_that_was_planned_is_used_again_and_what_it_lacked_is_kept() -> None:
    state = {name: torch.full((5000,), float(index)) for index, name in enumerate("abc")}
    memory = HostMemory(3 * 20_000 + 3 * ALIGNMENT, CPU)
    planned = memory.num_bytes
    memory.begin()
    first = addresses(memory.copy(state))
    memory.begin()
    assert addresses(memory.copy(state)) == first
    assert all(address % ALIGNMENT == 0 for address in first)
    assert memory.num_bytes == planned

    larger = state | {"d": torch.ones(20_000)}
    for _ in range(2):
        memory.begin()
        copy = memory.copy(larger)
        assert all(torch.equal(copy[name], larger[name]) for name in larger)
        assert memory.num_bytes == planned + LEAST_BLOCK_BYTES
    memory.release()
    assert memory.num_bytes == 0
    assert torch.equal(copy["d"], larger["d"])  # whoever still writes it has it


def test_memory_that_cannot_be_had_is_said_by_the_first_copy() -> None:
    memory = HostMemory(1 << 60, CPU)
    with pytest.raises(CheckpointError, match="memory that checkpoints are copied into cannot be had"):
        Snapshot(memory)


def test_files_are_written_as_they_were_taken(tmp_path: Path) -> None:
    snapshot = Snapshot(HostMemory(1000, CPU))
    weight = torch.arange(4.0)
    snapshot(tmp_path / "file", {"weight": weight}, fill_with_tensors)
    assert not (tmp_path / "file").exists()
    expected = weight.clone()
    weight.zero_()
    snapshot.write()
    fill_with_tensors({"weight": expected}, tmp_path / "expected")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "schedule_free_adamw"])
def test_a_plain_engine_saves_the_same_files_out_of_a_copy(optimizer: Optimizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 1))
    settings = tiny_plan(optimization={"optimizer": optimizer}).optimization
    engine = PlainEngine(model, build_optimizer(model, settings, device=CPU), precision="fp32", max_grad_norm=1.0, device=CPU)

    def train() -> None:
        engine.backward(engine.module(torch.randn(4, 128)).square().mean())
        engine.step(0.01)
        engine.average(0.5)

    train()
    train()
    snapshot = Snapshot(HostMemory(0, CPU))
    engine.save(tmp_path / "now")
    engine.save(tmp_path / "later", snapshot)
    train()
    snapshot.write()
    names = sorted(path.name for path in (tmp_path / "now").iterdir())
    assert names == ["average.safetensors", "engine.json", "optimizer.safetensors", "weights.safetensors"]
    assert sorted(path.name for path in (tmp_path / "later").iterdir()) == names
    for name in names:
        assert (tmp_path / "now" / name).read_bytes() == (tmp_path / "later" / name).read_bytes()
