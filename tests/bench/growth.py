"""How cost grows with size: rows' length and number, trials, workers, vocabulary, steps. Says what grows faster than it should.

    python -m tests.bench.growth --output
    python -m tests.bench.growth --axes rows trials --largest --limit 900

Each point is measured in a process of its own, in CPU seconds and bytes. Between two neighbours a figure grows with a power of
the size: log(figure ratio) / log(size ratio). An axis states the power that is due; a larger one is reported. `--largest` adds
the most expensive points of each axis.
"""

import argparse
import functools
import json
import math
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from raytune.config.sections.data import DataSource
from raytune.data.batches.batches import step_batches
from raytune.data.store.build import build_store
from raytune.data.store.request import StoreRequest
from raytune.data.store.store import Store
from raytune.metrics.follower import Follower
from raytune.metrics.writer import MetricsWriter
from raytune.plan.costs.loss_chunks import smallest_chunk
from raytune.training.losses.losses import attach_loss
from raytune.training.start.start import start_engine
from raytune.training.steps.loop import training_steps
from tests.bench.loss import HeadOnly, make_batch, peak_bytes
from tests.bench.measure import Exceeded, in_own_process, report
from tests.bench.rows import made_rows
from tests.bench.sweep import SWEEP, measure, running_cluster
from tests.tiny import save_tiny_model, store_plan, tiny_plan, tiny_request

SLACK = 0.15
"""Of a power: what noise makes of a figure that is measured once."""
CHEAP_S = 10.0
LEAST_CPU_S = 0.02
"""Below it a figure is made of start and noise, and has no power."""

Figures = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Axis:
    sizes: Sequence[int]
    largest: Sequence[int]
    """Sizes that take minutes."""
    unit: str
    powers: Mapping[str, float]
    """Of each figure that is held to one: the largest power that it should grow with."""
    why: str
    held_from: Mapping[str, int] = field(default_factory=dict)
    """Size from which a figure is held to its power; below it fills what is bounded."""
    measure: Callable[[int, Path], Figures]
    forks: bool = True
    """Whether a point is measured in a process forked from this one; those that start processes measure themselves."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=[*AXES])
    parser.add_argument("--sizes", nargs="+", type=int, help="in place of an axis' own")
    parser.add_argument("--largest", action="store_true", help="the most expensive sizes too")
    parser.add_argument("--limit", type=float, default=120.0, help="CPU seconds of a point, after which its axis ends")
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines/growth.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="rt", dir="/tmp") as folder:  # a short name: Ray's sockets lie below it
        for name in options.axes:
            follow(name, Path(folder), options)


def follow(name: str, folder: Path, options: argparse.Namespace) -> None:
    axis = AXES[name]
    points: dict[int, Figures] = {}
    exceeded = None
    for size in options.sizes or [*axis.sizes, *(axis.largest if options.largest else ())]:
        own = folder / f"{name}-{size}"
        own.mkdir()
        outcome = least_of(axis, size, own, options.limit)
        if isinstance(outcome, Exceeded):
            exceeded = f"{size} {axis.unit} took more than {options.limit:g} CPU seconds"
            break
        points[size] = outcome
        report("growth", {"axis": name, "size": size, "unit": axis.unit, **points[size]}, options.output)
    powers = {
        figure: powers_of({size: own for size, own in points.items() if size >= axis.held_from.get(figure, 0)}, figure)
        for figure in axis.powers
    }
    too_fast = {
        figure: between
        for figure, allowed in axis.powers.items()
        if (between := {where: power for where, power in powers[figure].items() if power > allowed + SLACK})
    }
    verdict = {"axis": name, "powers": powers, "allowed": axis.powers, "why": axis.why, "grows_too_fast": too_fast}
    report("growth", verdict | ({"exceeded": exceeded} if exceeded else {}), options.output)


def least_of(axis: Axis, size: int, folder: Path, limit_s: float) -> Figures | Exceeded:
    """The least of each figure, of up to three times as long as they are cheap."""
    figures: dict[str, float] = {}
    started = time.monotonic()
    for number in range(3):
        own = folder / str(number)
        own.mkdir()
        work = functools.partial(axis.measure, size, own)
        if axis.forks:
            outcome = in_own_process(lambda work=work: work, limit_s)
            if isinstance(outcome, Exceeded):
                return outcome
            found = outcome.value
        else:
            found = work()
        figures = {name: min(value, figures.get(name, value)) for name, value in found.items()}
        if time.monotonic() - started > CHEAP_S:
            break
    return figures


def powers_of(points: Mapping[int, Figures], figure: str) -> dict[str, float]:
    powers = {}
    for (size, figures), (next_size, next_figures) in zip([*points.items()], [*points.items()][1:]):
        least = LEAST_CPU_S if figure.startswith("cpu_s") else 0.0
        if figures[figure] > least and next_figures[figure] > 0:
            power = math.log(next_figures[figure] / figures[figure]) / math.log(next_size / size)
            powers[f"{size} to {next_size}"] = round(power, 2)
    return powers


# --- length of a row


def of_length(length: int, folder: Path) -> Figures:
    """An update with rows of one document each, 8,192 tokens in all or one row."""
    letters = random.Random(0)
    num_rows = max(1, 8192 // length)
    file = folder / "rows.jsonl"
    texts = ["".join(letters.choices("abcdefghij", k=length - 1)) for _ in range(num_rows)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 65536}
    request = request_for(file, "text", length, template="", targets="all")
    info = build_store(request, tokenizer_path=str(model := save_tiny_model(folder / "model", **shape)), folder=str(folder / "s"))
    plan = tiny_plan(
        model={"path": str(model)},
        data={"train": store_plan(info), "row_length": length},
        batch={"micro_batch_size": 1, "accumulation": num_rows},
        optimization={"num_steps": 1, "num_rows": num_rows},
        loss={"chunk_tokens": 1024},
    )
    cpu_s, peak_mib = trained(plan, 0, 1)
    return {
        "cpu_s_per_row": cpu_s / num_rows,
        "peak_mib": round(peak_mib, 1),
    }


def request_for(file: Path, form: str, length: int, **changes: Any) -> StoreRequest:
    source = DataSource(path=str(file), format=form)  # pyright: ignore[reportArgumentType]
    return replace(tiny_request(max_length=length, too_long="error", **changes), sources=(source,))


def trained(plan: Any, rank: int, world: int, steps: int = 1) -> tuple[float, float]:
    """CPU seconds of this rank's updates, and MiB that it grew by."""
    engine, loss_sum = start_engine(plan, torch.device("cpu"), rank, world)
    store = Store.open(plan.data.train.path)
    before, started = peak_mib(), time.process_time()
    made = training_steps(
        engine,
        lambda step: step_batches(
            store,
            step=step,
            rank=rank,
            world=world,
            micro_batch_size=plan.batch.micro_batch_size,
            accumulation=plan.batch.accumulation,
            num_rows_in_run=10**9,
            seed=0,
        ),
        loss_sum,
        lambda step: 1e-3,
        start=0,
        stop=steps,
        seed=0,
    )
    for result in made:
        result.read(engine)
    return time.process_time() - started, peak_mib() - before


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- number of rows


