"""The plan of a run for scoring rows under its weights: on the machines that are there, without what training needs."""

from dataclasses import dataclass
from typing import Any

from raytune.errors import UserError
from raytune.plan.facts.machine import Machine
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What rows are scored under."""

    folder: RunFolder
    step: int | None
    """Of a checkpoint; None: the final model."""

    @property
    def request(self) -> dict[str, Any]:
        """What the workers are asked (training.score)."""
        if self.step is None:
            return {"saved_model": self.folder.model}
        return {"checkpoint": {"storage": self.folder.storage, "name": self.folder.name, "step": self.step}}

    def __str__(self) -> str:
        return "the final model" if self.step is None else f"the checkpoint of step {self.step}"


def scoring_plan(plan: RunPlan, machine: Machine, weights: Weights) -> RunPlan:
    """The plan of a run, for scoring on the machines that are there: nothing of it that only training needs.

    Raises:
        UserError: if a checkpoint is loaded whose division does not fit the machines.
    """
    divides_as_before = weights.step is not None and plan.engine.zero_stage > 0
    on_gpus = machine.num_gpus > 0
    room = machine.num_gpus if on_gpus else int(machine.num_cpus // max(plan.cluster.cpus_per_worker, 1e-9))
    workers = max(1, min(plan.batch.workers, room))
    if divides_as_before and workers < plan.batch.workers:
        raise UserError(
            f"The checkpoints of run {plan.name!r} are divided among {plan.batch.workers} workers (ZeRO stage "
            f"{plan.engine.zero_stage}), and here is room for {workers}. Score it where the run is trained, or when it has "
            f"finished."
        )
    keeps_shards = divides_as_before or (plan.engine.zero_stage == 3 and workers == plan.batch.workers)
    whole = plan.engine.model_copy(
        update={"kind": "plain", "zero_stage": 0, "offload_optimizer": "none", "offload_parameters": "none", "nvme_path": None}
    )
    is_here = plan.model.attention in machine.attention or not plan.model.packs
    is_fp16_here = plan.precision == "fp16" and not on_gpus  # CPUs compute some products in fp16 not at all, others slowly
    precision = "fp32" if is_fp16_here else plan.precision
    quantization = plan.model.quantization
    if quantization and is_fp16_here:
        quantization = quantization.model_copy(update={"compute_dtype": precision})
    return plan.model_copy(
        update={
            "precision": precision,
            "batch": plan.batch.model_copy(update={"workers": workers, "accumulation": 1, "sequence_parallel": 1}),
            "engine": plan.engine if keeps_shards else whole,
            "optimization": plan.optimization.model_copy(update={"l2_sp_strength": 0.0, "ewc_strength": 0.0, "objective": None}),
            "distillation": None,
            "model": plan.model.model_copy(
                update={
                    "attention": plan.model.attention if is_here else machine.attention[0],
                    "dtype": precision if is_fp16_here else plan.model.dtype,
                    "compute_dtype": precision,
                    "quantization": quantization,
                    "gradient_checkpointing": False,
                    "compile": False,
                    "liger": plan.model.liger and on_gpus,
                    "neftune_noise_alpha": 0.0,
                }
            ),
            "cluster": plan.cluster.model_copy(
                update={"device": "cuda" if on_gpus else "cpu", "gpus_per_worker": int(on_gpus), "max_failures": 0}
            ),
        }
    )
