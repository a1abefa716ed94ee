"""Prefix tuning in a plan: keys and values of virtual tokens in each layer, and which models have room for them."""

from raytune.config.sections.adapter import PrefixTuningAdapter
from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.errors import ModelError, UserError
from raytune.plan.defaults import adapter_epochs
from raytune.plan.methods.in_front import frozen_experts, rate_in_front, trained_in_front, words_in_front
from raytune.plan.methods.method import Method
from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import Trained

KEYS, VALUES = ("k_proj", "key", "key_proj", "k_lin"), ("v_proj", "value", "value_proj", "v_lin")
"""Last parts of names of layers that give keys, and values."""
KNOWS_KEY_HEADS = "qkv_proj"
"""The fused matrix of models of whose fewer heads of keys PEFT knows."""


def _trained(adapter: PrefixTuningAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    keys = shape.kv_heads * shape.head_dim
    made = 2 * shape.num_layers * keys
    if not adapter.projection:
        return trained_in_front(adapter, shape, quantization, embedding=made, lengthens_rows=False)
    width = keys if adapter.encoder_hidden_size == "auto" else adapter.encoder_hidden_size
    layers = [("transform.0", keys, width), ("transform.2", width, made)]
    return trained_in_front(adapter, shape, quantization, embedding=keys, layers=layers, lengthens_rows=False)


def _check(adapter: PrefixTuningAdapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    """Refuse what has no keys in front of documents.

    Raises:
        UserError: (or ModelError) with the setting that works.
    """
    others = "Set adapter.method to prompt_tuning or lora"
    if config.training.gradient_checkpointing is True:
        raise UserError(
            "training.gradient_checkpointing is true, but adapter.method is prefix_tuning, whose keys and values come to the "
            "layers in a cache, which transformers takes away from layers that compute again. Set it to false or auto, or "
            "adapter.method to prompt_tuning or lora.",
            keys=("training.gradient_checkpointing", "adapter.method"),
        )
    if shape.why_lone:
        raise ModelError(
            f"{shape.why_lone}, and adapter.method prefix_tuning is there for models whose documents can share one. {others}."
        )
    odd = next((layer for layer in shape.layers() if not _has_keys(layer, shape)), None)
    if odd is not None:
        raise ModelError(
            f"adapter.method prefix_tuning gives every layer keys and values of {shape.kv_heads} heads of {shape.head_dim}, as "
            f"PEFT does, but this {shape.model_type} model has layers that compute with others "
            f"({', '.join(one.name for one in odd if one.kind == 'attention') or 'without attention'}). {others}."
        )
    if adapter.encoder_hidden_size != "auto" and not adapter.projection:
        raise UserError(
            f"adapter.encoder_hidden_size is {adapter.encoder_hidden_size}, but adapter.projection is false, and so there is no "
            f"encoder. Set adapter.projection to true, or leave it out.",
            keys=("adapter.encoder_hidden_size", "adapter.projection"),
        )


def _has_keys(layer: tuple[Module, ...], shape: ModelShape) -> bool:
    """Whether a layer's keys and values are as wide as PEFT takes them to be."""
    width = shape.kv_heads * shape.head_dim
    outputs = {module.name.rpartition(".")[2]: module.outputs for module in layer if module.kind == "attention"}
    keys, values = ([outputs[name] for name in names if name in outputs] for names in (KEYS, VALUES))
    if keys or values:
        return keys == values == [width]
    fused = [name for name, out in outputs.items() if out == shape.heads * shape.head_dim + 2 * width]
    return any(name == KNOWS_KEY_HEADS or shape.kv_heads == shape.heads for name in fused)


METHOD = Method(
    trained=_trained,
    check=_check,
    in_words=words_in_front("in front of each document's keys and values"),
    expert_notes=frozen_experts,
    # PEFT's comparison of methods (method_comparison/MetaMathQA, Llama 3.2 3B) takes 5e-3 with a start at 0.
    learning_rate=rate_in_front(25),
    epochs=adapter_epochs,
    weight_decay=0.0,
    recomputes=False,
    when="generation with a base that is shared by many: learns more than prompts; activations are not recomputed",
)
