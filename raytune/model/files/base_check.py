"""Whether the files of a base hold the model that its config describes: every tensor, in its shape, and none that would be lost.

transformers initialises what it does not find, and drops what it does not know, with a line in a log. Its own loading report is
the source of what is missing here; asked on the meta device, it needs the headers of the files only. Of the numbers a few rows of
each matrix are read.
"""

import copy
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig

from raytune.errors import ModelError
from raytune.model.files.files import local_files
from raytune.model.files.loading_report import LoadingReport, check_report, in_file, listed, shape_in_words
from raytune.model.files.pretrained import load_config, model_class, without_bars
from raytune.model.files.stopping import check_stops
from raytune.model.files.weight_files import INDEX, StoredTensor, stored_tensors, weight_files, weight_map
from raytune.model.files.weight_numbers import COMPARED_ROWS, NUMBERS, check_numbers
from raytune.plan.model.stored_quantization import stored_quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALWAYS_BUILT = 256
"""Layers that are built, on no storage, however few tensors there are: that takes a second."""
_PART = re.compile(r"^(.*?\.)(\d+)(\..*?\.)(\d+)(\..*)$")
_NUMBER = re.compile(r"\.\d+\.")


def check_base(path: str, revision: str | None, trust_remote_code: bool) -> None:
    """Hold a base's files against the model that they are to become, if they are on this machine. Takes seconds.

    Args:
        path: as in `ModelPlan.path`.

    Raises:
        ModelError: naming the tensor or the file that is wrong.
    """
    folder = local_files(path, revision)
    if folder is None:
        return
    config = load_config(path, revision, trust_remote_code)
    check_files(folder, config, model_class(path, config, revision=revision, trust_remote_code=trust_remote_code))


def check_files(folder: Path, config: PretrainedConfig, own_class: "type[PreTrainedModel]") -> None:
    """Hold a base's files against the model that they are to become: their headers, and a few rows of each matrix.

    Args:
        own_class: of the model, as `load.model_class` finds it.

    Raises:
        ModelError: naming the tensor or the file that is wrong.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds a model and an adapter (adapter_config.json), so that transformers would load the base that the "
            f"adapter names, with the adapter on it, instead of this model. Put the adapter into a folder of its own; to train "
            f"on from it, merge it into its base first: raytune merge ADAPTER --output FOLDER"
        )
    check_stops(folder, config)
    stored = stored_tensors(weight_files(folder))
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if num_layers > max(len(stored), _ALWAYS_BUILT):
        raise ModelError(f"{folder / 'config.json'} says {num_layers} layers, but the files hold {len(stored)} tensors in all.")
    if stored_quantization(config.to_dict()) is not None:
        return  # other tensors than the model's: what is missing is seen when they are loaded
    if own_class.is_remote_code():  # which may name its tensors as it likes
        named_weights = {name: tensor for name, tensor in stored.items() if name.endswith(".weight")}
        _check_formats(named_weights, str(folder))
        check_numbers(named_weights, str(folder))
        return
    tensors = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
    load: Any = own_class.from_pretrained  # whose declared result knows no report
    with without_bars(logging.CRITICAL):  # nor the table of what is missing, which our message says
        try:
            model, info = load(
                None,
                config=copy.deepcopy(config),
                state_dict=tensors,
                device_map={"": "meta"},
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except RuntimeError as error:  # parts that do not fit together, of experts for example
            cause = _said_by_files(folder, stored) or f" {' '.join(str(error).split())[:300]}"
            raise ModelError(
                f"The weights in {folder} do not make the {own_class.__name__} that config.json describes:{cause} Give the whole "
                f"model, or the config.json that belongs to the weights."
            ) from error
        except Exception as error:  # whatever a class raises about values that it cannot be built with
            raise ModelError(
                f"{folder / 'config.json'} describes no {own_class.__name__} that transformers can build: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}. Give the config.json that belongs to the weights."
            ) from error
    weights = _weights_of(model, stored)
    _check_formats(weights, str(folder))
    check_report(LoadingReport.of(info), model, str(folder), stored=stored, hint=_said_by_files(folder, stored))
    check_numbers(weights, str(folder))
    _check_tied(stored, model, str(folder))


def _weights_of(model: "PreTrainedModel", stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Those of some tensors that become parameters of a model; others are buffers, scales or of parts that it does not have."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."

    def is_weight(name: str) -> bool:
        return _PART.match(name) is not None or not names.isdisjoint((name, prefix + name, name.removeprefix(prefix)))

    return {name: tensor for name, tensor in stored.items() if is_weight(name)}


def _check_formats(weights: Mapping[str, StoredTensor], place: str) -> None:
    """Refuse integers and 8-bit floats where a model has weights, which transformers would take for these weights.

    Raises:
        ModelError: naming the first such tensors.
    """
    wrong = [name for name, tensor in weights.items() if tensor.dtype not in NUMBERS]
    if wrong:
        raise ModelError(
            f"The weights in {place} hold {listed(wrong)}{in_file(wrong[0], weights)} as {weights[wrong[0]].dtype}, and "
            f"config.json has no quantization_config that says how such numbers become weights: they would be trained on as they "
            f"are. Give the original weights; with adapter.method: qlora they are quantised while they are loaded."
        )


def _check_tied(stored: Mapping[str, StoredTensor], model: "PreTrainedModel", place: str) -> None:
    """Refuse a head that is another matrix than the embedding where config.json says that they are one.

    transformers would then compute with both and other programs with one, from the base as from what is saved of it.

    Raises:
        ModelError: saying what to set.
    """
    prefix = f"{model.base_model_prefix}."
    tied = [] if not model.config.get_text_config().tie_word_embeddings else list(model.all_tied_weights_keys.items())
    for head, embedding in tied:
        one, other = (
            next((form for form in (name, name.removeprefix(prefix)) if form in stored), None) for name in (head, embedding)
        )
        if one and other and not _are_equal(one, other, stored):
            raise ModelError(
                f"config.json in {place} says tie_word_embeddings, that {one} and {other} are one matrix, but the files "
                f"hold two different ones. Set tie_word_embeddings to false in config.json if the model was trained with two; if "
                f"not, delete {one} from its file."
            )


def _are_equal(one: str, other: str, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether two stored matrices are the same, looked at a few rows at a time."""
    if stored[one].shape != stored[other].shape:
        return False
    with safe_open(stored[one].file, "pt") as first, safe_open(stored[other].file, "pt") as second:
        a, b = first.get_slice(one), second.get_slice(other)
        num_rows = stored[one].shape[0]
        return all(
            torch.equal(a[start : start + COMPARED_ROWS], b[start : start + COMPARED_ROWS].to(a[:1].dtype))
            for start in range(0, num_rows, COMPARED_ROWS)
        )


