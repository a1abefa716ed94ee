"""The commit protocol with real engines: what counts, what is found again after every injury, what stays."""

import json
import math
import multiprocessing
import os
import pickle
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fsspec.config
import pytest
import torch
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raytune import storage
from raytune.errors import CheckpointError, PlanError, RaytuneError, StorageFullError
from raytune.metrics.events import EventLog, read_events
from raytune.plan.run_plan import CheckpointPlan, SnapshotPlan
from raytune.run_folder import MANIFEST, RunFolder
from raytune.training.checkpoints.checkpoint import Checkpoints
from raytune.training.checkpoints.commit import (
    Commit,
    SavedFile,
    best_commit,
    committed,
    next_attempt,
    refuse_small_disk,
    required_bytes,
    retain,
)
from raytune.training.checkpoints.snapshot import HostMemory, Snapshot
from raytune.training.engines.plain_engine import PlainEngine
from raytune.training.engines.state_files import Write, write_now
from tests.numerics.processes import PRELOADED, run_on_ranks
from tests.variants import chequered

WAITING = CheckpointPlan(every_steps=1, every_s=None, keep_last=2, keep_best=1, metric="validation/loss", mode="min")
"""Training waits for the files."""
POLICY = WAITING.model_copy(update={"snapshot": SnapshotPlan(first_rank=1 << 20, other_ranks=1 << 19)})
FINGERPRINT = {"data": "abc", "learning_rate": 0.1}


