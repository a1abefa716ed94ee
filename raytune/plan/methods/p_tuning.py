"""P-tuning in a plan: embeddings of virtual tokens, and the MLP that they pass through."""

from raytune.config.sections.adapter import PTuningAdapter
from raytune.config.sections.model import Quantization
from raytune.plan.defaults import adapter_epochs
from raytune.plan.methods.in_front import check_embeds, frozen_experts, rate_in_front, trained_in_front, words_in_front
from raytune.plan.methods.method import Method
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained


def _trained(adapter: PTuningAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    width = shape.hidden if adapter.encoder_hidden_size == "auto" else adapter.encoder_hidden_size
    layers = [("mlp_head.0", shape.hidden, width), ("mlp_head.2", width, width), ("mlp_head.4", width, shape.hidden)]
    return trained_in_front(adapter, shape, quantization, embedding=shape.hidden, layers=layers, lengthens_rows=True)


METHOD = Method(
    trained=_trained,
    check=check_embeds,
    in_words=words_in_front("of an MLP in front of each document"),
    expert_notes=frozen_experts,
    # PEFT's comparison of methods (method_comparison/MetaMathQA, Llama 3.2 3B) takes 1e-3 for the MLP.
    learning_rate=rate_in_front(5),
    epochs=adapter_epochs,
    weight_decay=0.0,
    when="as prompt_tuning, where that learns too slowly: more is trained, as little is saved",
)
