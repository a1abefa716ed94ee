"""`raytune doctor`: whether this machine can train, in a second or two and without starting anything."""

from raytune.clusters.checks.facts import machine_facts
from raytune.clusters.checks.finding import Finding
from raytune.clusters.checks.judge import judge_machine, judge_seat
from raytune.clusters.checks.seat import seat_facts


def examine_this_machine(storage: str | None = None) -> list[Finding]:
    """Look at this machine, and say what stands in the way of a run.

    Args:
        storage: where runs would go; None looks at the scratch disk only.
    """
    machine = machine_facts(storage)
    return [*judge_seat(machine, seat_facts(machine.gpus)), *judge_machine(machine)]
