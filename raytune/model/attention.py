"""Attention over packed rows: every document attends to itself only, whichever kernel computes it.

`varlen` is ours and is registered with transformers under that name: PyTorch's variable-length FlashAttention on CUDA, one call
of `scaled_dot_product_attention` per document elsewhere. So are the dense kinds. FlashAttention's packages and flex attention are
called by transformers itself; `model_inputs` hands over what makes each kind keep documents apart.
"""

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from raytune.config.model import Attention
from raytune.data.batches import Batch
from raytune.errors import ModelError

# Shapes: H heads, T tokens of all documents, L tokens of one document, D head width.

# Layers whose documents can be told apart by positions alone. State-space, linear and convolution layers carry state across.
SEPARABLE_LAYERS = {"full_attention", "sliding_attention", "attention", "mlp", "moe"}
MAX_FLASH_WIDTH = 256
UNSTATED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOption:
    name: Attention
    available: bool
    reason: str
    """Why it is chosen, or why it cannot be used."""


def available_attention(device: torch.device, dtype: torch.dtype) -> list[AttentionOption]:
    """What this machine can compute attention with, the kinds that work first, in order of preference.

    Args:
        device: where the model computes.
        dtype: dtype of its products.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    flash_needs = _missing_for_flash(device, half)
    varlen = "PyTorch's variable-length FlashAttention" if flash_needs is None else "one PyTorch kernel call per document"
    options = [
        _flash_option("flash_attention_3", is_flash_attn_3_available(), "flash-attn-3", flash_needs, minimum_capability=9),
        _flash_option("flash_attention_2", is_flash_attn_2_available(), "flash-attn", flash_needs, minimum_capability=8),
        AttentionOption(name="varlen", available=True, reason=f"{varlen}; no mask, no padding"),
        AttentionOption(
            name="flex_attention",
            available=device.type == "cuda",
            reason="compiled block mask" if device.type == "cuda" else "PyTorch has no backward pass of it on this device",
        ),
        AttentionOption(name="sdpa", available=True, reason="dense mask over the packed row"),
        AttentionOption(name="eager", available=True, reason="dense mask and all scores in memory"),
    ]
    return sorted(options, key=lambda option: not option.available)


def _missing_for_flash(device: torch.device, half: bool) -> str | None:
    if device.type != "cuda":
        return "it runs on NVIDIA GPUs only"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    return None if half else "it computes in bf16 or fp16 only"


def _flash_option(
    name: Attention, installed: bool, package: str, missing: str | None, *, minimum_capability: int
) -> AttentionOption:
    if missing is None and torch.cuda.get_device_capability()[0] < minimum_capability:
        missing = f"it needs compute capability {minimum_capability}.0"
    if missing is None and not installed:
        missing = f"the package {package} is not installed"
    return AttentionOption(name=name, available=missing is None, reason=missing or f"{package} is installed")


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
    return {"sdpa": "packed_dense", "eager": "packed_in_steps"}.get(attention, attention)


def model_inputs(batch: Batch, attention: Attention, *, packs: bool = True) -> dict[str, Any]:
    """What to pass to a model's forward so that the documents of `batch` do not see each other.

    Args:
        packs: whether they share a row; else `batch` is one document.
    """
    if not packs:
        assert batch.cumulative_lengths.numel() == 2, "a document per pass"
        return {"input_ids": batch.input_ids, "use_cache": False}
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seq_lens_q": batch.cumulative_lengths,
        "cu_seq_lens_k": batch.cumulative_lengths,
        "max_length_q": batch.max_document_length,
        "max_length_k": batch.max_document_length,
        "use_cache": False,
    }
    # transformers hands a mask of four dimensions to the layers as it is, so it builds none and does not ask the GPU where
    # positions restart.
    match attention:
        case "varlen":
            inputs["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch.input_ids.device)
        case "sdpa" | "eager":
            inputs["attention_mask"] = _visible_keys(_document_of(batch))[None, None]
        case "flex_attention":
            inputs["attention_mask"] = _block_mask(_document_of(batch))
        case "flash_attention_2" | "flash_attention_3":
            pass
    return inputs


def _document_of(batch: Batch) -> Tensor:
    """(T,) the document that each token belongs to."""
    positions = torch.arange(batch.input_ids.shape[1], dtype=torch.int32, device=batch.input_ids.device)
    return torch.bucketize(positions, batch.cumulative_lengths[1:], right=True)


def _visible_keys(document_T: Tensor) -> Tensor:
    """(T, T) whether a query sees a key: no later one, none of another document."""
    return (document_T[:, None] == document_T).tril()


def _block_mask(document_T: Tensor) -> BlockMask:
    def is_visible(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_T[query] == document_T[key])

    length = document_T.shape[0]
    return create_block_mask(is_visible, B=1, H=None, Q_LEN=length, KV_LEN=length, device=document_T.device, _compile=True)


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of packed documents without a mask, in the form that transformers' attention interface calls.

    Args:
        query: (1, H, T, D), documents end to end; `key` and `value` have fewer heads or as many.
        attention_mask: used only where rows are padded, as in generation: then `cu_seq_lens_q` is not among the options.
        options: see `_Call`.

    Returns:
        (1, T, H, D)
    """
    call = _Call.of(module, **options)
    query, key, value, width = _alike(query, key, value)
    if call.ends is None:
        if attention_mask is not None and attention_mask.numel() == 1 and query.shape[2] > 1:
            raise ModelError(
                f"{type(module).__name__} does not hand the lengths of documents to its attention, so model.attention: varlen "
                f"cannot keep them apart. Set model.attention to sdpa."
            )
        output = _dense(query, key, value, attention_mask, call)
    elif call.has_kernel_for(query):
        output = _kernel(query, key, value, call)
    else:
        # torch does not say what `compiler.disable` returns.
        output = _per_document(query, key, value, call)  # pyright: ignore[reportCallIssue]
    return output[..., :width], None


