"""Ranks wait for each other where a step computes, and beside that at log steps only, whatever may be asked of a run."""

import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from raytune.data.templates.text import resolve_template
from raytune.plan.run_plan import RunPlan
from raytune.storage import list_folder
from raytune.training.run import Worker, train
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import LORA, Material, make_plan
from tests.tiny import tiny_tokenizer

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "gather", "gather_object", "broadcast", "barrier")
OF_THE_STEP = ("_send", "backward", "step")
"""Functions of our engines that are the step's own arithmetic; the loop and the policy of a run have none."""


def ours_after_each_step(plan: RunPlan) -> list[dict[str, int]]:
    """For each step, the collectives that our code asked for since the step before, by the function that did."""
    counted: Counter[str] = Counter()
    by_step: list[dict[str, int]] = []

    def watched(call: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            asks = frame.f_globals.get("__name__", "").startswith("raytune.")
            while frame.f_back and frame.f_code.co_name in ("gather", "gather_objects", "all_reduce_sum", "<lambda>"):
                frame = frame.f_back
            # A thread of a save talks to its peers beside the training, in a group of its own.
            if asks and threading.current_thread() is threading.main_thread() and frame.f_code.co_name not in OF_THE_STEP:
                counted[frame.f_code.co_name] += 1
            return call(*args, **kwargs)

        return counting

    def after_step() -> None:
        by_step.append(dict(counted))
        counted.clear()

    originals = {name: getattr(dist, name) for name in COLLECTIVES}
    rank, world = dist.get_rank(), dist.get_world_size()
    worker = Worker(rank=rank, world_size=world, device_index=0, attempt=1, report=lambda values: None, check=after_step)
    try:
        for name, call in originals.items():
            setattr(dist, name, watched(call))
        train(plan, worker)
    finally:
        for name, call in originals.items():
            setattr(dist, name, call)
    return by_step


@pytest.mark.parametrize("stage", [0, 2])
def test_no_collective_of_ours_runs_on_a_step_that_is_not_logged(stage: int, material: Material, tmp_path: Path) -> None:
    """`checkpoint.every` asks after every step whether its time has come, and is answered at log steps."""
    plan = make_plan(
        material,
        workers=2,
        stage=stage,
        adapter=LORA,
        storage=str(tmp_path),
        name="watched",
        template=resolve_template("auto", tiny_tokenizer()),
        logging_steps=3,
        optimization={"num_steps": 9, "num_rows": 10**6},
        checkpoint={
            "every_steps": 10**6,
            "every_s": 1e-3,
            "keep_last": 100,
            "keep_best": 1,
            "metric": "train/loss",
            "mode": "min",
        },
        evaluation={"every_steps": 10**6, "at_saves": False, "at_start": False, "max_rows": None, "generation": None},
    )
    for by_step in run_on_ranks(ours_after_each_step, 2, plan):
        assert isinstance(by_step, list), by_step
        assert len(by_step) == 9
        # What follows step 1 is counted when step 2 has been made; what precedes step 1 is the start of the run.
        after = {step: by_step[step] for step in range(1, 9)}
        assert [step for step, counts in after.items() if counts] == [3, 6]
        for step in (3, 6):
            assert after[step]["agreed"] == 1, "all requests share one"
            assert after[step]["read"] == 1, "the loss of a logged step"
    saved = [name for name in list_folder(f"{tmp_path}/watched/checkpoints") if name.startswith("step-")]
    assert saved == ["step-00000003", "step-00000006", "step-00000009"], "the clock's request was heard"
