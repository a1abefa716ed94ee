"""Presets: defaults for a kind of training, laid below what a user writes. The facts are data: `presets.yaml` beside this."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from raytune.config.problems import Place, shown
from raytune.config.reading.overlays import child_of, laid_over, overlay_at
from raytune.config.sections.adapter import WITHOUT_DECAY, WITHOUT_NOISE
from raytune.config.sections.run import RunConfig
from raytune.config.yaml_nodes import Node, read_nodes

FILE = Path(__file__).with_name("presets.yaml")
RANKED = ("lora", "qlora")
"""Methods that the presets' ranks and targets are meant for: those of others are of another size."""


@dataclass(frozen=True, slots=True)
class Preset:
    purpose: str
    """What it is for."""
    values: Mapping[str, tuple[Any, str]]
    """What it sets, by dotted key, and why."""


@cache
def presets() -> dict[str, Preset]:
    """All presets by name. Read where one is asked for first."""
    tree, problems = read_nodes(FILE.read_text(encoding="utf-8"), Place(FILE.name, 1, 1))
    assert tree is not None, problems
    return {
        name: Preset(facts["for"], {key: (value, why) for key, (value, why) in facts["values"].items()})
        for name, facts in tree.plain.items()
    }


def over_its_preset(tree: Node) -> Node:
    """What was written, laid over the preset that it names; a name that there is none of is the schema's matter."""
    named = child_of(tree, "preset")
    name = named.value if named and isinstance(named.value, str) else ""
    if name not in presets():
        return tree
    method = _written(tree, "adapter", "method") or RANKED[0]
    rows = _written(tree, "adapter", "trainable_tokens")
    place = Place(_place_of(name))
    below = Node({}, place, place)
    trains_rows = _trains_rows(method, _written(tree, "model", "new_tokens"), rows)
    for key, (value, _) in _set_by(name, method, trains_rows, _written(tree, "adapter", "rank")):
        below = laid_over(below, overlay_at(below, key.split("."), Node(value, place, place)), ())
    return laid_over(below, tree, ())


def _written(tree: Node, section: str, key: str) -> Any:
    """A value as it was written; None: nobody wrote it."""
    below = child_of(tree, section)
    found = child_of(below, key) if below else None
    return found.plain if found else None


def is_of_preset(node: Node) -> bool:
    """Whether nobody wrote a node, but a preset brought it."""
    return node.key_place.file in {_place_of(name) for name in presets()}


def _place_of(name: str) -> str:
    return f"preset {name}"


def preset_keys(config: RunConfig) -> Iterator[tuple[str, str, Any, str]]:
    """What the preset of a config sets: section, key in it, value and reason; nothing without one."""
    if not config.preset:
        return
    adapter = config.adapter
    trains_rows = _trains_rows(adapter.method, config.model.new_tokens, getattr(adapter, "trainable_tokens", None))
    for key, (value, why) in _set_by(config.preset, adapter.method, trains_rows, getattr(adapter, "rank", None)):
        section, _, name = key.partition(".")
        yield section, name, value, why


def preset_reasons(config: RunConfig) -> Iterator[str]:
    """A sentence for each value that a config has from its preset."""
    for section, name, value, why in preset_keys(config):
        if getattr(getattr(config, section), name) == value:
            yield f"{section}.{name} is {shown(value)}, set by preset {config.preset}: {why}."


def _trains_rows(method: Any, new_tokens: Any, rows: Any) -> bool:
    """Whether rows of tokens are trained in place of the embedding's.

    Args:
        new_tokens, rows: `model.new_tokens` and `adapter.trainable_tokens`; of these, "auto" and None are the new ones.
    """
    named = new_tokens if rows in (None, "auto") else rows
    return bool(named) and method in (*RANKED, "trainable_tokens")


def _set_by(preset: str, method: Any, trains_rows: bool, rank: Any) -> Iterator[tuple[str, tuple[Any, str]]]:
    """What a preset sets for a method, at the rank that was written, if any was: alpha is twice the rank, whichever it is."""
    left_out = set()
    if method in WITHOUT_NOISE or trains_rows:
        left_out.add("training.neftune_noise_alpha")
    if method in WITHOUT_DECAY:
        left_out.add("training.weight_decay")
    values = presets()[preset].values
    own_rank = values["adapter.rank"][0] if "adapter.rank" in values else 1
    at_rank = rank / own_rank if isinstance(rank, int) and rank > 0 else 1
    for key, (value, why) in values.items():
        if key not in left_out and (not key.startswith("adapter.") or method in RANKED):
            yield key, (value * at_rank if key == "adapter.alpha" else value, why)
