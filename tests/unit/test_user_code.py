"""Functions of the user's: found beside the config, sent with the plan, refused with the line that is wrong, told of a run."""

import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from raytune.clusters.working_dir import named_by
from raytune.config.load import config_from, load_config
from raytune.config.problems import ConfigError
from raytune.config.sections.run import RunConfig
from raytune.config.words.guides import guides
from raytune.errors import PlanError, UserError
from raytune.launch.attempts.attempts import Failure
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.planning import plan_run
from raytune.launch.run import train_plan
from raytune.launch.state import callbacks
from raytune.launch.state.callbacks import RunEvent, calling, check_callback, load_callbacks
from raytune.metrics.events import EventLog
from raytune.metrics.points import RollBack
from raytune.metrics.writer import MetricsWriter
from raytune.plan.describe import plan_text
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.identity.settings import changes_in_keys
from raytune.plan.run_plan import RunPlan
from raytune.plan.strategies.objective import ASSUMED_BYTES_PER_LOGIT, objective_of
from raytune.run_folder import RunFolder
from raytune.training.losses.user_objective import tried
from raytune.training.run import train
from raytune.training.start.start import Worker
from raytune.user_code import load, read_code
from tests.tiny import tiny_plan
from tests.unit.plan_cases import config
from tests.variants import variants

GOOD = """
def loss(logits, target_ids, scale=1.0):
    return -scale * logits.log_softmax(-1).gather(1, target_ids[:, None])[:, 0]
"""
PATIENCE_S = 20.0


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def tried_loss(text: str, **options: Any) -> str:
    """What is said of a loss in mine.py of the working directory; empty if nothing."""
    written(Path(), text)
    try:
        tried(objective_of(config(strategy={"objective": {"function": "mine.py:loss", "options": options}})), 50)
    except UserError as error:
        return str(error)
    return ""


# --- where code is found


def test_a_module_is_a_file_beside_the_config_that_names_it_before_one_in_the_working_directory(here: Path) -> None:
    written(here, GOOD)
    written(here / "of", GOOD, "mine.py")
    written(here / "pack", GOOD, "deep.py")
    text = "model: {base: demo}\nstrategy: {objective: 'mine:loss'}\ncallbacks: ['pack.deep:f', 'json:dumps']\n"
    loaded = load_config([written(here / "of", text, "r.yaml")])
    assert loaded.strategy.objective is not None
    assert loaded.strategy.objective.function == "of/mine.py:loss"
    assert loaded.callbacks == ["pack/deep.py:f", "json:dumps"]
    overridden = load_config(["of/r.yaml"], ["strategy.objective=mine:loss"]).strategy.objective
    assert overridden is not None
    assert overridden.function == "mine.py:loss"


def test_a_job_takes_files_with_code_along(here: Path) -> None:
    for name in ("mine.py", "told.py", "drawn.py"):
        written(here, GOOD, name)
    sweep = {"space": {"strategy.objective.function": {"choice": ["mine.py:loss", "drawn.py:loss"]}}, "trials": 2}
    asked = {"model": {"base": "demo"}, "strategy": {"objective": "mine:loss"}}
    assert {"mine.py", "told.py"} <= set(named_by(config_from(asked | {"callbacks": ["told:f"]})))
    assert {"mine.py", "drawn.py"} <= set(named_by(config_from(asked | {"sweep": sweep, "data": {"validation_fraction": 0.1}})))


def test_code_that_was_read_runs_where_its_file_is_not(here: Path) -> None:
    code = read_code(f"{written(here, GOOD)}:loss")
    (here / "mine.py").unlink()
    assert load(code).__name__ == "loss"
    assert load(code) is load(code)


def test_two_threads_find_a_module_that_ran_to_its_end(here: Path) -> None:
    file = written(here, "import time\ntime.sleep(0.3)\ndef loss(): ...\n")
    code = read_code(f"{file}:loss")
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(load, [code, code])
    assert first is second


@pytest.mark.parametrize(
    ("reference", "text", "says"),
    [
        ("gone.py:loss", "", "No such file"),
        ("no_such_module:loss", "", "neither no_such_module.py beside the config"),
        ("mine.py:other", "def loss(): pass", "has no other. It has loss"),
        ("mine.py:loss", "x = 1\n\ndef loss(:\n", r"mine.py:3: SyntaxError"),
        ("mine.py:loss", "import no_such_module", "Install no_such_module on every node"),
        ("mine.py:loss", "x = 1\ny = x.z\n", r"mine.py:2, in <module>: AttributeError.*y = x.z"),
    ],
)
def test_what_cannot_be_found_or_run_is_told_with_its_line(here: Path, reference: str, text: str, says: str) -> None:
    written(here, text)
    with pytest.raises(UserError, match=says):
        load(read_code(reference))


