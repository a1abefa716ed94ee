"""From a plan to a model that is ready to train: weights, quantisation, adapter, attention, activation checkpointing.

Weights come as safetensors only, and no code that lies beside them is run unless the plan says so. Where a live ZeRO-3
configuration of transformers exists (training/zero_engine.py makes it), whole weights are sharded as they are loaded, by
transformers itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations import is_deepspeed_zero3_enabled

from raytune.config.adapter import Adapter, FullAdapter, QloraAdapter
from raytune.errors import ModelError
from raytune.model.adapters import add_adapter
from raytune.model.attention import check_attention, implementation_name
from raytune.model.dtypes import DTYPES
from raytune.model.kept_base import KeptBase
from raytune.model.neftune import add_neftune
from raytune.model.quantize import is_quantized, quantization_config
from raytune.plan.base_model import model_files
from raytune.plan.run_plan import ModelPlan


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that comes with a model."""
    with _explained(path, revision, "tokenizer"):
        return AutoTokenizer.from_pretrained(model_files(path), revision=revision, trust_remote_code=trust_remote_code)


def load_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load a model's configuration. Fails if the model needs code of its own and that was not allowed."""
    with _explained(path, revision, "config.json"):
        values, _ = PretrainedConfig.get_config_dict(model_files(path), revision=revision)
    if not trust_remote_code:
        _check_own_code(path, values)
    with _explained(path, revision, "config.json"):
        return AutoConfig.from_pretrained(model_files(path), revision=revision, trust_remote_code=trust_remote_code)


def _check_own_code(path: str, config: dict[str, Any]) -> None:
    """Refuse a model that only its own Python code can compute. Where transformers has the architecture, that code is ignored."""
    if "auto_map" in config and config.get("model_type") not in _causal_model_types():
        raise ModelError(
            f"{path} comes with Python code of its own (auto_map in its config.json) and transformers has no model of type "
            f"{config.get('model_type')!r}. raytune does not run such code by default. If you have read it and trust it, set "
            f"model.trust_remote_code to true and model.revision to a full commit hash."
        )


def _causal_model_types() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def load_model(
    model: ModelPlan,
    adapter: Adapter,
    *,
    device: torch.device,
    seed: int,
    shard: Callable[[nn.Parameter], None] | None = None,
    kept: KeptBase | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a model ready to train: in training mode, adapter added, `requires_grad` set, documents kept apart.

    Args:
        device: where it lies afterwards. Ignored where ZeRO-3 places the weights.
        seed: of the adapter's start. Equal on every rank, and the same as plain PEFT's under `torch.manual_seed(seed)`.
        shard: called for each quantised weight as soon as it exists, in the same order on every rank. transformers does not shard
            quantised models as it loads them, so that each rank would hold a whole one; ZeRO-3 gives a function that keeps a
            share.
        kept: where the base may still be, and is kept for the next model.

    Raises:
        ModelError: if the model cannot be found, read, or trained as asked.
    """
    base = kept.take(model, adapter) if kept else None
    base = _load_base(model, adapter, device, shard) if base is None else base
    if isinstance(adapter, FullAdapter):
        return base.requires_grad_(True).train()
    adapted = add_adapter(base, adapter, revision=model.revision, seed=seed).train()
    if kept:
        kept.keep(model, adapter, adapted)
    return adapted


def _load_base(
    model: ModelPlan, adapter: Adapter, device: torch.device, shard: Callable[[nn.Parameter], None] | None
) -> PreTrainedModel:
    config = load_config(model.path, model.revision, model.trust_remote_code)
    own_class = model_class(model.path, config, revision=model.revision, trust_remote_code=model.trust_remote_code)
    check_attention(own_class, config, model.attention, packs=model.packs)
    arguments: dict[str, Any] = {}
    if isinstance(adapter, QloraAdapter):
        arguments["quantization_config"] = quantization_config(adapter, model)
    _check_quantised_base(model, config, adapter)
    is_sharded = is_deepspeed_zero3_enabled()
    if not is_sharded:  # then a quantised model is put on the current device
        arguments["device_map"] = {"": device}
    with _explained(model.path, model.revision, "weights"), _sharding(shard):
        loaded = AutoModelForCausalLM.from_pretrained(
            model_files(model.path),
            revision=model.revision,
            config=config,
            trust_remote_code=model.trust_remote_code,
            dtype=DTYPES[model.dtype],
            attn_implementation=implementation_name(model.attention, packs=model.packs),
            use_safetensors=True,
            **arguments,
        )
    loaded.config.use_cache = False
    if model.liger:
        _apply_liger(loaded, device)
    if model.gradient_checkpointing:
        # ZeRO-3 gathers weights in hooks around forward; with adapters, only reentrant checkpointing runs them in the
        # recomputation as it did at first (https://github.com/huggingface/trl/issues/2514).
        loaded.activation_checkpointing_enable({"use_reentrant": is_sharded})
    if model.neftune_noise_alpha > 0:
        add_neftune(loaded, model.neftune_noise_alpha)
    return loaded


def model_class(
    path: str, config: PretrainedConfig, *, revision: str | None = None, trust_remote_code: bool = False
) -> type[PreTrainedModel]:
    """The class of a causal language model.

    Raises:
        ModelError: if there is none for this config.
    """
    known: Any = AutoModelForCausalLM._model_mapping
    if type(config) in known:
        return known[type(config)]
    reference = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if reference is None or not trust_remote_code:
        raise ModelError(f"{path} is of type {config.model_type}, which is not a causal language model.")
    return get_class_from_dynamic_module(reference, path, revision=revision)


def _check_quantised_base(model: ModelPlan, config: PretrainedConfig, adapter: Adapter) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = values.get("quant_method", "an unknown method")
    if method != "bitsandbytes" or not isinstance(adapter, QloraAdapter):
        raise ModelError(
            f"{model.path} is already quantised by {method}. Use the original weights as model.base; with adapter.method: qlora "
            f"they are quantised while they are loaded."
        )


@contextmanager
def _sharding(shard: Callable[[nn.Parameter], None] | None) -> Iterator[None]:
    """Context in which each quantised weight is handed to `shard` when it becomes part of a module, before the next is made."""
    if shard is None:
        yield
        return

    seen: set[int] = set()

    def keep_share(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or parameter.is_meta or not is_quantized(parameter) or id(parameter) in seen:
            return
        seen.add(id(parameter))  # `shard` may itself put it into a module, which comes back to here
        shard(parameter)

    handle = register_module_parameter_registration_hook(keep_share)
    try:
        yield
    finally:
        handle.remove()


def _apply_liger(model: PreTrainedModel, device: torch.device) -> None:
    if device.type != "cuda":
        raise ModelError(f"training.liger needs an NVIDIA GPU; this run computes on {device.type}. Set it to false.")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModelError("training.liger needs the package liger-kernel: install it, or set training.liger to false.") from error
    # Our loss layer never makes whole logits, so Liger's loss has no place.
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)


@contextmanager
def _explained(path: str, revision: str | None, what: str) -> Iterator[None]:
    """Turn what transformers raises about files into a `ModelError` that says what was tried."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        at = f" at revision {revision}" if revision else ""
        place = "the folder" if Path(path).is_dir() else "the Hugging Face hub or this machine's cache of it"
        raise ModelError(
            f"Cannot load the {what} of model {path}{at} from {place}: {_first_lines(error)}\n"
            f"Check the name, give a local folder with config.json and *.safetensors, or, where machines have no network, "
            f"download the model first (hf download {path}) and set model.base to that folder."
        ) from error


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
