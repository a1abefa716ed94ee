"""Which attention a machine and a model have, and what to hand to it so that the documents of a packed row do not see each other.

`varlen` and the dense kinds are ours (`packed_attention`); transformers calls FlashAttention's packages and flex attention.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from raytune.config.sections.model import Attention
from raytune.data.batches.batches import Batch
from raytune.data.batches.in_front import document_of, longer
from raytune.errors import ModelError
from raytune.model.attention.packed_attention import DENSE, IN_STEPS, VARLEN
from raytune.plan.choosing.attention_kinds import FLASH_2, FLASH_3, AttentionOption, attention_kinds

# Shapes: H heads, T tokens of all documents, L tokens of one document, D head width.

# Layers whose documents can be told apart by positions alone. State-space, linear and convolution layers carry state across.
SEPARABLE_LAYERS = {"full_attention", "sliding_attention", "attention", "mlp", "moe"}


def available_attention(device: torch.device, dtype: torch.dtype) -> list[AttentionOption]:
    """What this machine can compute attention with, the kinds that work first, in order of preference.

    Args:
        device: where the model computes.
        dtype: dtype of its products.
    """
    installed = {FLASH_3: is_flash_attn_3_available(), FLASH_2: is_flash_attn_2_available()}
    return attention_kinds(
        torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        frozenset(name for name, is_there in installed.items() if is_there),
        is_16_bit=dtype in (torch.bfloat16, torch.float16),
    )


def check_attention(
    model_class: type[PreTrainedModel], config: PretrainedConfig, attention: Attention, *, packs: bool = True
) -> None:
    """Refuse a model whose documents would leak into each other, or that cannot use this kind of attention.

    Args:
        packs: whether documents share rows; else each forward pass has one.

    Raises:
        ModelError: naming the kinds that do work for this model, if any.
    """
    obstacle = packing_obstacle(model_class, config)
    if obstacle and packs:
        raise ModelError(f"{obstacle}. Set data.packing to none, so that each forward pass has one document.")
    usable = lone_attention(model_class) if obstacle else _usable(model_class, config)
    if attention not in usable:
        raise ModelError(
            f"{model_class.__name__} cannot use model.attention: {attention}. Set model.attention to {' or '.join(usable)}."
        )


def packing_obstacle(model_class: type[PreTrainedModel], config: PretrainedConfig) -> str | None:
    """Why documents in one row would leak into each other, whichever kernel computes attention; None if they would not."""
    if keeps_state(model_class, config):
        foreign = sorted(_foreign_layers(config))
        layers = f"layers of type {', '.join(foreign)}" if foreign else "recurrent layers"
        return f"{model_class.__name__} has {layers}, which carry state from one document of a packed row into the next"
    if not _usable(model_class, config):
        return f"{model_class.__name__} has no attention that could keep the documents of a packed row apart"
    return None


def keeps_state(model_class: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Whether some layers carry a state along the row instead of attending."""
    return bool(getattr(model_class, "_is_stateful", False) or _foreign_layers(config))


def _foreign_layers(config: PretrainedConfig) -> set[str]:
    return {*(getattr(config.get_text_config(), "layer_types", None) or [])} - SEPARABLE_LAYERS


def lone_attention(model_class: type[PreTrainedModel]) -> list[Attention]:
    """Kinds that transformers itself computes for this architecture, for documents that are alone in their rows."""
    kinds: dict[Attention, bool] = {
        "flash_attention_3": bool(model_class._supports_flash_attn),
        "flash_attention_2": bool(model_class._supports_flash_attn),
        "sdpa": bool(model_class._supports_sdpa),
        "eager": True,
    }
    return [kind for kind, supported in kinds.items() if supported]


def _usable(model_class: type[PreTrainedModel], config: PretrainedConfig) -> list[Attention]:
    return [name for name, supported in _support(model_class, config.get_text_config()).items() if supported]


