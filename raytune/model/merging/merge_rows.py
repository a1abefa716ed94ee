"""Rows of tokens in a merge: of tokens that the base does not have, and those that an adapter trained alone."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune.errors import ModelError
from raytune.model.files.weight_files import stored_tensors


def num_rows_with(adapter: Path, config: PeftConfig, model: PreTrainedModel) -> int:
    """Rows of embedding and head that an adapter was trained with; as many as the base has, unless it says more.

    Args:
        adapter: its file of weights.
        model: the base, on any device.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [f".{name}.weight" for name, module in model.named_modules() if module in (embedding, head)]
    stored = (tensor.shape[0] for name, tensor in stored_tensors([adapter]).items() if name.endswith(tuple(names)))
    by_module = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    numbers = by_module if isinstance(by_module, list) else [one for rows in by_module.values() for one in rows]
    of_base: Any = embedding
    return max(of_base.num_embeddings, *(number + 1 for number in numbers), *stored, 0)


class TrainedRows:
    """The rows that an adapter holds, which are laid over those of the base."""

    def __init__(self, model: nn.Module, adapter: str, num_rows: int) -> None:
        """
        Args:
            model: with PEFT's layers, into which the adapter's weights were loaded.
            adapter: its name.
            num_rows: of embedding and head, once merged.
        """
        self._num_rows = num_rows
        self._rows: dict[str, tuple[list[int], Tensor]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, TrainableTokensLayer):
                rows = module.trainable_tokens_delta[adapter]
                self._rows[f"{name.removesuffix('.token_adapter')}.weight"] = (module.token_indices[adapter], rows.detach())
        self.missing = {name for name, (_, rows) in self._rows.items() if rows.is_meta}
        """Weights whose rows were not in the adapter's file."""
        self.not_laid = {*self._rows}
        """Weights that rows were not laid over yet."""

    def laid_over(self, name: str, weight: Tensor) -> Tensor:
        """A weight of embedding or head with the rows that were trained.

        Raises:
            ModelError: if the adapter was trained with more rows than these and the base's make.
        """
        numbers, rows = self._rows.get(name, ([], weight[:0]))
        self.not_laid.discard(name)
        num_own = weight.shape[0]
        if lacking := {*range(num_own, self._num_rows)} - {*numbers}:
            raise ModelError(
                f"The adapter was trained with {self._num_rows} rows of {name}, of which the base has {num_own}, and it does not "
                f"hold row {min(lacking)}: it cannot be merged."
            )
        if not numbers:
            return weight
        grown = torch.cat([weight, weight.new_zeros(self._num_rows - num_own, *weight.shape[1:])])
        grown[numbers] = rows.to(weight.dtype)
        return grown
