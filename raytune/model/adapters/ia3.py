"""(IA)^3 on a model: PEFT's configuration of it, with both lists of layers by names that PEFT reads alike."""

import torch
from peft import IA3Config, PeftModel
from peft.tuners.ia3.layer import IA3Layer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raytune.config.sections.adapter import Ia3Adapter
from raytune.errors import ModelError
from raytune.model.adapters.adapting import Adapting, added
from raytune.model.adapters.targets import (
    check_matches,
    check_named,
    layers_of_group,
    shortest_suffixes,
    target_names,
    unchanged_experts,
)
from raytune.plan.methods.ia3 import PAPER, is_of_feedforward, paper_targets
from raytune.plan.methods.layers import ways_back


def _add(model: PreTrainedModel, adapter: Ia3Adapter, revision: str | None, seed: int) -> PeftModel:
    check_named(model, adapter)
    everything = [name for name, _ in model.named_modules()]
    mlp = layers_of_group(model, "mlp")
    if adapter.target_modules == PAPER:
        names = paper_targets(layers_of_group(model, "attention"), mlp)
        check_matches("adapter.target_modules", PAPER, names, everything)
    else:
        names = target_names(model, adapter.target_modules)
    backs = {*ways_back(mlp)}
    inputs = [name for name in names if is_of_feedforward(name, adapter, backs)]
    outputs = [name for name in names if name not in inputs]
    of_inputs = shortest_suffixes(inputs, everything)
    # PEFT asks only for the end of a name, so that `x_down_proj` is a `down_proj` too.
    alike = [name for name in outputs if name.endswith(tuple(of_inputs))]
    if alike:
        raise ModelError(
            f"adapter.feedforward_modules takes in {alike[0]} for PEFT, which looks at the end of a name only ({of_inputs}). "
            f"Leave it out of adapter.target_modules."
        )
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=[*of_inputs, *shortest_suffixes(outputs, everything)],
        feedforward_modules=of_inputs,
        exclude_modules=adapter.exclude_modules or None,
        modules_to_save=adapter.modules_to_save or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        revision=revision,
    )
    adapted = added(model, config, adapter, seed=seed)
    _keep_dtype(adapted)
    return adapted


def _keep_dtype(model: PeftModel) -> None:
    """Have layers give what they give in the dtype of their inputs: over 4 or 8 bits PEFT 0.21 gives fp32 without autocast."""
    for module in model.modules():
        if isinstance(module, IA3Layer):
            module.register_forward_hook(lambda layer, inputs, output: output.to(inputs[0].dtype))


@torch.no_grad()
def _merged_bias(layer: IA3Layer, bias: Tensor) -> Tensor:
    """Factors of the outputs multiply it too."""
    if layer.is_feedforward:
        return bias
    return (bias.float() * layer.ia3_l["default"].reshape(bias.shape)).to(bias.dtype)


ADAPTING = Adapting(
    add=_add,
    frozen_experts=unchanged_experts,
    # PEFT takes factors off a base in 4 or 8 bits as little as it merges them.
    leaves_base_alone=lambda adapter, is_quantised: not (adapter.modules_to_save or is_quantised),
    peft_type="IA3",
    merges=True,
    merged_bias=_merged_bias,
    mend=_keep_dtype,
)
