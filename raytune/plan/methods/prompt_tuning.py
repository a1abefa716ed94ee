"""Prompt tuning in a plan: embeddings of virtual tokens."""

from raytune.config.sections.adapter import PromptTuningAdapter
from raytune.config.sections.model import Quantization
from raytune.plan.defaults import adapter_epochs
from raytune.plan.methods.in_front import check_embeds, frozen_experts, rate_in_front, trained_in_front, words_in_front
from raytune.plan.methods.method import Method
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained


def _trained(adapter: PromptTuningAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    return trained_in_front(adapter, shape, quantization, embedding=shape.hidden, lengthens_rows=True)


METHOD = Method(
    trained=_trained,
    check=check_embeds,
    in_words=words_in_front("in front of each document"),
    expert_notes=frozen_experts,
    # PEFT's comparison of methods (method_comparison/MetaMathQA, Llama 3.2 3B) takes 1e-3.
    learning_rate=rate_in_front(5),
    epochs=adapter_epochs,
    weight_decay=0.0,
    when="one task, the fewest parameters of all, a base that is shared by many; weak on small models, and longer rows",
)
