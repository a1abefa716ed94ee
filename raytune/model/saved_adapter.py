"""A saved adapter, told by its files: what it lies over, and whether it fits a base. No weight of a base is read."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from raytune.errors import ModelError
from raytune.model.adapters import adapting_with
from raytune.model.adapters.adapting import as_asked
from raytune.model.export import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from raytune.model.pretrained import load_config
from raytune.model.rope import stretch
from raytune.plan.asked_model import AskedModel
from raytune.printable import in_a_line


def adapter_config(folder: Path) -> PeftConfig:
    """What PEFT says of an adapter in its format.

    Raises:
        ModelError: if it is none, or cannot be read.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds no {name}, so it is not an adapter in the format of PEFT.")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from error


def answers_padded(config: PeftConfig) -> bool:
    """Whether prompts of different lengths may share a batch under an adapter."""
    row = adapting_with(config)
    return row.can_pad if row else not config.is_prompt_learning


def refuse_unfit_adapter(one: AskedModel) -> None:
    """Refuse an adapter that does not fit its base, by the shapes of both.

    Raises:
        ModelError: with what does not fit.
    """
    model, folder = one.model, one.adapter
    assert folder is not None
    config = load_config(model.path, model.revision, model.trust_remote_code)
    stretch(config, model.rope)
    try:
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        with as_asked(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            own: Any = PeftModel.from_pretrained(whole, folder, torch_device="cpu").active_peft_config
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unfit(folder, model.path, in_a_line(error)) from error
    if missing := next((str(each.message) for each in told if "missing adapter keys" in str(each.message)), None):
        raise _unfit(folder, model.path, in_a_line(missing))
    text: Any = config.get_text_config()
    width = own.token_dim if own.peft_type in ("PROMPT_TUNING", "P_TUNING") else text.hidden_size
    if width != text.hidden_size:  # PEFT notices when it lays the tokens before others
        raise _unfit(folder, model.path, f"its virtual tokens are {width} wide, and those of the base {text.hidden_size}")


def _unfit(folder: str, base: str, why: str) -> ModelError:
    return ModelError(
        f"The adapter in {folder} cannot be put on {base}: {why}. It was trained on another base, or its file is damaged. Name "
        f"the base that it was trained on with --base."
    )