def dense_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention over whole packed rows under a dense mask; arguments as for `varlen_attention`."""
    call = _Call.of(module, **options)
    query, key, value, width = _alike(query, key, value)
    if call.ends is not None and call.window is not None:
        assert attention_mask is not None
        attention_mask = attention_mask & _in_window(query.shape[2], call.window, query.device)
    return _dense(query, key, value, attention_mask, call)[..., :width], None


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """`dense_attention` in elementary steps instead of PyTorch's kernels."""
    options["in_steps"] = True
    return dense_attention(module, query, key, value, attention_mask, **options)


def _alike(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Give the three one dtype and one width, as kernels want it. Returns them and the width of the values before."""
    if torch.is_autocast_enabled(query.device.type):
        # Norms of queries and keys with fp32 weights give fp32 under autocast while the values are 16 bit.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    width = value.shape[-1]
    if width < query.shape[-1]:  # multi-head latent attention (DeepSeek)
        value = F.pad(value, (0, query.shape[-1] - width))
    return query, key, value, width


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What one layer asks of its attention besides queries, keys and values."""

    scaling: float
    window: int | None
    """Keys that a token sees, itself included; None: all before it."""
    softcap: float | None
    """Scores are squashed to +-softcap by tanh (Gemma 2)."""
    sinks: Tensor | None
    """(H,) scores of a key that has no value (gpt-oss)."""
    dropout: float
    ends: Tensor | None
    """(documents + 1,) where documents begin and the last one ends; None: rows are padded."""
    longest: int
    in_steps: bool

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = UNSTATED,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        in_steps: bool = False,
        **_: Any,
    ) -> "_Call":
        """Read the options of transformers' attention interface; those that concern other kinds are left."""
        if position_bias is not None:
            raise ModelError(
                f"{type(module).__name__} adds a bias for positions to its scores; raytune cannot train it on packed rows."
            )
        config: Any = module.config
        return cls(
            scaling=scaling if scaling is not None else config.head_dim**-0.5,
            window=_window_of(module) if sliding_window == UNSTATED else sliding_window,
            softcap=softcap,
            sinks=s_aux,
            dropout=dropout,
            ends=cu_seq_lens_q,
            longest=max_length_q or 0,
            in_steps=in_steps or softcap is not None or s_aux is not None,
        )

    def has_kernel_for(self, query: Tensor) -> bool:
        """Whether PyTorch's variable-length FlashAttention computes this."""
        return (
            query.is_cuda
            and query.dtype in (torch.bfloat16, torch.float16)
            and query.shape[-1] <= MAX_FLASH_WIDTH
            and self.dropout == 0.0
            and not self.in_steps
            and torch.cuda.get_device_capability(query.device)[0] >= 8
        )


def _window_of(module: nn.Module) -> int | None:
    """The window of a layer whose model puts it into masks only (Qwen2-MoE, Phi-MoE)."""
    config: Any = module.config
    layer_types = getattr(config, "layer_types", None)
    slides = layer_types[module.layer_idx] == "sliding_attention" if layer_types else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if slides else None


def _kernel(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    assert call.ends is not None
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        call.ends,
        call.ends,
        call.longest,
        call.longest,
        scale=call.scaling,
        window_size=(-1 if call.window is None else call.window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)  # a pair only where auxiliary outputs are asked for
    return output[None]


@torch.compiler.disable  # the lengths of documents change with every batch; compiled for each, it would never stop compiling
def _per_document(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    assert call.ends is not None
    # On a GPU this waits for the device, in fp32 only, where the kernel above does not exist and speed is not the point.
    starts = call.ends.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    # The backward pass of one split is one concatenation; of slices it would be a row of zeros per document.
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)):
        length, window = q.shape[2], call.window
        mask = _in_window(length, window, q.device) if window is not None and window < length else None
        outputs.append(_dense(q, k, v, mask, call))
    return torch.cat(outputs, dim=1)


def _in_window(length: int, window: int, device: torch.device) -> Tensor:
    """(L, L) whether a query sees a key: no later one, none at a distance of `window` or more."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(diagonal=1 - window)


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: _Call) -> Tensor:
    """Attention of rows beside each other. `mask` is bool; None: causal, where the last query sees all keys."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask is None and (call.in_steps or 1 < num_queries < num_keys):
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(diagonal=num_keys - num_queries)
    if call.in_steps:
        output = _in_steps(query, key, value, mask, call)
    else:
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=call.dropout,
            is_causal=mask is None and num_queries > 1,
            scale=call.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output.transpose(1, 2)


def _in_steps(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: _Call) -> Tensor:
    """Attention in elementary steps, for scores that no kernel of PyTorch computes."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if call.sinks is not None:
        sinks = call.sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    return F.dropout(weights, p=call.dropout) @ value


for _name, _attention in (("varlen", varlen_attention), ("packed_dense", dense_attention), ("packed_in_steps", eager_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)
