"""Training rows that are streamed: what goes with that, and what a run is planned by. Pure."""

from collections.abc import Iterator
from typing import Literal

from raytune.config.adapter import num_virtual_tokens
from raytune.config.augment import AugmentSection
from raytune.config.data import DataSource, Role, TokenWeightsSection
from raytune.config.data_limits import LimitsSection
from raytune.config.row_sources import replayed_sources
from raytune.config.run import RunConfig
from raytune.errors import PlanError
from raytune.plan.augmenting import code_of
from raytune.plan.value import Plan
from raytune.user_code import UserCode

_KEY = "data.streaming"


class StreamPlan(Plan):
    """What workers tokenise while they train (data.stream)."""

    source: DataSource
    window: int
    """Rows that are shuffled and packed among themselves."""
    system: str | None
    system_when: Literal["missing", "always"]
    max_turns: int | None
    reasoning: Literal["keep", "last", "each", "none"]
    targets: Literal["completion", "assistant", "last", "all"] | list[Role]
    train_empty_thought: bool
    token_weights: TokenWeightsSection
    augment: AugmentSection
    augment_code: UserCode | None
    """Of its function, if it has one."""
    too_long: Literal["truncate", "truncate_left", "drop", "split", "split_turns", "error", "auto"]
    packing: Literal["best_fit", "token_budget", "none"]
    num_virtual: int
    on_bad_row: Literal["error", "skip"]
    on_prompt_mismatch: Literal["error", "accept"]
    limits: LimitsSection
    tokenizer_fingerprint: str


def stream_plan(config: RunConfig, tokenizer_fingerprint: str = "") -> StreamPlan | None:
    """What a config streams; None: training rows have a store.

    Args:
        tokenizer_fingerprint: of the run's tokenizer; empty where it is not here.

    Raises:
        UserError: if the code of data.augment.function is not here.
    """
    data = config.data
    if data.streaming is None:
        return None
    return StreamPlan(
        source=data.train[0],
        window=data.streaming.window,
        system=data.system,
        system_when=data.system_when,
        max_turns=data.max_turns,
        reasoning=data.reasoning,
        targets=data.targets,
        train_empty_thought=data.train_empty_thought,
        token_weights=data.token_weights,
        augment=data.augment,
        augment_code=code_of(data.augment),
        too_long=data.too_long,
        packing=data.packing,
        num_virtual=0 if data.packing == "none" else num_virtual_tokens(config.adapter),
        on_bad_row=data.on_bad_row,
        on_prompt_mismatch=data.on_prompt_mismatch,
        limits=data.limits,
        tokenizer_fingerprint=tokenizer_fingerprint,
    )


def check_streaming(config: RunConfig) -> None:
    """Refuse what needs to know all rows before the first is trained.

    Raises:
        PlanError: with what to set instead.
    """
    if config.data.streaming is None:
        return
    for key, why, instead in _unfit(config):
        raise PlanError(f"{_KEY}: {why}. {instead}, or leave {_KEY} out.", keys=(key, _KEY))


def _unfit(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Keys that do not go with it, why, and what would."""
    data, training = config.data, config.training
    if training.max_steps is None:
        yield "training.max_steps", "how many steps a pass over the rows has is known at its end", "Set training.max_steps"
    if len(data.train) > 1:
        yield "data.train", "several sources are not streamed side by side", "Name one, whose path may be a glob or a folder"
    source = data.train[0]
    if "://" in source.path:
        yield "data.train", f"{source.path} would be copied whole", "Mount the bucket on every node, and name the files there"
    if replayed_sources(config):
        yield "strategy.replay", "a share of all targets is replayed, and how many there are is not known", "Leave replay out"
    if data.quality is not None:
        alone = "raytune data check --rows N reads the first N with it, and trains nothing"
        yield "data.quality", "data.quality holds each row against all others", f"Leave data.quality out ({alone})"
    for key, is_set, held_out in (
        ("data.validation_fraction", data.validation_fraction, "data.validation"),
        ("data.fold", data.fold, "data.validation"),
        ("data.test_fraction", data.test_fraction, "data.test"),
    ):
        if is_set:
            why = f"rows that {key} holds out would be looked for in all of them before the first is trained"
            yield key, why, f"Name rows as {held_out}"
    sections = {"evaluation": config.evaluation.every_epochs, "checkpoint": config.checkpoint.every_epochs}
    if (while_training := config.evaluation.while_training) is not None:
        sections["evaluation.while_training"] = while_training.every_epochs
    for section, epochs in sections.items():
        if epochs is not None:
            yield f"{section}.every_epochs", "epochs are not counted", f"Set {section}.every_steps"
    for index, phase in enumerate(config.strategy.unfreeze):
        if phase.from_epoch:
            yield f"strategy.unfreeze.{index}.from_epoch", "epochs are not counted", "Set from_step"
