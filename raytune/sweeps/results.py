"""What a sweep came to: its trials, ranked, what they cost, and which keys mattered. Pure: values in, values and texts out."""

import csv
import io
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeGuard

from raytune.metrics import decode_number, encode_number
from raytune.sweeps.trial import Trial
from raytune.units import format_seconds

State = Literal["waiting", "running", "finished", "stopped", "failed"]
Mode = Literal["min", "max"]

# Importance is told at the largest step that so many of the measured trials have reached. Beyond it are the survivors of the
# rungs, who were chosen by the very value that is to be explained.
COMMON_SHARE = 0.75
FEWEST_TRIALS = 4
MOST_BINS = 6
NUM_SHUFFLES = 400


# --- Values ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """What one trial came to.

    Attributes:
        value: best finite value of the metric so far; None: never measured.
        step: last step that was trained.
        num_steps: its full budget.
        rung: index of the last rung that it reached, from 0; None before the first.
        worker_s: wall seconds × workers that it held, over all attempts.
        cause: why it failed, or which rung stopped it.
        curve: (step, value) of the metric wherever it was measured.
        folder: its run folder.
    """

    trial: Trial
    state: State
    value: float | None
    step: int
    num_steps: int
    rung: int | None
    worker_s: float
    cause: str | None
    curve: tuple[tuple[int, float], ...]
    folder: str

    @property
    def is_ranked(self) -> bool:
        """Whether it may win: it did not fail and has a finite value."""
        return self.state != "failed" and self.value is not None and math.isfinite(self.value)

    @property
    def num_rungs(self) -> int:
        """How many rungs it reached."""
        return 0 if self.rung is None else self.rung + 1

    def to_json(self) -> dict[str, Any]:
        """The result as strict JSON."""
        return {
            "name": self.trial.name,
            "number": self.trial.number,
            "values": dict(self.trial.values),
            "state": self.state,
            "value": None if self.value is None else encode_number(self.value),
            "step": self.step,
            "num_steps": self.num_steps,
            "rung": self.rung,
            "worker_s": self.worker_s,
            "cause": self.cause,
            "curve": [[step, encode_number(value)] for step, value in self.curve],
            "folder": self.folder,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """What `to_json` was called on."""
        return cls(
            trial=Trial(number=record["number"], values=dict(record["values"])),
            state=record["state"],
            value=None if record["value"] is None else decode_number(record["value"]),
            step=record["step"],
            num_steps=record["num_steps"],
            rung=record["rung"],
            worker_s=record["worker_s"],
            cause=record["cause"],
            curve=tuple((step, decode_number(value)) for step, value in record["curve"]),
            folder=record["folder"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """What a sweep came to, or has come to so far.

    Attributes:
        metric: name of the metric that trials are compared by, such as `validation/loss`.
        rungs: steps of the rungs, for a trial with the usual number of tokens per step.
        keys: keys of the space, in its order.
        trials: as `ranked` puts them.
        wall_s: seconds that all commands of the sweep took together.
        spent_worker_s: wall seconds × workers that were held.
        full_worker_s: what it would have taken to train every trial to its full budget.
        finished_before: whether it was only read: an earlier command had finished it.
    """

    name: str
    folder: str
    metric: str
    mode: Mode
    device: Literal["cpu", "cuda"]
    rungs: tuple[int, ...]
    keys: tuple[str, ...]
    trials: tuple[TrialResult, ...]
    wall_s: float
    spent_worker_s: float
    full_worker_s: float
    finished_before: bool = False

    @property
    def best(self) -> TrialResult | None:
        """The winner; None while no trial has a value that counts."""
        return next((trial for trial in ranked(self.trials, self.mode) if trial.is_ranked), None)

    @property
    def is_complete(self) -> bool:
        """Whether every trial has ended and at least one was trained to the end: only then can a saving be told."""
        states = {trial.state for trial in self.trials}
        return "finished" in states and not states & {"waiting", "running"}

    @property
    def saved_share(self) -> float:
        """Share of the full grid's worker seconds that were not needed; below zero where faults cost more than stopping saved."""
        return 1 - self.spent_worker_s / self.full_worker_s if self.full_worker_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The result as strict JSON. `best` and `saved_share` are for readers; they follow from the rest."""
        return {
            "name": self.name,
            "folder": self.folder,
            "metric": self.metric,
            "mode": self.mode,
            "device": self.device,
            "rungs": list(self.rungs),
            "keys": list(self.keys),
            "best": self.best.trial.name if self.best else None,
            "saved_share": self.saved_share,
            "wall_s": self.wall_s,
            "spent_worker_s": self.spent_worker_s,
            "full_worker_s": self.full_worker_s,
            "trials": [trial.to_json() for trial in self.trials],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """What `to_json` was called on."""
        return cls(
            name=record["name"],
            folder=record["folder"],
            metric=record["metric"],
            mode=record["mode"],
            device=record["device"],
            rungs=tuple(record["rungs"]),
            keys=tuple(record["keys"]),
            trials=tuple(TrialResult.from_json(trial) for trial in record["trials"]),
            wall_s=record["wall_s"],
            spent_worker_s=record["spent_worker_s"],
            full_worker_s=record["full_worker_s"],
        )


def ranked(results: Iterable[TrialResult], mode: Mode) -> list[TrialResult]:
    """Best value first, then those without a finite value, failed ones last; equal ones by number."""

    def place(result: TrialResult) -> tuple[int, float, int]:
        if result.is_ranked:
            assert result.value is not None
            return 0, result.value if mode == "min" else -result.value, result.trial.number
        return (2 if result.state == "failed" else 1), 0.0, result.trial.number

    return sorted(results, key=place)


# --- Tables ------------------------------------------------------------------------------------------------------------------


def trial_records(result: SweepResult) -> list[dict[str, Any]]:
    """One flat record per trial, best first. Keys that a trial does not set are missing; only trials that may win have a rank."""
    return [
        {
            "rank": rank if trial.is_ranked else None,
            "trial": trial.trial.name,
            "state": trial.state,
            "value": None if trial.value is None else encode_number(trial.value),
            "step": trial.step,
            "num_steps": trial.num_steps,
            "rungs_reached": trial.num_rungs,
            "worker_s": round(trial.worker_s, 3),
            "cause": plain_text(trial.cause) or None,
            "folder": trial.folder,
            **{key: trial.trial.values[key] for key in result.keys if key in trial.trial.values},
        }
        for rank, trial in enumerate(result.trials, start=1)
    ]


def trials_jsonl(result: SweepResult) -> str:
    """`trials.jsonl`: a record per line."""
    return "".join(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n" for record in trial_records(result))


def trials_csv(result: SweepResult) -> str:
    """`trials.csv`: as `trials.jsonl`. An empty field is what is not there; a key that is set to nothing reads `null`."""
    columns = [*_RECORD_COLUMNS, *result.keys]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for record in trial_records(result):
        writer.writerow([_field(record, column) for column in columns])
    return text.getvalue()


_RECORD_COLUMNS = ("rank", "trial", "state", "value", "step", "num_steps", "rungs_reached", "worker_s", "cause", "folder")


def _field(record: Mapping[str, Any], column: str) -> str:
    if column not in record or (column in _RECORD_COLUMNS and record[column] is None):
        return ""
    value = record[column]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def result_table(result: SweepResult) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the ranked table, for people: rank, trial, metric, steps, what became of it, and a column per key."""
    headings = ["", "trial", result.metric, "steps", "state", *short_keys(result.keys)]
    rows = [
        [
            str(rank) if trial.is_ranked else "",
            trial.trial.name,
            metric_text(trial.value),
            f"{trial.step}/{trial.num_steps}",
            trial.state,
            *(value_text(trial.trial.values[key]) if key in trial.trial.values else "" for key in result.keys),
        ]
        for rank, trial in enumerate(result.trials, start=1)
    ]
    return headings, rows


