"""Seconds of an optimizer step from arithmetic: products, memory traffic, communication and offload of a rank. Pure.

Documents are taken to be as long as rows, which makes a step longer than it is; evaluation, saves, stragglers and the start are
left out. Rows are mapped from files and are thousands of times smaller than what moves between GPUs.
"""

from dataclasses import dataclass
from typing import Literal

from raytune.config.sections.training import SCHEDULE_FREE
from raytune.plan.costs.activations import layer_activation_bytes, passing_bytes
from raytune.plan.costs.buckets import Ring
from raytune.plan.costs.hardware import Fabric, Gpu, Instance
from raytune.plan.costs.loss_chunks import bytes_per_weight, num_chunks
from raytune.plan.costs.memory import ORTHOGONAL, teacher_weight_bytes
from raytune.plan.costs.workload import BYTES, Workload
from raytune.plan.model.quantization import num_quantised, quantized_bytes
from raytune.plan.run_plan import Bound, StepTimePlan

LINK_SHARE: dict[Fabric | Literal["intra"], float] = {
    "intra": 0.8,
    "efa": 0.8,
    "infiniband": 0.9,
    "tcpx": 0.7,
    "tcpxo": 0.8,
    "tcp": 0.6,
}
"""Of a link's rate, what large collectives of NCCL reach; nccl-tests as published, not measured here."""
HOP_S: dict[Fabric | Literal["NVLink", "PCIe"], float] = {
    "NVLink": 3.4e-6,
    "PCIe": 5.7e-6,
    "efa": 14e-6,
    "infiniband": 14e-6,
    "tcpx": 14e-6,
    "tcpxo": 14e-6,
    "tcp": 50e-6,
}
"""Latency of a hop of a ring of NCCL's, as NCCL itself reckons (tuning.cc, protocol Simple); that of TCP is assumed."""
FASTEST_PCIE = 64e9
"""Bytes per second of 16 lanes of the fifth generation: what is faster between GPUs is NVLink."""
LAYER_SHARE = 0.8
"""Of what the largest products reach, what a layer's reach, with all that is not counted here: so that full fine-tuning of an 8B
model on H100s comes to the 40 to 58 % of the data sheet that are published (torchtitan's performance page)."""
MEMORY_SHARE = 0.8
"""Of a GPU's memory bandwidth, what elementwise kernels reach."""
HOST_ADAM_PER_S = 4e9
"""Parameters per second that DeepSpeed's CPU Adam updates on a node (Ren et al. 2021, ZeRO-Offload, table 4: 1e9 in 0.25 s)."""
NVME_BYTES_PER_S = 5e9
"""Of a node's local disks together, reading or writing; assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Rates of a cluster of equal nodes, as one of its GPUs meets them."""

    flops: float
    """Products in 16 bits that a GPU reaches per second in layers."""
    memory_bytes_per_s: float
    host_bytes_per_s: float
    intra_bytes_per_s: float
    """Between GPUs of a node, one direction per GPU."""
    inter_bytes_per_s: float
    """Of a node to others, one direction."""
    gpus_per_node: int
    intra_hop_s: float
    """Latency between GPUs of a node."""
    inter_hop_s: float

    @classmethod
    def of(cls, instance: Instance, gpu: Gpu) -> "Speed":
        """What an instance type reaches in practice."""
        return cls(
            flops=gpu.bf16_flops * gpu.practical_share * LAYER_SHARE,
            memory_bytes_per_s=gpu.memory_bytes_per_s * MEMORY_SHARE,
            host_bytes_per_s=gpu.host_bytes_per_s * LINK_SHARE["intra"],
            intra_bytes_per_s=instance.intra_bytes_per_s * LINK_SHARE["intra"],
            inter_bytes_per_s=instance.inter_bytes_per_s * LINK_SHARE[instance.fabric],
            gpus_per_node=instance.num_gpus,
            intra_hop_s=HOP_S["NVLink" if instance.intra_bytes_per_s > FASTEST_PCIE else "PCIe"],
            inter_hop_s=HOP_S[instance.fabric],
        )

    def ring(self, workers: int) -> Ring:
        """What a collective of so many workers runs along: through all GPUs of a node, then into the next node."""
        nodes = -(-workers // self.gpus_per_node)
        if nodes == 1:
            return Ring(self.intra_bytes_per_s, self.intra_hop_s)
        hops_s = nodes * self.inter_hop_s + (workers - nodes) * self.intra_hop_s
        inside = self.intra_bytes_per_s if self.gpus_per_node > 1 else self.inter_bytes_per_s
        return Ring(min(inside, self.inter_bytes_per_s), hops_s / workers)


def step_time(work: Workload, speed: Speed, row_tokens: int) -> StepTimePlan:
    """Seconds of one optimizer step.

    A GPU does its products and its memory traffic one after the other; collectives and copies to the host overlap with them, so
    that the longest of the three binds (Rajbhandari et al. 2020, ZeRO, section 7; DeepSpeed's overlap_comm and prefetch).

    Args:
        work: what a rank does per micro-batch, and how often.
        speed: of the machines.
        row_tokens: tokens of a row, with virtual ones that pass through the layers; a document is taken to be as long.
    """
    compute_s = (work.accumulation * flops_per_micro_batch(work, row_tokens) + update_flops(work)) / speed.flops
    memory_s = _memory_traffic_bytes(work) / speed.memory_bytes_per_s
    communication_s = _communication_s(work, speed)
    offload_s = _offload_s(work, speed)
    parts: dict[Bound, float] = {
        "compute": compute_s,
        "memory bandwidth": memory_s,
        "communication": communication_s,
        "offload": offload_s,
    }
    exchange_s = _exchange_s(work, speed)
    on_gpu = compute_s + memory_s + exchange_s
    seconds = max(on_gpu, communication_s, offload_s)
    overlapped: Bound = "communication" if communication_s >= offload_s else "offload"
    there: dict[Bound, float] = {"compute": compute_s, "memory bandwidth": memory_s, "communication": exchange_s}
    binds = overlapped if parts[overlapped] > on_gpu else max(there, key=lambda bound: there[bound])
    virtual = work.trained.num_virtual if work.trained.lengthens_rows else 0
    tokens = work.workers * work.accumulation * work.num_tokens * (row_tokens - virtual) / row_tokens
    return StepTimePlan(
        compute_s=compute_s,
        memory_s=memory_s,
        communication_s=communication_s,
        offload_s=offload_s,
        exchange_s=exchange_s,
        seconds=seconds,
        binds=binds,
        tokens_per_s=tokens / seconds,
    )


def flops_per_micro_batch(work: Workload, row_tokens: int) -> float:
    """Floating-point operations of a forward and a backward pass of one rank.

    Per weight and token: 2 in the forward pass, 2 for the gradient of the input, 2 for that of the weight, which a frozen weight
    has not (Kaplan et al. 2020, section 2.1: 6 P; LoRA 4 P and 6 per weight of the adapter); checkpointing repeats the forward
    pass of the layers. The head sees targets only. Attention has 2 products forward and 5 backward, since FlashAttention computes
    scores again (Dao 2023, section 3.2), of 2 x width x length each, of which causality needs half.
    """
    shape = work.shape
    trains_base = work.trained.is_base
    forward = 2
    # Gradients of inputs, and recomputation, begin at the lowest layer that is trained; those of weights are of trained ones.
    reached = work.num_reached / shape.num_layers
    again = forward if work.has_checkpointing else 0
    layers = (forward + reached * (2 + again)) * shape.num_product_weights * work.num_tokens
    layers += 2 * _share_trained(work) * shape.num_product_weights * work.num_tokens
    passes = forward + 2 * bool(work.trained.whole - {shape.head.name} or not trains_base)
    passes += 2 * (trains_base and shape.head.name in work.trained.whole)
    head = passes * shape.head.inputs * shape.head.outputs * work.num_targets
    # What makes virtual tokens is computed once per pass, for them alone.
    through_adapter = work.trained.num_virtual or work.num_tokens
    num_applied = work.trained.num_applied or work.trained.num_trainable - work.trained.num_in_experts
    adapter = 0 if trains_base else (6 + again) * num_applied * through_adapter
    making = (2 + work.has_checkpointing) * work.trained.making_flops
    products = 2 + reached * (5 + (2 if work.has_checkpointing else 0))
    attention = shape.num_layers * products * row_tokens * shape.heads * shape.head_dim * work.num_tokens
    of_updates = _expert_update_flops(work, 6 + again)
    return float(layers + head + adapter + making + attention + of_updates + _teacher_flops(work, row_tokens))


def _teacher_flops(work: Workload, row_tokens: int) -> float:
    """Of a teacher's forward pass: 2 per weight and token, and attention's 2 products."""
    shape = work.teacher
    if shape is None:
        return 0.0
    attention = shape.num_layers * 2 * row_tokens * shape.heads * shape.head_dim
    return (
        2 * shape.num_product_weights + attention
    ) * work.num_tokens + 2 * shape.head.inputs * shape.head.outputs * work.num_targets


def update_flops(work: Workload) -> float:
    """Floating-point operations of the products of an update: Muon's, of which every rank makes all.

    Five steps of Newton and Schulz (Jordan 2024, *Muon*), each X X^T, its square, and that times X, for X with the smaller side n
    as rows and m columns: 2 n (n m + n n + n m).
    """
    if work.optimizer not in ORTHOGONAL:
        return 0.0
    sides = ((min(pair), max(pair)) for pair in work.trained.matrices)
    return float(sum(5 * 2 * n * (2 * n * m + n * n) for n, m in sides))


def _share_trained(work: Workload) -> float:
    """Of the weights in layers that a token is multiplied by, those that are trained whole as part of the base."""
    if not work.trained.is_base:
        return 0.0
    kinds, names = ("attention", "mlp", "mixer", "experts", "router"), work.trained.whole
    modules = [module for module in work.shape.modules() if module.kind in kinds]
    weights = sum(one.copies_per_token * one.inputs * one.outputs for one in modules)
    return sum(one.copies_per_token * one.inputs * one.outputs for one in modules if one.name in names) / weights


def _expert_update_flops(work: Workload, per_weight: int) -> float:
    """Of updates of fused experts: PEFT adds B A to all of their weights, once per pass, and takes its gradient from theirs."""
    if not work.trained.num_updated_per_layer:
        return 0.0
    shape = work.shape
    experts = [module for layer in shape.layers() for module in layer if module.kind == "experts"]
    gradients = 2 * work.num_tokens * sum(one.copies_per_token * one.inputs * one.outputs for one in experts)
    return gradients + len(experts) * per_weight * work.trained.expert_rank * work.trained.num_updated_per_layer


def _memory_traffic_bytes(work: Workload) -> float:
    """What a step moves through a GPU's memory besides the operands of products, but for the output head's, which come again with
    each chunk of targets.

    Elementwise steps write and read what autograd keeps, forward and backward, and once more where it is recomputed. QLoRA reads
    packed weights and writes them in 16 bits in every pass (Dettmers et al. 2023, section 3). Adam reads and writes fp32 weight
    and moments, reads the gradient and writes the weight: 30 bytes per trained parameter of the own shard.
    schedulefree's AdamW makes a pass of each of its ten operations.
    """
    passes = 3 if work.has_checkpointing else 2
    elementwise = 2 * (work.shape.num_layers + (passes - 1) * work.num_reached) * layer_activation_bytes(work)
    # What a loss of the user's holds was written, and is read; twice, in the forward and the backward pass.
    per_logit = 4 * 4 if work.objective_bytes is None else 8 + 2 * work.objective_bytes
    logits = per_logit * work.shape.vocab * work.num_targets + _head_traffic_bytes(work)
    dequantised = per_weight = 0.0
    if work.quantization:
        num_packed = num_quantised(work.shape, work.trained)
        per_weight = quantized_bytes(work.quantization, work.shape, work.trained) / num_packed + BYTES[work.precision]
        # Recomputed experts stay as they are until their backward pass; others are expanded for it.
        dequantised = per_weight * (passes * work.shape.num_quantizable + 2 * work.trained.num_packed)
    taught = _teacher_traffic_bytes(work, per_weight)
    # A penalty reads weight and anchor, writes what lies between, and reads it to count it and to add it to the gradient.
    # Importance is read twice, and the way from the base written and read once more where it is squared by it.
    per_trained = 104 if work.optimizer in SCHEDULE_FREE else 30
    per_trained += work.holds_weights * (24 + BYTES[work.trained_dtype]) + work.weighs_importance * 16
    # An average of the weights is read, drawn to the weights, which are read too, and written.
    per_trained += 12 / work.averages_every if work.averages_every else 0
    updated = 0 if work.offload_optimizer != "none" else per_trained * work.trained.num_trainable / work.share(1)
    return work.accumulation * (elementwise + logits + dequantised + taught) + updated


def _head_traffic_bytes(work: Workload) -> float:
    """Of the head's weights and the sum of their gradients, in all chunks of a micro-batch."""
    head = work.shape.head
    moved = bytes_per_weight(width=BYTES[work.precision], is_trained=head.name in work.trained.whole)
    return num_chunks(work.num_targets, work.chunk_tokens) * moved * head.inputs * head.outputs


def _teacher_traffic_bytes(work: Workload, per_packed_weight: float) -> float:
    """What a teacher's forward pass moves: as a student's, which keeps nothing of it; and both models' softened logits."""
    shape = work.teacher
    if shape is None:
        return 0.0
    elementwise = 2 * shape.num_layers * passing_bytes(work, shape)
    packed = 0.0 if work.teacher_is_beside else per_packed_weight * work.shape.num_quantizable
    return elementwise + packed + 2 * 4 * 4 * shape.vocab * work.num_targets


def _communication_s(work: Workload, speed: Speed) -> float:
    """Seconds of a step's collectives.

    Rajbhandari et al. 2020, section 7: stages 0 and 1 move twice the gradients, stage 2 the gradients of each micro-batch and the
    updated weights, stage 3 gathers the weights forward and backward (and to recompute) and scatters gradients, per micro-batch.
    PlainEngine sums fp32 gradients once per step, DeepSpeed's stage 1 those of the run's precision. A base whose layers are
    divided without ZeRO is gathered forward and, as far as gradients come, backward; what is computed again is whole by then.
    """
    if work.workers == 1:
        return 0.0
    trained = work.trained.num_trainable
    if work.engine == "plain":
        taught = work.teacher is not None and not work.teacher_is_beside
        passes = 1 + work.num_reached / max(1, work.shape.num_layers) + taught
        gathered = work.accumulation * passes * _collective_s(work.sharded_layer_bytes, work.workers, speed)
        return 2 * _collective_s(4 * trained, work.workers, speed) + gathered
    width = BYTES[work.precision]
    gradients = _collective_s(width * trained, work.workers, speed)
    if work.zero_stage == 1:
        return 2 * gradients
    if work.zero_stage == 2:
        return (work.accumulation + 1) * gradients
    return work.accumulation * gradients + _gather_s(work, speed)


def _gather_s(work: Workload, speed: Speed) -> float:
    """Seconds in which a step gathers sharded weights, a teacher's too.

    Wang et al. 2023 (ZeRO++), section 3.2: where the workers of a node have a copy of the weights among them, gathers stay inside
    it, but for the first of a trained weight after its update.
    """
    passes = work.accumulation * (3 if work.has_checkpointing else 2)
    taught = work.accumulation * teacher_weight_bytes(work) if work.teacher else 0.0
    gathered = passes * work.all_weight_bytes + taught
    if work.copy_over == 1:
        return _collective_s(gathered, work.workers, speed)
    after_update = BYTES[work.trained_dtype] * work.trained.num_trainable
    inside, everywhere = gathered - after_update, after_update
    return _collective_s(inside, work.copy_over, speed) + _collective_s(everywhere, work.workers, speed)


def _exchange_s(work: Workload, speed: Speed) -> float:
    """Seconds that a step's attention waits for the ranks that share its rows.

    Jacobs et al. 2023 (DeepSpeed Ulysses), section 3.2: of queries, keys, values and outputs of its own tokens, a rank sends all
    but its share, in each pass. What leaves a node shares that node's link.
    """
    size, shape = work.sequence_parallel, work.shape
    if size == 1:
        return 0.0
    keys = shape.kv_heads * max(1.0, size / shape.kv_heads)
    per_pass = BYTES[work.precision] * work.num_tokens * 2 * (shape.heads + keys) * shape.head_dim
    passes = shape.num_layers + work.num_reached * (1 + work.has_checkpointing)
    on_node = min(size, speed.gpus_per_node)
    inside = (on_node - 1) / size / speed.intra_bytes_per_s
    between = (size - on_node) / size * speed.gpus_per_node / speed.inter_bytes_per_s
    return work.accumulation * passes * per_pass * max(inside, between)


def _collective_s(num_bytes: float, workers: int, speed: Speed) -> float:
    """Gather or scatter of `num_bytes` over all ranks: NCCL passes each byte into each node once, and to each GPU once.

    Thakur et al. 2005 (Optimization of Collective Communication Operations), section 4: a share of (n - 1) / n.
    """
    on_node = min(workers, speed.gpus_per_node)
    nodes = -(-workers // speed.gpus_per_node)
    inside = num_bytes * (on_node - 1) / on_node / speed.intra_bytes_per_s
    between = num_bytes * (nodes - 1) / nodes / speed.inter_bytes_per_s
    return max(inside, between)


def _offload_s(work: Workload, speed: Speed) -> float:
    """Seconds of copies to and from the host or its disks, and of the update there.

    Ren et al. 2021 (ZeRO-Offload), section 4: gradients of the own shard go out once per step and updated weights come back; the
    host updates its ranks' shards. Offloaded weights come in with every gather (Rajbhandari et al. 2021, ZeRO-Infinity). Disks
    read and write the state (12 bytes per parameter) once per step, and read the weights.
    """
    seconds = 0.0
    on_node = min(work.workers, speed.gpus_per_node)
    own_shard = work.trained.num_trainable / work.share(1)
    if work.offload_optimizer != "none":
        seconds += 2 * BYTES[work.precision] * own_shard / speed.host_bytes_per_s + own_shard * on_node / HOST_ADAM_PER_S
    if work.offload_optimizer == "nvme":
        seconds += 2 * 12 * own_shard * on_node / NVME_BYTES_PER_S
    if work.offload_parameters != "none":
        gathers = 3 if work.has_checkpointing else 2
        taught = teacher_weight_bytes(work) if work.teacher else 0.0
        read = work.accumulation * (gathers * work.all_weight_bytes + taught) / work.share(3)
        seconds += read / speed.host_bytes_per_s
        seconds += read * on_node / NVME_BYTES_PER_S if work.offload_parameters == "nvme" else 0
    return seconds
