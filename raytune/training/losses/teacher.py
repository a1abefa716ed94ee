"""The teacher of a distillation: the base beneath an adapter, or a model beside the one in training.

It gives hidden states at the target positions of a batch, and its output head as it is in that pass. Its logits are made of them
where the loss is computed, for as many targets at a time, so that neither model's logits ever exist whole.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raytune.data.batches.batches import Batch
from raytune.model.adapters.switched_off import switched_off
from raytune.model.attention.attention import model_inputs
from raytune.plan.run_plan import DistillationPlan, ModelPlan
from raytune.training.losses.losses import forward_replaced
from raytune.training.losses.objectives import TEACHER, Distillation
from raytune.training.losses.projections import Projection, causal_model, frozen_projection_of, output_head, transform_after_head
from raytune.training.steps.loop import evaluating

# Shapes: N tokens of a batch, M targets among them, C targets of a chunk, D width of the teacher, V its vocabulary.


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a teacher says of a batch."""

    objective: Distillation
    extras: Mapping[str, Tensor]
    """Of the objective's targets."""
    divergences: list[Tensor]
    """Of the targets, as the objective has told them."""

    def divergence_sum(self, weights_M: Tensor | None) -> Tensor:
        """The teacher's part of the loss that was computed, a scalar in its dtype.

        Args:
            weights_M: of the batch's targets; None: each weighs 1.
        """
        if not self.divergences:  # in chunks, and no target
            return torch.zeros(())
        divergences_M = torch.cat(self.divergences)
        return (divergences_M if weights_M is None else divergences_M * weights_M).sum()


class Teacher:
    """A model that is not trained, in evaluation mode and without a gradient.

    Args:
        plan: what is distilled, and how.
        seen: how the model sees rows: with which attention, and whether they are packed.
        model: whose hidden states and head are the teacher's.
        module: what is called for a forward pass of it; None: what the student's engine calls.
        as_teacher: context in which the model computes as the teacher.
    """

    def __init__(
        self,
        plan: DistillationPlan,
        seen: ModelPlan,
        model: nn.Module,
        module: nn.Module | None = None,
        as_teacher: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._plan, self._seen, self._module, self._as_teacher = plan, seen, module, as_teacher
        with as_teacher():
            self._head = output_head(causal_model(model))
        self._transform = transform_after_head(causal_model(model))
        # Compiled for each number of targets, the head would never stop compiling.
        self._new_head_forward = torch.compiler.disable(self._forward_head)
        self._target_positions: Tensor | None = None
        self._seen_by_head: tuple[Tensor, Projection] | None = None

    @torch.no_grad()
    def teach(self, student: nn.Module, batch: Batch) -> Lesson:
        """Run the teacher on a batch; every rank calls it.

        Args:
            student: what the student's engine calls for a forward pass.
            batch: with nothing laid in front of documents.
        """
        self._target_positions = batch.target_positions
        inputs = model_inputs(batch, self._seen.attention, packs=self._seen.packs)
        with self._as_teacher(), forward_replaced(self._head, self._new_head_forward):
            (self._module or student)(**inputs)
        assert self._seen_by_head is not None, "transform_after_head has seen that the model calls its head"
        (hidden_MD, projection), self._seen_by_head = self._seen_by_head, None

        @torch.no_grad()
        def logits(hidden_CD: Tensor) -> Tensor:
            return projection.project(hidden_CD)[0]

        plan, told = self._plan, list[Tensor]()
        objective = Distillation(plan.weight, plan.temperature, plan.top_k, logits, told.append)
        return Lesson(objective, {TEACHER: hidden_MD}, told)

    def _forward_head(self, hidden_1ND: Tensor) -> Tensor:
        assert self._target_positions is not None
        hidden_MD = hidden_1ND.flatten(0, -2).index_select(0, self._target_positions)
        self._seen_by_head = hidden_MD, frozen_projection_of(self._head, self._transform)
        return hidden_MD.new_zeros(())  # whatever the model does to its logits, nobody looks at them


def base_beneath(plan: DistillationPlan, seen: ModelPlan, model: Any) -> Teacher:
    """The frozen base of an adapted model: no second copy."""

    @contextmanager
    def as_base() -> Iterator[None]:
        with evaluating(model), switched_off(model):
            yield

    return Teacher(plan, seen, model, as_teacher=as_base)
