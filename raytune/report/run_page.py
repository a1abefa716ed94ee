"""The page of a run: one HTML file that needs neither network nor server, and its figures beside it as PNG files.

A view over the run folder: it can be written at any time, again and again, of a run that trains, failed or has finished.
"""

import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from raytune.config.load import config_diff
from raytune.config.problems import shown
from raytune.config.sections.run import RunConfig
from raytune.config.words.metric_names import METRICS as METRICS_OF_ROWS
from raytune.credentials import redacted
from raytune.evaluation.compare import Score
from raytune.evaluation.suite_metrics import METRICS, SuiteMetric
from raytune.launch.state.outcome import validation_sets
from raytune.metrics.history import History
from raytune.plan.costs.memory import bytes_in, tensor_bytes
from raytune.plan.data.data_report import losses_text
from raytune.plan.data.row_lengths import added, length_lines
from raytune.plan.data.split import TEST
from raytune.plan.describe import plan_table
from raytune.plan.run_plan import SuitePlan
from raytune.printable import in_a_line, plain_text, shortened
from raytune.report.chosen_samples import SampleGroup, choose_samples
from raytune.report.figures.canvas import Drawing, drawn
from raytune.report.figures.run_curves import Curves, Happening, Mark, run_curves, set_losses, suite_scores
from raytune.report.marks import Marked, marked
from raytune.report.page import page, page_figure, write_page
from raytune.report.run_seen import RunSeen
from raytune.tracking.told import page_mark
from raytune.units import format_bytes, format_count, format_dollars, format_seconds

MOST_EVENTS = 60
LONG_VALUE, LONG_TEXT = 200, 600
MOST_CONFIG = 20_000
"""Letters of a config that are shown."""

_NAMES = {"num_bytes": "size"}
_HAPPENINGS: dict[str, Happening] = {
    "checkpoint_saved": "saved",
    "rolled_back": "rolled back",
    "stopped_early": "ended early",
}


def write_run_page(path: str) -> str:
    """Write the page of a run and its figures into its folder, local or on an object store.

    Args:
        path: the run folder.

    Returns:
        The path of the page.

    Raises:
        UserError: if there is no run, or another raytune wrote it.
    """
    run = RunSeen.read(path)
    figures = _figures(run)
    light, dark = drawn({name: draw for name, (draw, _, _) in figures.items()}, curves_of(run))
    html = run_page(run, marked(run.plan, run.folder.model), light, dark, now=time.time())
    return write_page(run.folder.path, html, light)


def run_page(run: RunSeen, rows: Marked | str, light: dict[str, bytes], dark: dict[str, bytes], *, now: float) -> str:
    """The page as HTML.

    Args:
        rows: of the training data, or why there are none to show.
        light, dark: PNG files by figure, for readers whose pages are light or dark.
        now: seconds since 1970.
    """
    return page(
        "run_page.html",
        mark=Markup(page_mark(asdict(run.record))),
        run=run,
        state=_state(run, now),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)),
        facts=_facts(run),
        words=run.words if run.history.points else [],
        symptoms=run.symptoms,
        can_be_judged=bool(run.history.points),
        failure=run.failure if run.record.state == "failed" else None,
        asked=_asked(run.config),
        resolved=[(label, shortened(value, LONG_TEXT)) for label, value in plan_table(run.plan)],
        notes=run.plan.notes,
        reasons=run.plan.reasons,
        measured=list(_planned_and_measured(run)),
        figures=[page_figure(title, caption, light[name], dark[name]) for name, (_, title, caption) in _figures(run).items()],
        happenings=_happenings(run),
        validation=_validation(run),
        test=_test(run),
        while_training=_suites(run),
        scores=[change for change in run.changes if change.suite],
        num_rows={suite: comparison.num_rows for suite, comparison in run.comparisons.items()},
        suites=_suites_with_samples(run),
        sources=_sources(run),
        lost=losses_text(run.plan.data_report) if run.plan.data_report else [],
        rows=rows if isinstance(rows, Marked) else None,
        no_rows=rows if isinstance(rows, str) else None,
        lengths=_lengths(rows) if isinstance(rows, Marked) else [],
        histogram=_histogram(run),
        config_text=shortened(run.config_text, MOST_CONFIG),
        commands=_commands(run),
    )


# --- First of all ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fact:
    label: str
    value: str
    note: str


