"""Whether the files of a base hold the model that its config describes: every tensor, in its shape, and none that would be lost.

transformers initialises what it does not find, and drops what it does not know, with a line in a log. Its own loading report is
the source of what is missing here; asked on the meta device, it needs the headers of the files only. Of the numbers a few rows of
each matrix are read.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from raytune.errors import ModelError
from raytune.model.files import local_files
from raytune.model.pretrained import load_config, model_class
from raytune.model.stopping import check_stops
from raytune.model.weight_files import INDEX, StoredTensor, stored_tensors, weight_files, weight_map
from raytune.plan.stored_quantization import stored_quantization

_SHOWN = 5
_ALWAYS_BUILT = 256
"""Layers that are built, on no storage, however few tensors there are: that takes a second."""
_LAYER = re.compile(r"^(.*?\.)(\d+)\.")
_PART = re.compile(r"^(.*?\.)(\d+)(\..*?\.)(\d+)(\..*)$")
_NUMBER = re.compile(r"\.\d+\.")
_NUMBERS = ("F64", "F32", "F16", "BF16")
"""Number formats of safetensors that weights may have as they are. Integers are packed, and like 8-bit floats need a scale."""
_COMPARED_ROWS = 4096
"""Of two matrices, held at once."""
_OLD_BUFFERS = (".masked_bias", ".inv_freq", ".position_ids")
"""What transformers once saved and computes today, for models whose class does not list it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingReport:
    """What transformers says of weights that it loaded, by the names of the model's `state_dict`. Tied heads are settled."""

    missing: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """(name, shape in the file, shape in the model)."""
    unexpected: tuple[str, ...]

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "LoadingReport":
        """
        Args:
            info: what `from_pretrained(..., output_loading_info=True)` gives beside the model.
        """
        mismatched = {(name, tuple(stored), tuple(own)) for name, stored, own in info["mismatched_keys"]}
        return cls(
            missing=tuple(sorted(info["missing_keys"])),
            mismatched=tuple(sorted(mismatched)),
            unexpected=tuple(sorted(info["unexpected_keys"])),
        )


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


def check_files(folder: Path, config: PretrainedConfig, own_class: type[PreTrainedModel]) -> None:
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
        _check_numbers(named_weights, str(folder))
        return
    tensors = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
    load: Any = own_class.from_pretrained  # whose declared result knows no report
    with _quiet():
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
    _check_numbers(weights, str(folder))
    _check_tied(stored, model, str(folder))


