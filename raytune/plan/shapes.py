"""The shape of a model from its `config.json`: its modules, their names as transformers gives them, and every parameter counted.

Decoders whose layers are alike, dense or mixtures of experts. Another architecture is an entry in `_READERS`.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from raytune.errors import ModelError

DEMO = "demo"
"""Name of the model that ships with raytune, in configs and plans."""
DEMO_BASE = Path(__file__).parents[1] / "model" / "demo_base"

Kind = Literal["embedding", "attention", "mlp", "experts", "router", "norm", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module that holds weights."""

    name: str
    """As in the model's `named_modules()`; of a layer's module, the part behind the layer's number."""
    kind: Kind
    inputs: int
    """Width of the input; rows of an embedding. 1 for a norm."""
    outputs: int
    has_bias: bool = False
    copies: int = 1
    """Of experts, whose matrices are one parameter each: neither PEFT's nor bitsandbytes' linear layers."""
    copies_per_token: int = 1
    """Experts that a token passes through."""

    @property
    def is_linear(self) -> bool:
        return self.kind in ("attention", "mlp", "head")

    @property
    def num_biases(self) -> int:
        return self.outputs if self.has_bias else 0

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
    is_tied: bool
    """Whether the output head is the embedding."""
    scales_norms_in_fp32: bool = False
    """Whether norms multiply by their weight before they go back to 16 bits (Gemma)."""
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
        return counts | {"head": 0 if self.is_tied else self.head.num_parameters}

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters_by_kind.values())

    @property
    def num_biases(self) -> int:
        return sum(module.num_biases for module in self.modules())

    @property
    def num_product_weights(self) -> int:
        """Weights of the layers that a token is multiplied by."""
        in_products = [module for module in self.layer if module.kind in ("attention", "mlp", "experts", "router")]
        return self.num_layers * sum(module.copies_per_token * module.inputs * module.outputs for module in in_products)

    @property
    def num_quantizable(self) -> int:
        """Weights that bitsandbytes quantises: those of the linear layers without the head, and without biases."""
        return self.num_layers * sum(module.inputs * module.outputs for module in self.layer if module.is_linear)


def read_model_shape(base: str, revision: str | None = None, hub_cache: Path | None = None) -> ModelShape:
    """The shape of `model.base`: the demo model, a local folder, or a hub model that lies in the local cache. Never downloads.

    Args:
        base: as in the config.
        revision: branch, tag or commit of a hub model.
        hub_cache: Hugging Face's cache; default: where its libraries keep it.

    Raises:
        ModelError: if there is no `config.json`, or it is of an architecture that is not known here.
    """
    path = find_config(base, revision, hub_cache or default_hub_cache())
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"model.base {base!r}: {path} cannot be read as JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ModelError(f"model.base {base!r}: {path} does not hold a JSON object.")
    return model_shape(config, str(path))


def model_files(path: str) -> str:
    """What transformers is to open for `ModelPlan.path`: `demo` is wherever raytune lies on the machine that asks."""
    return str(DEMO_BASE) if path == DEMO else path


def default_hub_cache() -> Path:
    """Where huggingface_hub keeps models (its environment variables, in its order)."""
    if path := os.environ.get("HF_HUB_CACHE"):
        return Path(path).expanduser()
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(home).expanduser() / "hub"


def find_config(base: str, revision: str | None, hub_cache: Path) -> Path:
    """The path of a model's `config.json` on this machine.

    Raises:
        ModelError: if it is not here.
    """
    if base == DEMO:
        return DEMO_BASE / "config.json"
    folder = Path(base).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder / "config.json"
        raise ModelError(f"model.base: the folder {folder} has no config.json. Give the folder of a model saved by transformers.")
    repository = hub_cache / f"models--{base.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else (revision or "main")
    path = repository / "snapshots" / commit / "config.json"
    if path.is_file():
        return path
    raise ModelError(
        f"model.base {base!r}{f' at revision {revision!r}' if revision else ''} is neither a folder nor in the Hugging Face "
        f"cache {hub_cache}. Download it first (hf download {base}{f' --revision {revision}' if revision else ''}), or give a "
        f"local folder."
    )


