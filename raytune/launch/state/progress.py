"""A run as a person sees it while it goes on: a bar and a table in a terminal, plain lines elsewhere. Reads its folder only."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from raytune.errors import RaytuneError
from raytune.hub.snapshot import Progress
from raytune.launch.data.live import PlainConsole, showing
from raytune.launch.state.result import RunResult
from raytune.metrics.events import read_events
from raytune.metrics.follower import Follower
from raytune.metrics.points import is_of_training
from raytune.object_store import once
from raytune.plan.data.data_report import report_table
from raytune.plan.describe import plan_text
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import exists, is_local, list_folder, read_json
from raytune.units import format_bytes, format_count, format_seconds

DOWNLOAD_IS_DEAD_AFTER_S = 60.0
"""A node that has noted nothing for so long was killed."""
EVENTS_EVERY_S, REMOTE_EVENTS_EVERY_S = 5.0, 30.0
BAR_WIDTH = 40
MOST_SUITES = 4
"""Metrics of suites that are shown."""

_SHOWN: list[tuple[str, str, Callable[[float], str]]] = [
    ("loss", "train/loss", "{:.4f}".format),
    ("of which the teacher's", "train/distillation", "{:.4f}".format),
    ("validation loss", "validation/loss", "{:.4f}".format),
    ("learning rate", "train/learning_rate", "{:.2e}".format),
    ("tokens/s", "train/tokens_per_s", format_count),
    ("memory of rank 0", "train/memory_bytes", format_bytes),
]


_WARNINGS: dict[str, Callable[[dict], str]] = {
    "overfitting": lambda event: _overfitting_sentence(event["step"], event["reason"]),
    "divergence": lambda event: _divergence_sentence(event["step"], event["reason"]),
    "update_skipped": lambda event: _divergence_sentence(
        event["step"],
        f"no update with a gradient norm of {event['grad_norm']:.5g}, of which {event['norm_limit']:.5g} is the limit",
    ),
    "importance_again": lambda event: f"warning: the importance of weights in the run folder is estimated again: {event['why']}.",
    "suites_not_measured": lambda event: (
        f"warning: suites are not measured at step {event['step']}; training goes on. {event['reason']}"
    ),
    "suites_awaited": lambda event: (
        f"the suites of step {event['step']}, which rank checkpoints, are waited for, {format_seconds(event['seconds'])} at most"
    ),
    "suites_not_awaited": lambda event: (
        f"warning: the suites of step {event['step']} are not known; its checkpoint is ranked without them."
    ),
    "metric_failed": lambda event: f"warning: {event['metric']} is not known at step {event['step']}, nor later. {event['why']}",
    "evaluator_waits": lambda event: (
        f"the actor that measures suites waits for {event['cpus']} CPUs and {event['gpus']} GPUs of the cluster; training goes on"
    ),
    "rolled_back": lambda event: _roll_back_sentence(event["step"], event["to"], event["rate_scale"], event["reason"]),
}
"""Events that a person is told at once, in words."""


@contextmanager
def show_progress(
    plan: RunPlan, stream: TextIO = sys.stderr, *, heading: str | None = None, at_end: str = "writing the model"
) -> Iterator[None]:
    """Show the plan, and then the run's progress until the block ends.

    Args:
        heading: instead of the plan, for another task than training.
        at_end: what is done behind the last step.
    """
    console = PlainConsole(file=stream)
    console.print(f"{plan_text(plan) if heading is None else heading}\n", soft_wrap=True)
    view = RunView(plan, at_end=at_end)
    with showing(console, view.table, view.new_lines):
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What the events of this command tell."""

    starts: tuple[tuple[int, int], ...] = ()
    """(attempt, step that it goes on from)."""
    warnings: tuple[str, ...] = ()
    ended_early: bool = False
    """Whether a rule has ended the newest attempt."""
    estimates_from: int | None = None
    """Documents that importance is being estimated from."""
    saved_step: int | None = None
    saved_at: float = 0.0
    """Seconds since 1970."""


