"""AdaLoRA on a model: PEFT's configuration of it, and what it does beside updates, with PEFT's own rule for ranks.

PEFT's `update_and_allocate` reads gradients that a sharding engine does not leave, and masks weights that are not those which are
updated. Here an engine gives whole values and gradients, and takes back what was masked.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune.config.sections.adapter import AdaLoraAdapter
from raytune.model.adapters.adapting import Adapting, added
from raytune.model.adapters.targets import peft_names, unchanged_experts
from raytune.plan.methods.adalora import initial_rank, rank_schedule

PREFIX = "base_model.model."
ADAPTER = "default"
MEAN, UNCERTAINTY, LEFT, STEP = "importance/", "uncertainty/", "left/", "step"
"""Beginnings of names in a state: both averages, and which ranks are left; the number of steps."""


def _add(model: PreTrainedModel, adapter: AdaLoraAdapter, revision: str | None, seed: int) -> PeftModel:
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=initial_rank(adapter),
        target_r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType]  PEFT multiplies by it only
        lora_dropout=adapter.dropout,
        deltaT=adapter.delta_t,
        beta1=adapter.beta1,
        beta2=adapter.beta2,
        orth_reg_weight=adapter.orthogonal_weight,
        total_step=1,  # a model knows nothing of steps: `_beside_updates` says how many there are
        revision=revision,
        **peft_names(model, adapter),
    )
    return added(model, config, adapter, seed=seed)


class RankUpdates:
    """Takes ranks away after updates, by how much they matter, and draws what is left towards orthonormal."""

    def __init__(self, model: nn.Module, config: AdaLoraConfig) -> None:
        """
        Args:
            model: adapted; its weights may be sharded, they are not read.
            config: of the model's adapter, which gets to know what ranks are left.
        """
        self.parameters = {
            name: one for name, one in model.named_parameters() if ".lora_" in name and name.endswith(f".{ADAPTER}")
        }
        self._config = config
        shapes = {name: getattr(one, "ds_shape", one.shape) for name, one in self.parameters.items()}
        self._allocator = _Allocator(_Whole({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}), config)
        self._matrices = [name for name in self.parameters if ".lora_A." in name or ".lora_B." in name]
        self._step = 0

    def add_gradients(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        if self._config.orth_reg_weight == 0:
            return
        weight = self._config.orth_reg_weight / len(self._matrices)
        for name in self._matrices:
            gradients[name].add_(_gradient_of_orthogonality(values[name], is_tall=".lora_B." in name), alpha=weight)

    @torch.no_grad()
    def after_update(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> list[str]:
        self._step += 1
        config, allocator = self._config, self._allocator
        assert config.total_step is not None, "PEFT refuses a configuration without"
        last = config.total_step - config.tfinal
        whole = _Whole(values, gradients)
        if self._step > last:
            allocator.mask_using_rank_pattern(whole, config.rank_pattern)
        else:
            # PEFT leaves out the last step's importance, in which the choice is made for good.
            is_last = self._step == last
            _, pattern = allocator.update_and_allocate(whole, self._step, force_mask=is_last)
            if is_last:
                config.rank_pattern = pattern
                allocator.reset_ipt()
            elif not pattern:
                return []
        return [name for name in self.parameters if ".lora_E." in name]

    def skipped(self) -> None:
        self._step += 1

    def state(self) -> dict[str, Tensor]:
        pattern = {f"{LEFT}{name}": torch.tensor(left) for name, left in (self._config.rank_pattern or {}).items()}
        means = {f"{MEAN}{name}": value for name, value in self._allocator.exp_avg_ipt.items()}
        uncertainty = {f"{UNCERTAINTY}{name}": value for name, value in self._allocator.exp_avg_unc.items()}
        return means | uncertainty | pattern | {STEP: torch.tensor(self._step)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._step = int(state[STEP])
        self._allocator.exp_avg_ipt = {name: self._placed(name, value) for name, value in _under(state, MEAN)}
        self._allocator.exp_avg_unc = {name: self._placed(name, value) for name, value in _under(state, UNCERTAINTY)}
        self._config.rank_pattern = {name: left.tolist() for name, left in _under(state, LEFT)} or None

    def _placed(self, name: str, value: Tensor) -> Tensor:
        return value.to(self.parameters[f"{PREFIX}{name}"].device)


def _under(state: Mapping[str, Tensor], beginning: str) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(beginning), value) for name, value in state.items() if name.startswith(beginning))


class _Whole:
    """Whole values and gradients, as PEFT's rule asks a model for them: by the names within the model that PEFT wraps."""

    def __init__(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None) -> None:
        self.values = {name.removeprefix(PREFIX): value for name, value in values.items()}
        self.gradients = {name.removeprefix(PREFIX): value for name, value in (gradients or {}).items()}

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.values.items())


