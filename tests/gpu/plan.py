"""Planned memory against the allocator's peak: methods x ZeRO stages x gradient checkpointing, a JSON line for each way.

    python -m tests.gpu.plan --size 1b --output
    python -m tests.gpu.plan --size small --tokens 256 --document 64 --device cpu      # where there is no GPU

Each way trains a few steps of a random model by the plan that `raytune train` would make. It fails if a plan is off by more than
TOLERANCES. Without a GPU it prints why it skips, and succeeds.
"""

import argparse
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from raytune.errors import UserError
from raytune.plan.costs.memory import fullest_moment, tensor_bytes
from raytune.training.engines.engine import Engine
from raytune.training.steps.loop import StepResult
from tests.bench.measure import report
from tests.gpu.material import Material, add_options, free_memory, make_plan, material_for, name_of, skips, start
from tests.peak import held_bytes, peak_bytes

BENCH = "gpu_plan"
TOLERANCES = {"weights": 0.02, "optimizer": 0.02, "peak": 0.05}
WARMUP = 2
"""Steps before those that are measured: the first makes optimizer state."""
MEASURED = 2
"""Steps of which the lower peak counts: on a busy machine a thread of gloo may let go of what it has sent a moment late."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, BENCH)
    parser.add_argument("--stages", nargs="+", type=int, choices=(0, 1, 2, 3), default=(0, 2, 3))
    options = parser.parse_args(arguments)
    if skips(BENCH, options.device):
        return
    with material_for(options) as material:
        # Stage 3 replaces torch's linear function for the rest of a process.
        ways = product(sorted(options.stages), options.methods, (False, True))
        lines = [line for way in ways for line in measure(material, *way, options)]
    wrong = [line for line in lines if not line["is_within"]]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(lines)} plans are off.")


def measure(
    material: Material, stage: int, method: str, has_checkpointing: bool, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Train for some steps in one way and report; nothing if the plan refuses it."""
    device = material.device
    training = {"zero": {"stage": stage}, "gradient_checkpointing": has_checkpointing}
    way = {"size": options.size, "method": method, "stage": stage, "gradient_checkpointing": has_checkpointing}
    try:
        plan = make_plan(
            material, method, tokens=options.tokens, steps=WARMUP + MEASURED, training=training, settings=options.set
        )
    except UserError as error:
        report(BENCH, {**way, "device": name_of(device), "refused": str(error)}, options.output)
        return
    free_memory(device)
    gc.freeze()  # libraries, through which every collection would go, and what is held twice below: before and at the peak
    others = held_bytes(device)
    engine, steps = start(plan, material)
    for _ in range(WARMUP):
        _take(steps, engine)
    held = engine.held_bytes()
    peak = min(peak_bytes(device, partial(_take, steps, engine)) for _ in range(MEASURED)) - others
    engine.release()
    del engine, steps
    parts = {part.name: part.num_bytes for part in plan.memory}
    ratios = {
        "weights": parts["weights"] / held.weights,
        "optimizer": parts["optimizer"] / held.optimizer,
        "peak": tensor_bytes(plan.memory) / peak,
    }
    figures = {
        **way,
        "device": name_of(device),
        "planned_over_measured": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "is_within": is_within(ratios),
        "planned_bytes": parts,
        "measured_bytes": {"weights": held.weights, "optimizer": held.optimizer, "peak": peak},
        "tokens": options.tokens,
        "attention": plan.model.attention,
        "chunk_tokens": plan.loss.chunk_tokens,
        "fullest_moment": fullest_moment(plan.memory, "device"),
    }
    report(BENCH, figures, options.output)
    yield figures


def _take(steps: Iterator[StepResult], engine: Engine) -> None:
    next(steps).read(engine)


def is_within(planned_over_measured: Mapping[str, float]) -> bool:
    """Whether each ratio is near 1."""
    return all(abs(ratio - 1) <= TOLERANCES[name] for name, ratio in planned_over_measured.items())


if __name__ == "__main__":
    main()
