"""Credentials in what was written of a config: found in the tree, before values are converted or laid over."""

from raytune.config.problems import SECRET_VALUE, Problem, dotted
from raytune.config.reading.overlays import KeyPath
from raytune.config.yaml_nodes import Node
from raytune.credentials import find_secret, find_secret_value

_NO_PLACE = "it belongs in the node's own login or a mounted file, never in a config"


def secret_problems(node: Node, path: KeyPath = ()) -> list[Problem]:
    """Keys and values that look like credentials, also where another file or an override lies over them."""
    if isinstance(node.value, dict):
        keys_of = [
            Problem(SECRET_VALUE, child.key_place, dotted((*path, part)), f"the key looks like a secret, {found}; {_NO_PLACE}")
            for part, child in node.value.items()
            if (found := find_secret(part))
        ]
        return keys_of + [problem for part, child in node.value.items() for problem in secret_problems(child, (*path, part))]
    if isinstance(node.value, list):
        return [problem for i, child in enumerate(node.value) for problem in secret_problems(child, (*path, i))]
    name = next((part for part in reversed(path) if isinstance(part, str)), "")
    # A key that is one has been told where it stands.
    if isinstance(node.value, str) and (found := find_secret_value(name, node.value)) and not find_secret(name):
        return [Problem(SECRET_VALUE, node.place, dotted(path), f"looks like a secret, {found}; {_NO_PLACE}")]
    return []
