"""P-tuning on a model: PEFT's configuration of it, with its encoder of linear layers."""

from peft import PeftModel, PromptEncoder, PromptEncoderConfig
from transformers import PreTrainedModel

from raytune.config.sections.adapter import PTuningAdapter
from raytune.data.batches.in_front import with_tokens_in_front
from raytune.model.adapters.adapting import Adapting
from raytune.model.adapters.in_front import added_in_front, encoded_by, loaded_in_front, sees_tokens, taken_off
from raytune.model.parts.experts import expert_parameters


def _add(model: PreTrainedModel, adapter: PTuningAdapter, revision: str | None, seed: int) -> PeftModel:
    width = adapter.encoder_hidden_size
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=adapter.num_virtual_tokens,
        encoder_reparameterization_type="MLP",
        encoder_hidden_size=None if width == "auto" else width,  # pyright: ignore[reportArgumentType]  its default
        revision=revision,
    )
    adapted = added_in_front(model, config, seed=seed)
    sees_tokens(adapted)
    return adapted


ADAPTING = Adapting(
    add=_add,
    frozen_experts=lambda model, adapter: [*expert_parameters(model)],
    leaves_base_alone=lambda adapter, is_quantised: True,
    peft_type="P_TUNING",
    mend=sees_tokens,
    saved_tensors=encoded_by(PromptEncoder),
    load=loaded_in_front,
    taken_off=taken_off,
    can_pad=False,
    in_front=lambda adapter, batch: with_tokens_in_front(batch, adapter.num_virtual_tokens),
)
