"""Updates of fused experts and routers laid into a base's files, where each expert's matrices may lie apart."""

from collections.abc import Mapping

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from raytune.errors import ModelError
from raytune.model.files.export import ADAPTER


class ParameterUpdates:
    """What an adapter adds to parameters outside linear layers, handed out by the names of a base's files.

    transformers fuses matrices of experts as it loads them, by stacking and concatenation; so an update of all experts, taken
    apart in the same way, is the update of each. That of a parameter is held until its last part was asked for.
    """

    def __init__(self, model: PreTrainedModel, wrappers: Mapping[str, ParamWrapper]) -> None:
        """Learn the names, before parameters are given up.

        Args:
            model: on the meta device, under its own names.
            wrappers: PEFT's, by the names of their modules, which may lie in each other.
        """
        self._model = model
        self._wrappers = {f"{_unwrapped(name)}.{wrapper.parameter_name}": wrapper for name, wrapper in wrappers.items()}
        self._fused_of = {
            published: name
            for name, wrapper in self._wrappers.items()
            for published in revert_weight_conversion(model, {name: wrapper.get_param().detach()})
        }
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._left = {name: {part for part, fused in self._fused_of.items() if fused == name} for name in self._wrappers}

    @property
    def missing(self) -> set[str]:
        """Parameters of which a part was never asked for."""
        return {name for name, left in self._left.items() if left}

    def added(self, published: str, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the base's files with what the adapter adds to it, computed in fp32; itself if that is nothing.

        Args:
            published: its name in the files.
            name: in the model, if it has one there.

        Raises:
            ModelError: if the result is not finite.
        """
        if name in self._wrappers and self._left[name]:
            update = self._wrappers_update(name)
            self._left[name].clear()
        elif published in self._fused_of:
            fused = self._fused_of[published]
            if fused not in self._parts:
                self._parts[fused] = revert_weight_conversion(self._model, {fused: self._wrappers_update(fused)})
            update = self._parts[fused].pop(published)
            self._left[fused].discard(published)
        else:
            return tensor
        merged = tensor.float() + update
        if not merged.isfinite().all():
            raise ModelError(f"The adapter makes a weight that is not finite: {published}.")
        return merged.to(tensor.dtype)

    @torch.no_grad()
    def _wrappers_update(self, name: str) -> Tensor:
        return self._wrappers[name].float().get_delta_weight(ADAPTER)


def _unwrapped(name: str) -> str:
    return name.replace(".base_layer", "")
