"""LoRA in bf16 with PEFT's casts of what its updates read, and without: CPU seconds of steps, casts and their bytes.

    python -m tests.bench.input_casts --output

A random Llama of 4 layers, width 512 and a vocabulary of 8k, all linear layers updated, by the engine and the loop of a run. Both
make the same steps, in turn; their losses are equal to the last bit, or it fails.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch

from tests.bench.measure import interleaved, ratios, report
from tests.gpu.material import Material, make_plan, material_for, start
from tests.numerics.test_input_casts import Casts, cast_as_peft_does

PEFT, OURS = "with PEFT's casts", "raytune"


class Way:
    """Steps of a run in one of the two ways."""

    def __init__(self, method: str, material: Material, options: argparse.Namespace, as_peft: bool) -> None:
        settings = ["adapter.target_modules=all-linear"]
        plan = make_plan(material, method, tokens=options.tokens, steps=options.rounds + 2, training={}, settings=settings)
        self.engine, self._steps = start(plan, material)
        if as_peft:
            cast_as_peft_does(self.engine.model)
        self.losses: list[float] = []

    def step(self) -> None:
        self.losses.append(next(self._steps).read(self.engine).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines/input_casts.jsonl")
    options = parser.parse_args()
    place = argparse.Namespace(size="medium", device="cpu", folder=None, tokens=options.tokens, document=256)
    with material_for(place) as material:
        torch.set_num_threads(1)
        for method in ("lora", "qlora"):
            report("input_casts", measure(method, material, options), options.output)


def measure(method: str, material: Material, options: argparse.Namespace) -> dict[str, Any]:
    ways = {PEFT: Way(method, material, options, as_peft=True), OURS: Way(method, material, options, as_peft=False)}
    counted = {}
    for name, way in ways.items():
        way.step()  # makes optimizer state
        with Casts() as counted[name]:
            way.step()

    def ready(way: Way) -> Callable[[], Callable[[], object]]:
        return lambda: way.step

    seconds = interleaved({name: ready(way) for name, way in ways.items()}, options.rounds)
    assert ways[OURS].losses == ways[PEFT].losses
    return {
        "method": method,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "cpu_s": {name: [round(time, 3) for time in times] for name, times in seconds.items()},
        "cpu_s_against_peft": ratios(seconds[OURS], seconds[PEFT]),
        "casts": {name: one.num_casts for name, one in counted.items()},
        "cast_mb": {name: round(one.num_bytes / 1e6, 1) for name, one in counted.items()},
        "last_loss": ways[OURS].losses[-1],
    }


if __name__ == "__main__":
    main()
