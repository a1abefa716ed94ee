"""AdaLoRA beside updates: the term of its loss is PEFT's, ranks go down to what was asked for, and what is saved is what was
trained, whenever that is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytune.errors import UserError
from raytune.model.adapters.adalora import RankUpdates
from raytune.model.files.export import save_adapter
from tests.numerics.runs import NUM_STEPS, SAME_SUMS, Change, Material, start, steps_of
from tests.numerics.test_peft_methods import IDS, logits, plan_of
from tests.peft_methods import PROJECTIONS
from tests.tiny import tiny_model
from tests.unit.plan_cases import CPU, DEMO, planned

NUM_LAYERS = 14
"""Linear layers of the tiny model."""
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")


def adapted(weight: float) -> Any:
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, orth_reg_weight=weight, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    return get_peft_model(tiny_model(), config)


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.requires_grad}


def test_what_is_added_has_the_gradient_of_peft_s_own_term() -> None:
    with_term, without = gradients_of(adapted(0.5)), gradients_of(adapted(0.0))
    model = adapted(0.5)
    updates = RankUpdates(model, model.peft_config["default"])
    assert updates.parameters.keys() == without.keys()
    updates.add_gradients({name: one.data for name, one in updates.parameters.items()}, without)
    assert max((with_term[name] - without[name]).abs().max() for name in without) <= SAME_SUMS
    assert max(one.abs().max() for one in without.values()) > 1e-3


def test_a_step_that_updated_nothing_leaves_the_averages_and_counts() -> None:
    model = adapted(0.5)
    updates = RankUpdates(model, model.peft_config["default"])
    values = {name: one.data for name, one in updates.parameters.items()}
    updates.after_update(values, {name: torch.ones_like(value) for name, value in values.items()})
    before = {name: value.clone() for name, value in updates.state().items()}
    updates.skipped()
    after = updates.state()
    assert all(after[name].equal(value) for name, value in before.items() if name != "step")
    assert (before["step"], after["step"]) == (1, 2)


def test_whatever_step_is_saved_plain_peft_computes_what_was_trained(material: Material, tmp_path: Path) -> None:
    """Before the ranks are chosen for good all are saved, also by an engine that went back there from after it."""
    plan = plan_of("adalora", material)
    engine, loss_sum, batches_of = start(plan)
    for result in steps_of(plan, engine, loss_sum, batches_of, Change(stop=2)):
        result.read(engine)
    engine.save(tmp_path / "state")
    early = saved(engine, tmp_path / "early")
    assert compares(plan.model.path, early, engine) <= SAME_SUMS
    assert ranks_in(early) == 4 * NUM_LAYERS
    for result in steps_of(plan, engine, loss_sum, batches_of, Change(start=2)):
        result.read(engine)
    late = saved(engine, tmp_path / "late")
    assert compares(plan.model.path, late, engine) <= SAME_SUMS
    assert ranks_in(late) == plan.adapter.rank * NUM_LAYERS  # pyright: ignore[reportAttributeAccessIssue]
    engine.load(tmp_path / "state")
    again = saved(engine, tmp_path / "again")
    assert compares(plan.model.path, again, engine) <= SAME_SUMS
    assert ranks_in(again) == 4 * NUM_LAYERS
    assert NUM_STEPS == 4, "which the schedule was made for"


def saved(engine: Any, folder: Path) -> Path:
    save_adapter(engine.model, dict(engine.trainable_state()), folder)
    return folder


def compares(base: str, folder: Path, engine: Any) -> float:
    plain: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder))
    ours = logits(engine.model.eval())
    engine.model.train()
    return (ours - logits(plain.eval())).abs().max().item()


def ranks_in(folder: Path) -> int:
    return sum(len(value) for name, value in load_file(folder / "adapter_model.safetensors").items() if ".lora_E" in name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8, "initial_rank": 8}, r"nothing to take away\. Set adapter\.initial_rank to 12"),
        ({"tinit_fraction": 0.5, "tfinal_fraction": 0.5}, "leave no step between them"),
    ],
)
def test_a_schedule_without_a_choice_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(CPU, DEMO, adapter={"method": "adalora"} | changes)


def test_a_plan_says_what_is_added_to_the_loss_and_when_ranks_go() -> None:
    reasons = " ".join(planned(CPU, DEMO, adapter={"method": "adalora"}).reasons)
    assert "adapter.orthogonal_weight adds 0.5 times" in reasons
    assert "every 10 steps after the first 10% of the steps and before the last 50%" in reasons
