"""A sweep, its trials and its values in words, as the terminal, the page and the files say them. Pure."""

import json
from collections import Counter
from typing import Literal, TypeGuard

from raytune.sweeps.results import State, SweepResult, TrialResult
from raytune.units import format_seconds


def summary(result: SweepResult) -> list[str]:
    """The sweep in three sentences: who won, what became of the others, what it cost."""
    return [_best_sentence(result), _states_sentence(result), _cost_sentence(result)]


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
    """`stopped at rung 1`, `finished`, `finished early`: what became of it."""
    if trial.ended_early:
        return "finished early"
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
        early = sum(trial.ended_early for trial in result.trials)
        words.append(f"{count['finished']} finished" + (f" ({early} of them early, by a rule of its own)" if early else ""))
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
