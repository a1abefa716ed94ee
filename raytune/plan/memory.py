"""Bytes of a run, per rank, part by part and moment by moment, and of its checkpoints. Every formula names its source.

Activations, logits and gradients are never all there at once, so a worker needs the bytes of the fullest moment of a step, not of
all parts; a test holds that against the allocator. Not in here: fragmentation and what kernels take for a moment, for which
`machine.USABLE_SHARE` leaves room. Longer than most files, because all formulas share one set of bytes per number and are read
against each other: a part is given back where the next one is made.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from raytune.config.model import Attention, Quantization
from raytune.config.training import Offload, Optimizer, Precision
from raytune.plan.kept_by_weights import kept_by_weights
from raytune.plan.quantization import constant_bytes, num_quantised, packed_bytes
from raytune.plan.run_plan import MOMENTS, MemoryPart, Moment, Place, ZeroStage
from raytune.plan.shapes import ModelShape, Module
from raytune.plan.trained import Trained, layer_of
from raytune.units import GIB, MIB

BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
STATE_BYTES: dict[Optimizer, float] = {
    "adamw": 8,
    "paged_adamw": 8,
    # Two moments of a byte, and an fp32 scale per 256 of them (Dettmers et al. 2022, 8-bit Optimizers).
    "adamw_8bit": 2 + 2 * 4 / 256,
    "paged_adamw_8bit": 2 + 2 * 4 / 256,
    "lion": 4,
    # Of matrices of hidden layers, which have a momentum only; all else is AdamW's.
    "muon": 4,
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
CUDA_CONTEXT, CPU_PROCESS = "CUDA context and libraries", "process and libraries"
PLAIN_BUCKET_BYTES = 64 * MIB
"""Gradients that PlainEngine sums over the ranks at once: large enough for bandwidth, small beside the gradients."""
ZERO_BUCKET_ELEMENTS = 200_000_000
"""Gradients that DeepSpeed reduces, or weights that it gathers, by one collective, as we ask it."""
ZERO_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters, and of the distance within which gathered weights are kept for reuse."""
ZERO_PREFETCH_ELEMENTS = 50_000_000
"""Weights that stage 3 gathers at once, as we ask it (stage3_prefetch_bucket_size)."""
ZERO_SUB_GROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's default of sub_group_size: parameters that stage 3 updates at once."""

KEPT_STEPS = {"relu": 1, "silu": 2, "swish": 2, "gelu": 2, "gelu_pytorch_tanh": 2, "relu2": 2}
"""Tensors that autograd keeps of an activation in few kernels: of relu the output, of one kernel else its input and, for what
comes next, its output."""
MOST_STEPS = 5
"""Of one in elementary steps, such as GPT-2's gelu_new."""

STATE_STEPS = 8
"""Numbers kept for each that a layer with a state computes around it: projected, convolved, gated, scanned. An estimate for
transformers' elementary steps, within a factor of 5 for tiny models (test_hybrids.py); kernels keep less."""

PASSES: tuple[Moment, ...] = ("forward", "loss", "last layer", "first layer")

