"""LoRA adapters over one base, of which one is on, or none: switched in the layers, as often as a batch changes its model."""

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer


class AdapterSwitch:
    """Switches adapters that lie in layers and nowhere else.

    PEFT 0.21 goes through all modules and parameters for it, and to turn adapters off asks for the state of each first: more work
    than the forward pass of a token. Here the layers are known, and are told what PEFT tells them.
    """

    def __init__(self, adapted: PeftModel) -> None:
        self._adapted: Any = adapted
        self._layers: list[Any] = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
        self._is_on: str | None = None
        self.turn_on(self._adapted.active_adapter)

    def turn_on(self, name: str) -> None:
        if name == self._is_on:
            return
        for layer in self._layers:
            layer._disable_adapters, layer._active_adapter = False, [name]
        self._adapted.active_adapter = self._adapted.base_model.active_adapter = name
        self._is_on = name

    def turn_off(self) -> None:
        if self._is_on is None:
            return
        for layer in self._layers:
            layer._disable_adapters = True
        self._is_on = None
