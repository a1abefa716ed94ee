"""Bytes of a run, per rank, part by part and moment by moment, and of its checkpoints. Every formula names its source.

Activations, logits and gradients are never all there at once, so a worker needs the bytes of the fullest moment of a step, not of
all parts; a test holds that against the allocator. Not in here: fragmentation and what kernels take for a moment, for which
`machine.USABLE_SHARE` leaves room.
"""

from collections.abc import Iterator
from functools import lru_cache

from raytune.config.sections.training import SCHEDULE_FREE, Offload, Optimizer
from raytune.plan.costs.activations import (
    around_bytes,
    dequantized_bytes,
    expanded_expert_bytes,
    in_layer_bytes,
    kept_bytes,
    last_norm_bytes,
    layer_activation_bytes,
    passing_bytes,
)
from raytune.plan.costs.buckets import num_persistent
from raytune.plan.costs.workload import BYTES, Workload
from raytune.plan.model.quantization import constant_bytes
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained, layer_of
from raytune.plan.run_plan import MOMENTS, MemoryPart, Moment, Place
from raytune.units import GIB, MIB

STATE_BYTES: dict[Optimizer, float] = {
    "adamw": 8,
    "paged_adamw": 8,
    # Two moments of a byte, and an fp32 scale per 256 of them (Dettmers et al. 2022, 8-bit Optimizers).
    "adamw_8bit": 2 + 2 * 4 / 256,
    "paged_adamw_8bit": 2 + 2 * 4 / 256,
    "lion": 4,
    # Of matrices of hidden layers, which have a momentum only; all else is AdamW's.
    "muon": 4,
    # The weights that updates are made on, of which the model is the average, and one moment.
    "schedule_free_adamw": 8,
}
"""Optimizer state per trained parameter. Adafactor's depends on shapes."""
EIGHT_BIT: tuple[Optimizer, ...] = ("adamw_8bit", "paged_adamw_8bit")
ORTHOGONAL: tuple[Optimizer, ...] = ("muon",)
"""Which orthogonalise updates of matrices, and leave all else to AdamW."""
AVERAGES_BYTES = 8
"""Of what a method follows (`Trained.num_followed`), per number: two averages in fp32."""
CPU_PROCESS_BYTES = GIB
"""Allowance for what a worker's process holds besides tensors: Ray, torch and other libraries, 0.54 GiB once imported, and what
they and the C library keep while they work. Measured on 2026-11-28 as resident set less planned tensors, after 10 to 120 steps of
the demo base: 0.61 GiB (full, plain), 0.67 (full, ZeRO-3), 0.69 (QLoRA), 0.70 (LoRA, plain), 0.78 to 0.86 (LoRA, ZeRO-3)."""
GPU_CONTEXT_BYTES = GIB
"""CUDA context, cuBLAS and NCCL buffers of a process; 0.5-1 GiB by driver and GPU, which the allocator's figures do not show."""
NODE_COPY = "copy of the weights in the node"
CUDA_CONTEXT, CPU_PROCESS = "CUDA context and libraries", "process and libraries"
ZERO_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters, and of the distance within which gathered weights are kept for reuse."""
ZERO_SUB_GROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's default of sub_group_size: parameters that stage 3 updates at once."""
PASSES: tuple[Moment, ...] = ("forward", "loss", "last layer", "first layer")
LOSS_MOMENTS: tuple[Moment, ...] = ("forward", "loss")
"""When logits are there."""
STREAM_BYTES = 256 * MIB
"""Of the tokenizer, and of what it makes of some hundred documents on the way to their tokens."""
STREAMED_TOKEN_BYTES = 40
"""Of a window: its rows as text and objects, its documents and its packed rows, and the packed rows of two windows beside it."""


def memory_parts(work: Workload) -> list[MemoryPart]:
    """Bytes per rank by part, each at the moments of a step when it is there."""
    parts = (*_model_states(work), *_pass_parts(work), *_teacher_parts(work), *_engine_parts(work))
    return [part for part in parts if part.num_bytes]


