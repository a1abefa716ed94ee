"""`model.dropout` = plain transformers with these rates in its config and the same seeds; off where nothing is trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Phi3Config, get_scheduler

from raytune.data.batches.batches import step_batches
from raytune.data.store.store import Store
from raytune.model.demo import demo_config
from raytune.model.files.export import save_model
from raytune.plan.run_plan import RunPlan
from raytune.training.steps.loop import evaluate_loss, step_seed
from tests.numerics.oracles import document_loss, documents
from tests.numerics.runs import SAME_SUMS, Change, Material, make_plan, relative_difference, start, steps_of, train
from tests.numerics.strategies import FULL, settled
from tests.tiny import store_plan, tiny_store

VOCAB = demo_config().vocab_size
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
CASES: dict[str, tuple[transformers.PretrainedConfig, dict[str, float], dict[str, float]]] = {
    "llama": (LlamaConfig(**SIZES, **IDS), {"attention": 0.2}, {"attention_dropout": 0.2}),
    "phi3": (Phi3Config(**SIZES, **IDS), {"hidden": 0.2}, {"resid_pdrop": 0.2}),
    "gpt_neox": (
        GPTNeoXConfig(**SIZES, **IDS),
        {"attention": 0.1, "hidden": 0.2},
        {"attention_dropout": 0.1, "hidden_dropout": 0.2},
    ),
    "gpt2": (
        GPT2Config(n_embd=32, n_layer=2, n_head=4, **IDS),
        {"attention": 0.0, "hidden": 0.3, "embedding": 0.2},
        {"attn_pdrop": 0.0, "resid_pdrop": 0.3, "embd_pdrop": 0.2},
    ),
}


@pytest.fixture(scope="module")
def alone(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Rows of one document each, so that random numbers are drawn in one order here and there."""
    store = tiny_store(tmp_path_factory.mktemp("stores"), max_rows=20, max_length=288, packing="none")
    return replace(material, store=store_plan(store))


def dropout_plan(alone: Material, folder: Path, name: str) -> RunPlan:
    config, asked, _ = CASES[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    setting, _ = settled(folder, {}, FULL, dropout=asked)
    model = {"path": str(folder), "dropout": setting.dropout, "attention": "sdpa", "packs": False}
    batch = {"workers": 1, "micro_batch_size": 1, "accumulation": 4}
    return make_plan(replace(alone, model=folder), model=model, batch=batch)


def plain_losses(plan: RunPlan, rates: dict[str, float]) -> list[float]:
    """Of a model with these values in its config, a document at a time."""
    config = AutoConfig.from_pretrained(plan.model.path, **rates)
    model = AutoModelForCausalLM.from_pretrained(
        plan.model.path, config=config, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    settings = plan.optimization
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, eps=settings.epsilon)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=settings.num_steps)
    store = Store.open(plan.data.train.path)
    losses = []
    for step in range(settings.num_steps):
        torch.manual_seed(step_seed(plan.seed, step, 0))
        batches = step_batches(
            store, step=step, rank=0, world=1, micro_batch_size=1, accumulation=4, num_rows_in_run=10**6, seed=plan.seed
        )
        num_targets = sum(batch.target_ids.numel() for batch in batches)
        total = 0.0
        for ids, labels in (document for batch in batches for document in documents(batch)):
            loss: Tensor = document_loss(model, ids, labels) / num_targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("name", CASES)
def test_the_curve_is_that_of_plain_transformers_with_the_same_rates_and_seeds(
    name: str, alone: Material, tmp_path: Path
) -> None:
    plan = dropout_plan(alone, tmp_path, name)
    assert plan.model.dropout == CASES[name][2]
    losses = train(plan).losses
    assert relative_difference(losses, plain_losses(plan, CASES[name][2])) <= SAME_SUMS
    own = plan.model_copy(update={"model": plan.model.model_copy(update={"dropout": {}})})
    assert relative_difference(losses, train(own).losses) > 1e-5, "the rates matter"


def test_evaluation_drops_nothing_and_a_saved_model_has_the_base_s_own_rates(alone: Material, tmp_path: Path) -> None:
    plan = dropout_plan(alone, tmp_path / "base", "gpt2")
    engine, loss_sum, batches_of = start(plan)
    batches = batches_of(0)
    dropped = evaluate_loss(engine, batches, loss_sum).loss
    own = plan.model_copy(update={"model": plan.model.model_copy(update={"dropout": {}})})
    plain_engine, plain_loss, _ = start(own)
    assert dropped == evaluate_loss(plain_engine, batches, plain_loss).loss
    for _ in steps_of(plan, engine, loss_sum, batches_of, Change(stop=1)):
        pass
    model: Any = engine.model
    assert model.config.resid_pdrop == 0.3
    save_model(model, ((key, value) for key, value in engine.model_state() if value is not None), tmp_path / "saved")
    saved = AutoConfig.from_pretrained(tmp_path / "saved")
    assert (saved.attn_pdrop, saved.resid_pdrop, saved.embd_pdrop) == (0.1, 0.1, 0.1)
