"""The engine that keeps whole weights on every rank; or all of them but those of a frozen base that ranks divide."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from raytune.config.sections.training import Precision
from raytune.errors import UnfitCheckpointError
from raytune.model.adapters.beside_updates import BesideUpdates
from raytune.model.parts.compiling import compile_layers
from raytune.model.parts.dtypes import DTYPES
from raytune.model.parts.sharded_base import ShardedBase
from raytune.plan.identity.division import Layout
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import LAYOUT_FILE
from raytune.training.engines.averaging import Average
from raytune.training.engines.engine import (
    AVERAGE_FILE,
    INITIAL_LOSS_SCALE,
    STEPS_BEFORE_GROWTH,
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
from raytune.training.engines.gradient_sum import GradientSum
from raytune.training.engines.layout import fill_with_layout, refuse_other_layout
from raytune.training.engines.penalty import Held, Penalty
from raytune.training.engines.schedule_free import at_average, counts, take_counts
from raytune.training.engines.squares import squaring
from raytune.training.engines.state_files import Write, fill_with_tensors, fill_with_tensors_and_values, write_now
from raytune.units import MIB

WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


class PlainEngine:
    """Whole weights, gradients and optimizer state on every rank; gradients are summed over the ranks once per step.

    Trained weights are fp32 and are updated in fp32; autocast makes the 16-bit products. Frozen weights stay as they were loaded.
    With several ranks this is ZeRO stage 0, without DeepSpeed, whose own stage 0 reports no gradient norm and updates with NaN in
    fp32. What is saved here fits any number of ranks. Layers of a frozen base may be divided among them
    (model.sharded_base), which is the model's own affair.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        max_grad_norm: float,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        bucket_bytes: int = 64 * MIB,
        overlaps: bool = True,
        compile_model: bool = False,
        beside: BesideUpdates | None = None,
        penalty: Penalty | None = None,
        base: ShardedBase | None = None,
    ) -> None:
        """Take a model whose trained weights become fp32, in place, so that `optimizer` keeps its parameters.

        Args:
            model: on `device`; its `requires_grad` says what is trained.
            optimizer: over the trained parameters; a group's rate is the step's rate times its "lr_scale", if it has one.
            precision: of products in forward and backward.
            max_grad_norm: norm that the gradient is scaled down to; 0: it is left as it is.
            device: of weights and batches.
            rank: of this process in the default process group, which must exist if there are several.
            world_size: number of processes.
            bucket_bytes: of gradients that are summed over the ranks by one collective, at most.
            overlaps: whether they may be while a backward pass goes on.
            compile_model: its layers, by torch.compile.
            beside: what the method does in each step beside updates; then each step waits for the norm of its gradient.
            penalty: on the way of trained weights from those that they have now.
            base: where the ranks have divided it.
        """
        self.rank, self.world_size, self.device = rank, world_size, device
        self.model = self.module = model
        self._base = base
        self._precision: Precision = precision
        self._max_grad_norm = max_grad_norm
        self._optimizer = optimizer
        self._beside, self._penalty = beside, penalty
        self._held: dict[str, Held] = {}
        self._average: Average[str] = Average()
        self._scaler = torch.amp.GradScaler(
            device.type, init_scale=INITIAL_LOSS_SCALE, growth_interval=STEPS_BEFORE_GROWTH, enabled=precision == "fp16"
        )
        self._trained = self._take_trained()
        self._bucket_bytes, self._overlaps = bucket_bytes, overlaps
        self._summed = self._sum_of_trained()
        if compile_model:
            compile_layers(model)

    def _take_trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, in fp32."""
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        for parameter in trained.values():
            parameter.data = parameter.data.float()
        if self._penalty:
            # What was trained before began elsewhere; what is trained from now on is still as in the base.
            for name, parameter in trained.items():
                if name not in self._held:
                    self._held[name] = Held(parameter.detach().clone())
        return trained

    def _sum_of_trained(self) -> GradientSum | None:
        if self.world_size == 1:
            return None
        return GradientSum(self._trained.values(), bucket_bytes=self._bucket_bytes, overlaps=self._overlaps)

    def autocast(self) -> AbstractContextManager:
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self._precision])

    def backward(self, loss: Tensor, *, is_last: bool = False) -> None:
        with self._summed.during(is_last=is_last) if self._summed else nullcontext():
            self._scaler.scale(poisoned(loss)).backward()

    def step(self, learning_rate: float, norm_limit: float = math.inf) -> Tensor:
        set_learning_rate(self._optimizer, learning_rate)
        self._sum_gradients_over_ranks()
        self._scaler.unscale_(self._optimizer)
        if self._beside:
            self._beside.add_gradients(*self._followed(self._beside))
        if self._penalty:
            self._add_penalty(self._penalty)
        # The operations of clip_grad_norm_, in its order, so that weights equal those of transformers.Trainer bit for bit.
        gradients = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if self._max_grad_norm > 0:
            clip_grads_with_norm_(self._trained.values(), self._max_grad_norm, norm)
        self._update(norm, norm_limit)
        if self._beside:
            if is_updated_with(norm.item(), norm_limit):
                self._beside.after_update(*self._followed(self._beside))
            else:
                self._beside.skipped()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _followed(self, beside: BesideUpdates) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values and gradients of what a method follows."""
        gradients = {}
        for name, parameter in beside.parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients[name] = parameter.grad
        return {name: parameter.data for name, parameter in beside.parameters.items()}, gradients

    @torch.no_grad()
    def _add_penalty(self, penalty: Penalty) -> None:
        penalty.begin_step()
        for name, parameter in self._trained.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            penalty.add_gradient(parameter.grad, parameter, self._held[name])

    def _update(self, norm: Tensor, norm_limit: float) -> None:
        """Let the optimizer step unless `norm` is not finite or above the limit; on a GPU without asking, where the optimizer can
        decide there."""
        if self._scaler.is_enabled():
            # What is not finite is the scaler's to see; a norm that is finite and too large is none of its business.
            if norm_limit == math.inf or not norm_limit < norm.item() < math.inf:
                self._scaler.step(self._optimizer)
            self._scaler.update()
        elif getattr(self._optimizer, "_step_supports_amp_scaling", False):
            # How torch.amp.GradScaler tells a fused optimizer that a step is to be skipped.
            is_updated = norm.isfinite() & (norm <= norm_limit)
            self._optimizer.found_inf = (~is_updated).float()  # pyright: ignore[reportAttributeAccessIssue]
            self._optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
            self._optimizer.step()
        elif is_updated_with(norm.item(), norm_limit):
            self._optimizer.step()

    def _sum_gradients_over_ranks(self) -> None:
        if self._summed:
            self._summed.finish()

    def loss_scale(self) -> float | None:
        return self._scaler.get_scale() if self._scaler.is_enabled() else None

    def penalty(self) -> float | None:
        return None if self._penalty is None or self._penalty.value is None else self._penalty.value.item()

    def sum_squared_gradients(self, losses: Iterable[Tensor]) -> dict[str, Tensor]:
        with squaring(self._trained.values()):
            for loss in losses:
                loss.backward()
        self._sum_gradients_over_ranks()
        sums = {
            name: torch.zeros_like(parameter.data) if parameter.grad is None else parameter.grad
            for name, parameter in self._trained.items()
        }
        self._optimizer.zero_grad(set_to_none=True)
        return sums

    def weigh(self, importance: Mapping[str, Tensor]) -> None:
        for name, held in self._held.items():
            self._held[name] = replace(held, importance=importance[name].to(self.device))

    def average(self, share: float) -> None:
        self._average.add(self._trained, share)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if not self._average:
            with at_average(self._optimizer):
                yield
            return
        self._average.exchange(self._trained)
        try:
            yield
        finally:
            self._average.exchange(self._trained)

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
        return self._base.gathered(parameters) if self._base else nullcontext()

    def trainable_state(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor | None]]:
        return self._values(self._trained.items(), dtype)

    def model_state(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor | None]]:
        return self._values(self.model.named_parameters(), dtype)

    def _values(
        self, parameters: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Tensor | None]]:
        for name, parameter in parameters:
            with self.gathered([parameter]):
                value = parameter.detach().to("cpu", dtype, copy=self._base is not None) if self.rank == 0 else None
            yield name, value

    def save(self, folder: Path, write: Write = write_now) -> None:
        # Every rank holds the same state, so one writes it.
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            layout = Layout(zero_stage=0, world_size=self.world_size, precision=self._precision)
            write(folder / LAYOUT_FILE, layout, fill_with_layout)
            weights = {name: parameter.detach().contiguous() for name, parameter in self._trained.items()}
            write(folder / WEIGHTS_FILE, weights, fill_with_tensors)
            tensors, values = self._optimizer_state()
            state = {"optimizer": values, "groups": counts(self._optimizer), "scaler": self._scaler.state_dict()}
            write(folder / OPTIMIZER_FILE, (tensors, {"state": json.dumps(state)}), fill_with_tensors_and_values)
            save_method(self._beside, folder, write)
            self._average.save(self._trained, folder / AVERAGE_FILE, write)

    def load(self, folder: Path) -> None:
        refuse_other_layout(Layout(zero_stage=0, world_size=self.world_size, precision=self._precision), folder)
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            saved_shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            own_shapes = {name: list(parameter.shape) for name, parameter in self._trained.items()}
            if saved_shapes != own_shapes:
                different = sorted(
                    name for name in {*saved_shapes, *own_shapes} if saved_shapes.get(name) != own_shapes.get(name)
                )
                saved, own = saved_shapes.get(different[0]), own_shapes.get(different[0])
                raise UnfitCheckpointError(
                    f"{folder / WEIGHTS_FILE} does not fit the model: {len(different)} trained parameters differ in name or "
                    f"shape, first {different[0]} ({saved} saved, {own} in the model)."
                )
            for name, parameter in self._trained.items():
                parameter.data.copy_(file.get_tensor(name))
        self._load_optimizer(folder / OPTIMIZER_FILE)
        load_method(self._beside, folder)
        self._average.load(self._trained, folder / AVERAGE_FILE)

    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """Tensors as `<parameter>/<entry>`, and the entries that are plain values, by parameter."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._trained.items()}
        tensors, values, seen = {}, {}, set()
        for parameter, state in self._optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    # Entries that parameters share (the code tables of 8-bit Adam) are written for each, as safetensors wants it.
                    shared = value.data_ptr() in seen
                    seen.add(value.data_ptr())
                    tensors[f"{names[parameter]}/{key}"] = value.clone() if shared else value.contiguous()
                else:
                    values.setdefault(names[parameter], {})[key] = value
        return tensors, values

    def _load_optimizer(self, path: Path) -> None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._trained.items()}
        in_order = [names[parameter] for group in self._optimizer.param_groups for parameter in group["params"]]
        indices = {name: index for index, name in enumerate(in_order)}
        with safe_open(path, framework="pt") as file:
            saved = json.loads(file.metadata()["state"])
            state = {indices[name]: dict(entries) for name, entries in saved["optimizer"].items()}
            for key in file.keys():  # noqa: SIM118
                name, _, entry = key.rpartition("/")
                state.setdefault(indices[name], {})[entry] = file.get_tensor(key)
        self._optimizer.load_state_dict({"state": state, "param_groups": self._optimizer.state_dict()["param_groups"]})
        take_counts(self._optimizer, saved.get("groups", []))  # of which a checkpoint of an earlier raytune has none
        self._scaler.load_state_dict(saved["scaler"])

    def train_more(self, optimizer: torch.optim.Optimizer, plan: RunPlan) -> None:
        optimizer.state.update(self._optimizer.state)
        self._optimizer, self._trained = optimizer, self._take_trained()
        if self._summed:
            self._summed.close()
            self._summed = self._sum_of_trained()
        if self._average:
            self._average.begin(self._trained)

    def held_bytes(self) -> HeldBytes:
        spared = self._base.num_bytes_spared if self._base else 0
        return HeldBytes(
            weights=num_bytes(self.model.parameters()) + constant_bytes(self.model) - spared,
            gradients=num_bytes(parameter.grad for parameter in self._trained.values()),
            optimizer=num_bytes(value for state in self._optimizer.state.values() for value in state.values()),
            penalty=num_bytes(tensor for held in self._held.values() for tensor in held.tensors),
            average=num_bytes(self._average.values),
        )

    def release(self) -> None:
        if self._summed:
            self._summed.close()  # the model may live on
        del self.model, self.module, self._base, self._trained, self._summed, self._optimizer, self._beside, self._held
        del self._average
        free_memory(self.device)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        return gather_objects(value, self.world_size)