def _model_states(work: Workload) -> Iterator[MemoryPart]:
    """Weights, gradients, optimizer state, and what the update takes for itself."""
    host, optimizer_place = _place("cpu", work), _place(work.offload_optimizer, work)
    # DeepSpeed keeps the gradients of a sharded optimizer where that optimizer computes.
    gradients_place = host if optimizer_place != "device" and work.zero_stage >= 2 else "device"
    yield _part("weights", _weight_bytes(work), place=_place(work.offload_parameters, work))
    if work.copy_over > 1:
        yield _part(NODE_COPY, work.all_weight_bytes / work.copy_over)
    yield _part("optimizer", _optimizer_bytes(work), place=optimizer_place)
    yield _part("gradients", _gradient_bytes(work), _gradient_moments(work), gradients_place)
    yield _part("update", _update_bytes(work), ("update",), gradients_place)
    yield _part("weights of the base", _held_bytes(work), place=optimizer_place)
    yield _part("importance of weights", _importance_bytes(work), place=optimizer_place)
    yield _part("penalty", _penalty_bytes(work), ("update",), gradients_place)
    yield _part("average of the weights", _average_bytes(work) / work.share(1), place=optimizer_place)
    yield _part("importance of ranks", AVERAGES_BYTES * work.trained.num_followed)
    yield _part("whole gradients and values", _followed_bytes(work), ("update",))


def _place(offload: Offload, work: Workload) -> Place:
    """Where that lies which is offloaded so."""
    places: dict[Offload, Place] = {"none": "device", "cpu": "host" if work.is_on_gpu else "device", "nvme": "nvme"}
    return places[offload]


def _pass_parts(work: Workload) -> Iterator[MemoryPart]:
    """What forward and backward passes take, and give back."""
    until_last: tuple[Moment, ...] = ("forward", "loss", "last layer")
    in_layers: tuple[Moment, ...] = ("last layer", "first layer")
    casts_at: tuple[Moment, ...] = ("forward",) if work.has_checkpointing else until_last
    layer_at: tuple[Moment, ...] = in_layers if work.has_checkpointing else PASSES
    experts_at: tuple[Moment, ...] = ("forward", *in_layers) if work.has_checkpointing else ("forward",)
    head_gradient_at: tuple[Moment, ...] = ("last layer",) if work.chunk_tokens is None else until_last
    yield _part("weights in compute precision", _autocast_bytes(work), casts_at)
    yield _part("weights of a layer in compute precision", _layer_autocast_bytes(work), in_layers)
    yield _part("activations", kept_bytes(work), until_last)
    if work.num_reached:
        in_layer = in_layer_bytes(work)
        yield _part("activations around the layers", around_bytes(work), ("forward", "loss"))
        yield _part("activations of a layer", layer_activation_bytes(work), layer_at)
        yield _part("gradients of activations", in_layer, in_layers)
        # With checkpointing no layer has been computed again by then.
        last_norm = 0 if work.has_checkpointing else max(0, last_norm_bytes(work) - in_layer)
        yield _part("gradients of the last norm", last_norm, ("last layer",))
    else:
        yield _part("activations around the layers", around_bytes(work), until_last)
        yield _part("activations of a layer", max(0, passing_bytes(work, work.shape) - _loss_bytes(work)), ("forward",))
    yield _part("a weight out of 4 or 8 bits", dequantized_bytes(work), in_layers)
    yield _part("experts out of 4 bits", expanded_expert_bytes(work), experts_at)
    yield _part("logits and loss", _loss_bytes(work), LOSS_MOMENTS)
    yield _part("gradient of the logits", _logit_gradient_bytes(work), ("loss",))
    yield _part("gradient of the head", _head_gradient_bytes(work), head_gradient_at)


