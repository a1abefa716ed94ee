"""What looks wrong with a run is named with the key to change; of a healthy run nothing is said."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import raytune
from raytune.config.reading.keys import keys
from raytune.config.sections.data_limits import waived
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.state.diagnosis import Evidence, Symptom, diagnose
from raytune.launch.state.outcome import Change, Spent
from raytune.metrics.history import History
from raytune.metrics.points import Point
from raytune.plan.data.data_report import COUNTS, DataReport, SourceReport, StoreReport
from raytune.plan.run_plan import RunPlan, StepTimePlan
from tests.diagnosis_cases import CASES, STORED, Case, config_of, evidence_of, stored_evidence, train_case
from tests.tiny import tiny_plan


def test_every_stored_run_is_one_of_the_table() -> None:
    assert {path.stem for path in STORED.glob("*.jsonl")} == set(CASES)
    assert set(json.loads((STORED / "failures.json").read_text())) == {"rate_far_too_high"}


@pytest.mark.parametrize("name", CASES)
def test_a_real_run_that_was_made_to_go_wrong_is_told_what_is_wrong_and_nothing_else(name: str) -> None:
    found = diagnose(stored_evidence(name))
    assert tuple(symptom.name for symptom in found) == CASES[name].symptoms
    assert tuple(symptom.key for symptom in found) == CASES[name].keys


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_same_run_trained_again_is_told_the_same(name: str, tmp_path: Path) -> None:
    found = diagnose(evidence_of(*train_case(CASES[name], tmp_path)))
    symptoms = [symptom.name for symptom in found if symptom.name not in ("underfilled", "memory_above_plan")]
    assert tuple(symptoms) == CASES[name].symptoms, "rows of documents alone, and other tests of this process, aside"


@pytest.mark.parametrize(("fall", "symptom"), [(1e-7, "not_falling"), (0.005, "rate_too_low")])
def test_a_validation_loss_that_falls_by_rounding_does_not_fall(fall: float, symptom: str) -> None:
    evidence = stored_evidence("no_rate")
    changed = (
        replace(point, values={**point.values, "validation/loss": 6.5 * (1 - fall * point.step / 20)})
        for point in evidence.history.points
    )
    assert [*told(replace(evidence, history=History(tuple(changed))))] == [symptom]


def test_a_part_of_a_healthy_run_is_healthy() -> None:
    """The page of a run that goes on does not cry wolf."""
    evidence = stored_evidence("healthy")
    for step in range(0, 61, 5):
        points = tuple(point for point in evidence.history.points if point.step <= step)
        assert diagnose(replace(evidence, history=History(points))) == [], f"by step {step}"


# --- Rules of which a little run has no case ---------------------------------------------------------------------------------


def told(evidence: Evidence) -> dict[str, Symptom]:
    return {symptom.name: symptom for symptom in diagnose(evidence)}


def source(**counts: int) -> SourceReport:
    zero = dict.fromkeys(COUNTS, 0)
    fields: dict[str, Any] = {"name": "rows", "format": "messages", "too_long": "truncate"}
    fields |= {"unread_columns": {}, "unread_keys": {}, "examples": {}}
    return SourceReport(**{**zero, **fields, "rows": 100, "used": 100, "documents": 100, "tokens": 4096, **counts})


def with_rows(**counts: int) -> RunPlan:
    train = StoreReport(row_length=512, num_rows=16, sources=[source(**counts)])
    return tiny_plan().model_copy(update={"data_report": DataReport(template=[], train=train, validation={})})


@pytest.mark.parametrize(
    ("counts", "name", "key"),
    [
        ({"cut": 11}, "cut_rows", "data.max_length"),
        ({"bad": 11}, "bad_rows", "data.train"),
        ({"no_target": 11}, "no_targets", "data.targets"),
        ({"unending": 11}, "no_end", "data.template"),
        ({"prompts_differ": 1, "prompts_compared": 64}, "prompts_differ", "data.template"),
    ],
)
def test_rows_that_are_not_trained_as_they_are_meant(counts: Mapping[str, int], name: str, key: str) -> None:
    assert told(Evidence(plan=with_rows(**counts), history=History(())))[name].key == key
    few = {count: min(1, value) if count != "prompts_differ" else 0 for count, value in counts.items()}
    assert told(Evidence(plan=with_rows(**few), history=History(()))) == {}


@pytest.mark.parametrize(("template", "told_of"), [("auto", {}), ("llama-3", {"no_end": "data.template"})])
def test_the_template_of_another_model_is_told_before_a_step_is_made(template: str, told_of: dict, tmp_path: Path) -> None:
    config = config_of(Case(symptoms=(), num_rows=40, template=template), tmp_path)
    config = config.model_copy(update={"data": config.data.model_copy(update={"limits": waived()})})
    plan = prepare(config, this_machine(config.cluster), map).plan
    found = told(Evidence(plan=plan, history=History(())))
    assert {name: symptom.key for name, symptom in found.items() if symptom.key.startswith("data.template")} == told_of


def test_rows_that_are_mostly_padding() -> None:
    data = {"train": {"num_rows": 100, "num_tokens": 100 * 512 * 4 // 10}}
    assert told(Evidence(plan=tiny_plan(data=data), history=History(())))["underfilled"].key == "data.max_length"
    data = {"train": {"num_rows": 100, "num_tokens": 100 * 512 * 6 // 10}}
    assert told(Evidence(plan=tiny_plan(data=data), history=History(()))) == {}


def test_full_memory_says_what_to_make_smaller() -> None:
    evidence = Evidence(plan=tiny_plan(), history=History(()), failure="rank 1 on a: OutOfMemoryError: CUDA out of memory")
    assert told(evidence)["out_of_memory"].key == "training.per_device_train_batch_size"


def test_steps_memory_and_evaluations_far_from_the_plan() -> None:
    step = StepTimePlan(
        compute_s=1, memory_s=0, communication_s=0, offload_s=0, seconds=1.0, binds="compute", tokens_per_s=1000.0
    )
    memory = [{"name": "weights", "num_bytes": 1000}]
    plan = tiny_plan(memory=memory, cluster={"device": "cuda"}).model_copy(update={"step_time": step})
    points = tuple(Point(step=at, time=float(at), attempt=1, values={}) for at in (1, 100))
    took = Spent(attempts=1, total_s=900, training_s=800, usd=None)
    evidence = Evidence(plan=plan, history=History(points), spent=took, step_s=2.1, peak_bytes=1200)
    assert set(told(evidence)) == {"slow_steps", "much_besides", "memory_above_plan"}
    assert told(evidence)["much_besides"].words == "9m50s of 13m20s went into evaluations and saves."
    assert set(told(replace(evidence, peak_bytes=400, step_s=7.0))) == {"slow_steps", "memory_below_plan"}
    assert told(replace(evidence, peak_bytes=1000, step_s=1.0, spent=replace(took, training_s=150))) == {}


def test_steps_that_wait_for_their_rows_are_no_slow_machine() -> None:
    step = StepTimePlan(
        compute_s=1, memory_s=0, communication_s=0, offload_s=0, seconds=1.0, binds="compute", tokens_per_s=1000.0
    )
    plan = tiny_plan().model_copy(update={"step_time": step})

    def waiting(seconds: float, step_s: float) -> set[str]:
        waits = (5.0, seconds, seconds)  # the first step reads what the machine keeps
        points = tuple(Point(step=at, time=0.0, attempt=1, values={"train/wait_s": wait}) for at, wait in enumerate(waits, 1))
        return set(told(Evidence(plan=plan, history=History(points), step_s=step_s)))

    assert waiting(2.0, 3.0) == {"data_bound"}
    assert waiting(0.7, 3.0) == {"data_bound", "slow_steps"}
    assert waiting(0.5, 3.0) == {"slow_steps"}
    assert waiting(0.1, 1.2) == set()


def test_a_loss_of_noise_around_nothing_is_no_overfitting() -> None:
    losses = [1.0, 0.001, 0.0012]
    points = tuple(
        Point(step=10 * at, time=0.0, attempt=1, values={"train/loss": 1 / (at + 1), "validation/loss": loss})
        for at, loss in enumerate(losses)
    )
    assert told(Evidence(plan=tiny_plan(), history=History(points))) == {}


@pytest.mark.parametrize(
    ("change", "is_forgetting"),
    [
        (Change(name="validation/general/loss", words="loss on general", base=1.0, tuned=1.2, kind="loss"), True),
        (Change(name="validation/general/loss", words="loss on general", base=1.0, tuned=1.02, kind="loss"), False),
        (Change(name="mmlu/accuracy", words="accuracy", base=0.5, tuned=0.4, kind="score", interval=(-0.2, -0.01)), True),
        (Change(name="mmlu/accuracy", words="accuracy", base=0.5, tuned=0.4, kind="score", interval=(-0.2, 0.01)), False),
    ],
)
def test_what_may_be_chance_is_not_forgotten(change: Change, is_forgetting: bool) -> None:
    assert ("forgetting" in told(Evidence(plan=tiny_plan(), history=History(()), changes=[change]))) == is_forgetting


def test_every_key_that_is_named_is_one_of_a_config() -> None:
    text = (Path(raytune.__file__).parent / "launch/state/diagnosis.py").read_text().replace('"\n            "', "")
    sections = "|".join(name for name in keys() if "." not in name)
    named = set(re.findall(rf"(?<!\w)(?<!plan\.)(?<!raytune\.)(?<!\.)(?:{sections})(?:\.[a-z_0-9]+)+", text))
    named = {name for name in named if not name.startswith(("data.train.", "cluster.device", "checkpoint.keep_best"))}
    assert len(named) > 15
    assert named <= keys().keys(), named - keys().keys()
