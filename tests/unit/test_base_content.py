"""The content of a base is part of a run: weights that were replaced under the same path are refused, a moved folder is not."""

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from raytune.config.load import config_from, config_with, dump_yaml
from raytune.config.sections.run import RunConfig
from raytune.errors import ModelError, PlanError, UserError
from raytune.launch.attempts.attempts import Failure
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import Preparation, prepare
from raytune.launch.data.reading import show_reading
from raytune.launch.run import train_plan
from raytune.launch.state.record import RunRecord, refuse_another_run, write_plan
from raytune.model.files.base_content import base_content
from raytune.plan.identity.division import Layout
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import LAYOUT_FILE, RunFolder, SweepFolder
from raytune.storage import write_bytes, write_json
from raytune.sweeps.ledger import Ended, Known
from raytune.sweeps.planner import Planner
from raytune.sweeps.run import COMPARED_BY_CONTENT, MAY_CHANGE, _refuse_another_sweep, _refuse_other_bases, _refuse_other_trials
from raytune.sweeps.trial import Trial
from raytune.sweeps.winner import winner_config
from raytune.training.checkpoints.commit import Commit
from raytune.training.engines.layout import fill_with_layout
from raytune.units import GIB
from tests.sweep_cases import sweep_result, trial_result
from tests.tiny import save_tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return save_tiny_model(tmp_path / "base")


def replace_weights(base: Path) -> None:
    """Other numbers in a file of the same name and size."""
    tensors = load_file(base / WEIGHTS)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, base / WEIGHTS, {"format": "pt"})


def replace_in_place_under_the_old_date(base: Path) -> None:
    was = (base / WEIGHTS).stat()
    data = bytearray((base / WEIGHTS).read_bytes())
    data[-100] ^= 1
    with (base / WEIGHTS).open("r+b") as file:
        file.write(data)
    os.utime(base / WEIGHTS, ns=(was.st_atime_ns, was.st_mtime_ns))
    now = (base / WEIGHTS).stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (was.st_size, was.st_mtime_ns, was.st_ino)


def replace_config(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))


def replace_generation_config(base: Path) -> None:
    """Which is saved beside the tuned model, and decides how it answers."""
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "do_sample": True}))


def replace_tokenizer_config(base: Path) -> None:
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))


def run_config(base: Path, storage: Path) -> RunConfig:
    return config_from(
        {
            "name": "run",
            "storage": str(storage),
            "model": {"base": str(base)},
            "data": {"train": {"path": "demo:train", "max_rows": 20}, "max_length": 512},
            "adapter": {"method": "lora"},
            "training": {"max_steps": 2},
        }
    )


def planned(base: Path, storage: Path) -> RunPlan:
    config = run_config(base, storage)
    return prepare(config, this_machine(config.cluster), map).plan


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (replace_weights, WEIGHTS),
        (replace_in_place_under_the_old_date, WEIGHTS),
        (replace_config, "config.json"),
        (replace_generation_config, "generation_config.json"),
        (replace_tokenizer_config, "tokenizer_config.json"),
    ],
)
def test_a_changed_base_is_another_run_and_the_file_is_named(change: Callable[[Path], None], name: str, base: Path) -> None:
    storage = base.parent / "runs"
    plan = planned(base, storage)
    folder = RunFolder(plan.storage, plan.name)
    write_plan(folder, plan)
    refuse_another_run(folder, planned(base, storage))
    time.sleep(0.02)  # the clock of a file system ticks every few milliseconds
    change(base)
    told = rf"model\.base \(its file {name}\): [0-9a-f]{{32}} -> [0-9a-f]{{32}}\n(.*\n)*Continuing it would mix"
    with pytest.raises(UserError, match=told):
        refuse_another_run(folder, planned(base, storage))


def test_the_same_base_in_another_folder_is_the_same_run(base: Path) -> None:
    storage = base.parent / "runs"
    plan = planned(base, storage)
    write_plan(RunFolder(plan.storage, plan.name), plan)
    shutil.copytree(base, base.parent / "moved")
    moved = planned(base.parent / "moved", storage)
    assert moved.model.path != plan.model.path
    refuse_another_run(RunFolder(plan.storage, plan.name), moved)