def _support(model_class: type[PreTrainedModel], config: PretrainedConfig) -> dict[Attention, bool]:
    """Which kinds this architecture can use, by transformers' own account of it."""
    # Positions restart with each document, so the model must take them, and not have biases of its own for distance (alibi).
    takes_positions = "position_ids" in inspect.signature(model_class.forward).parameters and not getattr(config, "alibi", False)
    packs = model_class.is_backend_compatible() and takes_positions
    has_window = any(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or []) or (
        getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    )
    has_flash = packs and bool(model_class._supports_flash_attn)
    return {
        "varlen": packs,
        "flash_attention_3": has_flash,
        "flash_attention_2": has_flash,
        "flex_attention": packs and bool(model_class._supports_flex_attn) and not has_window,
        "sdpa": packs,
        "eager": packs,
    }


def implementation_name(attention: Attention, *, packs: bool = True) -> str:
    """The name that transformers knows this kind by (`attn_implementation`), of its own where documents are alone."""
    if not packs:
        return attention
    # Some models of transformers 5.23 (gpt-oss, OPT) build their dense masks without looking at positions, so that documents see
    # each other; the dense kinds are therefore ours too, under names of their own.
    return {"varlen": VARLEN, "sdpa": DENSE, "eager": IN_STEPS}.get(attention, attention)


def model_inputs(batch: Batch, attention: Attention, *, packs: bool = True) -> dict[str, Any]:
    """What to pass to a model's forward so that the documents of `batch` do not see each other.

    Args:
        batch: as the model sees it, with virtual tokens in front of documents if the method lays any there.
        packs: whether they share a row; else `batch` is one document.
    """
    if not packs:
        assert batch.cumulative_lengths.numel() == 2, "a document per pass"
        return {"input_ids": batch.input_ids, "use_cache": False}
    key_ends = longer(batch.cumulative_lengths, batch.num_virtual_keys)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seq_lens_q": batch.cumulative_lengths,
        "cu_seq_lens_k": key_ends,
        "max_length_q": batch.max_document_length,
        "max_length_k": batch.max_document_length + batch.num_virtual_keys,
        "use_cache": False,
    }
    if batch.token_positions is not None:  # for the model of a method that lays something in front (adapters.in_front)
        inputs["token_positions"] = batch.token_positions
    # transformers hands a mask of four dimensions to the layers as it is, so it builds none and does not ask the GPU where
    # positions restart.
    match attention:
        case "varlen":
            inputs["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch.input_ids.device)
        case "sdpa" | "eager":
            inputs["attention_mask"] = _visible_keys(batch, key_ends)[None, None]
        case "flex_attention":
            inputs["attention_mask"] = _block_mask(batch, key_ends)
        case "flash_attention_2" | "flash_attention_3":
            pass
    return inputs


def _visible_keys(batch: Batch, key_ends: Tensor) -> Tensor:
    """(T, keys) whether a query sees a key: no later one, none of another document."""
    places_T, documents_T, document_of_keys = _places(batch, key_ends)
    keys = torch.arange(len(document_of_keys), device=key_ends.device)
    return (documents_T[:, None] == document_of_keys) & (places_T[:, None] >= keys)


def _block_mask(batch: Batch, key_ends: Tensor) -> BlockMask:
    places_T, documents_T, document_of_keys = _places(batch, key_ends)

    def is_visible(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (places_T[query] >= key) & (documents_T[query] == document_of_keys[key])

    num_queries, num_keys = len(places_T), len(document_of_keys)
    return create_block_mask(is_visible, B=1, H=None, Q_LEN=num_queries, KV_LEN=num_keys, device=key_ends.device, _compile=True)


def _places(batch: Batch, key_ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the key of each token lies among all keys, (T,); the document of each token, (T,), and of each key."""
    document_T = document_of(batch.cumulative_lengths, batch.num_tokens)
    if not batch.num_virtual_keys:
        return torch.arange(batch.num_tokens, device=key_ends.device), document_T, document_T
    assert batch.token_positions is not None
    num_keys = batch.num_tokens + batch.num_virtual_keys * (len(key_ends) - 1)
    return batch.token_positions, document_T, document_of(key_ends, num_keys)
