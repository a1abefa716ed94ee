"""What a run came to, in words: how long it took, what that cost, and what is better and worse than in its base. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raytune.config.sections.evaluation import GENERATION
from raytune.config.words.metric_names import METRICS
from raytune.evaluation.compare import Comparison, Score
from raytune.metrics.history import History
from raytune.metrics.json_numbers import encode_number
from raytune.plan.data.split import TEST
from raytune.plan.run_plan import CostPlan
from raytune.units import format_count, format_dollars, format_seconds

ENDS = ("attempt_failed", "run_finished", "run_interrupted")
"""Events by which the driver closes an attempt."""
VALIDATION = "validation/"


# --- Time and money ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Time and money of a run so far, over all its attempts."""

    attempts: int
    total_s: float
    """From the start of workers to the end of an attempt; the time between attempts is none of it."""
    training_s: float
    """Of that, from the first step to the last thing that was measured or saved."""
    usd: float | None
    """By the list price of the plan's machines for all of `total_s`; None where the plan knows none."""


def spent(events: Sequence[Mapping[str, Any]], history: History, cost: CostPlan | None) -> Spent:
    """Time and money of all attempts. Of one whose driver died, what it last wrote counts as its end.

    Args:
        events: of events.jsonl, in their order.
    """
    total_s = training_s = 0.0
    attempts = sorted({event["attempt"] for event in events if event["event"] == "attempt_started"})
    for attempt in attempts:
        own = [event for event in events if event["attempt"] == attempt]
        begun = next(event["time"] for event in own if event["event"] == "attempt_started")
        measured = [point.time for point in history.points if point.attempt == attempt]
        worked = [event["time"] for event in own if event["event"] not in ENDS]
        last = max([*worked, *measured])
        total_s += max([last, *(event["time"] for event in own)]) - begun
        first_step = next((event["time"] for event in own if event["event"] == "training_started"), last)
        training_s += last - first_step
    return Spent(attempts=len(attempts), total_s=total_s, training_s=training_s, usd=_dollars(total_s, cost))


def _dollars(seconds: float, cost: CostPlan | None) -> float | None:
    if cost is None or not cost.usd or not cost.hours:
        return None
    planned = cost.spot_usd if cost.is_spot and cost.spot_usd is not None else cost.usd
    return planned / cost.hours * seconds / 3600


# --- Better or worse ---------------------------------------------------------------------------------------------------------


