"""A model's folder as what it is: files of a stranger. They are looked at before any library reads them.

A pipe in the place of a file would be waited for without end, a config of gigabytes or of a million brackets would take all
memory or the interpreter's stack, and a model of a billion layers would be planned for minutes.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytune.errors import ModelError, RaytuneError
from raytune.units import GIB, MIB, format_bytes

SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "adapter_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
"""Files of a model that hold a JSON object of a few thousand values at most."""
SETTINGS_UP_TO = 16 * MIB
TABLES_UP_TO = GIB
"""Of JSON files with a vocabulary, merges, or an index of weights; the largest known have 40 MB."""
MAX_DEPTH = 64
_READ = (
    *SETTINGS,
    *("tokenizer.json", "vocab.json", "chat_template.jinja", "tokenizer.model", "spiece.model", "vocab.txt", "merges.txt"),
)
_READ_ENDINGS = (".index.json", ".safetensors")
"""Names, and ends of names, of what is read of a folder; what lies beside them is nobody's business."""

LIMITS = (
    (re.compile(r"(^|_)(layers?|blocks?)$|^n_?layers?$"), 1000),
    (re.compile(r"(^|_)heads?$|^n_head(_kv)?$"), 1 << 16),
    (re.compile(r"(^|_)experts(_per_tok(en)?)?$"), 1 << 16),
    (
        re.compile(
            r"(hidden|intermediate|embedding|ffn|model|inner)_(size|dim)$|^(d_model|d_ff|n_embd|n_inner|ffn_dim|head_dim)$"
        ),
        1 << 24,
    ),
    (re.compile(r"vocab_size"), 1 << 28),
    (re.compile(r"max_position_embeddings|^n_positions$|max_seq_len"), 1 << 40),
)
"""More than any model has of each, by the keys that say so."""
_SHOWN = 60


def check_model_folder(folder: Path) -> None:
    """Refuse a folder whose files cannot be read by those who will: transformers, tokenizers, safetensors. Takes milliseconds.

    Raises:
        ModelError: naming the file.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ModelError(f"The model's folder {folder} cannot be read: {error.strerror}.") from error
    for entry in entries:
        if entry.name not in _READ and not entry.name.endswith(_READ_ENDINGS):
            continue
        path = Path(entry.path)
        try:
            status = entry.stat()
        except OSError as error:
            if entry.name.endswith(".json"):
                raise ModelError(f"{path} cannot be read: {error.strerror}. Copy or download it again.") from error
            continue  # whoever reads weights says more of a link that leads nowhere
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
            raise ModelError(
                f"{path} is {what}, where a model has a file of that name. Give the folder of a model as it was saved."
            )
        if entry.name in SETTINGS:
            values = read_object(path)
            _check_lengths(values, path)
            if entry.name == "config.json":
                check_numbers(values, str(path))
        elif entry.name.endswith((".json", ".jinja")) and status.st_size > TABLES_UP_TO:
            raise ModelError(f"{path} has {format_bytes(status.st_size)}, more than such a file ever has. Download it again.")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a settings file.

    Raises:
        ModelError: if it is none, or too large or too deep to be one.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is no file.")
        if status.st_size > SETTINGS_UP_TO:
            raise ModelError(f"{path} has {format_bytes(status.st_size)}, more than such a file ever has. Download it again.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ModelError(f"{path} is nested deeper than any settings are.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({_short(error)}). Copy or download it again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} does not hold a JSON object. Copy or download it again.")
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level if isinstance(value, dict | list) for inner in _children(value)]
    if level:
        raise ModelError(f"{path} is nested deeper than any settings are ({MAX_DEPTH} levels).")
    return values


def check_numbers(config: Mapping[str, Any], source: str) -> None:
    """Refuse sizes that no model has, at any depth of a `config.json`, before a plan counts or transformers builds so much.

    Raises:
        ModelError: naming the key.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_numbers(value, source)
        limit = next((most for pattern, most in LIMITS if pattern.search(key)), None)
        if limit is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or abs(value) > limit:
            raise ModelError(
                f"{source}: {key} is {_short(value)}, and no model has more than {limit:,}. Give the config.json of a real model."
            )


def is_of_library(error: BaseException) -> bool:
    """Whether a library failed over what it read. The tokenizers library panics over some files, which is no Exception."""
    if isinstance(error, RaytuneError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a library raises about a stranger's files into a `ModelError` that begins with `what`."""
    try:
        yield
    except BaseException as error:
        if not is_of_library(error):
            raise
        raise ModelError(f"{what}: {_short(error, 400) or type(error).__name__}") from error


def _check_lengths(values: Mapping[str, Any], path: Path) -> None:
    """`model_max_length` is compared with lengths long after it was read; a number beyond all means that there is no limit."""
    longest = values.get("model_max_length") if path.name == "tokenizer_config.json" else None
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0):
        raise ModelError(f"{path}: model_max_length must be a number above 0, got {_short(longest)}.")


def _children(value: dict | list) -> Iterator[Any]:
    yield from value.values() if isinstance(value, dict) else value


def _short(value: object, most: int = _SHOWN) -> str:
    """A value or an error on one short line; ten thousand digits cannot even be written out."""
    try:
        text = " ".join(str(value).split())
    except ValueError:
        text = "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_code_is_beside(path: str, file: str, values: Mapping[str, Any]) -> None:
    """Refuse code of another repository: neither the hashes of a folder nor the commit of a hub model would say what it is.

    Args:
        path: of the model, as the user named it.
        file: that holds the values.

    Raises:
        ModelError: naming the repository.
    """
    named = values.get("auto_map") or {}
    for name, references in named.items() if isinstance(named, Mapping) else ():
        for reference in [references] if isinstance(references, str) else references or []:
            repository, is_elsewhere, code = str(reference).rpartition("--")
            if is_elsewhere and repository != path:
                raise ModelError(
                    f"The {file} of {path} takes its {name} from another repository ({reference}), whose code may change "
                    f"from one day to the next. Copy its *.py files beside the model, and write {code!r} there in auto_map."
                )


def check_tokenizer_code(path: str, folder: Path) -> None:
    """`check_code_is_beside` for the tokenizer, whose code has a file of settings of its own."""
    if (folder / "tokenizer_config.json").is_file():
        check_code_is_beside(path, "tokenizer_config.json", read_object(folder / "tokenizer_config.json"))
