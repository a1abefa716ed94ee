"""From a plan to a model that is ready to train: weights, quantisation, adapter, attention, activation checkpointing.

Weights come as safetensors only, and no code that lies beside them is run unless the plan says so. Where a live ZeRO-3
configuration of transformers exists (training/engines/zero_engine.py makes it), whole weights are sharded as they are loaded, by
transformers itself.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from raytune.config.sections.adapter import Adapter, FullAdapter
from raytune.config.sections.quantization import HeldBase
from raytune.data.templates.tokenizers import load_tokenizer
from raytune.errors import ModelError
from raytune.missing import OPTIONAL, install_command
from raytune.model.adapters import adapting, add_adapter
from raytune.model.attention.attention import check_attention, implementation_name
from raytune.model.files.base_check import check_base
from raytune.model.files.loading_report import LoadingReport, check_report
from raytune.model.files.pretrained import explained, load_config, model_class
from raytune.model.files.weight_numbers import check_finite
from raytune.model.kept_base import KeptBase
from raytune.model.packed_experts import expand_packed_experts, packing_experts
from raytune.model.parts.dropouts import set_dropouts
from raytune.model.parts.dtypes import DTYPES
from raytune.model.parts.freezing import freeze, recompute_from
from raytune.model.parts.neftune import add_neftune
from raytune.model.parts.new_tokens import add_new_tokens
from raytune.model.parts.quantize import quantization_config
from raytune.model.parts.rope import scale_each_document, stretch
from raytune.plan.model.base_model import is_on_hub, model_files
from raytune.plan.model.stored_quantization import check_stored_quantization, stored_quantization
from raytune.plan.run_plan import ModelPlan

_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
"""Tells transformers 5 to read a weight when its turn comes. Else threads read ahead, up to all of them."""


class Shares(Protocol):
    """What a rank keeps of the weights of a base. Every rank loads the same base, weight after weight."""

    def keep_share(self, parameter: nn.Parameter) -> None:
        """Called for each weight that transformers has not divided itself, as soon as it is part of a module."""
        ...

    def loaded(self, model: nn.Module) -> None:
        """Called when all weights are there, and before anything is added."""
        ...


def load_model(
    model: ModelPlan,
    adapter: Adapter,
    *,
    device: torch.device,
    seed: int,
    shares: Shares | None = None,
    kept: KeptBase | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a model ready to train: in training mode, adapter added, `requires_grad` set, documents kept apart.

    Args:
        device: where it lies afterwards. Ignored where ZeRO-3 places the weights.
        seed: of the adapter's start. Equal on every rank, and the same as plain PEFT's under `torch.manual_seed(seed)`.
        shares: what each rank keeps of weights, where they are divided.
        kept: where the base may still be, and is kept for the next model.

    Raises:
        ModelError: if the model cannot be found, read, or trained as asked.
    """
    base = kept.take(model, adapter) if kept else None
    base = load_base(model, adapter, device, shares) if base is None else base
    adapted = add_adapter(base, adapter, revision=model.revision, seed=seed).train()
    if isinstance(adapted, PeftModel):
        adapting(adapter).start_from_text(adapted, adapter, partial(_tokens_of, model))
    freeze(adapted, model.frozen)
    if model.gradient_checkpointing:
        recompute_from(adapted, model.lowest_layer)
    if kept and isinstance(adapted, PeftModel):
        kept.keep(model, adapter, adapted)
    return adapted


def _tokens_of(model: ModelPlan, text: str) -> list[int]:
    """What the run's tokenizer makes of a text, with the special tokens that it adds by itself."""
    return load_tokenizer(model.path, model.revision, model.trust_remote_code)(text)["input_ids"]  # pyright: ignore[reportReturnType]


