"""How the base of a run is held, out of the two sections that may say it: `model`, and a preset in `adapter`. Pure.

`adapter.method: qlora` is short for `lora` with `model.quantization: nf4`. Where both sections speak they have to agree.
"""

from raytune.config.adapter import Adapter, own_quantization
from raytune.config.model import ModelSection, Quantization
from raytune.errors import UserError

KEYS = {
    "format": ("quantization", "quantization"),
    "double_quantization": ("double_quantization", "double_quantization"),
    "compute_dtype": ("quant_compute_dtype", "compute_dtype"),
    "quant_storage": ("quant_storage", "quant_storage"),
}
"""Fields of a `Quantization` -> the keys that decide them: of the `model` section, and of a preset in the `adapter` section."""


def quantization_of(model: ModelSection, adapter: Adapter) -> Quantization | None:
    """How bitsandbytes is to hold the base; None: not at all.

    Raises:
        UserError: if the two sections contradict each other.
    """
    preset = own_quantization(adapter)
    if preset is None:
        if model.quantization in ("auto", "none"):
            return None
        return Quantization().model_copy(update={name: value for name, value in _said(model).items() if value != "auto"})
    if contradiction := contradicting(model, adapter):
        ours, theirs = (f"{section}.{name}" for section, name in zip(("model", "adapter"), KEYS[contradiction]))
        said, held = shown_value(_said(model)[contradiction]), shown_value(getattr(preset, contradiction))
        raise UserError(
            f"{ours} is {said}, but adapter.method {adapter.method} sets {theirs} to {held}. Leave {ours} out, or set "
            f"adapter.method to lora, which leaves the base to the model section.",
            keys=(ours, "adapter.method"),
        )
    open_values = {name: value for name, value in _said(model).items() if getattr(preset, name) == "auto"}
    return preset.model_copy(update=open_values)


def contradicting(model: ModelSection, adapter: Adapter) -> str | None:
    """The field of a quantisation of which a preset and the `model` section say different things; None: they agree."""
    preset = own_quantization(adapter)
    if preset is None:
        return None
    return next(
        (
            name
            for name, value in _said(model).items()
            if "auto" not in (value, getattr(preset, name)) and value != getattr(preset, name)
        ),
        None,
    )


def quantization_key(name: str, adapter: Adapter) -> str:
    """The key of this config that decides a field of its quantisation, as a message names it."""
    ours, theirs = KEYS[name]
    return f"model.{ours}" if own_quantization(adapter) is None else f"adapter.{theirs}"


def without_quantization(adapter: Adapter) -> str:
    """What to set so that the base is not quantised, as the end of a sentence."""
    return "set model.quantization to none" if own_quantization(adapter) is None else "set adapter.method to lora"


def _said(model: ModelSection) -> dict[str, object]:
    """Each field of a quantisation as the `model` section has it."""
    return {name: getattr(model, ours) for name, (ours, _) in KEYS.items()}


def shown_value(value: object) -> str:
    """A value as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