def test_a_file_is_read_once_while_it_stays_as_it_is(base: Path, tmp_path: Path) -> None:
    os.utime(base / WEIGHTS, (0, 0))
    while time.time() - (base / WEIGHTS).stat().st_ctime < 2.1:  # one that changed just now is not trusted
        time.sleep(0.1)
    cache = tmp_path / "hashes"
    first = base_content(str(base), None, cache=cache)
    (entry,) = [path for path in cache.iterdir() if json.loads(path.read_text())["file"].endswith(WEIGHTS)]
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"sha256": "known"}))
    assert base_content(str(base), None, cache=cache)[WEIGHTS] == "known"
    os.utime(base / WEIGHTS, (1, 1))
    assert base_content(str(base), None, cache=cache) == first
    entry.write_text("{")
    assert base_content(str(base), None, cache=cache) == first


def test_hashes_are_those_of_sha256sum_and_need_no_cache_that_can_be_written(base: Path, tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "file").touch()
    content = base_content(str(base), None, cache=tmp_path / "file" / "no folder")
    assert content == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:32] for path in base.iterdir()}


def test_a_hub_base_is_its_commit_and_workers_are_told_to_load_that_one(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = base.parent / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    repository = hub / "models--owner--name"
    first, second = "1" * 40, "2" * 40
    for commit in (first, second):
        shutil.copytree(base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(first)
    config = run_config(base, base.parent / "runs")
    config = config.model_copy(update={"model": config.model.model_copy(update={"base": "owner/name"})})
    plan = prepare(config, this_machine(config.cluster), map).plan
    assert (plan.model.path, plan.model.revision, plan.model.content) == ("owner/name", first, {"commit": first})
    write_plan(RunFolder(plan.storage, plan.name), plan)
    (repository / "refs" / "main").write_text(second)
    with pytest.raises(UserError, match=rf"model\.base \(its commit\): {first} -> {second}"):
        refuse_another_run(RunFolder(plan.storage, plan.name), prepare(config, this_machine(config.cluster), map).plan)


def test_another_attempt_does_not_go_on_with_other_weights(base: Path) -> None:
    plan = planned(base, base.parent / "runs")
    config = run_config(base, base.parent / "runs")
    attempts: list[int] = []

    def lost_its_node(plan: RunPlan, attempt: int, check: Callable[[], None]) -> Failure:
        attempts.append(attempt)
        replace_weights(base)
        return Failure(attempt=attempt, rank=0, node=None, kind="worker died", message="lost", traceback="")

    patient = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"max_failures": 3})})
    with pytest.raises(ModelError, match=rf"(?s)is not what it was.*{WEIGHTS}: [0-9a-f]+ -> "):
        train_plan(patient, [], config, attempt=lost_its_node)
    assert attempts == [1]
    record = RunRecord.read(RunFolder(plan.storage, plan.name))
    assert record
    assert (record.state, "is not what it was" in (record.failure or "")) == ("failed", True)


def test_trials_of_one_sweep_are_not_planned_on_two_bases(base: Path) -> None:
    config = run_config(base, base.parent / "runs")
    preparation = Preparation(this_machine(config.cluster), map)
    preparation.prepare(config)
    replace_weights(base)
    with pytest.raises(ModelError, match=rf"{WEIGHTS}: "):
        preparation.prepare(config)


def test_a_winner_is_not_trained_again_on_other_weights_unless_another_base_is_named(base: Path) -> None:
    sweep = SweepFolder(str(base.parent / "runs"), "s")
    result = sweep_result([trial_result(0, {}, ((10, 1.0),))])
    write_json(sweep.result, result.to_json() | {"name": "s", "folder": sweep.path})
    config = run_config(base, base.parent / "runs")
    Path(sweep.best).write_text(dump_yaml(config))
    plan = planned(base, base.parent / "runs")
    write_plan(sweep.trial("trial-000"), plan)
    assert winner_config(sweep.path).model == config.model
    replace_weights(base)
    with pytest.raises(ModelError, match=rf"(?s)trial-000 of the sweep .*{WEIGHTS}: .*raytune train {sweep.best}"):
        winner_config(sweep.path)
    other = save_tiny_model(base.parent / "other", seed=1)
    assert winner_config(sweep.path, overrides=[f"model.base={other}"]).model.base == str(other)


def test_a_chat_template_of_the_base_that_changed_is_another_run(base: Path) -> None:
    plan = planned(base, base.parent / "runs")
    write_plan(RunFolder(plan.storage, plan.name), plan)
    (template,) = [path for path in base.iterdir() if path.suffix == ".jinja"]
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(UserError, match=r"model\.base \(its file chat_template\.jinja\): "):
        refuse_another_run(RunFolder(plan.storage, plan.name), planned(base, base.parent / "runs"))


