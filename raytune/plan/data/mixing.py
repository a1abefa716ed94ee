"""How often an epoch passes over the rows of each source: by passes, proportions or temperature, and for what is replayed. Pure.

Parts are of targets, which is what a loss counts. An epoch holds each document of a source as often as there are whole passes,
and a part of them once more, in each epoch another part (`data.mixing`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from raytune.config.sections.data import MOST_PASSES
from raytune.config.sections.row_sources import replayed_sources
from raytune.config.sections.run import RunConfig
from raytune.errors import DataError
from raytune.plan.data.data_report import DataReport, SourceReport, StoreReport
from raytune.units import format_count

_ROUNDING = 1e-9
MANY_PASSES = 10
"""Of a run over repeated rows, beyond which the plan warns of learning them by heart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What an epoch is to have of each source."""

    proportions: tuple[float, ...] = ()
    """Parts of the targets, by source; empty: not asked for."""
    passes: tuple[float, ...] = ()
    """By source; empty: not asked for."""
    max_passes: tuple[float, ...] = ()
    """By source, infinite where nothing bounds them; empty: nowhere."""
    temperature: float = 1.0
    until: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    num_replayed: int = 0
    """Of the sources, the last ones, which are replayed."""
    replay_share: float = 0.0
    """Of all targets."""


EACH_ROW_ONCE = Mixture()


def loss_weights_of(config: RunConfig) -> tuple[float, ...]:
    """Of `row_sources.trained_sources`; what is replayed counts as much as other rows, as often as it is there."""
    return (*(source.loss_weight for source in config.data.train), *(1.0 for _ in replayed_sources(config)))


def mixture_of(config: RunConfig) -> Mixture:
    """What a config asks for of `row_sources.trained_sources`."""
    train, mixing, replay = config.data.train, config.data.mixing, config.strategy.replay
    passes, bounds = [source.passes for source in train], [source.max_passes for source in train]
    return Mixture(
        proportions=tuple(source.proportion for source in train if source.proportion is not None),
        passes=tuple(each or 1.0 for each in passes) if any(passes) else (),
        max_passes=tuple(each or math.inf for each in bounds) if any(bounds) else (),
        temperature=mixing.temperature or 1.0,
        until=mixing.until,
        num_replayed=len(replayed_sources(config)),
        replay_share=replay.share if replay else 0.0,
    )


def passes_of_epoch(mixture: Mixture, num_targets: Sequence[int], names: Sequence[str]) -> list[float]:
    """How often an epoch passes over each source; 1 without a wish.

    Args:
        num_targets: of each source, once.
        names: of the sources, for messages.

    Raises:
        DataError: if a source has nothing to take a part of, or would be passed over without end.
    """
    first_replayed = len(num_targets) - mixture.num_replayed
    trained, replayed = num_targets[:first_replayed], num_targets[first_replayed:]
    passes = [*mixture.passes] or _passes_of_trained(mixture, trained, names)
    if mixture.max_passes:
        passes = [min(each, most) for each, most in zip(passes, mixture.max_passes, strict=True)]
    if replayed:
        if not sum(replayed):
            raise DataError(
                f"strategy.replay.data ({', '.join(names[first_replayed:])}) has no targets, so nothing can be replayed.",
                keys=("strategy.replay.data",),
            )
        wanted = mixture.replay_share / (1 - mixture.replay_share) * sum(map(_times, passes, trained))
        passes += [wanted / sum(replayed)] * len(replayed)
    for index, (each, name) in enumerate(zip(passes, names, strict=True)):
        if each > MOST_PASSES:
            raise _endless(mixture, index, name, each, first_replayed)
    return passes


def size_of_epoch(mixture: Mixture, sizes: Sequence[int], names: Sequence[str]) -> float:
    """Of all sources together, as often as an epoch has them, in the unit of their sizes; see `passes_of_epoch`."""
    return sum(map(_times, passes_of_epoch(mixture, sizes, names), sizes))


def _passes_of_trained(mixture: Mixture, num_targets: Sequence[int], names: Sequence[str]) -> list[float]:
    """Of the sources that are not replayed. Logarithms, because a low temperature makes powers of any size."""
    if mixture.proportions and not all(num_targets):
        empty = [index for index, number in enumerate(num_targets) if not number]
        raise DataError(
            f"{names[empty[0]]} has no targets, so it can have no part of the mixture. Leave it out of data.train, or look at "
            f"why none of its rows is trained.",
            keys=(f"data.train.{empty[0]}.proportion",),
        )
    density = [0.0] * len(num_targets)  # logarithm of how often it is asked for, up to a factor that all share
    if mixture.proportions:
        density = [math.log(part / number) for part, number in zip(mixture.proportions, num_targets, strict=True)]
    elif mixture.temperature != 1:
        density = [(1 / mixture.temperature - 1) * math.log(number) if number else 0.0 for number in num_targets]
    there = [each for each, number in zip(density, num_targets) if number]
    edge = (min if mixture.until == "all_exhausted" else max)(there, default=0.0)
    return [math.exp(min(each - edge, 700.0)) if number else 1.0 for each, number in zip(density, num_targets)]


def _times(passes: float, number: int) -> float:
    return passes * number


def _endless(mixture: Mixture, index: int, name: str, passes: float, first_replayed: int) -> DataError:
    asked = f"an epoch would pass over {name} {format_count(passes)} times; more than {MOST_PASSES:g} are refused."
    if index >= first_replayed:
        fix = "Name more rows in strategy.replay.data, or lower strategy.replay.share"
        return DataError(f"strategy.replay.share is {mixture.replay_share:g}: {asked} {fix}.", keys=("strategy.replay.share",))
    fix = "Give it max_passes, set data.mixing.until to first_exhausted, which repeats no rows and takes fewer of other sources"
    if mixture.proportions:
        keys = (f"data.train.{index}.proportion",)
        return DataError(f"{keys[0]} is {mixture.proportions[index]:g}: {asked} {fix}, or lower it.", keys=keys)
    keys = ("data.mixing.temperature",)
    return DataError(f"{keys[0]} is {mixture.temperature:g}: {asked} {fix}, or bring it nearer to 1.", keys=keys)


# --- In words


def mixture_in_words(report: StoreReport, epochs: float) -> list[str]:
    """What an epoch has of each source and what that counts, a line each; empty where each row counts once, and as much.

    Args:
        epochs: of the run, which sees as many times what is replayed.
    """
    sources = report.sources
    if all(source.mixed is None and source.loss_weight == 1 for source in sources):
        return []
    targets = sum(source.in_epoch.targets for source in sources)
    weight = sum(source.in_epoch.targets * source.loss_weight for source in sources)
    has_weights = len({source.loss_weight for source in sources}) > 1
    return [_part_in_words(source, targets, weight if has_weights else 0.0, epochs) for source in sources]


def _part_in_words(source: SourceReport, num_targets: int, weight: float, epochs: float) -> str:
    part = source.in_epoch
    words = (
        f"{source.name}{' (replay)' * source.is_replayed}: {_in_passes(source.passes)} per epoch, {part.documents} documents, "
        f"{format_count(part.tokens)} tokens, {format_count(part.targets)} targets ({part.targets / num_targets:.1%})"
    )
    if weight:
        share = part.targets * source.loss_weight / weight
        words += f", which weigh {source.loss_weight:g} each ({share:.1%} of the loss)"
    if source.is_replayed:
        seen = (format_count(epochs * number) for number in (part.documents, part.tokens))
        words += "; in the run {} documents, {} tokens".format(*seen)
    return words


def _in_passes(passes: float) -> str:
    return "each row once" if passes == 1 else f"{passes:.3g} passes"


def mixture_notes(config: RunConfig, report: DataReport | None, epochs: float) -> Iterator[str]:
    """What a reader of the plan may not expect.

    Args:
        report: None where no row was read.
    """
    if config.strategy.replay and not config.strategy.replay.share:
        yield "strategy.replay.share is 0: no row is replayed."
    sources = report.train.sources if report else []
    for source in sources:
        times = source.passes * epochs
        if source.passes > 1 and times > MANY_PASSES:
            yield (
                f"Each row of {source.name} is seen {times:.3g} times in this run ({source.passes:.3g} passes per epoch): it may "
                f"be learned by heart."
            )
        if source.passes < 1:
            unseen = f"{1 - times:.1%} of them are in none of this run" if times < 1 else "the run sees all of them"
            yield (
                f"An epoch has {source.passes:.1%} of the documents of {source.name}, and each epoch others: after "
                f"{math.ceil(1 / source.passes - _ROUNDING)} of them each was seen once or twice; {unseen}."
            )
    yield from _bounded(config, report)
    weights = {source.loss_weight for source in sources}
    if len(weights) > 1:
        yield (
            "train/loss counts targets by the loss_weight of their source; validation/loss of held-out rows counts each source "
            "as training does."
        )
    elif weights - {1.0}:
        yield f"All sources have loss_weight {weights.pop():g}. Weights count against each other, so this one changes nothing."


def _bounded(config: RunConfig, report: DataReport | None) -> Iterator[str]:
    """Where `max_passes` is less than what was asked for: what is left of it."""
    mixture = mixture_of(config)
    sources = report.train.sources[: len(mixture.max_passes)] if report else []
    num_targets = [source.targets for source in sources]
    if not sum(num_targets):
        return
    asked = _passes_of_trained(mixture, num_targets, [source.name for source in sources])
    total, in_epoch = sum(map(_times, asked, num_targets)), sum(source.in_epoch.targets for source in sources)
    for source, each, most in zip(sources, asked, mixture.max_passes, strict=True):
        if each > most:
            has, asks = source.in_epoch.targets / in_epoch, each * source.targets / total
            yield (
                f"max_passes bounds {source.name} to {most:g} passes per epoch, of the {each:.3g} that its part asks for: it has "
                f"{has:.1%} of the targets of data.train in place of {asks:.1%}."
            )