def _said_by_files(folder: Path, stored: Mapping[str, StoredTensor]) -> str:
    """What the names and shapes in the files tell of what is wrong, in sentences; empty if nothing."""
    hints = []
    index = folder / INDEX
    if index.is_file() and (lacking := [entry for entry in weight_map(index).items() if entry[0] not in stored]):
        name, file = lacking[0]
        more = f" (and {len(lacking) - 1} others)" if len(lacking) > 1 else ""
        hints.append(
            f" {index.name} says that {name} is in {file}, but it is not{more}: that file is incomplete or of another model."
        )
    if gaps := _gaps(stored):
        hints.append(f" Beside their like, {listed(gaps)} {'is' if len(gaps) == 1 else 'are'} not there.")
    if odd := _odd_shapes(stored):
        hints.append(f" Unlike the others of their kind, {listed(odd, '; ')}.")
    return "".join(hints)


def _gaps(stored: Iterable[str]) -> list[str]:
    """Tensors of numbered parts within layers (experts) that other layers or other tensors of those parts have.

    They become one tensor of the model, so that its name would not tell which of them is missing.
    """
    parts: dict[str, dict[tuple[str, str], set[str]]] = {}  # of experts: {(layer, tensor): numbers}
    for name in stored:
        if match := _PART.match(name):
            before, layer, between, number, tensor = match.groups()
            parts.setdefault(f"{before}{{}}{between}{{}}{{}}", {}).setdefault((layer, tensor), set()).add(number)
    gaps = []
    for form, found in parts.items():
        numbers = set().union(*found.values())
        tensors = {tensor for _, tensor in found}
        for layer in {layer for layer, _ in found}:
            for tensor in tensors:
                gaps += [form.format(layer, number, tensor) for number in numbers - found.get((layer, tensor), set())]
    return sorted(gaps)


def _odd_shapes(stored: Mapping[str, StoredTensor]) -> list[str]:
    """Tensors of numbered parts within layers (experts) that have another shape than most of their kind."""
    kinds: dict[str, list[str]] = {}
    for name in stored:
        if _PART.match(name):
            kinds.setdefault(_NUMBER.sub(".*.", name), []).append(name)
    odd = []
    for names in kinds.values():
        usual = Counter(stored[name].shape for name in names).most_common(1)[0][0]
        odd += [
            f"{name}{in_file(name, stored)} is {shape_in_words(stored[name].shape)}, not {shape_in_words(usual)}"
            for name in names
            if stored[name].shape != usual
        ]
    return odd