def _teacher_parts(work: Workload) -> Iterator[MemoryPart]:
    """A teacher's weights, its forward pass, and what is kept of that until the loss is there."""
    shape = work.teacher
    if shape is None:
        return
    width = BYTES[work.precision]
    until_loss: tuple[Moment, ...] = ("teacher", "forward", "loss")
    is_divided = work.zero_stage == 3 and work.workers > 1
    if work.teacher_is_beside:
        yield _part(
            "weights of the teacher", teacher_weight_bytes(work) / work.share(3), place=_place(work.offload_parameters, work)
        )
    at_a_time = _gathered_at_a_time(teacher_weight_bytes(work), work) if is_divided else 0
    yield _part("gathered weights of the teacher", at_a_time, ("teacher",))
    dequantized = 0 if work.teacher_is_beside else max(dequantized_bytes(work), expanded_expert_bytes(work))
    yield _part("activations of the teacher", passing_bytes(work, shape) + dequantized, ("teacher",))
    # Stage 3 gives the ranks their shares of a head again when its pass is over; what the loss computes with is kept whole.
    yield _part("head of the teacher", is_divided * width * shape.head.inputs * shape.head.outputs, until_loss)
    yield _part("hidden states of the teacher", work.num_targets * shape.hidden * width, until_loss)
    yield _part("logits of the teacher", _teacher_logit_bytes(work, shape), ("forward",))


def teacher_weight_bytes(work: Workload) -> float:
    """All weights that a teacher's forward pass reads."""
    assert work.teacher is not None
    return BYTES[work.precision] * work.teacher.num_parameters if work.teacher_is_beside else work.all_weight_bytes


def _teacher_logit_bytes(work: Workload, shape: ModelShape) -> float:
    """Per logit that both have: softened log-probabilities of both models and the teacher's probabilities, in fp32, and a byte
    that says where these are 0; beside the logits of the model. Less what `_loss_bytes` counts."""
    return _targets_at_once(work) * _teacher_bytes_per_target(work, shape)


def _teacher_bytes_per_target(work: Workload, shape: ModelShape) -> int:
    return min(shape.vocab, work.shape.vocab) * (9 if work.precision == "fp32" else 5)


def _engine_parts(work: Workload) -> Iterator[MemoryPart]:
    """What collectives and libraries hold."""
    buckets = _bucket_bytes(work)
    if work.engine == "plain":
        # Sent while the last backward pass goes on, and after it: one that takes all is full when that is over.
        is_one = work.trained.num_trainable <= work.buckets.reduce_elements
        yield _part("buckets of gradients", buckets, ("update",) if is_one else ("first layer", "update"))
        beneath: tuple[Moment, ...] = ("teacher",) if work.teacher and not work.teacher_is_beside else ()
        yield _part("gathered weights", _gathered_layer_bytes(work), (*beneath, "forward", "last layer", "first layer"))
    elif work.zero_stage == 3:
        yield _part("buckets of gradients", buckets)
        yield _part("gathered weights", _gathered_bytes(work), PASSES)
    else:
        # Stage 1 leaves sums over micro-batches in it.
        keeps_sums = work.zero_stage == 1 and work.accumulation > 1
        yield _part("buckets of gradients", buckets, (*PASSES, "teacher") if keeps_sums else ("last layer", "first layer"))
    if work.streamed_tokens:
        streamed = STREAM_BYTES + STREAMED_TOKEN_BYTES * work.streamed_tokens + work.streamed_ahead_bytes
        yield _part("streamed rows", streamed, place=_place("cpu", work))
    yield _part(CUDA_CONTEXT, GPU_CONTEXT_BYTES) if work.is_on_gpu else _part(CPU_PROCESS, CPU_PROCESS_BYTES)


def _part(name: str, size: float, moments: tuple[Moment, ...] = MOMENTS, place: Place = "device") -> MemoryPart:
    return MemoryPart(name=name, num_bytes=round(size), place=place, moments=moments)


def fullest_moment(parts: list[MemoryPart], place: Place) -> Moment:
    """When the parts in one place take most bytes."""
    return max(MOMENTS, key=lambda moment: sum(part.num_bytes for part in parts_at(parts, place, moment)))


def parts_at(parts: list[MemoryPart], place: Place, moment: Moment) -> list[MemoryPart]:
    """The parts that lie in one place at one moment."""
    return [part for part in parts if part.place == place and moment in part.moments]


def bytes_in(parts: list[MemoryPart], place: Place) -> int:
    """Bytes in one place at its fullest moment."""
    return sum(part.num_bytes for part in parts_at(parts, place, fullest_moment(parts, place)))


def tensor_bytes(parts: list[MemoryPart]) -> int:
    """Bytes of the device that PyTorch's allocator shows at the fullest moment: all but what the process itself takes."""
    return bytes_in([part for part in parts if part.name not in (CUDA_CONTEXT, CPU_PROCESS)], "device")