def test_a_module_that_lies_beside_the_file_would_not_be_on_the_workers(here: Path) -> None:
    written(here, "x = 1", "my_helper.py")
    written(here, "x = 1", "json.py")
    written(here, "import json\nfrom my_helper import x\n" + GOOD)
    with pytest.raises(UserError, match="imports my_helper, which lies beside it"):
        read_code("mine.py:loss")


def test_an_installed_module_has_to_be_the_same_everywhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(written(here / "site", GOOD, "my_installed.py").parent))
    code = read_code("my_installed:loss")
    assert load(code).__name__ == "loss"
    written(here / "site", f"{GOOD}\n# newer", "my_installed.py")
    with pytest.raises(UserError, match="another one on this machine"):
        load(code)
    del sys.modules["my_installed"]


# --- objectives


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD, ""),
        ("loss = 3", "is no function, but of type int"),
        ("def loss(logits): pass", "cannot be called with logits, target ids"),
        ("def loss(logits, target_ids, weights): pass", "Weights of targets are no argument"),
        ("def loss(logits, target_ids): return logits.mean()", 'returned a single number for 6 targets.*reduction="none"'),
        ("def loss(logits, target_ids): return logits", r"shape \(6, 50\)"),
        ("def loss(logits, target_ids): return 1.0", "returned float"),
        ("def loss(logits, target_ids): return logits.argmax(-1).float()", "has no gradient by the logits"),
        ("def loss(logits, target_ids): return logits.detach().sum(-1)", "has no gradient by the logits"),
        ("def loss(logits, target_ids): return logits[:, 0].log()", "not finite numbers"),
        ("def loss(logits, target_ids): return logits.sum(-1) - logits.mean()", "when other targets are beside it"),
        ("import torch\ndef loss(logits, target_ids): return logits.sum(-1) * torch.rand(1)", "without chance"),
        (
            "def loss(logits, target_ids):\n    x = 1\n    return logits @ x\n",
            r"mine.py:3, in loss: TypeError.*return logits @ x",
        ),
    ],
)
def test_a_loss_is_tried_before_anything_starts(here: Path, text: str, says: str) -> None:
    found = tried_loss(text)
    assert re.search(says, found) if says else not found, found


def test_options_are_arguments_by_name(here: Path) -> None:
    assert not tried_loss(GOOD, scale=2.0)
    assert "unexpected keyword argument 'sclae'" in tried_loss(GOOD, sclae=2.0)


def test_a_run_is_another_one_if_the_code_changes_and_not_if_the_file_moves(here: Path) -> None:
    def planned(text: str, name: str, **options: Any) -> tuple[RunPlan, RunConfig]:
        written(here, text, name)
        asked = config(strategy={"objective": {"function": f"{name}:loss", "options": options}})
        return tiny_plan(optimization={"objective": objective_of(asked)}), asked

    was, before = planned(GOOD, "mine.py")
    moved, _ = planned(GOOD, "moved.py")
    assert not differences(identity_of(was), identity_of(moved))
    for text, options, key in (
        (f"{GOOD}# x", {}, "strategy.objective (the same name, another code)"),
        (GOOD, {"scale": 2.0}, "strategy.objective.options"),
    ):
        now, asked = planned(text, "mine.py", **options)
        assert [change[0].startswith(key) for change in changes_in_keys(was, now, before, asked)] == [True]
    without = tiny_plan()
    assert differences(identity_of(without), identity_of(was))
    assert changes_in_keys(without, was, config(), before)[0][0].startswith("strategy.objective")
    stored = json.loads(json.dumps(identity_of(without)))
    del stored["optimization"]["objective"]  # of a run from before there were any
    assert not differences(stored, identity_of(without))


def test_the_plan_names_the_loss_its_bytes_and_what_validation_is(here: Path) -> None:
    written(here, GOOD)
    data = {"train": {"path": "demo:train", "max_rows": 20}}
    asked: dict[str, Any] = {"model": {"base": "demo"}, "data": data, "storage": str(here), "training": {"max_steps": 2}}
    plain, own = (plan_run(config_from(asked | {"strategy": strategy})) for strategy in ({}, {"objective": "mine:loss"}))
    assert own.optimization.objective is not None
    took = own.optimization.objective.bytes_per_logit
    assert own.optimization.objective.is_tried
    assert 8 <= took < ASSUMED_BYTES_PER_LOGIT
    text = plan_text(own)
    assert re.search(r"objective +mine.py:loss \(code [0-9a-f]{12}\); of held-out rows: cross_entropy", text)
    assert "validation/loss is cross-entropy" in text
    parts = [{part.name: part.num_bytes for part in plan.memory} for plan in (plain, own)]
    logits = parts[0]["logits and loss"] / 8
    assert parts[1]["logits and loss"] == pytest.approx(logits * (4 + took), rel=1e-3)
    assert "objective" not in plan_text(plain)