def model_shape(config: Mapping[str, Any], source: str) -> ModelShape:
    """The shape that a parsed `config.json` describes.

    Args:
        config: its content.
        source: what to call it in messages.

    Raises:
        ModelError: if the architecture is not known, or a number is missing.
    """
    model_type = config.get("model_type")
    reader = _READERS.get(str(model_type))
    if reader is None:
        raise ModelError(
            f"{source}: raytune cannot plan a model of type {model_type!r} yet. It knows {', '.join(sorted(_READERS))}; "
            f"set model.base to one of these architectures."
            + (" A text-only checkpoint of this model would do." if "text_config" in config else "")
        )
    return reader(_Numbers(config, source))


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Typed access to a config's numbers."""

    config: Mapping[str, Any]
    source: str

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number. An absent key and null are the default."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(
                f"{self.source}: {key} must be a positive whole number, got {value!r}. Is this a complete model config?"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        return default if value is None else bool(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """How a relative of Llama differs from it. Defaults stand for what a config leaves out, as transformers 5.23 fills it in."""

    is_tied: bool = False
    input_bias: bool | None = False
    """Of queries, keys and values; None: the config's `attention_bias`."""
    output_bias: bool | None = False
    mlp_bias_key: str | None = None
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    has_head_norms: bool = False
    """Norms of queries and keys, per head."""
    is_fused: bool = False
    """One matrix for queries, keys and values, one for both branches of the MLP."""
    head_dim: int | None = None
    kv_heads: int | None = None
    max_positions: int
    num_experts: int = 0
    """0: the MLP is dense."""
    experts_per_token: int = 0
    expert_width: int | None = None
    """None: it is `intermediate_size`, else `moe_intermediate_size`."""
    shared_width: int | None = None
    """Of an expert that every token passes through."""


_GEMMA_2_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_LLAMA_LIKE = {
    "llama": _Family(input_bias=None, output_bias=None, mlp_bias_key="mlp_bias", max_positions=2048),
    "mistral": _Family(kv_heads=8, max_positions=131_072),
    "qwen2": _Family(input_bias=True, kv_heads=32, max_positions=32_768),
    "qwen3": _Family(input_bias=None, output_bias=None, has_head_norms=True, head_dim=128, kv_heads=32, max_positions=32_768),
    "gemma": _Family(is_tied=True, input_bias=None, output_bias=None, head_dim=256, kv_heads=16, max_positions=8192),
    "gemma2": _Family(
        is_tied=True, input_bias=None, output_bias=None, norms=_GEMMA_2_NORMS, head_dim=256, kv_heads=4, max_positions=8192
    ),
    "gemma3_text": _Family(
        is_tied=True,
        input_bias=None,
        output_bias=None,
        norms=_GEMMA_2_NORMS,
        has_head_norms=True,
        head_dim=256,
        kv_heads=4,
        max_positions=131_072,
    ),
    "phi3": _Family(is_fused=True, max_positions=4096),
    "mixtral": _Family(kv_heads=8, num_experts=8, experts_per_token=2, max_positions=131_072),
    "qwen2_moe": _Family(
        input_bias=True,
        kv_heads=16,
        num_experts=60,
        experts_per_token=4,
        expert_width=1408,
        shared_width=5632,
        max_positions=32_768,
    ),
    "qwen3_moe": _Family(
        input_bias=None,
        output_bias=None,
        has_head_norms=True,
        kv_heads=4,
        num_experts=128,
        experts_per_token=8,
        expert_width=768,
        max_positions=32_768,
    ),
}


def _llama_like(numbers: _Numbers) -> ModelShape:
    model_type = numbers.config["model_type"]
    family = _LLAMA_LIKE[model_type]
    hidden, intermediate = numbers.count("hidden_size"), numbers.count("intermediate_size")
    heads = numbers.count("num_attention_heads")
    # A key that says null means "as many as heads" everywhere; an absent one means what transformers' class has.
    absent_kv_heads = family.kv_heads if "num_key_value_heads" not in numbers.config else None
    kv_heads = numbers.count("num_key_value_heads", absent_kv_heads or heads)
    head_dim = numbers.count("head_dim", family.head_dim or hidden // heads)
    vocab = numbers.count("vocab_size")
    attention_bias = numbers.flag("attention_bias", False)
    input_bias = attention_bias if family.input_bias is None else numbers.flag("qkv_bias", family.input_bias)
    output_bias = attention_bias if family.output_bias is None else family.output_bias
    mlp_bias = family.mlp_bias_key is not None and numbers.flag(family.mlp_bias_key, False)

    def attention(name: str, inputs: int, outputs: int, has_bias: bool) -> Module:
        return Module(name=f"self_attn.{name}", kind="attention", inputs=inputs, outputs=outputs, has_bias=has_bias)

    def mlp(name: str, inputs: int, outputs: int) -> Module:
        return Module(name=f"mlp.{name}", kind="mlp", inputs=inputs, outputs=outputs, has_bias=mlp_bias)

    queries, keys = heads * head_dim, kv_heads * head_dim
    if family.is_fused:
        entering = [attention("qkv_proj", hidden, queries + 2 * keys, input_bias)]
        mlps = [mlp("gate_up_proj", hidden, 2 * intermediate), mlp("down_proj", intermediate, hidden)]
    else:
        widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        entering = [attention(name, hidden, width, input_bias) for name, width in widths.items()]
        mlps = [mlp(name, hidden, intermediate) for name in ("gate_proj", "up_proj")] + [mlp("down_proj", intermediate, hidden)]
    if family.num_experts:
        mlps, intermediate = _experts(numbers, family, hidden)
    head_norms = ("self_attn.q_norm", "self_attn.k_norm") if family.has_head_norms else ()
    return ModelShape(
        model_type=model_type,
        num_layers=numbers.count("num_hidden_layers"),
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        max_positions=numbers.count("max_position_embeddings", family.max_positions),
        has_gate=True,
        is_tied=numbers.flag("tie_word_embeddings", family.is_tied),
        scales_norms_in_fp32=model_type.startswith("gemma"),
        layers_name="model.layers",
        layer=(
            *entering,
            attention("o_proj", queries, hidden, output_bias),
            *(_norm(name, head_dim) for name in head_norms),
            *mlps,
            *(_norm(name, hidden) for name in family.norms),
        ),
        embeddings=(_embedding("model.embed_tokens", vocab, hidden),),
        final_norm=_norm("model.norm", hidden),
        head=_head(hidden, vocab),
    )


def _experts(numbers: _Numbers, family: _Family, hidden: int) -> tuple[list[Module], int]:
    """Router, experts and what they share, and the width of all that a token passes through.

    Raises:
        ModelError: if some layers have experts and others none.
    """
    if numbers.config.get("mlp_only_layers") or (numbers.config.get("decoder_sparse_step") or 1) != 1:
        raise ModelError(f"{numbers.source}: raytune plans a mixture of experts only if every layer has them.")
    num_experts = numbers.count("num_experts", numbers.count("num_local_experts", family.num_experts))
    per_token = numbers.count("num_experts_per_tok", family.experts_per_token)
    width = (
        numbers.count("moe_intermediate_size", family.expert_width) if family.expert_width else numbers.count("intermediate_size")
    )
    modules = [
        Module(name="mlp.gate", kind="router", inputs=hidden, outputs=num_experts),
        # Both branches and the way back: three matrices of an expert, in two parameters.
        Module(
            name="mlp.experts", kind="experts", inputs=hidden, outputs=3 * width, copies=num_experts, copies_per_token=per_token
        ),
    ]
    if not family.shared_width:
        return modules, per_token * width
    shared = numbers.count("shared_expert_intermediate_size", family.shared_width)
    sides = {"gate_proj": (hidden, shared), "up_proj": (hidden, shared), "down_proj": (shared, hidden)}
    modules += [
        Module(name=f"mlp.shared_expert.{name}", kind="mlp", inputs=inputs, outputs=outputs)
        for name, (inputs, outputs) in sides.items()
    ]
    modules += [Module(name="mlp.shared_expert_gate", kind="mlp", inputs=hidden, outputs=1)]
    return modules, per_token * width + shared


def _gpt2(numbers: _Numbers) -> ModelShape:
    hidden, heads, vocab = numbers.count("n_embd"), numbers.count("n_head"), numbers.count("vocab_size")
    intermediate = numbers.count("n_inner", 4 * hidden)
    positions = numbers.count("n_positions", 1024)
    return ModelShape(
        model_type="gpt2",
        num_layers=numbers.count("n_layer"),
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=vocab,
        max_positions=positions,
        has_gate=False,
        is_tied=numbers.flag("tie_word_embeddings", True),
        layers_name="transformer.h",
        layer=(
            _norm("ln_1", hidden, has_bias=True),
            Module(name="attn.c_attn", kind="attention", inputs=hidden, outputs=3 * hidden, has_bias=True),
            Module(name="attn.c_proj", kind="attention", inputs=hidden, outputs=hidden, has_bias=True),
            _norm("ln_2", hidden, has_bias=True),
            Module(name="mlp.c_fc", kind="mlp", inputs=hidden, outputs=intermediate, has_bias=True),
            Module(name="mlp.c_proj", kind="mlp", inputs=intermediate, outputs=hidden, has_bias=True),
        ),
        embeddings=(_embedding("transformer.wte", vocab, hidden), _embedding("transformer.wpe", positions, hidden)),
        final_norm=_norm("transformer.ln_f", hidden, has_bias=True),
        head=_head(hidden, vocab),
    )


def _gpt_neox(numbers: _Numbers) -> ModelShape:
    hidden, heads, vocab = numbers.count("hidden_size"), numbers.count("num_attention_heads"), numbers.count("vocab_size")
    intermediate = numbers.count("intermediate_size")
    attention_bias = numbers.flag("attention_bias", True)
    return ModelShape(
        model_type="gpt_neox",
        num_layers=numbers.count("num_hidden_layers"),
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=vocab,
        max_positions=numbers.count("max_position_embeddings", 2048),
        has_gate=False,
        is_tied=numbers.flag("tie_word_embeddings", False),
        layers_name="gpt_neox.layers",
        layer=(
            _norm("input_layernorm", hidden, has_bias=True),
            _norm("post_attention_layernorm", hidden, has_bias=True),
            Module(
                name="attention.query_key_value", kind="attention", inputs=hidden, outputs=3 * hidden, has_bias=attention_bias
            ),
            Module(name="attention.dense", kind="attention", inputs=hidden, outputs=hidden, has_bias=attention_bias),
            Module(name="mlp.dense_h_to_4h", kind="mlp", inputs=hidden, outputs=intermediate, has_bias=True),
            Module(name="mlp.dense_4h_to_h", kind="mlp", inputs=intermediate, outputs=hidden, has_bias=True),
        ),
        embeddings=(_embedding("gpt_neox.embed_in", vocab, hidden),),
        final_norm=_norm("gpt_neox.final_layer_norm", hidden, has_bias=True),
        head=_head(hidden, vocab),
    )


def _norm(name: str, width: int, *, has_bias: bool = False) -> Module:
    return Module(name=name, kind="norm", inputs=1, outputs=width, has_bias=has_bias)


def _embedding(name: str, rows: int, width: int) -> Module:
    return Module(name=name, kind="embedding", inputs=rows, outputs=width)


def _head(hidden: int, vocab: int) -> Module:
    return Module(name="lm_head", kind="head", inputs=hidden, outputs=vocab)


_READERS: dict[str, Callable[[_Numbers], ModelShape]] = {
    **dict.fromkeys(_LLAMA_LIKE, _llama_like),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
