"""AdaLoRA in a plan: what it trains at first, when it takes ranks away, and what it follows to know which."""

from collections.abc import Iterator

from raytune.config.sections.adapter import AdaLoraAdapter
from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.plan.defaults import adapter_epochs, adapter_rate
from raytune.plan.methods.layers import (
    Addition,
    named_targets,
    refuse_embeddings,
    trained_in_layers,
    unread_names,
    without_experts,
)
from raytune.plan.methods.method import Method
from raytune.plan.methods.targets import check_names, target_modules
from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import Trained

MAX_RATE = 1e-2


def initial_rank(adapter: AdaLoraAdapter) -> int:
    """Rank of each update in the beginning."""
    return -(-3 * adapter.rank // 2) if adapter.initial_rank == "auto" else adapter.initial_rank


def rank_schedule(adapter: AdaLoraAdapter, num_steps: int) -> tuple[int, int]:
    """PEFT's `tinit` and `tfinal`: steps at the beginning and at the end of a run in which no rank is taken away."""
    return int(adapter.tinit_fraction * num_steps), int(adapter.tfinal_fraction * num_steps)


def _trained(adapter: AdaLoraAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    rank = initial_rank(adapter)

    def addition(module: Module) -> Addition:
        return Addition(
            num_parameters=rank * (module.inputs + module.outputs + 1),
            num_sides=module.inputs + module.outputs + 3 * rank + 1,
            inner_width=rank,
            # What an update gives, which PEFT divides by a tensor.
            width_in_16_bits=module.outputs,
            passing_ahead=module.inputs,  # in fp32
            # What an update gives is divided by a tensor: the gradient, its quotient, and for that of the tensor what was divided
            # over it, minus that and its product with the gradient.
            passing_back=5 * module.outputs,
            passing_back_as_it_is=4 * module.outputs,
            num_made=rank * module.inputs,  # E A
        )

    layers = target_modules(adapter, shape)
    return trained_in_layers(
        adapter,
        shape,
        quantization,
        layers,
        addition,
        how="low rank",
        reads_inputs=True,
        drops_inputs=adapter.dropout > 0,
        num_constants=len(layers),  # the rank that each was made with, which PEFT divides by
        num_followed=sum(addition(module).num_parameters for module in layers),
    )


def _check(adapter: AdaLoraAdapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    """Refuse what PEFT would refuse in the worker, and a schedule that leaves no step for it."""
    check_names(adapter, shape)
    refuse_embeddings(target_modules(adapter, shape), "AdaLoRA")
    if initial_rank(adapter) <= adapter.rank:
        raise UserError(
            f"adapter.initial_rank is {adapter.initial_rank}, and adapter.rank {adapter.rank} of these are to be left, so that "
            f"there is nothing to take away. Set adapter.initial_rank to {-(-3 * adapter.rank // 2)}, or adapter.method to lora.",
            keys=("adapter.initial_rank", "adapter.rank"),
        )
    if adapter.tinit_fraction + adapter.tfinal_fraction >= 1:
        raise UserError(
            f"adapter.tinit_fraction {adapter.tinit_fraction:g} and adapter.tfinal_fraction {adapter.tfinal_fraction:g} leave no "
            f"step between them to take ranks away in: together they have to be below 1.",
            keys=("adapter.tinit_fraction", "adapter.tfinal_fraction"),
        )


def _unread(adapter: AdaLoraAdapter, shape: ModelShape) -> Iterator[str]:
    return unread_names(adapter, shape, target_modules)


def _reasons(adapter: AdaLoraAdapter, shape: ModelShape) -> Iterator[str]:
    num_layers = len(target_modules(adapter, shape))
    yield (
        f"adapter.method adalora goes from {initial_rank(adapter) * num_layers} ranks in {num_layers} layers to "
        f"{adapter.rank * num_layers}, wherever they matter most: every {adapter.delta_t} steps after the first "
        f"{adapter.tinit_fraction:.0%} of the steps and before the last {adapter.tfinal_fraction:.0%}, in which they stay."
    )
    if adapter.orthogonal_weight:
        yield (
            f"adapter.orthogonal_weight adds {adapter.orthogonal_weight:g} times the mean of |P P' - 1| over all A and B to the "
            f"loss that is trained. train/loss and validation/loss are without it."
        )


def _if_ended_early(adapter: AdaLoraAdapter, num_steps: int) -> Iterator[str]:
    last_choice = num_steps - rank_schedule(adapter, num_steps)[1]
    yield (
        f"adapter.method adalora takes ranks away by the schedule of all {num_steps} steps: a run that ends before step "
        f"{last_choice}, or whose best checkpoint is from before it, keeps {initial_rank(adapter)} ranks in each layer, and not "
        f"{adapter.rank} on average."
    )


METHOD = Method(
    trained=_trained,
    check=_check,
    in_words=lambda adapter, held, trained: (
        f"adalora rank {initial_rank(adapter)} to {adapter.rank} on {named_targets(adapter)}{held}, {trained}"
    ),
    expert_notes=without_experts("ranks to share out"),
    # Zhang et al. 2023 take 5e-4 to 2e-3 on models of 184M; what starts at 0 stands between two small matrices, and so needs more
    # than what low-rank updates take.
    learning_rate=lambda num_parameters: min(MAX_RATE, 5 * adapter_rate(num_parameters)),
    epochs=adapter_epochs,
    weight_decay=0.0,  # as low-rank updates: the rank already limits what it can do
    unread=_unread,
    reasons=_reasons,
    if_ended_early=_if_ended_early,
    when="few ranks, put where they matter; needs many steps to know where, and a rate of its own",
)
