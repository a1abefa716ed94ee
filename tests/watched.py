"""A storage folder as commands that are at work leave it: runs and a sweep, written by the package's own writers."""

import dataclasses
from pathlib import Path
from typing import Any

from raytune.config.load import config_from
from raytune.launch.attempts.lease import Holder, Lease, this_process
from raytune.launch.state.record import RunRecord, State, write_plan
from raytune.metrics.events import EventLog
from raytune.metrics.writer import MetricsWriter
from raytune.plan.run_plan import CostPlan, MemoryPart
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import write_bytes
from raytune.sweeps.ledger import Ended, Ledger
from raytune.sweeps.trial import Trial
from tests.tiny import tiny_plan

STARTED_S = 1_000_000.0
STEP_S = 2.0
PLANNED_BYTES = 3 * 2**30
ELSEWHERE = Holder(host="other", system="another system", pid=7, born=1, job=None, since="2026-11-25 12:00:00")
GONE = dataclasses.replace(this_process(), pid=2**22 + 1, born=1)
"""A process of this machine that has ended."""
COST = CostPlan(
    instance="g6e.12xlarge",
    num_nodes=1,
    is_spot=False,
    hours=2.0,
    usd=20.0,
    spot_usd=None,
    save_s=1.0,
    between_interruptions_s=1e5,
    save_every_s=100.0,
    lost_s_per_interruption=1.0,
    lost_usd_per_interruption=0.1,
    price_date="2026-11",
)


def write_run(
    storage: str,
    name: str,
    *,
    state: State = "running",
    steps: int = 5,
    num_steps: int = 8,
    holder: Holder | None = None,
    failure: str | None = None,
    config: dict[str, Any] | None = None,
    **plan: Any,
) -> RunFolder:
    """A run after so many steps, of which every second one was evaluated and saved.

    Args:
        holder: of its claim; None: nobody holds it.
        plan: fields of its plan.
    """
    folder = RunFolder(storage, name)
    fields = {"memory": [MemoryPart(name="weights", num_bytes=PLANNED_BYTES)]} | plan
    write_plan(folder, tiny_plan(name=name, storage=storage, optimization={"num_steps": num_steps}, **fields))
    asked = config_from({"name": name} | (config or {})).model_dump(mode="json")  # memory:// stands for a bucket in tests alone
    RunRecord(
        name=name, state=state, attempts=1, created=STARTED_S, config=asked, versions={"raytune": "0"}, failure=failure
    ).write(folder)
    if holder:
        claim_as(folder, holder)
    write_steps(folder, 1, steps)
    return folder


def claim_as(folder: RunFolder, holder: Holder, beat: int = 0) -> None:
    write_bytes(f"{folder.leases}/1.json", Lease(number=1, token="t", holder=holder, beat=beat).encode())


def write_steps(folder: RunFolder, first: int, last: int, attempt: int = 1) -> None:
    """What an attempt writes of these steps."""
    now = [STARTED_S + STEP_S * (first - 1)]
    with EventLog(folder.events, attempt=attempt, clock=lambda: now[0]) as events:
        if first == 1:
            events.write("training_started", step=0)
        if last < first:
            return
        with MetricsWriter(folder.metrics, attempt=attempt, resumed_step=first - 1, clock=lambda: now[0]) as writer:
            for step in range(first, last + 1):
                now[0] = STARTED_S + STEP_S * step
                writer.write(step, {"train/loss": 1.0 / step, "train/tokens_per_s": 1500.0, "train/memory_bytes": 2.0**30})
                if step % 2 == 0:
                    writer.write(step, {"validation/loss": 2.0 / step})
                    events.write("checkpoint_saved", step=step, num_bytes=1, path="x")


def write_sweep(storage: str, name: str = "search", *, holder: Holder | None = None) -> SweepFolder:
    """A sweep of three trials, of which one has ended, one is at work and one waits."""
    folder = SweepFolder(storage, name)
    config = {
        "name": name,
        "data": {"validation": "demo:validation"},
        "sweep": {"space": {"adapter.rank": [4, 8, 16, 32]}, "trials": 4},
    }
    write_bytes(folder.sweep, config_from(config).model_dump_json().encode())
    if holder:
        claim_as(RunFolder(storage, name), holder)
    ledger = Ledger(folder.ledger, {"unit": "steps", "rungs": []})
    for number, rank in enumerate((4, 8, 16)):
        ledger.assign(Trial(number=number, values={"adapter.rank": rank}))
    write_run(folder.trials, "trial-000", state="finished", steps=8)
    ledger.end("trial-000", Ended(state="finished"))
    write_run(folder.trials, "trial-001", holder=holder, steps=4)
    ledger.close()
    return folder


def url(kind: str, tmp_path: Path) -> str:
    """A storage of this kind: local, or memory."""
    return str(tmp_path) if kind == "local" else f"memory://{tmp_path.name}"