def engine_at(
    step: int, *, width: int = 8, rank: int = 0, world_size: int = 1, kind: type[PlainEngine] = PlainEngine
) -> PlainEngine:
    """An engine that has trained `step` steps; two engines at the same step are equal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 1))
    engine = kind(
        model,
        torch.optim.AdamW(model.parameters()),
        precision="fp32",
        max_grad_norm=1.0,
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
    )
    train(engine, range(step))
    return engine


def train(engine: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        data = torch.randn(4, engine.model[0].in_features, generator=generator)
        engine.backward((engine.module(data) ** 2).mean() / engine.world_size)
        engine.step(0.01)


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.trainable_state() if value is not None}


def equal(one: Any, other: Any) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Events(list[tuple[str, dict]]):
    """A report that remembers."""

    def write(self, event: str, **facts: object) -> None:
        self.append((event, facts))

    def named(self, event: str) -> list[dict]:
        return [facts for name, facts in self if name == event]


@pytest.fixture(params=["local", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "storage") if request.param == "local" else f"memory://{uuid.uuid4().hex}", "run")


@pytest.fixture
def local_folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "storage"), "run")


def open_checkpoints(folder: RunFolder, engine: Any, attempt: int = 1, **changes: Any) -> tuple[Checkpoints, Events]:
    events = Events()
    settings = {"policy": POLICY, "fingerprint": FINGERPRINT, "report": events.write, **changes}
    return Checkpoints(folder, engine, attempt=attempt, **settings), events


def save_steps(folder: RunFolder, losses: dict[int, float], attempt: int = 1, **changes: Any) -> PlainEngine:
    """Train to each step and commit it; the engine after the last one."""
    engine = engine_at(0)
    checkpoints, _ = open_checkpoints(folder, engine, attempt, **changes)
    done = 0
    for step, loss in losses.items():
        train(engine, range(done, step))
        done = step
        checkpoints.save(step, metrics={"validation/loss": loss})
        checkpoints.wait()
    return engine


def steps_of(folder: RunFolder) -> list[int]:
    return [commit.step for commit in committed(folder)]


# --- Saved is found again ----------------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded_with_everything_beside_it(folder: RunFolder) -> None:
    save_steps(folder, {3: 2.0, 5: math.inf})
    engine = engine_at(0)
    checkpoints, events = open_checkpoints(folder, engine, attempt=2)
    commit = checkpoints.load_newest()
    assert commit is not None
    assert (commit.step, commit.attempt, commit.parent, commit.world_size) == (5, 1, 3, 1)
    assert commit.metrics == {"validation/loss": math.inf}
    assert commit.fingerprint == FINGERPRINT
    assert commit.versions["torch"] == version("torch")
    assert equal(engine, engine_at(5))
    train(engine, range(5, 9))
    assert equal(engine, engine_at(9))  # the optimizer too
    assert checkpoints.wait() == commit
    assert events == []


def test_a_run_without_checkpoints_starts_from_scratch(folder: RunFolder) -> None:
    checkpoints, _ = open_checkpoints(folder, engine_at(0))
    assert checkpoints.load_newest() is None
    assert checkpoints.best() is None
    assert checkpoints.wait() is None


def test_the_best_can_be_loaded_at_the_end(folder: RunFolder) -> None:
    engine = save_steps(folder, {1: 3.0, 2: 1.0, 3: 2.0, 4: math.nan, 5: 2.5})
    assert steps_of(folder) == [2, 4, 5]
    checkpoints, _ = open_checkpoints(folder, engine)
    best = checkpoints.best()
    assert best is not None
    assert best.step == 2
    checkpoints.load(best, engine)
    assert equal(engine, engine_at(2))


def test_what_was_learned_of_steps_that_a_run_went_back_behind_is_forgotten(local_folder: RunFolder) -> None:
    """They are made again, from there to other weights."""
    engine = save_steps(local_folder, {1: 3.0, 2: 2.5, 3: 2.0})
    checkpoints, _ = open_checkpoints(local_folder, engine)
    for step, loss in ((1, 2.9), (2, 2.4), (3, 0.1)):
        checkpoints.learn(step, {"validation/loss": loss})
    back = checkpoints.go_back(4)
    assert back is not None
    assert back.step == 2
    checkpoints.save(3, metrics={"validation/loss": 2.7})
    checkpoints.wait()
    best = checkpoints.best()
    assert best is not None
    assert (best.step, best.metrics) == (2, {"validation/loss": 2.4})


def test_nothing_but_what_is_kept_remains(folder: RunFolder, tmp_path: Path) -> None:
    save_steps(folder, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, scratch=tmp_path / "scratch")
    names = storage.list_folder(folder.checkpoints)
    assert names == ["FENCE.json", "step-00000001", "step-00000003", "step-00000004"]
    files = {name.partition("/")[2] for name in storage.file_sizes(folder.checkpoints)} - {""}
    state = committed(folder)[0].folder
    assert files == {MANIFEST, *(f"{state}/{name}" for name in ("engine.json", "weights.safetensors", "optimizer.safetensors"))}
    assert storage.file_sizes(tmp_path / "scratch") == {}


@pytest.mark.parametrize("policy", [POLICY, WAITING], ids=["copied", "waiting"])
def test_training_goes_on_while_a_save_is_on_its_way(folder: RunFolder, policy: CheckpointPlan) -> None:
    engine = engine_at(0)
    checkpoints, _ = open_checkpoints(folder, engine, policy=policy)
    for step in (1, 2):  # the second copy takes the place of the first
        train(engine, range(step - 1, step))
        checkpoints.save(step, metrics={})
    train(engine, range(2, 5))
    checkpoints.wait()
    checkpoints.release()
    for commit in committed(folder):
        other = engine_at(0)
        open_checkpoints(folder, other)[0].load(commit, other)
        train(other, range(commit.step, 5))
        assert equal(other, engine)


def test_events_go_to_the_events_file(local_folder: RunFolder) -> None:
    log = EventLog(local_folder.events, attempt=1)
    save_steps(local_folder, {1: 1.0}, report=log.write)
    log.close()
    (event,) = read_events(local_folder.events)
    assert (event["event"], event["step"]) == ("checkpoint_saved", 1)
    assert event["num_bytes"] == committed(local_folder)[0].num_bytes > 0


# --- Injuries ----------------------------------------------------------------------------------------------------------------


def change(path: str, how: Callable[[bytes], bytes]) -> None:
    storage.write_bytes(path, how(storage.read_bytes(path)))


def flip_in_the_middle(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


INJURIES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "bit flipped": flip_in_the_middle,
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
}


FILES = [MANIFEST, "weights.safetensors", "optimizer.safetensors", "engine.json"]


@pytest.mark.parametrize(("file", "injury"), chequered(FILES, [*INJURIES, "deleted"]))
def test_a_damaged_checkpoint_is_set_aside_for_the_older_intact_one(folder: RunFolder, file: str, injury: str) -> None:
    save_steps(folder, {3: 2.0, 5: 1.0})
    newest = committed(folder)[-1]
    path = f"{newest.path}/{MANIFEST}" if file == MANIFEST else f"{newest.state}/{file}"
    if injury == "deleted":
        storage.remove_folder(path, newest.path)
    else:
        change(path, INJURIES[injury])
    engine = engine_at(0)
    checkpoints, events = open_checkpoints(folder, engine, attempt=2)
    commit = checkpoints.load_newest()
    assert commit is not None
    assert commit.step == 3
    assert equal(engine, engine_at(3))
    assert steps_of(folder) == [3]
    if file == MANIFEST and injury == "deleted" and not storage.is_local(folder.storage):
        assert events == []  # in an object store that is what an unfinished save looks like
    else:
        ((event, facts),) = events
        assert (event, facts["step"]) == ("checkpoint_damaged", 5)
        assert file in facts["problems"][0]
    # The run goes on, saves the same step again, and finds it again.
    train(engine, range(3, 5))
    checkpoints.save(5, metrics={})
    checkpoints.wait()
    again = engine_at(0)
    assert open_checkpoints(folder, again, attempt=3)[0].load_newest()
    assert equal(again, engine_at(5))


@pytest.mark.parametrize("num_damaged", [1, 2, 3])
def test_any_number_of_damaged_checkpoints_is_passed_over(folder: RunFolder, num_damaged: int) -> None:
    save_steps(folder, dict.fromkeys(range(1, 5), 1.0), policy=POLICY.model_copy(update={"keep_last": 4}))
    for commit in committed(folder)[-num_damaged:]:
        change(f"{commit.state}/weights.safetensors", flip_in_the_middle)
    checkpoints, _ = open_checkpoints(folder, engine_at(0))
    commit = checkpoints.load_newest()
    assert commit is not None
    assert commit.step == 4 - num_damaged


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_scratch(folder: RunFolder) -> None:
    save_steps(folder, {1: 1.0, 2: 1.0})
    for commit in committed(folder):
        change(f"{commit.state}/weights.safetensors", flip_in_the_middle)
    for attempt in (2, 3):  # nor does the retry
        with pytest.raises(CheckpointError, match="no intact checkpoint, but 2 damaged"):
            open_checkpoints(folder, engine_at(0), attempt)[0].load_newest()


class Evil:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["weights.safetensors", "state/zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_pickle_that_was_slipped_in_is_never_loaded(folder: RunFolder, tmp_path: Path, name: str) -> None:
    class Trusting(PlainEngine):
        def load(self, folder: Path) -> None:  # what DeepSpeed does with every file that it finds
            for file in folder.rglob("*"):
                if file.is_file() and file.read_bytes()[:1] == b"\x80":
                    pickle.loads(file.read_bytes())
            super().load(folder)

    save_steps(folder, {1: 1.0, 2: 1.0})
    storage.write_bytes(f"{committed(folder)[-1].state}/{name}", pickle.dumps(Evil(tmp_path / "ran")))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    engine = Trusting(
        model, torch.optim.AdamW(model.parameters()), precision="fp32", max_grad_norm=1.0, device=torch.device("cpu")
    )
    checkpoints, events = open_checkpoints(folder, engine, attempt=2)
    commit = checkpoints.load_newest()
    assert commit is not None
    assert commit.step == 1
    assert name in events.named("checkpoint_damaged")[0]["problems"][0]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", "a\\b", "./a", "a//b", ".."])
def test_a_file_name_cannot_lead_out_of_a_checkpoint(name: str) -> None:
    with pytest.raises(ValueError, match="checkpoint"):
        SavedFile(rank=0, name=name, size=1, sha256="")


def test_a_checkpoint_of_a_newer_raytune_is_not_called_damaged(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytune.training.checkpoints.commit.FORMAT", 2)
    save_steps(folder, {1: 1.0})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 2"):
        open_checkpoints(folder, engine_at(0))[0].load_newest()


def test_a_changed_setting_is_refused_with_both_values(folder: RunFolder) -> None:
    save_steps(folder, {1: 1.0})
    checkpoints, _ = open_checkpoints(folder, engine_at(0), fingerprint={**FINGERPRINT, "learning_rate": 0.2, "rank": 8})
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.1 -> 0\.2; rank: None -> 8"):
        checkpoints.load_newest()
    assert steps_of(folder) == [1]


def rewrite(folder: RunFolder, **changes: Any) -> None:
    """Change the newest manifest as its writer would have written it."""
    commit = committed(folder)[-1]
    storage.write_bytes(f"{commit.path}/{MANIFEST}", replace(commit, **changes).to_manifest())


def test_a_minor_version_is_reported_and_a_major_one_refused(folder: RunFolder) -> None:
    save_steps(folder, {1: 1.0})
    versions = committed(folder)[-1].versions
    rewrite(folder, versions={**versions, "torch": "2.0.0"})
    checkpoints, events = open_checkpoints(folder, engine_at(0))
    assert checkpoints.load_newest()
    assert f"torch 2.0.0 -> {version('torch')}" in events.named("versions_changed")[0]["changes"]
    rewrite(folder, versions={**versions, "transformers": "3.0.0"})
    with pytest.raises(CheckpointError, match=r"other major versions \(transformers 3\.0\.0 -> "):
        checkpoints.load_newest()


def test_a_state_that_does_not_fit_the_model_is_no_damage(folder: RunFolder) -> None:
    save_steps(folder, {1: 1.0})
    with pytest.raises(CheckpointError, match="does not fit the model"):
        open_checkpoints(folder, engine_at(0, width=16))[0].load_newest()
    assert steps_of(folder) == [1]


@given(st.floats(), st.dictionaries(st.text(), st.integers()))
def test_manifests_survive(loss: float, fingerprint: dict[str, int]) -> None:
    commit = commit_at(7, loss, fingerprint=fingerprint)
    again = Commit.from_manifest(commit.path, commit.to_manifest())
    assert repr(again) == repr(commit)


@given(st.data())
def test_a_manifest_with_any_byte_changed_is_damaged(data: st.DataObject) -> None:
    manifest = commit_at(7, 1.5).to_manifest()
    body = json.loads(manifest)
    position = data.draw(st.integers(0, len(manifest) - 1))
    changed = manifest[:position] + bytes([manifest[position] ^ data.draw(st.integers(1, 255))]) + manifest[position + 1 :]
    try:
        same = json.loads(changed) == body  # white space between tokens
    except ValueError:
        same = False
    if not same:
        with pytest.raises(ValueError, match=r"its own hash|incomplete|line \d+ column \d+|codec"):
            Commit.from_manifest("x", changed)


def test_the_protocol_on_s3(s3: str, tmp_path: Path) -> None:
    folder = RunFolder(f"{s3}/{uuid.uuid4().hex}", "run")
    save_steps(folder, {1: 1.0, 2: 3.0, 3: 2.0, 4: 2.0}, scratch=tmp_path)
    assert steps_of(folder) == [1, 3, 4]
    assert storage.list_folder(folder.checkpoints) == ["FENCE.json", *(f"step-0000000{step}" for step in (1, 3, 4))]
    change(f"{committed(folder)[-1].state}/optimizer.safetensors", flip_in_the_middle)
    orphan, _ = open_checkpoints(folder, engine_at(9), attempt=2, scratch=tmp_path)
    engine = engine_at(0)
    checkpoints, events = open_checkpoints(folder, engine, attempt=3, scratch=tmp_path)
    commit = checkpoints.load_newest()
    assert commit is not None
    assert commit.step == 3
    assert equal(engine, engine_at(3))
    assert [facts["step"] for facts in events.named("checkpoint_damaged")] == [4]
    orphan.save(9, metrics={})
    with pytest.raises(CheckpointError, match="Attempt 3 has taken over"):
        orphan.wait()
    assert steps_of(folder) == [1, 3]


# --- Failures while saving ---------------------------------------------------------------------------------------------------


class Stumbling(PlainEngine):
    """An engine whose next saves fail after half of the work."""

    failures = 0
    failure: type[BaseException] = RuntimeError

    def save(self, folder: Path, write: Write = write_now) -> None:
        super().save(folder, write)
        if self.failures:
            self.failures -= 1
            (folder / "weights.safetensors").write_bytes(b"half")
            raise self.failure("the GPU fell off the bus")


def stumbling() -> Stumbling:
    model = nn.Linear(8, 1)
    return Stumbling(
        model, torch.optim.AdamW(model.parameters()), precision="fp32", max_grad_norm=1.0, device=torch.device("cpu")
    )


def test_one_failed_save_is_reported_and_the_next_takes_its_place(folder: RunFolder) -> None:
    engine = stumbling()
    checkpoints, events = open_checkpoints(folder, engine)
    checkpoints.save(1, metrics={})
    engine.failures = 1
    checkpoints.wait()
    checkpoints.save(2, metrics={})
    checkpoints.save(3, metrics={})
    assert steps_of(folder) == [1, 3]
    (failed,) = events.named("checkpoint_failed")
    assert failed["step"] == 2
    assert "fell off the bus" in failed["reason"]
    assert not [name for name in storage.list_folder(folder.checkpoints) if name.startswith("step-00000002")]


def test_two_failed_saves_end_the_run_and_leave_the_older_commit(folder: RunFolder) -> None:
    engine = stumbling()
    checkpoints, _ = open_checkpoints(folder, engine)
    checkpoints.save(1, metrics={})
    checkpoints.wait()
    engine.failures = 2
    checkpoints.save(2, metrics={})
    with pytest.raises(CheckpointError, match="fell off the bus"):
        checkpoints.save(3, metrics={})
    assert steps_of(folder) == [1]
    assert storage.list_folder(folder.checkpoints) == ["FENCE.json", "step-00000001"]


def test_a_failed_last_save_is_raised_by_wait(folder: RunFolder) -> None:
    engine = stumbling()
    checkpoints, _ = open_checkpoints(folder, engine)
    engine.failures = 1
    checkpoints.save(1, metrics={})
    with pytest.raises(CheckpointError, match="fell off the bus"):
        checkpoints.wait()
    assert steps_of(folder) == []


class PanicException(BaseException):
    """As libraries in Rust raise it, which is no Exception."""


def test_a_panic_while_saving_is_no_good_save(folder: RunFolder) -> None:
    def panics() -> float:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    checkpoints, events = open_checkpoints(folder, engine_at(0), clock=panics)
    checkpoints.save(1, metrics={})
    with pytest.raises(CheckpointError, match="PanicException: called"):
        checkpoints.wait()
    assert events.named("checkpoint_failed")
    assert steps_of(folder) == []


def test_nor_is_one_while_the_engine_gives_its_state(folder: RunFolder) -> None:
    engine = stumbling()
    engine.failures, engine.failure = 1, PanicException
    checkpoints, _ = open_checkpoints(folder, engine)
    checkpoints.save(1, metrics={})
    with pytest.raises(CheckpointError, match="PanicException: the GPU fell off the bus"):
        checkpoints.wait()
    assert steps_of(folder) == []


@pytest.mark.parametrize("policy", [POLICY, WAITING], ids=["copied", "waiting"])
def test_a_disk_that_fills_up_leaves_the_older_commit_and_nothing_torn(small_disk: Path, policy: CheckpointPlan) -> None:
    folder = RunFolder(str(small_disk), "run")
    engine = engine_at(1, width=500)  # 3 MiB of weights and moments
    checkpoints, events = open_checkpoints(folder, engine, policy=policy)
    checkpoints.save(1, metrics={})
    checkpoints.wait()
    (small_disk / "somebody-elses").write_bytes(bytes(1 << 20))
    checkpoints._own_bytes = 0  # so that room is not asked for beforehand
    checkpoints.save(2, metrics={})
    with pytest.raises(StorageFullError, match="disk filled up while step 2"):
        checkpoints.wait()
    assert events.named("checkpoint_failed")[0]["kind"] == "StorageFullError"
    assert storage.list_folder(folder.checkpoints) == ["FENCE.json", "step-00000001"]
    again = engine_at(0, width=500)
    assert open_checkpoints(folder, again, attempt=2)[0].load_newest()
    assert equal(again, engine)


def test_a_save_that_cannot_fit_is_refused_before_it_starts_and_leftovers_are_cleared_first(small_disk: Path) -> None:
    folder = RunFolder(str(small_disk), "run")
    checkpoints, _ = open_checkpoints(folder, engine_at(1, width=500))
    checkpoints.save(1, metrics={})
    checkpoints.wait()
    leftover = f"{folder.checkpoints}/step-00000009.tmp-1/rank-0/half"
    storage.write_bytes(leftover, bytes(2 << 20))
    checkpoints.save(2, metrics={})  # 3 MiB needed, 1 MiB free, 2 MiB in the leftover
    checkpoints.wait()
    assert not storage.exists(leftover)
    (small_disk / "somebody-elses").write_bytes(bytes(1 << 17))
    with pytest.raises(StorageFullError, match=r"step 3: .*small/run/checkpoints needs 2.* MiB and has .* free"):
        checkpoints.save(3, metrics={})
    assert steps_of(folder) == [1, 2]


def test_a_run_that_cannot_fit_is_refused_with_numbers(small_disk: Path) -> None:
    folder = RunFolder(str(small_disk), "run")
    assert required_bytes(1 << 20, POLICY) == 4 << 20
    refuse_small_disk(folder, 1 << 20, POLICY)
    with pytest.raises(PlanError, match=r"4 x 2 MiB = 8 MiB .*6 MiB are free"):
        refuse_small_disk(folder, 2 << 20, POLICY)
    refuse_small_disk(RunFolder("memory://x", "run"), 1 << 40, POLICY)
    refuse_small_disk(folder, 1 << 20, POLICY, 1 << 20)
    with pytest.raises(PlanError, match=r"4 x 1 MiB = 4 MiB .*importance of its weights \(strategy.ewc\) 3 MiB.*6 MiB are free"):
        refuse_small_disk(folder, 1 << 20, POLICY, 3 << 20)
    storage.write_bytes(f"{folder.importance}/rank-0.safetensors", bytes(3 << 20))
    with pytest.raises(PlanError, match="3 MiB are free"):
        refuse_small_disk(folder, 1 << 20, POLICY)
    refuse_small_disk(folder, 3 << 18, POLICY, 3 << 20)  # it is there, and goes on with it


def save_for_ever(folder: RunFolder) -> None:
    engine = engine_at(0, width=700)
    checkpoints, _ = open_checkpoints(folder, engine)
    for step in range(1, 10_000):
        train(engine, range(step - 1, step))
        checkpoints.save(step, metrics={})


def test_a_process_killed_while_saving_leaves_an_intact_commit(local_folder: RunFolder) -> None:
    context = multiprocessing.get_context("forkserver")  # a fork of this process, which has threads, has died of one
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=save_for_ever, args=(local_folder,), daemon=True)
    process.start()
    assert process.pid is not None
    try:
        deadline = time.monotonic() + 120
        while not steps_of(local_folder) or not unfinished(local_folder):
            assert process.is_alive(), "the process ended by itself"
            assert time.monotonic() < deadline
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.01)
            os.kill(process.pid, signal.SIGSTOP)  # so that what is seen is what the kill finds
    finally:
        process.kill()
        process.join()
    assert unfinished(local_folder)
    engine = engine_at(0, width=700)
    commit = open_checkpoints(local_folder, engine, attempt=next_attempt(local_folder))[0].load_newest()
    assert commit is not None
    assert equal(engine, engine_at(commit.step, width=700))
    assert not unfinished(local_folder)


def unfinished(folder: RunFolder) -> list[str]:
    return [name for name in storage.list_folder(folder.checkpoints) if ".tmp-" in name]


# --- Attempts ----------------------------------------------------------------------------------------------------------------


def test_an_orphan_of_an_older_attempt_commits_nothing(folder: RunFolder) -> None:
    orphan, events = open_checkpoints(folder, engine_at(1), attempt=1)
    assert next_attempt(folder) == 2
    open_checkpoints(folder, engine_at(0), attempt=2)
    orphan.save(1, metrics={})
    with pytest.raises(CheckpointError, match="Attempt 2 has taken over"):
        orphan.wait()
    assert steps_of(folder) == []
    assert len(events.named("checkpoint_failed")) == 1
    with pytest.raises(CheckpointError, match="Attempt 2 has taken over"):
        open_checkpoints(folder, engine_at(0), attempt=1)


def test_a_torn_fence_is_rebuilt_from_the_commits(folder: RunFolder) -> None:
    save_steps(folder, {1: 1.0}, attempt=4)
    storage.write_bytes(folder.fence, b'{"fen')
    assert next_attempt(folder) == 5


def test_leftovers_of_older_attempts_are_removed_and_other_files_are_not(folder: RunFolder) -> None:
    save_steps(folder, {1: 1.0})
    commit = committed(folder)[0]
    if storage.is_local(folder.storage):
        leftovers = ["step-00000002.tmp-1/rank-0/x", "step-00000001.deleted-1/state/x"]
        others = ["step-00000003.tmp-9/rank-0/x", "notes.txt", "my-step-00000001.tmp-1"]
    else:
        leftovers = ["step-00000002/state-1/x", f"step-00000001/state-{commit.attempt + 5}/x"]
        others = ["notes.txt"]
    for name in (*leftovers, *others):
        storage.write_bytes(f"{folder.checkpoints}/{name}", b"x")
    open_checkpoints(folder, engine_at(0), attempt=2)
    found = storage.file_sizes(folder.checkpoints)
    assert not [name for name in leftovers if name in found]
    assert [name for name in others if name in found] == others
    assert steps_of(folder) == [1]


def test_a_newer_attempt_replaces_a_step_that_an_older_one_committed(folder: RunFolder) -> None:
    save_steps(folder, {1: 1.0, 2: 5.0}, attempt=1)
    save_steps(folder, {2: 7.0}, attempt=2)
    newest = committed(folder)[-1]
    assert (newest.step, newest.attempt, newest.metrics["validation/loss"]) == (2, 2, 7.0)
    assert open_checkpoints(folder, engine_at(0), attempt=3)[0].load_newest() == newest


def test_links_in_a_checkpoint_are_not_followed_when_it_goes(local_folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_text("keep me")
    engine = engine_at(0)
    checkpoints, _ = open_checkpoints(local_folder, engine)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, metrics={"validation/loss": -step})
        checkpoints.wait()
        if step == 1:
            (Path(committed(local_folder)[0].state) / "link").symlink_to(tmp_path / "precious")
    assert steps_of(local_folder) == [3, 4]
    assert (tmp_path / "precious" / "data").read_text() == "keep me"


# --- Which ones stay ---------------------------------------------------------------------------------------------------------


def commit_at(step: int, loss: float | None = None, **changes: Any) -> Commit:
    metrics = {} if loss is None else {"validation/loss": loss}
    commit = Commit(
        path=f"/run/checkpoints/step-{step:08d}",
        step=step,
        world_size=1,
        attempt=1,
        parent=None,
        created=0.0,
        metrics=metrics,
        fingerprint={},
        versions={},
        folder="state",
        files=(SavedFile(rank=0, name="a/b", size=3, sha256="00"),),
    )
    return replace(commit, **changes)


losses = st.none() | st.sampled_from([math.nan, math.inf, -math.inf]) | st.integers(-3, 3).map(float)
commit_lists = st.dictionaries(st.integers(0, 50), losses, max_size=12).map(lambda d: [commit_at(s, v) for s, v in d.items()])


@given(commit_lists, st.integers(1, 4), st.integers(0, 3), st.sampled_from(["min", "max"]))
def test_the_newest_and_the_best_stay_and_nothing_else(commits: list[Commit], keep_last: int, keep_best: int, mode: Any) -> None:
    policy = POLICY.model_copy(update={"keep_last": keep_last, "keep_best": keep_best, "mode": mode})
    keep, delete = retain(commits, policy)
    assert sorted([*keep, *delete], key=lambda c: c.step) == sorted(commits, key=lambda c: c.step)
    assert len(keep) <= keep_last + keep_best
    steps = sorted(commit.step for commit in commits)
    kept = [commit.step for commit in keep]
    assert set(steps[-keep_last:]) <= set(kept)
    sign = 1 if mode == "min" else -1
    value = {
        c.step: sign * c.metrics["validation/loss"] for c in commits if math.isfinite(c.metrics.get("validation/loss", math.nan))
    }
    for step in set(kept) - set(steps[-keep_last:]):  # kept for being good: fewer than keep_best are better
        assert sum((other, at) < (value[step], step) for at, other in value.items()) < keep_best
    for commit in delete:
        if commit.step in value:
            assert sum((other, at) < (value[commit.step], commit.step) for at, other in value.items()) >= keep_best
    # What is kept now is kept again, whatever came between.
    assert retain(keep, policy) == (keep, [])
    # The best of all is among the kept as long as any best is kept.
    best = best_commit(commits, "validation/loss", mode)
    if commits and keep_best:
        assert best in keep


@given(commit_lists, st.sampled_from(["min", "max"]))
def test_the_best_is_finite_and_the_earliest_and_else_the_newest(commits: list[Commit], mode: Any) -> None:
    best = best_commit(commits, "validation/loss", mode)
    finite = [commit for commit in commits if math.isfinite(commit.metrics.get("validation/loss", math.nan))]
    if not commits:
        assert best is None
        return
    assert best is not None
    if not finite:
        assert best.step == max(commit.step for commit in commits)
        return
    extreme = (min if mode == "min" else max)(commit.metrics["validation/loss"] for commit in finite)
    assert best.step == min(commit.step for commit in finite if commit.metrics["validation/loss"] == extreme)


# --- Several ranks -----------------------------------------------------------------------------------------------------------


def on_ranks(work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(rank, *arguments)` on two ranks of a gloo group; its assertions count."""
    outcomes = run_on_ranks(_rank, 2, work, arguments)
    assert outcomes == [None, None]


