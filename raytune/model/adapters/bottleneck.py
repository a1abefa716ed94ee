"""Bottleneck adapters on a model. PEFT has none: here they are a method of its own kind, so that all that holds for others holds
for them. What is saved has PEFT's two files, and says that raytune reads it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raytune.config.sections.adapter import BottleneckAdapter
from raytune.model.adapters.adapting import Adapting, added
from raytune.model.adapters.targets import (
    check_matches,
    check_named,
    layers_of_group,
    shortest_suffixes,
    target_layers,
    unchanged_experts,
)
from raytune.model.parts.experts import expert_parameters
from raytune.plan.methods.bottleneck import PLACES, block_of, places, width_behind
from raytune.plan.model.module_names import has_name, matches

KIND: Any = "RAYTUNE_BOTTLENECK"
"""In the place of one of PEFT's types, which it would not find without raytune."""
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


@dataclass
class BottleneckConfig(PeftConfig):
    """What a folder says of its bottlenecks."""

    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None
    modules_to_save: list[str] | None = None
    widths: dict[str, int] = field(default_factory=dict)
    """Width inside each network, by the name of the module that it stands behind."""
    activation: str = "relu"
    dropout: float = 0.0
    reader: str = "raytune"
    """Whoever reads the folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = KIND


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module, and the network that stands behind it: x + up(f(down(x))). `up` starts at 0, so that nothing is added."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, *, outputs: int, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.inside = nn.Sequential(ACTIVATIONS[config.activation](), nn.Dropout(config.dropout))
        self.bottleneck_down[adapter_name] = nn.Linear(outputs, width)
        self.bottleneck_up[adapter_name] = up = nn.Linear(width, outputs)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self._like_base(adapter_name)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def _like_base(self, adapter_name: str) -> None:
        """Give the network device and dtype of what it stands behind, which may be a mixture or hold packed numbers."""
        weight = next(self.base_layer.parameters())
        # Packed numbers may be held in any dtype.
        dtype = getattr(self.base_layer, "compute_dtype", weight.dtype if weight.is_floating_point() else None)
        for networks in (self.bottleneck_down, self.bottleneck_up):
            if not any(one.is_meta for one in networks[adapter_name].parameters()):
                networks[adapter_name].to(weight.device, dtype)  # pyright: ignore[reportArgumentType]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        if isinstance(output, tuple):  # what routers say, behind what a mixture gives
            return (self._passed(output[0]), *output[1:])
        return self._passed(output)

    def _passed(self, output: Tensor) -> Tensor:
        is_cast = torch.is_autocast_enabled(output.device.type)
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down: Any = self.bottleneck_down[name]
                read = output if is_cast else output.to(down.weight.dtype)
                output = output + self.bottleneck_up[name](self.inside(down(read))).to(output.dtype)
        return output


class BottleneckModel(BaseTuner):
    """Puts `BottleneckLayer`s into a model, as PEFT's own tuners do."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, Any] = {}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        hidden = self.model.config.get_text_config().hidden_size  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        layer = BottleneckLayer(
            target, adapter_name, peft_config, outputs=_outputs(target, hidden), width=peft_config.widths[current_key]
        )
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ValueError("Bottlenecks are not linear: no weight of the base can hold them.")


for mapping, value in (
    (PEFT_TYPE_TO_CONFIG_MAPPING, BottleneckConfig),
    (PEFT_TYPE_TO_TUNER_MAPPING, BottleneckModel),
    (PEFT_TYPE_TO_PREFIX_MAPPING, BottleneckModel.prefix),
):
    mapping[KIND] = value  # pyright: ignore[reportArgumentType]  PEFT registers what its own enumeration lists, in the same tables


def _outputs(module: nn.Module, hidden: int) -> int:
    """Width of what a module gives; of a mixture that of the model."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.nf if isinstance(module, Conv1D) else hidden


def _add(model: PreTrainedModel, adapter: BottleneckAdapter, revision: str | None, seed: int) -> PeftModel:
    check_named(model, adapter)
    names = [name for name in _behind(model, adapter) if not has_name(name, adapter.exclude_modules)]
    hidden = model.config.get_text_config().hidden_size
    config = BottleneckConfig(
        task_type="CAUSAL_LM",
        target_modules=shortest_suffixes(names, [name for name, _ in model.named_modules()]),
        exclude_modules=adapter.exclude_modules or None,
        modules_to_save=adapter.modules_to_save or None,
        widths={name: width_behind(adapter, _outputs(model.get_submodule(name), hidden)) for name in names},
        activation=adapter.activation,
        dropout=adapter.dropout,
        revision=revision,
    )
    return added(model, config, adapter, seed=seed)


def _behind(model: PreTrainedModel, adapter: BottleneckAdapter) -> list[str]:
    """Full names of the modules that networks stand behind.

    Raises:
        ModelError: if there are none.
    """
    asked, layers = adapter.target_modules, target_layers(model)
    blocks = [*dict.fromkeys(block_of(block_of(name)) for name in expert_parameters(model))]
    if isinstance(asked, str) and asked in PLACES:
        names = places(asked, layers_of_group(model, "attention"), layers_of_group(model, "mlp"), blocks)
        check_matches("adapter.target_modules", asked, names, layers)
        return names
    found = []
    for name in [asked] if isinstance(asked, str) else asked:
        is_pattern = isinstance(asked, str)
        matching = [
            full
            for full in (*layers, *blocks)
            if (matches(name, full, "adapter.target_modules") if is_pattern else has_name(full, [name]))
        ]
        check_matches("adapter.target_modules", name, matching, layers)
        found += matching
    return [*dict.fromkeys(found)]


ADAPTING = Adapting(
    add=_add,
    frozen_experts=unchanged_experts,
    leaves_base_alone=lambda adapter, is_quantised: not adapter.modules_to_save,
    peft_type=KIND,
    why_unmerged="bottlenecks are not linear, so that no weight of the base can hold them. They are read beside their base, by "
    "raytune score and by PeftModel.from_pretrained after `import raytune.model.adapters`. For one whole model, set "
    "adapter.method to lora",
)