def checkpoint_bytes(work: Workload) -> int:
    """Bytes of one checkpoint over all ranks: what is trained and its optimizer's state, never a frozen base."""
    shared, once = _saved_bytes(work)
    return round(shared + once)


def saved_by_ranks(work: Workload) -> tuple[int, int]:
    """Bytes of a checkpoint that rank 0 saves, and that each of the others does."""
    shared, once = _saved_bytes(work)
    if work.engine == "plain":
        return round(shared + once), 0
    return round(shared / work.workers + once), round(shared / work.workers)


def _saved_bytes(work: Workload) -> tuple[float, float]:
    """Of one checkpoint: what DeepSpeed's ranks share, and what rank 0 saves in any case.

    PlainEngine.save writes fp32 weights and the state once, from rank 0. DeepSpeed (ZeroEngine.save) writes fp32 masters and the
    state, a shard per rank, and below stage 3, where weights are whole, the weights of the run's precision once as well; a tied
    head among them even if it is frozen, because DeepSpeed leaves out frozen parameters by their first name only.
    """
    trained = work.trained.num_trainable
    num_whole = 0
    if work.zero_stage in (1, 2):
        trains_tied = work.trained.is_base and work.shape.embeddings[0].name in work.trained.whole
        keeps_head = work.shape.is_tied and not trains_tied
        num_whole = trained + (work.shape.head.num_parameters if keeps_head else 0)
    averages = AVERAGES_BYTES * work.trained.num_followed  # from rank 0
    return 4 * trained + _state_bytes(work) + _average_bytes(work), BYTES[work.precision] * num_whole + averages


def _weight_bytes(work: Workload) -> float:
    """Rajbhandari et al. 2020 (ZeRO), section 3: 2 bytes per parameter in 16 bits, 4 in fp32; stage 3 divides them by the ranks,
    but for small parameters. Without ZeRO, ranks may divide the layers of a frozen base."""
    constants = constant_bytes(work.quantization, work.shape, work.trained) if work.quantization else 0
    constants += BYTES[work.weight_dtype] * work.trained.num_constants
    whole = BYTES[work.precision] * num_persistent(work.shape, work.trained, work.buckets)
    spared = work.sharded_layer_bytes * (1 - 1 / work.workers)
    return work.all_weight_bytes / work.share(3) + whole * (1 - 1 / work.share(3)) - spared + constants


def _autocast_bytes(work: Workload) -> float:
    """torch.autocast casts a trained fp32 weight once per forward pass; the copy lives until its backward pass (torch.amp).

    It knows linear layers, and not the grouped products of experts. A frozen fp32 weight is cast wherever it is used, for as long
    as a backward pass has to come back through it.
    """
    trained, shape = work.trained, work.shape
    if work.engine != "plain" or work.precision == "fp32":
        return 0
    num_cast = trained.num_trainable - trained.num_in_experts
    if trained.is_base:
        names = trained.whole
        not_cast = [one for one in shape.modules() if one.name in names and one.kind in ("experts", "embedding")]
        num_cast -= sum(one.num_parameters for one in not_cast if one.kind == "experts" or not shape.is_tied)
        if not work.has_checkpointing:
            num_cast += _num_frozen_products(trained, shape)
    return BYTES[work.precision] * num_cast


def _layer_autocast_bytes(work: Workload) -> float:
    """With checkpointing, those casts are made again for the layer that a backward pass is in, of its frozen weights too."""
    if not work.has_checkpointing or not _autocast_bytes(work):
        return 0
    if not work.trained.is_base:
        return _autocast_bytes(work) / max(1, work.num_reached)
    linear = (sum(module.num_parameters for module in layer if module.is_linear) for layer in work.shape.layers())
    return BYTES[work.precision] * max(linear)


@lru_cache(maxsize=4)
def _num_frozen_products(trained: Trained, shape: ModelShape) -> int:
    """Weights of linear layers of a trained base that are frozen and that gradients pass through."""
    frozen = (module for module in shape.modules() if module.is_linear and module.name not in trained.whole)
    layers = ((one.num_parameters, layer_of(one.name, shape)) for one in frozen)
    return sum(size for size, layer in layers if layer is None or layer >= trained.lowest_layer)


