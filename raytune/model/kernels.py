"""Linear layers whose weights a model reads itself, to hand them to a fused kernel."""

import inspect
import re
from collections.abc import Iterator

from torch import nn

READ = re.compile(r"self\.(\w+)\.weight\b")


def bypassed_layers(model: nn.Module) -> Iterator[str]:
    """Names of such layers: neither an update of theirs, nor numbers packed by bitsandbytes, would be seen by the kernel.

    The kernels of state-space layers (mamba_ssm) take projections in, where they are installed; without them the same layers
    are called as others are.
    """
    for path, module in model.named_modules():
        children = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
        for name in sorted(children & _read_by(type(module))) if children else ():
            yield f"{path}.{name}" if path else name


def _read_by(kind: type[nn.Module]) -> set[str]:
    try:
        return {*READ.findall(inspect.getsource(kind))}
    except (OSError, TypeError):  # classes without a file
        return set()