CHUNK_BYTES = 64 * MIB
FULL_LOGITS_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """All that decides the bytes of a rank."""

    shape: ModelShape
    trained: Trained
    quantization: Quantization | None = None
    """How a frozen base is held; None: as it is."""
    engine: str
    """"plain" or "zero"."""
    zero_stage: ZeroStage
    workers: int
    offload_optimizer: Offload
    offload_parameters: Offload
    precision: Precision
    optimizer: Optimizer
    attention: Attention
    has_checkpointing: bool
    accumulation: int
    num_tokens: int
    """Tokens of a micro-batch, with virtual ones that pass through the layers."""
    num_targets: int
    """Target tokens of a micro-batch, at most."""
    chunk_tokens: int | None
    is_on_gpu: bool
    drops: frozenset[str] = frozenset()
    """Kinds of `model.dropout` that the config asks for."""
    num_virtual_keys: int = 0
    """Virtual tokens of a micro-batch that only keys and values have."""
    sequence_parallel: int = 1
    """Workers that share each row, each with the tokens above."""
    holds_weights: bool = False
    """Whether a penalty holds what is trained near the base (training.penalty)."""
    weighs_importance: bool = False
    """Whether it does so by the importance of each weight."""
    teacher: ModelShape | None = None
    """Whom the model learns from (training.teacher)."""
    teacher_is_beside: bool = False
    """Whether that is a model of its own, and not the base beneath what is trained."""
    averages_every: int | None = None
    """Steps between two of which the trained weights are averaged (training.averaging); None: they are not."""
    objective_bytes: float | None = None
    """Per logit, of a loss of the user's and its gradient beside logits in fp32; None: cross-entropy."""

    @property
    def weight_dtype(self) -> Precision:
        """Of weights as they are loaded (`ModelPlan.dtype`)."""
        return "fp32" if self.trained.is_base and self.engine == "plain" else self.precision

    @property
    def trained_dtype(self) -> Precision:
        """Of trained weights: PlainEngine keeps them in fp32, DeepSpeed has fp32 masters beside them."""
        return "fp32" if self.engine == "plain" else self.precision

    @property
    def all_weight_bytes(self) -> float:
        """Weights that ZeRO-3 would share out, each counted once."""
        dtype, trained = BYTES[self.weight_dtype], BYTES[self.trained_dtype] * self.trained.num_trainable
        if self.trained.is_base:
            return dtype * self.shape.num_parameters
        if self.quantization is None:
            return dtype * self.shape.num_parameters + trained
        whole = self.shape.num_parameters - num_quantised(self.shape, self.trained)
        return packed_bytes(self.quantization, self.shape, self.trained) + dtype * whole + trained

    @property
    def num_reached(self) -> int:
        """Layers that a backward pass runs through."""
        return self.shape.num_layers - self.trained.lowest_layer

    def share(self, from_stage: int) -> int:
        """Ranks that divide what ZeRO shards from this stage on."""
        return self.workers if self.zero_stage >= from_stage else 1


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
    yield _part("activations", _kept_bytes(work), until_last)
    if work.num_reached:
        yield _part("activations of a layer", layer_activation_bytes(work), layer_at)
        yield _part("gradients of activations", _activation_gradient_bytes(work), in_layers)
    else:
        yield _part("activations of a layer", max(0, passing_bytes(work, work.shape) - _loss_bytes(work)), ("forward",))
    yield _part("a weight out of 4 or 8 bits", _dequantized_bytes(work), in_layers)
    yield _part("experts out of 4 bits", _expanded_expert_bytes(work), experts_at)
    yield _part("logits and loss", _loss_bytes(work), ("forward", "loss"))
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
    dequantized = 0 if work.teacher_is_beside else max(_dequantized_bytes(work), _expanded_expert_bytes(work))
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
    chunk = work.num_targets if work.chunk_tokens is None else min(work.num_targets, work.chunk_tokens)
    return chunk * min(shape.vocab, work.shape.vocab) * (9 if work.precision == "fp32" else 5)


def _engine_parts(work: Workload) -> Iterator[MemoryPart]:
    """What collectives and libraries hold."""
    buckets = _bucket_bytes(work)
    if work.engine == "plain":
        yield _part("buckets of gradients", buckets, ("update",))
    elif work.zero_stage == 3:
        yield _part("buckets of gradients", buckets)
        yield _part("gathered weights", _gathered_bytes(work), PASSES)
    else:
        # Stage 1 leaves sums over micro-batches in it.
        keeps_sums = work.zero_stage == 1 and work.accumulation > 1
        yield _part("buckets of gradients", buckets, (*PASSES, "teacher") if keeps_sums else ("last layer", "first layer"))
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
    """Bytes of one checkpoint over all ranks: what is trained and its optimizer's state, never a frozen base.

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
    return round(4 * trained + _state_bytes(work) + BYTES[work.precision] * num_whole + averages + _average_bytes(work))


def chunk_tokens_for(vocab: int) -> int:
    """Target positions whose fp32 logits take between 32 and 64 MiB: a power of two.

    Larger chunks cost memory and save no time (tests/bench/loss.py).
    """
    return 1 << max(0, (CHUNK_BYTES // (4 * vocab)).bit_length() - 1)


def exceeds_full_logits(num_targets: int, vocab: int) -> bool:
    """Whether the fp32 logits of all targets are more than is worth holding (256 MiB)."""
    return 4 * num_targets * vocab > FULL_LOGITS_BYTES


def _weight_bytes(work: Workload) -> float:
    """Rajbhandari et al. 2020 (ZeRO), section 3: 2 bytes per parameter in 16 bits, 4 in fp32; stage 3 divides by the ranks."""
    constants = constant_bytes(work.quantization, work.shape, work.trained) if work.quantization else 0
    constants += BYTES[work.weight_dtype] * work.trained.num_constants
    return work.all_weight_bytes / work.share(3) + constants


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
    if work.engine == "zero" and work.trained.num_trainable <= ZERO_BUCKET_ELEMENTS:
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

    Below stage 3, sums in fp32 are laid out already, and are copied once.
    """
    if work.engine == "plain":
        return 0
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


