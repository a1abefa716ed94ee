"""LoRA whose updates are added within products, in fp32, against PEFT's own way."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from raytune.model.adapters.fused_updates import FusedLinear, fuse_updates
from tests.numerics.runs import LORA, SAME_SUMS, Change, Material, make_plan, outcome, start, steps_of

ALL = {"target_modules": "all-linear"}
WIDE = 24
"""Outputs of the layers below; nothing else is as wide."""


class Wide(TorchDispatchMode):
    """Counts additions and multiplications, other than products of matrices, of tensors as wide as a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        adds = func in (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor)
        self.count += bool(adds and isinstance(result, Tensor) and result.shape[-1] == WIDE and result.dim() > 1)
        return result


class OneLayer(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(16, WIDE, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(*, bias: bool = False, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(OneLayer(bias=bias), LoraConfig(target_modules=["layer"], **({"r": 4, "lora_alpha": 12} | settings)))  # pyright: ignore[reportArgumentType]
    nn.init.normal_(next(value for name, value in model.named_parameters() if "lora_B" in name))
    return model


def passed(model: nn.Module, shape: tuple[int, ...], *, input_learns: bool = True) -> tuple[dict[str, Tensor], int]:
    """Output and gradients of a pass, and passes over wide tensors."""
    model.zero_grad(set_to_none=True)
    x = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1)).requires_grad_(input_learns)
    with Wide() as wide:
        output = model(x)
        output.square().mul(torch.arange(WIDE)).sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    found = {"output": output.detach(), **gradients} | ({"x": x.grad} if x.grad is not None else {})
    return found, wide.count  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 5)])
@pytest.mark.parametrize("input_learns", [False, True])
def test_output_and_gradients_are_peft_s_with_fewer_passes(bias: bool, shape: tuple[int, ...], input_learns: bool) -> None:
    model = adapted(bias=bias)
    theirs, passes_of_peft = passed(model, shape, input_learns=input_learns)
    fuse_updates(model)
    ours, passes = passed(model, shape, input_learns=input_learns)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6 * value.abs().max().item(), msg=name)
    assert passes < passes_of_peft


def _hooked(model: Any) -> None:
    model.base_model.model.layer.lora_A["default"].register_forward_hook(lambda *_: None)


def _base_learns(model: Any) -> None:
    model.base_model.model.layer.base_layer.weight.requires_grad = True


def _switched_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


LEFT: dict[str, tuple[dict[str, Any], Callable[[Any], None]]] = {
    "hooks": ({}, _hooked),
    "a base that learns": ({}, _base_learns),
    "switched off": ({}, _switched_off),
    "DoRA": ({"use_dora": True}, lambda model: None),
    "dropout": ({"lora_dropout": 0.5}, lambda model: None),
    "a bias of the update": ({"lora_bias": True}, lambda model: None),
}


@pytest.mark.parametrize("case", LEFT)
def test_others_are_left_to_peft_to_the_last_bit(case: str) -> None:
    settings, change = LEFT[case]
    model = adapted(bias=True, **settings)
    change(model)
    both = []
    for fuse in (False, True):
        if fuse:
            fuse_updates(model)
        torch.manual_seed(3)
        both.append(passed(model, (1, 7)) if case != "switched off" else (model(torch.ones(1, 7, 16)), 0))
    (theirs, passes_of_peft), (ours, passes) = both
    assert passes == passes_of_peft
    pairs = [(theirs, ours)] if isinstance(theirs, Tensor) else [(theirs[name], ours[name]) for name in theirs]
    assert all(torch.equal(one, other) for one, other in pairs)


def test_nothing_changes_for_who_answers_with_an_adapter() -> None:
    model = adapted()
    with torch.no_grad():
        theirs = model(torch.ones(1, 7, 16))
        fuse_updates(model)
        assert torch.equal(model(torch.ones(1, 7, 16)), theirs)


def _as_peft_does(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, FusedLinear):
            module.__class__ = Linear
            yield module


def test_a_run_learns_as_with_peft_s_way(material: Material) -> None:
    plan = make_plan(material, adapter=LORA | ALL)
    outcomes = []
    for as_peft in (True, False):
        engine, loss_sum, batches_of = start(plan)
        if as_peft:
            assert len(list(_as_peft_does(engine.model))) == 14
        numbers = [result.read(engine) for result in steps_of(plan, engine, loss_sum, batches_of, Change())]
        outcomes.append(outcome(engine, numbers))
    theirs, ours = outcomes
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=SAME_SUMS, atol=0)
    for name, value in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], value, rtol=0, atol=SAME_SUMS)


def test_many_adapted_layers_are_compiled_once() -> None:
    """More of them than torch compiles one function for; each is compiled with and without a gradient of what enters it."""
    torch.manual_seed(0)
    base = nn.Sequential(*(OneLayer(bias=False) for _ in range(torch._dynamo.config.recompile_limit + 2)))
    for part in base:
        part.layer = nn.Linear(16, 16, bias=False)  # pyright: ignore[reportAttributeAccessIssue]
    model: Any = get_peft_model(base, LoraConfig(target_modules=["layer"]))  # pyright: ignore[reportArgumentType]
    fuse_updates(model)
    torch._dynamo.reset()
    compiled = CompileCounter()
    for layer in base:
        layer.compile(backend=compiled)
    model(torch.ones(3, 16)).sum().backward()
    assert compiled.frame_count == 2
