"""Linear layers and norms whose weights a model reads itself, to hand them to a fused kernel."""

import inspect
import re
from collections.abc import Callable, Iterator
from functools import lru_cache

from torch import nn

from raytune.model.parts.norms import is_norm

READ = re.compile(r"self\.(\w+)\.weight\b")


def bypassed_layers(model: nn.Module) -> Iterator[str]:
    """Names of such layers: neither an update of theirs, nor numbers packed by bitsandbytes, would be seen by the kernel.

    The kernels of state-space layers (mamba_ssm) take projections in, where they are installed; without them the same layers
    are called as others are.
    """
    return _bypassed(model, lambda module: isinstance(module, nn.Linear))


def bypassed_norms(model: nn.Module) -> Iterator[str]:
    """Names of norms that are read so: a kernel finds no weight on what PEFT puts in their place."""
    return _bypassed(model, is_norm)


def _bypassed(model: nn.Module, is_meant: Callable[[nn.Module], bool]) -> Iterator[str]:
    for path, module in model.named_modules():
        children = {name for name, child in module.named_children() if is_meant(child)}
        for name in sorted(children & _read_by(type(module))) if children else ():
            yield f"{path}.{name}" if path else name


@lru_cache(maxsize=256)
def _read_by(kind: type[nn.Module]) -> frozenset[str]:
    # Kept: to find the lines of a class, Python parses its whole file, and a model has one kind in each of its layers.
    try:
        return frozenset(READ.findall(inspect.getsource(kind)))
    except (OSError, TypeError):  # classes without a file
        return frozenset()