def _gradient_bytes(work: Workload) -> float:
    """ZeRO, section 3: as wide as the trained weights; stage 2 divides by the ranks.

    zero_engine sums bf16 gradients over micro-batches in fp32, except at stage 1.
    """
    width = 4 if _sums_in_fp32(work) else BYTES[work.trained_dtype]
    return work.trained.num_trainable * width / work.share(2)


def _gradient_moments(work: Workload) -> tuple[Moment, ...]:
    """Sums over micro-batches are there from the second one's beginning, stage 3's buffer always."""
    if work.accumulation > 1 or work.zero_stage == 3:
        return MOMENTS
    if work.engine == "zero" and work.trained.num_trainable <= work.buckets.reduce_elements:
        return ("update",)  # until then one bucket has them all
    return ("first layer", "update")


def _sums_in_fp32(work: Workload) -> bool:
    return work.precision == "bf16" and work.accumulation > 1 and work.zero_stage != 1


def _head_gradient_bytes(work: Workload) -> float:
    """The first gradient of all, before a bucket takes it. The chunked loss sums it in fp32."""
    head = work.shape.head
    if head.name not in work.trained.whole:
        return 0
    return head.num_parameters * (BYTES[work.trained_dtype] if work.chunk_tokens is None else 4)


def _update_bytes(work: Workload) -> float:
    """DeepSpeed lays the gradients of its own shard end to end and copies them to fp32, at stage 3 a sub-group at a time.

    Below stage 3, sums in fp32 are laid out already, and are copied once. Plain optimizers update in place, but for
    schedulefree's, which holds what it divides the gradients by.
    """
    if work.engine == "plain":
        return 4 * work.trained.num_trainable if work.optimizer in SCHEDULE_FREE else 0
    own_shard = work.trained.num_trainable / work.share(1)
    num_updated = min(own_shard, ZERO_SUB_GROUP_ELEMENTS) if work.zero_stage == 3 else own_shard
    is_16_bit = work.precision != "fp32" and (work.zero_stage == 3 or not _sums_in_fp32(work))
    return num_updated * (4 + is_16_bit * BYTES[work.precision])


def _held_bytes(work: Workload) -> float:
    """What a penalty holds weights to, beside and divided as what is updated, in the dtype that they come in."""
    return work.holds_weights * BYTES[work.trained_dtype] * work.trained.num_trainable / work.share(1)


def _importance_bytes(work: Workload) -> float:
    """A number in fp32 for each that is updated, divided as these are. To estimate them takes less than a step does."""
    return work.weighs_importance * 4 * work.trained.num_trainable / work.share(1)


def _penalty_bytes(work: Workload) -> float:
    """The way of one weight after the other, or of a rank's part of it, from the base. DeepSpeed takes more for its update
    afterwards, but of gradients in fp32, as they are by then, it makes no copy in 16 bits, and has them beside its own."""
    if not work.holds_weights:
        return 0
    largest, own_shard = max(part.num_parameters for part in work.trained.parts), work.trained.num_trainable / work.share(1)
    moved = 4 * (largest / work.share(3) if work.zero_stage == 3 else min(largest, own_shard))
    if work.engine == "plain":
        return moved  # gloo may not have let go of the last bucket yet
    updated, is_widened = _update_bytes(work), work.precision != "fp32" and not _sums_in_fp32(work)
    num_updated = updated / (4 + BYTES[work.precision]) if is_widened else 0
    return max(0, is_widened * 4 * own_shard + max(moved, 4 * num_updated) - updated)


def _average_bytes(work: Workload) -> float:
    """In fp32 as what is updated, over all ranks, which divide it as they divide that."""
    return 4 * work.trained.num_trainable if work.averages_every else 0


def _followed_bytes(work: Workload) -> float:
    """What a method reads of what it follows, which PlainEngine has whole anyway: gradients before, during and after an update;
    values before and after it, when what the update takes is gone."""
    if work.engine == "plain":
        return 0
    whole = 4 * work.trained.num_followed
    return whole + max(0, whole - _update_bytes(work)) if whole else 0


