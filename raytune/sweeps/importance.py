"""Which keys mattered in a sweep: how much of the differences between its trials each explains by itself. Pure."""

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from raytune.sweeps.results import Mode, TrialResult
from raytune.sweeps.words import is_number

# Importance is told at the largest step that so many of the measured trials have reached. Beyond it are the survivors of the
# rungs, who were chosen by the very value that is to be explained.
COMMON_SHARE = 0.75
FEWEST_TRIALS = 4
MOST_BINS = 6
NUM_SHUFFLES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyImportance:
    """How much of the differences between trials one key explains.

    Attributes:
        share: of the variance of the trials' ranks, 0 to 1; None where it cannot be told: the key never varied, all values are
            equal, or no two trials have a value of the key in common.
        chance: the share that values shuffled among the trials stay below 95 times in 100; what is lower may well be noise.
    """

    key: str
    share: float | None
    chance: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """Importance of every key, most important first.

    Attributes:
        step: at which the trials were compared; None if there were too few to compare.
        num_trials: that were compared.
    """

    step: int | None
    num_trials: int
    keys: tuple[KeyImportance, ...]


def importance(results: Sequence[TrialResult], keys: Sequence[str], mode: Mode) -> Importance:
    """How much each key mattered by itself: one-way analysis of variance of the trials' ranks, adjusted for the number of groups.

    Trials are compared at equal steps only: at the largest step that three quarters of the measured trials have reached, each by
    its last value up to there. With early stopping this is usually the first rung; what matters only later is not seen. A trial
    that diverged counts as worst from then on; one that failed otherwise counts up to where it came.

    Values become ranks, so that one outlier does not outweigh all others (Kruskal and Wallis 1952); logarithms would change
    nothing. A number with many values is cut into up to six bins of equally many trials, any other value is a group of its
    own, and so is not being set. The share is epsilon squared (Kelley 1935), 1 - (within / (n - k)) / (total / (n - 1)): near
    zero on average for a key that does not matter, however many groups it has.

    Limits: keys are looked at one by one, hence shares need not add up to one. What two keys do together only is not seen, and
    keys that vary together (a derived key; a search that homes in) share the credit. Few trials tell little: see `chance`.
    """
    step, compared = _comparable(results)
    if step is None:
        return Importance(
            step=None, num_trials=len(compared), keys=tuple(KeyImportance(key=key, share=None, chance=None) for key in keys)
        )
    sign = 1.0 if mode == "min" else -1.0
    ranks = _midranks([sign * value if math.isfinite(value) else math.inf for _, value in compared])
    shuffled = [random.Random(seed).sample(ranks, len(ranks)) for seed in range(NUM_SHUFFLES)]
    found = []
    for key in keys:
        groups = _groups([trial.trial.values.get(key, _NOT_SET) for trial, _ in compared])
        share = _explained_share(groups, ranks)
        by_chance = [_explained_share(groups, order) or 0.0 for order in shuffled] if share is not None else None
        found.append(
            KeyImportance(key=key, share=share, chance=sorted(by_chance)[int(0.95 * NUM_SHUFFLES)] if by_chance else None)
        )
    found.sort(key=lambda item: -1.0 if item.share is None else item.share, reverse=True)
    return Importance(step=step, num_trials=len(compared), keys=tuple(found))


_NOT_SET = object()


def _comparable(results: Sequence[TrialResult]) -> tuple[int | None, list[tuple[TrialResult, float]]]:
    """The step to compare at, and the trials that have a value there with that value."""
    measured = [trial for trial in results if trial.curve]
    if len(measured) < FEWEST_TRIALS:
        return None, []
    for step in sorted({step for trial in measured for step, _ in trial.curve}, reverse=True):
        there = [(trial, value) for trial in measured if (value := _value_at(trial, step)) is not None]
        if step > 0 and len(there) >= max(FEWEST_TRIALS, COMMON_SHARE * len(measured)):
            return step, there
    return None, []


def _value_at(trial: TrialResult, step: int) -> float | None:
    """The last value that was measured up to a step, unless the trial ended before that step without having diverged."""
    value = next((value for measured, value in reversed(trial.curve) if measured <= step), None)
    reached = max(trial.step, trial.curve[-1][0])
    return value if value is not None and (reached >= step or not math.isfinite(value)) else None


def _groups(values: Sequence[object]) -> list[int]:
    """The group of each value: bins for numbers if there are many, otherwise one group per value."""
    names = ["not set" if value is _NOT_SET else json.dumps(value, sort_keys=True) for value in values]
    numbers = [value for value in values if is_number(value)]
    num_bins = max(2, min(MOST_BINS, round(math.sqrt(len(values)))))
    if len(set(numbers)) > num_bins:
        bins = iter([f"bin {int(rank * num_bins / len(numbers))}" for rank in _midranks(numbers)])
        names = [next(bins) if is_number(value) else name for value, name in zip(values, names)]
    numbered = {name: group for group, name in enumerate(dict.fromkeys(names))}
    return [numbered[name] for name in names]


def _midranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 0.5 to n - 0.5; equal values share the middle of their ranks."""
    order = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(order)))}
    count = Counter(order)
    return [first[value] + count[value] / 2 for value in values]


def _explained_share(groups: Sequence[int], ranks: Sequence[float]) -> float | None:
    num_trials, num_groups = len(ranks), max(groups) + 1
    sums, sizes = [0.0] * num_groups, [0] * num_groups
    for group, rank in zip(groups, ranks):
        sums[group] += rank
        sizes[group] += 1
    mean = sum(sums) / num_trials
    total = sum((rank - mean) ** 2 for rank in ranks)
    if num_groups == 1 or num_groups == num_trials or total == 0:
        return None
    between = sum(size * (group_sum / size - mean) ** 2 for group_sum, size in zip(sums, sizes))
    share = 1 - ((total - between) / (num_trials - num_groups)) / (total / (num_trials - 1))
    return min(1.0, max(0.0, share))
