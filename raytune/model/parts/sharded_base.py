"""A frozen base whose layers are divided among the ranks, while what is trained lies whole on each.

Between two passes a rank keeps its share of a layer's weights, end to end. Before a layer computes, one collective brings the
whole layer into one buffer, of which its parameters are views; when it has computed, the buffer gives its memory back. Backward
passes bring it again. A frozen weight has no gradient, so that nothing else is exchanged. Parameters stay what they were: of the
same class, in the same shape, with what others have attached to them; but for the numbers, which only the layer's own passes may
read.

Embeddings, head and last norm stay whole: they are read in many places, and are a small part of a model that needs this.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from raytune.errors import ModelError
from raytune.model.parts.collectives import arrived
from raytune.model.parts.layers import layers_of

_SHARE = "share_of_rank"
"""Attribute of a parameter whose numbers are divided by themselves: while a model is loaded, and what it is to learn is added."""
ALIGNMENT = 256
"""Bytes at a multiple of which a parameter begins in its layer's buffer, as in memory of its own: kernels ask for up to that."""


def share_of(parameter: nn.Parameter) -> Tensor | None:
    """What this rank keeps of a parameter that is divided by itself, as a flat tensor of its dtype; None: it is not."""
    share: Tensor | None = getattr(parameter, _SHARE, None)
    return None if share is None else share.view(parameter.dtype)


@contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which parameters that are divided by themselves have their numbers. Every rank enters it; changes are lost."""
    divided = [parameter for parameter in parameters if hasattr(parameter, _SHARE)]
    for parameter in divided:
        parameter.data = _gathered(parameter)
    try:
        yield
    finally:
        for parameter in divided:
            _hollow_out(parameter.data)


class ShardedBase:
    """The divided layers of a model, on this rank. Every rank does the same things with it in the same order."""

    def __init__(self) -> None:
        self._layers: list[_ShardedLayer] = []
        self._is_in_backward = False

    # --- while the model is loaded

    def keep_share(self, parameter: nn.Parameter) -> None:
        """Keep this rank's share of a weight that has just become part of a module, and let the rest go."""
        numbers = parameter.data.contiguous().flatten().view(torch.uint8)
        size = -(-len(numbers) // dist.get_world_size())
        size += -size % ALIGNMENT  # whole numbers of every dtype
        share = numbers.new_zeros(size)
        own = numbers[dist.get_rank() * size :][:size]
        share[: len(own)] = own
        parameter.data = torch.empty_like(parameter.data, memory_format=torch.contiguous_format)
        _hollow_out(parameter.data)
        setattr(parameter, _SHARE, share)

    def loaded(self, model: nn.Module) -> None:
        """Make whole again what does not lie in one layer, and in that alone."""
        found = layers_of(model)
        place = re.compile(rf"{re.escape(found[0])}\.(\d+)\." if found else "(?!)")
        places: dict[int, set[str | None]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            match = place.match(name)
            places.setdefault(id(parameter), set()).add(match and match[1])
        for parameter in model.parameters():
            if None in places[id(parameter)] or len(places[id(parameter)]) > 1:
                _make_whole(parameter)

    # --- once what is trained has been added

    def begin(self, model: nn.Module) -> None:
        """Lay each layer's frozen weights end to end, and have its passes bring them.

        Raises:
            ModelError: if the model has its layers in no list, or all of their weights are trained.
        """
        found = layers_of(model)
        for layer in found[1] if found else ():
            parameters = [parameter for parameter in layer.parameters() if hasattr(parameter, _SHARE)]
            for parameter in parameters:
                if parameter.requires_grad:
                    _make_whole(parameter)
            frozen = [parameter for parameter in parameters if not parameter.requires_grad]
            if frozen:
                before = self._layers[-1] if self._layers else None
                self._layers.append(_ShardedLayer(layer, frozen, before, self._note_backward))
        if not self._layers:
            raise ModelError("No layer of the model has frozen weights that could be divided among the workers.")

    def _note_backward(self) -> None:
        """Told in a backward pass: when that is over, no layer is whole, whatever way gradients took."""
        if not self._is_in_backward:
            self._is_in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._is_in_backward = False
        for layer in self._layers:
            layer.end()

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Context in which parameters of layers have their numbers, to be read. Every rank enters it, between passes."""
        wanted = {id(parameter) for parameter in parameters}
        layers = [layer for layer in self._layers if not wanted.isdisjoint(layer.ids)]
        for layer in layers:
            layer.make_whole()
        try:
            yield
        finally:
            for layer in layers:
                layer.end()

    @property
    def num_bytes_spared(self) -> int:
        """Of the weights that the model seems to have, those that are not on this rank between passes."""
        return sum(layer.num_bytes_of_weights - layer.num_own_bytes for layer in self._layers)


class _ShardedLayer:
    """One layer, and what its passes do beside computing."""

    def __init__(
        self, layer: nn.Module, parameters: list[nn.Parameter], before: "_ShardedLayer | None", note_backward: Callable[[], None]
    ) -> None:
        """
        Args:
            parameters: divided by themselves; from now on views of the layer's buffer.
            before: the layer whose passes come before in a forward pass, and after in a backward pass.
            note_backward: called whenever a backward pass comes here.
        """
        self._before, self._after, self._note_backward = before, None, note_backward
        if before is not None:
            before._after = self
        sizes = [_num_bytes(parameter) for parameter in parameters]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size + -size % ALIGNMENT)
        num_ranks, rank = dist.get_world_size(), dist.get_rank()
        share = -(-starts[-1] // num_ranks)
        share += -share % ALIGNMENT
        self.ids = {id(parameter) for parameter in parameters}
        self.num_bytes_of_weights, self.num_own_bytes = sum(sizes), share
        self._num_bytes = share * num_ranks
        self._buffer = torch.zeros(self._num_bytes, dtype=torch.uint8, device=parameters[0].device)
        for parameter, start, size in zip(parameters, starts, sizes):
            part = self._buffer[start : start + size].view(parameter.dtype).view(parameter.shape)
            part.copy_(_gathered(parameter))
            parameter.data = part
            delattr(parameter, _SHARE)
        self._own = self._buffer[rank * share : (rank + 1) * share].clone()
        self._arriving: Any = None
        self._is_whole = self._is_in_backward = self._awaits_backward = False
        _hollow_out(self._buffer)
        layer.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        layer.register_forward_hook(self._after_forward, with_kwargs=True)

    def _fetch(self) -> None:
        """Begin to bring the weights here, if they are not."""
        if self._is_whole or self._arriving is not None:
            return
        self._buffer.untyped_storage().resize_(self._num_bytes)
        # Autograd may hold the weights from a forward pass, and these numbers are the same ones.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(self._buffer):
            self._arriving = dist.all_gather_single(self._buffer, self._own, async_op=True)

    def make_whole(self) -> None:
        """Wait until the weights are here: the host on a CPU, the stream that computes on a GPU."""
        self._fetch()
        if self._arriving is not None:
            arrived(self._arriving)
            self._arriving, self._is_whole = None, True

    def _let_go(self) -> None:
        if self._arriving is not None:
            self.make_whole()
        if self._is_whole:
            _hollow_out(self._buffer)
            self._is_whole = False

    def end(self) -> None:
        """Be as between steps."""
        self._is_in_backward = self._awaits_backward = False
        self._let_go()

    def _before_forward(self, layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.make_whole()
        if not self._is_in_backward and self._after is not None:  # else activation checkpointing computes it again
            self._after._fetch()

    def _after_forward(self, layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if self._is_in_backward:
            return
        self._let_go()
        leaves = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        self._awaits_backward = bool(leaves) and torch.is_grad_enabled()
        if not self._awaits_backward:
            return
        for tensor in leaves:
            tensor.register_hook(self._before_backward)
        # Gradients of what entered the layer are complete when all that computes with its weights is done: autograd takes what
        # was computed last first. Where nothing that entered has one, the end of the backward pass has to do.
        enters = [tensor for tensor in _tensors((arguments, named)) if tensor.requires_grad]
        if not enters:
            return
        handles: list[Any] = []

        def after_backward(gradients: Any) -> None:
            handles.pop().remove()  # hook and graph hold each other: what passed here would wait for the garbage collector
            self._after_backward()

        handles.append(register_multi_grad_hook(enters, after_backward))

    def _before_backward(self, gradient: Tensor) -> None:
        self._note_backward()
        self.make_whole()
        self._is_in_backward = True
        if self._after is None or not self._after._is_in_backward:
            self._fetch_before()

    def _after_backward(self) -> None:
        self.end()
        if self._before is not None and self._before._is_in_backward:
            self._before._fetch_before()  # only now, so that two layers are whole, and not three

    def _fetch_before(self) -> None:
        if self._before is not None and self._before._awaits_backward:
            self._before._fetch()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors([*value.values()])


def _make_whole(parameter: nn.Parameter) -> None:
    """Give a parameter that is divided by itself its numbers for good."""
    if hasattr(parameter, _SHARE):
        parameter.data = _gathered(parameter)
        delattr(parameter, _SHARE)


def _gathered(parameter: nn.Parameter) -> Tensor:
    share: Tensor = getattr(parameter, _SHARE)
    numbers = share.new_empty(len(share) * dist.get_world_size())
    dist.all_gather_single(numbers, share)
    return numbers[: _num_bytes(parameter)].view(parameter.dtype).view(parameter.shape)


def _num_bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def _hollow_out(tensor: Tensor) -> None:
    """Give back the memory of a tensor that keeps its shape; nothing may read it until it has some again."""
    tensor.untyped_storage().resize_(0)
