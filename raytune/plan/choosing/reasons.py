"""Why a plan is as it is: sentences about choices that nobody made but the plan. Pure."""

from typing import TypeVar

from raytune.config.sections.run import RunConfig
from raytune.config.sections.training import TrainingSection
from raytune.plan.choosing.batch import DEFAULT_ROWS, MIN_STEPS
from raytune.plan.choosing.fitting import TOKENS_PER_MICRO_BATCH, Fit, room_of_worker, rows_of_enough_tokens, tokens_of_worker
from raytune.plan.choosing.setting import Setting
from raytune.plan.costs.loss_chunks import FULL_LOGITS_BYTES, smallest_chunk
from raytune.plan.costs.memory import NODE_COPY, bytes_in
from raytune.plan.costs.workload import BYTES
from raytune.plan.defaults import Choice
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.facts.machine import Machine
from raytune.plan.model.quantization import quantization_limits, quantized_bytes
from raytune.plan.run_plan import BatchPlan
from raytune.plan.strategies.distillation import distillation_of
from raytune.units import format_bytes, format_rate

Value = TypeVar("Value")


class Reasons(list[str]):
    """Sentences about choices, in the order in which they were made."""

    def taken(self, choice: Choice[Value]) -> Value:
        if choice.reason:
            self.append(choice.reason)
        return choice.value


def reasons_for_fit(fit: Fit, setting: Setting, wanted_rows: int, data: DataFacts) -> list[str]:
    """Why batches, stage, checkpointing and loss are what `choose_fit` found."""
    training = setting.config.training
    room = room_of_worker(setting).device
    needed = format_bytes(bytes_in(fit.memory, "device"))
    compared = f"{needed} per worker of the {format_bytes(room)} that can be used" if room else f"{needed} per worker"
    row = "document" if setting.config.data.packing == "none" else "packed row"
    reasons = []
    if training.global_batch_size == "auto":
        rows = fit.batch.global_batch_size
        reasons.append(f"training.global_batch_size is {rows}: {_why_rows(fit.batch, wanted_rows, training, row)}.")
    if training.per_device_train_batch_size == "auto":
        tokens = tokens_of_worker(setting, data, fit.batch)
        reasons.append(
            f"training.per_device_train_batch_size is {fit.batch.micro_batch_size}: at most {tokens} tokens per forward pass"
            f"{_too_few_rows(fit, setting, data, tokens)}."
        )
    if training.gradient_accumulation_steps == "auto":
        reasons.append(f"training.gradient_accumulation_steps is {fit.batch.accumulation}: {fit.batch.in_words(row)}.")
    of_all = "in the fastest way that fits, by the plan's arithmetic"
    if training.zero.stage == "auto":
        why = of_all if fit.step_time else "the lowest that fits and that the settings allow"
        reasons.append(f"training.zero.stage is {fit.zero_stage}, {why}: {compared}.")
    if training.zero.copy_per_node == "auto" and fit.zero_stage == 3 and any(way.copy_over > 1 for way in setting.shardings):
        reasons.append(_why_copies(fit, setting, of_all))
    if training.gradient_checkpointing == "auto":
        why = "it would not fit without" if fit.has_checkpointing else "it fits without"
        why = of_all if fit.step_time else why
        reasons.append(f"training.gradient_checkpointing is {str(fit.has_checkpointing).lower()}: {why}.")
    ring = setting.machine.speed.ring(setting.workers) if fit.step_time and setting.machine.speed else None
    if ring and setting.workers > 1:
        width = 4 if fit.zero_stage == 0 else BYTES[setting.precision]
        reasons.append(
            f"Gradients are summed over the GPUs up to {format_bytes(width * fit.buckets.reduce_elements)} at a time: enough for "
            f"{setting.workers} GPUs at {format_rate(ring.bytes_per_s)}, and little enough that most travel in the backward pass."
        )
    logits = "all logits" if distillation_of(setting.config) is None else "all logits, with those of the teacher"
    if training.loss == "auto" and fit.chunk_tokens:
        more = fit.chunk_tokens > smallest_chunk(setting.shape.vocab)
        reasons.append(
            f"training.loss is chunked, {fit.chunk_tokens} targets at a time: {logits} (vocabulary "
            f"{setting.shape.vocab}) would exceed {format_bytes(FULL_LOGITS_BYTES)}"
            f"{', and fewer at a time would read the weights of the head more often' if more else ''}."
        )
    elif training.loss == "auto":
        reasons.append(f"training.loss is full: the logits of all targets stay below {format_bytes(FULL_LOGITS_BYTES)}.")
    if setting.quantization and setting.workers > 1 and not quantization_limits(setting.held, setting.precision):
        packed = quantized_bytes(setting.quantization, setting.shape, setting.trained)
        reasons.append(_quantised_and_zero_3(packed, fit))
    return reasons


