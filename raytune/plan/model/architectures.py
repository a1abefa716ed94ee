"""The shape that a `config.json` describes, for the architectures that people fine-tune most. Pure; nothing is built.

Decoders whose layers are alike, dense or mixtures of experts. Another architecture is an entry in `_READERS`; without one,
`base_model` has transformers build the model on the meta device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raytune.errors import ModelError
from raytune.plan.model.rope import own_positions, own_rope
from raytune.plan.model.shapes import Matrix, ModelShape, Module

_SHOWN = 60


def has_reader(config: Mapping[str, Any]) -> bool:
    """Whether `model_shape` knows the architecture of a parsed `config.json`."""
    return config.get("model_type") in _READERS


def model_shape(config: Mapping[str, Any], source: str) -> ModelShape:
    """The shape that a parsed `config.json` describes.

    Args:
        config: its content.
        source: what to call it in messages.

    Raises:
        ModelError: if the architecture is not known, or a number is missing.
    """
    model_type = str(config.get("model_type"))
    if model_type not in _READERS:
        raise ModelError(f"{source} is of a model of type {model_type!r}; known are {', '.join(sorted(_READERS))}.")
    return _READERS[model_type](_Numbers(config, source))


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Typed access to a config's values."""

    config: Mapping[str, Any]
    source: str

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number. An absent key and null are the default."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            written = repr(value)
            shown = written if len(written) <= _SHOWN else f"{written[:_SHOWN]}..."
            raise ModelError(
                f"{self.source}: {key} must be a positive whole number, got {shown}. Is this a complete model config?"
            )
        return value

    def divided(self, key: str, whole: int, parts_key: str, parts: int) -> int:
        """A number that others share evenly."""
        if whole % parts:
            raise ModelError(f"{self.source}: {key} is {whole}, which {parts_key} {parts} does not divide.")
        return whole // parts

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        return default if value is None else bool(value)

    def name(self, *keys: str, default: str) -> str:
        """Of the first key that is set."""
        return next((str(value) for key in keys if (value := self.config.get(key))), default)


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
    names_of_experts: tuple[str, ...] = ()
    """As of `ModelShape`."""
    other_dropouts: tuple[tuple[str, str], ...] = ()
    """As `dropouts` of `ModelShape`, besides that of attention."""


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
    "phi3": _Family(is_fused=True, other_dropouts=(("hidden", "resid_pdrop"),), max_positions=4096),
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
        names_of_experts=("down_proj", "gate", "gate_proj", "up_proj"),
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
    numbers.divided("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    head_dim = numbers.config.get("head_dim") or family.head_dim
    head_dim = numbers.count("head_dim", head_dim or numbers.divided("hidden_size", hidden, "num_attention_heads", heads))
    vocab = numbers.count("vocab_size")
    attention_bias = numbers.flag("attention_bias", False)
    input_bias = attention_bias if family.input_bias is None else numbers.flag("qkv_bias", family.input_bias)
    output_bias = attention_bias if family.output_bias is None else family.output_bias
    mlp_bias = family.mlp_bias_key is not None and numbers.flag(family.mlp_bias_key, False)

    def attention(name: str, inputs: int, outputs: int, has_bias: bool) -> Module:
        return Module(name=f"self_attn.{name}", kind="attention", inputs=inputs, outputs=outputs, num_biases=outputs * has_bias)

    def mlp(name: str, inputs: int, outputs: int) -> Module:
        return Module(name=f"mlp.{name}", kind="mlp", inputs=inputs, outputs=outputs, num_biases=outputs * mlp_bias)

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
    rope = own_rope(numbers.config)
    return ModelShape(
        model_type=model_type,
        num_layers=numbers.count("num_hidden_layers"),
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        max_positions=own_positions(rope, numbers.count("max_position_embeddings", family.max_positions)),
        rope=rope,
        has_gate=True,
        activation=numbers.name("hidden_activation", "hidden_act", default="silu"),
        is_tied=numbers.flag("tie_word_embeddings", family.is_tied),
        scales_norms_in_fp32=model_type.startswith("gemma"),
        names_of_experts=family.names_of_experts,
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
        dropouts=(("attention", "attention_dropout"), *family.other_dropouts),
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
        Module(
            name="mlp.experts",
            kind="experts",
            inputs=hidden,
            outputs=3 * width,
            copies=num_experts,
            copies_per_token=per_token,
            matrices=(
                Matrix(name="gate_up_proj", inputs=hidden, outputs=2 * width),
                Matrix(name="down_proj", inputs=width, outputs=hidden),
            ),
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
        head_dim=numbers.divided("n_embd", hidden, "n_head", heads),
        vocab=vocab,
        max_positions=positions,
        has_gate=False,
        activation=numbers.name("activation_function", default="gelu_new"),
        is_tied=numbers.flag("tie_word_embeddings", True),
        layers_name="transformer.h",
        layer=(
            _norm("ln_1", hidden, has_bias=True),
            Module(
                name="attn.c_attn", kind="attention", inputs=hidden, outputs=3 * hidden, num_biases=3 * hidden, is_turned=True
            ),
            Module(name="attn.c_proj", kind="attention", inputs=hidden, outputs=hidden, num_biases=hidden, is_turned=True),
            _norm("ln_2", hidden, has_bias=True),
            Module(name="mlp.c_fc", kind="mlp", inputs=hidden, outputs=intermediate, num_biases=intermediate, is_turned=True),
            Module(name="mlp.c_proj", kind="mlp", inputs=intermediate, outputs=hidden, num_biases=hidden, is_turned=True),
        ),
        embeddings=(_embedding("transformer.wte", vocab, hidden), _embedding("transformer.wpe", positions, hidden)),
        final_norm=_norm("transformer.ln_f", hidden, has_bias=True),
        head=_head(hidden, vocab),
        dropouts=(("attention", "attn_pdrop"), ("hidden", "resid_pdrop"), ("embedding", "embd_pdrop")),
    )


def _gpt_neox(numbers: _Numbers) -> ModelShape:
    hidden, heads, vocab = numbers.count("hidden_size"), numbers.count("num_attention_heads"), numbers.count("vocab_size")
    intermediate = numbers.count("intermediate_size")
    bias = hidden if numbers.flag("attention_bias", True) else 0
    rope = own_rope(numbers.config)
    return ModelShape(
        model_type="gpt_neox",
        num_layers=numbers.count("num_hidden_layers"),
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=heads,
        head_dim=numbers.divided("hidden_size", hidden, "num_attention_heads", heads),
        vocab=vocab,
        max_positions=own_positions(rope, numbers.count("max_position_embeddings", 2048)),
        rope=rope,
        has_gate=False,
        activation=numbers.name("hidden_act", default="gelu"),
        is_tied=numbers.flag("tie_word_embeddings", False),
        layers_name="gpt_neox.layers",
        layer=(
            _norm("input_layernorm", hidden, has_bias=True),
            _norm("post_attention_layernorm", hidden, has_bias=True),
            Module(
                name="attention.query_key_value",
                kind="attention",
                inputs=hidden,
                outputs=3 * hidden,
                num_biases=3 * bias,
            ),
            Module(name="attention.dense", kind="attention", inputs=hidden, outputs=hidden, num_biases=bias),
            Module(name="mlp.dense_h_to_4h", kind="mlp", inputs=hidden, outputs=intermediate, num_biases=intermediate),
            Module(name="mlp.dense_4h_to_h", kind="mlp", inputs=intermediate, outputs=hidden, num_biases=hidden),
        ),
        embeddings=(_embedding("gpt_neox.embed_in", vocab, hidden),),
        final_norm=_norm("gpt_neox.final_layer_norm", hidden, has_bias=True),
        head=_head(hidden, vocab),
        dropouts=(("attention", "attention_dropout"), ("hidden", "hidden_dropout")),
    )


def _norm(name: str, width: int, *, has_bias: bool = False) -> Module:
    return Module(name=name, kind="norm", inputs=1, outputs=width, num_biases=width * has_bias)


def _embedding(name: str, rows: int, width: int) -> Module:
    return Module(name=name, kind="embedding", inputs=rows, outputs=width)


def _head(hidden: int, vocab: int) -> Module:
    return Module(name="lm_head", kind="head", inputs=hidden, outputs=vocab)


_READERS: dict[str, Callable[[_Numbers], ModelShape]] = {
    **dict.fromkeys(_LLAMA_LIKE, _llama_like),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
