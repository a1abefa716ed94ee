"""DeepSpeed's JSON: a pure function of the plan, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from raytune.errors import PlanError
from raytune.training.engines.deepspeed_json import deepspeed_config
from raytune.training.engines.zero_loading import check_offload
from tests.tiny import tiny_plan


def config(**changes: Any) -> dict[str, Any]:
    engine = {"kind": "zero", "zero_stage": 3} | changes.pop("engine", {})
    return deepspeed_config(tiny_plan(engine=engine, num_parameters=8_000_000_000, num_trainable=40_000_000, **changes))


def test_the_config_of_a_lora_run_on_eight_gpus() -> None:
    made = config(
        precision="bf16",
        batch={"workers": 8, "micro_batch_size": 2, "accumulation": 4},
        cluster={"device": "cuda"},
        engine={"offload_optimizer": "cpu"},
    )
    assert made == {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 40_000_000,
            "allgather_bucket_size": 40_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
    }


def test_overrides_are_laid_over_key_by_key() -> None:
    made = config(engine={"deepspeed_overrides": {"zero_optimization": {"sub_group_size": 7}, "steps_per_print": 3}})
    assert made["zero_optimization"]["sub_group_size"] == 7
    assert made["zero_optimization"]["stage"] == 3
    assert made["steps_per_print"] == 3


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(PlanError, match="no fp16 on CPUs"):
        config(precision="fp16")


def test_nvme_offload_is_refused_where_its_kernel_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    engine = {"kind": "zero", "zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/scratch"}
    with pytest.raises(PlanError, match=r"NVMe offload to /scratch needs DeepSpeed's async_io kernel.*DS_BUILD_AIO=1"):
        check_offload(tiny_plan(engine=engine))
    check_offload(tiny_plan(engine=engine | {"offload_optimizer": "cpu"}))
