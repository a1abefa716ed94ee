"""A whole model's folder, looked at, and written anew: sharded safetensors of a dtype, with all that belongs to it."""

import copy
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig

from raytune.errors import ModelError
from raytune.model.files.base_check import check_files
from raytune.model.files.base_content import SAVED_WITH_IT
from raytune.model.files.export import COMBINATION, in_dtype, write_weights
from raytune.model.files.files import resolve_model_path
from raytune.model.files.freed_memory import freed_at_once
from raytune.model.files.pretrained import load_config, model_class
from raytune.model.files.stopping import saved_config
from raytune.model.files.stored_weights import StoredWeights
from raytune.plan.model.stored_quantization import stored_quantization

_LICENCES = ("LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class WholeModel:
    """A model that transformers loads from a folder."""

    folder: Path
    config: PretrainedConfig

    @cached_property
    def weights(self) -> StoredWeights:
        return StoredWeights(self.folder)

    @property
    def stops(self) -> GenerationConfig | None:
        """Settings of generation, if the folder has any."""
        return saved_config(self.folder)

    @freed_at_once()
    def save(self, folder: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
        """Write it into an empty folder, and read that again.

        Args:
            dtype: of weights that are no integers; None: as they are.

        Raises:
            ModelError: if a number does not fit the dtype, or what is read differs from what was written.
        """
        write_weights(copy.deepcopy(self.config), in_dtype(self.weights, dtype), folder, max_shard_bytes)
        beside = [self.folder / name for name in (*SAVED_WITH_IT, COMBINATION)]
        beside += [file for pattern in _LICENCES for file in self.folder.glob(pattern)]
        if getattr(self.config, "auto_map", None):
            beside += self.folder.rglob("*.py")
        for file in beside:
            if file.is_file():
                target = folder / file.relative_to(self.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        self._check(StoredWeights(folder), dtype)

    def _check(self, written: StoredWeights, dtype: torch.dtype | None) -> None:
        if written.tensors.keys() != self.weights.tensors.keys():
            raise ModelError(f"{written.folder} does not hold the tensors that were written. Is its disk damaged?")
        for name, tensor in in_dtype(self.weights, dtype):
            if not torch.equal(written.read(name), tensor):
                raise ModelError(f"{written.folder} holds other numbers for {name} than were written. Is its disk damaged?")


def whole_model(folder: Path, *, trust_remote_code: bool = False) -> WholeModel:
    """A model's folder that is whole and holds weights as they are.

    Args:
        trust_remote_code: run the Python code in the folder.

    Raises:
        ModelError: if it is no model's, is damaged, or holds packed numbers.
    """
    path = resolve_model_path(str(folder), None)
    config = load_config(path, None, trust_remote_code)
    if stored_quantization(config.to_dict()) is not None:
        raise ModelError(
            f"{folder} is stored quantised (quantization_config in its config.json), and its packed numbers are no weights that "
            f"others read. Export the original; a model that exists only so is expanded once: load it with transformers, "
            f"model.dequantize(), save_pretrained."
        )
    check_files(Path(path), config, model_class(path, config, trust_remote_code=trust_remote_code))
    return WholeModel(Path(path), config)