class RunView:
    """A run as its folder shows it.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, plan: RunPlan, clock: Callable[[], float] = time.time, *, at_end: str = "writing the model") -> None:
        self.plan, self._at_end = plan, at_end
        self.folder = RunFolder(plan.storage, plan.name)
        self._metrics = Follower(self.folder.metrics)
        self._clock = clock
        self._started = clock()
        self._told, self._looked = _Told(), -1e9
        self._num_starts_shown = self._num_warnings_shown = 0
        self._last_line = ""

    def new_lines(self) -> Iterator[str]:
        """What a log has not been told yet: where an attempt goes on, and how far the run is."""
        facts = self._facts()
        starts = self._told.starts[self._num_starts_shown :]
        self._num_starts_shown += len(starts)
        yield from filter(None, (_start_sentence(*start) for start in starts))
        warnings = self._told.warnings[self._num_warnings_shown :]
        self._num_warnings_shown += len(warnings)
        yield from warnings
        line = "  ".join(f"{label} {value}" for label, value in facts)
        if line != self._last_line:
            self._last_line = line
            yield line

    def table(self) -> Table:
        """The run as it stands, with a bar and the age of its newest checkpoint."""
        facts = self._facts()
        table = Table(
            title=f"raytune · {self.plan.name}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        for label, value in facts:
            cell: RenderableType = value
            if label == "step":
                cell = Table.grid(padding=(0, 1))
                num_steps = self.plan.optimization.num_steps
                cell.add_row(ProgressBar(num_steps, int(value.partition("/")[0]), width=BAR_WIDTH), value)
            table.add_row(Text(label, style="dim"), cell)
        if self._told.saved_step is not None:
            age = format_seconds(max(0.0, self._clock() - self._told.saved_at))
            table.add_row(Text("checkpoint", style="dim"), f"step {self._told.saved_step}, {age} ago")
        for warning in self._told.warnings[-1:]:
            table.add_row(Text("warning", style="dim"), warning)
        for start in self._told.starts[-1:]:
            if sentence := _start_sentence(*start):
                table.add_row(Text("started", style="dim"), sentence)
        return table

    def _facts(self) -> list[tuple[str, str]]:
        num_steps = self.plan.optimization.num_steps
        with suppress(RaytuneError, OSError), once():  # a network hiccup: the next look will tell
            self._metrics.look()
        metrics = self._metrics
        self._read_events()
        step = metrics.last_step
        if not step:
            downloads = [("downloading", text) for text in self._downloads()]
            what = "starting workers"
            if self._told.estimates_from is not None:
                what = f"estimating the importance of weights from {self._told.estimates_from} documents"
            starting = ("state", f"{what}, {format_seconds(self._clock() - self._started)}")
            return [("step", f"0/{num_steps}"), *(downloads or [starting])]
        facts = [("step", f"{step}/{num_steps}")]
        of_suites = [(name, name, "{:.4g}".format) for name in metrics.suites[:MOST_SUITES]]
        for label, name, form in (*_SHOWN, *of_suites):
            if newest := metrics.newest(name):
                measured, value = newest
                facts.append((label, form(value) + (f" (step {measured})" if not is_of_training(name) else "")))
        if step >= num_steps:
            return [*facts, ("state", f"all steps done, {self._at_end}")]
        if self._told.ended_early:
            return [*facts, ("state", f"ended early, {self._at_end}")]
        left = format_seconds((num_steps - step) * metrics.seconds_per_step())
        return [*facts, ("left", f"at most {left}" if self.plan.stopping.may_end else left)]

    def _read_events(self) -> None:
        """Look at the events of this command, from time to time: they are few, but on a bucket each look is a download."""
        now = self._clock()
        if now - self._looked < (EVENTS_EVERY_S if is_local(self.folder.path) else REMOTE_EVENTS_EVERY_S):
            return
        self._looked = now
        with suppress(RaytuneError, OSError, KeyError, TypeError), once():
            events = read_events(self.folder.events)
            saved = [event for event in events if event["event"] == "checkpoint_saved"]
            own = [event for event in events if event["time"] >= self._started]
            self._told = _Told(
                starts=tuple((event["attempt"], event["step"]) for event in own if event["event"] == "training_started"),
                warnings=tuple(_WARNINGS[event["event"]](event) for event in own if event["event"] in _WARNINGS),
                ended_early=any(event["event"] == "stopped_early" and event["attempt"] == own[-1]["attempt"] for event in own),
                estimates_from=_estimates_from(own),
                saved_step=saved[-1]["step"] if saved else None,
                saved_at=saved[-1]["time"] if saved else 0.0,
            )

    def _downloads(self) -> Iterator[str]:
        """What nodes lack of the base."""
        folder = self.folder.downloads
        with suppress(RaytuneError, OSError, ValueError, TypeError), once():  # a file that is gone by now, or half a bucket
            for name in list_folder(folder):
                noted = read_json(f"{folder}/{name}")
                if self._clock() - noted.pop("time") < DOWNLOAD_IS_DEAD_AFTER_S:
                    yield Progress(**noted).text


def _start_sentence(attempt: int, step: int) -> str | None:
    """Where an attempt goes on; nothing of a run that has just begun."""
    if step:
        return f"attempt {attempt} goes on from the checkpoint after step {step}"
    return f"attempt {attempt} starts from the beginning: there is no checkpoint to go on from" if attempt > 1 else None


def show_result(result: RunResult, console: Console | None = None) -> None:
    """Print what the run came to (base against tuned, time, dollars), what looks wrong with it, and where its files are."""
    console = console or PlainConsole()
    if result.finished_before:
        sentence = f"Run {result.name} had finished before: nothing was trained. Another name (name=...) trains it again."
        console.print(sentence, soft_wrap=True)
    for sentence in _findings(result):
        console.print(sentence, soft_wrap=True)
    if result.changes:
        console.print(_changes(result))
    console.print(_planned_and_measured(result))
    for label, line in report_table(result.data_report) if result.data_report else []:
        console.print(f"{label}: {line}", soft_wrap=True)
    for sentence in result.words:
        console.print(sentence, soft_wrap=True)
    for symptom in result.symptoms:
        console.print(symptom.sentence, soft_wrap=True)
    files = {"model": result.model_path, "metrics": f"{result.folder}/metrics.jsonl"}
    page = RunFolder(result.plan.storage, result.name).report
    files |= {"report": page} if exists(page) else {}
    console.print("\n".join(f"{name:<8} {path}" for name, path in files.items()), soft_wrap=True)


def _findings(result: RunResult) -> Iterator[str]:
    """What the rules of the run came to."""
    if stopped := result.findings.stopped:
        yield (
            f"Ended early after step {stopped.step} of {result.plan.optimization.num_steps} (training.{stopped.rule}): "
            f"{stopped.reason}. The model is that of step {result.best_step}."
        )
    for found in result.findings.overfitting:
        yield _overfitting_sentence(found.step, found.reason)
    for found in result.findings.divergence:
        yield _divergence_sentence(found.step, found.reason)


def _roll_back_sentence(step: int, to: int, rate_scale: float, reason: str) -> str:
    return f"Rolled back from step {step} to step {to}, from where rates are those of the schedule times {rate_scale:g}: {reason}"


def _divergence_sentence(step: int, reason: str) -> str:
    return f"Divergence by step {step}: {reason}."


def _estimates_from(events: Sequence[dict]) -> int | None:
    """Documents that the newest attempt estimates importance from; None if it does not, or has."""
    newest = next((event for event in reversed(events) if event["event"].startswith(("importance_", "attempt_"))), None)
    return newest["documents"] if newest and newest["event"] == "importance_started" else None


def _overfitting_sentence(step: int, reason: str) -> str:
    return f"Overfitting by step {step}: {reason}."


def _planned_and_measured(result: RunResult) -> Table:
    """What the plan expected of the rank that holds most, and what it held."""
    table = Table("", Column("planned", justify="right"), Column("measured", justify="right"))
    names = {"peak": "peak of a worker", "step_s": "seconds per step"}
    for name, planned, measured in result.planned_and_measured:
        form = "{:.3g}".format if name == "step_s" else format_bytes
        cells = ["-" if value is None else form(value) for value in (planned, measured)]
        if name == "peak" and result.plan.cluster.device == "cpu":
            cells[0] = f"at most {cells[0]}"  # most of it is the process itself, for which the plan has an allowance and no count
        table.add_row(names.get(name, name), *cells)
    return table


def _changes(result: RunResult) -> Table:
    """Base, tuned and difference of whatever was measured on both; of suites also how far that could be chance; and how much
    better the tuned model is, as a share of the base's value."""
    numbers = {"base": 0, "tuned": 1, "gain": 2, "95 % interval": 3, "better by": 4}
    shown = [name for name in numbers if name != "95 % interval" or any(change.interval for change in result.changes)]
    rows = ", ".join(f"{name}: {one.num_rows} row{'s' * (one.num_rows != 1)}" for name, one in result.comparisons.items())
    title = f"base against tuned{f' ({rows})' if rows else ''}"
    table = Table("", *(Column(name, justify="right") for name in shown), title=title, title_justify="left")
    for change in result.changes:
        table.add_row(change.words, *(change.cells[numbers[name]] for name in shown))
    return table
