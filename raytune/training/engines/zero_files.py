"""DeepSpeed's own files of a checkpoint."""

import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from raytune.training.engines.state_files import Write, write_now

# Before 3.11.4, Python writes a member of such a class as a call of `getattr`, which the reader below does not run.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))  # pyright: ignore[reportArgumentType]


class Files(TorchCheckpointEngine):
    """DeepSpeed's files: given to whoever decides when they are written, and read without running code from them; DeepSpeed's own
    reader executes what a pickle says."""

    def __init__(self, config_params: Any) -> None:
        super().__init__(config_params)
        self._write: Write = write_now

    @contextmanager
    def given_to(self, write: Write) -> Iterator[None]:
        self._write = write
        try:
            yield
        finally:
            self._write = write_now

    def save(self, state_dict: Any, path: str) -> None:
        self._write(Path(path), state_dict, self._fill)

    def _fill(self, content: Any, path: Path) -> None:
        super().save(content, str(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)
