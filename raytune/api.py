"""The verbs of the command line as functions, for scripts and notebooks."""

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from raytune.config.load import as_one_run, config_from, load_config
from raytune.config.run import RunConfig
from raytune.launch.progress import show_progress
from raytune.launch.result import RunResult
from raytune.launch.run import run

File = str | PathLike[str]


def train(config: File | Sequence[File] | Mapping[str, Any] | RunConfig, *, progress: bool = True, **overrides: Any) -> RunResult:
    """Train as `raytune train` does: plan, start or join a Ray cluster, and leave weights in the run folder.

    Args:
        config: a YAML file, several that are laid over each other, a mapping with the same keys, or a `RunConfig`.
        progress: show the run on standard error while it goes on.
        overrides: keys laid over it and validated like it: `name="short", training={"max_steps": 20}`, or with dotted keys
            `**{"training.max_steps": 20}`.

    Returns:
        The finished run: `metrics`, `model_path`, `folder`, `plan`, `history`, `comparison`. A finished run of the same name and
        settings is returned without training it again.

    Raises:
        raytune.errors.UserError: before anything is started, with every problem and what to do about it.
        raytune.errors.RaytuneError: if training failed.
    """
    texts = [f"{key}={json.dumps(value, default=fspath)}" for key, value in _leaves(overrides)]
    if isinstance(config, RunConfig | Mapping):
        resolved = config_from(config, texts)
    else:
        paths = [config] if isinstance(config, str | PathLike) else config
        resolved = load_config([str(path) for path in paths], texts)
    resolved = as_one_run(resolved)
    return run(resolved, watch=show_progress) if progress else run(resolved)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