@pytest.mark.parametrize("how", [{"strategy": {"objective": "mine.py:loss"}}, {"data": {"token_weights": {"numbers": 2.0}}}])
def test_a_gap_between_two_losses_that_mean_two_things_is_refused(here: Path, how: dict[str, Any]) -> None:
    written(here, GOOD)
    data = {"train": {"path": "demo:train", "max_rows": 20}, "validation": {"path": "demo:validation", "max_rows": 5}}
    asked: dict[str, Any] = {"model": {"base": "demo"}, "storage": str(here), "training": {"overfitting": {"max_gap": 0.5}}}
    with pytest.raises(PlanError, match="max_gap compares the validation loss"):
        plan_run(config_from(asked | how | {"data": data | how.get("data", {})}))


# --- callbacks


class Heard:
    """A callback that can be waited for."""

    def __init__(self) -> None:
        self.events: list[RunEvent] = []
        self._changed = threading.Condition()

    def __call__(self, event: RunEvent) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait_for(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= number, timeout=PATIENCE_S), self.told

    @property
    def told(self) -> list[tuple[str, int | None]]:
        return [(event.kind, event.step) for event in self.events]


def run_in(folder: Path) -> tuple[RunPlan, RunFolder]:
    return tiny_plan(storage=str(folder), name="told"), RunFolder(str(folder), "told")


def clock_from(start: float) -> Callable[[], float]:
    numbers: Iterator[float] = (start + tick for tick in range(10**6))
    return lambda: next(numbers)


def test_each_event_is_told_once_and_in_order(tmp_path: Path) -> None:
    plan, folder = run_in(tmp_path)
    heard, clock = Heard(), clock_from(100.0)
    with MetricsWriter(folder.metrics, attempt=1, resumed_step=0, clock=clock) as metrics:
        metrics.write(1, {"train/loss": 9.0})  # of a command before this one
    with EventLog(folder.events, attempt=1, clock=clock) as events:
        events.write("training_started", step=0)
    with calling([heard], plan, look_every_s=0.02):
        with EventLog(folder.events, attempt=2, clock=clock) as events:
            events.write("attempt_started", workers=1)
            events.write("training_started", step=0)
            with MetricsWriter(folder.metrics, attempt=2, resumed_step=0, clock=clock) as metrics:
                metrics.write(1, {"train/loss": 3.0})
                metrics.write(2, {"train/loss": 2.0})
                heard.wait_for(3)
                metrics.write(2, {"validation/loss": 2.5})
                heard.wait_for(4)
                events.write("checkpoint_saved", step=2, path="p", num_bytes=7)
                heard.wait_for(5)
                events.write("rolled_back", step=3, to=1, rate_scale=0.5, reason="r")
            back = RollBack(bad_step=3, to=1, rate_factor=0.5)
            with MetricsWriter(folder.metrics, attempt=2, resumed_step=1, roll_back=back, clock=clock) as metrics:
                metrics.write(2, {"train/loss": 1.0})
            events.write("run_finished")
    assert heard.told == [
        ("started", 0),
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("saved", 2),
        ("rolled_back", 3),
        ("step", 2),
        ("finished", None),
    ]
    assert dict(heard.events[3].metrics) == {"validation/loss": 2.5}
    assert dict(heard.events[4].facts) == {"path": "p", "num_bytes": 7}
    assert dict(heard.events[6].metrics) == {"train/loss": 1.0}
    assert {event.attempt for event in heard.events} == {2}
    with pytest.raises(TypeError):
        heard.events[3].metrics["validation/loss"] = 0.0  # pyright: ignore[reportIndexIssue]


def test_a_run_that_ends_without_a_word_has_failed(tmp_path: Path) -> None:
    plan, _ = run_in(tmp_path)
    heard = Heard()
    with pytest.raises(OSError, match="gone"), calling([heard], plan, look_every_s=0.02):
        raise OSError("gone")
    assert heard.told == [("failed", None)]


def test_a_callback_that_raises_is_said_once_and_the_others_hear_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan, folder = run_in(tmp_path)
    heard = Heard()

    def broken(event: RunEvent) -> None:
        raise ZeroDivisionError(event.kind)

    with caplog.at_level(logging.WARNING), calling([broken, heard], plan, look_every_s=0.02):
        with MetricsWriter(folder.metrics, attempt=1, resumed_step=0) as metrics:
            for step in (1, 2):
                metrics.write(step, {"train/loss": 1.0})
        with EventLog(folder.events, attempt=1) as events:
            events.write("run_finished")
    assert len(heard.events) == 3
    first, last = (record.getMessage() for record in caplog.records)
    assert "broken failed at the event 'step'. Training goes on" in first
    assert first.endswith("ZeroDivisionError: step")
    assert "failed at 3 events in all" in last


