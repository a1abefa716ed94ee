"""Dropouts that an architecture reads out of its config, and rates that replace the base's own while it is trained."""

import inspect
import sys
from collections.abc import Mapping

from transformers import PretrainedConfig, PreTrainedModel

KEYS: dict[str, tuple[str, ...]] = {
    "attention": ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"),
    "hidden": ("resid_pdrop", "residual_dropout", "resid_dropout", "hidden_dropout", "hidden_dropout_prob", "dropout"),
    "embedding": ("embd_pdrop", "embedding_dropout", "embed_dropout", "emb_pdrop"),
}
"""What configs call each kind of `model.dropout`."""


def dropout_keys(own_class: type[PreTrainedModel], config: PretrainedConfig) -> tuple[tuple[str, str], ...]:
    """Kinds of dropout with their keys in the config, of those that the code of the model's module reads."""
    text = config.get_text_config(decoder=True)
    source = inspect.getsource(sys.modules[own_class.__module__])
    found = ((kind, key) for kind, keys in KEYS.items() for key in keys if hasattr(text, key) and f"config.{key}" in source)
    by_kind: dict[str, str] = {}
    for kind, key in found:
        by_kind.setdefault(kind, key)
    return tuple(by_kind.items())


def set_dropouts(config: PretrainedConfig, rates: Mapping[str, float]) -> dict[str, float]:
    """Set values of a config, and return those that it had."""
    text = config.get_text_config(decoder=True)
    own = {key: getattr(text, key) for key in rates}
    for key, rate in rates.items():
        setattr(text, key, rate)
    return own
