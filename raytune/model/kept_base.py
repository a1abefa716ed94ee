"""A frozen base that stays loaded in a process from one adapter to the next: trials of a sweep need not read it again."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from raytune.config.adapter import Adapter, LoraAdapter, QloraAdapter
from raytune.model.adapters import CHANGES_BASE
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
        if held is None or self._key != _key(model, adapter):
            return None
        base: Any = held.unload()  # pyright: ignore[reportCallIssue]
        if isinstance(adapter, QloraAdapter) and {*packed_experts(base)} != {*experts_to_pack(base, adapter)}:
            return None
        return base

    def keep(self, model: ModelPlan, adapter: Adapter, loaded: PeftModel) -> None:
        """Hold a model that was just made, if its training leaves the base alone."""
        if _leaves_base_alone(model, adapter):
            self._key, self._model = _key(model, adapter), loaded

    def drop(self) -> None:
        """Hold nothing any more: what happened to the base is not known."""
        self._model = None


def _key(model: ModelPlan, adapter: Adapter) -> str:
    """What the loaded base depends on."""
    quantisation = (
        [adapter.quantization, adapter.double_quantization, adapter.compute_dtype, adapter.quant_storage]
        if isinstance(adapter, QloraAdapter)
        else []
    )
    return f"{model.model_dump_json()} {quantisation}"


def _leaves_base_alone(model: ModelPlan, adapter: Adapter) -> bool:
    return (
        isinstance(adapter, LoraAdapter)
        and adapter.init not in CHANGES_BASE
        and adapter.bias == "none"
        and not adapter.modules_to_save
        and not model.compile
        and not model.neftune_noise_alpha
    )