def test_a_callback_that_never_ends_does_not_hold_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, folder = run_in(tmp_path)
    monkeypatch.setattr(callbacks, "WAIT_AT_END_S", 0.2)
    let_go = threading.Event()
    with calling([lambda event: let_go.wait()], plan, look_every_s=0.02), EventLog(folder.events, attempt=1) as events:
        events.write("run_finished")
    let_go.set()


def test_without_callbacks_nothing_follows_a_run(tmp_path: Path) -> None:
    before = threading.active_count()
    with calling([], run_in(tmp_path)[0]):
        assert threading.active_count() == before


@pytest.mark.parametrize(
    ("text", "says"),
    [("def f(a, b): pass", "cannot be called with one event"), ("f = 3", "is no function"), ("def g(): pass", "has no f")],
)
def test_what_cannot_be_told_is_refused_with_its_key(here: Path, text: str, says: str) -> None:
    written(here, text)
    with pytest.raises(UserError, match=says) as raised:
        load_callbacks(["mine.py:f"])
    assert raised.value.keys == ("callbacks",)
    with pytest.raises(UserError, match="no function"):
        check_callback("text", "text")


def test_sweeps_have_no_callbacks() -> None:
    sweep = {"space": {"training.learning_rate": {"choice": [1e-3, 1e-4]}}, "trials": 2}
    with pytest.raises(ConfigError, match="a sweep has many at once"):
        config_from({"model": {"base": "demo"}, "callbacks": ["json:dumps"], "sweep": sweep})


# --- the guide


GUIDE = guides()["user_code"].text


def write_examples(folder: Path) -> None:
    """The guide's files, each under the name in its first line."""
    for _, name, text in re.findall(r"```(python|yaml)\n# (\S+)\n(.*?)```", GUIDE, re.DOTALL):
        written(folder, text, name)


def trained(file: str, storage: Path) -> RunFolder:
    """Train a file in this process, without a cluster, in small batches, with its callbacks."""
    changes = [f"storage={storage}", "cluster.workers=1", "training.global_batch_size=2"]
    asked = load_config([file], changes, check_files=True)
    prepared = prepare(asked, this_machine(asked.cluster), map)

    def attempt(plan: RunPlan, number: int, check: Callable[[], None]) -> Failure | None:
        train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=number, report=lambda metrics: None, check=check))
        return None

    told = load_callbacks(asked.callbacks)
    train_plan(prepared.plan, prepared.questions, asked, lambda plan: calling(told, plan), attempt)
    return RunFolder(prepared.plan.storage, prepared.plan.name)


@pytest.mark.parametrize("name", variants(["loss"], ["callbacks", "weights"]))
def test_an_example_of_the_guide_trains_as_it_is_written(name: str, here: Path) -> None:
    write_examples(here)
    folder = trained(f"{name}.yaml", here / "runs")
    report = RunPlan.model_validate_json(Path(folder.plan).read_text())
    if name == "loss":
        assert report.optimization.objective is not None
        assert report.optimization.objective.options == {"gamma": 1.5}
        assert "12 for the one above" in GUIDE
        assert report.optimization.objective.bytes_per_logit == pytest.approx(12, rel=0.01)
    if name == "callbacks":
        noted = [json.loads(line) for line in Path(f"{folder.path}/noted.jsonl").read_text().splitlines()]
        told = [(one["kind"], one["step"]) for one in noted]
        assert told == [*(("evaluation", step) for step in (0, 2, 4)), ("finished", None)]
        assert all("validation/loss" in one for one in noted[:3])
    if name == "weights":
        assert report.data_report is not None
        classes = report.data_report.train.sources[0].targets_of_class
        assert list(classes) == ["numbers x 2", "code_syntax x 1.5", "/(?i)\\bcity\\b/ x 3"]
        assert classes["numbers x 2"] > 0
        assert classes["/(?i)\\bcity\\b/ x 3"] > 0
        assert not report.data_report.validation["validation"].sources[0].targets_of_class


def test_the_guide_names_every_kind_of_event() -> None:
    rows = " ".join(line.split("|")[1] for line in GUIDE.split("| kind | when |")[1].split("\n\n")[0].splitlines()[2:])
    assert set(re.findall(r"`(\w+)`", rows)) == set(callbacks.Kind.__args__)
