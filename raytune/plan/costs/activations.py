"""Bytes of what passes through the layers of a model: what autograd keeps, what a layer takes while it computes, and the
gradients that come back. Every formula names its source."""

from functools import lru_cache

from raytune.plan.costs.workload import BYTES, Workload
from raytune.plan.model.kept_by_weights import KeptByWeights, Place, kept_by_weights, lowest_place
from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import Trained

KEPT_STEPS = {"relu": 1, "silu": 2, "swish": 2, "gelu": 2, "gelu_pytorch_tanh": 2, "relu2": 2}
"""Tensors that autograd keeps of an activation in few kernels: of relu the output, of one kernel else its input and, for what
comes next, its output."""
MOST_STEPS = 5
"""Of one in elementary steps, such as GPT-2's gelu_new."""
STATE_STEPS = 8
"""Numbers kept for each that a layer with a state computes around it: projected, convolved, gated, scanned. An estimate for
transformers' elementary steps, within a factor of 5 for tiny models (test_hybrids.py); kernels keep less."""


def kept_bytes(work: Workload) -> float:
    """What autograd keeps of layers for the backward pass, beside the layer that this pass is in.

    With checkpointing only the input of each layer is kept, and one layer at a time whole.
    """
    if work.has_checkpointing:
        return work.num_reached * work.num_tokens * work.shape.hidden * BYTES[work.weight_dtype]
    return max(0, work.num_reached - 1) * layer_activation_bytes(work)


def around_bytes(work: Workload) -> float:
    """What it keeps around the layers: what the embedding gives, if a layer is reached, and what the last norm computes in fp32
    and gives. The last norm's backward pass lets go of it."""
    return work.num_tokens * work.shape.hidden * (4 + (1 + (work.num_reached > 0)) * BYTES[work.weight_dtype])


def passing_bytes(work: Workload, shape: ModelShape) -> float:
    """What a layer without a backward pass holds while it computes: branches of the MLP and their product, beside the stream."""
    return work.num_tokens * BYTES[work.weight_dtype] * ((2 + shape.has_gate) * shape.intermediate + 3 * shape.hidden)


def last_norm_bytes(work: Workload) -> float:
    """The backward pass of the norm behind the layers: what is kept around these, three gradients in fp32, and, where the stream
    is in 16 bits, what comes and what goes."""
    in_16_bits = 0 if work.weight_dtype == "fp32" else 2 * BYTES[work.weight_dtype]
    return around_bytes(work) + work.num_tokens * work.shape.hidden * (12 + in_16_bits)


def in_layer_bytes(work: Workload) -> float:
    """What lives beside what is kept at the fullest moment of a layer's backward pass: the stream's gradient, and the most of

    - gradients of an MLP's product and of both its branches, when what entered its last layer is no longer kept;
    - gradients of that layer's weight and of what entered it, which is still kept;
    - what passes where the widest update is, in the dtype of what is trained: on the way back, or while it is computed again.

    Experts have the stream's gradient beside it once for each that a token passes through. The gradient of an update of fused
    experts comes out of that of all their weights.
    """
    shape, trained, width = work.shape, work.trained, BYTES[work.precision]
    stream = work.num_tokens * shape.hidden * BYTES[work.weight_dtype]
    product = work.num_tokens * shape.intermediate * width
    kept_product = _share_of_products(work) * work.num_tokens * (shape.intermediate - shape.expert_width) * width
    # Where the stream is in fp32, autocast casts its gradient on the way into a layer.
    cast = work.num_tokens * shape.hidden * width if work.weight_dtype != work.precision else 0
    ways = (
        3 * product - kept_product,
        cast + product + width * _largest_in_mlp(trained, shape),
        _back_through_update_bytes(work, kept_product),
        _computing_update_bytes(work, product - (0 if _casts_inputs(work) else kept_product)) if work.has_checkpointing else 0,
    )
    routed = sum(module.copies_per_token * module.inputs for module in shape.layer if module.kind == "experts")
    return stream + max(ways) + width * (work.num_tokens * routed + trained.largest_updated)


def _back_through_update_bytes(work: Workload, kept_product: float) -> float:
    """Most of what passes where an update of a layer is on the way back.

    An update of what the MLP's branches give has its turn when the product's last layer has had it, and so does one that is made
    as a whole: its gradient, and what that goes through.
    """
    trained, width = work.trained, BYTES[work.trained_dtype]
    passing = trained.passing_back if work.trained_dtype != work.precision else trained.passing_back_as_it_is
    tokens = work.num_tokens * width * passing
    return max(tokens - (0 if trained.changed_inputs else kept_product), width * trained.making_back)


def _computing_update_bytes(work: Workload, product: float) -> float:
    """Most of what passes while an update of a layer is computed again: casts and sums of the update, beside the stream, what
    entered the MLP and left it, the gradient that waits for the update, and the product.

    Args:
        product: of the MLP's branches, where no layer keeps it as it is.
    """
    trained, width = work.trained, BYTES[work.precision]
    if not trained.passing_ahead and not trained.making_ahead:
        return 0
    casts = BYTES[work.trained_dtype] * trained.passing_ahead if work.trained_dtype != work.precision else 0
    return work.num_tokens * (4 * work.shape.hidden * width + casts) + product + width * trained.making_ahead