class _Allocator(RankAllocator):
    """PEFT's rule, reading the gradients that it is given, and keeping of importance only what it averages."""

    def __init__(self, whole: _Whole, config: AdaLoraConfig) -> None:
        super().__init__(whole, config, ADAPTER)

    def update_ipt(self, model: _Whole) -> None:
        for name, value in model.named_parameters():
            importance = (value * model.gradients[name]).abs().float()
            mean = self.beta1 * self.exp_avg_ipt.get(name, torch.zeros_like(importance)) + (1 - self.beta1) * importance
            before = self.exp_avg_unc.get(name, torch.zeros_like(importance))
            self.exp_avg_unc[name] = self.beta2 * before + (1 - self.beta2) * (importance - mean).abs()
            self.exp_avg_ipt[name] = mean


@torch.enable_grad()
def _gradient_of_orthogonality(value: Tensor, *, is_tall: bool) -> Tensor:
    """Gradient of the norm that PEFT adds to the loss for a matrix: |P P' - 1|, of the side that has the ranks."""
    matrix = value.detach().requires_grad_()
    covariance = matrix.T @ matrix if is_tall else matrix @ matrix.T
    distance = torch.norm(covariance - torch.eye(len(covariance), device=value.device, dtype=value.dtype), p="fro")
    return torch.autograd.grad(distance, matrix)[0]


def _beside_updates(model: PeftModel, adapter: AdaLoraAdapter, num_steps: int) -> RankUpdates:
    config: Any = model.peft_config[ADAPTER]
    config.total_step = num_steps
    config.tinit, config.tfinal = rank_schedule(adapter, num_steps)
    return RankUpdates(model, config)


def _with_ranks_left(
    model: PeftModel, state: dict[str, Tensor], config: AdaLoraConfig
) -> tuple[dict[str, Tensor], AdaLoraConfig]:
    """The ranks that are left, once they were chosen for good; before, all, since between two choices any may come back."""
    pattern: Any = config.rank_pattern
    if pattern is not None:
        config.rank_pattern = {name.removesuffix(f".{ADAPTER}"): left for name, left in pattern.items()}
    return state, config


def _of_equal_ranks(state: dict[str, Tensor], config: AdaLoraConfig) -> dict[str, Tensor]:
    """All ranks again; those that were taken away are 0, and add nothing."""
    pattern: Any = config.rank_pattern
    config.rank_pattern = None
    state = copy.copy(state)
    for name, left in (pattern or {}).items():
        layer, kept = f"{PREFIX}{name}".rpartition(".lora_E")[0], torch.tensor(left)
        for part in ("lora_A", "lora_E", "lora_B"):
            saved = state[f"{layer}.{part}"]
            saved = saved.T if part == "lora_B" else saved
            whole = saved.new_zeros(len(kept), saved.shape[1])
            whole[kept] = saved
            state[f"{layer}.{part}"] = whole.T if part == "lora_B" else whole
    return state


def _restore_ranks(model: PeftModel) -> None:
    """The rank that each update was made with, which PEFT divides by and does not save."""
    for module in model.modules():
        if isinstance(module, AdaLoraLayer):
            module.ranknum[ADAPTER] = nn.Parameter(torch.tensor([float(module.r[ADAPTER])]), requires_grad=False)


ADAPTING = Adapting(
    add=_add,
    frozen_experts=unchanged_experts,
    leaves_base_alone=lambda adapter, is_quantised: not adapter.modules_to_save,
    peft_type="ADALORA",
    merges=True,
    for_original_base=_with_ranks_left,
    of_equal_shapes=_of_equal_ranks,
    beside_updates=_beside_updates,
    restore_constants=_restore_ranks,
)
