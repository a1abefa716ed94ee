"""Disks that ZeRO offloads to: too small a one is refused before a model is loaded, by all ranks alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raytune.errors import PlanError, UserError
from raytune.plan.run_plan import RunPlan
from raytune.training.start.nvme_room import SWAP_FOLDER, refuse_small_nvme
from raytune.training.start.start import start_engine
from raytune.units import MIB
from tests.numerics.processes import run_on_ranks
from tests.tiny import tiny_plan


def plan_on(disk: Path, optimizer_mib: int, workers: int = 1, **engine: Any) -> RunPlan:
    values = {"kind": "zero", "zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": str(disk), **engine}
    memory = [
        {"name": "optimizer", "num_bytes": optimizer_mib * MIB, "place": "nvme"},
        {"name": "weights", "num_bytes": 100 * MIB, "place": "device"},
    ]
    batch = {"workers": workers, "micro_batch_size": 1, "accumulation": 1}
    return tiny_plan(engine=values, memory=memory, batch=batch, num_trainable=MIB)


def refuse(plan: RunPlan) -> None:
    refuse_small_nvme(plan, dist.get_rank(), dist.get_world_size())


def test_gradients_of_an_offloaded_optimizer_lie_on_the_disk_too(tmp_path: Path) -> None:
    assert plan_on(tmp_path, 1, workers=2).bytes_on_nvme == {"optimizer": MIB, "gradients": 2 * MIB}


def test_a_disk_without_room_is_refused_before_the_model_is_loaded(small_disk: Path) -> None:
    """The plan's model does not exist."""
    with pytest.raises(PlanError, match=r"has no room .* needs 1 x 7 MiB and has 6 MiB \(optimizer 3 MiB, gradients 4 MiB per"):
        start_engine(plan_on(small_disk, 3), torch.device("cpu"), 0, 1)


def test_the_ranks_of_a_node_share_its_disk(small_disk: Path) -> None:
    """Two ranks of 5 MiB each on one node with 6."""
    errors = run_on_ranks(refuse, 2, plan_on(small_disk, 3, workers=2))
    assert all(isinstance(error, PlanError) and "needs 2 x 5 MiB and has 6 MiB" in str(error) for error in errors), errors


def test_files_of_an_earlier_run_are_room(small_disk: Path) -> None:
    old = small_disk / SWAP_FOLDER / "optimizer" / "rank0"
    old.mkdir(parents=True)
    (old / "0.tensor.swp").write_bytes(bytes(5 * MIB))
    refuse_small_nvme(plan_on(small_disk, 2), 0, 1)
    (small_disk / "others").write_bytes(bytes(MIB // 2))
    (old / "0.tensor.swp").rename(small_disk / "somebody's")
    with pytest.raises(PlanError, match="has no room"):
        refuse_small_nvme(plan_on(small_disk, 2), 0, 1)


def test_a_path_that_is_no_folder_is_refused_with_its_node(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot use"):
        refuse_small_nvme(plan_on(tmp_path / "file" / "nvme", 1), 0, 1)


def test_nothing_is_asked_of_a_disk_that_nothing_is_offloaded_to(tmp_path: Path) -> None:
    refuse_small_nvme(plan_on(tmp_path / "none", 10**9, offload_optimizer="cpu"), 0, 1)
    assert not (tmp_path / "none").exists()
