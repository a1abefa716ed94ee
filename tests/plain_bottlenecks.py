"""Bottleneck adapters in plain torch, which PEFT has none of: what tests hold ours against. Nothing of raytune is in here."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

TARGETS = ("o_proj", "down_proj")


class Bottleneck(nn.Module):
    """x + up(relu(down(x))) behind a linear layer."""

    def __init__(self, base_layer: nn.Module, outputs: int, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        down, up = nn.Linear(outputs, width), nn.Linear(width, outputs)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})

    def forward(self, x: Tensor) -> Tensor:
        given = self.base_layer(x)
        return given + self.bottleneck_up["default"](torch.relu(self.bottleneck_down["default"](given)))


def with_bottlenecks(model: Any, width: int) -> Any:
    """A frozen Llama with a network of this width behind each attention and each MLP."""
    model.requires_grad_(False)
    for name, layer in [*model.named_modules()]:
        if name.endswith(TARGETS):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Bottleneck(layer, layer.out_features, width))
    return model


def load_bottlenecks(model: Any, folder: Path) -> Any:
    """The same with what a folder of ours holds."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["reader"] == "raytune"
    (width,) = {*config["widths"].values()}
    model = with_bottlenecks(model, width)
    saved = load_file(folder / "adapter_model.safetensors")
    values = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight").replace(".bias", ".default.bias"): value
        for name, value in saved.items()
    }
    missing = model.load_state_dict(values, strict=False)
    assert not missing.unexpected_keys
    return model
