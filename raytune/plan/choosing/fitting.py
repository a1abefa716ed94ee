"""Which micro-batch, ZeRO stage and activation checkpointing fit into memory, and what would fit where nothing does."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from raytune.config.sections.adapter import LoraAdapter, preset_of
from raytune.config.sections.run import RunConfig
from raytune.errors import PlanError, UserError
from raytune.plan.choosing.batch import possible_batches
from raytune.plan.choosing.requirements import Device
from raytune.plan.choosing.setting import Setting, settle
from raytune.plan.choosing.stages import Sharding
from raytune.plan.costs.buckets import buckets_of
from raytune.plan.costs.loss_chunks import chunk_within, exceeds_full_logits, smallest_chunk, wanted_chunk
from raytune.plan.costs.memory import (
    LOSS_MOMENTS,
    bytes_in,
    bytes_per_target,
    checkpoint_bytes,
    fullest_moment,
    memory_parts,
    parts_at,
    saved_by_ranks,
)
from raytune.plan.costs.throughput import Speed, step_time
from raytune.plan.costs.workload import BYTES, Workload
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.facts.machine import USABLE_SHARE, Machine
from raytune.plan.methods import method_of
from raytune.plan.model.lone_documents import rows_of_a_pass
from raytune.plan.model.trained import Trained
from raytune.plan.run_plan import BatchPlan, BucketPlan, MemoryPart, StepTimePlan, StorePlan, ZeroStage
from raytune.plan.strategies.distillation import is_beneath
from raytune.plan.strategies.penalty import ewc_documents, ewc_strength, penalty_keys
from raytune.units import format_bytes

# Tokens per forward pass above which little gets faster: a GPU is busy with 8k (docs/performance.md), a CPU core with far
# fewer.
TOKENS_PER_MICRO_BATCH: dict[Device, int] = {"cuda": 8192, "cpu": 2048}
MAX_ADVICE = 3
MAX_SHARING = 8
"""More workers per row are not advised: they rarely lie in one node."""
MIN_ROW_LENGTH = 128
"""Shorter rows are not advised."""

WORTH_CHOOSING = 0.98
"""A way is taken before a simpler one if its step takes less than this share of the other's: nearer figures say nothing."""