def layer_activation_bytes(work: Workload) -> float:
    """One layer: norms, inputs of linear layers, queries, keys, values and output of attention, branches of the MLP.

    Counted on transformers' own layers, as Korthikanti et al. 2022 (Reducing Activation Recomputation) count Megatron's; a test
    holds it against what autograd saves. What is kept once per model (tables of rotary embeddings) counts by its share.
    """
    num_layers = max(1, work.num_reached)
    # An activation's steps, the last of which enters the way back; with a gate, the other branch and the product.
    num_steps = KEPT_STEPS.get(work.shape.activation, MOST_STEPS) + (2 if work.shape.has_gate else 0)
    per_token = _norm_bytes(work) + _attention_bytes(work) + _branch_bytes(work, num_steps)
    per_token += _linear_input_bytes(work) + _expert_bytes(work, num_steps)
    made = BYTES[work.precision] * work.trained.num_made / num_layers
    kept = work.num_tokens * per_token + _virtual_key_bytes(work)
    return kept + _score_bytes(work) + _mask_bytes(work) + _updated_expert_bytes(work) + made


def _norm_bytes(work: Workload) -> float:
    """A norm computes in fp32 and keeps its input so, per token; to train its weight it keeps the normalised values as well."""
    shape, num_layers = work.shape, max(1, work.num_reached)
    per_head = {"self_attn.q_norm": shape.heads * shape.head_dim, "self_attn.k_norm": shape.kv_heads * shape.head_dim}
    rows_of = {"self_attn.q_norm": shape.heads, "self_attn.k_norm": shape.kv_heads}
    width = 4 if shape.scales_norms_in_fp32 else BYTES[work.weight_dtype]
    kept = _kept(work)
    norms = [module for module in shape.layer if module.kind == "norm"]
    normalised = sum(
        per_head.get(norm.name, norm.outputs) * (4 + width * (kept.norms if work.trained.is_base else _share_trained(norm, work)))
        for norm in norms
    )
    if work.has_checkpointing:
        # A layer computed again has gradients for its input, which is kept anyway: where it is in fp32, the norm keeps no other.
        normalised -= 4 * shape.hidden * (work.weight_dtype == "fp32")
    elif not _is_below(work.trained):
        # The lowest layer's first norm is in front of everything that is trained, and so may its second be.
        normalised -= 4 * shape.hidden * (1 / num_layers + 1 - _share_through(Place.WAY_OUT, work))
    return normalised + 4 * sum(rows_of.get(norm.name, 1) for norm in norms)


def _attention_bytes(work: Workload) -> float:
    """Queries, keys, values and output of attention, or what a layer with a state keeps, per token; and a share of the tables of
    rotary embeddings."""
    shape, width = work.shape, BYTES[work.precision]
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shares_rows = work.sequence_parallel > 1
    # Queries, keys and values that come from one matrix are slices which keep the whole of its output alive.
    is_fused = any(module.name.endswith("qkv_proj") for module in shape.layer)
    # Where there are more ranks than heads of keys and values, each head lies on several.
    read = keys * max(1.0, work.sequence_parallel / max(1, shape.kv_heads))
    attention = width * (2 * queries + 2 * read + is_fused * (not shares_rows) * (queries + 2 * keys))
    if work.attention != "eager":
        attention += 4 * shape.heads  # the logarithm of the sum that scores were divided by
    through = _share_through(Place.ATTENTION, work)
    kept = through * max(attention, STATE_STEPS * width * shape.state_width)
    if _keeps_inputs(work):
        if (work.attention == "varlen" and not work.is_on_gpu) or shares_rows:
            kept += _kept(work).ways_out * width * queries  # outputs document by document, or of own heads, and end to end
        elif _begins_at(work) == Place.WAY_OUT:
            kept += (1 - through) * width * queries
    has_rotary = len(shape.embeddings) == 1
    # Of what is kept once, a layer has its share; computed again with checkpointing, it has all.
    sharing = 1 if work.has_checkpointing else max(1, work.num_reached)
    return kept + has_rotary * 2 * shape.head_dim * BYTES[work.weight_dtype] / sharing


def _branch_bytes(work: Workload, num_steps: int) -> float:
    """Branches of the MLP, per token, and what enters its last layer where that is kept as it is."""
    keeps_products = 0.0 if _casts_inputs(work) and work.zero_stage != 3 else _share_of_products(work)
    through = _share_through(Place.MLP, work)
    # What relu gives it keeps itself, and without a gate that is what enters the last layer.
    is_product = work.shape.activation == "relu" and not work.shape.has_gate
    steps = max(through, keeps_products) if is_product else through * (num_steps - 1) + keeps_products
    return BYTES[work.precision] * (work.shape.intermediate - work.shape.expert_width) * steps


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


