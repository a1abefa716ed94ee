"""What trained weights, or updates of frozen ones, keep of the numbers that enter them, for their gradients. Pure."""

from dataclasses import dataclass
from functools import lru_cache

from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptByWeights:
    """What is kept in a layer that a backward pass runs through, on the average of these layers."""

    norms: float
    """Share of the norms that keep what they normalised, to train themselves in place."""
    readers: float
    """Linear layers that keep what they read from the stream, or whose updates do."""
    streams: float
    """How often that is kept where layers that read the same share it: before attention, and before the MLP."""
    ways_back: float | None
    """Share of the MLPs that keep what enters their last layer; None: what an adapter keeps of that counts elsewhere."""


@lru_cache(maxsize=4)
def kept_by_weights(trained: Trained, shape: ModelShape, keeps_all_inputs: bool) -> KeptByWeights:
    """What is kept in a layer of a model.

    Args:
        keeps_all_inputs: whether frozen linear layers keep their inputs too, as DeepSpeed's linear function of stage 3 does.
    """
    # All but the last of attention and of the MLP, if there is one beside experts, read from the stream.
    linear = [module.name for module in shape.layer if module.is_linear or module.kind == "router"]
    mlp = [module.name for module in shape.layer if module.kind == "mlp"]
    ways_back = mlp[-1:] if shape.intermediate > shape.expert_width else []
    attention = [module.name for module in shape.layer if module.kind == "attention"]
    readers = [name for name in linear if name not in (*ways_back, *attention[-1:])]
    norms = [module.name for module in shape.layer if module.kind == "norm"]
    layers = range(trained.lowest_layer, shape.num_layers)
    names = trained.whole if trained.is_base else {part.name for part in trained.parts}

    def is_kept(layer: int, name: str) -> bool:
        return (keeps_all_inputs and name in linear) or f"{shape.layers_name}.{layer}.{name}" in names

    def share(wanted: list[str]) -> float:
        """Of modules of such names, those that keep their inputs."""
        found = [is_kept(index, name) for index in layers for name in wanted]
        return sum(found) / len(found) if found else 1.0

    def any_share(wanted: list[str]) -> float:
        """Of layers, those in which one of such modules does."""
        found = [any(is_kept(index, name) for name in wanted) for index in layers]
        return sum(found) / len(found) if found else 1.0

    before_attention = [name for name in readers if name in attention]
    return KeptByWeights(
        norms=share(norms) if trained.is_base else 0.0,
        readers=len(readers) * share(readers),
        streams=any_share(before_attention) + any_share([name for name in readers if name not in before_attention]),
        ways_back=share(ways_back) if trained.is_base else None,
    )
