"""Small real objects that tests share: tokenizer, model, rows, stores, plans. Nothing here is a stand-in for our own code."""

from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from raytune.config.sections.data import DataSection, DataSource
from raytune.data.files.demo import demo_rows
from raytune.data.rows.split import Split, split_by_hash
from raytune.data.store.build import build_store
from raytune.data.store.request import StoreRequest
from raytune.data.store.store import StoreInfo
from raytune.data.templates.text import resolve_template
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.model.demo import demo_base_path, demo_config, demo_tokenizer
from raytune.plan.data.split import asked_split
from raytune.plan.run_plan import Plan, RunPlan, StorePlan

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For property tests (`@PATIENT` above `@given`): no time limits per example, which a busy machine breaks."""

TINY_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer: a token per byte and three special ones."""
    return demo_tokenizer()


def tiny_model(*, seed: int = 0, tied: bool = True, **config: Any) -> LlamaForCausalLM:
    """A Llama of some 20k parameters with random fp32 weights; `config` are fields of LlamaConfig."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(demo_config(**(TINY_SHAPE | {"tie_word_embeddings": tied} | config)))


def save_tiny_model(folder: Path, *, seed: int = 0, tied: bool = True, **config: Any) -> Path:
    """Write a tiny model and its tokenizer in Hugging Face format; the folder is a `ModelPlan.path`."""
    tiny_model(seed=seed, tied=tied, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_base(storage: Path) -> Path:
    """A tiny model beside the runs of a storage, for the configs of all of them: a tenth of the demo's work."""
    folder = storage / "base"
    return folder if folder.exists() else save_tiny_model(folder)


def tiny_rows(num_rows: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in the messages format."""
    return demo_rows("train", num_rows, seed)


def tiny_split(**data: Any) -> Split:
    """What keys of `data` hold out, where no row has to be looked at for that."""
    return split_by_hash(asked_split(DataSection(**data)))


def tiny_request(source: str = "demo:train", *, max_rows: int | None = 20, **changes: Any) -> StoreRequest:
    """A request for a store of demo rows in packed rows of 512 tokens; `changes` are fields of StoreRequest."""
    tokenizer = open_tokenizer(str(demo_base_path()))
    fields: dict[str, Any] = {
        "sources": (DataSource(path=source, max_rows=max_rows),),
        "template": resolve_template("auto", tokenizer),
        "targets": "assistant",
        "max_length": 512,
        "too_long": "truncate",
        "packing": "best_fit",
        "on_bad_row": "error",
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }
    return StoreRequest(**(fields | changes))


def tiny_store(folder: Path, source: str = "demo:train", *, max_rows: int | None = 20, **changes: Any) -> StoreInfo:
    """Build (or reuse) a store of demo rows; `Store.open(info.path)` reads it."""
    return build_store(
        tiny_request(source, max_rows=max_rows, **changes), tokenizer_path=str(demo_base_path()), folder=str(folder)
    )


def store_plan(info: StoreInfo, name: str = "train") -> StorePlan:
    """A store as the plan names it."""
    return StorePlan(
        name=name, path=info.path, num_rows=info.rows_per_epoch, num_tokens=info.num_tokens, num_targets=info.num_targets
    )


def tiny_plan(**changes: Any) -> RunPlan:
    """A valid plan: one worker, plain engine, full fine-tuning of the demo base in fp32 for 4 steps of 4 rows.

    Args:
        changes: fields of RunPlan. A dict is laid over its default (`batch={"workers": 2}`); anything else replaces it.
            `data` has to name a real store before the plan is trained: `data={"train": store_plan(tiny_store(folder))}`.
    """
    return RunPlan.model_validate(_laid_over(_DEFAULT_PLAN, changes))


def _laid_over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, dict by dict. A dict with another `method` is another adapter and replaces the default."""
    merged = dict(base)
    for key, change in changes.items():
        value = change.model_dump() if isinstance(change, Plan) else change
        replaces = not isinstance(value, dict) or not isinstance(merged.get(key), dict) or "method" in value
        merged[key] = value if replaces else _laid_over(merged[key], value)
    return merged


_DEFAULT_PLAN: dict[str, Any] = {
    "name": "tiny",
    "storage": "/nonexistent",
    "seed": 0,
    "precision": "fp32",
    "tf32": False,
    "logging_steps": 1,
    "template": "auto",
    "model": {
        "path": str(demo_base_path()),
        "revision": None,
        "trust_remote_code": False,
        "attention": "varlen",
        "dtype": "fp32",
        "compute_dtype": "fp32",
        "gradient_checkpointing": False,
        "compile": False,
        "liger": False,
        "neftune_noise_alpha": 0.0,
    },
    "data": {
        "train": {"name": "train", "path": "/nonexistent/stores/train", "num_rows": 16, "num_tokens": 4096, "num_targets": 1024},
        "validation": [],
        "row_length": 512,
    },
    "adapter": {"method": "full"},
    "batch": {"workers": 1, "micro_batch_size": 2, "accumulation": 2},
    "optimization": {
        "num_steps": 4,
        "num_rows": 16,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "lora_plus_ratio": None,
        "lora_plus_embedding_rate": None,
        "schedule": "constant",
        "warmup_steps": 0,
        "min_lr_ratio": 0.0,
        "decay_ratio": 0.2,
        "polynomial_power": 2.0,
        "num_cycles": 1,
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "max_grad_norm": 1.0,
    },
    "engine": {
        "kind": "plain",
        "zero_stage": 0,
        "offload_optimizer": "none",
        "offload_parameters": "none",
        "nvme_path": None,
        "deepspeed_overrides": {},
    },
    "loss": {"chunk_tokens": None},
    "evaluation": {"every_steps": 2, "at_saves": False, "at_start": True, "max_rows": None, "suites": ()},
    "checkpoint": {
        "every_steps": 2,
        "every_s": None,
        "keep_last": 2,
        "keep_best": 1,
        "metric": "validation/loss",
        "mode": "min",
    },
    "cluster": {
        "device": "cpu",
        "cpus_per_worker": 1.0,
        "gpus_per_worker": 0,
        "threads_per_worker": 1,
        "placement": "pack",
        "max_failures": 0,
        "collective_timeout_s": 60.0,
    },
    "memory": [],
    "checkpoint_bytes": 0,
    "step_time": None,
    "cost": None,
    "num_parameters": 0,
    "num_trainable": 0,
    "reasons": [],
}
