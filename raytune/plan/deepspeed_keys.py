"""Which keys of DeepSpeed's JSON `training.zero.overrides` may not set. Pure, so that a run is refused before anything starts."""

from collections.abc import Iterator
from typing import Any

from raytune.errors import UserError

OWNED_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "managed_gradient_accumulation": None,
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.optimizer",
    "scheduler": "training.lr_scheduler_type",
    "zero_optimization.stage": "training.zero.stage",
    "zero_optimization.offload_optimizer.device": "training.zero.offload_optimizer",
    "zero_optimization.offload_param.device": "training.zero.offload_parameters",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
    "torch_autocast": "training.precision",
    "bf16.check_grad_overflow": None,
    "zero_optimization.compute_grad_norm": None,
    "pipeline": None,
    "tensor_parallel": None,
    "compile": "training.compile",
    "checkpoint": None,
}
"""Keys that an override may not set, and raytune's word for each; None: the loop relies on its value."""

REMOVED_KEYS = (
    "elasticity",
    "amp",
    "nebula",
    "compression_training",
    "quantize_training",
    "sparse_gradients",
    "eigenvalue",
    "sparse_attention",
    "graph_harvesting",
    "curriculum_learning",
    "progressive_layer_drop",
    "zero_optimization.mics_shard_size",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.zeropp_loco_param",
)
"""What DeepSpeed 0.19 no longer has (https://github.com/deepspeedai/DeepSpeed/issues/8489); it would say so in a worker."""


def check_overrides(overrides: dict[str, Any]) -> None:
    """Refuse keys that raytune decides, and keys that DeepSpeed no longer has.

    Raises:
        UserError: with raytune's own key, where there is one.
    """
    keys = set(_dotted_keys(overrides))
    for key in REMOVED_KEYS:
        if key in keys:
            raise UserError(
                f"training.zero.overrides sets {key}, which DeepSpeed 0.19 has removed "
                f"(https://github.com/deepspeedai/DeepSpeed/issues/8489). Delete it."
            )
    for key, ours in OWNED_KEYS.items():
        if key in keys:
            advice = f"Set {ours} instead." if ours else "raytune's loop relies on the value it sets; delete it."
            raise UserError(f"training.zero.overrides sets {key}, which raytune decides. {advice}")


def _dotted_keys(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{key}.")
