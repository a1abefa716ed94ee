"""DeepSpeed ZeRO, stages 1 to 3: its engine behind our protocol."""

import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_fp32_param, safe_set_full_grad
from torch import Tensor, nn

from raytune.config.sections.training import Precision
from raytune.errors import CheckpointError, TrainingError
from raytune.model.adapters.beside_updates import BesideUpdates
from raytune.model.parts.compiling import compile_layers
from raytune.model.parts.dtypes import DTYPES
from raytune.plan.identity.division import Layout
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import LAYOUT_FILE
from raytune.training.engines.averaging import Average
from raytune.training.engines.deepspeed_json import deepspeed_config
from raytune.training.engines.engine import (
    AVERAGE_FILE,
    HeldBytes,
    constant_bytes,
    free_memory,
    gather_objects,
    is_updated_with,
    load_method,
    num_bytes,
    poisoned,
    save_method,
    set_learning_rate,
)
from raytune.training.engines.layout import fill_with_layout, refuse_other_layout
from raytune.training.engines.penalty import Held, Penalty
from raytune.training.engines.squares import squaring
from raytune.training.engines.state_files import Write, write_now
from raytune.training.engines.zero_files import Files
from raytune.training.engines.zero_loading import cast_unsharded, prepare_deepspeed
from raytune.training.engines.zero_shares import Group, masters, own_gradients

TAG = "zero"
"""Folder of DeepSpeed's files inside a checkpoint."""

CLIP_EPSILON = 1e-6
"""What DeepSpeed, as torch, adds to a norm before it divides by it."""

UPDATE_WITH_NONE = -1.0
"""A limit that every norm is above."""

RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
"""Programs that DeepSpeed puts into every checkpoint; a checkpoint of ours holds data only."""


