"""A sweep in words, before it runs. Pure: strings out."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from raytune.plan.data.data_report import losses_text, report_table
from raytune.plan.describe import section
from raytune.plan.run_plan import RunPlan
from raytune.sweeps.sweep_plan import SweepPlan
from raytune.sweeps.trial import Trial
from raytune.units import format_count

_RULES = {
    "asha": "asynchronous halving (ASHA)",
    "hyperband": "Hyperband",
    "median": "median rule",
    "none": "none: every trial trains to its end",
}


def sweep_text(plan: SweepPlan) -> str:
    """What is going to happen, in aligned columns; below it what is to be noted, and what is lost of the data."""
    rows = sweep_table(plan)
    width = max(len(label) for label, _ in rows)
    losses = dict.fromkeys(line for report in plan.data_reports for line in losses_text(report))
    return "\n".join(
        [
            *(f"{label:<{width}}  {value}" for label, value in rows),
            *section("To be noted:", plan.notes),
            *section("Rows that are not used as they are:", list(losses)),
        ]
    )


def sweep_table(plan: SweepPlan) -> list[tuple[str, str]]:
    workers = f"{plan.workers} worker{'s' * (plan.workers != 1)} each"
    return [
        ("sweep", f"{plan.name}: {plan.num_trials} trials by {plan.metric} ({plan.mode}), {plan.slots} at once, {workers}"),
        ("stopping", _RULES[plan.stopping] + _rungs(plan)),
        ("budget", f"{_amount(plan, plan.budget)} per trial"),
        ("cost", _cost(plan)),
        *(line for report in plan.data_reports for line in report_table(report)),
    ]


def trials_text(trials: Sequence[Trial], plans: Sequence[RunPlan], plan: SweepPlan) -> str:
    """A line per trial: its values, and the steps after which it is judged."""
    lines = []
    for trial, trial_plan in zip(trials, plans):
        values = "  ".join(f"{key}={value}" for key, value in trial.values.items())
        steps = ", ".join(map(str, plan.rung_steps(trial_plan)))
        judged = f"judged after {steps}" if steps else "not judged"
        lines.append(f"{trial.name}  {values}  ({judged} of {trial_plan.optimization.num_steps} steps)")
    return "\n".join(lines)


def dry_run_facts(plan: SweepPlan, trials: Sequence[Trial], plans: Sequence[RunPlan]) -> dict[str, Any]:
    """The same as data."""
    return {
        "ok": True,
        **{key: value for key, value in asdict(plan).items() if key not in ("cost", "data_reports")},
        "data_reports": [report.model_dump(mode="json") for report in plan.data_reports],
        "expected_cost": {"rounds": plan.cost.expected, "share_of_full": plan.cost.share, "full_rounds": plan.cost.full},
        "trials": [
            {
                "name": trial.name,
                "values": dict(trial.values),
                "rung_steps": plan.rung_steps(trial_plan),
                "num_steps": trial_plan.optimization.num_steps,
            }
            for trial, trial_plan in zip(trials, plans)
        ],
    }


def _rungs(plan: SweepPlan) -> str:
    if not plan.rungs:
        return ""
    rungs = ", ".join(_amount(plan, rung) for rung in plan.rungs)
    halves = f"; one in {plan.reduction_factor:g} goes on" if plan.stopping in ("asha", "hyperband") else ""
    return f", compared after {rungs}{halves}"


def _amount(plan: SweepPlan, rounds: float) -> str:
    units = rounds * plan.grace
    return f"{units:g} step{'s' * (units != 1)}" if plan.unit == "steps" else f"{format_count(units)} tokens"


def _cost(plan: SweepPlan) -> str:
    full = f"{_amount(plan, plan.cost.full)} if all train to their end"
    if plan.stopping != "asha":
        return full
    return f"about {_amount(plan, round(plan.cost.expected))} expected, {plan.cost.share:.0%} of the {full}"