def _kept_bytes(work: Workload) -> float:
    """What autograd keeps for the backward pass, beside the layer that this pass is in.

    With checkpointing only the input of each layer is kept, and one layer at a time whole. Around the layers it keeps what the
    embedding gives, and what the last norm computes in fp32 and gives.
    """
    shape, width = work.shape, BYTES[work.weight_dtype]
    if not work.num_reached:
        return work.num_tokens * shape.hidden * (4 + width)
    around = work.num_tokens * shape.hidden * (4 + 2 * width)
    if work.has_checkpointing:
        return around + work.num_reached * work.num_tokens * shape.hidden * width
    return around + max(0, work.num_reached - 1) * layer_activation_bytes(work)


def passing_bytes(work: Workload, shape: ModelShape) -> float:
    """What a layer without a backward pass holds while it computes: branches of the MLP and their product, beside the stream."""
    return work.num_tokens * BYTES[work.weight_dtype] * ((2 + shape.has_gate) * shape.intermediate + 3 * shape.hidden)


def _activation_gradient_bytes(work: Workload) -> float:
    """Gradients of the branches of an MLP, and of the stream in fp32, of which a norm's backward pass holds three.

    The gradient of an update of fused experts comes out of that of all their weights, that of a product out of that of the whole
    update. Where factors or rotations in fp32 multiply, the gradient of what they give is in fp32 as well.
    """
    of_updates = BYTES[work.weight_dtype] * work.trained.largest_updated
    of_updates += BYTES[work.precision] * work.trained.largest_made
    if work.trained_dtype != work.precision:
        of_updates += BYTES[work.trained_dtype] * work.num_tokens * work.trained.widest_scaled
    return work.num_tokens * (3 * work.shape.intermediate * BYTES[work.precision] + 3 * work.shape.hidden * 4) + of_updates


def layer_activation_bytes(work: Workload) -> float:
    """One layer: norms, inputs of linear layers, queries, keys, values and output of attention, branches of the MLP.

    Counted on transformers' own layers, as Korthikanti et al. 2022 (Reducing Activation Recomputation) count Megatron's; a test
    holds it against what autograd saves. What is kept once per model (tables of rotary embeddings) counts by its share.
    """
    shape, width = work.shape, BYTES[work.precision]
    trains_base, num_layers = work.trained.is_base, max(1, work.num_reached)
    kept = kept_by_weights(work.trained, shape, work.zero_stage == 3)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shares_rows = work.sequence_parallel > 1
    # A norm computes in fp32 and keeps its input so; to train its weight it keeps the normalised values as well.
    per_head = {"self_attn.q_norm": queries, "self_attn.k_norm": keys}
    width_of_normalised = 4 if shape.scales_norms_in_fp32 else BYTES[work.weight_dtype]
    normalised = sum(
        per_head.get(module.name, module.outputs)
        * (4 + width_of_normalised * (kept.norms if trains_base else _share_trained(module, work)))
        for module in shape.layer
        if module.kind == "norm"
    )
    # The first norm is in front of everything that is trained, unless embeddings are, or those of virtual tokens.
    is_below = work.trained.lengthens_rows or (trains_base and work.trained.num_whole_embeddings)
    normalised -= 0 if is_below else 4 * shape.hidden / num_layers
    rows_of_norms = {"self_attn.q_norm": shape.heads, "self_attn.k_norm": shape.kv_heads}
    normalised += 4 * sum(rows_of_norms.get(module.name, 1) for module in shape.layer if module.kind == "norm")
    keeps_inputs = _keeps_inputs(work)
    keeps_products = keeps_inputs or (work.trained.scaled_inputs > 0 and work.trained_dtype == work.precision)
    # Queries, keys and values that come from one matrix are slices which keep the whole of its output alive.
    is_fused = any(module.name.endswith("qkv_proj") for module in shape.layer)
    # Where there are more ranks than heads of keys and values, each head lies on several.
    read = keys * max(1.0, work.sequence_parallel / shape.kv_heads)
    attention = width * (2 * queries + 2 * read + is_fused * (not shares_rows) * (queries + 2 * keys))
    if work.attention != "eager":
        attention += 4 * shape.heads  # the logarithm of the sum that scores were divided by
    if ((work.attention == "varlen" and not work.is_on_gpu) or shares_rows) and keeps_inputs:
        attention += width * queries  # outputs document by document, or of own heads, and end to end
    has_rotary = len(shape.embeddings) == 1
    attention += 2 * shape.head_dim * BYTES[work.weight_dtype] / num_layers if has_rotary else 0
    attention = max(attention, STATE_STEPS * width * shape.state_width)
    # An activation's steps, the last of which enters the way back; with a gate, the other branch and the product.
    num_steps = KEPT_STEPS.get(shape.activation, MOST_STEPS) + (2 if shape.has_gate else 0)
    num_steps -= 0 if kept.ways_back is None else 1 - kept.ways_back
    branches = width * (shape.intermediate - shape.expert_width) * (num_steps - (not keeps_products))
    per_token = normalised + attention + branches + _linear_input_bytes(work) + _expert_bytes(work, num_steps)
    made = BYTES[work.precision] * work.trained.num_made / num_layers
    kept = work.num_tokens * per_token + _virtual_key_bytes(work)
    return kept + _score_bytes(work) + _mask_bytes(work) + _updated_expert_bytes(work) + made


