"""The safetensors files of a model as their headers tell them: which there are, and names and shapes of their tensors."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from raytune.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
_DOWNLOAD_AGAIN = "Download or copy it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies, its shape and its number format."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it, such as `BF16`."""


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights of a model from, in the order of their names.

    Raises:
        ModelError: if there are none, or the index names one that is not there.
    """
    named = _file_named_by_config(folder)
    for file in [folder / name for name in ((named,) if named else (WEIGHTS, INDEX))]:
        if file.is_symlink() and not file.exists():
            raise ModelError(f"{file} is a link to {file.readlink()}, which is not there. {_DOWNLOAD_AGAIN}.")
    held = {file.name for file in folder.glob("*") if file.is_file()}
    return [folder / name for name in weight_names(folder, held, str(folder))]


def weight_names(folder: Path, held: Collection[str], place: str) -> list[str]:
    """The names of the files that transformers reads the weights of a model from, in their order.

    Args:
        folder: with its config, and its index if it has one.
        held: the names of all files of the model, wherever they are.
        place: where they are, as one would name it to transformers.

    Raises:
        ModelError: if there are no such files, or the index names one that is not there.
    """
    named = _file_named_by_config(folder)
    single, index = (named, named) if named else (WEIGHTS, INDEX)
    if single in held and single.endswith(".safetensors"):
        return [single]
    if index in held:
        names = sorted(set(weight_map(folder / index).values()))
        lacking = [name for name in names if name not in held]
        if lacking:
            others = f", nor are {len(lacking) - 1} others" if len(lacking) > 1 else ""
            raise ModelError(
                f"{Path(place) / index} says that weights are in {lacking[0]}, which is not there{others}. {_DOWNLOAD_AGAIN}."
            )
        return names
    raise ModelError(
        f"{place} must hold weights as {named or WEIGHTS} or {INDEX} with its files; found {_found_instead(held, place)}."
    )


def weight_map(index: Path) -> dict[str, str]:
    """In which file each tensor is, as an index says it.

    Raises:
        ModelError: if it is no such index.
    """
    try:
        files = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} is not an index of weights ({type(error).__name__}: {error}). {_DOWNLOAD_AGAIN}.") from error
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(f"{index} is not an index of weights: weight_map names no files. {_DOWNLOAD_AGAIN}.")
    if outside := [name for name in files.values() if Path(name).name != name]:
        raise ModelError(f"{index} names {outside[0]!r}, which is no file beside it.")
    return files


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Every tensor of some files, from their headers; no weight is read.

    Raises:
        ModelError: naming the file that is cut off or is not safetensors, or the tensor that lies in two of them.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="np") as file:  # holds each tensor's place against the size of the file
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                own = {
                    name: StoredTensor(file=path, shape=tuple(part.get_shape()), dtype=part.get_dtype())
                    for name, part in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} ({_size(path)}) cannot be read: {_damage(path, error)}. {_DOWNLOAD_AGAIN}.") from error
        if twice := next((name for name in own if name in tensors), None):
            raise ModelError(
                f"{twice} is in {tensors[twice].file} and in {path.name} beside it: which of the two belongs to the model, "
                f"nothing says. One of the files is of another model; {_DOWNLOAD_AGAIN.lower()}."
            )
        tensors |= own
    return tensors


def _file_named_by_config(folder: Path) -> str | None:
    """A config may name the file of its weights itself."""
    try:
        config: Any = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None  # whoever needs the config says what is wrong with it
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if name is not None and (not isinstance(name, str) or Path(name).name != name):
        raise ModelError(f"{folder / 'config.json'}: transformers_weights must name a file beside it, got {str(name)[:60]!r}.")
    return name


def _found_instead(held: Collection[str], place: str) -> str:
    pickles = sorted(name for name in held if name.endswith((".bin", ".pt", ".pth")))
    others = sorted(name for name in held if name.endswith((".safetensors", ".gguf")))
    if pickles:
        return (
            f"{', '.join(pickles[:5])}, which are pickles: loading them can run code. Convert them with transformers, if you "
            f"trust the file: AutoModelForCausalLM.from_pretrained({place!r}).save_pretrained(NEW_FOLDER)"
        )
    return f"only {', '.join(others[:5])}" if others else "none"


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file, in words; the library's own where there are no better ones."""
    try:
        with path.open("rb") as file:
            start = file.read(8 + len(_POINTER))
    except OSError:
        return str(error)
    if not start:
        return "it is empty"
    if start.startswith(_POINTER):
        return "it is a pointer of Git LFS, not the file itself (git lfs pull fetches it)"
    if start[8:9] == b"{" and (needed := _bytes_needed(path)) != path.stat().st_size:
        return f"its header says that it has {'more' if needed is None else f'{needed} bytes'}: it is cut off or was appended to"
    return f"it is damaged, or not in the format safetensors ({error})"


def _bytes_needed(path: Path) -> int | None:
    """Size of a file by its header; None if not even that is whole, and the size itself if it tells none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if 8 + header_bytes > size:
            return None
        header = file.read(header_bytes)
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        needed = 8 + header_bytes + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return size
    return needed


def _size(path: Path) -> str:
    return f"{path.stat().st_size} bytes" if path.exists() else "missing"
