"""LoRA without casts that autocast undoes, against PEFT's own way: equal to the last bit, with fewer casts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from raytune.model.files.export import save_adapter
from raytune.plan.run_plan import RunPlan
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    LORA,
    QLORA,
    Change,
    Material,
    Outcome,
    make_plan,
    outcome,
    start,
    steps_of,
)
from tests.variants import variants

ALL = {"target_modules": "all-linear"}
NUM_TARGETS = 14
"""Linear layers of two layers of a Llama."""
BF16: dict[str, Any] = {"precision": "bf16", "model": {"dtype": "bf16", "compute_dtype": "bf16"}}
FP16: dict[str, Any] = {"precision": "fp16", "model": {"dtype": "fp16", "compute_dtype": "fp16"}}
RECOMPUTED: dict[str, Any] = {"precision": "bf16", "model": BF16["model"] | {"gradient_checkpointing": True}}
CASES: dict[str, dict[str, Any]] = {
    "lora": BF16 | {"adapter": LORA | ALL},
    "qlora": BF16 | {"adapter": QLORA | ALL},
    "modules to save": BF16 | {"adapter": LORA | ALL | {"modules_to_save": ["lm_head", "model.norm"]}},
    "recomputed": RECOMPUTED | {"adapter": LORA | ALL},
    "fp16": FP16 | {"adapter": LORA | ALL},
    "fp32": {"adapter": LORA | ALL},
}


class Casts(TorchDispatchMode):
    """Counts casts from one dtype to another."""

    def __init__(self) -> None:
        super().__init__()
        self.num_casts = self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            self.num_casts += 1
            self.num_bytes += result.nbytes
        return result


def cast_as_peft_does(model: nn.Module) -> None:
    """Give the layers of a model back what they have of PEFT."""
    for module in model.modules():
        module.__dict__.pop("_cast_input_dtype", None)


def train_in_one_of_two_ways(plan: RunPlan, as_peft: bool, change: Change, exported: Path | None = None) -> Outcome:
    engine, loss_sum, batches_of = start(plan)
    if as_peft:
        cast_as_peft_does(engine.model)
    if change.load is not None:
        engine.load(change.load)
    numbers = [result.read(engine) for result in steps_of(plan, engine, loss_sum, batches_of, change)]
    if change.save is not None:
        engine.save(change.save / f"rank-{engine.rank}")
    if exported is not None:
        save_adapter(engine.model, dict(engine.trainable_state()), exported)  # pyright: ignore[reportArgumentType]
    return outcome(engine, numbers)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", variants(["qlora", "modules to save"], ["lora", "recomputed", "fp16", "fp32"]))
def test_losses_weights_and_saved_files_are_those_with_peft_s_casts(case: str, material: Material, tmp_path: Path) -> None:
    plan = make_plan(material, **CASES[case])
    ways = {}
    for as_peft in (True, False):
        folder = tmp_path / str(as_peft)
        first = train_in_one_of_two_ways(plan, as_peft, Change(stop=2, save=folder / "state"))
        resumed = Change(start=2, stop=4, load=folder / "state" / "rank-0")
        ways[as_peft] = first, train_in_one_of_two_ways(plan, as_peft, resumed, folder / "adapter")
    for theirs, ours in zip(ways[True], ways[False]):
        assert ours.numbers == theirs.numbers  # losses, and norms of gradients
        assert ours.weights.keys() == theirs.weights.keys()
        assert all(torch.equal(ours.weights[name], value) for name, value in theirs.weights.items())
    saved = contents(tmp_path / "False")
    assert saved == contents(tmp_path / "True")
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= saved.keys()


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3)])
def test_shards_train_as_with_peft_s_casts(stage: int, material: Material) -> None:
    plan = make_plan(material, workers=2, stage=stage, **CASES["lora"])
    theirs, ours = (run_on_ranks(train_in_one_of_two_ways, 2, plan, as_peft, Change(stop=3)) for as_peft in (True, False))
    assert [one.numbers for one in ours] == [one.numbers for one in theirs]
    assert all(torch.equal(ours[0].weights[name], value) for name, value in theirs[0].weights.items())


@dataclass(frozen=True, kw_only=True)
class Pass:
    loss: float
    gradients: dict[str, Tensor]
    forward: Casts
    backward: Casts


def one_pass(plan: RunPlan, *, as_peft: bool) -> Pass:
    engine, loss_sum, batches_of = start(plan)
    if as_peft:
        cast_as_peft_does(engine.model)
    batch = batches_of(0)[0]
    torch.manual_seed(0)
    with Casts() as forward, engine.autocast():
        loss = loss_sum(engine.module, batch)
    with Casts() as backward:
        engine.backward(loss / 100)
    gradients = {name: one.grad for name, one in engine.model.named_parameters() if one.grad is not None}
    return Pass(loss=loss.item(), gradients=gradients, forward=forward, backward=backward)


@pytest.mark.parametrize("case", ["lora", "qlora"])
def test_no_input_is_cast_on_its_way_to_an_update_and_back(case: str, material: Material) -> None:
    plan = make_plan(material, **CASES[case])
    theirs, ours = one_pass(plan, as_peft=True), one_pass(plan, as_peft=False)
    assert ours.loss == theirs.loss
    assert all(torch.equal(ours.gradients[name], value) for name, value in theirs.gradients.items())
    # Each target's to fp32 and back; and so on the way back, but for the three of the first layer that read no gradient's input.
    assert theirs.forward.num_casts - ours.forward.num_casts == 2 * NUM_TARGETS
    assert theirs.backward.num_casts - ours.backward.num_casts == 2 * (NUM_TARGETS - 3)
    all_bytes = [each.forward.num_bytes + each.backward.num_bytes for each in (ours, theirs)]
    assert all_bytes[0] < 0.35 * all_bytes[1]


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"use_dora": True}], ids=["dropout", "DoRA"])
def test_updates_that_compute_more_of_their_input_keep_peft_s_casts(changes: dict[str, Any], material: Material) -> None:
    plan = make_plan(material, **BF16 | {"adapter": LORA | changes})
    theirs, ours = one_pass(plan, as_peft=True), one_pass(plan, as_peft=False)
    assert ours.loss == theirs.loss
    assert ours.forward.num_casts == theirs.forward.num_casts


def test_outside_of_autocast_inputs_are_cast_as_ever(material: Material, tmp_path: Path) -> None:
    """For whoever answers with an adapter in fp32 over a base in 16 bits: ours as it was trained, or plain PEFT."""
    engine, *_ = start(make_plan(material, **CASES["lora"]))
    save_adapter(engine.model, dict(engine.trainable_state()), tmp_path)  # pyright: ignore[reportArgumentType]
    base = AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.bfloat16)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours = engine.model.eval()(input_ids=ids).logits
        assert torch.equal(PeftModel.from_pretrained(base, str(tmp_path)).eval()(input_ids=ids).logits, ours)
