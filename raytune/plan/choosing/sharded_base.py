"""Whether workers divide the layers of a frozen base, while what is trained lies whole on each (model.sharded_base). Pure."""

from raytune.config.sections.run import RunConfig
from raytune.errors import PlanError
from raytune.plan.choosing.requirements import Device
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.stage_limit import StageLimit
from raytune.plan.model.trained import Trained, layer_of
from raytune.plan.run_plan import ZeroStage

KEY = "training.shard_base"

Sharding = tuple[ZeroStage, bool]
"""What ZeRO shards, and whether the layers of a frozen base are divided without it."""


def limits_of_base(config: RunConfig, workers: int) -> list[StageLimit]:
    """ZeRO stages that a base leaves which is divided whatever fits."""
    if config.training.shard_base is not True or workers == 1:
        return []
    because = f"{KEY} is true, with what is trained whole on every worker"
    return [StageLimit(0, 0, because, f"{KEY} to auto")]


def shardings_of(
    stages: list[ZeroStage],
    config: RunConfig,
    trained: Trained,
    shape: ModelShape,
    of_method: list[StageLimit],
    device: Device,
    workers: int,
) -> list[Sharding]:
    """Ways to divide a run, of equal or less memory each; the fastest comes first.

    Args:
        stages: that the settings leave, lowest first.
        trained: by the end of the run.
        of_method: ZeRO stages that the method and a quantised base leave.

    Raises:
        PlanError: if the base is to be divided and cannot be.
    """
    asked = config.training.shard_base
    whole: list[Sharding] = [(stage, False) for stage in stages]
    if asked is False or workers == 1:
        return whole
    why = _why_whole(config, trained, shape, of_method)
    if asked is True:
        if why:
            raise PlanError(f"{KEY} is true, but {why}. Set {KEY} to auto.", keys=(KEY,))
        return [(0, True)]
    if why or 0 not in stages or device != "cpu":
        return whole
    return [*(way for way in whole if way[0] < 3), (0, True), *(way for way in whole if way[0] == 3)]


def _why_whole(config: RunConfig, trained: Trained, shape: ModelShape, of_method: list[StageLimit]) -> str:
    """Why a base cannot be divided, after "but"; empty: it can."""
    if trained.is_base:
        return f"adapter.method {config.adapter.method} trains the base itself, which training.zero.stage 3 divides"
    changed = next(
        (part for part in trained.parts if part.how in ("whole", "bias") and layer_of(part.name, shape) is not None), None
    )
    if changed:
        return f"weights of the base are trained in its layers ({changed.name}), which training.zero.stage 3 divides"
    limit = next((limit for limit in of_method if limit.highest < 3), None)
    if limit:
        return limit.because
    if config.training.compile:
        return "training.compile is true, and a graph would not wait for weights"
    if config.model.trust_remote_code:
        return "model.trust_remote_code is true, and code of its own may read weights of a layer past its forward pass"
    return ""


def base_reasons(config: RunConfig, *, is_sharded: bool, workers: int) -> list[str]:
    """Why layers are divided, or are not though that was asked for, in sentences."""
    asked = config.training.shard_base
    if asked is True and not is_sharded:
        return [f"{KEY} is true, but one worker has nobody to divide the base with: it lies whole on it."]
    if asked == "auto" and is_sharded:
        return [
            f"{KEY} is true: the frozen base does not fit whole, so that {workers} workers divide its layers and bring one after "
            f"the other together; what is trained lies whole on each."
        ]
    return []
