"""The shape of a model that `plan/model/architectures.py` has no reader for, from what transformers builds on the meta device.

A process of its own, because a plan loads neither torch nor transformers:

    python -m raytune.model.meta_shape FOLDER [--trust-remote-code]

FOLDER holds a `config.json`. Printed is a JSON object: `{"shape": ...}`, or `{"error": ...}` where a plan's formulas do not hold.

Longer than most files, because it is one program whose every step reads what the step before found.
"""

import json
import resource
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raytune.errors import ModelError
from raytune.model.adapters.targets import MLP
from raytune.model.attention.attention import keeps_state, lone_attention, packing_obstacle
from raytune.model.files.pretrained import load_config, model_class
from raytune.model.parts.dropouts import dropout_keys
from raytune.model.parts.experts import WAY_BACK, expert_matrices, is_router_name, names_of_experts
from raytune.model.parts.kernels import bypassed_layers, bypassed_norms
from raytune.model.parts.layers import layers_of
from raytune.model.parts.norms import is_norm
from raytune.model.parts.rope import rotates
from raytune.plan.model.rope import own_positions, own_rope
from raytune.plan.model.shapes import LINEAR_KINDS, Kind, Matrix, ModelShape, Module
from raytune.units import GIB, format_bytes

BUILD_S = 60.0
BUILD_BYTES = 8 * GIB
"""Limits of a model's making, behind the imports; of processor time, so that a busy machine refuses nothing."""
UNBOUNDED_POSITIONS = 1 << 20
"""Of models that set no bound, such as those that attend by distance (ALiBi)."""
_BOUNDS = ("max_position_embeddings", "max_seq_len")
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")


def main(arguments: Sequence[str], seconds: float = BUILD_S, num_bytes: int = BUILD_BYTES) -> None:
    """Print the shape, or why there is none.

    Args:
        seconds, num_bytes: what the making of the model may take.
    """
    _limit(seconds, num_bytes)
    try:
        with redirect_stdout(sys.stderr):  # what libraries print while they build is not the answer
            answer = _answer(arguments[0], "--trust-remote-code" in arguments[1:])
    except (_TooLongError, MemoryError) as error:
        limit = f"{seconds:g} seconds" if isinstance(error, _TooLongError) else f"{format_bytes(num_bytes)} of memory"
        answer = {"error": f"{arguments[0]}: to build the model of its config.json, without weights, takes more than {limit}."}
    sys.stdout.write(json.dumps(answer))


def _limit(seconds: float, num_bytes: int) -> None:
    """Let this process work for so long, with so much more memory than its imports took: modules without weights are small."""
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    with suppress(OSError, ValueError):  # without /proc, or below another limit: time alone
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        most = pages * resource.getpagesize() + num_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


class _TooLongError(BaseException):  # which no library takes for a failure of its own
    """The time is over."""


def _too_long(signal_number: int, frame: object) -> None:
    raise _TooLongError


def _answer(folder: str, trust_remote_code: bool) -> dict[str, Any]:
    try:
        shape = shape_of(meta_model(folder, trust_remote_code=trust_remote_code))
    except ModelError as error:
        return {"error": str(error)}
    return {"shape": TypeAdapter(ModelShape).dump_python(shape, mode="json")}


