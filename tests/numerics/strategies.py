"""Plans of `strategy` on the tests' tiny models, and the same training written plainly with transformers, peft and torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, get_scheduler

from raytune.config.sections.run import RunConfig
from raytune.data.batches.batches import step_batches
from raytune.data.store.store import Store
from raytune.plan.choosing.setting import Setting, settle
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import ModelPlan, RunPlan
from raytune.plan.strategies.distillation import distillation_plan, teacher_section
from raytune.plan.strategies.freezing import frozen_names
from raytune.plan.strategies.penalty import ewc_strength, l2_sp_strength
from raytune.plan.strategies.phases import phase_plans
from raytune.plan.strategies.update_groups import update_groups
from tests.numerics.oracles import document_loss, documents
from tests.numerics.runs import NUM_STEPS, Material, make_plan
from tests.tiny import tiny_plan
from tests.unit.plan_cases import CPU

FULL: dict[str, Any] = {"method": "full"}


def settled(model: Path, strategy: dict[str, Any], adapter: dict[str, Any], **model_section: Any) -> tuple[Setting, ModelShape]:
    """What is decided of a config before data are looked at, with the model's shape."""
    shape = read_model_shape(str(model))
    sections = {"strategy": strategy, "adapter": adapter, "model": {"base": str(model)} | model_section}
    return settle(RunConfig.model_validate(sections), shape, CPU), shape


def strategy_plan(
    material: Material, strategy: dict[str, Any], adapter: dict[str, Any] = FULL, *, checkpointing: bool = False, **changes: Any
) -> RunPlan:
    """A plan in which `strategy` is resolved as the planner does.

    Args:
        changes: as for `make_plan`.
    """
    setting, shape = settled(material.model, strategy, adapter)
    asked = changes.pop("optimization", {})
    num_steps = asked.get("num_steps", NUM_STEPS)
    model: dict[str, Any] = {
        "path": str(material.model),
        "frozen": frozen_names(setting.trained, shape),
        "lowest_layer": setting.trained.lowest_layer,
        "gradient_checkpointing": checkpointing,
    }
    return make_plan(
        material,
        adapter=setting.adapter.model_dump(),
        model=model | changes.pop("model", {}),
        optimization={
            "update_groups": [group.model_dump() for group in update_groups(setting.trained)],
            "objective": setting.objective and setting.objective.model_dump(),
            "l2_sp_strength": l2_sp_strength(setting.config),
            "ewc_strength": ewc_strength(setting.config),
            "lora_plus_ratio": setting.trained.way_back_rate_scale,
            "lora_plus_embedding_rate": setting.trained.embedding_rate,
            "phases": [
                phase.model_dump()
                for phase in phase_plans(setting.config, setting.phases, shape, 1e-3, num_steps=num_steps, epoch_steps=4.0)
            ],
        }
        | asked,
        distillation=distillation_plan(setting.config, teacher_beside(setting.config, changes.get("precision", "fp32"))),
        num_trainable=setting.trained.num_trainable,
        phase_needs=[
            {
                "trains": "",
                "num_trainable": trained.num_trainable,
                "lowest_layer": trained.lowest_layer,
                "memory": [],
                "checkpoint_bytes": 0,
                "step_time": None,
            }
            for trained in setting.phases
        ],
        **changes,
    )


def teacher_beside(config: RunConfig, precision: str) -> ModelPlan | None:
    """How the planner has a teacher loaded, on one of the tests' models."""
    section = teacher_section(config)
    if section is None:
        return None
    model = tiny_plan().model.model_copy(update={"path": section.base})
    return model.model_copy(update={"dtype": precision, "compute_dtype": precision})


def plain_training(
    plan: RunPlan,
    is_trained: Callable[[str], bool],
    rate_scale: Callable[[str], float] = lambda name: 1.0,
    decay: Callable[[str], float] | None = None,
    lora: LoraConfig | None = None,
    base: Any = None,
    penalty: Callable[[dict[str, nn.Parameter]], Tensor] | None = None,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor] = document_loss,
    after_step: Callable[[dict[str, nn.Parameter]], None] = lambda trained: None,
    optimizer_of: Callable[[list[dict[str, Any]], float], torch.optim.Optimizer] | None = None,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and what was trained by its name, of a plan's rows: a document at a time, an optimizer group per parameter.

    Args:
        is_trained: of the name of a parameter, asked of those that would be trained.
        rate_scale: of a name.
        decay: weight decay of a name; None: the plan's, of matrices.
        base: the model, where it is not as its files have it.
        loss_of: of a model, the tokens of a document and its labels: the sum over its targets.
        penalty: of what is trained, added to the loss that is minimised and to none that is returned.
        loss_of: the model on a document: its ids and labels.
        after_step: sees what is trained after each update.
        optimizer_of: groups of one parameter each, with its `name`, and the plan's epsilon; None: AdamW.
    """
    model: Any = base or AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    if lora is not None:
        torch.manual_seed(plan.seed)
        model = get_peft_model(model, lora)
    model.train()
    settings = plan.optimization
    trained: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and is_trained(name))
        if parameter.requires_grad:
            trained[name] = parameter
    groups = [
        {
            "params": [parameter],
            "name": name,
            "lr": settings.learning_rate * rate_scale(name),
            "weight_decay": (settings.weight_decay * (parameter.dim() > 1)) if decay is None else decay(name),
        }
        for name, parameter in trained.items()
    ]
    optimizer = (optimizer_of or _adamw)(groups, settings.epsilon)
    kind = {"linear": "linear", "constant": "constant_with_warmup"}[settings.schedule]
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=settings.num_steps)
    store = Store.open(plan.data.train.path)
    losses = []
    for step in range(settings.num_steps):
        batches = step_batches(
            store, step=step, rank=0, world=1, micro_batch_size=8, accumulation=1, num_rows_in_run=10**6, seed=plan.seed
        )
        num_targets = sum(batch.target_ids.numel() for batch in batches)
        loss = sum(loss_of(model, ids, labels) for batch in batches for ids, labels in documents(batch)) / num_targets
        assert isinstance(loss, Tensor)
        (loss if penalty is None else loss + penalty(trained)).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after_step(trained)
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in trained.items()}


def _adamw(groups: list[dict[str, Any]], epsilon: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, eps=epsilon)