def short_keys(keys: Sequence[str]) -> list[str]:
    """Every key by its last part where no other ends alike: `learning_rate` for `training.learning_rate`."""
    count = Counter(key.rpartition(".")[2] for key in keys)
    return [last if count[last := key.rpartition(".")[2]] == 1 else key for key in keys]


# --- Words -------------------------------------------------------------------------------------------------------------------


def summary(result: SweepResult) -> list[str]:
    """The sweep in three sentences: who won, what became of the others, what it cost."""
    return [_best_sentence(result), _states_sentence(result), _cost_sentence(result)]


def plain_text(text: str | None) -> str:
    """A message as anything can show it: Ray's carry colours of a terminal, and files' names may not be text at all."""
    return _NO_TEXT.sub("", text or "").encode(errors="replace").decode().strip()


_NO_TEXT = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of a key is a number, which `true` is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def value_text(value: object) -> str:
    """A value of a key, as it would stand in YAML: numbers in four digits, text as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(value_text(part) for part in value)}]"
    return json.dumps(value, ensure_ascii=False)


def metric_text(value: float | None) -> str:
    """A value of the metric; a dash where it was never measured."""
    return "–" if value is None else f"{value:.4g}"


def state_text(trial: TrialResult) -> str:
    """`stopped at rung 1`, `finished`: what became of it."""
    return f"stopped at rung {trial.num_rungs}" if trial.state == "stopped" and trial.num_rungs else trial.state


def worker_time(seconds: float, device: Literal["cpu", "cuda"]) -> str:
    """`845 CPU-worker seconds`, `12.3 GPU hours`."""
    worker = "GPU" if device == "cuda" else "CPU-worker"
    return f"{seconds / 3600:,.1f} {worker} hours" if seconds >= 3600 else f"{seconds:,.0f} {worker} seconds"


def _best_sentence(result: SweepResult) -> str:
    best = result.best
    if best is None:
        return f"No trial has a value of {result.metric}: there is no winner."
    values = ", ".join(f"{key} {value_text(value)}" for key, value in best.trial.values.items())
    extreme = "lowest" if result.mode == "min" else "highest"
    return (
        f"Best is {best.trial.name}: {result.metric} {metric_text(best.value)} ({extreme}), "
        f"trained for {best.step} of {best.num_steps} steps{f', with {values}' if values else ''}."
    )


def _states_sentence(result: SweepResult) -> str:
    count = Counter(trial.state for trial in result.trials)
    words = []
    if count["finished"]:
        words.append(f"{count['finished']} finished")
    if count["stopped"]:
        at = Counter(trial.rung for trial in result.trials if trial.state == "stopped" and trial.rung is not None)
        places = "; ".join(f"{at[rung]} at {rung_text(result, rung)}" for rung in sorted(at))
        words.append(f"{count['stopped']} stopped early" + (f" ({places})" if places else ""))
    words += [f"{count[state]} {word}" for state, word in _OTHER_STATES if count[state]]
    return f"{len(result.trials)} trial{'' if len(result.trials) == 1 else 's'}: {', '.join(words) or 'none started'}."


_OTHER_STATES: tuple[tuple[State, str], ...] = (("failed", "failed"), ("running", "still running"), ("waiting", "not started"))


def rung_text(result: SweepResult, rung: int) -> str:
    """`rung 1, step 10`. Rungs are counted from one for people."""
    return f"rung {rung + 1}" + (f", step {result.rungs[rung]}" if rung < len(result.rungs) else "")


def _cost_sentence(result: SweepResult) -> str:
    spent = f"Spent {worker_time(result.spent_worker_s, result.device)} in {format_seconds(result.wall_s)}"
    if result.full_worker_s <= 0:
        return f"{spent}."
    full = f"training every trial to the end would take about {worker_time(result.full_worker_s, result.device)}"
    saved = result.saved_share
    if not result.is_complete:
        return f"{spent}; {full}."
    return f"{spent}; {full}: {abs(saved):.0%} {'saved' if saved >= 0 else 'more than that was spent'}."


# --- Importance --------------------------------------------------------------------------------------------------------------


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
