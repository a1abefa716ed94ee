"""What trackers know of a run: everything once, whatever happens to the run, to them, or to the command; and nothing waits."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest

import raytune
from raytune.config.load import config_from, load_config
from raytune.config.sections.tracking import TrackingSection
from raytune.errors import UserError
from raytune.launch.run import train_plan
from raytune.launch.state.gauges import METRIC, RUNNING, STEP, STEPS, refuse_unseen
from raytune.launch.state.record import RunRecord, write_plan
from raytune.launch.track import TrackersAwayError, track
from raytune.metrics.events import EventLog, read_events
from raytune.metrics.history import History
from raytune.metrics.json_numbers import encode_number
from raytune.metrics.writer import MetricsWriter
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import read_json, write_bytes, write_json
from raytune.tracking.told import page_mark, settings_of
from raytune.tracking.trackers import LIBRARIES, away, refuse_unready
from raytune.tracking.watching import tracking
from raytune.training.run import train
from raytune.training.start.start import Worker
from raytune.training.steps.recorder import Recorder
from tests.tiny import store_plan, tiny_base, tiny_plan, tiny_store
from tests.trackers import READERS, Kept, MlflowServer, Points, RealMlflowServer, at_mlflow, mlflow_server
from tests.variants import variants

OPTIONS = {"wandb": {"mode": "offline"}}
DEADLINE_S = 90.0
"""On a busy machine; what is waited for comes within seconds."""


@pytest.fixture(autouse=True)
def _no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the user's own accounts there is none."""
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path / "artifacts") as server:
        yield server


def section_of(name: str, **options: str) -> TrackingSection:
    return TrackingSection.model_validate({name: OPTIONS.get(name, {}) | options, "tags": {"team": "support"}})


def begin(folder: RunFolder) -> RunPlan:
    """A run as a command leaves it that has just begun to train."""
    plan = tiny_plan(name=folder.name, storage=folder.storage)
    config = config_from({"name": folder.name, "model": {"base": "demo"}, "training": {"learning_rate": 3e-4}})
    record = RunRecord(
        name=folder.name, state="running", attempts=1, created=0.0, config=config.model_dump(mode="json"), versions={}
    )
    record.write(folder)
    write_plan(folder, plan)
    return plan


def set_state(folder: RunFolder, state: str) -> None:
    write_json(folder.run, read_json(folder.run) | {"state": state})


def train_steps(folder: RunFolder, *, attempt: int, resumed: int, until: int, seed: float = 0.0) -> None:
    """Steps as a worker writes them; one in two is evaluated, which is a line of its own."""
    with MetricsWriter(folder.metrics, attempt=attempt, resumed_step=resumed) as writer:
        with EventLog(folder.events, attempt=attempt) as events:
            events.write("training_started", step=resumed)
            for step in range(resumed + 1, until + 1):
                writer.write(step, {"train/loss": seed + 1 / step, "train/learning_rate": float("nan") if step == 1 else 1e-4})
                if step % 2 == 0:
                    writer.write(step, {"validation/loss": seed + 2 / step})
                    events.write("checkpoint_saved", step=step)


def finish(folder: RunFolder) -> None:
    with EventLog(folder.events, attempt=9) as events:
        events.write("run_finished")
    result = {"metrics": {"validation/loss": 0.25, "train/loss": 1.0}, "best_step": 2, "comparison": None}
    write_json(folder.result, result | {"outcome": {"training_s": 8.0, "usd": None}})
    set_state(folder, "finished")


def leave_page_of(folder: RunFolder, state: str) -> None:
    """A page as it is left at the end of an attempt."""
    write_bytes(folder.report, page_mark(read_json(folder.run) | {"state": state}).encode())


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def knows_all(name: str, folder: RunFolder) -> bool:
    """Whether the run folder notes that a tracker knows all that was written by now."""
    note = Path(folder.tracking(name))
    if not note.exists():
        return False
    told = json.loads(note.read_text())
    return (told["num_bytes"], told["num_events"]) == (Path(folder.metrics).stat().st_size, len(read_events(folder.events)))


