"""Optimizers: which parameters form a group, and which class updates them.

The learning rate of a group is the schedule's value times its `lr_scale` (`engine.set_learning_rate`).
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from raytune.config.sections.training import Optimizer
from raytune.plan.costs.memory import EIGHT_BIT, ORTHOGONAL
from raytune.plan.run_plan import OptimizationPlan
from raytune.plan.strategies.phases import age
from raytune.plan.strategies.update_groups import rate_scale, weight_decay

NO_DECAY_NAMES = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names of parameters without weight decay: transformers.Trainer's rule."""

FUSED_DEVICES = {"cpu", "cuda"}

Group = dict[str, Any]


def build_optimizer(model: nn.Module, plan: OptimizationPlan, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a model's trained parameters, which may be sharded by ZeRO-3.

    Each of its groups has `names`, the parameters' names in order, and `lr_scale` beside the usual settings.

    Args:
        model: the model as loaded; parameters that do not require a gradient are left out.
        device: where updates are computed.
    """
    return OPTIMIZERS[plan.optimizer](parameter_groups(model, plan), plan, device)


def parameter_groups(model: nn.Module, plan: OptimizationPlan) -> list[Group]:
    """The trained parameters, grouped by weight decay, scale of the learning rate, the phase in which their training begins and
    bits of state, in the model's order.

    Biases, norms and everything of one dimension are not decayed, and all learns at one rate, unless the plan says otherwise.
    """
    undecayed, embeddings = set(_undecayed_names(model)), set(_embedding_names(model))
    matrices = set(_matrices_of_hidden_layers(model)) if plan.optimizer in ORTHOGONAL else set()
    groups: dict[tuple, Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = rate_scale(name, _num_dimensions(parameter), plan)
        settings: Group = {
            "lr": plan.learning_rate * scale,
            "lr_scale": scale,
            "weight_decay": weight_decay(name, _num_dimensions(parameter), plan, has_none=name in undecayed),
        }
        if plan.phases:
            settings["phase"] = age(name, plan.phases)  # ZeRO counts the steps of a group, not of a parameter
        if plan.optimizer in EIGHT_BIT:
            # 8 bits are too coarse for the rare and large updates of an embedding (Dettmers et al. 2021).
            settings["optim_bits"] = 32 if name in embeddings else 8
        if plan.optimizer in ORTHOGONAL:
            settings["is_orthogonalised"] = name in matrices
        group = groups.setdefault(tuple(settings.values()), {"params": [], "names": [], **settings})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _undecayed_names(model: nn.Module) -> Iterator[str]:
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if isinstance(module, nn.LayerNorm) or NO_DECAY_NAMES.search(name.lower()) or _num_dimensions(parameter) < 2:
                yield name


def _embedding_names(model: nn.Module) -> Iterator[str]:
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            yield from (name for name, _ in module.named_parameters(module_name, recurse=False))


def _matrices_of_hidden_layers(model: nn.Module) -> Iterator[str]:
    """Names of weights of linear layers, and of both factors of their updates, but for those of the output head."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    in_head = set() if head is None else {*head.modules()}
    for module_name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module not in in_head:
            yield f"{module_name}.weight"


def _num_dimensions(parameter: nn.Parameter) -> int:
    """Dimensions of the whole parameter; a shard of ZeRO-3 is flat."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


# --- one function per kind of optimizer


def _adamw(groups: list[Group], plan: OptimizationPlan, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **_adam_settings(plan), fused=device.type in FUSED_DEVICES)


def _bitsandbytes_adamw(groups: list[Group], plan: OptimizationPlan, device: torch.device) -> torch.optim.Optimizer:
    import bitsandbytes

    class AdamW(bitsandbytes.optim.AdamW):
        """Reads the bits of state from the group. bitsandbytes keeps them per parameter, in a table of the whole process that
        outlives the optimizer and does not know the flat parameters of ZeRO."""

        def get_config(self, gindex: int, pindex: int, group: Group) -> dict[str, Any]:
            return super().get_config(gindex, pindex, group) | {"optim_bits": group.get("optim_bits", 32)}

    # Pages spill into host memory, where all state of the CPU is anyway.
    is_paged = plan.optimizer in PAGED and device.type == "cuda"
    return AdamW(groups, **_adam_settings(plan), is_paged=is_paged)


def _adafactor(groups: list[Group], plan: OptimizationPlan, device: torch.device) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # As transformers.Trainer sets it: the rate is the schedule's, whatever the size of the parameters.
    return Adafactor(groups, lr=plan.learning_rate, scale_parameter=False, relative_step=False)  # pyright: ignore[reportArgumentType]


def _lion(groups: list[Group], plan: OptimizationPlan, device: torch.device) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.Lion(groups, lr=plan.learning_rate, betas=(plan.beta1, plan.beta2))


class MuonAndAdamW(torch.optim.Optimizer):
    """PyTorch's Muon for groups of which `is_orthogonalised` is set, and its AdamW for the others, as one optimizer.

    Both work on the groups and the state of this one.
    """

    def __init__(self, groups: list[Group], settings: dict[str, Any], device: torch.device) -> None:
        matrices = [group for group in groups if group["is_orthogonalised"]]
        others = [group for group in groups if not group["is_orthogonalised"]]
        # Liu et al. 2025 (Muon is Scalable for LLM Training): updates as large as AdamW's usually are, so that its rates and
        # decays hold.
        muon = torch.optim.Muon(matrices, lr=settings["lr"], adjust_lr_fn="match_rms_adamw") if matrices else None
        adamw = torch.optim.AdamW(others, **settings, fused=device.type in FUSED_DEVICES) if others else None
        self._parts = [part for part in (muon, adamw) if part]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        for part in self._parts:
            is_muon = isinstance(part, torch.optim.Muon)
            part.param_groups = [group for group in self.param_groups if group["is_orthogonalised"] == is_muon]
            part.state = self.state

    def step(self, closure: None = None) -> None:
        for part in self._parts:
            part.step()


def _muon(groups: list[Group], plan: OptimizationPlan, device: torch.device) -> torch.optim.Optimizer:
    return MuonAndAdamW(groups, _adam_settings(plan), device)


def _schedule_free_adamw(groups: list[Group], plan: OptimizationPlan, device: torch.device) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    # The warm-up is the schedule's. A step counts in the average by the square of the highest rate until it, wherever that rate
    # comes from.
    optimizer = AdamWScheduleFree(groups, **_adam_settings(plan))
    optimizer.train()
    return optimizer


def _adam_settings(plan: OptimizationPlan) -> dict[str, Any]:
    return {"lr": plan.learning_rate, "betas": (plan.beta1, plan.beta2), "eps": plan.epsilon}


PAGED: set[Optimizer] = {"paged_adamw", "paged_adamw_8bit"}

OPTIMIZERS: dict[Optimizer, Callable[[list[Group], OptimizationPlan, torch.device], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _bitsandbytes_adamw,
    "paged_adamw": _bitsandbytes_adamw,
    "paged_adamw_8bit": _bitsandbytes_adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "schedule_free_adamw": _schedule_free_adamw,
}
