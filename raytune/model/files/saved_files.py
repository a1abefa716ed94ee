"""A saved model before it is given away: which files of its folder belong to it, and whether they are whole and sound.

What training asks of a base is asked here, and more: every number is looked at, not a few rows, since nobody will look again.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from raytune.credentials import find_secrets
from raytune.data.templates.tokenizers import load_tokenizer
from raytune.errors import ModelError
from raytune.model.files.base_check import check_base
from raytune.model.files.base_content import CONTENT_FILE, SAVED_WITH_IT
from raytune.model.files.export import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_QUANTIZATION
from raytune.model.files.files import local_files, resolve_model_path
from raytune.model.files.pretrained import load_config
from raytune.model.files.saved_adapter import adapter_config, refuse_unfit_adapter
from raytune.model.files.stopping import saved_config
from raytune.model.files.weight_files import INDEX, StoredTensor, stored_tensors, weight_files
from raytune.model.files.weight_numbers import check_stored_finite
from raytune.model.parts.rope import ROPE_FILE, saved_rope
from raytune.plan.model.model_folder import SETTINGS, check_model_folder, read_object
from raytune.plan.saved.asked_model import AskedModel, plain_model
from raytune.printable import in_a_line
from raytune.run_folder import MODEL_CARD

CONFIG = "config.json"
LAST = (INDEX, CONFIG, ADAPTER_CONFIG)
"""What makes a folder a model: without them nothing loads it, so they come last and go first."""
_BESIDE = (
    *dict.fromkeys([*SETTINGS, *SAVED_WITH_IT]),
    *(CONTENT_FILE, BASE_QUANTIZATION, ROPE_FILE, MODEL_CARD, "video_preprocessor_config.json"),
)
_TEMPLATES = "additional_chat_templates"
_LEGAL = ("LICENSE", "NOTICE", "USE_POLICY", "COPYING")
_SEARCHED_UP_TO = 4 << 20
"""Bytes of a file of text in which credentials are looked for; larger ones are vocabularies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedModel:
    """A model in a folder, looked at."""

    folder: Path
    is_adapter: bool
    names: tuple[str, ...]
    """Of the files that belong to it; weights first, and last what makes the folder a model."""
    others: tuple[str, ...]
    """What else lies there, hidden files aside."""
    is_held_against_base: bool
    """Whether the base of an adapter is on this machine, and the adapter was seen to fit it."""


def is_of_model(name: str) -> bool:
    """Whether a name is one that a file of a model has, wherever that is. Python files may be anybody's."""
    path = Path(name)
    if str(path.parent) == _TEMPLATES:
        return path.suffix == ".jinja"
    return path.name == name and (
        name in (*_BESIDE, *LAST) or path.suffix == ".safetensors" or name.endswith(".safetensors.index.json")
    )


