"""Makes the run folders beside it: `python make.py FOLDER`, run with the raytune whose folders are wanted (they are of 02fb5b9).

One run has finished, the other was interrupted after step 2 of 4; `whole` is the latter, never interrupted.
"""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from raytune.config.load import config_from
from raytune.config.sections.run import RunConfig
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.run import train_plan
from raytune.plan.run_plan import RunPlan
from raytune.training.run import Worker, train

HERE = Path(__file__).parent
ROWS = [(f"What is {a} plus {b}?", f"It is {a + b}.") for a in range(4) for b in range(3)]


def config(storage: Path, rows: Path, name: str) -> RunConfig:
    return config_from(
        {
            "name": name,
            "storage": str(storage),
            "model": {"base": "demo"},
            "data": {
                "train": {"path": str(rows / "train.jsonl")},
                "validation": {"path": str(rows / "validation.jsonl")},
                "max_length": 64,
                "packing": "none",
            },
            "adapter": {"method": "lora", "rank": 2, "target_modules": ["q_proj"]},
            "training": {"max_steps": 2 if name == "finished" else 4, "global_batch_size": 2, "learning_rate": 1e-2},
            "evaluation": {"every_steps": 2},
            "checkpoint": {"keep_last": 1, "keep_best": 0},
        }
    )


def trained(name: str, storage: Path, rows: Path, stop_after: int | None = None) -> None:
    def attempt(plan: RunPlan, number: int, check: Callable[[], None]) -> None:
        steps = 0

        def stop() -> None:
            nonlocal steps
            steps += 1
            if stop_after is not None and steps > stop_after:
                raise KeyboardInterrupt

        train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=number, report=lambda metrics: None, check=stop))

    asked = config(storage, rows, name)
    prepared = prepare(asked, this_machine(asked.cluster), map)
    with suppress(KeyboardInterrupt):
        train_plan(prepared.plan, prepared.questions, asked, attempt=attempt)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    rows, storage = place / "rows", place / "runs"
    rows.mkdir(parents=True)
    for name, chosen in (("train", ROWS[:10]), ("validation", ROWS[10:])):
        lines = [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]} for asked, said in chosen
        ]
        (rows / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained("finished", storage, rows)
    trained("unfinished", storage, rows, stop_after=2)
    trained("whole", storage, rows)
    shutil.copytree(rows, HERE / "rows", dirs_exist_ok=True)
    shutil.copytree(storage, HERE / "storage", dirs_exist_ok=True)