def _virtual_key_bytes(work: Workload) -> float:
    """Keys and values of virtual tokens; with one call per document queries for them too, and what attention gives these."""
    shape = work.shape
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    per_document = work.attention == "varlen" and not work.is_on_gpu
    numbers = 2 * keys + (2 * queries if per_document else 0)
    return work.num_virtual_keys * (BYTES[work.precision] * numbers + (4 * shape.heads if per_document else 0))


def _keeps_inputs(work: Workload) -> bool:
    """Whether the inputs of linear layers are kept as they are: by layers that are trained or whose update computes with them,
    unless that is in another dtype and keeps casts of them; by every layer at stage 3, whose linear function keeps its own."""
    reads = work.trained.reads_inputs and not _casts_inputs(work)
    return work.trained.is_base or work.zero_stage == 3 or reads


def _casts_inputs(work: Workload) -> bool:
    """Whether updates compute with inputs in another dtype than the layers do."""
    return not work.trained.is_base and work.trained.casts_inputs and work.trained_dtype != work.precision


def _share_trained(norm: Module, work: Workload) -> float:
    """The share of layers in which an adapter trains a norm, of those that a backward pass reaches."""
    return work.trained.whole_norms[f"{work.shape.layers_name}.{norm.name}"] / max(1, work.num_reached)


def _expert_bytes(work: Workload, num_steps: float) -> float:
    """Experts, per token: autocast leaves their products as they are, and only trained ones keep what enters each product."""
    trains_experts = work.trained.is_base or work.trained.num_updated_per_layer > 0
    gathered = sum(module.copies_per_token * module.inputs for module in work.shape.layer if module.kind == "experts")
    numbers = work.shape.expert_width * (num_steps - (not trains_experts)) + gathered * (1 + trains_experts)
    return BYTES[work.weight_dtype] * numbers


def _updated_expert_bytes(work: Workload) -> float:
    """What PEFT computes of fused experts that get an update: W + B A as a whole, which their products keep.

    The update itself is cast to the weights' dtype if it has another.
    """
    casts = work.trained.num_in_experts / max(1, work.num_reached) if work.trained_dtype != work.weight_dtype else 0
    return BYTES[work.weight_dtype] * (work.trained.num_updated_per_layer + casts)


def _linear_input_bytes(work: Workload) -> float:
    """Inputs of linear layers that no other part keeps, per token.

    Layers that read the same values share them, except where each casts them anew: autocast from an fp32 stream, and PEFT for
    each target in another dtype, which also keeps the update's inner activations and, with dropout, what was dropped. Frozen
    layers that only get factors keep no inputs, but what is multiplied.
    """
    shape, width = work.shape, BYTES[work.precision]
    shared = 2 * shape.hidden * width
    trained = work.trained
    num_layers = max(1, work.num_reached)
    if trained.is_base:
        kept = kept_by_weights(trained, shape, work.zero_stage == 3)
        return (kept.readers if work.weight_dtype != work.precision else kept.streams) * shape.hidden * width
    inner_width = trained.inner_width + (trained.width_in_16_bits if work.precision != "fp32" else 0)
    inner = inner_width * width / num_layers
    casts = _casts_inputs(work)
    # What layers are given in place of their inputs, which stage 3 has them keep too.
    inner += trained.changed_inputs * width / num_layers if work.zero_stage == 3 else 0
    if not trained.reads_inputs:
        scaled = trained.scaled_inputs * BYTES[work.trained_dtype] / num_layers if casts else 0
        return inner + scaled + (shared if work.zero_stage == 3 else 0)
    cast = trained.target_inputs * width / num_layers
    return inner + (cast if casts or trained.drops_inputs else shared) + (cast if trained.drops_inputs else 0)


