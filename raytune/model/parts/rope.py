"""Rotary positions of a base, as a plan stretches them; and `dynamic` scaling in packed rows, the base's own too.

Shapes: B rows, T tokens of a row, D frequencies.
"""

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from raytune.errors import ModelError
from raytune.plan.run_plan import RopePlan

ROPE_FILE = "base_rope.json"
"""In the folder of an adapter: the positions that its base had in training. Merging reads it, PEFT does not."""
_KEPT = ("rope_theta", "partial_rotary_factor")
"""Of a base's own parameters: no scaling says them."""


def stretch(config: PretrainedConfig, rope: RopePlan | None) -> None:
    """Set the rotary positions of a config, before a model is made of it; None: leave them."""
    if rope is None:
        return
    text: Any = config.get_text_config(decoder=True)
    text.rope_parameters = {name: text.rope_parameters[name] for name in _KEPT if name in text.rope_parameters} | rope.parameters
    text.max_position_embeddings = rope.max_position_embeddings
    if hasattr(text, "original_max_position_embeddings"):  # which transformers would take before that in the parameters (Phi-3)
        text.original_max_position_embeddings = rope.original_positions
    if getattr(text, "head_dim", 0) is None:  # which transformers 5.23 would multiply (Mixtral), but for linear and llama3
        text.head_dim = text.hidden_size // text.num_attention_heads


def rotates(model: nn.Module) -> bool:
    """Whether a model has rotary positions of the kinds that transformers scales."""
    return any(hasattr(module, "rope_type") for module in model.modules())


def scale_each_document(model: PreTrainedModel) -> None:
    """Give each document of a row the frequencies of its own length, where these depend on it.

    transformers takes the longest document of a row for all of them, and keeps the frequencies of the longest one that it has
    seen: what a document is trained on would depend on its neighbours, and on which ranks saw which before.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.forward = partial(_rotate_each_document, module, inspect.unwrap(type(module).forward))


@torch.no_grad()
def _rotate_each_document(module: Any, forward: Callable[..., Any], x: Tensor, position_ids: Tensor) -> Any:
    """Call a module's own forward, which multiplies positions by frequencies, with frequencies for each token."""
    of_any_length = module.inv_freq
    module.inv_freq = _frequencies(module, document_lengths(position_ids))
    try:
        return forward(module, x, position_ids)
    finally:
        module.inv_freq = of_any_length


def document_lengths(position_ids: Tensor) -> Tensor:
    """(B, T) of each token, the length of its document. Documents lie end to end, and positions rise within each."""
    begins = position_ids[:, 1:] <= position_ids[:, :-1]
    documents = F.pad(begins.long().cumsum(1), (1, 0))
    lengths = torch.zeros_like(position_ids).scatter_reduce(1, documents, position_ids + 1, "amax")
    return lengths.gather(1, documents)


def _frequencies(module: Any, lengths: Tensor) -> Tensor:
    """(B, T, D) as transformers' dynamic scaling has them for documents of these lengths."""
    config: Any = module.config
    values, original = config.rope_parameters, config.max_position_embeddings
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim, factor = int(head_dim * values.get("partial_rotary_factor", 1.0)), values["factor"]
    stretched = (factor * lengths.clamp(min=original) / original) - (factor - 1)
    theta = values["rope_theta"] * stretched ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float, device=lengths.device) / dim
    return 1.0 / theta[..., None] ** exponents


def save_rope(rope: RopePlan | None, folder: Path) -> None:
    """Write beside an adapter which positions its base had."""
    if rope is not None:
        (folder / ROPE_FILE).write_text(rope.model_dump_json(indent=2) + "\n")


def saved_rope(folder: Path) -> RopePlan | None:
    """The positions that the base of an adapter had; None: its own.

    Raises:
        ModelError: if the file cannot be read.
    """
    path = folder / ROPE_FILE
    if not path.is_file():
        return None
    try:
        return RopePlan.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}). Copy the adapter again; without it, its positions are lost."
        ) from error
