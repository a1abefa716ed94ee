"""What a person is shown of runs and sweeps: a row each, made of what was read. Pure."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from raytune.launch.attempts.lease import Standing
from raytune.metrics.json_numbers import encode_number
from raytune.metrics.points import Point
from raytune.run_folder import RunFolder
from raytune.watch.blocks import sampled
from raytune.watch.look import FollowedRun, Seen, SweepSeen

CURVE_POINTS = 60

Kind = Literal["run", "sweep", "trial"]
State = Literal["starting", "running", "waiting", "finished", "stopped", "interrupted", "failed", "stale", "unreadable"]
AT_WORK: tuple[State, ...] = ("starting", "running")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A run, a trial or a sweep at a glance; None: not known, or it has none."""

    path: str
    """Below the storage: `NAME`, or `SWEEP/trials/NAME`."""
    kind: Kind
    state: State
    step: int = 0
    """Of a sweep, trials that have ended."""
    num_steps: int | None = None
    """Of a sweep, trials."""
    loss: float | None = None
    validation_loss: float | None = None
    """Of a sweep, the best value of its metric."""
    tokens_per_s: float | None = None
    memory_bytes: float | None = None
    """Peak of rank 0."""
    planned_bytes: int | None = None
    left_s: float | None = None
    left_is_most: bool = False
    """Whether a rule may end it earlier."""
    at_work_s: float = 0.0
    usd: float | None = None
    """Of the time at work so far, at list prices; None: its machines have no price."""
    attempt: int = 0
    curve: tuple[float, ...] = ()
    """Loss of training, evenly spaced steps from the first to the last."""
    note: str = ""

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def to_json(self) -> dict[str, Any]:
        measured = {"loss": self.loss, "validation_loss": self.validation_loss, "tokens_per_s": self.tokens_per_s}
        numbers = {name: None if value is None else encode_number(value) for name, value in measured.items()}
        return asdict(self) | numbers | {"name": self.name, "curve": [encode_number(value) for value in self.curve]}


def rows_of(seen: Seen) -> list[Row]:
    """Those at work first, then by name; trials behind their sweep, those that run first."""
    found = [list(_sweep_rows(one)) if isinstance(one, SweepSeen) else [run_row(one)] for one in seen]
    found.sort(key=lambda rows: (rows[0].state not in AT_WORK, rows[0].path))
    return [row for rows in found for row in rows]


def run_state(state: str | None, standing: Standing, has_steps: bool) -> State:
    """How a run is, by what its record says and by who holds it.

    Args:
        state: of the record; None: there is none yet.
        has_steps: whether the newest attempt has trained.
    """
    is_held = standing is not Standing.FREE
    match state:
        case "running" if is_held:
            return "running" if has_steps else "starting"
        case "finished":
            return "finished"
        case _ if is_held:
            return "starting"
        case "interrupted":
            return "interrupted"
        case "failed":
            return "failed"
    return "stale"


def run_row(seen: FollowedRun, *, kind: Kind = "run", path: str | None = None) -> Row:
    """The row of a run."""
    record, planned, metrics = seen.record, seen.planned, seen.metrics
    points = metrics.points
    attempt = record.attempts if record else 0
    step = metrics.last_step
    has_steps = bool(points) and points[-1].attempt == attempt
    state = run_state(record.state if record else None, seen.standing, has_steps)
    num_steps = planned.num_steps if planned else None
    left = None
    if state == "running" and num_steps is not None and step < num_steps and (per_step := metrics.seconds_per_step()):
        left = (num_steps - step) * per_step
    row = Row(
        path=path or seen.folder.name,
        kind=kind,
        state=state,
        step=step,
        num_steps=num_steps,
        loss=_newest(seen, "train/loss"),
        validation_loss=_newest(seen, "validation/loss"),
        tokens_per_s=_newest(seen, "train/tokens_per_s"),
        memory_bytes=_newest(seen, "train/memory_bytes"),
        planned_bytes=planned.memory_bytes if planned else None,
        left_s=left,
        left_is_most=planned is not None and planned.may_end_early,
        at_work_s=seen.at_work_s,
        usd=seen.at_work_s / 3600 * planned.usd_per_hour if planned and planned.usd_per_hour else None,
        attempt=attempt,
        curve=curve_of(points, "train/loss"),
    )
    if seen.problem:
        return replace(row, state="unreadable", note=seen.problem)
    return replace(row, note=_note(seen, row))


