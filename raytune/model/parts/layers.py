"""The layers of a decoder, whatever its architecture calls them."""

from torch import nn


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The longest list of layers by weights, under its name; None: the model has its layers in no list."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(lists, key=lambda item: sum(_num_weights(parameter) for parameter in item[1].parameters()), default=None)


def _num_weights(parameter: nn.Parameter) -> int:
    """Of the whole parameter; of a shard of ZeRO-3, DeepSpeed notes it."""
    return getattr(parameter, "ds_numel", parameter.numel())