def _too_few_rows(fit: Fit, setting: Setting, data: DataFacts, tokens: int) -> str:
    """What a GPU lacks where a step has no more rows for it, and how many rows would fill it."""
    enough = rows_of_enough_tokens(setting, data)
    if setting.device == "cpu" or fit.batch.accumulation > 1 or fit.batch.micro_batch_size >= enough:
        return ""
    return (
        f", all that a step has for a worker; a GPU is busy with {TOKENS_PER_MICRO_BATCH['cuda']}: "
        f"training.global_batch_size {enough * fit.batch.data_parallel}, if memory allows it"
    )


def _why_copies(fit: Fit, setting: Setting, of_all: str) -> str:
    """Why a node has a copy of the weights of its own, or has none."""
    speed, key = setting.machine.speed, "training.zero.copy_per_node"
    if speed is None or fit.copy_over == 1:
        return f"{key} is false: {'it would not fit, or save no time' if speed else 'how fast nodes talk is not known'}."
    copy = next(part.num_bytes for part in fit.memory if part.name == NODE_COPY)
    after_updates = ", trained ones once per step between nodes too" if setting.trained.is_base else ""
    return (
        f"{key} is true, {of_all}: the {fit.copy_over} workers of a node have {format_bytes(copy)} each of a copy of the weights "
        f"and gather them at {format_rate(speed.intra_bytes_per_s)}, instead of all through the "
        f"{format_rate(speed.inter_bytes_per_s)} between nodes{after_updates}."
    )


def _quantised_and_zero_3(num_bytes: float, fit: Fit) -> str:
    """What ZeRO-3 would do for a quantised base of this size, or does."""
    packed, possible = format_bytes(num_bytes), "A quantised base under ZeRO-3 is possible"
    if fit.zero_stage < 3:
        return f"{possible} but not wanted here: the packed base ({packed}) lies whole on every worker."
    return (
        f"{possible}: packed weights are sharded while they load, and each pass of each micro-batch gathers "
        f"them ({packed}). A lower stage gathers nothing, but needs room for the whole packed base on every worker."
    )


def reasons_of_cluster(config: RunConfig, machine: Machine) -> list[str]:
    """What the config says of machines that are others."""
    section = config.cluster
    if section.instance and machine.instance is None:
        return [f"cluster.instance is {section.instance}, but the cluster has no GPUs: neither time nor money are known."]
    if "nodes" in section.model_fields_set and section.nodes != machine.num_nodes:
        there = f"{machine.num_nodes} that can hold a worker"
        return [f"cluster.nodes is {section.nodes}, but the cluster has {there}: the plan is for what is there."]
    return []


def _why_rows(batch: BatchPlan, wanted_rows: int, training: TrainingSection, row: str) -> str:
    if training.per_device_train_batch_size != "auto" and training.gradient_accumulation_steps != "auto":
        return batch.in_words(row)
    if batch.global_batch_size > wanted_rows:
        return f"the fewest {row}s that the other settings allow"
    if wanted_rows < DEFAULT_ROWS:
        return f"fewer than {DEFAULT_ROWS}, because the data has few {row}s (at least {MIN_STEPS} steps, none twice in a step)"
    return f"{DEFAULT_ROWS} {row}s, in whole parts for each worker"
