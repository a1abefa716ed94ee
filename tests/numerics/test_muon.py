"""Muon in a run = PyTorch's Muon and AdamW beside each other, on one rank or two, resumed or not; its bytes are planned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from raytune.plan.costs.memory import memory_parts
from raytune.plan.run_plan import RunPlan
from tests.numerics.measured_bytes import of_one_process
from tests.numerics.oracles import PROJECTIONS
from tests.numerics.runs import LORA, Change, Material, largest_difference, relative_difference, run, train
from tests.numerics.strategies import FULL, plain_training, settled, strategy_plan
from tests.variants import variants

BFLOAT16 = 2**-8
"""Muon orthogonalises in bf16: sums in another order, or a processor that multiplies bf16 in another way, round some entries to
the next number, and so weights are apart by less than this share of what AdamW in its place would make of them."""
SAME_LOSSES = 2e-5


def plan(material: Material, adapter: dict[str, Any], **changes: Any) -> RunPlan:
    return strategy_plan(material, {}, adapter, optimization={"optimizer": "muon"} | changes.pop("optimization", {}), **changes)


class MuonBesideAdamW(torch.optim.Optimizer):
    def __init__(self, groups: list[dict[str, Any]], epsilon: float) -> None:
        super().__init__(groups, {})
        hidden = [group for group in groups if "_proj" in group["name"]]
        others = [group for group in groups if "_proj" not in group["name"]]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw")]
        self.parts += [torch.optim.AdamW(others, eps=epsilon)] if others else []

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], with_adamw: dict[str, torch.Tensor]) -> float:
    """How far two runs with Muon are apart, as a share of how far AdamW is from them: of the weight where that is most."""
    assert ours.keys() == theirs.keys() == with_adamw.keys()
    return max(float((ours[name] - theirs[name]).norm() / (theirs[name] - with_adamw[name]).norm()) for name in ours)


@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
def test_a_run_equals_muon_and_adamw_of_plain_torch(adapter: dict[str, Any], material: Material) -> None:
    asked = plan(material, adapter)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS) if adapter is LORA else None
    losses, weights = plain_training(asked, lambda name: True, lora=lora, optimizer_of=MuonBesideAdamW)
    with_adamw = plain_training(asked, lambda name: True, lora=lora)[1]
    ours = train(asked)
    assert relative_difference(ours.losses, losses) <= SAME_LOSSES
    assert apart(ours.weights, weights, with_adamw) <= BFLOAT16


def test_two_ranks_equal_one(material: Material) -> None:
    alone, shared = train(plan(material, FULL)), run(plan(material, FULL, workers=2))[0]
    with_adamw = train(strategy_plan(material, {}, FULL))
    assert relative_difference(shared.losses, alone.losses) <= SAME_LOSSES
    assert apart(shared.weights, alone.weights, with_adamw.weights) <= BFLOAT16


@pytest.mark.parametrize("adapter", variants([FULL], [LORA]), ids=["full", "lora"])
def test_resumed_equals_unbroken(adapter: dict[str, Any], material: Material, tmp_path: Path) -> None:
    asked = plan(material, adapter)
    unbroken = train(asked)
    train(asked, Change(stop=3, save=tmp_path))
    resumed = train(asked, Change(start=3, load=tmp_path / "rank-0"))
    assert resumed.numbers == unbroken.numbers[3:]
    assert largest_difference(resumed, unbroken) == 0


@pytest.mark.parametrize("adapter", [FULL, LORA | {"use_dora": True, "modules_to_save": ["down_proj"]}], ids=["full", "lora"])
def test_a_rank_holds_the_planned_bytes_of_state(adapter: dict[str, Any], material: Material) -> None:
    """Within 2 %."""
    setting, shape = settled(material.model, {}, adapter)
    work = of_one_process(shape, setting.trained, optimizer="muon")
    planned = {part.name: part.num_bytes for part in memory_parts(work)}["optimizer"]
    assert planned == pytest.approx(train(plan(material, adapter), Change(stop=1)).held.optimizer, rel=0.02)