def _optimizer_bytes(work: Workload) -> float:
    """ZeRO, section 3: 8 bytes of Adam moments, 4 of DeepSpeed's fp32 master (beside fp32 weights too); stage 1 divides both."""
    master = 4 * work.trained.num_trainable if work.engine == "zero" else 0
    return (_state_bytes(work) + master) / work.share(1)


def _state_bytes(work: Workload) -> float:
    """Optimizer state over all ranks."""
    if work.optimizer == "adafactor":
        # A number per row and per column of a matrix instead of one per entry (Shazeer and Stern 2018).
        return 4 * work.trained.num_sides
    # training.optimizer leaves embeddings at 32 bits (Dettmers et al. 2022, section 2.3).
    num_exact = work.trained.num_whole_embeddings if work.optimizer in EIGHT_BIT else 0
    if work.optimizer in ORTHOGONAL:
        num_exact = work.trained.num_trainable - work.trained.num_in_matrices
    return (work.trained.num_trainable - num_exact) * STATE_BYTES[work.optimizer] + num_exact * STATE_BYTES["adamw"]


def _loss_bytes(work: Workload) -> float:
    """Of the targets that are projected at once; the chunked loss has the hidden states' gradient beside them."""
    hidden_gradient = 0 if work.chunk_tokens is None else work.num_targets * work.shape.hidden * 4
    return _targets_at_once(work) * _loss_bytes_per_target(work) + hidden_gradient


def _targets_at_once(work: Workload) -> int:
    return work.num_targets if work.chunk_tokens is None else min(work.num_targets, work.chunk_tokens)


def _loss_bytes_per_target(work: Workload) -> float:
    """Logits as the head gives them, in fp32, and their softmax."""
    is_16_bit = work.precision != "fp32"
    per_logit = 8 + is_16_bit * BYTES[work.precision]
    if work.objective_bytes is not None:
        per_logit = BYTES[work.precision] + is_16_bit * 4 + work.objective_bytes
    return work.shape.vocab * per_logit


def bytes_per_target(work: Workload) -> float:
    """Of each target that is projected at once, a teacher's with it."""
    taught = _teacher_bytes_per_target(work, work.teacher) if work.teacher else 0
    return _loss_bytes_per_target(work) + taught


def _logit_gradient_bytes(work: Workload) -> float:
    """The softmax, its gradient and that of the logits are in fp32 together; the chunked loss computes them in place."""
    if work.chunk_tokens is not None:
        return 0
    if work.objective_bytes is not None:  # counted with the loss
        return work.num_targets * work.shape.vocab * BYTES[work.precision] if work.precision != "fp32" else 0
    return work.num_targets * work.shape.vocab * 12 - _loss_bytes(work)


def _bucket_bytes(work: Workload) -> float:
    """Gradients on their way to other ranks."""
    in_bucket = min(work.buckets.reduce_elements, work.trained.num_trainable)
    if work.engine == "plain":
        return min(2 * 4 * in_bucket, 4 * work.trained.num_trainable) if work.workers > 1 else 0
    # One bucket fills while another travels (overlap_comm, on GPUs from stage 2).
    num_buckets = 2 if work.is_on_gpu and work.zero_stage >= 2 else 1
    return num_buckets * BYTES[work.precision] * in_bucket


def _gathered_bytes(work: Workload) -> float:
    """Weights that stage 3 has whole at a time, and a flat buffer in which those of one gather arrive.

    Alone, a rank has them whole anyway.
    """
    return 0 if work.workers == 1 else _gathered_at_a_time(work.all_weight_bytes, work)


def _gathered_layer_bytes(work: Workload) -> float:
    """Of a base whose layers are divided without ZeRO: the layer that computes, and the next, which is on its way, and which gloo
    gathers in a buffer of its own."""
    num_layers = 2 if work.is_on_gpu else 3
    return num_layers * work.largest_sharded_layer_bytes


def _gathered_at_a_time(num_bytes: float, work: Workload) -> float:
    """Of the weights of one model."""
    width = BYTES[work.precision]
    return min(num_bytes, ZERO_LIVE_ELEMENTS * width) + min(num_bytes, work.buckets.prefetch_elements * width)
