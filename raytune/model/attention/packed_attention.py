"""The kinds of attention over packed rows that are ours, registered with transformers under their names.

`varlen`: PyTorch's variable-length FlashAttention on CUDA, one call of `scaled_dot_product_attention` per document elsewhere. The
dense kinds see a mask over the packed row.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from raytune.errors import ModelError
from raytune.model.attention.sequence_parallel import SharedRows

# Shapes: H heads, T tokens of all documents, L tokens of one document, D head width. Keys and values may have virtual tokens in
# front of each document (prefix tuning), V of them: then there are more of them than of queries.

VARLEN, DENSE, IN_STEPS = "varlen", "packed_dense", "packed_in_steps"
MAX_FLASH_WIDTH = 256
UNSTATED = -1


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of packed documents without a mask, in the form that transformers' attention interface calls.

    Of rows that ranks share, each has the queries, keys and values of its tokens (`shared_rows`: model.sequence_parallel).

    Args:
        query: (1, H, T, D), documents end to end; `key` and `value` have fewer heads or as many, and perhaps virtual tokens.
        attention_mask: used only where rows are padded, as in generation: then `cu_seq_lens_q` is not among the options.
        options: see `_Call`.

    Returns:
        (1, T, H, D)
    """
    shared: SharedRows | None = options.pop("shared_rows", None)
    if shared is not None:
        query, key, value = (shared.own_heads(of_slice) for of_slice in (query, key, value))
        if (sinks := options.get("s_aux")) is not None:
            options["s_aux"] = shared.share_of(sinks)
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
    output = output[..., :width]
    return output if shared is None else shared.own_tokens(output), None


def dense_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention over whole packed rows under a dense mask; arguments as for `varlen_attention`."""
    call = _Call.of(module, **options)
    query, key, value, width = _alike(query, key, value)
    if call.ends is not None and call.window is not None:
        assert attention_mask is not None
        attention_mask = attention_mask & _in_window(key.shape[2], call.window, query.device)[call.places_of(query, key)]
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
    key_ends: Tensor | None
    """The same of keys."""
    longest_keys: int
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
        cu_seq_lens_k: Tensor | None = None,
        max_length_k: int | None = None,
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
            key_ends=cu_seq_lens_k,
            longest_keys=max_length_k or 0,
            in_steps=in_steps or softcap is not None or s_aux is not None,
        )

    def num_virtual(self, query: Tensor, key: Tensor) -> int:
        """Virtual tokens in front of each document's keys."""
        assert self.ends is not None
        return (key.shape[2] - query.shape[2]) // (len(self.ends) - 1)

    def places_of(self, query: Tensor, key: Tensor) -> Tensor | slice:
        """Where the keys of the tokens that have queries lie among all keys."""
        num_virtual = self.num_virtual(query, key)
        if not num_virtual:
            return slice(None)
        assert self.ends is not None
        tokens = torch.arange(query.shape[2], device=query.device)
        return tokens + num_virtual * (1 + torch.bucketize(tokens, self.ends[1:].long(), right=True))

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
    assert call.key_ends is not None
    # Causal from the end of each document on: where it has more keys than queries, its first query sees the virtual ones too.
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        call.ends,
        call.key_ends,
        call.longest,
        call.longest_keys,
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
    num_virtual = call.num_virtual(query, key)
    key_lengths = [length + num_virtual for length in lengths]
    # The backward pass of one split is one concatenation; of slices it would be a row of zeros per document.
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2)):
        length, window = k.shape[2], call.window
        mask = _in_window(length, window, q.device) if window is not None and window < length else None
        # Queries of 0 for virtual tokens: a document's own mask would be held for the backward pass.
        outputs.append(_dense(F.pad(q, (0, 0, num_virtual, 0)), k, v, mask, call)[:, num_virtual:])
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


for _name, _attention in ((VARLEN, varlen_attention), (DENSE, dense_attention), (IN_STEPS, eager_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)
