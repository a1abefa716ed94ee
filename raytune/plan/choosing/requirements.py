"""What machines and model leave to choose: device, workers, precision, attention, row length."""

from typing import Literal

from raytune.config.sections.adapter import num_virtual_tokens
from raytune.config.sections.cluster import ClusterSection
from raytune.config.sections.model import Attention
from raytune.config.sections.run import RunConfig
from raytune.config.sections.training import Precision
from raytune.errors import PlanError, UserError
from raytune.plan.defaults import Choice
from raytune.plan.facts.machine import Machine
from raytune.plan.model.dropouts import WITHOUT_DROPOUT, drops_attention
from raytune.plan.model.lone_documents import choose_lone_attention
from raytune.plan.model.rope import positions_of
from raytune.plan.model.shapes import ModelShape
from raytune.plan.strategies.sequence import check_groups

Device = Literal["cpu", "cuda"]
DEFAULT_ROW_LENGTH = 2048
FLASH: tuple[Attention, ...] = ("flash_attention_2", "flash_attention_3")


def choose_row_length(config: RunConfig, shape: ModelShape) -> int:
    """Tokens per packed row; the store is built with it, before the rest is planned.

    Raises:
        UserError: if it is more than the model has positions for, with virtual tokens in front.
    """
    wanted, most, num_virtual = config.data.max_length, most_tokens(config, shape), num_virtual_tokens(config.adapter)
    has = f"{config.model.base} ({shape.model_type}) has {positions_of(config.model, shape)} positions"
    if most < 1:
        raise UserError(
            f"adapter.num_virtual_tokens is {num_virtual}, but {has}, which documents need as well. Set it to less.",
            keys=("adapter.num_virtual_tokens",),
        )
    if wanted == "auto":
        return min(DEFAULT_ROW_LENGTH, most)
    if wanted > most:
        taken = f", of which adapter.num_virtual_tokens takes {num_virtual}" if num_virtual else ""
        raise UserError(
            f"data.max_length is {wanted}, but {has}{taken}. "
            f"Set data.max_length to {most} or less; data.too_long says what happens to longer documents."
        )
    return wanted


def most_tokens(config: RunConfig, shape: ModelShape) -> int:
    """Tokens of the longest document that the model has positions for, behind virtual ones."""
    return positions_of(config.model, shape) - num_virtual_tokens(config.adapter)


def choose_device(config: RunConfig, machine: Machine) -> Device:
    """A GPU wherever the cluster has one and the config does not decline it."""
    wanted = config.cluster.gpus_per_worker
    if wanted == 1 and not machine.num_gpus:
        raise PlanError(
            "cluster.gpus_per_worker is 1, but the cluster has no GPU. Set it to 0 to train on CPUs, or join another cluster."
        )
    return "cuda" if machine.num_gpus and wanted != 0 else "cpu"


def choose_workers(config: RunConfig, machine: Machine, device: Device) -> Choice[int]:
    """All GPUs, or one CPU worker, whose threads share the cores better than processes would."""
    section = config.cluster
    if section.workers != "auto":
        choice = Choice(section.workers)
    elif device == "cuda":
        choice = Choice(machine.num_gpus, f"cluster.workers is {machine.num_gpus}: one for each GPU of the cluster.")
    else:
        choice = Choice(1, "cluster.workers is 1: without GPUs, more processes only share the same cores.")
    workers = choice.value
    check_groups(config.training.sequence_parallel_size, workers)
    if device == "cuda" and workers > machine.num_gpus:
        raise PlanError(
            f"cluster.workers is {workers}, but the cluster has {machine.num_gpus} GPUs. Set it to {machine.num_gpus} or less."
        )
    most_on_cpus = int(machine.num_cpus / section.cpus_per_worker) if section.cpus_per_worker else workers
    if workers > most_on_cpus:
        smaller = f"set cluster.workers to {most_on_cpus} or " if most_on_cpus else ""
        raise PlanError(
            f"cluster.workers {workers} x cpus_per_worker {section.cpus_per_worker:g} is more than the {machine.num_cpus} CPUs "
            f"of the cluster: Ray would wait for ever. To continue, {smaller}lower cluster.cpus_per_worker."
        )
    if section.placement == "strict_spread" and workers > machine.num_nodes:
        raise PlanError(
            f"cluster.placement is strict_spread, one worker per node, but there are {workers} workers and {machine.num_nodes} "
            f"nodes. Set cluster.workers to {machine.num_nodes}, or placement to spread."
        )
    return choice


def choose_precision(config: RunConfig, machine: Machine, device: Device) -> Choice[Precision]:
    """bf16 on GPUs that have it, fp16 on older ones, fp32 on CPUs."""
    wanted = config.training.precision
    if wanted == "auto":
        if device == "cpu":
            return Choice("fp32", "training.precision is fp32, the exact one; bf16 is faster on CPUs with AMX.")
        if machine.supports_bf16:
            return Choice("bf16", f"training.precision is bf16: {machine.gpu_name} has it, and it needs no loss scaling.")
        return Choice("fp16", f"training.precision is fp16: {machine.gpu_name} has no bf16. The loss is scaled.")
    if wanted == "bf16" and device == "cuda" and not machine.supports_bf16:
        raise PlanError(f"training.precision is bf16, which {machine.gpu_name} does not have. Set it to fp16 or fp32.")
    return Choice(wanted)


def choose_attention(
    config: RunConfig, shape: ModelShape, machine: Machine, device: Device, precision: Precision
) -> Choice[Attention]:
    """The first kind that the machine prefers and that computes in this precision."""
    usable: list[Attention] = [
        kind
        for kind in machine.attention
        if not (kind in FLASH and (precision == "fp32" or device == "cpu"))
        and not (kind in WITHOUT_DROPOUT and drops_attention(config.model))
        and (kind == "varlen" or config.training.sequence_parallel_size == 1)
    ]
    wanted = config.model.attention
    if shape.why_lone:
        return choose_lone_attention(wanted, usable, shape)
    if wanted == "auto":
        if not usable:
            raise PlanError("No kind of attention works on this cluster's machines. Check that their PyTorch sees its device.")
        why = "documents are kept apart without a mask" if usable[0] not in ("sdpa", "eager") else "nothing faster works here"
        return Choice(usable[0], f"model.attention is {usable[0]}: {why}.")
    if wanted not in usable:
        in_fp32 = f" in {precision}" if wanted in machine.attention else ""
        raise PlanError(f"model.attention {wanted} does not work on this cluster{in_fp32}. Set it to {' or '.join(usable)}.")
    return Choice(wanted)


def check_cluster(section: ClusterSection) -> None:
    """Refuse what is said of machines whose type is not said. (`plan --instances` says it.)"""
    if section.instance is not None:
        return
    written = [name for name in ("nodes", "spot") if getattr(section, name) != ClusterSection.model_fields[name].default]
    if written:
        value = str(getattr(section, written[0])).lower()
        raise UserError(
            f"cluster.{written[0]} is {value}, but without cluster.instance nothing reads it: the nodes that are there are used. "
            f"Set cluster.instance to their type, or leave cluster.{written[0]} out."
        )
