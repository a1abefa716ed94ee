"""A saved adapter, told by its files: what it lies over, and whether it fits a base. No weight of a base is read."""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from raytune.errors import ModelError
from raytune.model.adapters import adapting_with
from raytune.model.adapters.adapting import as_asked
from raytune.model.files.base_content import COMMIT, base_content, changes_text, computing_part, content_changes, saved_content
from raytune.model.files.export import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from raytune.model.files.pretrained import load_config
from raytune.model.parts.rope import stretch
from raytune.plan.saved.asked_model import AskedModel
from raytune.printable import in_a_line

_STARTS_OF_BASE = re.compile("pissa(_niter_[0-9]+)?|olora")
"""Those that PEFT takes out of the base again when it loads the adapter, and needs nothing else for."""
STARTS_BESIDE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Starts of LoRA (`init_lora_weights`) under which PEFT leaves the base's weights as they are. The others take something out of
them, and do so again whenever PEFT loads the adapter."""


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


def leaves_base(config: PeftConfig) -> bool:
    """Whether an adapter lies over the base as its files have it."""
    return getattr(config, "init_lora_weights", True) in STARTS_BESIDE_BASE


def refuse_changed_base(folder: Path, config: PeftConfig) -> None:
    """Refuse to lay an adapter into a base out of whose weights its start took a part.

    Raises:
        ModelError: if it did.
    """
    if leaves_base(config):
        return
    start = getattr(config, "init_lora_weights", None)
    raise ModelError(
        f"{folder / ADAPTER_CONFIG} says init_lora_weights: {start!r}, a start that takes a part out of the base's weights, anew "
        f"whenever PEFT loads the adapter: laid into the base as it is, it would compute something else. Have PEFT merge it, "
        f"PeftModel.from_pretrained(base, {str(folder)!r}).merge_and_unload(), or save it for the base as it is "
        f"(path_initial_model_for_weight_conversion of PEFT's save_pretrained)."
    )


def _refuse_start(folder: Path, config: PeftConfig, *, is_quantized: bool) -> None:
    """Refuse an adapter whose start changed the base in a way that cannot be made again: by rows, gradients or a quantisation, or
    in weights that are packed.

    Raises:
        ModelError: if it did.
    """
    start = getattr(config, "init_lora_weights", True)
    if leaves_base(config) or (not is_quantized and _STARTS_OF_BASE.fullmatch(str(start))):
        return
    by = "which is held quantised here" if is_quantized else "by what the adapter does not hold"
    raise ModelError(
        f"{folder / ADAPTER_CONFIG} says init_lora_weights: {start!r}, a start that changes the base, {by}, so that the base "
        f"under it cannot be made again. Save it for the base as it is, with path_initial_model_for_weight_conversion of PEFT's "
        f"save_pretrained."
    )


def answers_padded(config: PeftConfig) -> bool:
    """Whether prompts of different lengths may share a batch under an adapter."""
    row = adapting_with(config)
    return row.can_pad if row else not config.is_prompt_learning


def changes_of_base(folder: Path, path: str, revision: str | None) -> str:
    """Files in which a base differs from that which an adapter was trained on, a line for each, as far as the adapter's folder
    tells what that was; empty: in none.

    Of a hub model that is told by its commit, which `revision` asks for; a copy of it in a folder has no commit to compare.

    Args:
        path: of the base, a folder or a hub id.

    Raises:
        ModelError: if files cannot be read.
    """
    was = saved_content(folder)
    if was is None or (COMMIT in was) == Path(path).is_dir():
        return ""
    has_code = any(name.endswith(".py") for name in was)
    now = {COMMIT: revision or ""} if COMMIT in was else base_content(path, None, trust_remote_code=has_code)
    return changes_text(content_changes(computing_part(was), computing_part(now)))


def refuse_unfit_adapter(one: AskedModel) -> None:
    """Refuse an adapter that does not fit its base, by its start and by the shapes of both.

    Raises:
        ModelError: with what does not fit.
    """
    model, folder = one.model, one.adapter
    assert folder is not None
    asked = adapter_config(Path(folder))
    _refuse_start(Path(folder), asked, is_quantized=model.quantization is not None)
    if model.quantization or model.new_tokens:  # what bitsandbytes packs, and rows of new tokens, are in no config
        return
    config = load_config(model.path, model.revision, model.trust_remote_code)
    stretch(config, model.rope)
    try:
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        with as_asked(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if not leaves_base(asked):  # its start is made of values, and nothing has any here
                asked = replace(asked, init_lora_weights=True)  # pyright: ignore[reportCallIssue]
            own: Any = PeftModel.from_pretrained(whole, folder, config=asked, torch_device="cpu").active_peft_config
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unfit(folder, model.path, in_a_line(error)) from error
    if missing := next((str(each.message) for each in told if "missing adapter keys" in str(each.message)), None):
        raise _unfit(folder, model.path, in_a_line(missing))
    text: Any = config.get_text_config()
    width = own.token_dim if own.peft_type in ("PROMPT_TUNING", "P_TUNING") else text.hidden_size
    if width != text.hidden_size:  # PEFT notices when it lays the tokens before others
        raise _unfit(folder, model.path, f"its virtual tokens are {width} wide, and those of the base {text.hidden_size}")
    largest = max(_trained_tokens(own), default=0)
    if largest >= text.vocab_size:  # which weights without values let pass
        raise _unfit(folder, model.path, f"it trained the row of token {largest}, and the base has {text.vocab_size} rows")


def _trained_tokens(config: Any) -> list[int]:
    """Numbers of the tokens whose rows an adapter trained."""
    named = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    return [number for numbers in (named.values() if isinstance(named, dict) else [named]) for number in numbers]


def _unfit(folder: str, base: str, why: str) -> ModelError:
    return ModelError(
        f"The adapter in {folder} cannot be put on {base}: {why}. It was trained on another base, or its file is damaged. Name "
        f"the base that it was trained on with --base; of an adapter with new tokens, which no base has, name the run."
    )
