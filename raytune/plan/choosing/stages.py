"""Which ZeRO stages the settings of a run leave."""

from typing import NamedTuple

from raytune.config.sections.training import Optimizer, Precision, TrainingSection
from raytune.errors import PlanError, capitalised
from raytune.plan.choosing.requirements import Device
from raytune.plan.model.stage_limit import StageLimit
from raytune.plan.run_plan import ZeroStage


class Sharding(NamedTuple):
    """A way to divide a run among its workers."""

    stage: ZeroStage
    shards_base: bool = False
    """Whether the layers of a frozen base are divided without ZeRO (`sharded_base`)."""
    copy_over: int = 1
    """Workers of a node that have a second copy of sharded weights among them (`node_copies`); 1: there is none."""


STAGES: tuple[ZeroStage, ...] = (0, 1, 2, 3)
WITHOUT_SHARDS: dict[Optimizer, str] = {
    "adafactor": "which needs whole matrices where ZeRO has flat shards",
    "muon": "which needs whole matrices where ZeRO has flat shards",
    "schedule_free_adamw": "which puts its average in the place of weights, where DeepSpeed's fp32 masters do not follow",
}
"""Why an optimizer does not go with DeepSpeed."""


def possible_stages(
    training: TrainingSection, of_method: list[StageLimit], device: Device, workers: int, precision: Precision
) -> list[ZeroStage]:
    """ZeRO stages that the settings leave, lowest first; the one that is asked for, if one is.

    Args:
        of_method: what the method and a quantised base leave.

    Raises:
        PlanError: if they leave none.
    """
    limits = [*_stage_limits(training, device, precision), *of_method]
    wanted = training.zero.stage
    if wanted != "auto":
        limits = [StageLimit(wanted, wanted, f"training.zero.stage is {wanted}"), *limits]
    floor = max(limits, key=lambda limit: limit.lowest)
    ceiling = min(limits, key=lambda limit: limit.highest)
    if floor.lowest > ceiling.highest:
        remedy = f"Set {ceiling.instead}, or change the first of the two." if ceiling.instead else "Change one of the two."
        raise PlanError(
            f"{capitalised(floor.because)}, which needs ZeRO stage {floor.lowest} or higher; but {ceiling.because}, which "
            f"allows at most stage {ceiling.highest}. {remedy}"
        )
    # One worker has nobody to share with: a higher stage would only cost time.
    highest = floor.lowest if workers == 1 else ceiling.highest
    return [stage for stage in STAGES if floor.lowest <= stage <= highest]


def _stage_limits(training: TrainingSection, device: Device, precision: Precision) -> list[StageLimit]:
    zero = training.zero
    limits = [StageLimit(0, 3, "ZeRO has stages 0 to 3")]
    if zero.overrides:
        limits.append(StageLimit(1, 3, "training.zero.overrides is for DeepSpeed, which runs from stage 1 on"))
    if zero.offload_optimizer != "none":
        lowest = 3 if zero.offload_optimizer == "nvme" else 1
        limits.append(StageLimit(lowest, 3, f"training.zero.offload_optimizer is {zero.offload_optimizer}"))
    if zero.offload_parameters != "none":
        limits.append(StageLimit(3, 3, f"training.zero.offload_parameters is {zero.offload_parameters}"))
    if zero.copy_per_node is True:
        limits.append(StageLimit(3, 3, "training.zero.copy_per_node is true"))
    if training.compile:
        limits.append(StageLimit(0, 2, "training.compile is true, and the hooks of stage 3 would break the graph"))
    if training.optimizer in WITHOUT_SHARDS:
        because = f"training.optimizer is {training.optimizer}, {WITHOUT_SHARDS[training.optimizer]}"
        limits.append(StageLimit(0, 0, because, "training.optimizer to adamw"))
    if precision == "fp16" and training.divergence and training.divergence.policy == "skip":
        because = "training.divergence.policy is skip in fp16, where DeepSpeed lowers the loss scale with every update it skips"
        limits.append(StageLimit(0, 0, because))
    if precision == "fp16" and device == "cpu":
        limits.append(StageLimit(0, 0, "training.precision is fp16 on CPUs, for which DeepSpeed needs AVX512-FP16"))
    return limits
