"""Results of sweeps as they come out: realistic, small, and the odd ones."""

import math
import random
from collections.abc import Mapping
from typing import Any

from raytune.sweeps.results import Mode, State, SweepResult, TrialResult, ranked
from raytune.sweeps.trial import Trial

RUNGS = (10, 30)
NUM_STEPS = 60
KEYS = ("adapter.rank", "adapter.alpha", "training.learning_rate", "adapter.dropout")


def trial_result(
    number: int,
    values: Mapping[str, Any],
    curve: tuple[tuple[int, float], ...] = (),
    *,
    state: State = "finished",
    mode: Mode = "min",
    rungs: tuple[int, ...] = RUNGS,
    num_steps: int = NUM_STEPS,
    cause: str | None = None,
    step: int | None = None,
) -> TrialResult:
    """A trial with this curve; what follows from it, follows."""
    finite = [value for _, value in curve if math.isfinite(value)]
    last = step if step is not None else curve[-1][0] if curve else 0
    reached = [index for index, rung in enumerate(rungs) if rung <= last]
    return TrialResult(
        trial=Trial(number=number, values=values),
        state=state,
        value=(min if mode == "min" else max)(finite) if finite else None,
        step=last,
        num_steps=num_steps,
        rung=reached[-1] if reached else None,
        worker_s=2.0 + 0.9 * last,
        cause=cause,
        curve=curve,
        folder=f"/runs/quickstart-sweep/trials/trial-{number:03d}",
    )


def sweep_result(
    trials: list[TrialResult],
    *,
    keys: tuple[str, ...] = KEYS,
    metric: str = "validation/loss",
    mode: Mode = "min",
    rungs: tuple[int, ...] = RUNGS,
    **others: Any,
) -> SweepResult:
    """A sweep of these trials."""
    facts: dict[str, Any] = {
        "name": "quickstart-sweep",
        "folder": "/runs/quickstart-sweep",
        "device": "cpu",
        "wall_s": 180.0,
        "spent_worker_s": 4.0 + sum(trial.worker_s for trial in trials),
        "full_worker_s": sum(2.0 + 0.9 * trial.num_steps for trial in trials),
        **others,
    }
    return SweepResult(metric=metric, mode=mode, rungs=rungs, keys=keys, trials=tuple(ranked(trials, mode)), **facts)


