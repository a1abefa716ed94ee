"""What each method learns of a task, in what it trains, saves and computes, beside LoRA in the same time.

    python -m tests.bench.methods --task demo --output
    python -m tests.bench.methods --task gsm8k --output

Every method trains the model that ships with raytune on the same rows in the same order, on one worker, with some rates
around its default; the run with the lowest loss on held-out rows counts. `demo` is the quickstart's
task, which the model does not know and which is scored by exact match; of `gsm8k` (its `train.jsonl` and `test.jsonl`) so small
a model learns the language only, and the loss on held-out answers counts.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

from raytune.config.load import config_from
from raytune.evaluation.generation import write_answers
from raytune.evaluation.text_metrics import exact_match
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import Prepared, prepare
from raytune.launch.state.record import write_plan
from raytune.launch.state.result import RunResult
from raytune.model.inference import HeldModels, asked_of_run
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.training.run import train
from raytune.training.start.start import Worker
from tests.bench.measure import report, tree_cpu_s

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
COLUMNS = {"prompt": "question", "completion": "answer"}
LORA = "lora"
FULL = {"adapter": {"method": "full"}}
METHODS: dict[str, dict[str, Any]] = {
    LORA: {"adapter": {"method": "lora"}},
    "full": FULL,
    "full, rates decaying by 0.7 per layer": FULL | {"strategy": {"layer_rate_decay": 0.7}},
    "full, unfrozen from the top in three phases": FULL
    | {
        "strategy": {
            "unfreeze": [
                {"last_layers": 1},
                {"from_fraction": 0.25, "last_layers": 2},
                {"from_fraction": 0.5, "last_layers": "all"},
            ]
        }
    },
    "full, last layer and norm only": FULL | {"strategy": {"freeze": {"embeddings": True, "first_layers": 2}}},
    "qlora": {"adapter": {"method": "qlora"}},
    "lora, schedule-free AdamW": {"adapter": {"method": "lora"}, "training": {"optimizer": "schedule_free_adamw"}},
    "full, schedule-free AdamW": FULL | {"training": {"optimizer": "schedule_free_adamw"}},
}
METHODS |= {
    method: {"adapter": {"method": method}}
    for method in (
        *("adalora", "bottleneck", "oft", "boft", "loha", "lokr", "vera", "ia3", "layernorm"),
        *("prefix_tuning", "p_tuning", "prompt_tuning"),
    )
}
MAX_NEW_TOKENS = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["demo", "gsm8k"], default="demo")
    parser.add_argument("--data", type=Path, default=GSM8K, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 3, 10], help="rates to try, as factors of the default")
    parser.add_argument("--methods", nargs="*", default=[*METHODS], help=f"some of: {'; '.join(METHODS)}")
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines/methods.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    of_lora: dict[str, Any] | None = None
    with TemporaryDirectory() as folder:
        for name in dict.fromkeys([LORA, *options.methods]):
            best = min(runs(name, options, folder), key=lambda figures: figures["held_out_loss"])
            if (ready := best.pop("ready")).questions:
                best["exact_match"] = score(ready)
            of_lora = of_lora or best
            best["cpu_s_of_lora"] = round(best["cpu_s"] / of_lora["cpu_s"], 2)
            report("methods", {"task": options.task, "method": name, "steps": options.steps} | best, options.output)


def runs(name: str, options: argparse.Namespace, folder: str) -> Iterator[dict[str, Any]]:
    """Figures of a run of a method with each rate."""
    common, method = task(options), METHODS[name]
    settings: dict[str, Any] = common | method | {"storage": folder, "training": common["training"] | method.get("training", {})}
    default = prepared(settings | {"name": "default"}).plan.optimization.learning_rate
    for factor in options.factors:
        training = settings["training"] | {"learning_rate": factor * default}
        ready = prepared(settings | {"name": f"{len(list(Path(folder).iterdir()))}", "training": training})
        started = tree_cpu_s()
        train(ready.plan, Worker(rank=0, world_size=1, device_index=0, attempt=1, report=lambda values: None))
        cpu_s = round(tree_cpu_s() - started, 1)
        yield {"cpu_s": cpu_s, "learning_rate": ready.plan.optimization.learning_rate, **figures(ready.plan), "ready": ready}


def task(options: argparse.Namespace) -> dict[str, Any]:
    training = {"max_steps": options.steps, "global_batch_size": 4, "warmup_steps": 10, "logging_steps": 10}
    data: dict[str, Any] = {"max_length": 512}
    evaluation: dict[str, Any] = {"every_steps": options.steps}
    if options.task == "demo":
        data |= {"train": "demo:train", "validation": {"path": "demo:validation", "max_rows": 100}}
        evaluation["generation"] = {"rows": "demo:test", "max_rows": 100, "max_new_tokens": MAX_NEW_TOKENS}
    else:
        data["train"] = {"path": str(options.data / "train.jsonl"), "columns": COLUMNS, "max_rows": 2000}
        data["validation"] = {"path": str(options.data / "test.jsonl"), "columns": COLUMNS, "max_rows": 100}
        evaluation["at_start"] = True
    return {
        "model": {"base": "demo"},
        "data": data,
        "training": training,
        "evaluation": evaluation,
        "cluster": {"workers": 1, "threads_per_worker": 1},
    }


def prepared(settings: dict[str, Any]) -> Prepared:
    """What a launcher makes ready of a run; its questions are asked here, of the best run only."""
    config = config_from(settings)
    ready = prepare(config, this_machine(config.cluster), map)
    plan = ready.plan.model_copy(update={"evaluation": ready.plan.evaluation.model_copy(update={"generation": None})})
    write_plan(RunFolder(plan.storage, plan.name), plan)
    return Prepared(plan=plan, questions=ready.questions)


def figures(plan: RunPlan) -> dict[str, Any]:
    """What a finished run has learned, trained and saved."""
    result = RunResult.read(RunFolder(plan.storage, plan.name))
    saved = sum(file.stat().st_size for file in Path(result.model_path).glob("*.safetensors"))
    return {
        "trained_parameters": plan.num_trainable,
        "saved_kib": round(saved / 1024),
        "held_out_loss": round(result.metrics["validation/loss"], 4),
    }


def score(ready: Prepared) -> float:
    """Share of the questions that a finished run's model answers exactly as expected."""
    plan = ready.plan
    _, tuned = asked_of_run(plan, RunFolder(plan.storage, plan.name).model)
    with HeldModels(torch.device("cpu")) as models, models.asked(tuned) as loaded:
        answers = write_answers(
            loaded.model,
            loaded.tokenizer,
            [question.prompt_ids for question in ready.questions],
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=len(ready.questions),
            can_pad=loaded.can_pad,
        )
    scores = [exact_match(answer.text, question.expected) for answer, question in zip(answers, ready.questions, strict=True)]
    return sum(scores) / len(scores)


if __name__ == "__main__":
    main()
