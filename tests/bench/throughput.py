"""Useful tokens per CPU second: raytune's loop against transformers.Trainer and TRL, each in all the ways that it can be used.

    python -m tests.bench.throughput --output
    python -m tests.bench.throughput --shapes small --methods full lora qlora --precisions fp32 bf16 --rows short long

A cell is a model, a method, a precision and a length of rows. In a cell all train the same model from the same weights, and each
update takes all documents once; so their losses have to be equal, or it fails. Measured is training alone, after tokenising and
loading, in a process each. The best rival counts. Without GSM8K (`--data`) rows are made that are as long; without trl (`pip
install raytune[bench]`) its ways are left out.
"""

import argparse
import json
import math
import os
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import torch

from tests.bench.measure import Series, ratios, report, rounds_apart
from tests.bench.rivals import DENSE, OURS, rivals_of
from tests.bench.rows import GSM8K
from tests.bench.trained_alike import SHAPES, Cell, Material, described, make_material

EXPECTED = 1.3
"""How many times the CPU seconds of ours the best rival should need."""
HOPELESS = 1.5
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-3}
"""Of a loss between two who have made the same updates, relative: sums in another order, and 16 bits rounded at other places."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=GSM8K, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["head as in 8B"])
    parser.add_argument("--methods", nargs="+", choices=("full", "lora", "qlora"), default=["full", "lora"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--rows", nargs="+", choices=("short", "long"), default=["short"])
    parser.add_argument("--only", nargs="+", help="rivals whose names contain one of these, beside raytune")
    parser.add_argument("--llama-factory", metavar="PYTHON", help="an interpreter that has llamafactory 0.9.5 installed")
    parser.add_argument("--documents", type=int, default=16, help="rows of GSM8K; of long rows, which are 12 together, an eighth")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="CPU seconds after which a rival is ended")
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines/throughput.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lost = []
    with TemporaryDirectory() as folder:
        for number, choice in enumerate(product(options.shapes, options.methods, options.precisions, options.rows)):
            cell = Cell(**dict(zip(("shape", "method", "precision", "rows"), choice)))
            figures = compare(make_material(Path(folder) / str(number), cell, options), options)
            report("throughput", figures, options.output)
            lost += [str(cell)] if figures["verdict"] == "missed" else []
    if lost:
        print(json.dumps({"below the goal": lost}))


def compare(material: Material, options: argparse.Namespace) -> dict[str, Any]:
    rivals = {
        name: rival
        for name, rival in rivals_of(material, options.llama_factory).items()
        if name == OURS or not options.only or any(part in name for part in options.only)
    }
    found = rounds_apart(rivals, options.rounds, limit_s=options.limit, hopeless=HOPELESS, always={OURS})
    ours = found[OURS]
    if ours.ended:
        raise RuntimeError(f"{OURS} {ours.ended}")
    differences = {name: difference(series, ours) for name, series in found.items() if series.cpu_s}
    unequal = {name: worst for name, worst in differences.items() if worst > TOLERANCES[material.cell.precision]}
    if unequal:
        values = {name: found[name].value for name in (OURS, *unequal)}
        raise AssertionError(f"{material.cell}: other losses than ours, so not the same training: {values}")
    whole = {name: series for name, series in found.items() if not series.ended and name != OURS}
    others = [name for name in whole if name != DENSE]
    best = min(others, key=lambda name: min(whole[name].cpu_s)) if others else None
    useful = material.plan.data.train.num_targets * material.num_updates
    figures: dict[str, Any] = {"cell": str(material.cell), "best_rival": best}
    if best:
        figures["ours_is_faster"] = ratios(whole[best].cpu_s, ours.cpu_s)
        if whole[best].peak_mib:
            figures["peak_of_ours_against_it"] = round(ours.peak_mib / whole[best].peak_mib, 2)
    figures |= {
        "expected": EXPECTED,
        "verdict": verdict_of(figures, options.only),
        "useful_tokens_per_cpu_s": round(useful / min(ours.cpu_s)),
        "rivals": {name: of_rival(series, ours) for name, series in found.items()},
        "losses": ours.value[0],
        "held_out_loss": ours.value[1],
        "largest_relative_difference_of_losses": max(differences.values()),
        "rounds": options.rounds,
        "asked_for": options.only or "all",
    }
    return figures | described(material)


def verdict_of(figures: dict[str, Any], only: list[str] | None) -> str:
    """Whether the goal is met; the best of some rivals says less than the best of all."""
    if min(figures.get("ours_is_faster", {"no rival": 0.0}).values()) < EXPECTED:
        return "missed"
    return "met against those asked for alone" if only else "met"


def of_rival(series: Series, ours: Series) -> dict[str, Any]:
    figures: dict[str, Any] = {"cpu_s": [round(seconds, 2) for seconds in series.cpu_s]}
    if series.cpu_s:
        figures["against_ours"] = round(min(series.cpu_s) / min(ours.cpu_s), 3)
        figures["peak_mib"] = round(series.peak_mib)
    return figures | ({"ended": series.ended} if series.ended else {})


def difference(series: Series, ours: Series) -> float:
    """Largest between losses of updates and on held-out rows, relative."""
    (losses, held_out), (of_ours, held_out_of_ours) = series.value, ours.value
    pairs = list(zip(losses, of_ours, strict=True))
    if held_out is None:
        pairs = pairs[:1]  # a program of its own, whose adapter starts elsewhere
    else:
        pairs.append((held_out, held_out_of_ours))
    worst = max(abs(one - other) / abs(other) for one, other in pairs)
    return worst if math.isfinite(worst) else math.inf


if __name__ == "__main__":
    main()