def _state(run: RunSeen, now: float) -> str:
    step, num_steps = run.last_step, run.plan.optimization.num_steps
    stopped = run.result.findings.stopped if run.result else None
    if stopped:
        return f"finished early after step {stopped.step} of {num_steps}: {stopped.reason}"
    if run.record.state == "finished":
        return f"finished after {step} steps"
    if run.record.state != "running":
        return f"{run.record.state} at step {step} of {num_steps}"
    signs = [*(event["time"] for event in run.events), *(point.time for point in run.history.points[-1:])]
    ago = f"; last sign of life {format_seconds(max(0.0, now - max(signs)))} before this page" if signs else ""
    return f"running, at step {step} of {num_steps}{ago}"


def _facts(run: RunSeen) -> Iterator[_Fact]:
    """What is to be seen first."""
    newest, took, cost = run.history.as_of(run.last_step), run.spent, run.plan.cost
    by_name = {change.name: change for change in run.changes}
    loss = by_name.get("validation/loss")
    if loss:
        base, tuned, *_ = loss.cells
        yield _Fact("validation loss", tuned, f"before: {base}" + ("" if loss.percent is None else f" ({loss.percent:+.4g} %)"))
    elif "train/loss" in newest:
        yield _Fact("training loss", f"{newest['train/loss']:.4f}", f"at step {run.last_step}")
    for score in [change for change in run.changes if change.suite][:2]:
        base, tuned, _, interval, _ = score.cells
        yield _Fact(score.words, tuned, f"before: {base}; gain {interval}")
    yield _Fact("trained for", format_seconds(took.training_s), f"{format_seconds(took.total_s)} with start and end")
    if took.usd is not None and cost is not None:
        yield _Fact("cost", format_dollars(took.usd), f"{cost.num_nodes} x {cost.instance}, list prices of {cost.price_date}")
    if "train/tokens_per_s" in newest:
        workers = run.plan.batch.workers
        note = f"over {workers} worker{'s' * (workers != 1)}, at the last logged step"
        yield _Fact("tokens per second", format_count(newest["train/tokens_per_s"]), note)


def _asked(config: RunConfig | None) -> list[tuple[str, str]]:
    """Keys that are not as they are by default."""
    changes = config_diff(RunConfig(), config) if config else []
    return [(key, value_in_words(value)) for key, _, value in changes]


def value_in_words(value: object) -> str:
    """A value of a config as a table has room for, without credentials."""
    return shortened(redacted(value if isinstance(value, str) else shown(value)), LONG_VALUE)


# --- Planned and measured ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Measured:
    name: str
    planned: str
    measured: str
    ratio: str


def _planned_and_measured(run: RunSeen) -> Iterator[_Measured]:
    """Memory of the rank that held most, seconds of a step, time and dollars."""
    plan, took = run.plan, run.spent
    is_cpu = plan.cluster.device == "cpu"
    if run.result:
        known = {name: (planned, measured) for name, planned, measured in run.result.planned_and_measured}
    else:
        step = None if plan.optimization.phases else plan.step_time
        peak = partial(bytes_in, place="device")(plan.memory) if is_cpu else tensor_bytes(plan.memory)
        known = {"peak": (peak, run.evidence.peak_bytes), "step_s": (step and step.seconds, run.step_s)}
    names = {"peak": "peak of a worker", "step_s": "seconds per step"}
    for name, (planned, measured) in known.items():
        form = "{:.3g}".format if name == "step_s" else format_bytes
        bound = "at most " if name == "peak" and is_cpu else ""
        yield _compared(names.get(name, name), planned, measured, form, bound)
    yield _compared("of which waiting for rows", None, run.evidence.wait_s, "{:.3g}".format)
    steps_s = run.last_step * run.step_s if run.step_s else None
    planned_s = 3600 * plan.cost.hours if plan.cost else None
    yield _compared("time of all steps", planned_s, steps_s, format_seconds)
    yield _compared("time with start, evaluations and saves", None, took.total_s, format_seconds)
    if plan.cost and plan.cost.usd:
        spot = plan.cost.spot_usd if plan.cost.is_spot else None
        yield _compared("dollars", spot if spot is not None else plan.cost.usd, took.usd, format_dollars)


def _compared(name: str, planned: float | None, measured: float | None, form: Any, bound: str = "") -> _Measured:
    ratio = f"{measured / planned:.2f}" if planned and measured is not None else "–"
    cells = ["–" if value is None else form(value) for value in (planned, measured)]
    return _Measured(name, f"{bound}{cells[0]}" if planned is not None else cells[0], cells[1], ratio)


# --- Curves and what happened ------------------------------------------------------------------------------------------------