def history(folder: RunFolder) -> Points:
    """Of the history that stands."""
    return {(name, point.step): [value] for point in History.read(folder.metrics).points for name, value in point.values.items()}


def rounded(points: Points, *, results: bool = False) -> dict[tuple[str, int], list[object]]:
    """Comparable: TensorBoard holds 32 bits, and not-a-number equals nothing."""
    return {
        key: [encode_number(float(f"{value:.6g}")) for value in values]
        for key, values in points.items()
        if key[0].startswith("result/") == results
    }


def only(found: list[Kept]) -> Kept:
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("name", variants([name for name in LIBRARIES if name != "trackio"], ["trackio"]))
def test_a_tracker_knows_every_point_once_of_a_run_that_went_back_and_was_resumed(name: str, tmp_path: Path) -> None:
    folder, read = RunFolder(str(tmp_path), "r"), READERS[name]
    begin(folder)
    with tracking(section_of(name), folder):
        train_steps(folder, attempt=1, resumed=0, until=6)
        wait_for(lambda: knows_all(name, folder))
        train_steps(folder, attempt=2, resumed=3, until=5, seed=1.0)  # of its first attempt, 1 to 3 stand
        leave_page_of(folder, "failed")
        set_state(folder, "interrupted")
    assert knows_all(name, folder)
    assert not list(tmp_path.rglob("artifacts/report.html")), "it is of an earlier end"
    first = only(read(tmp_path))
    expected = rounded(history(folder))
    assert len(expected) == 5 * 2 + 2
    known = rounded(first.points)
    if name == "mlflow":  # which cannot take back: the later of two values counts
        assert {key: values[-1:] for key, values in known.items() if key[1] < 6} == expected
        assert {key[1] for key, values in known.items() if len(values) > 1} == {4, 5}
        assert first.settings["tag raytune.trained_again_from_step"] == "4"
        assert first.status == "KILLED"
    else:
        assert known == expected

    with tracking(section_of(name), folder):
        train_steps(folder, attempt=3, resumed=5, until=8)
        wait_for(lambda: knows_all(name, folder))  # to start takes seconds, and the end waits for few
        finish(folder)
        leave_page_of(folder, "finished")
    assert len(list(tmp_path.rglob("artifacts/report.html"))) == (name == "mlflow")
    second = only(read(tmp_path))
    assert second.run_id == first.run_id
    expected, known = rounded(history(folder)), rounded(second.points)
    assert len(expected) == 8 * 2 + 4
    assert {key: values[-1:] for key, values in known.items()} == expected
    assert known == expected or name == "mlflow"
    results = {metric: values for (metric, _), values in rounded(second.points, results=True).items()}
    assert results == {"result/validation/loss": [0.25], "result/best_step": [2.0], "result/training_s": [8.0]}
    assert float(second.settings["training.learning_rate"]) == 3e-4
    assert float(second.settings["plan.steps"]) == 4
    assert len(second.events) == len(read_events(folder.events))
    assert second.events[0].startswith("training started after step 0")
    assert second.status in {"mlflow": ("FINISHED",), "wandb": ("0",)}.get(name, (None,))


