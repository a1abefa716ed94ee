"""Actors that answer: each holds a base, with adapters over it, and is handed rows of suites in chunks."""

import torch

from raytune.evaluate.answers import Chunk, answer
from raytune.evaluate.suite_metrics import Given
from raytune.model.hub import download_base
from raytune.model.inference import HeldModels
from raytune.plan.asked_model import AskedModel
from raytune.plan.base_model import is_on_hub
from raytune.plan.value import Plan
from raytune.storage import is_local


class AnsweringPlan(Plan):
    """What each actor has, and how it computes: as the worker of a run where its numbers are to be those of the run."""

    device: str
    """cpu or cuda."""
    threads: int
    """Compute threads."""
    tf32: bool = False


class Answerer:
    """A process that answers, made an actor by `ray.remote(Answerer)`. Nothing is loaded before it is asked."""

    def __init__(self, plan: AnsweringPlan) -> None:
        torch.set_num_threads(plan.threads)
        torch.backends.cuda.matmul.allow_tf32 = plan.tf32
        torch.backends.cudnn.allow_tf32 = plan.tf32
        self._models = HeldModels(torch.device(plan.device))

    def answer(self, one: AskedModel, chunk: Chunk) -> dict[int, Given]:
        """What a model makes of a chunk. Who hands over chunks model by model has each base loaded once.

        Raises:
            ModelError: if the model cannot be loaded as asked.
        """
        base = one.model
        if is_local(base.path) and is_on_hub(base.path):
            download_base(base.path, base.revision, with_code=base.trust_remote_code)
        with self._models.asked(one) as loaded:
            return answer(loaded, chunk.suite, chunk.rows)

    def forget(self, folder: str) -> None:
        """Keep no copy of a saved folder that is not asked again."""
        self._models.forget(folder)
