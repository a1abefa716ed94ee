"""The same training, written plainly with transformers, peft and bitsandbytes, and with none of our training code."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes import functional
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, get_scheduler

from raytune.config.sections.adapter import LoraAdapter
from raytune.data.batches.batches import Batch, step_batches
from raytune.data.store.store import Store
from raytune.plan.run_plan import RunPlan

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plain_lora_losses(plan: RunPlan) -> list[float]:
    """LoRA on all linear layers, by peft and torch."""
    return _losses(AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32), plan)


def plain_expert_losses(plan: RunPlan) -> list[float]:
    """LoRA on attention, and on fused experts by PEFT's `target_parameters`."""
    model = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    return _losses(model, plan, PROJECTIONS[:4], ["experts.gate_up_proj", "experts.down_proj"])


def plain_losses(plan: RunPlan, modules: list[str], parameters: list[str] | None) -> list[float]:
    """LoRA on what is named, a document at a time."""
    return _losses(AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32), plan, modules, parameters)


def plain_qlora_losses(plan: RunPlan) -> list[float]:
    """The same over a base that bitsandbytes holds in NF4, with its constants quantised too."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        plan.model.path, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    return _losses(model, plan)


def plain_packed_losses(plan: RunPlan, matrices: list[str], parameters: list[str] | None = None) -> list[float]:
    """LoRA on attention, and on parameters named, over what NF4 makes of attention's weights and of matrices of experts."""
    model = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if name.rpartition(".")[2] in matrices or name.split(".")[-2] in PROJECTIONS:
            weight.data = functional.dequantize_4bit(
                *functional.quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True)
            )
    return _losses(model, plan, PROJECTIONS[:4], parameters)


def _losses(
    model: torch.nn.Module, plan: RunPlan, targets: list[str] = PROJECTIONS, parameters: list[str] | None = None
) -> list[float]:
    assert isinstance(plan.adapter, LoraAdapter)
    rank, alpha = plan.adapter.rank, int(plan.adapter.alpha)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, target_parameters=parameters, task_type="CAUSAL_LM")
    return peft_losses(model, plan, config)


def peft_losses(model: torch.nn.Module, plan: RunPlan, config: PeftConfig) -> list[float]:
    """What an adapter of PEFT's learns of a plan's rows, a document at a time."""
    torch.manual_seed(plan.seed)
    return adapted_losses(get_peft_model(model, config), plan)  # pyright: ignore[reportArgumentType]


def adapted_losses(
    model: torch.nn.Module,
    plan: RunPlan,
    penalty: Callable[[Any], Tensor | float] = lambda model: 0.0,
    after_step: Callable[[Any, int], None] = lambda model, step: None,
) -> list[float]:
    """What is trained of a model learns of a plan's rows, a document at a time.

    Args:
        penalty: is added to the loss of a step, and not to what is returned.
        after_step: is called after this many steps, before the gradients go.
    """
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = plan.optimization
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, eps=settings.epsilon, weight_decay=settings.weight_decay)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=settings.num_steps)
    store = Store.open(plan.data.train.path)
    losses = []
    for step in range(settings.num_steps):
        batches = step_batches(
            store,
            step=step,
            rank=0,
            world=1,
            micro_batch_size=plan.batch.micro_batch_size,
            accumulation=plan.batch.accumulation,
            num_rows_in_run=10**6,
            seed=plan.seed,
        )
        num_targets = sum(batch.target_ids.numel() for batch in batches)
        loss = sum(document_loss(model, ids, labels) for batch in batches for ids, labels in documents(batch)) / num_targets
        assert isinstance(loss, Tensor)
        (loss + penalty(model)).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        after_step(model, step + 1)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def documents(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Each document alone, as (1, L) ids and labels in the way of transformers: -100 where there is no target."""
    labels = torch.full_like(batch.input_ids, -100)
    labels[0, batch.target_positions + 1] = batch.target_ids
    ends = batch.cumulative_lengths.tolist()
    return [(batch.input_ids[:, first:last], labels[:, first:last]) for first, last in pairwise(ends)]


def document_loss(model: torch.nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] : -1].float()  # behind those of virtual tokens
    return F.cross_entropy(logits, labels[0, 1:], reduction="sum")