def meta_model(folder: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a folder's `config.json` describes, without storage.

    Raises:
        ModelError: if transformers has no decoder of that type, or it cannot be built.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    model_class(folder, config, trust_remote_code=trust_remote_code)  # which must exist
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the code of an architecture says of numbers that it cannot build
        what = f"{type(error).__name__}: {error}"
        raise ModelError(f"{folder}: transformers cannot build a {config.model_type} model from config.json ({what}).") from error


def shape_of(model: PreTrainedModel) -> ModelShape:
    """What a plan asks about a model.

    Raises:
        ModelError: with the first thing that the plan's formulas do not cover.
    """
    try:
        shape = _shape(model, model.config.get_text_config(decoder=True))
        if shape.num_parameters != sum(parameter.numel() for parameter in model.parameters()):
            raise _NotCovered("its layers share weights")
        return shape
    except _NotCovered as reason:
        raise ModelError(
            f"raytune cannot plan this {model.config.model_type} model: {reason}. It plans decoders whose layers are alike, "
            f"each of attention (queries, keys, values, one way out) and an MLP or a mixture of experts, and hybrids of these "
            f"with layers that keep a state. Set model.base to such a model."
            + (" A text-only checkpoint of this one may do." if hasattr(model.config, "text_config") else "")
        ) from None


class _NotCovered(Exception):
    """Why the plan's formulas would not hold."""


def _shape(model: PreTrainedModel, config: PretrainedConfig) -> ModelShape:
    if getattr(config, "is_heterogeneous", False):  # then a number of the config may be another in each layer
        raise _NotCovered("its config has settings per layer")
    why_lone = packing_obstacle(type(model), model.config)
    stateful = keeps_state(type(model), config)
    hidden = _number(config, "hidden_size")
    heads = 0 if stateful and not hasattr(config, "num_attention_heads") else _number(config, "num_attention_heads")
    head_dim: int = (getattr(config, "head_dim", None) or hidden // heads) if heads else 0
    found = layers_of(model)
    if found is None:
        raise _NotCovered("its layers are in no list")
    layers_name, layers = found
    kinds, kind_of_layer = _layers(layers_name, layers, config, stateful=stateful)
    embeddings, final_norm, head = _around(model, layers_name, config, stateful=stateful)
    intermediate, has_gate = _widest_mlp(kinds, hidden) if stateful else _mlp(kinds[0], hidden)
    kv_heads = getattr(config, "num_key_value_heads", heads) or heads
    rope = own_rope(config.to_dict()) if rotates(model) else None
    return ModelShape(
        model_type=model.config.model_type,
        num_layers=len(layers),
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads if stateful else _kv_heads(kinds[0], config, hidden, heads * head_dim, head_dim),
        head_dim=head_dim,
        vocab=head.outputs,
        max_positions=own_positions(rope, next((n for key in _BOUNDS if (n := getattr(config, key, None))), UNBOUNDED_POSITIONS)),
        rope=rope,
        has_gate=has_gate,
        activation=next((str(name) for key in _ACTIVATIONS if (name := getattr(config, key, None))), "unknown"),
        is_tied=_weight_of(model.get_input_embeddings()) is _weight_of(model.get_output_embeddings()),
        names_of_experts=names_of_experts(model.config.model_type),
        layers_name=layers_name,
        layer=kinds[0],
        other_layers=tuple(kinds[1:]),
        kind_of_layer=tuple(kind_of_layer) if len(kinds) > 1 else (),
        state_width=max(_state_width(kind) for kind in kinds),
        why_lone=why_lone or "",
        lone_attention=tuple(lone_attention(type(model))) if why_lone else (),
        dropouts=dropout_keys(type(model), model.config),
        embeddings=embeddings,
        final_norm=final_norm,
        head=head,
    )


def _weight_of(module: nn.Module | None) -> Any:
    return getattr(module, "weight", None)


def _number(config: PretrainedConfig, key: str) -> int:
    value = getattr(config, key, None)
    if not isinstance(value, int):
        raise _NotCovered(f"its config has no {key}")
    return value


def _layers(
    layers_name: str, layers: Iterable[nn.Module], config: PretrainedConfig, *, stateful: bool
) -> tuple[list[tuple[Module, ...]], list[int]]:
    """The kinds of layers, first the one with most to a token's products, and which kind each layer is.

    Only hybrids may have several, and in them what holds weights may be anything.
    """
    modules = [_modules(layer, config, stateful=stateful) for layer in layers]
    kinds = list(dict.fromkeys(modules))
    if stateful:
        kinds.sort(key=lambda kind: (any(module.kind == "attention" for module in kind), _num_products(kind)), reverse=True)
        return kinds, [kinds.index(layer) for layer in modules]
    for index, other in enumerate(modules):
        if other != modules[0]:
            names = ", ".join(sorted({module.name for module in {*modules[0]} ^ {*other}}))
            raise _NotCovered(f"{layers_name}.{index} and {layers_name}.0 differ in {names}")
    has_experts = any(module.kind == "experts" for module in modules[0])
    for module in modules[0]:
        if module.kind == "embedding" or (module.kind == "router" and not has_experts):
            raise _NotCovered(f"{layers_name}.0.{module.name} is neither a linear layer nor a norm")
    return kinds, [0] * len(modules)


def _num_products(layer: Iterable[Module]) -> int:
    return sum(module.inputs * module.outputs * module.copies_per_token for module in layer if module.kind != "state")


def _state_width(layer: Iterable[Module]) -> int:
    """Outputs of the linear layers around a state, and of its convolutions; 0 of a layer without one."""
    layer = list(layer)
    of_state = {module.name.rpartition(".")[0] for module in layer if module.kind == "state"} - {""}
    around = [module for module in layer if module.kind in ("mixer", "attention") and module.name.rpartition(".")[0] in of_state]
    return sum(module.outputs for module in around)


def _widest_mlp(kinds: Iterable[Sequence[Module]], hidden: int) -> tuple[int, bool]:
    """Over the layers of a hybrid, some of which have none, or one that is not told apart from other linear layers."""
    found = [(0, False)]
    for kind in kinds:
        try:
            found.append(_mlp([module for module in kind if module.kind in ("mlp", "experts")], hidden))
        except _NotCovered:
            continue
    return max(found)


def _around(
    model: PreTrainedModel, layers_name: str, config: PretrainedConfig, *, stateful: bool
) -> tuple[tuple[Module, ...], Module, Module]:
    """Embeddings with norms of theirs, the norm behind the layers, and the head."""
    found = [module for module in _modules(model, config, stateful=stateful) if not module.name.startswith(f"{layers_name}.")]
    head_layer = model.get_output_embeddings()
    if head_layer is None:
        raise _NotCovered("it has no output head")
    head_name = next((name for name, module in model.named_modules() if module is head_layer), None)
    heads = [module for module in found if module.name == head_name and module.kind in LINEAR_KINDS]
    if len(heads) != 1:
        raise _NotCovered("its head is not a linear layer")
    norms = [module for module in found if module.kind == "norm"]
    embeddings = [module for module in found if module.kind == "embedding"]
    others = [module for module in found if module not in (*heads, *norms, *embeddings)]
    if others or not norms or not embeddings:
        names = ", ".join(module.name for module in others) or "no norm or no embedding"
        raise _NotCovered(f"outside its layers it has {names}")
    return (*embeddings, *norms[:-1]), norms[-1], replace(heads[0], kind="head")


def _modules(root: nn.Module, config: PretrainedConfig, *, stateful: bool = False) -> tuple[Module, ...]:
    """All that hold weights themselves, under their names in `root`."""
    modules = [
        _module_of_hybrid(name, module, config) if stateful else _module(name, module, config)
        for name, module in root.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    counts = {module.copies for module in modules if module.kind == "experts"}
    bypassed = {*bypassed_layers(root), *bypassed_norms(root)} if stateful else set()
    return tuple(
        replace(
            module,
            kind=_kind_of_linear(module, counts, stateful=stateful),
            is_linear_layer=module.outputs in counts and is_router_name(module.name),
            is_bypassed=module.name in bypassed,
        )
        if module.kind == "mlp"
        else replace(module, is_bypassed=module.name in bypassed)
        for module in modules
    )


def _kind_of_linear(module: Module, counts: Iterable[int], *, stateful: bool) -> Kind:
    if module.outputs in counts and is_router_name(module.name):
        return "router"
    return "mixer" if stateful and not MLP.search(module.name) else "mlp"


def _module_of_hybrid(name: str, module: nn.Module, config: PretrainedConfig) -> Module:
    """As `_module`; what holds weights of its own around others, is a convolution or nothing else, belongs to a state."""
    is_around_others = any(True for _ in module.children()) and not expert_matrices(module) and not is_router_name(name)
    if not isinstance(module, nn.Conv1d) and not is_around_others:
        try:
            return _module(name, module, config)
        except _NotCovered:
            if expert_matrices(module):
                raise
    parameters = dict(module.named_parameters(recurse=False))
    num_biases = parameters["bias"].numel() if "bias" in parameters else 0
    num_weights = sum(parameter.numel() for parameter in parameters.values()) - num_biases
    return Module(name=name, kind="state", inputs=1, outputs=num_weights, num_biases=num_biases)


def _module(name: str, module: nn.Module, config: PretrainedConfig) -> Module:
    """What a module holds itself, beside what its own modules hold. A matrix in a class of its own is taken for a router's."""
    parameters = dict(module.named_parameters(recurse=False))
    weights = {key: parameter for key, parameter in parameters.items() if not key.endswith("bias")}
    num_weights = sum(parameter.numel() for parameter in weights.values())
    num_biases = sum(parameter.numel() for parameter in parameters.values()) - num_weights
    dimensions = max((parameter.dim() for parameter in weights.values()), default=1)
    if isinstance(module, nn.Embedding):
        rows, width = module.weight.shape
        return Module(name=name, kind="embedding", inputs=rows, outputs=width)
    if isinstance(module, (nn.Linear, Conv1D)):
        outputs, inputs = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
        kind = "attention" if "attn" in name or "attention" in name else "mlp"
        is_turned = isinstance(module, Conv1D)
        return Module(name=name, kind=kind, inputs=inputs, outputs=outputs, num_biases=num_biases, is_turned=is_turned)
    if is_norm(module):
        return Module(name=name, kind="norm", inputs=1, outputs=num_weights, num_biases=num_biases)
    if dimensions == 1:  # beside modules that it holds, as sinks of attention
        return Module(name=name, kind="state", inputs=1, outputs=num_weights, num_biases=num_biases)
    experts = expert_matrices(module)
    if experts and experts.keys() == weights.keys():
        copies = len(experts[WAY_BACK])
        matrices = tuple(_matrix(key, parameter, module, config) for key, parameter in experts.items())
        per_token = next((n for key in _EXPERTS_PER_TOKEN if (n := getattr(config, key, None))), None)
        if per_token is None:
            raise _NotCovered(f"its config does not say how many experts of {name} a token passes through")
        return Module(
            name=name,
            kind="experts",
            inputs=matrices[-1].outputs,
            outputs=num_weights // copies // matrices[-1].outputs,
            num_biases=num_biases,
            copies=copies,
            copies_per_token=per_token,
            matrices=matrices,
        )
    if len(weights) == 1 and dimensions == 2:
        outputs, inputs = next(iter(weights.values())).shape
        return Module(name=name, kind="router", inputs=inputs, outputs=outputs, num_biases=num_biases)
    sizes = ", ".join(f"{key} {'x'.join(map(str, parameter.shape))}" for key, parameter in parameters.items())
    raise _NotCovered(f"{name} is a {type(module).__name__} with {sizes}")


def _matrix(name: str, parameter: nn.Parameter, module: nn.Module, config: PretrainedConfig) -> Matrix:
    """Of one expert. Whether its inputs are columns or rows is seen by the side that is as wide as the model, else asked."""
    rows, columns = parameter.shape[1:]
    hidden = _number(config, "hidden_size")
    is_way_back = name == WAY_BACK
    is_turned = getattr(module, "is_transposed", False)
    if rows != columns and hidden in (rows, columns):
        is_turned = (rows == hidden) != is_way_back
    inputs, outputs = (rows, columns) if is_turned else (columns, rows)
    return Matrix(name=name, inputs=inputs, outputs=outputs)


def _kv_heads(layer: Sequence[Module], config: PretrainedConfig, hidden: int, queries: int, head_dim: int) -> int:
    """From the size of attention's matrices, which may be one for queries, keys and values."""
    num_weights = sum(module.inputs * module.outputs for module in layer if module.kind == "attention")
    kv_heads, rest = divmod(num_weights - 2 * hidden * queries, 2 * hidden * head_dim)
    is_plausible = not rest and 1 <= kv_heads <= queries // head_dim
    if not is_plausible or kv_heads != getattr(config, "num_key_value_heads", kv_heads):
        names = ", ".join(module.name for module in layer if module.kind == "attention") or "missing"
        raise _NotCovered(f"its attention is {names}")
    return kv_heads


def _mlp(layer: Sequence[Module], hidden: int) -> tuple[int, bool]:
    """Width of what a token passes through, and whether there are two branches to it."""
    experts = [module for module in layer if module.kind == "experts"]
    linear = [module for module in layer if module.kind == "mlp"]
    width = sum(module.copies_per_token * module.matrices[-1].inputs for module in experts)
    has_gate = any(module.matrices[0].outputs == 2 * module.matrices[-1].inputs for module in experts)
    back = next((module for module in reversed(linear) if module.outputs == hidden), None)
    branches: list[Module] = []
    if back:
        before = linear[: linear.index(back)]
        branches = [module for module in before if module.inputs == hidden and module.outputs % back.inputs == 0]
        has_gate = sum(module.outputs for module in branches) == 2 * back.inputs
        width += back.inputs
    # A router or the gate of a shared expert may be a linear layer.
    most = max((module.copies for module in experts), default=0)
    others = [module.name for module in linear if module not in (back, *branches) and module.outputs > most]
    if others or not width or (back and not branches):
        raise _NotCovered(f"its MLP is {', '.join(module.name for module in linear) or 'missing'}")
    return width, has_gate


if __name__ == "__main__":
    main(sys.argv[1:])