def curves_of(run: RunSeen) -> Curves:
    """What is drawn of a run."""
    return Curves(
        history=run.history,
        num_steps=run.plan.optimization.num_steps,
        best_step=run.result.best_step if run.result else None,
        marks=_marks(run),
        sets=_sets(run),
        shares=[name for name, metric in _metrics_of_suites(run).items() if metric.is_share and run.history.series(name)],
    )


def _figures(run: RunSeen) -> dict[str, tuple[Drawing[Curves], str, str]]:
    """Drawing, title and caption by name; of validation sets only where there are several."""
    found: dict[str, tuple[Drawing[Curves], str, str]] = {
        "curves": (
            run_curves,
            "Curves.",
            "The loss of each logged step and of validation; below, the rate that the schedule gave, the norm of the gradient "
            "before clipping, and the speed. Triangles are checkpoints; lines across all panels are where an attempt failed, "
            "went on or was rolled back. Steps that were lost with a dead attempt are not drawn.",
        )
    }
    if _sets(run):
        found["validation_sets"] = (
            set_losses,
            "Validation by data set.",
            "The loss on each data set. One that rises while the others fall is being forgotten.",
        )
    if curves_of(run).shares:
        found["suites"] = (
            suite_scores,
            "Suites while training went on.",
            "What the model was worth after steps, on the suites of evaluation.while_training; at step 0 that is the base.",
        )
    return found


def _metrics_of_suites(run: RunSeen) -> dict[str, SuiteMetric]:
    """What suites are judged by while training goes on, by the names of metrics; without functions of the user's, whose code a
    page does not run."""
    measured = run.plan.evaluation.while_training
    return {
        f"{suite.name}/{name}": metric
        for suite in (measured.suites if measured else ())
        for name, metric in METRICS[suite.kind].items()
        if name in suite.metrics
    }


def _suites(run: RunSeen) -> list[tuple[str, str, str, str, str, str]]:
    """(metric, before, best, at step, last, at step) of what was measured while training went on."""
    known, rows = _metrics_of_suites(run), []
    measured = run.plan.evaluation.while_training
    for name in sorted(measured.metrics) if measured else ():
        series = run.history.series(name)
        if not series:
            continue
        metric = known.get(name)
        best = run.history.best_of(name, "min" if metric.lower_is_better else "max") if metric else None
        before = f"{series[0][1]:.4g}" if series[0][0] == 0 else "–"
        found = (f"{best[1]:.4g}", str(best[0])) if best else ("–", "–")
        rows.append((name, before, *found, f"{series[-1][1]:.4g}", str(series[-1][0])))
    return rows


def _sets(run: RunSeen) -> list[str]:
    return validation_sets(run.history.as_of(run.last_step))


def _marks(run: RunSeen) -> list[Mark]:
    """In the order of the events; a failed attempt is marked at the last step that is known of it."""
    saved = {event["step"] for event in run.events if event["event"] == "checkpoint_saved"}
    marks = []
    for event in run.events:
        kind = _HAPPENINGS.get(event["event"])
        if kind and event["step"] <= run.last_step:
            marks.append(Mark(event["step"], kind))
        elif event["event"] == "training_started" and event["step"]:
            marks.append(Mark(event["step"], "restarted"))
    if run.record.state == "failed":
        marks.append(Mark(run.last_step, "failed"))
    marks += [Mark(step, "not finite") for step in _not_finite(run.history)]
    return [mark for mark in dict.fromkeys(marks) if mark.kind != "saved" or mark.step in saved]


def _not_finite(history: History) -> list[int]:
    names = ("train/loss", "validation/loss")
    return [point.step for point in history.points if any(not _is_finite(point.values.get(name, 0.0)) for name in names)]


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _happenings(run: RunSeen) -> list[tuple[str, int, str, str]]:
    """(time since the beginning, attempt, event, what is known of it), the last ones."""
    first = run.events[0]["time"] if run.events else 0.0
    known = ("event", "attempt", "time", "path", "job")
    return [
        (
            format_seconds(max(0.0, event["time"] - first)),
            event["attempt"],
            event["event"].replace("_", " "),
            ", ".join(
                f"{_NAMES.get(key, key)} {_fact(key, value)}"
                for key, value in event.items()
                if key not in known and value not in (None, [])
            ),
        )
        for event in run.events[-MOST_EVENTS:]
    ]


def _fact(key: str, value: object) -> str:
    if key == "num_bytes" and isinstance(value, int | float):
        return format_bytes(value)
    return redacted(in_a_line(plain_text(str(value)), LONG_TEXT))


# --- What it is worth --------------------------------------------------------------------------------------------------------


