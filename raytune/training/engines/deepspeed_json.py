"""DeepSpeed's JSON for a plan."""

import math
from typing import Any

from raytune.errors import PlanError
from raytune.plan.costs.buckets import largest_persistent
from raytune.plan.run_plan import RunPlan
from raytune.training.engines.engine import INITIAL_LOSS_SCALE, STEPS_BEFORE_GROWTH


def deepspeed_config(plan: RunPlan) -> dict[str, Any]:
    """DeepSpeed's JSON for a plan, with `training.zero.overrides` (checked by plan.deepspeed_keys) laid over it.

    Raises:
        PlanError: if DeepSpeed lacks the precision.
    """
    if plan.precision == "fp16" and plan.cluster.device == "cpu":
        raise PlanError("DeepSpeed has no fp16 on CPUs. Set training.precision to bf16 or fp32, or training.zero.stage to 0.")
    config: dict[str, Any] = {
        # As DeepSpeed counts, to whom each worker has rows of its own; nothing is divided by it.
        "train_batch_size": plan.batch.workers * plan.batch.micro_batch_size * plan.batch.accumulation,
        "train_micro_batch_size_per_gpu": plan.batch.micro_batch_size,
        "gradient_accumulation_steps": plan.batch.accumulation,
        # `step()` is the boundary: the loop knows how many micro-batches a step has, DeepSpeed need not count them.
        "managed_gradient_accumulation": False,
        "gradient_clipping": plan.optimization.max_grad_norm,
        "bf16": {"enabled": plan.precision == "bf16"},
        "fp16": {
            "enabled": plan.precision == "fp16",
            "initial_scale_power": int(math.log2(INITIAL_LOSS_SCALE)),
            "loss_scale_window": STEPS_BEFORE_GROWTH,
            "hysteresis": 1,
        },
        "zero_optimization": _zero_section(plan),
        # Optimizers are built by training/engines/optimizer.py; DeepSpeed's list of tested ones does not know bitsandbytes', and its own
        # CPU Adam would be compiled inside the worker.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
    }
    if plan.precision == "bf16" and plan.batch.accumulation > 1 and plan.engine.zero_stage != 1:
        # A bf16 sum of many small gradients loses the small ones. (At stage 1 DeepSpeed would switch to another optimizer.)
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _laid_over(config, plan.engine.deepspeed_overrides)


def _zero_section(plan: RunPlan) -> dict[str, Any]:
    stage, on_gpu, buckets = plan.engine.zero_stage, plan.cluster.device == "cuda", plan.engine.buckets
    bucket = min(buckets.reduce_elements, max(plan.num_trainable, 1))
    bucket += bucket % 2  # DeepSpeed refuses odd ones
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu and stage >= 2,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if plan.engine.offload_optimizer != "none":
        section["offload_optimizer"] = _offload(plan.engine.offload_optimizer, plan.engine.nvme_path, pin_memory=on_gpu)
    if plan.engine.offload_parameters != "none":
        section["offload_param"] = _offload(plan.engine.offload_parameters, plan.engine.nvme_path, pin_memory=on_gpu)
    if stage == 3:
        if plan.engine.copy_over > 1:
            section["zero_hpz_partition_size"] = plan.engine.copy_over
        section["stage3_prefetch_bucket_size"] = min(buckets.prefetch_elements, plan.num_parameters)
        section["stage3_param_persistence_threshold"] = largest_persistent(buckets, plan.num_parameters)
    return section


def _offload(place: str, nvme_path: str | None, *, pin_memory: bool) -> dict[str, Any]:
    section: dict[str, Any] = {"device": place, "pin_memory": pin_memory}
    return section | {"nvme_path": nvme_path} if place == "nvme" else section


def _laid_over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `top`; dictionaries in both are merged."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _laid_over(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged
