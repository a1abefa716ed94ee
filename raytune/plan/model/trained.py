"""`Trained`: what a method trains of a model, and how, as a value. Memory, time, checkpoints and words ask only that."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from raytune.plan.model.shapes import Kind, ModelShape, Module

How = Literal["whole", "low rank", "product", "rotation", "scale", "network", "rows", "bias", "in front"]
"""Every parameter of a module, in place or as a copy beside the frozen one; a low-rank update beside it, or one that is another
product of small matrices; a rotation of its inputs; factors of what enters it, leaves it or runs beside it; a small network
behind it; rows of tokens; its bias. Of a module beside the base, what it makes virtual tokens of, in front of each document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPart:
    """A module, or a parameter outside of layers, of which something is trained."""

    name: str
    """Its full name in the model."""
    kind: Kind
    how: How
    num_parameters: int
    """That are trained, biases and magnitudes with them."""
    matrices: tuple[tuple[int, int], ...] = ()
    """Of these, sides of matrices of hidden layers: whole weights of linear layers, or both factors of their updates."""
    is_parameter: bool = False
    """Whether it is a parameter outside of layers, and not a module."""
    rate_scale: float = 1.0
    """What the learning rate is multiplied by (plan.update_groups)."""
    weight_decay: float | None = None
    """In place of the run's; None: the run's."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is trained, and what of fused experts is not, over a base in 4 bits."""

    parts: tuple[TrainedPart, ...]
    """In the model's order, each part of the model at most once in one way."""
    is_base: bool = False
    """Whether the base's own weights are trained, in place. Else they are frozen and what is trained comes on top."""
    lowest_layer: int
    """The lowest layer that a backward pass has to reach; the number of layers where only what follows them is trained."""
    num_sides: int
    """Rows and columns of all trained matrices."""
    reads_inputs: bool = False
    """Whether updates of layers compute with the layers' inputs, so that these are kept for the backward pass."""
    target_inputs: int = 0
    """Widths of the inputs that updates of layers compute with."""
    inner_width: int = 0
    """Numbers per token that updates of layers keep beside these inputs: low-rank ones as many as they have ranks."""
    width_in_16_bits: int = 0
    """Numbers per token that updates keep besides where products are in 16 bits: of a division by a tensor, torch 2.13 keeps what
    is divided then only."""
    scaled_inputs: int = 0
    """Widths of the inputs that are multiplied by trained factors, and kept in the dtype of these."""
    casts_inputs: bool = True
    """Whether what is trained computes with inputs in its own dtype."""
    changed_inputs: int = 0
    """Widths of the inputs that layers get changed: rotated or multiplied."""
    frozen_inputs: int = 0
    """Widths of what frozen matrices of updates read beside the layers' inputs, which nobody keeps below stage 3."""
    passing_ahead: int = 0
    """Numbers per token that pass in the dtype of what is trained, where this is not the layers', while the widest update is
    computed: casts of what it reads or gives, and sums of these. What is kept is not among them."""
    passing_back: int = 0
    """Numbers per token that pass so on the way back through it: gradients, and what these are made of."""
    passing_back_as_it_is: int = 0
    """Of these, as many as pass where the dtype is the layers' own."""
    num_made: int = 0
    """Numbers of matrices that layers make of what is trained in each pass, and keep for the backward pass: whole updates."""
    making_ahead: int = 0
    """Numbers that pass while the largest of an update's matrices are made, in the layers' dtype."""
    making_back: int = 0
    """Numbers that pass when their gradient is on the way back, in the dtype of what is trained."""
    num_applied: int = 0
    """Numbers of those of these matrices that tokens are multiplied by; 0: they are multiplied by what is trained itself."""
    making_flops: int = 0
    """Floating-point operations of making these matrices in a forward pass, and about as many of a backward pass, where they are
    many beside the layers' own."""
    num_constants: int = 0
    """Numbers that a method adds and does not train, in the weights' dtype; ZeRO-3 leaves them whole on every rank."""
    num_followed: int = 0
    """Trained numbers that a method follows from step to step: it has two averages of each in fp32, whole on every rank, and
    reads their whole gradients and values in each update."""
    drops_inputs: bool = False
    """Whether updates drop some of their inputs, and so keep what was dropped."""
    num_virtual: int = 0
    """Virtual tokens in front of each document, which what is trained makes."""
    lengthens_rows: bool = False
    """Whether these pass through the layers as other tokens do, and gradients through all of them; else only keys and values have
    them."""
    num_in_experts: int = 0
    """Of the trained parameters, those of updates of fused experts."""
    expert_rank: int = 0
    """Of an update of fused experts."""
    num_updated_per_layer: int = 0
    """Weights of fused experts that get an update, in one layer."""
    largest_updated: int = 0
    """Weights of the largest parameter among these."""
    num_packed: int = 0
    """Weights of fused experts that are held in 4 bits."""
    num_packed_per_layer: int = 0
    """Of these, in one layer."""
    largest_packed: int = 0
    """Weights of the largest parameter among these."""
    way_back_rate_scale: float | None = None
    """What the learning rate of a low-rank update's second matrix is multiplied by; None: it has that of the first."""
    embedding_rate: float | None = None
    """Peak rate of low-rank updates of embeddings; None: they have the rate of all."""

    def __hash__(self) -> int:
        """Cheap, for the caches of a plan, which meets few of these."""
        return hash((self.num_trainable, self.lowest_layer, len(self.parts)))

    @cached_property
    def num_trainable(self) -> int:
        """Parameters that are trained, an adapter's or the model's own."""
        return sum(part.num_parameters for part in self.parts)

    @cached_property
    def num_whole_embeddings(self) -> int:
        """Of the trained parameters, those of embeddings that are trained whole."""
        hows = ("whole", "in front")
        return sum(part.num_parameters for part in self.parts if part.how in hows and part.kind == "embedding")

    @property
    def matrices(self) -> Iterator[tuple[int, int]]:
        """Sides of matrices of hidden layers that are trained."""
        return (sides for part in self.parts for sides in part.matrices)

    @cached_property
    def num_in_matrices(self) -> int:
        """Trained parameters in these."""
        return sum(rows * columns for rows, columns in self.matrices)

    @cached_property
    def whole_norms(self) -> Counter[str]:
        """How many norms of each name are trained whole; names without the layer's number."""
        norms = (part.name for part in self.parts if part.how == "whole" and part.kind == "norm")
        return Counter(re.sub(r"\.\d+\.", ".", name, count=1) for name in norms)

    @cached_property
    def whole(self) -> frozenset[str]:
        """Names of the modules that are trained whole."""
        return frozenset(part.name for part in self.parts if part.how == "whole")