def _rank(work: Callable[..., None], arguments: tuple) -> None:
    work(torch.distributed.get_rank(), *arguments)
    torch.distributed.barrier()  # what a rank has yet to look at stays


class StumblingOnOneRank(PlainEngine):
    def save(self, folder: Path, write: Write = write_now) -> None:
        super().save(folder, write)
        write(folder / f"of-rank-{self.rank}", bytes([self.rank]) * 1000, lambda content, path: path.write_bytes(content))
        if self.rank == 1 and (folder.parents[1] / "stumble").exists():
            raise RuntimeError("the GPU fell off the bus")


def plain_ranks(rank: int, tmp: str) -> None:
    engine = engine_at(0, kind=StumblingOnOneRank, rank=rank, world_size=2)
    folder = RunFolder(f"{tmp}/storage", "run")
    checkpoints, events = open_checkpoints(folder, engine, scratch=Path(tmp) / "scratch")
    for step in (1, 2):
        checkpoints.save(step, metrics={})
        checkpoints.wait()
    names = {(file.rank, file.name) for file in committed(folder)[-1].files}
    assert names >= {(0, "of-rank-0"), (1, "of-rank-1"), (0, "weights.safetensors")}
    assert len(names) == 5

    # A failure on one rank is a failure on both, and leaves what was committed.
    if rank == 0:
        Path(folder.checkpoints, "stumble").touch()
    torch.distributed.barrier()
    checkpoints.save(3, metrics={})
    with pytest.raises(CheckpointError, match="fell off the bus"):
        checkpoints.wait()
    torch.distributed.barrier()
    assert steps_of(folder) == [1, 2]
    assert not unfinished(folder)

    # A file of rank 1 is damaged: both fall back.
    if rank == 0:
        Path(folder.checkpoints, "stumble").unlink()
        change(f"{folder.checkpoint(2)}/state/of-rank-1", flip_in_the_middle)
    torch.distributed.barrier()
    commit = checkpoints.load_newest()
    assert commit is not None
    assert commit.step == 1
    assert len(events.named("checkpoint_damaged")) == (rank == 0)

    # Storage that is not shared between the nodes is noticed at the first save.
    apart, _ = open_checkpoints(RunFolder(f"{tmp}/node-{rank}", "run"), engine)
    apart.save(1, metrics={})
    with pytest.raises(CheckpointError, match="same shared folder on every node"):
        apart.wait()

    # A newer attempt: both ranks of the old one hear of it.
    if rank == 0:
        storage.write_json(folder.fence, {"fence": 7})
    torch.distributed.barrier()
    checkpoints.save(4, metrics={})
    with pytest.raises(CheckpointError, match="Attempt 7 has taken over"):
        checkpoints.wait()


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    on_ranks(plain_ranks, str(tmp_path))


