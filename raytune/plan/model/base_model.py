"""Where `model.base` lies on this machine, and its shape."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from raytune.errors import ModelError
from raytune.hub.cache import cached_snapshot, default_hub_cache
from raytune.plan.model.architectures import has_reader, model_shape
from raytune.plan.model.model_folder import check_model_folder, read_object
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.stored_quantization import stored_quantization

DEMO = "demo"
"""Name of the model that ships with raytune, in configs and plans."""
DEMO_BASE = Path(__file__).parents[2] / "model" / "demo_base"
_DROPOUT = re.compile(r"(dropout|pdrop|drop_?path|layerdrop)(_rate|_prob|_p)?$")
"""Keys of a `config.json` that are rates of dropout, as models call them."""
BUILD_SECONDS = 300
"""Limit for the process that builds a model of an architecture without a reader; most of it is importing torch, and the rest has
limits of its own."""


def read_model_shape(
    base: str, revision: str | None = None, hub_cache: Path | None = None, *, trust_remote_code: bool = False
) -> ModelShape:
    """The shape of `model.base`: the demo model, a local folder, or a hub model that lies in the local cache. Never downloads.

    An architecture that `architectures` has no reader for is built by transformers, without storage, in a process of its own.

    Args:
        base: as in the config.
        revision: branch, tag or commit of a hub model.
        hub_cache: Hugging Face's cache; default: where its libraries keep it.
        trust_remote_code: whether Python code beside the weights may be run. If it is, it decides the modules.

    Raises:
        ModelError: if there is no `config.json`, or no plan for such a model.
    """
    path = find_config(base, revision, hub_cache or default_hub_cache())
    check_model_folder(path.parent)
    config = read_object(path)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"model.base {base!r}: {path} names no model_type. Give the folder of a model saved by transformers.")
    _check_dropouts(config, path)
    if has_reader(config) and not (trust_remote_code and "auto_map" in config):
        shape = model_shape(config, str(path))
    else:
        shape = _built_shape(path.parent, json.dumps(config), trust_remote_code)
    return replace(shape, stored_quantization=stored_quantization(config))


def _check_dropouts(config: Mapping[str, Any], path: Path) -> None:
    """Refuse rates of dropout that are none: nobody reads them before the first step of training.

    Raises:
        ModelError: naming the key.
    """
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("config"):
            _check_dropouts(value, path)
        elif _DROPOUT.search(key) and _is_no_share(value):
            raise ModelError(
                f"{path}: {key} must be a share of at least 0 and below 1, got {json.dumps(value)}: training drops that share of "
                f"numbers. Set it to 0.0 in config.json, or to what the model was trained with."
            )


def _is_no_share(value: Any) -> bool:
    """Flags, lists and null under such a name are other settings."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    return isinstance(value, str) or not 0 <= value < 1


@lru_cache
def _built_shape(folder: Path, text: str, trust_remote_code: bool) -> ModelShape:  # `text`: a changed config is another model
    """The shape of the model that transformers builds of a folder's `config.json`. Takes seconds.

    Raises:
        ModelError: with what that process said.
    """
    # By name, because it imports torch and lies above this floor.
    command = [sys.executable, "-m", "raytune.model.meta_shape", str(folder), *["--trust-remote-code"] * trust_remote_code]
    search_path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        process = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": search_path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=True,
        )
        answer = json.loads(process.stdout)
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines()
        raise ModelError(f"{folder}: the model could not be built to plan it: {said[-1] if said else error}") from error
    if "error" in answer:
        raise ModelError(answer["error"])
    return TypeAdapter(ModelShape).validate_python(answer["shape"])


def model_files(path: str, revision: str | None = None, *, with_code: bool = False) -> str:
    """What transformers is to open for `ModelPlan.path` on the machine that asks.

    For `demo` that is wherever raytune lies; for a hub id the folder in the cache, so that no rank asks the hub for what is here.
    The id itself if it is not, or if code beside it may be run: a config may name that code by the id, and only the id has the
    commit that was allowed.
    """
    if path == DEMO:
        return str(DEMO_BASE)
    snapshot = cached_snapshot(path, revision) if is_on_hub(path) and not with_code else None
    return str(snapshot or path)


def is_on_hub(path: str) -> bool:
    """Whether `ModelPlan.path` is a hub id."""
    return path != DEMO and not Path(path).expanduser().is_dir()


def find_config(base: str, revision: str | None, hub_cache: Path) -> Path:
    """The path of a model's `config.json` on this machine.

    Raises:
        ModelError: if it is not here.
    """
    if base == DEMO:
        return DEMO_BASE / "config.json"
    folder = Path(base).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder / "config.json"
        raise ModelError(f"model.base: the folder {folder} has no config.json. Give the folder of a model saved by transformers.")
    if snapshot := cached_snapshot(base, revision, hub_cache):
        return snapshot / "config.json"
    raise ModelError(
        f"model.base {base!r}{f' at revision {revision!r}' if revision else ''} is neither a folder nor in the Hugging Face "
        f"cache {hub_cache}. Download it first (hf download {base}{f' --revision {revision}' if revision else ''}), or give a "
        f"local folder."
    )
