"""Full fine-tuning in a plan: every weight of the base is trained, in place."""

from raytune.config.sections.adapter import FullAdapter
from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.plan.defaults import full_epochs, full_rate
from raytune.plan.methods.experts import of_experts
from raytune.plan.methods.method import Method
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained, num_sides, whole_part


def _trained(adapter: FullAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    return Trained(
        parts=tuple(
            # A tied head holds no weights of its own.
            whole_part(module, module.num_biases if module.name == shape.head.name and shape.is_tied else module.num_parameters)
            for module in shape.modules()
        ),
        is_base=True,
        lowest_layer=0,
        num_sides=num_sides(shape.modules()),
    )


def _check(adapter: FullAdapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    if held.quantization is not None:
        key = held.key("format")
        raise UserError(
            f"{key} is {held.quantization.format}, but adapter.method is full, which trains the base's own weights: packed "
            f"numbers cannot be trained. Set adapter.method to lora, or {held.to_undo}.",
            keys=(key, "adapter.method"),
        )


def _expert_notes(adapter: FullAdapter, shape: ModelShape, trained: Trained, quantization: Quantization | None) -> list[str]:
    layers = {name: {part.name for part in trained.parts if part.kind == name} for name in ("experts", "router")}
    if not layers["experts"]:
        return [f"{of_experts(shape)}. strategy.freeze leaves them as they are."]
    where = "" if len(layers["experts"]) == shape.num_layers else f" in {len(layers['experts'])} of {shape.num_layers} layers"
    routers = ", and so are the routers" if len(layers["router"]) >= len(layers["experts"]) else ", and not all routers"
    return [f"{of_experts(shape)}. They are trained{where}{routers}."]


def _in_words(adapter: FullAdapter, held: str, trained: str) -> str:
    return f"full fine-tuning, {trained}"


METHOD = Method(
    trained=_trained,
    check=_check,
    in_words=_in_words,
    expert_notes=_expert_notes,
    learning_rate=full_rate,
    epochs=full_epochs,
    weight_decay=0.1,  # Llama 2 chat
    keeps_base=lambda adapter: False,
    when="much data, or much that is new to the model; sixteen bytes per parameter and a whole model as the result",
)