def look_at_saved(folder: Path, *, trust_remote_code: bool = False) -> SavedModel:
    """Look at a whole model or an adapter as nobody will again. Reads every weight.

    Raises:
        ModelError: naming the file that is missing or damaged, or the tensor that is not finite; a tokenizer or settings of
            generation that cannot be used; or a file that holds a credential.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder. Name a run, or the folder of a model that plain transformers or PEFT loads.")
    is_adapter = (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file()
    weights = _checked_adapter(folder) if is_adapter else _checked_model(folder, trust_remote_code)
    check_stored_finite(weights, str(folder))
    is_held = is_adapter and _held_against_base(folder, trust_remote_code)
    _check_words(folder, is_adapter, trust_remote_code)
    files = sorted({tensor.file.relative_to(folder).as_posix() for tensor in weights.values()})
    beside = [name for name in _beside(folder) if name not in files]
    names = [*files, *sorted(beside, key=lambda name: (name in LAST, name))]
    _refuse_secrets(folder, beside)
    there = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")
    }
    return SavedModel(
        folder=folder,
        is_adapter=is_adapter,
        names=tuple(names),
        others=tuple(sorted(there - {*names})),
        is_held_against_base=is_held,
    )


def _checked_model(folder: Path, trust_remote_code: bool) -> dict[str, StoredTensor]:
    path = resolve_model_path(str(folder), None)
    check_base(path, None, trust_remote_code)
    return stored_tensors(weight_files(folder))


def _checked_adapter(folder: Path) -> dict[str, StoredTensor]:
    check_model_folder(folder)
    adapter_config(folder)
    stored = stored_tensors([folder / ADAPTER_WEIGHTS])
    if not stored:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} holds no tensors: there is nothing in this adapter.")
    return stored


def _held_against_base(folder: Path, trust_remote_code: bool) -> bool:
    """Refuse an adapter that lacks tensors or has others than its base takes; whether that base is here to tell. One with new
    tokens, or over packed numbers, does not fit the base as its files are, and is not looked at."""
    config = adapter_config(folder)
    base, revision = config.base_model_name_or_path or "", config.revision
    if not base or local_files(base, revision) is None or (folder / BASE_QUANTIZATION).is_file():
        return False
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    vocab = load_config(base, revision, trust_remote_code).get_text_config().vocab_size
    if has_tokenizer and len(load_tokenizer(str(folder), None, trust_remote_code)) > vocab:
        return False
    whole = plain_model(base, "fp32", revision=revision, trust_remote_code=trust_remote_code, rope=saved_rope(folder))
    refuse_unfit_adapter(AskedModel(name="pushed", model=whole, adapter=str(folder)))
    return True


def _check_words(folder: Path, is_adapter: bool, trust_remote_code: bool) -> None:
    """Refuse a tokenizer that is missing or cannot be used, a template that fails, and settings of generation that fail."""
    saved_config(folder)
    if is_adapter and not (folder / "tokenizer_config.json").is_file():
        return  # it has its base's
    tokenizer = load_tokenizer(str(folder), None, trust_remote_code)
    if tokenizer.chat_template:
        _check_template(tokenizer, folder)


def _check_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a template raises
        raise ModelError(f"The chat template in {folder} fails on a plain question: {in_a_line(error)}. Mend it.") from error
    if "Hello" not in text:
        raise ModelError(f"The chat template in {folder} leaves out what a user says. Mend it.")


def _beside(folder: Path) -> Iterator[str]:
    """What belongs to a model besides its weights; code only where a config names it."""
    for path in sorted(folder.iterdir()):
        if path.name in (*_BESIDE, *LAST) or path.name.startswith(_LEGAL):
            if path.is_file():
                yield path.name
        elif path.suffix == ".py" and _names_code(folder):
            yield path.name
    for path in sorted((folder / _TEMPLATES).glob("*.jinja")):
        yield path.relative_to(folder).as_posix()


def _names_code(folder: Path) -> bool:
    configs = [folder / name for name in (CONFIG, "tokenizer_config.json")]
    return any("auto_map" in read_object(path) for path in configs if path.is_file())


def _refuse_secrets(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        if path.stat().st_size > _SEARCHED_UP_TO or name == "tokenizer.json":
            continue
        text = path.read_text(errors="replace")
        if found := next((secret for secret in find_secrets(text) if secret.is_certain), None):
            line = text.count("\n", 0, found.start) + 1
            raise ModelError(f"{path}:{line} holds what looks like {found}, which would be given away. Take it out.")


def without_local_base(folder: Path, base: str | None) -> tuple[str, str] | None:
    """The base that an adapter names where that is a folder of this machine, and its config with a name that others can use.

    Args:
        base: the name; None: that of the folder.

    Returns:
        The name, and the text of `adapter_config.json`; None if it says the right thing already.
    """
    values = read_object(folder / ADAPTER_CONFIG)
    said = str(values.get("base_model_name_or_path") or "")
    is_local = said.startswith(("/", "~", ".")) or Path(said).is_dir() or "://" in said
    name = base or (said.rstrip("/").rpartition("/")[2] if is_local else said)
    if name == said:
        return None
    return name, json.dumps(dict(values) | {"base_model_name_or_path": name}, indent=2, sort_keys=True) + "\n"
