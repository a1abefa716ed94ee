"""What transformers says of weights that it loaded, and what of it makes them another model than the config describes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytune.errors import ModelError
from raytune.model.files.weight_files import StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 5
_LAYER = re.compile(r"^(.*?\.)(\d+)\.")
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


def check_report(
    report: LoadingReport,
    model: "PreTrainedModel",
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
            f"The weights in {place} lack {listed(report.missing)}, which {name} has by config.json. It would be trained from "
            f"random numbers.{hint} Give the whole model, or mend its config.json."
        )
    if report.mismatched:
        tensors = [
            f"{key}{in_file(key, stored)} is {shape_in_words(there)} there and {shape_in_words(own)} by config.json"
            for key, there, own in report.mismatched
        ]
        raise ModelError(
            f"The weights in {place} have other shapes than {name} by config.json: {listed(tensors, '; ')}.{hint} "
            f"Give the config.json that belongs to the weights."
        )
    if lost := lost_tensors(report.unexpected, model):
        raise ModelError(
            f"The weights in {place} hold {listed(lost)}{in_file(lost[0], stored)}, for which {name} by config.json has no "
            f"place, so that another model than the saved one would be trained. Give the config.json that belongs to the "
            f"weights; merge an adapter first; if those tensors are to be dropped, save the model without them: "
            f"AutoModelForCausalLM.from_pretrained({place!r}).save_pretrained(NEW_FOLDER)"
        )


def lost_tensors(unexpected: Sequence[str], model: "PreTrainedModel") -> list[str]:
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


def in_file(name: str, stored: Mapping[str, StoredTensor] | None) -> str:
    return f" (in {stored[name].file.name})" if stored and name in stored else ""


def listed(names: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more


def shape_in_words(shape: Sequence[int]) -> str:
    return json.dumps(list(shape))