def assert_copies_equal(engine: Any, folder: Path, train: Callable[[], None]) -> None:
    """A state is written now and, after training has gone on, out of a copy: into the same files, bit for bit."""
    now, later = folder / "now", folder / "later"
    for path in (now, later):
        (path / f"rank-{engine.rank}").mkdir(parents=True)
    snapshot = Snapshot(HostMemory(0, engine.device))
    engine.save(now / f"rank-{engine.rank}")
    engine.save(later / f"rank-{engine.rank}", snapshot)
    train()
    snapshot.write()
    names = list(storage.file_sizes(now / f"rank-{engine.rank}"))
    assert names
    assert list(storage.file_sizes(later / f"rank-{engine.rank}")) == names
    for name in names:
        one, other = (path / f"rank-{engine.rank}" / name for path in (now, later))
        assert one.read_bytes() == other.read_bytes(), name


def zero_engine(stage: int) -> Any:
    from raytune.training.engines.zero_engine import ZeroEngine

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    config = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    return ZeroEngine(model, torch.optim.AdamW(model.parameters()), config, precision="fp32", device=torch.device("cpu"))


def zero_engine_at(stage: int, step: int) -> Any:
    engine = zero_engine(stage)
    train(engine, range(step))
    return engine


def zero_ranks(rank: int, tmp: str) -> None:
    # `local://` is an fsspec URL like any other: the way of object stores, on files that both processes see.
    fsspec.config.conf["local"] = {"auto_mkdir": True}
    roots = ((3, f"{tmp}/files"), (1, f"local://{tmp}/objects"), (2, f"{tmp}/files"), (3, f"local://{tmp}/objects"))
    for number, (stage, root) in enumerate(roots):
        folder = RunFolder(root, f"stage-{stage}")
        engine = zero_engine(stage)
        checkpoints, _ = open_checkpoints(folder, engine, scratch=Path(tmp) / "scratch")
        train(engine, range(2))
        checkpoints.save(2, metrics={})
        train(engine, range(2, 4))  # while the files are on their way
        checkpoints.save(4, metrics={})
        checkpoints.wait()
        assert_copies_equal(engine, Path(f"{tmp}/copied-{number}"), lambda engine=engine: train(engine, range(4, 6)))
        expected = weights(engine)
        assert {file.rank for file in committed(folder)[-1].files} == {0, 1}

        # One shard of rank 1 is gone: both ranks go back to step 2, and end where the unbroken run ended.
        if rank == 0:
            newest = committed(folder)[-1]
            shard = next(file.name for file in newest.files if file.rank == 1)
            storage.remove_folder(f"{newest.state}/{shard}", newest.path)
        torch.distributed.barrier()
        resumed = zero_engine(stage)
        again, _ = open_checkpoints(folder, resumed, attempt=2, scratch=Path(tmp) / "scratch")
        commit = again.load_newest()
        assert commit is not None
        assert commit.step == 2
        train(resumed, range(2, 6))
        got = weights(resumed)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        # And the end of a run: the best state comes back into an engine that has trained beyond it.
        again.load(commit, resumed)
        got, expected = weights(resumed), weights(zero_engine_at(stage, 2))
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        with pytest.raises(RaytuneError, match="damaged"):
            again.load(replace(commit, files=commit.files[:-1]), resumed)


def test_sharded_states_resume_bit_for_bit_from_files_and_objects(tmp_path: Path) -> None:
    on_ranks(zero_ranks, str(tmp_path))
