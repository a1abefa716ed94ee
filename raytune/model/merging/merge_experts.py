"""Fused experts that were packed in training, in a base's files, where each expert's matrices may lie apart."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from raytune.model.parts.quantize import as_seen_in_training


class PackedExperts:
    """What training saw of packed experts, handed out by the names of a base's files.

    Numbers are packed in blocks of the whole parameter, whose scales are quantised together: so all parts are put together as
    transformers does when it loads them, packed and expanded, and taken apart again. They are held until the last was asked for.
    """

    def __init__(self, model: PreTrainedModel, quantization: Mapping[str, Any], read: Callable[[str], Tensor]) -> None:
        """Learn the names, before parameters are given up.

        Args:
            model: on the meta device, under its own names.
            quantization: what `export` wrote of the base.
            read: a tensor of the base's files.
        """
        self._model, self._read = model, read
        self._dtype: torch.dtype = getattr(torch, quantization["dtype"])
        self._config: dict[str, Any] = quantization["config"]
        # Adapters that were saved while experts stayed in 16 bits have no such list.
        self._fused = {*quantization.get("parameters", [])}
        self._parts_of = {
            name: [*revert_weight_conversion(model, {name: parameter.detach()})]
            for name, parameter in model.named_parameters()
            if name in self._fused
        }
        self._fused_of = {part: name for name, parts in self._parts_of.items() for part in parts}
        self._seen: dict[str, Tensor] = {}
        self.missing = {*self._fused}
        """Parameters of which no part was asked for."""

    def seen(self, published: str, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the base's files as training saw it, in its own dtype; itself if it was not packed.

        Args:
            published: its name in the files.
            name: in the model, if it has one there.
        """
        if name in self._fused:  # stored as it is computed with
            self.missing.discard(name)
            return self._expanded(tensor).to(tensor.dtype)
        if published not in self._fused_of:
            return tensor
        if published not in self._seen:
            fused = self._fused_of[published]
            self.missing.discard(fused)
            parts = {part: self._read(part).to(self._dtype) for part in self._parts_of[fused]}
            self._seen |= revert_weight_conversion(self._model, {fused: self._expanded(_fused(self._model, fused, parts))})
        return self._seen.pop(published).to(tensor.dtype)

    def _expanded(self, weight: Tensor) -> Tensor:
        return as_seen_in_training(weight.to(self._dtype), self._config)


def _fused(model: PreTrainedModel, name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The parameter that transformers makes of tensors of a base's files."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    converter: Any = None
    for part in sorted(parts, key=dot_natural_key):
        renamed, pattern = rename_source_key(part, renamings, converters)
        if pattern is None:  # one tensor, under another name
            return parts[part]
        converter = converter or copy.deepcopy(of_pattern[pattern])
        converter.add_tensor(renamed, part, pattern, parts[part])
    assert converter is not None, "a parameter has parts"
    return converter.convert(name, model=model, config=model.config)[name]