def _weights_of(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
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
    wrong = [name for name, tensor in weights.items() if tensor.dtype not in _NUMBERS]
    if wrong:
        raise ModelError(
            f"The weights in {place} hold {_listed(wrong)}{_in_file(wrong[0], weights)} as {weights[wrong[0]].dtype}, and "
            f"config.json has no quantization_config that says how such numbers become weights: they would be trained on as they "
            f"are. Give the original weights; with adapter.method: qlora they are quantised while they are loaded."
        )


def _check_numbers(weights: Mapping[str, StoredTensor], place: str) -> None:
    """Refuse matrices that hold one number everywhere, or one that is none among the few rows that are looked at.

    `check_finite` looks at all of them once they are loaded.

    Raises:
        ModelError: naming the first such tensors.
    """
    matrices: dict[Path, list[str]] = {}
    for name, tensor in weights.items():
        is_matrix = len(tensor.shape) > 2 or (len(tensor.shape) == 2 and name.endswith(".weight"))
        is_norm = "norm" in name.lower()  # of queries and keys, a row per head: 1 everywhere before it is trained
        has_rows = tensor.shape[:1] > (1,)
        if is_matrix and not is_norm and has_rows and tensor.dtype in _NUMBERS:
            matrices.setdefault(tensor.file, []).append(name)
    constant: dict[str, float] = {}
    infinite: list[str] = []
    for file, names in matrices.items():
        with safe_open(file, "pt") as opened:
            for name in names:
                matrix, shape = opened.get_slice(name), weights[name].shape
                sample = _sample(matrix, shape)
                if not sample.isfinite().all():
                    infinite.append(name)
                elif _holds_one_number(sample) and _is_filled_with(sample[0], matrix, shape[0]):
                    constant[name] = float(sample[0])
    if infinite:
        raise _not_finite(infinite, place)
    if constant:
        names = list(constant)
        raise ModelError(
            f"The weights in {place} hold the same number everywhere in {_listed(names)}{_in_file(names[0], weights)}, "
            f"{constant[names[0]]:g}: the file was not written to its end or not filled, and such a layer says nothing. Download "
            f"or convert the model again. If it is meant, of layers that were inserted, start them with small random numbers."
        )


def _sample(matrix: Any, shape: Sequence[int]) -> torch.Tensor:
    """Some rows of a stored matrix, or of one of several that lie in one tensor: the first, the middle and the last."""
    inner = (slice(0, 1),) * (len(shape) - 2)
    return torch.cat([matrix[(slice(row, row + 1), *inner)].flatten() for row in {0, shape[0] // 2, shape[0] - 1}])


def _holds_one_number(tensor: torch.Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _is_filled_with(number: torch.Tensor, matrix: Any, num_rows: int) -> bool:
    """Whether a stored matrix holds one number everywhere, looked at a few rows at a time."""
    parts = (matrix[start : start + _COMPARED_ROWS] for start in range(0, num_rows, _COMPARED_ROWS))
    return all(bool((part == number).all()) for part in parts)


def _check_tied(stored: Mapping[str, StoredTensor], model: PreTrainedModel, place: str) -> None:
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
            torch.equal(a[start : start + _COMPARED_ROWS], b[start : start + _COMPARED_ROWS].to(a[:1].dtype))
            for start in range(0, num_rows, _COMPARED_ROWS)
        )


def check_report(
    report: LoadingReport,
    model: PreTrainedModel,
    place: str,
    *,
    stored: Mapping[str, StoredTensor] | None = None,
    hint: str = "",
) -> None:
    """Refuse weights that are not those of the model.

    Args:
        model: that they were loaded into.
        place: folder or hub id, for messages.
        stored: the tensors by their names in the files, where these are known.

    Raises:
        ModelError: if a tensor is missing, has another shape, or is of a part that the model has but computes without it.
    """
    name = type(model).__name__
    if report.missing:
        raise ModelError(
            f"The weights in {place} lack {_listed(report.missing)}, which {name} has by config.json. It would be trained from "
            f"random numbers.{hint} Give the whole model, or mend its config.json."
        )
    if report.mismatched:
        tensors = [
            f"{key}{_in_file(key, stored)} is {_shape(in_file)} there and {_shape(own)} by config.json"
            for key, in_file, own in report.mismatched
        ]
        raise ModelError(
            f"The weights in {place} have other shapes than {name} by config.json: {_listed(tensors, '; ')}.{hint} "
            f"Give the config.json that belongs to the weights."
        )
    if lost := lost_tensors(report.unexpected, model):
        raise ModelError(
            f"The weights in {place} hold {_listed(lost)}{_in_file(lost[0], stored)}, for which {name} by config.json has no "
            f"place, so that another model than the saved one would be trained. Give the config.json that belongs to the "
            f"weights; merge an adapter first; if those tensors are to be dropped, save the model without them: "
            f"AutoModelForCausalLM.from_pretrained({place!r}).save_pretrained(NEW_FOLDER)"
        )


def lost_tensors(unexpected: Sequence[str], model: PreTrainedModel) -> list[str]:
    """Tensors of the files that belong to parts which the model has, or to more layers of them, and that it computes without.

    Other parts of a larger model (a vision tower, a value head) are not the language model's, and what it computes itself
    (buffers) needs no file.
    """
    modules = {name for name, _ in model.named_modules() if name}
    buffers = {name for name, _ in model.named_buffers()}
    prefix = f"{model.base_model_prefix}."
    layers = {match.group(1) for name in modules if (match := _LAYER.match(f"{name}."))}
    config = model.config.get_text_config()
    # Layers behind the last one that only predict further tokens (DeepSeek-V3, GLM): nothing in transformers computes them.
    num_layers = getattr(config, "num_hidden_layers", 0) or 0
    num_next = getattr(config, "num_nextn_predict_layers", 0) or 0

    def matters(name: str) -> bool:
        if name.endswith(_OLD_BUFFERS):
            return False
        own = next((form for form in (name, prefix + name, name.removeprefix(prefix)) if _is_of(form)), None)
        return own is not None and own not in buffers and not _is_next_token_layer(own)

    def _is_of(name: str) -> bool:
        layer = _LAYER.match(name)
        return name.rpartition(".")[0] in modules or (layer is not None and layer.group(1) in layers)

    def _is_next_token_layer(name: str) -> bool:
        layer = _LAYER.match(name)
        return layer is not None and num_layers <= int(layer.group(2)) < num_layers + num_next

    return [name for name in unexpected if matters(name)]


def check_finite(model: nn.Module, place: str) -> None:
    """Refuse weights that hold numbers which are none. Of a sharded parameter, a rank sees its own share.

    Raises:
        ModelError: naming the first such tensor.
    """
    names, extremes = [], []
    for name, tensor in _floating(model):
        names.append(name)
        extremes.append(torch.stack(torch.aminmax(tensor.detach())).float().cpu())
    if not names:
        return
    wrong = ~torch.stack(extremes).isfinite().all(dim=1)
    if wrong.any():
        found = [name for name, is_wrong in zip(names, wrong.tolist(), strict=True) if is_wrong]
        raise _not_finite(found, place)


def _not_finite(names: Sequence[str], place: str) -> ModelError:
    return ModelError(
        f"The weights in {place} hold numbers that are not finite (NaN or infinity) in {_listed(names)}: the files are damaged, "
        f"or were saved from a training that had diverged. Give intact weights."
    )


def _floating(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a model holds of weights as floating-point numbers: of quantised ones, their scales."""
    for name, parameter in model.named_parameters():
        share = getattr(parameter, "ds_tensor", None)  # what ZeRO-3 leaves on this rank
        tensors = _scales(parameter) if is_packed(parameter) else [parameter if share is None else share]
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
                yield name, tensor


def is_packed(parameter: Any) -> bool:
    """Whether its numbers are bitsandbytes' 4-bit ones, which may lie in a floating-point dtype and are none, or 8-bit ones."""
    return getattr(parameter, "quant_state", None) is not None or getattr(parameter, "SCB", None) is not None


def _scales(parameter: Any) -> list[torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return [parameter.SCB]
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [state.absmax, *nested]


def _in_file(name: str, stored: Mapping[str, StoredTensor] | None) -> str:
    return f" (in {stored[name].file.name})" if stored and name in stored else ""


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
        hints.append(f" Beside their like, {_listed(gaps)} {'is' if len(gaps) == 1 else 'are'} not there.")
    if odd := _odd_shapes(stored):
        hints.append(f" Unlike the others of their kind, {_listed(odd, '; ')}.")
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
            f"{name}{_in_file(name, stored)} is {_shape(stored[name].shape)}, not {_shape(usual)}"
            for name in names
            if stored[name].shape != usual
        ]
    return odd


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more


def _shape(shape: Sequence[int]) -> str:
    return json.dumps(list(shape))


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its bars and its table of what is missing, which our message says."""
    verbosity, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bar:
            transformers_logging.enable_progress_bar()