Kind = Literal["score", "loss", "perplexity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that was measured of the base and of the tuned model."""

    name: str
    """As in metrics; of a suite the metric's, behind the suite's name where that is not `generation`."""
    words: str
    base: float
    tuned: float
    kind: Kind
    """Of a score, the higher the better; of the others the lower."""
    is_share: bool = False
    """Whether it lies in 0..1, and is shown in per cent."""
    interval: tuple[float, float] | None = None
    """In which the gain of a suite's lies with a probability of 95 %."""
    suite: str | None = None
    """Whose it is; None: of the validation rows."""

    @property
    def gain(self) -> float:
        """Tuned less base, whichever is better."""
        return self.tuned - self.base

    @property
    def percent(self) -> float | None:
        """Change in per cent of the base's value; None where that is 0."""
        return 100 * self.gain / self.base if self.base else None

    @property
    def is_better(self) -> bool:
        return self.gain > 0 if self.kind == "score" else self.gain < 0

    @property
    def is_worse(self) -> bool:
        """Other than by the choice of rows, as far as that is known."""
        low, high = self.interval or (self.gain, self.gain)
        return high < 0 if self.kind == "score" else low > 0

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Base, tuned, gain, interval of the gain, and how much better the tuned model is, in per cent, as tables show them."""
        form = "{:.1%}" if self.is_share else "{:.4g}" if self.suite else "{:.4f}" if self.kind == "loss" else "{:.3f}"
        signed = form.replace(":", ":+")
        interval = "" if self.interval is None else " to ".join(signed.format(bound) for bound in self.interval)
        better = "-" if self.percent is None else f"{self.percent if self.kind == 'score' else -self.percent:+.1f}%"
        return form.format(self.base), form.format(self.tuned), signed.format(self.gain), interval, better

    @property
    def sentence(self) -> str:
        base, tuned, *_ = self.cells
        if self.is_share:
            by = f"{100 * self.gain:+.1f} points"
        else:
            by = "" if self.percent is None else f"{abs(self.percent):.4g} % {'higher' if self.gain > 0 else 'lower'}"
        could_be_chance = self.interval is not None and self.interval[0] <= 0 <= self.interval[1]
        notes = [note for note in (by, "which may be the choice of rows" if could_be_chance else "") if note]
        return f"{self.words} from {base} to {tuned}" + (f" ({', '.join(notes)})" if notes else "")

    def to_json(self) -> dict[str, Any]:
        facts = {"name": self.name, "words": self.words, "suite": self.suite}
        numbers = {"base": self.base, "tuned": self.tuned, "gain": self.gain}
        percent = None if self.percent is None else encode_number(self.percent)
        encoded = {name: encode_number(value) for name, value in numbers.items()}
        return {**facts, **encoded, "percent": percent, "interval": self.interval, "is_better": self.is_better}


def changes(history: History, metrics: Mapping[str, float], comparisons: Mapping[str, Comparison]) -> tuple[Change, ...]:
    """Scores of answers, then losses on validation rows: over all sets, and of each where there are several.

    Args:
        metrics: of the model that the run left.
    """
    found = [
        Change(
            name=name if suite == GENERATION else f"{suite}/{name}",
            words=score.words if suite == GENERATION else f"{suite}: {score.words}",
            base=score.base,
            tuned=score.tuned,
            kind=_kind(name, score),
            is_share=score.is_share,
            interval=(score.gain_low, score.gain_high),
            suite=suite,
        )
        for suite, comparison in comparisons.items()
        for name, score in comparison.scores.items()
    ]
    base = history.as_of(0)  # measured before the first step, where it was
    losses: list[tuple[str, str, Kind]]
    losses = [("validation loss", f"{VALIDATION}loss", "loss"), ("perplexity", f"{VALIDATION}perplexity", "perplexity")]
    for name in validation_sets(metrics):
        losses.append((f"loss on {name}", f"{VALIDATION}{name}/loss", "loss"))
    found += [
        Change(name=name, words=words, base=base[name], tuned=metrics[name], kind=kind)
        for words, name, kind in losses
        if name in base and name in metrics
    ]
    return tuple(found)


def test_in_words(metrics: Mapping[str, float]) -> list[str]:
    """What the model that a run left came to on its test; nothing without one."""
    if f"{TEST}/loss" not in metrics:
        return []
    loss, perplexity, bits = (metrics[f"{TEST}/{name}"] for name in METRICS)
    names = (name.split("/") for name in metrics)
    sets = [parts[1] for parts in names if len(parts) > 2 and (parts[0], parts[-1]) == (TEST, "loss")]
    each = "".join(f", {metrics[f'{TEST}/{name}/loss']:.4f} on {name}" for name in sets)
    return [
        f"On the test, whose rows decided nothing: loss {loss:.4f}{each}; perplexity {perplexity:.4g}, {bits:.4g} bits per byte."
    ]


def _kind(metric: str, score: Score) -> Kind:
    if not score.lower_is_better:
        return "score"
    return "perplexity" if metric == "perplexity" else "loss"


def validation_sets(metrics: Mapping[str, float]) -> list[str]:
    """Data sets with a loss of their own among metrics, which they have where there are several."""
    names = [name.removeprefix(VALIDATION) for name in metrics if name.startswith(VALIDATION)]
    return [name.removesuffix("/loss") for name in names if name.endswith("/loss")]


def in_words(took: Spent, found: Sequence[Change], num_steps: int) -> list[str]:
    """Sentences: time and dollars; what is better; what is worse."""
    attempts = f" in {took.attempts} attempts" if took.attempts > 1 else ""
    dollars = "" if took.usd is None else f", about {format_dollars(took.usd)} by list prices"
    lines = [
        f"Trained for {format_seconds(took.training_s)} ({num_steps} step{'s' * (num_steps != 1)}{attempts}); "
        f"{format_seconds(took.total_s)} with start and end{dollars}."
    ]
    told = [change for change in found if change.kind != "perplexity"]
    for heading, chosen in (
        ("Better than the base", [change for change in told if change.is_better]),
        ("Worse than the base", [change for change in told if not change.is_better and change.is_worse]),
    ):
        if chosen:
            lines.append(f"{heading}: {', '.join(change.sentence for change in chosen)}.")
    return lines


def streamed_in_words(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on what was read of streamed rows; none where rows had a store.

    Args:
        events: of events.jsonl, in their order.
    """
    told = [event for event in events if event["event"] == "rows_streamed"]
    if not told:
        return []
    read = told[-1]
    lost = {"bad": "bad", "no_target": "without a target", "cut": "cut", "dropped": "too long"}
    of_them = "".join(f", {read[name]} {words}" for name, words in lost.items() if read[name])
    passes = f"; all files {read['passes']} time{'s' * (read['passes'] > 1)}" if read["passes"] else ""
    if len(sources := read.get("by_source", {})) > 1:
        passes = "; " + ", ".join(_part_streamed(name, counts, read["targets"]) for name, counts in sources.items())
    made = f" and {read['augmented']} made of them" if read["augmented"] else ""
    return [
        f"Read by step {read['step']}: {read['rows'] - read['augmented']} rows{made}{of_them}; {read['documents']} documents, "
        f"{format_count(read['tokens'])} tokens, {format_count(read['targets'])} targets{passes}."
    ]


def _part_streamed(name: str, counts: Mapping[str, int], num_targets: int) -> str:
    """What was read of one of several sources, against the targets of all."""
    passes = counts.get("passes", 0)
    times = f", all of it {passes} time{'s' * (passes > 1)}" if passes else ""
    return f"{counts.get('targets', 0) / max(1, num_targets):.1%} of them of {name}{times}"


def outcome_record(took: Spent, found: Sequence[Change], num_steps: int) -> dict[str, Any]:
    """The same as plain values, for result.json."""
    return {
        "training_s": took.training_s,
        "total_s": took.total_s,
        "attempts": took.attempts,
        "usd": took.usd,
        "changes": [change.to_json() for change in found],
        "words": in_words(took, found, num_steps),
    }
