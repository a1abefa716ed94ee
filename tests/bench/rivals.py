"""Who is measured in `throughput`: raytune, transformers.Trainer and TRL, each in the ways that it can be used on a CPU."""

import json
import logging
import os
import subprocess
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from raytune.config.sections.model import Attention
from raytune.training.start.start import start_engine
from raytune.training.steps.loop import training_steps
from tests.bench.measure import Elsewhere, Rival
from tests.bench.trained_alike import LEARNING_RATE, Material, batches_of, loss_of, plain_model

OURS = "raytune"
DENSE = "raytune, dense block mask (as LLaMA-Factory's neat_packing)"
LLAMA_FACTORY = "LLaMA-Factory, neat_packing"

Outcome = tuple[list[float], float | None]
"""Loss of each update, and that on held-out documents afterwards; None: not asked."""


def rivals_of(material: Material, llama_factory_python: str | None = None) -> dict[str, Rival]:
    """All that can be measured here, by name.

    Args:
        llama_factory_python: an interpreter that has LLaMA-Factory.
    """
    rivals: dict[str, Rival] = {
        OURS: lambda: raytune(material, material.plan.model.attention),
        DENSE: lambda: raytune(material, "sdpa"),
        "Trainer, batch 1": lambda: trainer(material, batch_size=1),
        "Trainer, batch 8": lambda: trainer(material, batch_size=8),
        "Trainer, batch 8, group_by_length": lambda: trainer(material, batch_size=8, train_sampling_strategy="group_by_length"),
    }
    if llama_factory_python and material.cell.method != "qlora":
        rivals[LLAMA_FACTORY] = lambda: llama_factory(material, llama_factory_python)
    if find_spec("trl") is None:
        return rivals
    for name, settings in TRL_WAYS.items():
        rivals[f"TRL, {name}"] = lambda settings=settings: trl(material, fused=True, **settings)
        rivals[f"TRL, {name}, Trainer's loss"] = lambda settings=settings: trl(material, fused=False, **settings)
    return rivals


TRL_WAYS: dict[str, dict[str, Any]] = {
    "packed (bfd)": {"packing": True, "packing_strategy": "bfd", "batch_size": 1},
    "padding-free, batch 2": {"padding_free": True, "batch_size": 2, "max_length": None},
    "batch 1": {"batch_size": 1},
}


def raytune(material: Material, attention: Attention) -> Callable[[], Callable[[], Outcome]]:
    plan = material.plan.model_copy(update={"model": material.plan.model.model_copy(update={"attention": attention})})
    engine, loss_sum = start_engine(plan, torch.device("cpu"), 0, 1)

    def work() -> Callable[[], Outcome]:
        steps = training_steps(
            engine,
            lambda step: batches_of(plan, step),
            loss_sum,
            lambda step: LEARNING_RATE,
            start=0,
            stop=material.num_updates,
            seed=plan.seed,
        )
        losses = [result.read(engine).loss for result in steps]
        return lambda: (losses, loss_of(engine.model, material.held_out))

    return work


def trainer(material: Material, *, batch_size: int, **settings: Any) -> Callable[[], Callable[[], Outcome]]:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    _be_quiet()
    model = plain_model(material)
    made = Trainer(
        model=model,  # pyright: ignore[reportArgumentType]
        args=TrainingArguments(**_arguments(material, batch_size, len(material.documents)), **settings),
        train_dataset=material.documents,  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorForSeq2Seq(transformers.AutoTokenizer.from_pretrained(material.model), padding="longest"),
    )
    return lambda: _train(made, model, material)


def trl(
    material: Material, *, fused: bool, batch_size: int, max_length: int | None = -1, **settings: Any
) -> Callable[[], Callable[[], Outcome]]:
    """
    Args:
        fused: with TRL's own loss, which also counts entropy and accuracy of each token; else with that of its base class, as TRL
            advises who wants another.
    """
    from datasets import Dataset
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    class WithTrainersLoss(SFTTrainer):
        compute_loss = Trainer.compute_loss

    _be_quiet()
    model = plain_model(material)
    if max_length == -1:
        max_length = material.plan.data.row_length

    def made(num_rows: int) -> Any:
        return (SFTTrainer if fused else WithTrainersLoss)(
            model=model,  # pyright: ignore[reportArgumentType]
            args=SFTConfig(
                max_length=max_length,
                gradient_checkpointing=False,  # TRL has it on unless told otherwise
                **_arguments(material, batch_size, num_rows),
                **settings,
            ),
            train_dataset=Dataset.from_list(material.documents),  # pyright: ignore[reportArgumentType]
            processing_class=transformers.AutoTokenizer.from_pretrained(material.model),
        )

    ready = made(len(material.documents))
    if settings.get("packing"):
        ready = made(len(ready.train_dataset))
    return lambda: _train(ready, model, material)


def llama_factory(material: Material, python: str) -> Callable[[], Elsewhere]:
    plan, is_full = material.plan, material.cell.method == "full"
    adapter: Any = plan.adapter
    lora = {} if is_full else {"lora_rank": adapter.rank, "lora_alpha": int(adapter.alpha), "lora_target": "all"}
    shared = _arguments(material, 1, 1)
    kept = {
        name: value for name, value in shared.items() if name not in ("output_dir", "gradient_accumulation_steps", "report_to")
    }
    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": material.model,
        "template": "chatml",
        "dataset": "none",
        "finetuning_type": "full" if is_full else "lora",
        "neat_packing": True,
        "packing": True,
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "report_to": "none",
    }
    pad = transformers.AutoTokenizer.from_pretrained(material.model).pad_token_id
    settings = {"rows": material.documents, "row_length": plan.data.row_length, "pad": pad, "arguments": arguments | kept | lora}
    file = material.folder / "llama_factory.json"
    file.write_text(json.dumps(settings))

    def work() -> Elsewhere:
        script = Path(__file__).with_name("llama_factory.py")
        done = subprocess.run(
            [python, str(script), str(file)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        found = json.loads(done.stdout.splitlines()[-1])
        return Elsewhere(found["cpu_s"], (found["losses"], None))

    return work


def _train(made: Any, model: nn.Module, material: Material) -> Callable[[], Outcome]:
    updates = made.train().global_step
    assert updates == material.num_updates, f"{type(made).__name__} made {updates} updates, not {material.num_updates}"
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    return lambda: (losses, loss_of(model, material.held_out))


def _arguments(material: Material, batch_size: int, num_rows: int) -> dict[str, Any]:
    optimization = material.plan.optimization
    return {
        "output_dir": str(material.folder / "output"),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": -(-num_rows // batch_size),
        "num_train_epochs": material.num_updates,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": optimization.beta1,
        "adam_beta2": optimization.beta2,
        "adam_epsilon": optimization.epsilon,
        "weight_decay": 0.0,
        "max_grad_norm": optimization.max_grad_norm,
        "bf16": material.cell.precision == "bf16",
        "use_cpu": True,
        "seed": 0,
        "dataloader_pin_memory": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def _be_quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("trl", "transformers", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