def _score_bytes(work: Workload) -> float:
    """`sdpa` holds a mask over the packed row, `eager` scores and probabilities of every head too; the others hold neither."""
    pairs = work.num_tokens * (work.num_tokens + work.num_virtual_keys)
    if work.attention == "eager":
        return pairs * work.shape.heads * 3 * BYTES[work.precision]
    return pairs / work.shape.num_layers if work.attention == "sdpa" else 0


def _mask_bytes(work: Workload) -> float:
    """What dropout keeps of a layer: a mask of what attention and MLP add to the stream, in a byte each where one kernel drops,
    else as wide as they are. Of attention's probabilities, `eager` keeps the mask and what was dropped, and `sdpa` on a CPU its
    steps in fp32; kernels of GPUs draw the mask again. Not in here: `varlen` on a CPU, whose documents' lengths are not known.
    """
    width, pairs = BYTES[work.precision], work.num_tokens**2 * work.shape.heads
    of_mask = 1 if work.is_on_gpu else width
    kept = 2 * work.num_tokens * work.shape.hidden * of_mask if "hidden" in work.drops else 0
    if "attention" in work.drops:
        on_cpu = 12 * pairs if work.attention == "sdpa" and not work.is_on_gpu else 0
        kept += pairs * (of_mask + width) if work.attention == "eager" else on_cpu
    return kept


def _dequantized_bytes(work: Workload) -> float:
    """bitsandbytes multiplies by a weight in the run's precision, which it makes anew in each pass.

    So does model.packed_experts with the experts of a layer, one parameter after the other on the way back.
    """
    if work.quantization is None:
        return 0
    linear = (module.num_parameters for layer in work.shape.layers() for module in layer if module.is_linear)
    return BYTES[work.precision] * max(*linear, 0 if work.has_checkpointing else work.trained.largest_packed)


def _expanded_expert_bytes(work: Workload) -> float:
    """All parameters of a layer's experts at once: while they compute, and what autograd keeps of them in a recomputation."""
    return BYTES[work.weight_dtype] * work.trained.num_packed_per_layer


def _loss_bytes(work: Workload) -> float:
    """Logits as the head gives them, in fp32, and their softmax. The chunked loss has the hidden states' gradient beside them."""
    is_16_bit = work.precision != "fp32"
    per_logit = 8 + is_16_bit * BYTES[work.precision]
    if work.objective_bytes is not None:
        per_logit = BYTES[work.precision] + is_16_bit * 4 + work.objective_bytes
    if work.chunk_tokens is None:
        return work.num_targets * work.shape.vocab * per_logit
    hidden_gradient = work.num_targets * work.shape.hidden * 4
    return min(work.num_targets, work.chunk_tokens) * work.shape.vocab * per_logit + hidden_gradient


def _logit_gradient_bytes(work: Workload) -> float:
    """The softmax, its gradient and that of the logits are in fp32 together; the chunked loss computes them in place."""
    if work.chunk_tokens is not None:
        return 0
    if work.objective_bytes is not None:  # counted with the loss
        return work.num_targets * work.shape.vocab * BYTES[work.precision] if work.precision != "fp32" else 0
    return work.num_targets * work.shape.vocab * 12 - _loss_bytes(work)


def _bucket_bytes(work: Workload) -> float:
    """Gradients on their way to other ranks."""
    if work.engine == "plain":
        return min(2 * PLAIN_BUCKET_BYTES, 4 * work.trained.num_trainable) if work.workers > 1 else 0
    # One bucket fills while another travels (overlap_comm, on GPUs from stage 2).
    num_buckets = 2 if work.is_on_gpu and work.zero_stage >= 2 else 1
    return num_buckets * BYTES[work.precision] * min(ZERO_BUCKET_ELEMENTS, work.trained.num_trainable)


def _gathered_bytes(work: Workload) -> float:
    """Weights that stage 3 has whole at a time, and a flat buffer in which those of one gather arrive.

    Alone, a rank has them whole anyway.
    """
    return 0 if work.workers == 1 else _gathered_at_a_time(work.all_weight_bytes, work)


def _gathered_at_a_time(num_bytes: float, work: Workload) -> float:
    """Of the weights of one model."""
    width = BYTES[work.precision]
    return min(num_bytes, ZERO_LIVE_ELEMENTS * width) + min(num_bytes, ZERO_PREFETCH_ELEMENTS * width)
