"""Which keys of DeepSpeed's JSON `training.zero.overrides` may not set. Pure, so that a run is refused before anything starts."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from raytune.config.sections.training import Precision, ZeroSection
from raytune.errors import UserError
from raytune.plan.run_plan import ZeroStage

OWNED_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "managed_gradient_accumulation": None,
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.optimizer",
    "scheduler": "training.lr_scheduler_type",
    "zero_optimization.stage": "training.zero.stage",
    "zero_optimization.zero_hpz_partition_size": "training.zero.copy_per_node",
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


UNREAD_KEYS = {
    "activation_checkpointing": "is for models that call DeepSpeed's own checkpointing; set training.gradient_checkpointing",
    "autotuning": "is read by DeepSpeed's launcher, which raytune does not use; `raytune plan` chooses stage and batch sizes",
    "dataloader_drop_last": "is for DeepSpeed's data loader, and raytune has its own order of rows; delete it",
    "data_efficiency": "is for DeepSpeed's data loader, and raytune has its own order of rows; delete it",
    "datastates_ckpt": "is for DeepSpeed's checkpoint engines, and raytune writes checkpoints itself; delete it",
    "hybrid_engine": "is for DeepSpeed's reinforcement learning, which raytune does not use; delete it",
    "vocabulary_size": "is compared with tensor cores' sizes for a warning, and changes nothing; delete it",
}
"""What DeepSpeed knows, but what nothing reads in a run of raytune, and why."""

OF_STAGE_3 = ("zero_optimization.stage3_", "zero_optimization.zero_quantized_")
"""Beginnings of keys that are for sharded weights; the last is ZeRO++'s."""
KNOWN_KEYS: dict[str, tuple[str, ...]] = {
    "": (
        "aio",
        "bf16",
        "comet",
        "comms_logger",
        "communication_data_type",
        "csv_monitor",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "tensorboard",
        "timers",
        "use_data_before_expert_parallelism",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ),
    "zero_optimization": (
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    ),
    "zero_optimization.offload_optimizer": (
        "buffer_count",
        "cpuadam_cores_perc",
        "fast_init",
        "nvme_path",
        "pin_memory",
        "pipeline_read",
        "pipeline_write",
        "ratio",
        "super_offload",
    ),
    "zero_optimization.offload_param": ("buffer_count", "buffer_size", "max_in_cpu", "nvme_path", "pin_memory"),
    "bf16": ("bf16_master_weights_and_grads", "bf16_optimizer_states", "immediate_grad_update"),
    "fp16": (
        "auto_cast",
        "consecutive_hysteresis",
        "fp16_master_weights_and_grads",
        "hysteresis",
        "initial_scale_power",
        "loss_scale",
        "loss_scale_window",
        "min_loss_scale",
    ),
    "data_types": ("grad_accum_dtype",),
}
"""What else an override may set, by the section that it lies in; DeepSpeed ignores other keys at the top, and would refuse
those further down in a worker. Sections that are not here are left to DeepSpeed."""


_CHANGES_NUMBERS = (
    *("bf16", "communication_data_type", "data_types", "expert_parallel", "fp16", "gradient_allreduce_op"),
    *("gradient_predivide_factor", "prescale_gradients", "seq_parallel_communication_data_type"),
    *("use_data_before_expert_parallelism", "weight_quantization"),
    *(f"zero_optimization.{name}" for name in ("ignore_unused_parameters", "override_module_apply", "zenflow", "zero_quantized")),
)
"""Beginnings of keys that decide more than speed, memory and words."""


def computing_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides that change what a step computes, by dotted key; the others only divide it otherwise, or log."""
    return {
        key: value
        for key, value in _dotted(overrides)
        if not isinstance(value, dict) and (key.startswith(_CHANGES_NUMBERS) or key.partition(".")[0] not in KNOWN_KEYS[""])
    }


def check_overrides(zero: ZeroSection) -> None:
    """Refuse keys that raytune decides, keys that DeepSpeed no longer has, and keys that nothing would read.

    Raises:
        UserError: with raytune's own key, or the nearest key of DeepSpeed's, where there is one.
    """
    keys = list(_dotted_keys(zero.overrides))
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
    for key in keys:
        section, _, name = key.rpartition(".")
        if key in UNREAD_KEYS:
            raise UserError(f"training.zero.overrides sets {key}, which nothing would read: it {UNREAD_KEYS[key]}.")
        if section in KNOWN_KEYS and name not in KNOWN_KEYS[section]:
            raise UserError(f"training.zero.overrides sets {key}, which DeepSpeed does not know.{_hint(section, name)}")
    _check_offloading(zero, keys)


def unread_overrides(zero: ZeroSection, stage: ZeroStage, precision: Precision) -> list[str]:
    """A sentence for each key that is for another stage, precision or place of the optimizer state than the chosen one."""
    is_without_disk = "nvme" not in (zero.offload_optimizer, zero.offload_parameters)
    sentences = []
    for key in _dotted_keys(zero.overrides):
        section = key.partition(".")[0]
        if stage < 3 and key.startswith(OF_STAGE_3):
            sentences.append(f"training.zero.stage is {stage}, which does not read {key} of training.zero.overrides.")
        elif section in ("fp16", "bf16") and section != precision and key != section:
            sentences.append(f"training.precision is {precision}, which does not read {key} of training.zero.overrides.")
        elif key == "aio" and is_without_disk:
            sentences.append("Nothing is offloaded to nvme, so that nothing reads aio of training.zero.overrides.")
    return sentences


def _check_offloading(zero: ZeroSection, keys: list[str]) -> None:
    """Refuse keys of what is not switched on, which DeepSpeed would read over."""
    for section, ours in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        inside = [key for key in keys if key.startswith(f"zero_optimization.{section}.")]
        if inside and getattr(zero, ours) == "none":
            raise UserError(
                f"training.zero.overrides sets {inside[0]}, but training.zero.{ours} is none, so that nothing would read it. "
                f"Set training.zero.{ours} to cpu or nvme, or delete the override."
            )
    of_stage_3 = [key for key in keys if key.startswith(OF_STAGE_3)]
    if of_stage_3 and zero.stage in (0, 1, 2):
        raise UserError(
            f"training.zero.overrides sets {of_stage_3[0]}, which ZeRO stage 3 alone reads, but training.zero.stage is "
            f"{zero.stage}. Set it to 3, or delete the override."
        )


def _hint(section: str, name: str) -> str:
    """Where a key that is not known was probably meant to be, or how it is probably written."""
    elsewhere = [other for other, known in KNOWN_KEYS.items() if name in known]
    near = get_close_matches(name, KNOWN_KEYS[section], 1)
    if elsewhere:
        meant = f"{elsewhere[0]}.{name}".lstrip(".")
    elif near:
        meant = f"{section}.{near[0]}".lstrip(".")
    else:
        return " Delete it."
    return f" Did you mean {meant}?"


def _dotted_keys(section: dict[str, Any]) -> Iterator[str]:
    return (key for key, _ in _dotted(section))


def _dotted(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