def ended_sweep(base: Path, storage: Path) -> tuple[RunConfig, SweepFolder, Known]:
    """A sweep with a trial that has ended on a base."""
    config = config_with(
        run_config(base, storage), {"sweep": {"space": {"adapter.rank": {"grid": [2, 4]}}}, "data.validation_fraction": 0.2}
    )
    folder, trial = SweepFolder(str(storage), config.name), Trial(number=0, values={"adapter.rank": 2})
    write_plan(folder.trial(trial.name), Planner(config, folder, this_machine(config.cluster), map).plan(trial))
    return config, folder, Known(trials={trial.name: trial}, ends={trial.name: Ended(state="finished")})


def on_base(config: RunConfig, base: Path, folder: SweepFolder) -> Planner:
    return Planner(config_with(config, {"model.base": str(base)}), folder, this_machine(config.cluster), map)


def test_a_sweep_does_not_go_on_with_a_base_that_was_moved_and_changed(base: Path) -> None:
    config, folder, known = ended_sweep(base, base.parent / "runs")
    moved = Path(shutil.move(base, base.parent / "moved"))
    _refuse_other_bases(folder, on_base(config, moved, folder), known)
    replace_weights(moved)
    with pytest.raises(UserError, match=rf"(?s)Sweep 'run' .*model\.base \(its file {WEIGHTS}\): .*would mix two sweeps"):
        _refuse_other_bases(folder, on_base(config, moved, folder), known)


def test_a_trial_whose_checkpoint_other_workers_saved_is_refused_before_any_trial_starts(base: Path) -> None:
    config, folder, known = ended_sweep(base, base.parent / "runs")
    (trial,) = known.trials.values()
    run, unended = folder.trial(trial.name), Known(trials=known.trials)
    planner = on_base(config, base, folder)
    _refuse_other_trials(folder, planner, unended)
    commit = Commit(
        path=run.checkpoint(2),
        step=2,
        world_size=2,
        attempt=1,
        parent=None,
        created=0.0,
        metrics={},
        fingerprint={},
        versions={},
        folder="state",
        files=(),
    )
    Path(commit.state).mkdir(parents=True)
    Path(commit.path, "MANIFEST.json").write_bytes(commit.to_manifest())
    fill_with_layout(Layout(zero_stage=2, world_size=2, precision="fp32"), Path(commit.state) / LAYOUT_FILE)
    with pytest.raises(PlanError, match="saved by 2 workers at ZeRO stage 2"):
        _refuse_other_trials(folder, planner, unended)


def test_a_base_may_lie_elsewhere_when_a_sweep_goes_on_and_not_when_a_finished_one_is_read(base: Path) -> None:
    config, folder, _ = ended_sweep(base, base.parent / "runs")
    write_bytes(folder.sweep, config.model_dump_json().encode())
    elsewhere = config_with(config, {"model.base": "/elsewhere"})
    _refuse_another_sweep(folder, elsewhere, may_change=(*MAY_CHANGE, COMPARED_BY_CONTENT))
    with pytest.raises(UserError, match=r"model\.base: "):
        _refuse_another_sweep(folder, elsewhere, may_change=MAY_CHANGE)


def test_who_waits_for_the_hashes_hears_how_much_is_read_and_each_part_of_it(base: Path, tmp_path: Path) -> None:
    asked, read = [], []

    @contextmanager
    def watch(num_bytes: int) -> Iterator[Callable[[int], None]]:
        asked.append(num_bytes)
        yield read.append

    base_content(str(base), None, cache=tmp_path / "none", watch=watch)
    assert asked == [sum(file.stat().st_size for file in base.iterdir())] == [sum(read)]


def test_reading_a_large_base_is_announced_with_its_size_and_the_reason() -> None:
    out = io.StringIO()
    with show_reading("/models/large", 140 * GIB, out) as advance:
        assert "Reading 140 GiB of /models/large: a run holds the hashes" in out.getvalue()
        advance(GIB)
    with show_reading("/models/tiny", 1000, quiet := io.StringIO()):
        assert quiet.getvalue() == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        with show_reading("/models/large", 4 * GIB, terminal) as advance:
            advance(3 * GIB)
    assert "3.2/4.3 GB" in terminal.getvalue()
