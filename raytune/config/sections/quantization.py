"""How the base of a run is held, out of the two sections that may say it: `model`, and a preset in `adapter`. Pure.

`adapter.method: qlora` is short for `lora` with `model.quantization: nf4`. Where both sections speak they have to agree.
"""

from dataclasses import dataclass

from raytune.config.sections.adapter import Adapter, own_quantization
from raytune.config.sections.model import ModelSection, Quantization
from raytune.errors import UserError

KEYS = {
    "format": ("quantization", "quantization"),
    "double_quantization": ("double_quantization", "double_quantization"),
    "compute_dtype": ("quant_compute_dtype", "compute_dtype"),
    "quant_storage": ("quant_storage", "quant_storage"),
}
"""Fields of a `Quantization` -> the keys that decide them: of the `model` section, and of a preset in the `adapter` section."""
LEAVES_BASE = "set adapter.method to lora, which leaves the base to the model section"
"""What to do where a preset and the `model` section are at odds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBase:
    """How a base is held, and the words that messages have for it."""

    quantization: Quantization | None
    """By bitsandbytes; None: not at all."""
    preset: str = ""
    """The `adapter.method` that says so; empty: the `model` section does."""

    def key(self, name: str) -> str:
        """The key that decides a field of the quantisation."""
        ours, theirs = KEYS[name]
        return f"adapter.{theirs}" if self.preset else f"model.{ours}"

    @property
    def to_undo(self) -> str:
        """What to set so that the base is not quantised, as the end of a sentence."""
        return "set adapter.method to lora" if self.preset else "set model.quantization to none"


def held_base(model: ModelSection, adapter: Adapter) -> HeldBase:
    """How bitsandbytes is to hold the base, with dtypes that may still be `auto`.

    Raises:
        UserError: if the two sections contradict each other.
    """
    said, preset = _said(model), own_quantization(adapter)
    if preset is None:
        if model.quantization in ("auto", "none"):
            return HeldBase(quantization=None)
        written = {name: value for name, value in said.items() if value != "auto"}
        return HeldBase(quantization=Quantization().model_copy(update=written))
    if name := _at_odds(said, preset):
        key = f"model.{KEYS[name][0]}"
        raise UserError(
            f"{key} is {shown_value(said[name])}, but {set_by_preset(name, adapter.method, preset)}. Leave {key} out, or "
            f"{LEAVES_BASE}.",
            keys=(key, "adapter.method"),
        )
    left_open = {name: value for name, value in said.items() if getattr(preset, name) == "auto"}
    return HeldBase(quantization=preset.model_copy(update=left_open), preset=adapter.method)


def contradiction(model: ModelSection, adapter: Adapter) -> tuple[str, str] | None:
    """The field of a quantisation of which a preset and the `model` section say different things, and what the preset says of
    it; None: they agree."""
    preset = own_quantization(adapter)
    name = _at_odds(_said(model), preset) if preset else None
    return (name, set_by_preset(name, adapter.method, preset)) if preset and name else None


def set_by_preset(name: str, method: str, preset: Quantization) -> str:
    """What a preset says of a field, as the end of a sentence."""
    return f"adapter.method {method} sets adapter.{KEYS[name][1]} to {shown_value(getattr(preset, name))}"


def _at_odds(said: dict[str, object], preset: Quantization) -> str | None:
    """The first field of which both sections say something, and not the same."""
    sides = ((name, value, getattr(preset, name)) for name, value in said.items())
    return next((name for name, ours, theirs in sides if "auto" not in (ours, theirs) and ours != theirs), None)


def _said(model: ModelSection) -> dict[str, object]:
    """Each field of a quantisation as the `model` section has it."""
    return {name: getattr(model, ours) for name, (ours, _) in KEYS.items()}


def shown_value(value: object) -> str:
    """A value as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