def _share_of_products(work: Workload) -> float:
    """The share of MLPs that keep what enters their last layer, as it is or cast."""
    trained = work.trained
    is_read = trained.is_base or trained.reads_inputs or work.zero_stage == 3
    is_multiplied = trained.scaled_inputs > 0 and work.trained_dtype == work.precision
    return _kept(work).ways_back if is_read or is_multiplied else 0.0


@lru_cache(maxsize=4)
def _largest_in_mlp(trained: Trained, shape: ModelShape) -> int:
    """Numbers of the largest weight of an MLP that is trained whole."""
    whole = {shape.name_in_layer(name) for name in trained.whole}
    mlp = [module for module in shape.layer if module.kind in ("mlp", "experts") and module.name in whole]
    matrices = [(module.copies, one) for module in mlp for one in module.matrices or (module,)]
    return max((copies * one.inputs * one.outputs for copies, one in matrices), default=0)


def _casts_inputs(work: Workload) -> bool:
    """Whether updates compute with inputs in another dtype than the layers do."""
    return not work.trained.is_base and work.trained.casts_inputs and work.trained_dtype != work.precision


def _share_trained(norm: Module, work: Workload) -> float:
    """The share of layers in which an adapter trains a norm, of those that a backward pass reaches."""
    return work.trained.whole_norms[f"{work.shape.layers_name}.{norm.name}"] / max(1, work.num_reached)


def _expert_bytes(work: Workload, num_steps: int) -> float:
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
    trained = work.trained
    num_layers = max(1, work.num_reached)
    kept = _kept(work)
    if trained.is_base:
        return (kept.readers if work.weight_dtype != work.precision else kept.streams) * shape.hidden * width
    shared = kept.streams * shape.hidden * width
    inner_width = trained.inner_width + (trained.width_in_16_bits if work.precision != "fp32" else 0)
    inner = inner_width * width / num_layers
    casts = _casts_inputs(work)
    # What layers are given in place of their inputs, and what frozen matrices of updates read, stage 3 has them keep too.
    inner += (trained.changed_inputs + trained.frozen_inputs) * width / num_layers if work.zero_stage == 3 else 0
    if not trained.reads_inputs:
        scaled = trained.scaled_inputs * BYTES[work.trained_dtype] / num_layers if casts else 0
        return inner + scaled + (shared if work.zero_stage == 3 else 0)
    cast = trained.target_inputs * width / num_layers
    # Beside what was dropped: a mask, on a CPU in the dtype of what is dropped.
    mask = cast if work.is_on_gpu else trained.target_inputs * BYTES[work.trained_dtype] / num_layers
    return inner + (cast if casts or trained.drops_inputs else shared) + (mask if trained.drops_inputs else 0)


@lru_cache(maxsize=4)
def _is_below(trained: Trained) -> bool:
    """Whether something is trained in front of the layers."""
    return trained.lengthens_rows or any(part.kind == "embedding" and part.how != "in front" for part in trained.parts)


def _begins_at(work: Workload) -> Place:
    """Where a backward pass ends in the lowest layer that it reaches. With checkpointing bytes are of layers that are computed
    again, where one is whole."""
    is_whole = work.has_checkpointing or _is_below(work.trained)
    return Place.ATTENTION if is_whole else lowest_place(work.trained, work.shape)


def _share_through(place: Place, work: Workload) -> float:
    """The share of layers where a backward pass comes through a place: all, or all but the lowest."""
    return 1.0 if _begins_at(work) <= place else 1 - 1 / max(1, work.num_reached)


def _kept(work: Workload) -> KeptByWeights:
    return kept_by_weights(work.trained, work.shape, work.zero_stage == 3, _begins_at(work))


def _score_bytes(work: Workload) -> float:
    """`sdpa` holds a mask over the packed row, `eager` scores and probabilities of every head too; the others hold neither."""
    pairs = work.num_tokens * (work.num_tokens + work.num_virtual_keys)
    if work.attention == "eager":
        return _share_through(Place.ATTENTION, work) * pairs * work.shape.heads * 3 * BYTES[work.precision]
    return pairs / (1 if work.has_checkpointing else work.shape.num_layers) if work.attention == "sdpa" else 0


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


def dequantized_bytes(work: Workload) -> float:
    """bitsandbytes multiplies by a weight in the run's precision, which it makes anew in each pass.

    So does model.packed_experts with the experts of a layer, one parameter after the other on the way back.
    """
    if work.quantization is None:
        return 0
    linear = (module.num_parameters for layer in work.shape.layers() for module in layer if module.is_linear)
    return BYTES[work.precision] * max(*linear, 0 if work.has_checkpointing else work.trained.largest_packed)


def expanded_expert_bytes(work: Workload) -> float:
    """All parameters of a layer's experts at once: while they compute, and what autograd keeps of them in a recomputation."""
    return BYTES[work.weight_dtype] * work.trained.num_packed_per_layer
