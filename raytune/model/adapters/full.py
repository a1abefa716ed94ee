"""Full fine-tuning on a model: every parameter of the base is trained."""

from transformers import PreTrainedModel

from raytune.config.sections.adapter import FullAdapter
from raytune.model.adapters.adapting import Adapting


def _add(model: PreTrainedModel, adapter: FullAdapter, revision: str | None, seed: int) -> PreTrainedModel:
    return model.requires_grad_(True)


ADAPTING = Adapting(
    add=_add,
    frozen_experts=lambda model, adapter: [],
    leaves_base_alone=lambda adapter, is_quantised: False,
    is_whole=True,
)
