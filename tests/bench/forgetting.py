"""What each strategy forgets of what the base knew, at the same score of the new task.

    python -m tests.bench.forgetting --output

The model that ships with raytune learns the quickstart's task (JSON). What it knew is the language that it was pre-trained on:
questions on such sentences, drawn anew. Both losses are measured on held-out rows as training goes on, and the general one counts
where the task's first falls to the target: what was forgotten on the way. An arm that never comes there says so.
"""

import argparse
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

from raytune.config.load import config_from
from raytune.data.files.demo import demo_rows
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.state.record import write_plan
from raytune.metrics.history import History
from raytune.metrics.points import Point
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.training.run import train
from raytune.training.start.start import Worker
from tests.bench.measure import report, tree_cpu_s

FULL = {"adapter": {"method": "full"}}
LORA = {"adapter": {"method": "lora"}, "training": {"learning_rate": 5e-3}}


def arms(general: str) -> dict[str, dict[str, Any]]:
    """Sections of each arm's config, by its name.

    Args:
        general: file with rows of what the base knows.
    """
    return {
        "full": FULL,
        "lora": LORA,
        **{f"l2_sp {one:g}": FULL | {"strategy": {"l2_sp": {"strength": one}}} for one in (0.03, 0.1)},
        **{f"ewc {one:g}": FULL | {"strategy": {"ewc": {"strength": one, "data": general}}} for one in (17.0, 50.0, 170.0)},
        **{f"replay {one:g}": FULL | {"strategy": {"replay": {"data": general, "share": one}}} for one in (0.1, 0.3)},
        **{f"lora, replay {one:g}": LORA | {"strategy": {"replay": {"data": general, "share": one}}} for one in (0.1,)},
        **{f"distillation {one:g}": FULL | {"strategy": {"distillation": {"weight": one}}} for one in (0.01, 0.03)},
        **{f"lora, distillation {one:g}": LORA | {"strategy": {"distillation": {"weight": one}}} for one in (0.01, 0.03)},
    }


GENERAL_ROWS = 4_000
HELD_OUT_ROWS = 200
GENERAL, TASK = "validation/general/loss", "validation/task/loss"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--target", type=float, default=0.02, help="loss of the new task at which arms are compared")
    parser.add_argument("--arms", nargs="*", default=[*arms("")], help=f"some of: {'; '.join(arms(''))}")
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines/forgetting.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        general, held_out = Path(folder) / "general.jsonl", Path(folder) / "held_out.jsonl"
        for path, num_rows, seed in ((general, GENERAL_ROWS, 11), (held_out, HELD_OUT_ROWS, 12)):
            path.write_text("".join(f"{json.dumps(row)}\n" for row in demo_rows("pretraining", num_rows, seed)))
        for number, name in enumerate(options.arms):
            settings = settings_of(arms(str(general))[name], options, held_out) | {"name": f"{number}", "storage": folder}
            report("forgetting", {"arm": name, "steps": options.steps} | figures(settings, options.target), options.output)


def settings_of(arm: dict[str, Any], options: argparse.Namespace, held_out: Path) -> dict[str, Any]:
    training = {
        "max_steps": options.steps,
        "global_batch_size": 4,
        "warmup_steps": 10,
        "logging_steps": 5,
        "learning_rate": 1.5e-3,
    }
    validation = [
        {"path": "demo:validation", "name": "task", "max_rows": HELD_OUT_ROWS},
        {"path": str(held_out), "name": "general"},
    ]
    return arm | {
        "model": {"base": "demo"},
        "data": {"train": "demo:train", "validation": validation, "max_length": 512},
        "training": training | {"lr_scheduler_type": "constant"} | arm.get("training", {}),
        "evaluation": {"every_steps": 5, "at_start": True},
        "checkpoint": {"every_steps": options.steps},
        "cluster": {"workers": 1, "threads_per_worker": 1},
    }


def figures(settings: dict[str, Any], target: float) -> dict[str, Any]:
    """The general loss before, where the task's loss first reaches the target, and at the end."""
    plan, evaluated, cpu_s = trained(settings)
    reached = next((point for point in evaluated if point.values[TASK] <= target), None)
    first, last = evaluated[0], evaluated[-1]
    return {
        "cpu_s": cpu_s,
        "learning_rate": plan.optimization.learning_rate,
        "general_before": round(first.values[GENERAL], 4),
        "steps_to_target": reached.step if reached else None,
        "general_at_target": round(reached.values[GENERAL], 4) if reached else None,
        "general_at_end": round(last.values[GENERAL], 4),
        "task_at_end": round(last.values[TASK], 4),
        "target": target,
    }


def trained(settings: dict[str, Any]) -> tuple[RunPlan, list[Point], float]:
    """A run in this process: its plan, what was evaluated, and the CPU seconds that training took."""
    config = config_from(settings)
    plan = prepare(config, this_machine(config.cluster), map).plan
    folder = RunFolder(plan.storage, plan.name)
    write_plan(folder, plan)
    started = tree_cpu_s()
    train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=1, report=lambda values: None))
    cpu_s = round(tree_cpu_s() - started, 1)
    return plan, [point for point in History.read(folder.metrics).points if is_evaluated(point)], cpu_s


def is_evaluated(point: Point) -> bool:
    return any(name.startswith("validation/") for name in point.values)


if __name__ == "__main__":
    main()