class ZeroEngine:
    """Optimizer state (stage 1), gradients (2) and weights (3) divided among the ranks by DeepSpeed.

    Weights are in the run's precision, with fp32 masters in the shards. Where the norm of all gradients is not finite, DeepSpeed
    skips the update, so on all ranks or on none. It reads that norm on the host, once per step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        *,
        precision: Precision,
        device: torch.device,
        compile_model: bool = False,
        beside: BesideUpdates | None = None,
        penalty: Penalty | None = None,
    ) -> None:
        """Shard a model over the default process group, which must exist.

        Args:
            model: the same on every rank; its `requires_grad` says what is trained.
            optimizer: over the trained parameters; a group's rate is the step's rate times its "lr_scale", if it has one.
            config: DeepSpeed's JSON (`deepspeed_config`).
            precision: of weights and products.
            device: of weights and batches.
            compile_model: its layers, by torch.compile.
            beside: what the method does in each step beside updates, for which all of what it follows is gathered twice.
            penalty: on the way of trained weights from those that they have now.
        """
        prepare_deepspeed(device)
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.model = model
        self._beside, self._penalty = beside, penalty
        self._held: dict[Group, Held] = {}
        self._sums: dict[Group, Tensor] | None = None
        self._average: Average[Group] = Average()
        self._norm_limit, self._norm_above_limit = math.inf, math.nan
        self._precision: Precision = precision
        self._stage: int = config["zero_optimization"]["stage"]
        cast_unsharded(model, DTYPES[precision])
        if compile_model:
            compile_layers(model)
        self._begin(optimizer, config)

    def _begin(self, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
        """Make DeepSpeed's engine around the model, for what is trained of it."""
        self._trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._engine: Any = deepspeed.initialize(
            model=self.model,
            optimizer=optimizer,
            config=config,
            model_parameters=[*self._trained.values()],  # pyright: ignore[reportArgumentType]
        )[0]
        self.module: nn.Module = self._engine
        self._seen_gradients: dict[str, Tensor] = {}
        self._bound_norms()
        if self._beside:
            self._ask_before_updates(self._beside)
        if self._penalty:
            self._penalise_updates(self._penalty)
        self._engine.checkpoint_engine = Files(config_params=self._engine._config)

    def autocast(self) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: Tensor, *, is_last: bool = False) -> None:
        # DeepSpeed averages over the ranks and the loss of a step is a sum over them, hence the factor (test_zero_parity.py).
        self._engine.backward(poisoned(loss) * self.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float, norm_limit: float = math.inf) -> Tensor:
        set_learning_rate(self._engine.optimizer, learning_rate)
        self._norm_limit, self._norm_above_limit = norm_limit, math.nan
        try:
            self._engine.step()
        except Exception as error:
            if "minimum" in str(error) and self._precision == "fp16":
                raise TrainingError(
                    "The fp16 loss scale is at its minimum and gradients still overflow: the run diverges. "
                    "Lower training.learning_rate, or set training.precision to bf16."
                ) from error
            raise
        norm = self._engine.get_global_grad_norm()
        if not math.isnan(self._norm_above_limit):
            norm = self._norm_above_limit  # what DeepSpeed took for infinite
        if self._beside:
            self._after_update(self._beside, self._seen_gradients, float(norm))
            self._seen_gradients = {}
        return _on_device(norm, self.device)

    def _bound_norms(self) -> None:
        """Have DeepSpeed take a norm above the limit of the step for infinite, which it skips, on all ranks and with all that it
        offloads. It also lowers the loss scale then, so that fp16 has no limits here (plan.stages)."""
        optimizer: Any = self._engine.optimizer
        name = "_get_norm_groups" if self._stage == 3 else "scaled_global_norm"
        measure = getattr(optimizer, name)

        def measure_within_limit(*arguments: Any, **named: Any) -> Any:
            norm = measure(*arguments, **named)
            if self._norm_limit == math.inf:
                return norm
            whole = float(combine_grad_norm_groups(norm) if self._stage == 3 else norm)
            if not self._norm_limit < whole < math.inf:
                return norm
            self._norm_above_limit = whole
            infinite = torch.full((), math.inf, device=self.device)
            return [infinite] if self._stage == 3 else infinite

        setattr(optimizer, name, measure_within_limit)

    def _ask_before_updates(self, beside: BesideUpdates) -> None:
        """Have the method add its gradients when all stages have those of the step: DeepSpeed 0.19 has them whole, and not yet
        clipped, only between the two halves of its own step."""
        update = self._engine.optimizer.step

        def update_with_added(*arguments: Any, **named: Any) -> Any:
            self._seen_gradients = self._gradients_with_added(beside)
            return update(*arguments, **named)

        self._engine.optimizer.step = update_with_added

    def _gradients_with_added(self, beside: BesideUpdates) -> dict[str, Tensor]:
        """Whole gradients of what a method follows, with those of what it adds to the loss, as DeepSpeed's shards then are."""
        scale = self.loss_scale() or 1.0
        gradients = {
            name: _known(safe_get_full_grad(parameter)).to(torch.float32, copy=True) / scale
            for name, parameter in beside.parameters.items()
        }
        beside.add_gradients(self._whole_masters(beside), gradients)
        for name, parameter in beside.parameters.items():
            safe_set_full_grad(parameter, gradients[name] * scale)
        return gradients

    def _after_update(self, beside: BesideUpdates, gradients: dict[str, Tensor], norm: float) -> None:
        if not is_updated_with(norm, self._norm_limit):
            beside.skipped()
            return
        most = self._engine.gradient_clipping()
        if 0 < most < norm + CLIP_EPSILON:
            torch._foreach_mul_(list(gradients.values()), most / (norm + CLIP_EPSILON))
        values = self._whole_masters(beside)
        changed = beside.after_update(values, gradients)
        parameters = [beside.parameters[name] for name in changed]
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=self._stage == 3), torch.no_grad():
            for name in changed:
                beside.parameters[name].copy_(values[name])
        for name in changed:
            safe_set_full_fp32_param(beside.parameters[name], values[name])
        # DeepSpeed leaves small weights whole between steps, and takes it that nobody divides them.
        whole: list[Any] = [parameter for parameter in parameters if getattr(parameter, "ds_persist", False)]
        if whole:
            whole[0].all_gather(whole)

    def _whole_masters(self, beside: BesideUpdates) -> dict[str, Tensor]:
        """Whole fp32 values of what a method follows."""
        return {name: _known(safe_get_full_fp32_param(parameter)) for name, parameter in beside.parameters.items()}

    def _penalise_updates(self, penalty: Penalty) -> None:
        """Hold this rank's shares where they are, as far as they are not held already, and have the penalty's gradient added to
        theirs before each update: when DeepSpeed has neither counted nor clipped them."""
        # Masters begin as the weights are, so that these have them exactly, in half the bytes of fp32 where they have 16 bits.
        dtype = DTYPES[self._precision]
        for group, share in self._masters().items():
            if group not in self._held:
                self._held[group] = Held(share.detach().to(dtype, copy=True))
        update = self._engine.optimizer.step

        def update_with_penalty(*arguments: Any, **named: Any) -> Any:
            if self._sums is None:
                self._add_penalty(penalty)
            else:
                self._add_to(self._sums)
            return update(*arguments, **named)

        self._engine.optimizer.step = update_with_penalty

    @torch.no_grad()
    def _add_penalty(self, penalty: Penalty) -> None:
        penalty.begin_step()
        scale, shares = self.loss_scale() or 1.0, self._masters()
        for group, own, gradient in own_gradients(self._engine.optimizer, self._stage, self.rank):
            penalty.add_gradient(gradient, shares[group][own], self._held[group].part(own), scale=scale)

    @torch.no_grad()
    def _add_to(self, sums: dict[Group, Tensor]) -> None:
        for group, own, gradient in own_gradients(self._engine.optimizer, self._stage, self.rank):
            sums[group][own] += gradient

    def sum_squared_gradients(self, losses: Iterable[Tensor]) -> dict[str, Tensor]:
        sums = self._sums = {group: torch.zeros_like(share, requires_grad=False) for group, share in self._masters().items()}
        try:
            with squaring(self._trained.values()), _without_warnings():
                for loss in losses:
                    self._engine.backward(loss, scale_wrt_gas=False)
                    self.step(0.0, norm_limit=UPDATE_WITH_NONE)
        finally:
            self._sums = None
        # DeepSpeed has averaged over the ranks.
        return {str(index): total.mul_(self.world_size) for index, total in enumerate(sums.values())}

    def weigh(self, importance: Mapping[str, Tensor]) -> None:
        for index, (group, held) in enumerate(self._held.items()):
            self._held[group] = replace(held, importance=importance[str(index)].to(held.start.device))

    def penalty(self) -> float | None:
        if self._penalty is None:
            return None
        own = self._penalty.value
        value = torch.zeros((), device=self.device) if own is None else own.clone()
        return self.all_reduce_sum(value).item()

    def loss_scale(self) -> float | None:
        return float(self._engine.optimizer.loss_scale) if self._precision == "fp16" else None

    def average(self, share: float) -> None:
        self._average.add(self._masters(), share)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if not self._average:
            yield
            return
        self._exchange_average()
        try:
            yield
        finally:
            self._exchange_average()

    def _exchange_average(self) -> None:
        """Exchange the masters, and give the weights their values as after an update. In fp32 stage 3 updates the weights'
        shares themselves, so that these must not be written to beside them."""
        optimizer: Any = self._engine.optimizer
        self._average.exchange(self._masters())
        if self._stage < 3:
            optimizer.update_lp_params()
            return
        # An evaluation may leave weights whole, which would then stay as they were.
        optimizer.checkpoint_event_prologue()
        for share, master in zip(optimizer.fp16_partitioned_groups_flat, self._masters().values(), strict=True):
            share.data.copy_(master.data)
        optimizer.checkpoint_event_epilogue()

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None, enabled=self._stage == 3)

    def trainable_state(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor | None]]:
        return self._values(self._trained.items(), dtype)

    def model_state(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor | None]]:
        return self._values(self.model.named_parameters(), dtype)

    def _values(
        self, parameters: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Tensor | None]]:
        for name, parameter in parameters:
            with self.gathered([parameter]):
                value = parameter.detach().to("cpu", dtype, copy=True) if self.rank == 0 else None
            yield name, value

    def save(self, folder: Path, write: Write = write_now) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TAG).mkdir(exist_ok=True)
        # bitsandbytes repacks 4-bit weights for CPU inference in eval mode, and cannot undo that on a shard.
        self.model.train()
        with self._engine.checkpoint_engine.given_to(write):
            self._engine.save_checkpoint(
                str(folder), tag=TAG, client_state=self._universal_info(), save_latest=False, exclude_frozen_parameters=True
            )
        self._average.save(self._masters(), folder / self._average_file, write)
        if self.rank == 0:
            write(folder / LAYOUT_FILE, self._layout(), fill_with_layout)
            save_method(self._beside, folder, write)
            for script in RECOVERY_SCRIPTS:
                (folder / script).unlink(missing_ok=True)

    def load(self, folder: Path) -> None:
        refuse_other_layout(self._layout(), folder)
        try:
            # Not strict, because frozen parameters are not in the file.
            path, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        except Exception as error:
            raise CheckpointError(f"DeepSpeed cannot load {folder} on rank {self.rank}: {error}") from error
        if path is None:
            raise CheckpointError(f"{folder / TAG} has no files of DeepSpeed for rank {self.rank}.")
        load_method(self._beside, folder)
        self._average.load(self._masters(), folder / self._average_file)

    @property
    def _average_file(self) -> str:
        """With DeepSpeed's name for what only this rank loads again (training.commit)."""
        return f"zero_pp_rank_{self.rank}_{AVERAGE_FILE}"

    def _layout(self) -> Layout:
        return Layout(zero_stage=self._stage, world_size=self.world_size, precision=self._precision)

    def _universal_info(self) -> dict[str, Any]:
        """What DeepSpeed's `ds_to_universal` looks for in states of stage 1 and 2."""
        if self._stage == 3:
            return {}
        return {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}

    def train_more(self, optimizer: torch.optim.Optimizer, plan: RunPlan) -> None:
        # Groups hold parameters of one age, so those of before come again as they were, and with them each rank's share.
        before = self._engine.optimizer
        kept = {group: (master.data, before.state.get(master, {})) for group, master in self._masters().items()}
        loss_scaler = before.loss_scaler
        del before
        self._end()
        self._begin(optimizer, deepspeed_config(plan))
        now: Any = self._engine.optimizer
        now.loss_scaler = loss_scaler
        shares = self._masters()
        for group, (values, state) in kept.items():
            shares[group].data.copy_(values)
            if state:
                now.state[shares[group]] = state
        if self._average:
            self._average.begin(shares)

    def _masters(self) -> dict[Group, Tensor]:
        """This rank's fp32 shares."""
        return masters(self._engine.optimizer, self._stage)

    def held_bytes(self) -> HeldBytes:
        optimizer: Any = self._engine.optimizer
        if self._stage == 3:
            shards = [optimizer.grad_partitions_flat_buffer]
        else:
            # Where a stage-2 shard of gradients lies depends on its dtype.
            shards = _flat([*optimizer.averaged_gradients.values(), *optimizer.all_grad_tensors.values()])
        whole = [parameter.grad for parameter in self._trained.values()]
        states = [value for state in optimizer.state.values() for value in state.values()]
        return HeldBytes(
            weights=num_bytes(part(parameter) for parameter in self.model.parameters() for part in (_held_weight, _held_copy))
            + constant_bytes(self.model),
            gradients=num_bytes([*shards, *whole]),
            optimizer=num_bytes([*states, *self._masters().values()]),
            penalty=num_bytes(tensor for held in self._held.values() for tensor in held.tensors),
            average=num_bytes(self._average.values),
        )

    def release(self) -> None:
        self._end()
        del self.model, self._beside, self._held, self._average
        free_memory(self.device)

    def _end(self) -> None:
        """Let go of DeepSpeed's engine, which leaves the model as it is."""
        self._engine.destroy()
        # What DeepSpeed 0.19 leaves on a model that lives on: a dead engine would go on being called by it, and hold its buffers.
        for name in ("module_forward_pre_hook", "module_forward_post_hook", "first_dataloader_check"):
            if hook := getattr(self._engine, name, None):
                hook.remove()
        del self.module, self._trained, self._engine
        _forget_modules()
        free_memory(self.device)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        return gather_objects(value, self.world_size)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Context in which DeepSpeed says nothing of updates that it does not make, which it takes for overflows."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _forget_modules() -> None:
    """Empty what DeepSpeed 0.19 would keep modules in for the life of the process: a stack of stage 3, and a method's cache."""
    parameter_offload.FWD_MODULE_STACK.clear()
    cached: Any = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release  # pyright: ignore[reportAttributeAccessIssue]
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()


def _on_device(norm: Tensor | float, device: torch.device) -> Tensor:
    """A norm in fp32. One that DeepSpeed has on the host is filled in: its copy would wait for the update that is under way."""
    if isinstance(norm, Tensor) and norm.device.type == device.type:
        return norm.to(torch.float32)
    return torch.full((), float(norm), dtype=torch.float32, device=device)


def _known(value: Tensor | None) -> Tensor:
    assert value is not None, "the parameter is trained"
    return value


def _flat(groups: Iterable[Iterable[Any] | None]) -> list[Any]:
    return [value for group in groups for value in group or ()]


def _held_weight(parameter: nn.Parameter) -> Tensor:
    """The part of a weight that this rank holds between steps."""
    is_sharded = getattr(parameter, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE
    return parameter.ds_tensor if is_sharded else parameter  # pyright: ignore[reportAttributeAccessIssue]


def _held_copy(parameter: nn.Parameter) -> Tensor | None:
    """The part of a second copy that this rank holds (`EnginePlan.copy_over`); of a trained weight, until the next update."""
    return getattr(parameter, "ds_secondary_tensor", None)
