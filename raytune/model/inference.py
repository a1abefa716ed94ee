"""Saved models: what plain transformers and PEFT make of the files of a run, for writing answers and for an engine."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from raytune.model.adapters import adapting
from raytune.model.adapters.adapting import as_asked, whole_targets
from raytune.model.dtypes import DTYPES
from raytune.model.load import load_base, load_model
from raytune.model.new_tokens import add_new_tokens
from raytune.model.packed_experts import expand_packed_experts, packing_experts
from raytune.model.pretrained import load_config
from raytune.model.quantize import quantization_config
from raytune.model.rope import stretch
from raytune.plan.base_model import model_files
from raytune.plan.run_plan import RunPlan


def base_then_tuned(plan: RunPlan, folder: Path, device: torch.device) -> Iterator[PreTrainedModel | PeftModel]:
    """First the base model of a run, then the tuned one as it was saved in `folder`; one of them on the device at a time.

    Both stop where the saved folder says: the base is asked in the same template, and is not to lose by writing on behind an
    answer. A whole model brings its `generation_config` along; PEFT keeps that of the base, so an adapter is given its own.
    """
    stops = GenerationConfig.from_pretrained(folder)
    model = _load(plan, plan.model.path, plan.model.revision, device)
    model.generation_config.eos_token_id = stops.eos_token_id
    yield model
    if adapting(plan.adapter).is_whole:
        del model  # the caller lets go of it as well
        yield _load(plan, str(folder), None, device)
    else:
        model.generation_config = stops
        with as_asked():
            tuned = PeftModel.from_pretrained(model, str(folder))
        yield tuned.eval()


def load_saved(
    plan: RunPlan, folder: Path, *, device: torch.device, shard: Callable[[nn.Parameter], None] | None = None
) -> PreTrainedModel | PeftModel:
    """The model that a run saved, as `load_model` gives an engine the untrained one: documents kept apart, base as planned.

    Args:
        folder: local, with the files of `RunFolder.model`.
        device, shard: as for `load_model`.
    """
    if adapting(plan.adapter).is_whole:
        saved = plan.model.model_copy(update={"path": str(folder), "revision": None, "new_tokens": []})
        return load_model(saved, plan.adapter, device=device, seed=plan.seed, shard=shard)
    base = load_base(plan.model, plan.adapter, device, shard)  # as published, which is what the saved adapter fits
    row = adapting(plan.adapter)
    with as_asked(), whole_targets(row.peft_type) if row.needs_whole_targets else nullcontext():
        loaded = row.load(base, folder).train()
    row.mend(loaded)
    return loaded


def _load(plan: RunPlan, path: str, revision: str | None, device: torch.device) -> PreTrainedModel:
    model = plan.model
    config = load_config(path, revision, model.trust_remote_code)
    if path == model.path:  # a saved model says it itself
        stretch(config, model.rope)
    quantization = quantization_config(model)
    with packing_experts(plan.adapter, quantization):
        loaded = AutoModelForCausalLM.from_pretrained(
            model_files(path, revision, with_code=model.trust_remote_code),
            revision=revision,
            config=config,
            trust_remote_code=model.trust_remote_code,
            dtype=DTYPES[model.compute_dtype],
            attn_implementation="sdpa",  # padding on the left and a cache of keys, which the kernels for packed rows do not know
            use_safetensors=True,
            device_map={"": device},
            **({"quantization_config": quantization} if quantization else {}),
        )
    if path == model.path:  # a saved model has them
        add_new_tokens(loaded, model)
    expand_packed_experts(loaded, keeps_nothing=False)
    return loaded.eval()
