"""What a plan knows of a model: its modules, their names as transformers gives them, and every parameter counted."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

Kind = Literal["embedding", "attention", "mlp", "experts", "router", "norm", "head"]


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

    @property
    def is_linear(self) -> bool:
        return self.kind in ("attention", "mlp", "head") or self.is_linear_layer

    @property
    def num_parameters(self) -> int:
        return self.copies * self.inputs * self.outputs + self.num_biases


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
    """Modules of one layer; all layers are alike."""
    embeddings: tuple[Module, ...]
    final_norm: Module
    head: Module

    def modules(self) -> Iterator[Module]:
        """Every module under its full name, with a tied head, which holds no weights of its own."""
        yield from self.embeddings
        for index in range(self.num_layers):
            for module in self.layer:
                yield replace(module, name=f"{self.layers_name}.{index}.{module.name}")
        yield self.final_norm
        yield self.head

    @property
    def parameters_by_kind(self) -> dict[str, int]:
        """Parameters of each kind of module; a tied head has none. Biases count with their module."""
        counts: dict[str, int] = dict.fromkeys(get_args(Kind), 0)
        for module in (*self.embeddings, self.final_norm):
            counts[module.kind] += module.num_parameters
        for module in self.layer:
            counts[module.kind] += self.num_layers * module.num_parameters
        return counts | {"head": self.head.num_biases if self.is_tied else self.head.num_parameters}

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters_by_kind.values())

    @property
    def num_biases(self) -> int:
        return sum(module.num_biases for module in self.modules())

    @property
    def expert_width(self) -> int:
        """Width of what a token passes through in experts; 0 without experts."""
        ways_back = ((module, module.matrices[-1]) for module in self.layer if module.kind == "experts")
        return sum(module.copies_per_token * way_back.inputs for module, way_back in ways_back)

    @property
    def num_product_weights(self) -> int:
        """Weights of the layers that a token is multiplied by."""
        in_products = [module for module in self.layer if module.kind in ("attention", "mlp", "experts", "router")]
        return self.num_layers * sum(module.copies_per_token * module.inputs * module.outputs for module in in_products)

    @property
    def num_quantizable(self) -> int:
        """Weights that bitsandbytes quantises: those of the linear layers without the head, and without biases."""
        return self.num_layers * sum(module.inputs * module.outputs for module in self.layer if module.is_linear)
