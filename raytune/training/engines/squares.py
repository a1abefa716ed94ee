"""Squares of gradients, in the place of gradients: whatever an engine does with these, it then does with those."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def squaring(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which a backward pass adds to each gradient the square of its own: of all that reaches the parameter in that
    pass, before it is added up over passes or ranks. So a pass is to be of one loss whose gradient is squared by itself."""
    hooks = [parameter.register_hook(torch.square) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