@pytest.mark.slow
def test_trials_are_runs_of_a_group_and_stand_below_the_sweep(tmp_path: Path) -> None:
    sweep = SweepFolder(str(tmp_path), "s")
    write_json(sweep.sweep, {"tracking": {"mlflow": {}, "wandb": {"mode": "offline"}}})
    for name in ("trial-000", "trial-001"):
        begin(sweep.trial(name))
        train_steps(sweep.trial(name), attempt=1, resumed=0, until=3)
    finish(sweep.trial("trial-000"))
    assert track(sweep.path) == ["MLflow knows everything of s.", "W&B knows everything of s."]

    parent, *trials = sorted(READERS["mlflow"](tmp_path), key=lambda run: len(run.points))
    assert {trial.settings["tag mlflow.parentRunId"] for trial in trials} == {parent.run_id}
    assert {trial.settings["tag mlflow.runName"] for trial in trials} == {"s trial-000", "s trial-001"}
    assert sorted(trial.status or "" for trial in trials) == ["FINISHED", "KILLED"]
    runs = READERS["wandb"](tmp_path)
    assert {(run.settings["name"], run.settings["group"]) for run in runs} == {("s trial-000", "s"), ("s trial-001", "s")}
    for run in [*trials, *runs]:
        assert rounded(run.points) == rounded(history(sweep.trial("trial-000")))


# --- trackers that are away