def of_rows(num_rows: int, folder: Path) -> Figures:
    """Tokenising and packing a file of short rows, and finding the rows of updates all over it."""
    texts = made_rows(1000, seed=0)
    file = folder / "rows.jsonl"
    with file.open("w") as output:
        for number in range(num_rows):
            row = texts[number % len(texts)]
            turns = {"prompt": f"{number} {row['question'][:16]}", "completion": row["answer"][:40]}
            output.write(json.dumps(turns) + "\n")
    request = request_for(file, "prompt_completion", 512, targets="completion")
    model = save_tiny_model(folder / "model")
    before, started = peak_mib(), time.process_time()
    info = build_store(request, tokenizer_path=str(model), folder=str(folder / "stores"))
    prepared, peak = time.process_time() - started, peak_mib() - before
    store = Store.open(info.path)
    started, steps = time.process_time(), 50
    for step in range(steps):
        at = step * max(1, info.num_rows // 8 // steps)
        step_batches(store, step=at, rank=0, world=1, micro_batch_size=1, accumulation=8, num_rows_in_run=10**9, seed=0)
    return {
        "cpu_s_prepare": round(prepared, 3),
        "cpu_us_per_row": round(prepared / num_rows * 1e6, 1),
        "peak_mib": round(peak, 1),
        "cpu_s_per_update": (time.process_time() - started) / steps,
        "packed_rows": info.num_rows,
    }


# --- trials


def of_trials(num_trials: int, folder: Path) -> Figures:
    """A sweep of so many trials of three or four updates (ASHA), on a cluster of its own."""
    options = argparse.Namespace(trials=num_trials, steps=4, limit=1800.0)
    with running_cluster(folder / "ray", dashboard=True) as (address, pids):
        figures = measure(SWEEP, folder, "sweep", address, pids, options)
    ledger = folder / "sweep" / "ledger.jsonl"
    return {
        "cpu_s": figures["cpu_s"],
        "cpu_s_per_trial": round(figures["cpu_s"] / num_trials, 2),
        "wall_s": figures["makespan_s"],
        "ledger_bytes": ledger.stat().st_size,
    }


# --- workers


def of_workers(num_workers: int, folder: Path) -> Figures:
    """Updates of the same global batch, divided among ranks on gloo."""
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384}
    model = save_tiny_model(folder / "model", **shape)
    info = build_store(tiny_request(max_rows=200), tokenizer_path=str(model), folder=str(folder / "stores"))
    plan = tiny_plan(
        model={"path": str(model)},
        data={"train": store_plan(info)},
        batch={"workers": num_workers, "micro_batch_size": 1, "accumulation": 8 // num_workers},
    )
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    ranks = torch.multiprocessing.start_processes(
        _rank, (num_workers, plan, str(folder / "rendezvous"), queue), num_workers, join=False, start_method="fork"
    )
    assert ranks is not None
    seconds = [queue.get() for _ in range(num_workers)]
    ranks.join()
    return {"cpu_s": round(sum(seconds), 3), "cpu_s_of_a_rank": round(sum(seconds) / num_workers, 3)}


def _rank(rank: int, num_workers: int, plan: Any, rendezvous: str, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_workers)
    try:
        queue.put(trained(plan, rank, num_workers, steps=4)[0])
    finally:
        dist.destroy_process_group()


# --- vocabulary


def of_vocabulary(vocabulary: int, folder: Path) -> Figures:
    """Forward and backward pass of head and loss, 1,024 targets, in chunks."""
    width, num_targets = 128, 1024
    model = HeadOnly(width, vocabulary)
    batch = make_batch(num_targets, num_targets, vocabulary)
    hidden = torch.randn(1, num_targets, width, requires_grad=True)
    layer = attach_loss(model, smallest_chunk(vocabulary))

    def loss() -> Tensor:
        return layer.loss_sum(model, batch, {"hidden": hidden})

    peak, _, _ = peak_bytes(model, hidden, loss)
    model.zero_grad(set_to_none=True)
    started = time.process_time()
    (loss() / num_targets).backward()
    return {"cpu_s": round(time.process_time() - started, 3), "peak_mib": round(peak / 2**20, 1)}


# --- steps


def of_steps(num_steps: int, folder: Path) -> Figures:
    """A look at a metrics file that has so many steps, after 10 more were written."""
    path = folder / "metrics.jsonl"
    writer, follower = MetricsWriter(path, attempt=1, resumed_step=0), Follower(path)

    def write(first: int, count: int) -> None:
        for step in range(first, first + count):
            writer.write(step, {"train/loss": 1 / step, "train/learning_rate": 1e-3, "train/grad_norm": 1.0})
        writer.flush()

    write(1, num_steps)
    started = time.process_time()
    follower.look()
    whole = time.process_time() - started
    seconds = []
    for look in range(1000):
        write(num_steps + 1 + 10 * look, 10)
        started = time.perf_counter()  # a CPU's clock may tick every 10 ms only; the median is not touched by who interrupts
        assert len(follower.look()) == 10
        seconds.append(time.perf_counter() - started)
    return {
        "us_per_look": round(statistics.median(seconds) * 1e6, 1),
        "cpu_s_first_look": round(whole, 4),
        "bytes": path.stat().st_size,
    }


AXES = {
    "length": Axis(
        sizes=(512, 1024, 2048, 4096, 8192),
        largest=(16384, 32768),
        unit="tokens of a row",
        powers={"cpu_s_per_row": 2, "peak_mib": 1},
        why="attention compares each token with those before it; all else, and memory, goes by tokens",
        measure=of_length,
    ),
    "rows": Axis(
        sizes=(1000, 10_000, 100_000),
        largest=(1_000_000,),
        unit="rows of a file",
        powers={"cpu_s_prepare": 1, "peak_mib": 0, "cpu_s_per_update": 0},
        why="each row is tokenised once; the rows of an update do not go by the file, nor does memory once a window is full",
        held_from={"peak_mib": 100_000},  # rows are packed 65,536 at a time
        measure=of_rows,
    ),
    "trials": Axis(
        sizes=(4, 16),
        largest=(64,),
        unit="trials of three or four updates",
        powers={"cpu_s": 1, "ledger_bytes": 1},
        why="a trial costs what the one before it did",
        measure=of_trials,
        forks=False,
    ),
    "workers": Axis(
        sizes=(1, 2, 4, 8),
        largest=(),
        unit="workers on gloo",
        powers={"cpu_s": 0.1},
        why="the same batch, in smaller products; each rank sums and applies the whole gradient",
        measure=of_workers,
        forks=False,
    ),
    "vocabulary": Axis(
        sizes=(32_768, 65_536, 131_072, 262_144),
        largest=(),
        unit="tokens of the vocabulary",
        powers={"cpu_s": 1, "peak_mib": 1},
        why="a column of the head's product for each; logits of a chunk have the same bytes",
        measure=of_vocabulary,
    ),
    "steps": Axis(
        sizes=(1000, 10_000, 100_000),
        largest=(1_000_000,),
        unit="steps in metrics.jsonl",
        powers={"us_per_look": 0, "cpu_s_first_look": 1},
        why="a look reads what is new",
        measure=of_steps,
    ),
}


if __name__ == "__main__":
    main()
