"""Where a saved model stops: `generation_config.json`, from which plain `generate`, vLLM and their like take the tokens."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from raytune.data.templates.template import ChatTemplate
from raytune.errors import ModelError
from raytune.plan.model.model_folder import read_object, reading

_MEND = "Mend or copy it again, or delete it: then the tokens that end a text are those of config.json."


def stopping_config(base: GenerationConfig, tokenizer: PreTrainedTokenizerBase, template: str) -> GenerationConfig:
    """A base's settings of generation, with every token that ends what a model was trained to write.

    These are the end of turn of its chat template, which need not be any eos of the base, the end of text of the tokenizer, and
    those that the base names itself.

    Args:
        template: text of the chat template that was trained; empty where plain text was.

    Raises:
        DataError: if `template` is none that can be trained on.
    """
    of_template = ChatTemplate(tokenizer, template).stop_ids if template else []
    eos: Any = tokenizer.eos_token_id
    ids = dict.fromkeys([*of_template, *as_ids(eos), *as_ids(base.eos_token_id)])
    config = copy.deepcopy(base)
    config.eos_token_id = list(ids) or None  # pyright: ignore[reportAttributeAccessIssue]  (one, several or none)
    return config


def check_stops(folder: Path, config: PretrainedConfig) -> None:
    """Refuse settings of generation that transformers would lay aside without a word, or fail on when a model is saved.

    Raises:
        ModelError: naming the file and the value.
    """
    if (folder / GENERATION_CONFIG_NAME).is_file():
        _check_settings(folder / GENERATION_CONFIG_NAME)
    _check_token(folder / "config.json", "eos_token_id", getattr(config.get_text_config(), "eos_token_id", None))


def _check_settings(path: Path) -> None:
    try:
        settings = read_object(path)
    except ModelError as error:
        raise ModelError(f"{error} {_MEND}") from error
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        _check_token(path, key, settings.get(key))
    with reading(f"{path} holds settings that transformers cannot use. {_MEND}"):
        GenerationConfig.from_pretrained(path.parent)


def _check_token(path: Path, key: str, token: Any) -> None:
    if not all(type(one) is int for one in (token if isinstance(token, list) else [token]) if one is not None):
        raise ModelError(f"{path}: {key} must be the number of a token or a list of these, got {str(token)[:60]}.")


def base_config(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """The settings of generation that transformers gives a model of a folder."""
    if (folder / GENERATION_CONFIG_NAME).is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def saved_config(folder: Path) -> GenerationConfig | None:
    """The settings of generation in a saved folder, if it has any.

    Raises:
        ModelError: if they cannot be read.
    """
    if not (folder / GENERATION_CONFIG_NAME).is_file():
        return None
    _check_settings(folder / GENERATION_CONFIG_NAME)
    return GenerationConfig.from_pretrained(folder)


def save_generation_config(config: GenerationConfig, folder: Path) -> None:
    """Write the settings that a base came with as they are: `save_pretrained` would refuse those that contradict each other, such
    as a temperature without sampling, and with them a trained model."""
    folder.mkdir(parents=True, exist_ok=True)
    config.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True, keys_to_pop=["compile_config"])


def as_ids(eos: int | Sequence[int] | None) -> list[int]:
    """Token ids, which configs give as one, several or none; a negative one stands for none."""
    if eos is None:
        return []
    return [token for token in ([eos] if isinstance(eos, int) else eos) if token >= 0]
