"""What a plan knows of a model: its modules, their names as transformers gives them, and every parameter counted."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from raytune.config.sections.model import Attention

Kind = Literal["embedding", "attention", "mlp", "mixer", "experts", "router", "state", "norm", "head"]
"""`mixer`: linear layers around a state that runs along the document; `state`: that state's own convolutions and parameters,
or those that another module has beside the modules that it holds (sinks of attention)."""
LINEAR_KINDS: tuple[Kind, ...] = ("attention", "mlp", "mixer")
"""Kinds of a layer's linear layers: groups of targets take them in, and bitsandbytes packs them. Fused experts are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix that every expert has. Those of all experts are one parameter with three dimensions."""

    name: str
    """Of that parameter, in its module."""
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module that holds weights."""

    name: str
    """As in the model's `named_modules()`; of a layer's module, the part behind the layer's number."""
    kind: Kind
    inputs: int
    """Width of the input; rows of an embedding. 1 for a norm."""
    outputs: int
    num_biases: int = 0
    copies: int = 1
    """Of experts, whose matrices are one parameter each: neither PEFT's nor bitsandbytes' linear layers."""
    copies_per_token: int = 1
    """Experts that a token passes through."""
    matrices: tuple[Matrix, ...] = ()
    """Of an expert; with `inputs` and `outputs` as if they lay beside each other."""
    is_linear_layer: bool = False
    """Of a router: whether it is a linear layer, which bitsandbytes quantises, or a matrix of its own."""
    is_turned: bool = False
    """Of a linear layer: whether its weight has a row per input (transformers' Conv1D)."""
    is_bypassed: bool = False
    """Of a linear layer or a norm: whether the model reads its weight past it, for a kernel, so that neither an update nor
    packed numbers would be seen."""

    @property
    def is_linear(self) -> bool:
        return self.kind in (*LINEAR_KINDS, "head") or self.is_linear_layer

    @property
    def expert_width(self) -> int:
        """Width of what a token passes through in experts; 0 of other modules."""
        return self.copies_per_token * self.matrices[-1].inputs if self.matrices else 0

    @property
    def num_parameters(self) -> int:
        return self.copies * self.inputs * self.outputs + self.num_biases


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions as a base's config has them."""

    kind: str
    """As transformers names it (`rope_type`), or words for what has no such name."""
    factor: float = 1.0
    original: int | None = None
    """Positions before it was scaled, where its config says that apart from those that it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Everything that the plan asks about a model."""

    model_type: str
    num_layers: int
    hidden: int
    intermediate: int
    """Width of what a token passes through in the MLP: of all its experts together."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    rope: Rope | None = None
    """None: positions are not rotary."""
    has_gate: bool
    """Whether the MLP multiplies two branches (SwiGLU, GeGLU)."""
    activation: str
    """The MLP's, by transformers' name (`ACT2FN`)."""
    is_tied: bool
    """Whether the output head is the embedding."""
    scales_norms_in_fp32: bool = False
    """Whether norms multiply by their weight before they go back to 16 bits (Gemma)."""
    names_of_experts: tuple[str, ...] = ()
    """Last parts of names that PEFT takes for those of fused experts, so that no linear layer of such a name can be a target."""
    layers_name: str
    layer: tuple[Module, ...]
    """Modules of one layer; all layers are alike, unless `other_layers` says which are not."""
    other_layers: tuple[tuple[Module, ...], ...] = ()
    """Modules of layers of other kinds."""
    kind_of_layer: tuple[int, ...] = ()
    """Of each layer: 0 for `layer`, else the place in `other_layers`, from 1. Empty: all are alike."""
    state_width: int = 0
    """Numbers per token that a layer with a state computes around it; 0 without such layers."""
    why_lone: str = ""
    """Why a forward pass may hold one document only; empty: documents can share a row."""
    lone_attention: tuple[Attention, ...] = ()
    """Kinds of attention that such a model has, the best first."""
    embeddings: tuple[Module, ...]
    final_norm: Module
    head: Module
    new_tokens: tuple[str, ...] = ()
    """Texts of the tokens that `model.new_tokens` adds, for which the counts above have rows."""
    added_rows: int = 0
    """Rows of the embedding that the base's files do not have."""
    new_rows: int = 0
    """These, and those that the new tokens take of the base's own, which had no token."""
    dropouts: tuple[tuple[str, str], ...] = ()
    """Kinds of `model.dropout` that the architecture has, each with its key in the base's config."""
    stored_quantization: dict[str, Any] | None = field(default=None, hash=False)
    """What `config.json` says of weights that are stored quantised (plan.stored_quantization)."""

    def modules(self) -> Iterator[Module]:
        """Every module under its full name, with a tied head, which holds no weights of its own."""
        return iter(_all_modules(self))

    def layers(self) -> Iterator[tuple[Module, ...]]:
        """The modules of each layer, first to last."""
        kinds = (self.layer, *self.other_layers)
        yield from (kinds[kind] for kind in self.kind_of_layer or (0,) * self.num_layers)

    def name_in_layer(self, name: str) -> str:
        """The part of a full name behind the layer's number; empty for what lies in no layer."""
        rest = name.removeprefix(f"{self.layers_name}.")
        return rest.partition(".")[2] if rest != name else ""

    def counted_layers(self) -> Iterator[tuple[tuple[Module, ...], int]]:
        """The modules of each kind of layer, and how many layers are of that kind."""
        kinds = (self.layer, *self.other_layers)
        if not self.kind_of_layer:
            yield self.layer, self.num_layers
        else:
            yield from ((kinds[kind], count) for kind, count in Counter(self.kind_of_layer).items())

    @property
    def parameters_by_kind(self) -> dict[str, int]:
        """Parameters of each kind of module; a tied head has none. Biases count with their module."""
        counts: dict[str, int] = dict.fromkeys(get_args(Kind), 0)
        for module in (*self.embeddings, self.final_norm):
            counts[module.kind] += module.num_parameters
        for layer, count in self.counted_layers():
            for module in layer:
                counts[module.kind] += count * module.num_parameters
        return counts | {"head": self.head.num_biases if self.is_tied else self.head.num_parameters}

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters_by_kind.values())

    @property
    def num_biases(self) -> int:
        around = sum(module.num_biases for module in (*self.embeddings, self.final_norm, self.head))
        return around + sum(count * module.num_biases for layer, count in self.counted_layers() for module in layer)

    @property
    def expert_width(self) -> int:
        """Width of what a token passes through in experts; 0 without experts."""
        return max(sum(module.expert_width for module in layer) for layer in (self.layer, *self.other_layers))

    @property
    def num_product_weights(self) -> int:
        """Weights of the layers that a token is multiplied by."""
        kinds = (*LINEAR_KINDS, "experts", "router")
        return sum(
            count * module.copies_per_token * module.inputs * module.outputs
            for layer, count in self.counted_layers()
            for module in layer
            if module.kind in kinds
        )

    @property
    def num_quantizable(self) -> int:
        """Weights that bitsandbytes quantises: those of the linear layers without the head, and without biases."""
        return sum(
            count * module.inputs * module.outputs
            for layer, count in self.counted_layers()
            for module in layer
            if module.is_linear
        )


@lru_cache(maxsize=4)
def _all_modules(shape: ModelShape) -> tuple[Module, ...]:  # asked for about ten times by a plan
    inside = (
        replace(module, name=f"{shape.layers_name}.{index}.{module.name}")
        for index, layer in enumerate(shape.layers())
        for module in layer
    )
    return (*shape.embeddings, *inside, shape.final_norm, shape.head)
