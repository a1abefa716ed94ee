"""What a better teacher is worth beside hard labels, on few rows and on many.

    python -m tests.bench.teaching --output

The model that ships with raytune is trained whole on all rows of the quickstart's task (JSON) and then teaches LoRA on the same
base, which sees 40 of these rows, or all of them. The loss on held-out rows is cross-entropy, with a teacher and without.
"""

import argparse
from tempfile import TemporaryDirectory
from typing import Any

from tests.bench.forgetting import FULL, HELD_OUT_ROWS, LORA, trained
from tests.bench.measure import report

FEW_ROWS = 40
TEACHER_STEPS = 150
LOSS = "validation/loss"


def arms(teacher: str) -> dict[str, tuple[int | None, dict[str, Any] | None]]:
    """How many rows are seen (None: all of them), and `strategy.distillation`, by the arm's name.

    Args:
        teacher: its folder.
    """
    taught = {"teacher": teacher, "weight": 0.7, "temperature": 2.0}
    return {
        "few rows": (FEW_ROWS, None),
        "few rows, teacher": (FEW_ROWS, taught),
        "all rows": (None, None),
        "all rows, teacher": (None, taught),
        "few rows, teacher, temperature 1": (FEW_ROWS, taught | {"temperature": 1.0}),
        "few rows, teacher, temperature 4": (FEW_ROWS, taught | {"temperature": 4.0}),
        "few rows, teacher, top 8": (FEW_ROWS, taught | {"top_k": 8}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--arms", nargs="*", default=[*arms("")], help=f"some of: {'; '.join(arms(''))}")
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines/teaching.jsonl")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        plan, evaluated, _ = trained(settings_of(FULL, "demo:train", TEACHER_STEPS, 1.5e-3) | {"name": "t", "storage": folder})
        teacher = {"teacher_loss": round(evaluated[-1].values[LOSS], 5)}
        for number, name in enumerate(options.arms):
            num_rows, section = arms(f"{plan.storage}/{plan.name}/model")[name]
            rows = {"path": "demo:train"} | ({"max_rows": num_rows} if num_rows else {})
            strategy = {"strategy": {"distillation": section}} if section else {}
            settings = settings_of(LORA | strategy, rows, options.steps, 5e-3)
            _, evaluated, cpu_s = trained(settings | {"name": f"{number}", "storage": folder})
            losses = {f"loss_{point.step}": round(point.values[LOSS], 5) for point in evaluated}
            report("teaching", {"arm": name, "steps": options.steps} | teacher | losses | {"cpu_s": cpu_s}, options.output)


def settings_of(arm: dict[str, Any], rows: Any, steps: int, learning_rate: float) -> dict[str, Any]:
    training = {
        "max_steps": steps,
        "global_batch_size": 4,
        "warmup_steps": 10,
        "logging_steps": 5,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
    }
    return arm | {
        "model": {"base": "demo"},
        "data": {"train": rows, "validation": {"path": "demo:validation", "max_rows": HELD_OUT_ROWS}, "max_length": 512},
        "training": training,
        "evaluation": {"every_steps": 20},
        "checkpoint": {"every_steps": steps},
        "cluster": {"workers": 1, "threads_per_worker": 1},
    }


if __name__ == "__main__":
    main()
