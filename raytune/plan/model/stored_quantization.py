"""Bases whose files hold quantised numbers already: what their `config.json` says, and which of them can be trained on. Pure."""

from collections.abc import Mapping
from typing import Any

from raytune.config.sections.quantization import HeldBase, shown_value
from raytune.errors import ModelError

StoredQuantization = dict[str, Any]
"""`quantization_config` of a `config.json`."""

_KEYS = ("quantization_config", "compression_config")
"""Of a `config.json`; the second is what compressed-tensors once wrote."""
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def stored_quantization(config: Mapping[str, Any]) -> StoredQuantization | None:
    """How the weights beside a `config.json` are quantised, as it or the config of its language model says; None: they are not.

    Args:
        config: content of the file.
    """
    texts = [config, *(part for name in ("text_config", "llm_config") if isinstance(part := config.get(name), Mapping))]
    found = next((part[key] for part in texts for key in _KEYS if part.get(key)), None)
    if found is None:
        return None
    return dict(found) if isinstance(found, Mapping) else {"quant_method": str(found)}


def quantization_note(stored: StoredQuantization | None) -> list[str]:
    """What a plan says of a base that was quantised before; empty of others."""
    if stored is None:
        return []
    return [f"The base is stored in {_kind(stored)} by bitsandbytes: these numbers are trained on as they are."]


def check_stored_quantization(stored: StoredQuantization | None, held: HeldBase, method: str, base: str) -> None:
    """Refuse quantised weights, but for those of bitsandbytes that the run asks for in the same form.

    transformers would train on the others as packed numbers or not at all; those of bitsandbytes it takes in the form that they
    are stored in, whatever it is asked for.

    Args:
        held: what is asked for; a dtype that is still `auto` is whatever the base has.
        method: of training, for messages.
        base: folder or hub id, for messages.

    Raises:
        ModelError: naming what they were quantised by, and what to do.
    """
    if stored is None:
        return
    made_by = str(stored.get("quant_method") or _guessed_method(stored))
    original = (
        "Give the original weights as model.base; with adapter.method: qlora they are quantised while they are loaded. A base "
        "that exists only so is expanded once: load it with transformers, model.dequantize(), save_pretrained."
    )
    if made_by != "bitsandbytes":
        raise ModelError(
            f"{base} is already quantised by {made_by} (quantization_config in its config.json), and such weights cannot be "
            f"trained. {original}"
        )
    asked_for = held.quantization
    if asked_for is None:
        raise ModelError(
            f"{base} is already quantised by bitsandbytes ({_kind(stored)}), which adapter.method: {method} cannot train "
            f"on. {original}"
        )
    form = _form(stored)
    wrong = {key: value for key, value in form.items() if getattr(asked_for, key) not in (value, "auto")}
    if wrong:
        asked = ", ".join(f"{held.key(key)}: {shown_value(getattr(asked_for, key))}" for key in wrong)
        settings = ", ".join(f"{held.key(key)}: {shown_value(value)}" for key, value in wrong.items())
        raise ModelError(
            f"{base} is already quantised by bitsandbytes, in another form than {asked} asks for, and transformers would take "
            f"the stored form without a word. Set {settings}, or give the original weights as model.base."
        )


def _form(stored: StoredQuantization) -> dict[str, Any]:
    """Fields of the `Quantization` that is the stored form; absent keys have transformers' defaults."""
    kind = _kind(stored)
    if kind == "int8":
        return {"format": kind}
    return {
        "format": kind,
        "double_quantization": bool(stored.get("bnb_4bit_use_double_quant", False)),
        "compute_dtype": _dtype(stored.get("bnb_4bit_compute_dtype") or "float32"),
        "quant_storage": _dtype(stored.get("bnb_4bit_quant_storage") or "uint8"),
    }


def _kind(stored: StoredQuantization) -> str:
    if stored.get("load_in_8bit") or stored.get("_load_in_8bit"):
        return "int8"
    return str(stored.get("bnb_4bit_quant_type") or "fp4")


def _dtype(name: Any) -> str:
    plain = str(name).removeprefix("torch.")
    return _DTYPES.get(plain, plain)


def _guessed_method(stored: StoredQuantization) -> str:
    """Configs of bitsandbytes from before `quant_method` name none."""
    is_bitsandbytes = any(stored.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    return "bitsandbytes" if is_bitsandbytes else str(stored.get("quant_algo") or "an unknown method")