def _newest(seen: FollowedRun, name: str) -> float | None:
    newest = seen.metrics.newest(name)
    return newest[1] if newest else None


def _note(seen: FollowedRun, row: Row) -> str:
    """What else a person should know, in a few words."""
    if seen.stops_soon:
        return "asked to stop"
    if seen.saves_soon:
        return "asked to save"
    match row.state:
        case "failed":
            return (seen.record.failure if seen.record else None) or ""
        case "stale":
            return "its command is gone; the same command continues it"
        case "running" if row.num_steps is not None and row.step >= row.num_steps:
            return "writing the model"
        case "running" | "starting" if row.attempt > 1:
            return f"attempt {row.attempt}"
    return ""


def curve_of(points: Sequence[Point], name: str, most: int = CURVE_POINTS) -> tuple[float, ...]:
    """Values of a metric at evenly spaced points; costs no more for a long run."""
    near = sampled(range(len(points)), 2 * most)
    return tuple(sampled([points[at].values[name] for at in near if name in points[at].values], most))


def series_of(points: Sequence[Point], name: str, most: int) -> list[tuple[int, float]]:
    """(step, value) of a metric at evenly spaced ones of the points that have it."""
    return sampled([(point.step, point.values[name]) for point in points if name in point.values], most)


def _sweep_rows(seen: SweepSeen) -> Iterator[Row]:
    trials = [_trial_row(seen, name) for name in seen.known.trials]
    ended = sum(seen.known.has_ended(name) for name in seen.known.trials)
    section, bests = seen.section, []
    if section:
        bests = [best for one in seen.trials.values() if (best := _best(one.metrics.points, section.metric, section.mode))]
    costs = [row.usd for row in trials if row.usd is not None]
    counts = Counter(row.state for row in trials)
    words = ", ".join(f"{counts[state]} {state}" for state in counts if state != "waiting")
    best = ((min if section.mode == "min" else max)(bests) if bests else None) if section else None
    yield Row(
        path=seen.folder.name,
        kind="sweep",
        state=_sweep_state(seen),
        step=ended,
        num_steps=len(trials) if seen.is_finished or section is None else max(section.trials, len(trials)),
        validation_loss=best,
        at_work_s=seen.known.wall_s,
        usd=sum(costs) if costs else None,
        attempt=seen.known.num_commands,
        note=seen.problem or ("asked to stop" if seen.stops_soon else words),
    )
    yield from sorted(trials, key=lambda row: (row.state not in AT_WORK, row.path))


def _sweep_state(seen: SweepSeen) -> State:
    if seen.problem:
        return "unreadable"
    if seen.is_finished:
        return "finished"
    if seen.standing is not Standing.FREE:
        return "running" if seen.known.trials else "starting"
    return "stale" if seen.holder else "interrupted"


def _trial_row(seen: SweepSeen, name: str) -> Row:
    folder, run = seen.folder.trial(name), seen.trials.get(name)
    row = run_row(run or FollowedRun(folder), kind="trial", path=f"{seen.folder.name}/trials/{name}")
    end = seen.known.ends.get(name)
    values = ", ".join(f"{key.rpartition('.')[2]}={_word(value)}" for key, value in seen.known.trials[name].values.items())
    if end:
        return replace(row, state=end.state, left_s=None, note=" · ".join(filter(None, (values, end.cause))))
    if run is None or run.record is None:
        return replace(row, state="waiting", note=values)
    if row.state == "interrupted" and seen.standing is not Standing.FREE:  # it is given room again later
        row = replace(row, state="waiting")
    return replace(row, note=values if row.state != "unreadable" else row.note)


def _best(points: Sequence[Point], metric: str, mode: str) -> float | None:
    values = [point.values[metric] for point in points if metric in point.values and math.isfinite(point.values[metric])]
    return (min if mode == "min" else max)(values, default=None)


def _word(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_at(seen: Seen, path: str) -> FollowedRun | None:
    """The run or trial of a row; None: it is gone, or a sweep."""
    name, _, trial = path.partition("/trials/")
    found = next((one for one in seen if one.folder.name == name), None)
    if isinstance(found, SweepSeen):
        return found.trials.get(trial)
    return found if found is not None and not trial else None


def folder_of(storage: str, row: Row) -> RunFolder:
    """The folder of a row; of a sweep too, whose requests lie where those of a run do."""
    parent, _, name = f"{storage}/{row.path}".rpartition("/")
    return RunFolder(parent, name)
