"""Before there is an engine of DeepSpeed: whether it can offload here, its process group, and weights that are loaded straight
into their shards."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.op_builder.async_io import AsyncIOBuilder
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from raytune.errors import PlanError
from raytune.model.files.weight_numbers import is_packed
from raytune.model.load import Shares
from raytune.model.parts.dtypes import DTYPES
from raytune.model.parts.quantize import is_quantized
from raytune.plan.run_plan import RunPlan
from raytune.training.engines.deepspeed_json import deepspeed_config
from raytune.training.engines.node_groups import share_copies


def check_offload(plan: RunPlan) -> None:
    """Refuse NVMe offload on a machine where its kernel is not built.

    Raises:
        PlanError: with what to install. Compiling inside a worker takes minutes, and a worker killed meanwhile leaves a lock file
            that makes every later one wait for ever.
    """
    if "nvme" not in (plan.engine.offload_optimizer, plan.engine.offload_parameters):
        return
    builder = AsyncIOBuilder()
    if _is_built(builder):
        return
    if builder.is_compatible(verbose=False):
        why = "this machine could compile it, but has not"
        fix = "Build it into the image: DS_BUILD_AIO=1 pip install --no-build-isolation --no-binary deepspeed deepspeed"
    else:
        why = "libaio's library and headers, or a compiler, are missing"
        fix = "Install libaio-dev and build it into the image with DS_BUILD_AIO=1"
    raise PlanError(
        f"NVMe offload to {plan.engine.nvme_path} needs DeepSpeed's async_io kernel, and {why}. {fix}, or set "
        f"training.zero.offload_optimizer and offload_parameters to cpu."
    )


def _is_built(builder: Any) -> bool:
    from deepspeed.git_version_info import installed_ops  # its content is made by DeepSpeed's build

    if installed_ops.get(builder.name, False):
        return True
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(builder.name, verbose=False))
    return (folder / f"{builder.name}.so").exists() and not (folder / "lock").exists()


def prepare_deepspeed(device: torch.device) -> None:
    """Settings of the process that must hold before DeepSpeed touches the process group, which has to exist."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # Its shared-memory collectives would be compiled now, in every worker; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


@contextmanager
def sharded_loading(plan: RunPlan, device: torch.device) -> Iterator[Shares | None]:
    """Context in which transformers loads weights straight into their shards, if the plan shards weights (stage 3).

    Yields:
        What keeps this rank's shards of weights that transformers does not shard itself; None if weights are not sharded.
    """
    if plan.engine.zero_stage != 3:
        yield None
        return
    prepare_deepspeed(device)
    share_copies(plan.engine.copy_over, plan.cluster.collective_timeout_s)
    config = deepspeed_config(plan)
    # transformers looks for this object through a weak reference, for as long as it lives.
    alive = HfDeepSpeedConfig(config)
    try:
        yield _QuantisedShards(config)
    finally:
        del alive


class _QuantisedShards:
    """`Shares` of quantised weights, which transformers leaves whole on every rank
    (https://github.com/huggingface/peft/issues/2016)."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._shards = deepspeed.zero.Init(config_dict_or_path=config)

    def keep_share(self, parameter: nn.Parameter) -> None:
        if is_quantized(parameter):
            self._shards._convert_to_zero_parameters([parameter])

    def loaded(self, model: nn.Module) -> None:
        pass


def without_training(model: nn.Module, plan: RunPlan) -> nn.Module:
    """What to call for a forward pass of a model beside the one in training, whose weights were sharded as they were loaded."""
    cast_unsharded(model, DTYPES[plan.precision])
    return deepspeed.initialize(model=model, config=deepspeed_config(plan))[0]


def cast_unsharded(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what DeepSpeed leaves alone once some weights are sharded: adapters and norms that are not in the run's precision."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not is_packed(parameter) and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)
