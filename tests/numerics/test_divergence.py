"""A guarded run that diverges for real equals plain torch that skips, or goes back with a lower rate: alone, on two ranks at every
ZeRO stage, and resumed wherever it is killed. The oracle decides by its own rule, in numpy."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raytune.data.batches import step_batches
from raytune.data.store import Store
from raytune.errors import TrainingError
from raytune.metrics.events import read_events
from raytune.metrics.history import History
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import read_json
from raytune.training.commit import committed
from raytune.training.run import Worker, train
from raytune.training.stopping import Findings
from tests.numerics.oracles import PROJECTIONS, document_loss, documents
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import LORA, QLORA, SAME_SUMS, Material, make_plan

THRESHOLD = 6.0
NUM_STEPS, SAVE_EVERY, WINDOW, MOST = 16, 2, 4, 3
FULL: dict[str, Any] = {"method": "full"}
RATES = {"full": 1e-2, "lora": 0.1, "qlora": 0.1}
"""Too high: loss and gradient explode at some step behind the warm-up."""
SKIP: dict[str, Any] = {"policy": "skip", "window": WINDOW, "patience": 1}
BACK: dict[str, Any] = {"policy": "roll_back", "window": WINDOW, "patience": 1}


def guarded(material: Material, storage: Path, guard: dict[str, Any] | None, adapter: dict[str, Any] = FULL, **changes: Any) -> RunPlan:
    return make_plan(
        material,
        storage=str(storage),
        template="",  # of the demo's own, which is in its tokenizer
        adapter=adapter,
        optimization={
            "num_steps": NUM_STEPS,
            "num_rows": 8 * NUM_STEPS,
            "learning_rate": RATES[adapter["method"]],
            "schedule": "constant",
            "warmup_steps": 2,
            "epsilon": 1e-6,
            "max_grad_norm": 0.0,
            "weight_decay": 0.1,
        },
        checkpoint={"every_steps": SAVE_EVERY, "keep_last": 3},
        divergence=guard,
        **changes,
    )


@dataclass
class Outcome:
    """What is left of a run."""

    losses: dict[int, float]
    norms: dict[int, float]
    weights: dict[str, Tensor]
    skipped: list[int] = field(default_factory=list)
    roll_backs: list[tuple[int, int]] = field(default_factory=list)
    """(step that went wrong, step that was gone back to)."""


def run(plan: RunPlan, attempt: int = 1, check: Callable[[], None] = lambda: None) -> Outcome:
    train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=attempt, report=lambda metrics: None, check=check))
    return left_by(plan)


def left_by(plan: RunPlan) -> Outcome:
    folder = RunFolder(plan.storage, plan.name)
    history, events = History.read(folder.metrics), read_events(folder.events)
    name = "model" if plan.adapter.method == "full" else "adapter_model"
    return Outcome(
        losses=dict(history.series("train/loss")),
        norms=dict(history.series("train/grad_norm")),
        weights=load_file(Path(folder.model) / f"{name}.safetensors"),
        skipped=[event["step"] for event in events if event["event"] == "update_skipped"],
        roll_backs=[(back.bad_step, back.to) for back in history.roll_backs],
    )


def assert_equal(outcome: Outcome, other: Outcome) -> None:
    assert outcome.losses == other.losses
    assert outcome.norms == other.norms
    assert outcome.roll_backs == other.roll_backs
    assert outcome.weights.keys() == other.weights.keys()
    for name, value in outcome.weights.items():
        assert torch.equal(value, other.weights[name]), name


# --- The oracle --------------------------------------------------------------------------------------------------------------


def is_spike(before: list[float], value: float, threshold: float) -> bool:
    last = np.array(before[-WINDOW:])
    if len(last) < WINDOW:
        return False
    deviation = 1.4826 * np.median(np.abs(last - np.median(last)))
    return value > np.median(last) + threshold * max(deviation, 0.01 * np.median(last))


def plain_model(plan: RunPlan) -> Any:
    if plan.adapter.method == "full":
        return AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    quantized: dict[str, Any] = {}
    if plan.model.quantization:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_storage=torch.float32,
        )
        quantized = {"quantization_config": config, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32, **quantized)
    torch.manual_seed(plan.seed)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))


def plain(plan: RunPlan, policy: str) -> Outcome:
    """A plan's rows, a document at a time, by torch's AdamW."""
    model, settings, store = plain_model(plan), plan.optimization, Store.open(plan.data.train.path)
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [parameter for parameter in trained.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in trained.values() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, eps=settings.epsilon)

    def state() -> Any:
        return copy.deepcopy(({name: value.detach() for name, value in trained.items()}, optimizer.state_dict()))

    out, saved, factor, step = Outcome({}, {}, {}), {0: state()}, 1.0, 0
    while step < settings.num_steps:
        batches = step_batches(
            store, step=step, rank=0, world=1, micro_batch_size=8, accumulation=1, num_rows_in_run=10**6, seed=plan.seed
        )
        num_targets = sum(batch.target_ids.numel() for batch in batches)
        loss: Any = sum(document_loss(model, ids, labels) for batch in batches for ids, labels in documents(batch)) / num_targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), math.inf).item()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, step / settings.warmup_steps) * factor
        step += 1
        before = [[*seen.values()] for seen in (out.losses, out.norms)]
        out.losses[step], out.norms[step] = loss.item(), norm
        if policy == "skip" and is_spike(before[1], norm, THRESHOLD):
            out.skipped.append(step)
        else:
            optimizer.step()
        optimizer.zero_grad()
        if policy == "roll_back" and (is_spike(before[0], loss.item(), THRESHOLD) or is_spike(before[1], norm, THRESHOLD)):
            bad_step, step = step, max(known for known in saved if known < step - 1)
            weights, optimizer_state = copy.deepcopy(saved[step])
            for name, value in weights.items():
                trained[name].data.copy_(value)
            optimizer.load_state_dict(optimizer_state)
            factor *= 0.5
            out.roll_backs.append((bad_step, step))
            assert len(out.roll_backs) <= MOST, out.roll_backs
            for seen in (out.losses, out.norms, saved):
                for gone in [known for known in seen if known > step]:
                    del seen[gone]
        elif step % SAVE_EVERY == 0:
            saved[step] = state()
    out.weights = {name.replace(".default.", "."): value.detach() for name, value in trained.items()}
    return out


def assert_close(outcome: Outcome, other: Outcome) -> None:
    assert outcome.skipped == other.skipped
    assert outcome.roll_backs == other.roll_backs
    assert outcome.losses.keys() == other.losses.keys()
    difference = max(abs(value / other.losses[step] - 1) for step, value in outcome.losses.items())
    assert difference < SAME_SUMS, (difference, outcome.losses, other.losses)


# --- Claims ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [FULL, LORA, QLORA], ids=lambda adapter: adapter["method"])
@pytest.mark.parametrize("guard", [SKIP, BACK], ids=lambda guard: guard["policy"])
def test_a_guarded_run_equals_plain_torch(
    guard: dict[str, Any], adapter: dict[str, Any], material: Material, tmp_path: Path
) -> None:
    plan = guarded(material, tmp_path, guard, adapter)
    expected, outcome = plain(plan, guard["policy"]), run(plan)
    assert expected.skipped or expected.roll_backs, "nothing diverged"
    assert_close(outcome, expected)
