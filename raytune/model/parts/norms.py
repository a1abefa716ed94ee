"""Which modules of a model are norms: those with weights, whatever their class."""

from torch import nn
from transformers.pytorch_utils import Conv1D


def is_norm(module: nn.Module) -> bool:
    """Whether all that a module holds is weights along one dimension, or it is called a norm; attention with sinks is none.

    Weights may be divided by ZeRO-3, which keeps their shape as `ds_shape`.
    """
    parameters = dict(module.named_parameters(recurse=False))
    if not parameters or any(module.children()) or isinstance(module, nn.Embedding | nn.Linear | nn.Conv1d | Conv1D):
        return False
    weights = [parameter for name, parameter in parameters.items() if not name.endswith("bias")]
    dimensions = max((len(getattr(parameter, "ds_shape", parameter.shape)) for parameter in weights), default=1)
    return dimensions == 1 or "norm" in type(module).__name__.lower()