def load_base(model: ModelPlan, adapter: Adapter, device: torch.device, shares: Shares | None) -> PreTrainedModel:
    """A base ready for an adapter: as `load_model`, but for what that adds, freezes and trains."""
    config = load_config(model.path, model.revision, model.trust_remote_code)
    own_class = model_class(model.path, config, revision=model.revision, trust_remote_code=model.trust_remote_code)
    check_attention(own_class, config, model.attention, packs=model.packs)
    quantization = quantization_config(model)
    arguments: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
    check_stored_quantization(
        stored_quantization(config.to_dict()), HeldBase(quantization=model.quantization), adapter.method, model.path
    )
    is_sharded = is_deepspeed_zero3_enabled()
    if not is_sharded:  # then a quantised model is put on the current device
        arguments["device_map"] = {"": device}
        check_base(model.path, model.revision, model.trust_remote_code)
    load: Any = AutoModelForCausalLM.from_pretrained  # whose declared result knows no report
    own_dropouts = set_dropouts(config, model.dropout)
    stretch(config, model.rope)
    with explained(model.path, model.revision, "weights"), packing_experts(adapter, quantization), _dividing(shares):
        loaded, report = load(
            model_files(model.path, model.revision, with_code=model.trust_remote_code),
            revision=model.revision,
            config=config,
            trust_remote_code=model.trust_remote_code,
            dtype=DTYPES[model.dtype],
            attn_implementation=implementation_name(model.attention, packs=model.packs),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the check below names them
            **arguments,
        )
    check_report(LoadingReport.of(report), loaded, model.path)
    check_finite(loaded, model.path)
    if shares:
        shares.loaded(loaded)
    loaded.base_tokenizer = partial(load_tokenizer, model.path, model.revision, model.trust_remote_code)
    add_new_tokens(loaded, model)
    scale_each_document(loaded)
    loaded.config.use_cache = False
    loaded.own_dropouts = own_dropouts
    if is_on_hub(model.path):  # an adapter names its base as everybody knows it, not this machine's folder
        loaded.name_or_path = loaded.config.name_or_path = model.path
    if model.liger:
        _apply_liger(loaded, device)
    expand_packed_experts(loaded, keeps_nothing=not model.gradient_checkpointing)  # around whatever computes with them
    if model.gradient_checkpointing:
        # ZeRO-3 gathers weights in hooks around forward; with adapters, only reentrant checkpointing runs them in the
        # recomputation as it did at first (https://github.com/huggingface/trl/issues/2514).
        loaded.activation_checkpointing_enable({"use_reentrant": is_sharded})
        loaded.disable_input_require_grads()  # once here: PEFT enables it again, and forgets what there was
    if model.neftune_noise_alpha > 0:
        add_neftune(loaded, model.neftune_noise_alpha)
    return loaded


def load_teacher(model: ModelPlan, device: torch.device) -> PreTrainedModel:
    """A model that is read and never trained, in evaluation mode.

    Args:
        device: as for `load_model`.

    Raises:
        ModelError: if it cannot be found, or read.
    """
    return load_base(model, FullAdapter(method="full"), device, None).eval().requires_grad_(False)


@contextmanager
def _dividing(shares: Shares | None) -> Iterator[None]:
    """Context in which a rank keeps its share of each weight when it becomes part of a module, before the next is made."""
    if shares is None:
        yield
        return

    seen: set[int] = set()

    def keep_share(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or parameter.is_meta or id(parameter) in seen:
            return
        seen.add(id(parameter))  # `shares` may itself put it into a module, which comes back to here
        shares.keep_share(parameter)

    handle = register_module_parameter_registration_hook(keep_share)
    before = os.environ.get(_ONE_BY_ONE)
    os.environ[_ONE_BY_ONE] = "1"
    try:
        yield
    finally:
        handle.remove()
        if before is None:
            del os.environ[_ONE_BY_ONE]
        else:
            os.environ[_ONE_BY_ONE] = before


def _apply_liger(model: PreTrainedModel, device: torch.device) -> None:
    if device.type != "cuda":
        raise ModelError(f"training.liger needs an NVIDIA GPU; this run computes on {device.type}. Set it to false.")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModelError(
            f"training.liger needs the package liger-kernel: {install_command(OPTIONAL['liger_kernel'])}, or set training.liger "
            f"to false."
        ) from error
    # Our loss layer never makes whole logits, so Liger's loss has no place.
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)
    if not any("liger_kernel" in getattr(module.forward, "__module__", "") for module in model.modules()):
        raise ModelError(
            f"liger-kernel has replaced nothing of a {model.config.model_type} model, and does not say so. Set training.liger to "
            f"false."
        )
