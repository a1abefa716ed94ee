"""Planned memory against the allocator's peak: methods x ZeRO stages x gradient checkpointing, a JSON line for each way.

    python -m tests.gpu.plan --size 1b --output
    python -m tests.gpu.plan --size tiny --device cpu      # the same code where there is no GPU

Each way trains a few steps of a random model by the plan that `raytune train` would make. It fails if a plan is off by more than
TOLERANCES. On a CPU the peak of a process says nothing of one way among several, so only weights and optimizer state count.
Without a GPU it prints why it skips, and succeeds.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from raytune.errors import UserError
from raytune.plan.memory import allocated_bytes
from raytune.training.recorder import peak_memory_bytes
from tests.bench.measure import report
from tests.gpu.material import Material, add_options, free_memory, make_plan, material_for, name_of, skips, start

BENCH = "gpu_plan"
TOLERANCES = {"weights": 0.02, "optimizer": 0.02, "peak": 0.05}
STEPS = 4
"""The first makes optimizer state, the second is the first that has all of it from its beginning."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, BENCH)
    parser.add_argument("--stages", nargs="+", type=int, choices=(0, 1, 2, 3), default=(0, 2, 3))
    options = parser.parse_args(arguments)
    if skips(BENCH, options.device):
        return
    with material_for(options) as material:
        ways = product(options.methods, options.stages, (False, True))
        lines = [line for way in ways for line in measure(material, *way, options)]
    wrong = [line for line in lines if not line["is_within"]]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(lines)} plans are off.")


def measure(
    material: Material, method: str, stage: int, has_checkpointing: bool, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Train for some steps in one way and report; nothing if the plan refuses it."""
    device = material.device
    training = {"zero": {"stage": stage}, "gradient_checkpointing": has_checkpointing}
    way = {"size": options.size, "method": method, "stage": stage, "gradient_checkpointing": has_checkpointing}
    try:
        plan = make_plan(material, method, tokens=options.tokens, steps=STEPS, training=training, settings=options.set)
    except UserError as error:
        report(BENCH, {**way, "device": name_of(device), "refused": str(error)}, options.output)
        return
    free_memory(device)
    engine, steps = start(plan, material)
    for step in steps:
        step.read(engine)
    held, peak = engine.held_bytes(), peak_memory_bytes(device)
    engine.release()
    del engine, steps
    parts = {part.name: part.num_bytes for part in plan.memory}
    ratios = {
        "weights": parts["weights"] / held.weights,
        "optimizer": parts["optimizer"] / held.optimizer,
        "peak": allocated_bytes(plan.memory) / peak if device.type == "cuda" else None,
    }
    figures = {
        **way,
        "device": name_of(device),
        "planned_over_measured": {name: ratio and round(ratio, 4) for name, ratio in ratios.items()},
        "is_within": is_within(ratios),
        "planned_bytes": parts,
        "measured_bytes": {"weights": held.weights, "optimizer": held.optimizer, "peak": peak},
        "tokens": options.tokens,
        "attention": plan.model.attention,
        "chunk_tokens": plan.loss.chunk_tokens,
    }
    report(BENCH, figures, options.output)
    yield figures


def is_within(planned_over_measured: Mapping[str, float | None]) -> bool:
    """Whether each ratio that could be measured is near 1."""
    return all(ratio is None or abs(ratio - 1) <= TOLERANCES[name] for name, ratio in planned_over_measured.items())


if __name__ == "__main__":
    main()
