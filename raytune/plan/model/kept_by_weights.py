"""What trained weights, or updates of frozen ones, keep of the numbers that enter them, for their gradients. Pure."""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import Trained, TrainedPart, layer_of


class Place(IntEnum):
    """Where something of a layer is, in the order of a forward pass."""

    ATTENTION = 0
    WAY_OUT = 1
    """The last layer of attention, behind it."""
    MLP = 2
    WAY_BACK = 3
    """The last layer of an MLP, behind its branches."""


@lru_cache(maxsize=4)
def lowest_place(trained: Trained, shape: ModelShape) -> Place:
    """Where the lowest layer in which something is trained begins with that."""
    lowest = [part for part in trained.parts if layer_of(part.name, shape) == trained.lowest_layer]
    return min((_place(part, shape) for part in lowest), default=Place.ATTENTION)


def _place(module: Module | TrainedPart, shape: ModelShape) -> Place:
    ways_out = [f".{module.name}" for module in shape.layer if module.kind == "attention"][-1:]
    ways_back = [f".{module.name}" for module in shape.layer if module.kind == "mlp"][-1:]
    name = f".{module.name}"
    if module.kind in ("mlp", "experts", "router"):
        return Place.WAY_BACK if name.endswith(tuple(ways_back)) else Place.MLP
    return Place.WAY_OUT if name.endswith(tuple(ways_out)) else Place.ATTENTION


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptByWeights:
    """What is kept in a layer that a backward pass runs through, on the average of these layers."""

    norms: float
    """Share of the norms that keep what they normalised, to train themselves in place."""
    readers: float
    """Linear layers that keep what they read from the stream, or whose updates do."""
    streams: float
    """How often that is kept where layers that read the same share it: before attention, and before the MLP."""
    ways_out: float
    """Share of attentions that keep what enters their last layer, or whose updates do."""
    ways_back: float
    """Share of such MLPs."""


@lru_cache(maxsize=4)
def kept_by_weights(trained: Trained, shape: ModelShape, keeps_all_inputs: bool, begins_at: Place) -> KeptByWeights:
    """What is kept in a layer of a model.

    Args:
        keeps_all_inputs: whether frozen linear layers keep their inputs too, as DeepSpeed's linear function of stage 3 does.
        begins_at: where a backward pass ends in the lowest of these layers.
    """
    # All but the last of attention and of the MLP, if there is one beside experts, read from the stream.
    linear = [module.name for module in shape.layer if module.is_linear or module.kind == "router"]
    places = {module.name: _place(module, shape) for module in shape.layer}
    has_mlp = shape.intermediate > shape.expert_width
    ways_back = [name for name, place in places.items() if place is Place.WAY_BACK and has_mlp]
    ways_out = [name for name, place in places.items() if place is Place.WAY_OUT]
    attention = [module.name for module in shape.layer if module.kind == "attention"]
    readers = [name for name in linear if name not in (*ways_back, *ways_out)]
    norms = [module.name for module in shape.layer if module.kind == "norm"]
    layers = range(trained.lowest_layer, shape.num_layers)
    names = trained.whole if trained.is_base else {part.name for part in trained.parts}

    def is_kept(layer: int, name: str) -> bool:
        is_reached = layer > trained.lowest_layer or places[name] >= begins_at
        return (keeps_all_inputs and is_reached and name in linear) or f"{shape.layers_name}.{layer}.{name}" in names

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
        ways_out=share(ways_out),
        ways_back=share(ways_back),
    )