@lru_cache(maxsize=8)
def known(trained: Trained) -> Trained:
    """The first of those that are equal to it. By that one caches find what they have at once; by another they would compare all
    of its parts each time, and a comparison of machines makes hundreds."""
    return trained


def lowest_layer(names: Iterable[str], shape: ModelShape) -> int:
    """The lowest layer that a backward pass reaches which trains modules of these names; embeddings lie below the first."""
    after = {shape.final_norm.name, shape.head.name}
    return min((layer_of(name, shape) or 0 for name in names if name not in after), default=shape.num_layers)


def layer_of(name: str, shape: ModelShape) -> int | None:
    """The number of the layer that a module lies in; None: it lies in none."""
    rest = name.removeprefix(f"{shape.layers_name}.")
    return int(rest.partition(".")[0]) if rest != name else None


def num_sides(modules: Iterable[Module]) -> int:
    """Rows and columns of matrices that are trained whole, and the entries of what is no matrix."""
    return sum(module.inputs + module.outputs + module.num_biases for module in modules)


def whole_parts(modules: Iterable[Module]) -> list[TrainedPart]:
    """Modules that are trained whole, as parts."""
    return [whole_part(module, module.num_parameters) for module in modules]


def whole_part(module: Module, num_parameters: int) -> TrainedPart:
    """A module that is trained whole.

    Args:
        num_parameters: of its own; a tied head has no weights.
    """
    is_hidden = module.is_linear and module.kind != "head"
    matrices = ((module.outputs, module.inputs),) * is_hidden
    return TrainedPart(name=module.name, kind=module.kind, how="whole", num_parameters=num_parameters, matrices=matrices)
