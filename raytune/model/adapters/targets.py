"""Names of an adapter section resolved against a model: PEFT's rules, of which `plan.methods.targets` has the pure part."""

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raytune.errors import ModelError
from raytune.model.attention.attention import keeps_state
from raytune.model.parts.experts import expert_parameters, linear_routers, names_of_experts
from raytune.model.parts.kernels import bypassed_layers
from raytune.plan.methods.targets import NamesTargets, check_is_seen, is_within_saved
from raytune.plan.model.module_names import has_name, matches

ATTENTION = re.compile(r"attn|attention")
MLP = re.compile(r"mlp|ffn|feed_forward|moe|expert")


def target_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers that an update can be added to; the output head is not among them."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head  # bitsandbytes' layers are subclasses of nn.Linear
    ]


def targets(model: PreTrainedModel, asked: str | list[str], *, or_nothing: bool) -> list[str] | str:
    """PEFT's `target_modules`.

    Args:
        or_nothing: whether a group may be empty, because it has fused experts instead.
    """
    names = target_names(model, asked, or_nothing=or_nothing)
    if isinstance(asked, list):
        return list(asked)
    # For a model with names of experts PEFT would keep the last parts of the names that a regular expression matches, and so
    # take other layers in as well.
    as_names = asked in GROUPS or names_of_experts(model.config.model_type)
    return shortest_suffixes(names, [name for name, _ in model.named_modules()]) if as_names else asked


def target_names(model: PreTrainedModel, asked: str | list[str], *, or_nothing: bool = False) -> list[str]:
    """Full names of the layers that a group, names or a regular expression mean.

    Raises:
        ModelError: if they mean none, or one whose update would not be seen.
    """
    layers = target_layers(model)
    if isinstance(asked, str) and asked in GROUPS:
        chosen = layers_of_group(model, asked)
        if not or_nothing:
            check_matches("adapter.target_modules", asked, chosen, layers)
        return chosen
    everything = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding)]
    found = []
    for name in [asked] if isinstance(asked, str) else asked:
        is_pattern = isinstance(asked, str)
        matching = [
            full
            for full in everything
            if (matches(name, full, "adapter.target_modules") if is_pattern else has_name(full, [name]))
        ]
        check_matches("adapter.target_modules", name, matching, layers)
        _check_are_seen(matching, _bypassed(model), names_of_experts(model.config.model_type))
        found += matching
    return list(dict.fromkeys(found))


GROUPS: dict[str, Callable[[str, bool], bool]] = {
    "all-linear": lambda name, has_states: True,
    "attention": lambda name, has_states: ATTENTION.search(name) is not None,
    "mlp": lambda name, has_states: (
        ATTENTION.search(name.rpartition(".")[0]) is None and MLP.search(name) is not None
        if has_states
        else ATTENTION.search(name) is None  # OPT's lie in the layer itself
    ),
}
"""Whether a layer of a name belongs to a group, if any layer of that name can be a target; where layers carry state, some are of
neither attention nor an MLP."""


def layers_of_group(model: PreTrainedModel, group: str) -> list[str]:
    """Full names of the layers in a group, without those whose update would not be seen."""
    layers, of_experts = target_layers(model), names_of_experts(model.config.model_type)
    left_out = {*linear_routers(model)} | _bypassed(model) | {name for name in layers if name.rpartition(".")[2] in of_experts}
    has_states = keeps_state(type(model), model.config)
    return [name for name in layers if name not in left_out and GROUPS[group](name, has_states)]


def _bypassed(model: PreTrainedModel) -> set[str]:
    return {*bypassed_layers(model)} if keeps_state(type(model), model.config) else set()


def _check_are_seen(matching: list[str], bypassed: set[str], of_experts: tuple[str, ...]) -> None:
    for name in matching:
        check_is_seen(name, of_experts, is_bypassed=name in bypassed)


def check_named(model: PreTrainedModel, adapter: NamesTargets) -> None:
    """Refuse `exclude_modules` and `modules_to_save` that name nothing in a model.

    Raises:
        ModelError: naming what is near.
    """
    modules = [name for name, _ in model.named_modules() if name]
    everything = [*modules, *expert_parameters(model)]
    for name in adapter.exclude_modules:
        check_matches("adapter.exclude_modules", name, [full for full in everything if has_name(full, [name])], everything)
    for name in adapter.modules_to_save:
        check_matches("adapter.modules_to_save", name, [full for full in modules if full.endswith(name)], modules)


def peft_names(model: PreTrainedModel, adapter: NamesTargets) -> dict[str, Any]:
    """The names of a section as PEFT's configurations have them, for methods that add something to layers only.

    Raises:
        ModelError: if one of them means nothing in this model.
    """
    check_named(model, adapter)
    return {
        "target_modules": targets(model, adapter.target_modules, or_nothing=False),
        "exclude_modules": adapter.exclude_modules or None,
        "modules_to_save": adapter.modules_to_save or None,
    }


def unchanged_experts(model: PreTrainedModel, adapter: NamesTargets, updated: Sequence[str] = ()) -> list[str]:
    """Names of the parameters of fused experts that nothing of an adapter changes.

    Args:
        updated: names of the parameters that get an update.
    """
    return [name for name in expert_parameters(model) if name not in updated and not is_within_saved(name, adapter)]


def shortest_suffixes(chosen: list[str], everything: list[str], num_parts: int = 1) -> list[str]:
    """Names that PEFT's rule resolves to exactly `chosen`: `q_proj`, or `attn.c_proj` where `c_proj` alone would take more.

    Args:
        num_parts: of a name, at least.
    """
    wanted, suffixes = set(chosen), set()
    for name in chosen:
        parts = name.split(".")
        for start in range(len(parts) - num_parts, -1, -1):
            suffix = ".".join(parts[start:])
            if suffix in suffixes or all(full in wanted for full in everything if has_name(full, [suffix])):
                suffixes.add(suffix)
                break
    return sorted(suffixes)


def check_matches(setting: str, asked: str, matching: list[str], names: list[str]) -> None:
    if matching:
        return
    last_parts = sorted({name.rpartition(".")[2] for name in names} - {"0"})
    near = get_close_matches(asked.rpartition(".")[2], last_parts, n=3, cutoff=0.5)
    hint = f"Near names: {', '.join(near)}. " if near else ""
    shown = ", ".join(last_parts[:20]) + (", ..." if len(last_parts) > 20 else "")
    raise ModelError(f"{setting}: {asked!r} matches no layer of the model. {hint}It has {shown}.")