@pytest.mark.parametrize("illness", ["is gone", pytest.param("fails", marks=pytest.mark.slow)])
def test_a_tracker_that_was_away_is_said_once_and_knows_everything_later(
    illness: str, server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(str(tmp_path), "r")
    begin(folder)
    with tracking(section_of("mlflow", uri=server.uri), folder):
        train_steps(folder, attempt=1, resumed=0, until=4)
        wait_for(lambda: knows_all("mlflow", folder))
        server.stop() if illness == "is gone" else setattr(server, "mood", "fails")
        train_steps(folder, attempt=2, resumed=4, until=6)
        wait_for(lambda: any(event["event"] == "tracker_away" for event in read_events(folder.events)))
        train_steps(folder, attempt=3, resumed=6, until=8)
        time.sleep(2.5)  # it is tried again, more than once
        server.start() if illness == "is gone" else setattr(server, "mood", "well")
        wait_for(lambda: any(event["event"] == "tracker_back" for event in read_events(folder.events)))
        finish(folder)
    (run_id,) = server.runs
    assert rounded(server.points(run_id)) == rounded(history(folder))
    assert server.runs[run_id]["status"] == "FINISHED"
    told = [event["event"] for event in read_events(folder.events) if event["event"].startswith("tracker_")]
    assert told == ["tracker_away", "tracker_back"]
    assert [record.message.partition(",")[0] for record in caplog.records if record.name == "raytune.tracking.watching"] == [
        "MLflow does not take what it is told",
        "MLflow answers again",
    ]


@pytest.mark.slow  # often with a run that is trained: test_losses_are_those_of_a_run_without_trackers...
@pytest.mark.parametrize("illness", ["is gone", "hangs"])
def test_a_command_ends_beside_a_dead_tracker_which_is_told_by_a_later_one(
    illness: str, server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(str(tmp_path), "r")
    begin(folder)
    section = section_of("mlflow", uri=server.uri)
    write_json(folder.run, read_json(folder.run) | {"config": {"tracking": section.model_dump(mode="json")}})
    server.stop() if illness == "is gone" else setattr(server, "mood", "hangs")
    with tracking(section, folder):
        train_steps(folder, attempt=1, resumed=0, until=4)
        wait_for(lambda: illness == "is gone" or server.num_refused > 0)
        finish(folder)
        ended = time.monotonic()
    assert time.monotonic() - ended < 20  # seconds; without the limits of the client and of the command it would be minutes
    assert f"raytune track {folder.path}" in caplog.text
    if illness == "is gone":
        with pytest.raises(TrackersAwayError, match=r"(?s)MLflow does not know everything of r: .*refused"):
            track(folder.path)
        server.start()
    server.mood = "well"
    assert track(folder.path) == ["MLflow knows everything of r."]
    (run_id,) = server.runs
    assert rounded(server.points(run_id)) == rounded(history(folder))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_mlflow_server_that_is_killed_knows_everything_when_it_is_back(tmp_path: Path) -> None:
    server = RealMlflowServer(tmp_path)
    folder = RunFolder(str(tmp_path), "r")
    begin(folder)
    server.start()
    try:
        with tracking(section_of("mlflow", uri=server.uri), folder):
            train_steps(folder, attempt=1, resumed=0, until=4)
            wait_for(lambda: knows_all("mlflow", folder))
            server.kill()
            train_steps(folder, attempt=2, resumed=4, until=6)
            wait_for(lambda: any(event["event"] == "tracker_away" for event in read_events(folder.events)))
            server.start()
            wait_for(lambda: any(event["event"] == "tracker_back" for event in read_events(folder.events)))
            finish(folder)
            leave_page_of(folder, "finished")
        kept = only(at_mlflow(server.uri))
    finally:
        server.kill()
    assert kept.status == "FINISHED"
    assert rounded(kept.points) == rounded(history(folder))
    assert kept.settings["training.learning_rate"] == "0.0003"
    sent = {path.name for path in (tmp_path / "files").rglob("*") if path.is_file()}
    assert sent == {"run.json", "plan.json", "result.json", "report.html", "events.txt"}
    told = [event["event"] for event in read_events(folder.events) if event["event"].startswith("tracker_")]
    assert told == ["tracker_away", "tracker_back"]


def test_losses_are_those_of_a_run_without_trackers_when_a_server_is_killed_which_is_told_later(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, base = store_plan(tiny_store(tmp_path / "store")), tiny_base(tmp_path)

    def losses(folder: RunFolder, section: TrackingSection, at_steps: Callable[[], None]) -> list[tuple[int, float]]:
        changes = {"model": {"path": str(base)}, "data": {"train": store}, "optimization": {"num_steps": 6}, "template": ""}
        plan = tiny_plan(name=folder.name, storage=folder.storage, **changes)
        config = config_from({"name": folder.name, "storage": folder.storage, "model": {"base": "demo"}})

        def attempt(plan: RunPlan, number: int, check: Callable[[], None]) -> None:
            train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=number, report=print, check=at_steps))

        train_plan(plan, [], config, lambda plan: tracking(section, folder), attempt)
        ended.append(time.monotonic())
        return History.read(folder.metrics).series("train/loss")

    def kill_the_server() -> None:
        wait_for(lambda: len(server.runs) == 1)
        server.stop()
        ended.append(time.monotonic())

    ended: list[float] = []
    section = section_of("mlflow", uri=server.uri)
    tracked = losses(RunFolder(str(tmp_path), "tracked"), section, kill_the_server)
    assert ended[-1] - ended[-2] < 40  # seconds, of five steps and the wait of 20 at most; without limits it would be minutes
    assert f"raytune track {tmp_path}/tracked" in caplog.text
    assert tracked == losses(RunFolder(str(tmp_path), "alone"), TrackingSection(), lambda: None)
    assert len(tracked) == 6
    (run_id,) = server.runs
    assert len(server.points(run_id)) < 6
    with pytest.raises(TrackersAwayError, match=r"(?s)MLflow does not know everything of tracked: .*refused"):
        track(f"{tmp_path}/tracked", section)
    server.start()
    track(f"{tmp_path}/tracked", section)
    assert rounded(server.points(run_id)) == rounded(history(RunFolder(str(tmp_path), "tracked")))


@pytest.mark.slow
def test_a_command_that_dies_takes_its_trackers_process_with_it_and_the_next_one_goes_on(
    server: MlflowServer, tmp_path: Path
) -> None:
    folder = RunFolder(str(tmp_path), "r")
    begin(folder)
    from raytune.tracking.watching import Telling

    with EventLog(folder.events, attempt=0) as events:
        telling = Telling("mlflow", section_of("mlflow", uri=server.uri), folder, events, is_sweep=False)
        train_steps(folder, attempt=1, resumed=0, until=4)
        wait_for(lambda: knows_all("mlflow", folder))
        process = telling._process
        assert process.stdin is not None
        process.stdin.close()  # as the system does where the command was killed
        wait_for(lambda: process.poll() is not None)
        telling.kill()
    with tracking(section_of("mlflow", uri=server.uri), folder):
        train_steps(folder, attempt=2, resumed=4, until=6)
        wait_for(lambda: knows_all("mlflow", folder))
        finish(folder)
    (run_id,) = server.runs
    assert rounded(server.points(run_id)) == rounded(history(folder))


# --- what is refused, and what is kept back


def test_names_alone_stand_for_trackers_without_options() -> None:
    asked = {"model": {"base": "demo"}, "tracking": ["tensorboard", "mlflow"]}
    assert config_from(asked).tracking == TrackingSection.model_validate({"tensorboard": {}, "mlflow": {}})
    assert config_from(asked | {"tracking": "trackio"}).tracking.trackio is not None
    assert not config_from({"model": {"base": "demo"}}).tracking.chosen
    with pytest.raises(UserError, match="wandbb"):
        config_from(asked | {"tracking": ["wandbb"]})


@pytest.mark.parametrize("names", ["[tensorboard, trackio]", "trackio"])
def test_what_is_laid_over_names_alone_joins_them(names: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{base: demo}}\ndata: {{train: demo:train}}\ntracking: {names}\n")
    section = load_config([file], ["tracking.group=x", "tracking.mlflow.experiment=e", "tracking.trackio.project=p"]).tracking
    assert set(section.chosen) == {"trackio", "mlflow"} | ({"tensorboard"} if "tensorboard" in names else set())
    assert section.trackio is not None
    assert (section.group, section.trackio.project) == ("x", "p")
    assert set(load_config([file], ["tracking=[wandb]"]).tracking.chosen) == {"wandb"}, "a list replaces"
    file.write_text(file.read_text().replace("trackio", "trakio"))
    with pytest.raises(UserError, match="trakio"):
        load_config([file], ["tracking.group=x"])


def test_what_is_laid_over_a_list_of_more_than_names_drops_no_tracker_of_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("tracking: [trackio, {mlflow: {experiment: e}}]\n")
    with pytest.raises(UserError, match="must be names of trackers"):
        load_config([file], ["tracking.trackio.project=p"])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"group": "a"}, "no tracker is named"),
        ({"tensorboard": {}, "log_model": True}, "only MLflow and W&B keep models"),
        ({"mlflow": {"uri": "http://me:S3cretPassw0rd@host"}}, "looks like a secret"),
    ],
)
def test_keys_that_nothing_reads_and_secrets_are_refused(written: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        config_from({"model": {"base": "demo"}, "tracking": written})


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_package_that_is_missing_is_refused_with_what_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, LIBRARIES[name].packages[0], None)
    with pytest.raises(UserError, match=rf"is not installed\. Install it: .* -m pip install .*\[{name}\]") as raised:
        refuse_unready(section_of(name), "/runs")
    assert raised.value.keys == (f"tracking.{name}",)