Change = tuple[str, RunConfig, Machine]
"""As it would be written on the command line, the config with it, and the machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a phase takes; a run without phases is one."""

    trained: Trained
    memory: list[MemoryPart]
    checkpoint_bytes: int
    saved_by_ranks: tuple[int, int]
    """Bytes of a checkpoint that are rank 0's, and those of each of the others."""
    step_time: StepTimePlan | None
    """None where the machines' speed is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One way to run, with its bytes."""

    batch: BatchPlan
    zero_stage: ZeroStage
    shards_base: bool
    has_checkpointing: bool
    chunk_tokens: int | None
    phases: tuple[Needs, ...]
    copy_over: int
    buckets: BucketPlan
    importance_s: float | None = None
    """Seconds of estimating the importance of weights; None where none is, or the machines' speed is not known."""

    @property
    def memory(self) -> list[MemoryPart]:
        """Of the fullest phase."""
        return max((one.memory for one in self.phases), key=lambda parts: (bytes_in(parts, "device"), bytes_in(parts, "host")))

    @property
    def checkpoint_bytes(self) -> int:
        """Of the largest."""
        return max(one.checkpoint_bytes for one in self.phases)

    @property
    def step_time(self) -> StepTimePlan | None:
        """Of the last phase; None where the machines' speed is not known."""
        return self.phases[-1].step_time


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that a worker may fill; None: not known, or nothing lies there."""

    device: int | None
    host: int | None

    def holds(self, way: Fit) -> bool:
        return all(self._holds(one.memory) for one in way.phases)

    def _holds(self, memory: list[MemoryPart]) -> bool:
        on_device = self.device is None or bytes_in(memory, "device") <= self.device
        return on_device and (self.host is None or bytes_in(memory, "host") <= self.host)


def choose_fit(setting: Setting, rows_per_step: int, data: DataFacts, *, advises: bool = True) -> Fit:
    """The fastest way that fits; where nobody knows, the first: without checkpointing before with, lowest ZeRO stage, largest
    micro-batch.

    Args:
        rows_per_step: where the config does not say.
        advises: whether to look for what would fit where nothing does, which takes longer than all else.

    Raises:
        PlanError: if none fits; the message names the nearest settings that do.
    """
    room = room_of_worker(setting)
    fitting = (way for way in _ways(setting, rows_per_step, data) if room.holds(way))
    if (first := next(fitting, None)) is not None:
        return first if first.step_time is None else _fastest([first, *fitting])
    smallest = min(_ways(setting, rows_per_step, data), key=lambda way: bytes_in(way.memory, "device"))
    refusal = _too_large(smallest, room, setting)
    if advises:
        refusal = f"{refusal} {_way_out(setting, rows_per_step, data)}"
    raise PlanError(refusal, keys=("cluster.workers", "model.base"))


def _fastest(ways: list[Fit]) -> Fit:
    best = ways[0]
    for way in ways[1:]:
        if way.step_time and best.step_time and way.step_time.seconds < WORTH_CHOOSING * best.step_time.seconds:
            best = way
    return best


def room_of_worker(setting: Setting) -> Room:
    """What the plan may fill, per worker."""
    machine, on_gpu = setting.machine, setting.device == "cuda"
    on_node = machine.workers_on_a_node(setting.workers, per_gpu=on_gpu)
    host = int(USABLE_SHARE * machine.host_memory_bytes / on_node) if machine.host_memory_bytes else None
    if not on_gpu:
        return Room(device=host, host=None)
    return Room(device=int(USABLE_SHARE * machine.gpu_memory_bytes) if machine.gpu_memory_bytes else None, host=host)


def _ways(setting: Setting, rows_per_step: int, data: DataFacts, *, is_timed: bool = True) -> Iterator[Fit]:
    wanted = setting.config.training.gradient_checkpointing
    speed = setting.machine.speed if is_timed else None
    enough = rows_of_enough_tokens(setting, data)
    most = 2 * enough if setting.device == "cuda" else enough
    training = rows_of_a_pass(setting.config.training, setting.shape)
    batches = possible_batches(training, setting.workers, rows_per_step, most, enough)
    either = (False, True) if method_of(setting.adapter).recomputes else (False,)
    room = room_of_worker(setting)
    for has_checkpointing in either if wanted == "auto" else (wanted,):
        for sharding in setting.shardings:
            for batch in batches:
                yield _way(setting, speed, data, batch, sharding, has_checkpointing, room)


def rows_of_enough_tokens(setting: Setting, data: DataFacts) -> int:
    """Rows of a forward pass that keep a device busy: on a GPU at least as many, on a CPU at most, or one."""
    at_once = TOKENS_PER_MICRO_BATCH[setting.device] * setting.config.training.sequence_parallel_size
    positions = positions_of_row(setting, data)
    return -(-at_once // positions) if setting.device == "cuda" else max(1, at_once // positions)


def _way(
    setting: Setting,
    speed: Speed | None,
    data: DataFacts,
    batch: BatchPlan,
    sharding: Sharding,
    has_checkpointing: bool,
    room: Room,
) -> Fit:
    stage = sharding.stage
    training, shape = setting.config.training, setting.shape
    row_tokens, trained = positions_of_row(setting, data), setting.trained
    num_tokens = tokens_of_worker(setting, data, batch)
    # Of a row that is shared, all targets may lie in one part.
    num_targets = min(num_tokens, most_targets(data.train, batch.micro_batch_size * longest_row(setting, data)))
    if data.ewc:  # a document of these passes alone
        num_targets = max(num_targets, most_targets(data.ewc, longest_row(setting, data)))
    teacher = setting.teacher or (shape if is_beneath(setting.config) else None)
    num_logits = shape.vocab + (teacher.vocab if teacher else 0)
    is_chunked = training.loss == "chunked" or (training.loss == "auto" and exceeds_full_logits(num_targets, num_logits))
    engine = "plain" if stage == 0 else "zero"
    work = Workload(
        shape=shape,
        trained=trained,
        quantization=setting.quantization,
        engine=engine,
        zero_stage=stage,
        shards_base=sharding.shards_base,
        copy_over=sharding.copy_over,
        workers=setting.workers,
        offload_optimizer=training.zero.offload_optimizer,
        offload_parameters=training.zero.offload_parameters,
        precision=setting.precision,
        optimizer=training.optimizer,
        attention=setting.attention,
        has_checkpointing=has_checkpointing,
        accumulation=batch.accumulation,
        sequence_parallel=batch.sequence_parallel,
        num_tokens=num_tokens,
        num_targets=num_targets,
        chunk_tokens=smallest_chunk(shape.vocab) if is_chunked else None,
        is_on_gpu=setting.device == "cuda",
        drops=frozenset(kind for kind, key in shape.dropouts if setting.dropout.get(key)),
        holds_weights=bool(penalty_keys(setting.config)),
        weighs_importance=ewc_strength(setting.config) > 0,
        averages_every=training.averaging and training.averaging.every_steps,
        objective_bytes=setting.objective.bytes_per_logit if setting.objective else None,
        teacher=teacher,
        teacher_is_beside=setting.teacher is not None,
        streamed_tokens=data.train.num_tokens if data.stream else 0,
        streamed_ahead_bytes=data.stream.ahead_bytes if data.stream else 0,
        buckets=buckets_of(
            engine=engine,
            width=4 if stage == 0 else BYTES[setting.precision],
            workers=setting.workers,
            shape=shape,
            trained=trained,
            quantization=setting.quantization,
            ring=setting.machine.speed.ring(setting.workers) if setting.machine.speed and setting.device == "cuda" else None,
        ),
        num_virtual_keys=0 if trained.lengthens_rows else batch.micro_batch_size * trained.num_virtual,
    )
    phases = [replace(work, trained=each) for each in setting.phases or (trained,)]
    memory = [memory_parts(each) for each in phases]
    # Rates of the catalogue are those of 16-bit products on GPUs.
    has_rates = work.is_on_gpu and work.precision != "fp32"
    if is_chunked and has_rates and (chunk := _chunk_for_gpu(phases, memory, speed, room)) != work.chunk_tokens:
        work, *phases = (replace(each, chunk_tokens=chunk) for each in (work, *phases))
        memory = [memory_parts(each) for each in phases]
    return Fit(
        batch=batch,
        zero_stage=stage,
        shards_base=sharding.shards_base,
        has_checkpointing=has_checkpointing,
        chunk_tokens=work.chunk_tokens,
        phases=tuple(
            Needs(
                trained=each.trained,
                memory=parts,
                checkpoint_bytes=checkpoint_bytes(each),
                saved_by_ranks=saved_by_ranks(each),
                step_time=step_time(each, speed, row_tokens) if speed and has_rates else None,
            )
            for each, parts in zip(phases, memory)
        ),
        copy_over=sharding.copy_over,
        buckets=work.buckets,
        importance_s=_importance_s(work, speed, setting, data) if speed and has_rates else None,
    )


def _chunk_for_gpu(phases: list[Workload], memory: list[list[MemoryPart]], speed: Speed | None, room: Room) -> int:
    """As many targets as are worth projecting at a time, or as many as there is room for, beside what else is there then.

    Args:
        phases: of the run, each with the smallest chunk.
        memory: of each of them.
    """
    shape, left = phases[0].shape, None
    if room.device is not None:
        taken = (sum(part.num_bytes for part in parts_at(parts, "device", moment)) for parts in memory for moment in LOSS_MOMENTS)
        left = room.device - max(taken)
    return chunk_within(
        shape.vocab,
        wanted_chunk(
            width=BYTES[phases[0].precision],
            is_trained=any(shape.head.name in each.trained.whole for each in phases),
            flops_per_byte=speed and speed.flops / speed.memory_bytes_per_s,
        ),
        bytes_per_target=bytes_per_target(phases[0]),
        room=left,
    )


def _importance_s(work: Workload, speed: Speed, setting: Setting, data: DataFacts) -> float | None:
    """Seconds of estimating the importance of weights: as many steps as a worker has documents, of a document of mean length."""
    if data.ewc is None:
        return None
    tokens = math.ceil(data.ewc.num_tokens / data.ewc.num_rows)
    alone = replace(work, accumulation=1, num_tokens=tokens, num_targets=most_targets(data.ewc, tokens))
    return -(-ewc_documents(setting.config, data) // work.workers) * step_time(alone, speed, tokens).seconds


def longest_row(setting: Setting, data: DataFacts) -> int:
    """Tokens of the longest row: without packing, those of the longest document."""
    is_packed = setting.config.data.packing != "none"
    return setting.row_length if is_packed else min(setting.row_length, data.longest_document)


def positions_of_row(setting: Setting, data: DataFacts) -> int:
    """What passes through the layers of the longest row: its tokens, and as many virtual ones as rows leave room for."""
    return longest_row(setting, data) + (setting.trained.num_virtual if setting.trained.lengthens_rows else 0)


def tokens_of_worker(setting: Setting, data: DataFacts, batch: BatchPlan) -> int:
    """What passes through the layers of a worker in a micro-batch of the longest rows."""
    return -(-batch.micro_batch_size * positions_of_row(setting, data) // batch.sequence_parallel)


def most_targets(store: StorePlan, num_tokens: int) -> int:
    """Target tokens of a micro-batch: twice the mean share of its rows, because rows differ, at most all of them."""
    share = store.num_targets / store.num_tokens
    return min(num_tokens, int(2 * share * num_tokens) + 1)


def _fits(config: RunConfig, machine: Machine, was: Setting, rows_per_step: int, data: DataFacts) -> bool:
    """Whether anything fits after a change of the config, which may be refused for other reasons too."""
    try:
        setting = settle(config, was.shape, machine, was.begun, was.teacher, was.objective)
        room = room_of_worker(setting)
        return any(room.holds(way) for way in _ways(setting, rows_per_step, data, is_timed=False))
    except UserError:
        return False


def _way_out(setting: Setting, rows_per_step: int, data: DataFacts) -> str:
    """What would fit, as a sentence."""
    advice = list(islice(_advice(setting, rows_per_step, data), MAX_ADVICE))
    if not advice:
        return "No single change fits: use more or larger machines, or a smaller model."
    return f"What would fit: {'; or '.join(advice)}."


def _advice(setting: Setting, rows_per_step: int, data: DataFacts) -> Iterator[str]:
    """Of each kind of change the smallest with which the run fits."""
    for changes in _kinds_of_change(setting, rows_per_step):
        fitting = (text for text, changed, machines in changes if _fits(changed, machines, setting, rows_per_step, data))
        if (text := next(fitting, None)) is not None:
            yield text


def _kinds_of_change(setting: Setting, rows_per_step: int) -> Iterator[list[Change]]:
    """Changes that save memory, smallest first in each list; lists whose changes leave the result as it is come first."""
    config, machine = setting.config, setting.machine
    training, zero, begun = config.training, config.training.zero, setting.begun
    is_bound = begun is not None and begun.sharded_over is not None

    def with_training(text: str, **values: object) -> Change:
        return text, config.model_copy(update={"training": training.model_copy(update=values)}), machine

    def with_zero(text: str, **values: object) -> Change:
        return with_training(text, zero=zero.model_copy(update=values))

    def with_workers(workers: int) -> Change:
        cluster = config.cluster.model_copy(update={"workers": workers})
        return f"cluster.workers={workers}", config.model_copy(update={"cluster": cluster}), machine

    def with_nodes(nodes: int) -> Change:
        cluster = config.cluster.model_copy(update={"nodes": nodes})
        return f"cluster.nodes={nodes}", config.model_copy(update={"cluster": cluster}), machine.with_nodes(nodes)

    def with_row_length(length: int) -> Change:
        data = config.data.model_copy(update={"max_length": length})
        return f"data.max_length={length}", config.model_copy(update={"data": data}), machine

    if training.gradient_checkpointing is False:
        yield [with_training("training.gradient_checkpointing=true", gradient_checkpointing=True)]
    if training.loss == "full":
        yield [with_training("training.loss=chunked", loss="chunked")]
    if smaller := _smallest_micro_batch(setting, rows_per_step):
        yield [with_training(" ".join(f"training.{key}={value}" for key, value in smaller.items()), **smaller)]
    if zero.copy_per_node is True:
        yield [with_zero("training.zero.copy_per_node=false", copy_per_node=False)]
    if zero.stage != "auto" and not (begun and begun.layout):
        yield [with_zero(f"training.zero.stage={stage}", stage=stage) for stage in range(zero.stage + 1, 4)]
    if training.shard_base is False:
        yield [with_training("training.shard_base=auto", shard_base="auto")]
    if setting.device == "cuda":
        larger = {setting.workers * 2**power for power in range(1, 10)} | {machine.num_gpus}
        if not is_bound:
            yield [with_workers(workers) for workers in sorted(larger) if setting.workers < workers <= machine.num_gpus]
        if machine.instance and config.cluster.workers == "auto":
            yield [with_nodes(machine.num_nodes * 2**power) for power in range(1, 7)]
        sizes = range(training.sequence_parallel_size + 1, min(setting.workers, MAX_SHARING) + 1)
        yield [
            with_training(f"training.sequence_parallel_size={size}", sequence_parallel_size=size)
            for size in sizes
            if setting.workers % size == 0
        ]
        optimizer, weights = "training.zero.offload_optimizer=cpu", "training.zero.offload_parameters=cpu"
        if zero.offload_optimizer == "none":
            yield [with_zero(optimizer, offload_optimizer="cpu")]
        if zero.offload_parameters == "none":
            yield [with_zero(f"{optimizer} {weights}", offload_optimizer="cpu", offload_parameters="cpu")]
    if begun is not None:
        return  # what follows would make another run of it
    lengths = (setting.row_length // 2**power for power in range(1, 16))
    yield [with_row_length(length) for length in lengths if length >= MIN_ROW_LENGTH]
    if training.optimizer in ("adamw", "paged_adamw"):
        yield [with_training("training.optimizer=adamw_8bit", optimizer="adamw_8bit")]
    yield from _lighter_methods(setting)


def _lighter_methods(setting: Setting) -> Iterator[list[Change]]:
    """What saves memory by training less, or over a base that is held in 4 bits."""
    config, machine = setting.config, setting.machine
    if setting.trained.is_base:
        yield [("adapter.method=lora", config.model_copy(update={"adapter": LoraAdapter()}), machine)]
    text, quantised, changes = "", config, []
    preset = preset_of(config.adapter) if config.model.quantization == "auto" else None
    if setting.quantization is None and preset:
        text, quantised = "adapter.method=qlora", config.model_copy(update={"adapter": preset})
    elif setting.quantization is None and not setting.trained.is_base:
        model = config.model.model_copy(update={"quantization": "nf4"})
        text, quantised = "model.quantization=nf4", config.model_copy(update={"model": model})
    if text:
        changes = [(text, quantised, machine)]
    if excluded := method_of(quantised.adapter).exclusions(
        quantised.adapter, setting.shape
    ):  # 4 bits hold them only if they stay frozen
        without = f"{text} adapter.exclude_modules=[{','.join(excluded)}]".lstrip()
        adapter = quantised.adapter.model_copy(update={"exclude_modules": excluded})
        changes += [(without, quantised.model_copy(update={"adapter": adapter}), machine)]
    yield changes


def _smallest_micro_batch(setting: Setting, rows_per_step: int) -> dict[str, int]:
    """What makes it one row per forward pass, at the same rows per step; nothing where it is that already, or may become it."""
    training = setting.config.training

    def batch(changed: dict[str, int]) -> BatchPlan:
        changed_training = rows_of_a_pass(training.model_copy(update=changed), setting.shape)
        return possible_batches(changed_training, setting.workers, rows_per_step, max_micro_batch=1)[0]

    asked = batch({})
    if asked.micro_batch_size == 1:
        return {}
    changed = {} if training.per_device_train_batch_size == "auto" else {"per_device_train_batch_size": 1}
    is_fixed = training.gradient_accumulation_steps != "auto"
    if is_fixed or batch(changed).global_batch_size != asked.global_batch_size:
        changed["gradient_accumulation_steps"] = asked.accumulation * asked.micro_batch_size
    return changed


def _too_large(way: Fit, room: Room, setting: Setting) -> str:
    needed, limit, place, where = bytes_in(way.memory, "device"), room.device, "device", "GPU memory"
    if setting.device == "cpu":
        where = "the node's memory, per worker"
    elif limit is None or needed <= limit:
        needed, limit, place, where = bytes_in(way.memory, "host"), room.host, "host", "the host's memory, per worker"
    assert limit is not None
    assert needed > limit
    there = parts_at(way.memory, place, fullest_moment(way.memory, place))
    parts = sorted(there, key=lambda part: -part.num_bytes)
    listed = ", ".join(f"{part.name} {format_bytes(part.num_bytes)}" for part in parts)
    return (
        f"The run does not fit: a worker needs at least {format_bytes(needed)} of {where}, and {format_bytes(limit)} can be used "
        f"({USABLE_SHARE:.0%}; {way.batch.equation}, ZeRO stage {way.zero_stage}: {listed})."
    )
