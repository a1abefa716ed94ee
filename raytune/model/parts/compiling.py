"""torch.compile of a decoder's layers, one by one: they are alike, so that one compilation serves all, and what surrounds them
(the loss, whose number of targets changes with every batch) stays as it is."""

from torch import nn

from raytune.errors import ModelError
from raytune.model.parts.layers import layers_of


def compile_layers(model: nn.Module) -> None:
    """Compile each layer in place, for any number of tokens, so that names stay.

    Raises:
        ModelError: if the model has its layers in no list.
    """
    found = layers_of(model)
    if found is None:
        raise ModelError(f"training.compile compiles layers, and {type(model).__name__} has no list of them. Set it to false.")
    for layer in found[1]:
        layer.compile(dynamic=True)