def test_options_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIBRARIES:
        refuse_unready(section_of(name), "/runs")
        with pytest.raises(UserError, match=r"storage is s3://bucket/runs, where"):
            refuse_unready(section_of(name), "s3://bucket/runs")
    with pytest.raises(UserError, match=r"no API key for W&B\. Set WANDB_API_KEY"):
        refuse_unready(TrackingSection.model_validate({"wandb": {}}), "/runs")
    with pytest.raises(UserError, match=r"sqlite:///FILE"):
        refuse_unready(section_of("mlflow", uri="./mlruns"), "/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    with pytest.raises(UserError, match=r"Write tracking\.mlflow\.uri=http://host:5000"):
        refuse_unready(section_of("mlflow"), "/runs")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    refuse_unready(TrackingSection.model_validate({"wandb": {}}), "/runs")


def test_a_server_that_is_away_is_only_said_by_a_check(server: MlflowServer) -> None:
    section = section_of("mlflow", uri=server.uri)
    assert away(section) is None
    server.stop()
    assert "MLflow at 127.0.0.1" in (away(section) or "")
    assert away(section_of("tensorboard")) is None


def test_settings_have_what_is_trained_and_no_credential() -> None:
    config = config_from({"model": {"base": "demo"}, "data": {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}})
    dumped = config.model_dump(mode="json")
    dumped["model"]["hub_token"] = "hf_abcDEFghiJKLmnoPQRstuVWXyz0123456789"
    settings = settings_of(dumped, tiny_plan())
    assert settings["data.train.1.path"] == "b.jsonl"
    assert settings["plan.steps"] == tiny_plan().optimization.num_steps
    assert not [name for name, value in settings.items() if "hf_" in str(value) or value is None]


def test_nothing_is_started_where_no_tracker_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with tracking(TrackingSection(), RunFolder(str(tmp_path), "r")):
        pass
    assert not list(tmp_path.iterdir())
    assert not caplog.records


# --- Prometheus


def test_the_dashboard_shows_gauges_that_there_are_and_every_panel_has_its_place() -> None:
    dashboard = json.loads((Path(raytune.__file__).parent / "docs/grafana.json").read_text())
    jsonschema.validate(dashboard, DASHBOARD)
    known = {f"ray_{name}" for name in (METRIC, STEP, STEPS, RUNNING)}
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    places, shown = set(), set()
    for panel in dashboard["panels"]:
        expression = panel["targets"][0]["expr"]
        assert set(re.findall(r"ray_\w+", expression)) <= known, panel["title"]
        assert set(re.findall(r"\$\{?(\w+)", json.dumps(panel))) <= variables
        shown |= {one for pattern in re.findall(r'metric=~"([^"]+)"', expression) for one in pattern.split("|")}
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & places
        places |= own
    documented = re.findall(r"`(train/\w+)`", str(Recorder.__doc__))
    assert {name for name in shown if name.startswith("train/")} <= set(documented)


DASHBOARD = {
    "type": "object",
    "required": ["title", "uid", "schemaVersion", "panels", "templating", "time"],
    "properties": {
        "schemaVersion": {"type": "integer", "minimum": 30},
        "panels": {
            "type": "array",
            "minItems": 6,
            "items": {
                "type": "object",
                "required": ["id", "title", "type", "datasource", "gridPos", "targets", "fieldConfig"],
                "properties": {
                    "id": {"type": "integer"},
                    "type": {"const": "timeseries"},
                    "gridPos": {
                        "type": "object",
                        "required": ["x", "y", "w", "h"],
                        "properties": {"x": {"minimum": 0}, "w": {"maximum": 24}},
                    },
                    "targets": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["expr", "refId"]}},
                },
            },
        },
    },
}
"""What Grafana asks of a dashboard that is imported, as far as ours has it."""


def test_gauges_are_for_one_run_and_their_names_for_whoever_reads_them() -> None:
    asked = {"model": {"base": "demo"}, "data": {"train": "demo:train"}, "tracking": ["prometheus"]}
    section = config_from(asked).tracking
    assert (section.prometheus is not None, section.chosen) == (True, {})
    config_from(asked | {"tracking": {"prometheus": {}, "group": "a", "run_name": "b"}})
    with pytest.raises(UserError, match="no tracker is named that keeps runs"):
        config_from(asked | {"tracking": {"prometheus": {}, "tags": {"team": "a"}}})
    refuse_unseen(config_from(asked | {"cluster": {"address": "host:6379"}}))
    with pytest.raises(UserError, match="by ray:// it is on none"):
        refuse_unseen(config_from(asked | {"cluster": {"address": "ray://host:10001"}}))
    space = {"trials": 2, "space": {"training.learning_rate": {"grid": [1e-3, 1e-4]}}}
    with pytest.raises(UserError, match="a sweep has many at once"):
        config_from(asked | {"data": {"train": "demo:train", "validation": "demo:validation"}, "sweep": space})
