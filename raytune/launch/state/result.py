"""What a finished run is: paths, plan, metrics, and base against tuned. Read from the run folder, so any process can have it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Self

from raytune.evaluation.compare import Comparison, comparisons_in
from raytune.launch.state.diagnosis import Evidence, Symptom, diagnose
from raytune.launch.state.outcome import Change, Spent, changes, in_words, outcome_record, streamed_in_words, test_in_words
from raytune.launch.state.record import read_plan, readable
from raytune.metrics.events import read_events
from raytune.metrics.history import History
from raytune.metrics.json_numbers import decode_number, encode_number
from raytune.plan.costs.memory import bytes_in, tensor_bytes
from raytune.plan.data.data_report import DataReport
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import read_json, write_json
from raytune.training.steps.stopping import Findings


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: its run folder.
        model_path: the final weights; plain transformers or PEFT load them.
        plan: everything that was resolved before it started.
        metrics: metrics by name: `validation/...` of the best step, `train/...` of the last one, `test/...` of the model.
        best_step: the step whose weights these are.
        held_bytes: for each rank its node, the bytes of weights, gradients and optimizer state that it held, and the peak of its
            process: by the allocator on a GPU, resident in RAM otherwise.
        median_step_s: seconds of a step of the last attempt; None if that made none.
        history: everything that was measured on the way.
        comparisons: what base and tuned model are worth, by suite: `generation` for `evaluation.generation`, and those of
            `evaluation.suites`.
        evidence: what a diagnosis is made of.
        findings: which rule ended it before its last step, if one did, and where overfitting began.
        streamed: a sentence on what was read, where rows were streamed.
        finished_before: whether it was only read: an earlier command had trained it.
    """

    name: str
    folder: str
    model_path: str
    plan: RunPlan
    metrics: dict[str, float]
    best_step: int
    held_bytes: list[dict]
    median_step_s: float | None
    history: History
    comparisons: dict[str, Comparison]
    evidence: Evidence
    findings: Findings = field(default_factory=Findings)
    streamed: Sequence[str] = ()
    finished_before: bool = False

    @classmethod
    def read(cls, folder: RunFolder) -> Self:
        """Read a finished run from its folder.

        Raises:
            UserError: if another raytune wrote it.
        """
        plan, history, events = read_plan(folder), History.read(folder.metrics), read_events(folder.events)
        with readable(folder.result, folder):
            return cls._of(read_json(folder.result), folder, plan, history, events)

    @classmethod
    def _of(cls, result: dict, folder: RunFolder, plan: RunPlan, history: History, events: Sequence[Mapping[str, Any]]) -> Self:
        metrics = {name: decode_number(value) for name, value in result["metrics"].items()}
        comparisons = comparisons_in(result)
        held_bytes, median_step_s = result["held_bytes"], result["median_step_s"]
        return cls(
            name=folder.name,
            folder=folder.path,
            model_path=folder.model,
            plan=plan,
            metrics=metrics,
            best_step=result["best_step"],
            held_bytes=held_bytes,
            median_step_s=median_step_s,
            history=history,
            comparisons=comparisons,
            evidence=Evidence.of(
                plan,
                history,
                events,
                changes(history, metrics, comparisons),
                failed_metrics=[why for comparison in comparisons.values() for why in comparison.failed.values()],
                step_s=median_step_s,
                peak_bytes=max((rank["peak"] for rank in held_bytes if "peak" in rank), default=None),
            ),
            findings=Findings.from_json(result),
            streamed=streamed_in_words(events),
        )

    @property
    def changes(self) -> Sequence[Change]:
        """Scores of suites and losses on validation rows, of the base and of this model."""
        return self.evidence.changes

    @property
    def spent(self) -> Spent:
        """Time and dollars over all attempts."""
        assert self.evidence.spent is not None
        return self.evidence.spent

    @property
    def words(self) -> list[str]:
        """What the run came to, in sentences: training time, dollars, what is better and what is worse than before, its test, and
        what was read of streamed rows."""
        return [*in_words(self.spent, self.changes, self.history.last_step), *test_in_words(self.metrics), *self.streamed]

    @property
    def symptoms(self) -> list[Symptom]:
        """What looks wrong, and which key to change. Empty: nothing does."""
        return diagnose(self.evidence)

    @property
    def data_report(self) -> DataReport | None:
        """What became of the rows, per source: read, used, lost and why. None for a run planned without reading them."""
        return self.plan.data_report

    def to_json(self) -> dict:
        """The result without its history, as plain values."""
        return {
            "name": self.name,
            "folder": self.folder,
            "model_path": self.model_path,
            "finished_before": self.finished_before,
            "best_step": self.best_step,
            **self.findings.to_json(),
            "metrics": {name: encode_number(value) for name, value in self.metrics.items()},
            **self._told,
            "comparisons": {name: comparison.to_json() for name, comparison in self.comparisons.items()},
            "data_report": self.data_report and self.data_report.model_dump(mode="json"),
            "planned_and_measured": [
                {"name": name, "planned": planned, "measured": measured} for name, planned, measured in self.planned_and_measured
            ],
        }

    @property
    def _told(self) -> dict:
        """What `words` and `symptoms` say, as plain values."""
        return {
            "outcome": {**outcome_record(self.spent, self.changes, self.history.last_step), "words": self.words},
            "symptoms": [asdict(symptom) for symptom in self.symptoms],
        }

    @property
    def planned_and_measured(self) -> list[tuple[str, float | None, float | None]]:
        """Name, planned and measured value: bytes of the rank that held most, and `step_s`. None: not known.

        Gradients are gone between steps, when a rank is looked at, so only what stays is compared. The peak is the allocator's on
        a GPU, the process's on a CPU.
        """
        parts = {part.name: part.num_bytes for part in self.plan.memory}

        def most(key: str) -> float | None:
            return max((rank[key] for rank in self.held_bytes), default=None)

        step_time = None if self.plan.optimization.phases else self.plan.step_time  # whose steps differ
        peak = tensor_bytes if self.plan.cluster.device == "cuda" else partial(bytes_in, place="device")
        return [
            ("weights", parts.get("weights"), most("weights")),
            ("optimizer", parts.get("optimizer"), most("optimizer")),
            ("peak", peak(self.plan.memory), most("peak")),
            ("step_s", step_time and step_time.seconds, self.median_step_s),
        ]


def write_outcome(result: RunResult) -> None:
    """Add what it took, what has changed and what looks wrong to the result of a run, which its workers have written: they do not
    know when it ended."""
    path = RunFolder(result.plan.storage, result.name).result
    write_json(path, {**read_json(path), **result._told})
