"""What a checkpoint is copied into: planned where it is there, waived or refused where it is not, and never a reason to train
otherwise."""

from dataclasses import replace
from typing import Any

import pytest

from raytune.errors import PlanError
from raytune.plan.choosing.snapshot import COPY, SPARE
from raytune.plan.costs.memory import bytes_in
from raytune.plan.describe import plan_table
from raytune.plan.identity.identity import identity_of
from raytune.plan.run_plan import RunPlan, SnapshotPlan
from tests.unit.plan_cases import CPU, LLAMA_3_8B, gpus, planned

FULL: dict[str, Any] = {"adapter": {"method": "full"}, "training": {"precision": "bf16"}}


def copies(plan: RunPlan) -> list[tuple[str, int]]:
    return [(part.place, part.num_bytes) for part in plan.memory if part.name == COPY]


def without_copy(plan: RunPlan) -> dict[str, Any]:
    """All but where checkpoints are copied to."""
    content = plan.model_dump()
    content["memory"] = [part for part in content["memory"] if part["name"] != COPY]
    del content["checkpoint"]["snapshot"], content["reasons"]
    return content


def test_a_rank_copies_what_it_saves() -> None:
    """ZeRO, section 3: 12 bytes per parameter, shared; below stage 3 weights in 16 bits as well, which rank 0 saves."""
    number = LLAMA_3_8B.num_parameters
    for stage, workers, once in ((3, 8, 0), (2, 8, 2 * number)):
        sections = FULL | {"training": {"precision": "bf16", "zero": {"stage": stage}}, "cluster": {"workers": workers}}
        plan = planned(gpus(workers, 192), LLAMA_3_8B, **sections)
        snapshot, share = plan.checkpoint.snapshot, 12 * number / workers
        assert snapshot is not None
        assert snapshot.bytes_of(0) == pytest.approx(SPARE * (share + once), abs=1)
        assert {snapshot.bytes_of(rank) for rank in range(1, workers)} == {round(SPARE * share)}
        assert copies(plan) == [("host", snapshot.first_rank)]
        assert "copy of a checkpoint" in dict(plan_table(plan))["host memory per worker"]


def test_where_every_rank_has_the_same_state_one_copies_it() -> None:
    plan = planned(CPU, cluster={"workers": 2}, training={"zero": {"stage": 0}})
    needed = round(SPARE * plan.checkpoint_bytes)
    assert plan.checkpoint.snapshot == SnapshotPlan(first_rank=needed, other_ranks=0)
    assert copies(plan) == [("device", needed)]  # on a CPU that is the host's memory


def test_where_there_is_no_room_training_waits_and_all_else_is_as_it_was() -> None:
    large = planned(gpus(8, host_gib=1000), LLAMA_3_8B, **FULL)
    small = planned(gpus(8, host_gib=64), LLAMA_3_8B, **FULL)
    assert large.checkpoint.snapshot is not None
    assert small.checkpoint.snapshot is None
    assert copies(small) == []
    assert without_copy(small) == without_copy(large)
    (reason,) = (reason for reason in small.reasons if "checkpoint.in_background" in reason)
    assert reason.startswith("checkpoint.in_background is false, and training waits while checkpoints are written: a copy of a")
    assert reason.endswith("of the host's memory per worker, and 7.2 GiB (90%) can be used.")
    assert "training waits while they are written" in dict(plan_table(small))["checkpoints"]
    assert "waits" not in dict(plan_table(large))["checkpoints"]


def test_a_cpu_has_the_copy_beside_training() -> None:
    """The copy is what turns the scale here: training alone fits."""
    plan = planned(CPU)
    assert plan.checkpoint.snapshot is not None
    alone = bytes_in(plan.memory, "device") - plan.checkpoint.snapshot.first_rank
    narrow = replace(CPU, num_cpus=1, host_memory_bytes=int((alone + plan.checkpoint.snapshot.first_rank / 2) / 0.9))
    waiting = planned(narrow, cluster={"workers": 1})
    assert waiting.checkpoint.snapshot is None
    assert any("beside the" in reason and "of training" in reason for reason in waiting.reasons)


def test_what_is_asked_for_and_cannot_be_is_refused_with_figures() -> None:
    with pytest.raises(PlanError, match=r"in_background is true, but a copy .* 7\.2 GiB .*Set checkpoint\.in_background to auto"):
        planned(gpus(8, host_gib=64), LLAMA_3_8B, **FULL, checkpoint={"in_background": True})
    nvme = {"precision": "bf16", "zero": {"stage": 3, "offload_optimizer": "nvme", "nvme_path": "/disk"}}
    waiting = planned(gpus(8), LLAMA_3_8B, adapter={"method": "full"}, training=nvme)
    assert waiting.checkpoint.snapshot is None
    assert any("training.zero.offload_optimizer: nvme" in reason for reason in waiting.reasons)
    with pytest.raises(PlanError, match="files of its own"):
        planned(gpus(8), LLAMA_3_8B, adapter={"method": "full"}, training=nvme, checkpoint={"in_background": True})


def test_who_wants_to_wait_does_and_it_is_the_same_run() -> None:
    auto = planned()
    waiting, copied = (planned(checkpoint={"in_background": wanted}) for wanted in (False, True))
    assert waiting.checkpoint.snapshot is None
    assert copied == auto
    assert not any("in_background" in reason for plan in (waiting, copied) for reason in plan.reasons)
    assert identity_of(waiting) == identity_of(copied)
    assert without_copy(waiting) == without_copy(copied)


def test_unknown_memory_is_taken_to_be_enough() -> None:
    machine = replace(gpus(8), host_memory_bytes=0)
    assert planned(machine, LLAMA_3_8B, **FULL, cluster={"workers": 8}).checkpoint.snapshot is not None


def test_phases_have_the_copy_of_the_largest() -> None:
    phases = [{"last_layers": 0}, {"last_layers": "all", "from_step": 20}]
    plan = planned(strategy={"unfreeze": phases}, adapter={"method": "full"}, training={"max_steps": 40})
    assert plan.checkpoint.snapshot is not None
    sizes = [part.num_bytes for needs in plan.phase_needs for part in needs.memory if part.name == COPY]
    assert sizes == 2 * [plan.checkpoint.snapshot.first_rank]
    assert sizes[0] >= max(needs.checkpoint_bytes for needs in plan.phase_needs)
