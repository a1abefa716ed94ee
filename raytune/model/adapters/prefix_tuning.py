"""Prefix tuning on a model: PEFT's configuration of it."""

from peft import PeftModel, PrefixEncoder, PrefixTuningConfig
from transformers import PreTrainedModel

from raytune.config.sections.adapter import PrefixTuningAdapter
from raytune.data.batches.in_front import with_keys_in_front
from raytune.model.adapters.adapting import Adapting
from raytune.model.adapters.in_front import added_in_front, encoded_by, loaded_in_front, sees_keys, taken_off
from raytune.model.parts.experts import expert_parameters


def _add(model: PreTrainedModel, adapter: PrefixTuningAdapter, revision: str | None, seed: int) -> PeftModel:
    width = adapter.encoder_hidden_size
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=adapter.num_virtual_tokens,
        init_weights="zero" if adapter.prefix_init == "zero" else None,
        prefix_projection=adapter.projection,
        encoder_hidden_size=None if width == "auto" else width,  # pyright: ignore[reportArgumentType]  its default
        revision=revision,
    )
    adapted = added_in_front(model, config, seed=seed)
    sees_keys(adapted)
    return adapted


ADAPTING = Adapting(
    add=_add,
    frozen_experts=lambda model, adapter: [*expert_parameters(model)],
    leaves_base_alone=lambda adapter, is_quantised: True,
    peft_type="PREFIX_TUNING",
    mend=sees_keys,
    saved_tensors=encoded_by(PrefixEncoder),
    load=loaded_in_front,
    taken_off=taken_off,
    in_front=lambda adapter, batch: with_keys_in_front(batch, adapter.num_virtual_tokens),
)
