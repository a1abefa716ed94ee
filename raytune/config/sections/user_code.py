"""Names of the user's own functions, as a config writes them: `my_losses:focal` beside the file that says so, or a path."""

import os
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from raytune.config.sections.section import Text
from raytune.config.yaml_nodes import Node
from raytune.user_code import FILE_ENDING, parts_of

CodeName = Annotated[
    Text,
    Field(
        pattern=r"^[^\s:][^:]*:[^\W\d]\w*(\.[^\W\d]\w*)*$",
        title="a function as module:function or file.py:function",
        examples=["my_losses.py:focal"],
    ),
]


def with_files(tree: Node) -> Node:
    """A tree whose names of modules that are files are their paths: a file beside the config that names it wins, then one in the
    working directory. What is neither stays, and is an installed module or a mistake."""
    if not isinstance(tree.value, dict):
        return tree
    found = dict(tree.value)
    strategy = found.get("strategy")
    if strategy and isinstance(strategy.value, dict) and (objective := strategy.value.get("objective")):
        found["strategy"] = replace(strategy, value={**strategy.value, "objective": _objective(objective)})
    if data := found.get("data"):
        found["data"] = _data(data)
    if (callbacks := found.get("callbacks")) and isinstance(callbacks.value, list):
        found["callbacks"] = replace(callbacks, value=[_with_file(each) for each in callbacks.value])
    if evaluation := found.get("evaluation"):
        found["evaluation"] = _evaluation(evaluation)
    return replace(tree, value=found)


def _data(node: Node) -> Node:
    augment = node.value.get("augment") if isinstance(node.value, dict) else None
    if augment is None or not isinstance(augment.value, dict) or "function" not in augment.value:
        return node
    changed = replace(augment, value={**augment.value, "function": _with_file(augment.value["function"])})
    return replace(node, value={**node.value, "augment": changed})


def _evaluation(node: Node) -> Node:
    suites = node.value.get("suites") if isinstance(node.value, dict) else None
    if suites is None or not isinstance(suites.value, list):
        return node
    return replace(node, value={**node.value, "suites": replace(suites, value=[_suite(each) for each in suites.value])})


def _suite(node: Node) -> Node:
    metrics = node.value.get("metrics") if isinstance(node.value, dict) else None
    if metrics is None or not isinstance(metrics.value, list):
        return node
    return replace(node, value={**node.value, "metrics": replace(metrics, value=[_with_file(each) for each in metrics.value])})


def _objective(node: Node) -> Node:
    if isinstance(node.value, dict) and "function" in node.value:
        return replace(node, value={**node.value, "function": _with_file(node.value["function"])})
    return _with_file(node)


def _with_file(node: Node) -> Node:
    if not isinstance(node.value, str):
        return node
    module, name = parts_of(node.value)
    if not module or module.endswith(FILE_ENDING):
        return node
    own = os.path.dirname(node.place.file) if node.place.line else ""
    path = f"{module.replace('.', '/')}{FILE_ENDING}"
    file = next((file for folder in (own, "") if os.path.isfile(file := os.path.join(folder, path))), None)
    if file is None:
        return node
    here = os.path.relpath(file)  # as a job finds it, which has this folder elsewhere
    return replace(node, value=f"{file if here.startswith(os.pardir) else here}:{name}")