def _validation(run: RunSeen) -> list[tuple[str, str, str, str, str, str]]:
    """(set, before, best, at step, last, perplexity of the last)."""
    rows = []
    for name, words in [("validation", "all"), *((f"validation/{name}", name) for name in _sets(run))]:
        series = run.history.series(f"{name}/loss")
        best = run.history.best_of(f"{name}/loss", "min")
        if series and best:
            before = f"{series[0][1]:.4f}" if series[0][0] == 0 else "–"
            perplexity = run.history.as_of(run.last_step).get(f"{name}/perplexity")
            last = f"{series[-1][1]:.4f}"
            rows.append((words, before, f"{best[1]:.4f}", str(best[0]), last, "–" if perplexity is None else f"{perplexity:.4g}"))
    return rows


def _test(run: RunSeen) -> list[tuple[str, str, str, str]]:
    """(set, loss, perplexity, bits per byte) of the model that the run left."""
    stores, metrics = run.plan.data.test, run.result.metrics if run.result else {}
    names = [(TEST, "all"), *((f"{TEST}/{store.name}", store.name) for store in stores if len(stores) > 1)]
    values = {words: [metrics.get(f"{name}/{metric}") for metric in METRICS_OF_ROWS] for name, words in names}
    return [
        (words, f"{loss:.4f}", f"{perplexity:.4g}", f"{bits:.4g}")
        for words, (loss, perplexity, bits) in values.items()
        if loss is not None and perplexity is not None and bits is not None
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Suite:
    """Answers of a suite as they are shown."""

    name: str
    num_rows: int
    num_changed: int
    judged_by: str
    groups: list[SampleGroup]

    @classmethod
    def of(cls, suite: SuitePlan, samples: list[dict[str, Any]], scores: Mapping[str, Score]) -> "_Suite":
        judged_by, groups = choose_samples(samples, suite, scores)
        return cls(
            name=suite.name,
            num_rows=len(samples),
            num_changed=sum(sample["base"] != sample["tuned"] for sample in samples),
            judged_by=judged_by,
            groups=groups,
        )


def _suites_with_samples(run: RunSeen) -> list[_Suite]:
    """Those whose rows can be told apart: a task of lm_eval that has failed has judged none."""
    scores = {name: comparison.scores for name, comparison in run.comparisons.items()}
    return [
        _Suite.of(suite, run.samples[suite.name], scores.get(suite.name, {}))
        for suite in run.plan.evaluation.suites
        if suite.name in run.samples and (suite.task is None or scores.get(suite.name))
    ]


# --- Rows --------------------------------------------------------------------------------------------------------------------


def _sources(run: RunSeen) -> list[list[str]]:
    report = run.plan.data_report
    if report is None:
        return []
    measured = [("validation", report.validation), ("test", report.test)]
    stores = [("training", report.train), *((what, store) for what, sets in measured for store in sets.values())]
    return [
        [
            what,
            source.name,
            source.format,
            f"{source.rows:,}",
            f"{source.used:,}",
            f"{source.cut:,}",
            f"{source.bad + source.dropped + source.no_target + source.cut_off:,}",
            f"{source.documents:,}",
            format_count(source.tokens),
            format_count(source.targets),
            f"{source.passes:g}",
            f"{store.fill:.0%}",
        ]
        for what, store in stores
        for source in store.sources
    ]


def _histogram(run: RunSeen) -> list[str]:
    """How long training rows were before any was cut; a run of an earlier raytune does not say it."""
    report = run.plan.data_report
    return length_lines(added(source.lengths for source in report.train.sources)) if report else []


def _lengths(rows: Marked) -> list[tuple[str, int]]:
    lengths = rows.lengths
    at = {
        "shortest": 0.0,
        "a quarter up to": 0.25,
        "half up to": 0.5,
        "three quarters up to": 0.75,
        "95 % up to": 0.95,
        "longest": 1.0,
    }
    return [(words, lengths[round(share * (len(lengths) - 1))]) for words, share in at.items()] if lengths else []


# --- Again -------------------------------------------------------------------------------------------------------------------


def _commands(run: RunSeen) -> list[tuple[str, str]]:
    folder = shlex.quote(run.folder.path)
    file = shlex.quote(f"{run.folder.name}.yaml")
    commands = [
        ("Train it again, from the config below in a file:", f"raytune train {file} name={shlex.quote(run.folder.name)}-again")
    ]
    if run.record.state == "finished":
        commands.append(("Loss of each row of a file under its weights:", f"raytune score {folder} rows.jsonl"))
    else:
        commands.append(("Go on from its newest checkpoint:", f"raytune train {file}"))
    return [*commands, ("Write this page again:", f"raytune report {folder}")]
