"""A frozen base that stays loaded in a process from one adapter to the next: trials of a sweep need not read it again."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from raytune.config.sections.adapter import Adapter
from raytune.model.adapters import adapting, adapting_with
from raytune.model.packed_experts import experts_to_pack, packed_experts
from raytune.plan.run_plan import ModelPlan


class KeptBase:
    """Holds the base of the newest model, with the adapter that was trained on it, until another base is asked for.

    Only what leaves its base as it was is kept: a model that trains biases or whole modules, that takes its start out of the
    base's weights, or that was compiled around its adapter is loaded anew. So a model on a kept base equals one on a fresh base
    bit for bit.
    """

    def __init__(self) -> None:
        self._key = ""
        self._model: PeftModel | None = None

    def take(self, model: ModelPlan, adapter: Adapter) -> PreTrainedModel | None:
        """The base, freed of the adapter of before; None if another one, or none, is here. Then nothing is held any more."""
        held, self._model = self._model, None
        if held is None or self._key != model.model_dump_json():
            return None
        row = adapting_with(held.active_peft_config)
        assert row is not None, "we made the adapter"
        base: Any = row.taken_off(held)
        if model.quantization and {*packed_experts(base)} != {*experts_to_pack(base, adapter, model.quantization.is_4_bit)}:
            return None
        return base

    def keep(self, model: ModelPlan, adapter: Adapter, loaded: PeftModel) -> None:
        """Hold a model that was just made, if its training leaves the base alone."""
        if _leaves_base_alone(model, adapter):
            self._key, self._model = model.model_dump_json(), loaded

    def drop(self) -> None:
        """Hold nothing any more: what happened to the base is not known."""
        self._model = None


def _leaves_base_alone(model: ModelPlan, adapter: Adapter) -> bool:
    return (
        adapting(adapter).leaves_base_alone(adapter, model.quantization is not None)
        and not model.new_tokens  # whose rows an adapter may train in place of the base's
        and not model.compile
        and not model.neftune_noise_alpha
    )
