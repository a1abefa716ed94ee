"""Training rows that are streamed: what goes with that, and what a run is planned by. Pure."""

from collections.abc import Iterator
from typing import Literal

from raytune.config.sections.adapter import num_virtual_tokens
from raytune.config.sections.augment import AugmentSection
from raytune.config.sections.data import DataSection, FileKind, Role, TokenWeightsSection, TrainSource, named_sources
from raytune.config.sections.data_limits import LimitsSection
from raytune.config.sections.row_sources import replayed_sources
from raytune.config.sections.run import RunConfig
from raytune.errors import PlanError
from raytune.plan.data.augmenting import code_of
from raytune.plan.value import Plan
from raytune.storage import is_local
from raytune.units import MIB, format_bytes
from raytune.user_code import UserCode

_KEY = "data.streaming"


KEPT_BYTES = 48 * MIB
"""Of the pieces of a source beside those that are fetched ahead: what is read, and what is on its way without being wanted any
longer."""


class StreamedFile(Plan):
    """A file as it was when the run was planned, which it has to be as long as the run reads it."""

    name: str
    """As the user knows it."""
    path: str
    kind: FileKind
    split: str
    size: int
    """Bytes; 0 of a data set, which is a folder, and of built-in rows."""
    mark: str
    """What its storage changes when it is written again."""

    @property
    def is_far(self) -> bool:
        """Whether it is read piece by piece from behind a URL."""
        return not is_local(self.path)


class StreamedSource(Plan):
    source: TrainSource
    files: list[StreamedFile] = []
    """In the order in which they are read; none before they were looked for."""

    @property
    def is_far(self) -> bool:
        """Whether files of it are read from behind a URL."""
        return any(file.is_far for file in self.files) or not is_local(self.source.path)


class StreamPlan(Plan):
    """What workers tokenise while they train (data.stream)."""

    sources: list[StreamedSource]
    window: int
    """Rows that are shuffled and packed among themselves."""
    read_ahead_mib: int
    """Of files behind URLs, that each worker fetches ahead of what it reads."""
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

    @property
    def ahead_bytes(self) -> int:
        """Of memory on each worker, for pieces of files behind URLs."""
        num_far = sum(one.is_far for one in self.sources)
        return self.read_ahead_mib * MIB + num_far * KEPT_BYTES if num_far else 0


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
        sources=[StreamedSource(source=source) for source in data.train],
        window=data.streaming.window,
        read_ahead_mib=data.streaming.read_ahead_mib,
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
    yield from _unfit_mixing(data)
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


def _unfit_mixing(data: DataSection) -> Iterator[tuple[str, str, str]]:
    """What of the mixing of sources needs to know how much there is of each; proportions do not."""
    are_parts = "Give each source a proportion, its part of the targets"
    for index, source in enumerate(data.train):
        if source.passes is not None:
            yield f"data.train.{index}.passes", "epochs are not counted, and passes are those of one", are_parts
        if source.max_passes is not None:
            yield f"data.train.{index}.max_passes", "epochs are not counted, and passes are those of one", are_parts
    if data.mixing.temperature is not None:
        yield "data.mixing.temperature", "it is of the targets of each source, which are counted at its end", are_parts
    if data.mixing.until != "all_exhausted":
        why = "epochs are not counted, and each source begins again behind its last row"
        yield "data.mixing.until", why, "Leave mixing.until out: proportions are kept all the same"
    if len(data.train) > 1 and data.train[0].proportion is None:
        why = "how many rows each of several sources has, for each row to come once, is known at their end"
        yield "data.train", why, f"{are_parts}; or name one source, whose path may be a glob or a folder"


def stream_in_words(stream: StreamPlan) -> list[str]:
    """Where rows come from and in which parts, a line each; empty of one source in mounted files that counts as usual."""
    lines = []
    if len(stream.sources) > 1:
        total = sum(one.source.proportion or 0.0 for one in stream.sources)
        names = named_sources([one.source for one in stream.sources])
        lines += [
            f"{name}: {(source.proportion or 0.0) / total:.1%} of the targets"
            + (f", which weigh {source.loss_weight:g} each" if source.loss_weight != 1 else "")
            for name, source in names.items()
            if isinstance(source, TrainSource)
        ]
    far = [file for one in stream.sources for file in one.files if file.is_far]
    if far:
        ahead = f"up to {stream.read_ahead_mib} MiB ahead" if stream.read_ahead_mib else "nothing ahead"
        lines.append(
            f"{len(far)} file{'s' * (len(far) > 1)} behind URLs, {format_bytes(sum(file.size for file in far))}: each worker "
            f"fetches them piece by piece, {ahead} in memory, and writes none to a disk"
        )
    return lines
