"""An adapted model that computes what its base does, for as long as a block lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, PromptLearningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


@contextmanager
def switched_off(model: PeftModel) -> Iterator[None]:
    """Context in which no adapter counts: neither updates, nor trained copies of modules, nor virtual tokens.

    PEFT's `disable_adapter` also takes the gradients from what is trained, and afterwards gives them to all of an adapter,
    whichever part of it is trained; an engine that follows gradients would not have that in every pass.
    """
    if isinstance(model.active_peft_config, PromptLearningConfig):
        own = model.forward
        model.forward = model.base_model.forward
        try:
            yield
        finally:
            model.forward = own
        return
    layers: list[Any] = [one for one in model.modules() if isinstance(one, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