def halved_sweep(num_trials: int = 16, seed: int = 0, *, with_failures: bool = True) -> SweepResult:
    """ASHA over rank, alpha (derived), learning rate, dropout and a conditional key, played with smooth curves: the learning rate
    matters most, the rank a little, dropout not at all. One trial diverges and one runs out of memory."""
    source = random.Random(seed)
    points = []
    for _ in range(num_trials):
        rank = source.choice([4, 8, 16, 32])
        values: dict[str, Any] = {
            "adapter.rank": rank,
            "adapter.alpha": 2 * rank,
            "training.learning_rate": 10 ** source.uniform(math.log10(3e-4), math.log10(3e-2)),
            "adapter.dropout": source.choice([0.0, 0.05, 0.1, 0.15, 0.2]),
        }
        if rank >= 16:
            values["adapter.lora_plus_ratio"] = source.choice([4.0, 16.0])
        points.append(values)
    trials, at_rung = [], {rung: [] for rung in RUNGS}
    for number, values in enumerate(points):
        off = abs(math.log10(values["training.learning_rate"] / 6e-3))
        speed = 0.11 * math.exp(-1.2 * off) * (values["adapter.rank"] / 16) ** 0.15
        curve = [(0, 6.479)]
        state: State = "finished"
        cause = None
        for step in range(5, NUM_STEPS + 1, 5):
            value = 6.479 * math.exp(-speed * step) + 0.002 + 0.01 * off * source.random()
            if with_failures and number == 3 and step == 10:
                state, cause = (
                    "failed",
                    "NonFiniteError: loss is nan at step 10 on rank 0, rows 112-127. Lower training.learning_rate.",
                )
                curve.append((step, math.nan))
                break
            curve.append((step, value))
            if step in at_rung:
                best_third = sorted(at_rung[step])[: max(1, len(at_rung[step]) // 3)]
                at_rung[step].append(value)
                if len(at_rung[step]) > 1 and value > best_third[-1]:
                    state, cause = "stopped", f"at step {step}: {value:.4g} against a cut of {best_third[-1]:.4g}"
                    break
        trials.append(trial_result(number, values, tuple(curve), state=state, cause=cause))
    if with_failures:
        trials[5] = trial_result(
            5,
            points[5],
            state="failed",
            cause="OutOfMemoryError: worker 0 was killed at 15.2 of 15.6 GiB.\nLower training.per_device_train_batch_size.",
        )
    return sweep_result(trials, keys=(*KEYS, "adapter.lora_plus_ratio"))


def odd_values() -> SweepResult:
    """Values of every JSON kind, text that looks like markup and formulas, NaN, a mode of max, a trial that only waits."""
    values: list[dict[str, Any]] = [
        {
            "adapter.method": "lora",
            "adapter.target_modules": ["q_proj", "v_proj"],
            "training.max_grad_norm": None,
            "data.packing": True,
        },
        {"adapter.method": "<script>alert(1)</script>", "adapter.target_modules": "all-linear", "data.packing": False},
        {
            "adapter.method": "$\\frac{1}$ & \"quoted\" 'text'",
            "adapter.target_modules": [],
            "training.max_grad_norm": 1.0,
            "data.packing": True,
        },
        {"adapter.method": "full", "training.max_grad_norm": 0.5, "data.packing": False, "adapter.target_modules": "schön, 中文"},
        {"adapter.method": "lora", "adapter.target_modules": "x" * 300, "training.max_grad_norm": None, "data.packing": True},
    ]
    curves = [
        ((10, 0.25), (30, 0.5), (60, 0.75)),
        ((10, 0.1),),
        ((10, math.nan), (30, math.inf)),
        ((10, 0.7), (30, math.nan)),
        (),
    ]
    states: list[State] = ["finished", "stopped", "failed", "failed", "waiting"]
    return sweep_result(
        [
            trial_result(
                number,
                values[number],
                curves[number],
                state=states[number],
                mode="max",
                cause="</pre><img src=x onerror=alert(1)>",
            )
            for number in range(5)
        ],
        keys=("adapter.method", "adapter.target_modules", "training.max_grad_norm", "data.packing"),
        metric="exact_match <b>",
        mode="max",
        device="cuda",
    )


def cases() -> dict[str, SweepResult]:
    """Every sweep that a page must be able to show."""
    learning_rates = [10 ** -(1 + number / 10) for number in range(4)]
    return {
        "sixteen": halved_sweep(),
        "two hundred": halved_sweep(200),
        "one": sweep_result([trial_result(0, {"adapter.rank": 8}, ((10, 1.0), (60, 0.5)))], keys=("adapter.rank",)),
        "none": sweep_result([]),
        "all failed": sweep_result(
            [
                trial_result(n, {"training.learning_rate": rate}, state="failed", cause="boom")
                for n, rate in enumerate(learning_rates)
            ]
        ),
        "never measured": sweep_result([trial_result(n, {"adapter.rank": 2**n}, state="running", step=3) for n in range(4)]),
        "all NaN": sweep_result(
            [trial_result(n, {"adapter.rank": 2**n}, ((10, math.nan),), state="failed", cause="NaN") for n in range(5)]
        ),
        "no rungs": sweep_result(
            [trial_result(n, {"adapter.rank": 2**n}, ((5, 2.0), (17, 1.0 + n)), state="stopped", rungs=()) for n in range(5)],
            rungs=(),
        ),
        "equal values": sweep_result([trial_result(n, {"adapter.rank": 2**n}, ((10, 1.0), (60, 1.0))) for n in range(5)]),
        "negative metric": sweep_result(
            [trial_result(n, {"adapter.rank": 2**n}, ((10, -1.0), (60, -5.0 - n))) for n in range(5)]
        ),
        "odd values": odd_values(),
    }
