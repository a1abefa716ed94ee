"""A base's tokenizer, config and class, by transformers; no weights, and none of the libraries that training needs.

No code that lies beside a model is run unless that was allowed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from raytune.errors import ModelError
from raytune.plan.model.base_model import model_files
from raytune.plan.model.model_folder import check_code_is_beside, is_of_library
from raytune.printable import in_a_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load a model's configuration. Fails if the model needs code of its own and that was not allowed."""
    with explained(path, revision, "config.json"):
        values, _ = PretrainedConfig.get_config_dict(model_files(path, revision), revision=revision)
    if trust_remote_code:
        check_code_is_beside(path, "config.json", values)
    else:
        _check_own_code(path, values)
    with explained(path, revision, "config.json"):
        return AutoConfig.from_pretrained(
            model_files(path, revision, with_code=trust_remote_code), revision=revision, trust_remote_code=trust_remote_code
        )


def _check_own_code(path: str, config: dict[str, Any]) -> None:
    """Refuse a model that only its own Python code can compute. Where transformers has the architecture, that code is ignored."""
    if "auto_map" in config and config.get("model_type") not in _causal_model_types():
        raise ModelError(
            f"{path} comes with Python code of its own (auto_map in its config.json) and transformers has no model of type "
            f"{config.get('model_type')!r}. raytune does not run such code by default. If you have read it and trust it, set "
            f"model.trust_remote_code to true{'' if Path(path).is_dir() else ' and model.revision to a full commit hash'} "
            f"(to merge: --trust-remote-code)."
        )


def _causal_model_types() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_class(
    path: str, config: PretrainedConfig, *, revision: str | None = None, trust_remote_code: bool = False
) -> "type[PreTrainedModel]":
    """The class of a causal language model.

    Raises:
        ModelError: if there is none for this config.
    """
    from transformers import AutoModelForCausalLM  # two seconds, which a driver with the built-in base does not need

    known: Any = AutoModelForCausalLM._model_mapping
    if type(config) in known:
        return known[type(config)]
    reference = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if reference is None or not trust_remote_code:
        raise ModelError(f"{path} is of type {config.model_type}, which is not a causal language model.")
    return get_class_from_dynamic_module(reference, path, revision=revision)


@contextmanager
def explained(path: str, revision: str | None, what: str) -> Iterator[None]:
    """Turn what transformers raises about files, and values in them, into a `ModelError` that says what was tried."""
    try:
        yield
    except BaseException as error:
        if not is_of_library(error):
            raise
        at = f" at revision {revision}" if revision else ""
        place = "the folder" if Path(path).is_dir() else "the Hugging Face hub or this machine's cache of it"
        raise ModelError(
            f"Cannot load the {what} of model {path}{at} from {place}: {in_a_line(error, 400)}\n"
            f"Check the name, give a local folder with config.json and *.safetensors, or, where machines have no network, "
            f"download the model first (hf download {path}) and set model.base to that folder."
        ) from error


@contextmanager
def without_bars(level: int | None = None) -> Iterator[None]:
    """transformers without bars of what it loads; in front of a person they lie between lines, and in a file they are rubbish.

    Args:
        level: from which on its messages are shown; None: as before.
    """
    before, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(before if level is None else level)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if had_bars:
            transformers_logging.enable_progress_bar()
