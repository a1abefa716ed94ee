"""A store is tokenised once: by one of several builders, and after a kill only what was not done."""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from raytune.config.sections.data import DataSource
from raytune.data.files import sources
from raytune.data.rows.shards import ShardResult, ShardTask
from raytune.data.store import drafts, tokenising
from raytune.data.store.build import build_store
from raytune.data.store.drafts import BuildProgress
from raytune.data.store.store import Store, StoreInfo
from raytune.errors import DataError, StorageFullError
from raytune.launch.data.tokenising import progress_text, show_tokenising
from raytune.model.demo import demo_base_path
from raytune.units import GIB
from tests.tiny import tiny_request, tiny_rows, tiny_split

SEGMENT_BYTES = 2500

FORKED = multiprocessing.get_context("fork")
"""A process that has imported everything."""


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SEGMENT_BYTES", SEGMENT_BYTES)


@pytest.fixture
def chats(tmp_path: Path) -> str:
    return write(tmp_path / "chats.jsonl", 150)


def write(path: Path, num_rows: int, seed: int = 0) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(num_rows, seed)))
    return str(path)


class Counting:
    """A map that remembers the results."""

    def __init__(self) -> None:
        self.results: list[ShardResult] = []

    def __call__(self, function: Callable[[ShardTask], ShardResult], tasks: Sequence[ShardTask]) -> Iterator[ShardResult]:
        for task in tasks:
            self.results.append(function(task))
            yield self.results[-1]

    @property
    def made(self) -> list[int]:
        return [result.number for result in self.results if not result.was_found]


class Reports:
    """A watch that remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[BuildProgress] = []

    def __call__(self) -> "Reports":
        return self

    def __enter__(self) -> Callable[[BuildProgress], None]:
        return self.told.append

    def __exit__(self, *_: object) -> None:
        pass


def build(folder: Path, *paths: str, work: Counting | None = None, watch: Reports | None = None, **changes: object) -> StoreInfo:
    request = tiny_request(sources=tuple(DataSource(path=path) for path in paths), **changes)
    return build_store(
        request, tokenizer_path=str(demo_base_path()), folder=folder, parallel_map=work or map, watch=watch or Reports()
    )


def rows_of(info: StoreInfo) -> list[list[int]]:
    store = Store.open(info.path)
    return [store.row(index).input_ids.tolist() for index in range(store.num_rows)]


def killed_in_the_fourth(chats: str, stores: Path) -> ForkProcess:
    """A builder that has done three shards and is in the middle of a fourth."""
    is_in_the_fourth = FORKED.Event()
    process = FORKED.Process(target=build_half_of_the_fourth, args=(chats, stores, is_in_the_fourth), daemon=True)
    process.start()
    assert is_in_the_fourth.wait(60)
    return process


def build_half_of_the_fourth(chats: str, stores: Path, is_in_the_fourth: Event) -> None:
    def wait(rows: object) -> None:
        is_in_the_fourth.set()
        time.sleep(600)

    def some(function: Callable[[ShardTask], ShardResult], tasks: Sequence[ShardTask]) -> Iterator[ShardResult]:
        for task in tasks[:3]:
            yield function(task)
        tokenising._DOCUMENTS_AT_ONCE = 4
        tokenising.rows_noted = lambda draft: wait
        yield function(tasks[3])

    build_store(tiny_request(chats, max_rows=None), tokenizer_path=str(demo_base_path()), folder=stores, parallel_map=some)


def test_who_waits_for_a_builder_that_is_killed_goes_on_at_once_with_its_shards(chats: str, tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    process = killed_in_the_fourth(chats, stores)
    work, watch = Counting(), Reports()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(build, stores, chats, work=work, watch=watch)
        while not watch.told and not waiting.done():
            time.sleep(0.05)
        assert not work.results, "as long as the other is at work"
        (draft,) = stores.iterdir()
        assert len(list(draft.glob("shards/*.*"))) == 1, "the fourth"
        process.kill()
        info = waiting.result(timeout=60)
    process.join()
    assert watch.told[0].builder == f"process {process.pid} on {os.uname().nodename}"
    assert not watch.told[0].is_own
    assert len(work.results) > 6
    assert work.made == list(range(3, len(work.results))), "of three shards not a row was read again"
    own = [progress for progress in watch.told if progress.is_own]
    assert (own[-1].shards_found, own[-1].num_shards) == (3, len(work.results))
    assert list(stores.iterdir()) == [Path(info.path)]
    fresh = build(tmp_path / "fresh", chats)
    assert rows_of(info) == rows_of(fresh)
    assert info.report == fresh.report


def test_of_builders_at_once_one_tokenises_and_the_others_find_its_store(chats: str, tmp_path: Path) -> None:
    works = [Counting() for _ in range(3)]
    together = threading.Barrier(3)

    def built(work: Counting) -> StoreInfo:
        together.wait(timeout=60)
        return build(tmp_path / "stores", chats, work=work)

    with ThreadPoolExecutor(3) as pool:
        infos = list(pool.map(built, works))
    assert infos[0] == infos[1] == infos[2]
    assert sorted(bool(work.results) for work in works) == [False, False, True]
    assert list((tmp_path / "stores").iterdir()) == [Path(infos[0].path)]


class Interrupted(Exception):
    pass


def left_half_done(folder: Path, *paths: str) -> Path:
    """What a builder leaves that ended after three shards."""

    def three(function: Callable[[ShardTask], ShardResult], tasks: Sequence[ShardTask]) -> Iterable[ShardResult]:
        yield from map(function, tasks[:3])
        raise Interrupted

    with pytest.raises(Interrupted):
        build_store(
            tiny_request(sources=tuple(DataSource(path=path) for path in paths)),
            tokenizer_path=str(demo_base_path()),
            folder=folder,
            parallel_map=three,
        )
    return max(folder.glob("draft-*"), key=lambda draft: draft.stat().st_mtime_ns)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "torn documents": lambda shard: os.truncate(shard / "documents.arrow", 1000),
    "a flipped bit": lambda shard: flip_a_byte(shard / "documents.arrow"),
    "no documents": lambda shard: (shard / "documents.arrow").unlink(),
    "torn words": lambda shard: os.truncate(shard / "shard.json", 100),
    "edited words": lambda shard: flip_a_byte(shard / "shard.json"),
    "nothing": lambda shard: [file.unlink() for file in list(shard.iterdir())],
}


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_made_again_and_said(
    damage: str, chats: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draft = left_half_done(tmp_path / "stores", chats)
    shard = sorted((draft / "shards").iterdir())[0]
    DAMAGE[damage](shard)
    work = Counting()
    info = build(tmp_path / "stores", chats, work=work)
    assert len(work.made) == len(work.results) - 2
    assert "1 of 3 shards that a build before this one left were damaged and have been tokenised again" in caplog.text
    assert f"the first is {shard}" in caplog.text
    assert rows_of(info) == rows_of(build(tmp_path / "fresh", chats))


def test_a_repaired_file_costs_its_own_shards_only(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", 40, seed) for seed, name in enumerate("abc")]
    good = Path(files[1]).read_text()
    Path(files[1]).write_text(good + "{torn\n")
    work = Counting()
    with pytest.raises(DataError, match=r"b\.jsonl:41: not JSON"):
        build(tmp_path / "stores", *files, work=work)
    num_shards, of_b = len(work.results), [result.number for result in work.results if result.source == 1]
    Path(files[1]).write_text(good)
    again = Counting()
    info = build(tmp_path / "stores", *files, work=again)
    assert again.made == of_b
    assert len(again.results) == num_shards > len(of_b) > 1
    assert list((tmp_path / "stores").iterdir()) == [Path(info.path)], "what the refused build left is used and gone"
    assert rows_of(info) == rows_of(build(tmp_path / "fresh", *files))


@pytest.mark.parametrize("change", [{"packing": "none"}, {"on_bad_row": "skip"}, {"loss_weights": (2.0,)}])
def test_what_shards_do_not_hold_does_not_make_them_again(change: dict, chats: str, tmp_path: Path) -> None:
    left_half_done(tmp_path / "stores", chats)
    work = Counting()
    build(tmp_path / "stores", chats, work=work, **change)
    assert work.made == list(range(3, len(work.results)))


@pytest.mark.parametrize(
    "change", [{"targets": "last"}, {"max_length": 300}, {"side": "train", "split": tiny_split(validation_fraction=0.5)}]
)
def test_what_shards_hold_makes_others(change: dict, chats: str, tmp_path: Path) -> None:
    left_half_done(tmp_path / "stores", chats)
    work = Counting()
    build(tmp_path / "stores", chats, work=work, **change)
    assert work.made == [result.number for result in work.results]


def test_an_old_draft_that_nobody_holds_is_removed_and_others_stay(chats: str, tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    old = left_half_done(stores, write(tmp_path / "old.jsonl", 60, 1)).rename(stores / "draft-old")
    young = left_half_done(stores, write(tmp_path / "young.jsonl", 60, 2)).rename(stores / "draft-young")
    held = left_half_done(stores, write(tmp_path / "held.jsonl", 60, 3)).rename(stores / "draft-held")
    ago = os.stat(old).st_mtime - drafts.KEPT_S - 60
    for folder in (old, held):
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (ago, ago))
    with drafts.held(held, lambda progress: None):
        for path in [held, held / "lock"]:
            os.utime(path, (ago, ago))
        info = build(stores, chats)
    assert sorted(stores.iterdir()) == sorted([Path(info.path), young, held])


def test_a_full_disk_is_said_and_what_is_done_stays(small_disk: Path, tmp_path: Path) -> None:
    chats = write(tmp_path / "chats.jsonl", 400)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(6_200_000))
    work = Counting()
    with pytest.raises(StorageFullError, match=r"no room for tokenised rows in .*No space left.*data\.store .*[1-9] of \d+ sh"):
        build(small_disk / "stores", chats, work=work)
    done = len(work.results)
    filler.unlink()
    again = Counting()
    build(small_disk / "stores", chats, work=again)
    assert 0 < done == len(again.results) - len(again.made)


# --- What is seen ------------------------------------------------------------------------------------------------------------


def at(done: int, **changes: object) -> BuildProgress:
    known: dict = {"builder": "process 7 on here", "is_own": True, "stage": "tokenising", "found": 0, "total": 4_000_000}
    return BuildProgress(**(known | {"shards_found": 0, "num_shards": 256, "beat": 1} | changes), done=done)


def test_progress_has_rows_per_second_and_the_time_that_is_left() -> None:
    assert progress_text(at(1_200_000), 31_200) == "tokenising: 1.2M of about 4M rows, 31.2k rows/s, 1m30s left"
    assert progress_text(at(1_200_000, total=None), 31_200) == "tokenising: 1.2M rows, 31.2k rows/s"
    assert progress_text(at(0), None) == "tokenising: 0 of about 4M rows"
    assert progress_text(at(4_000_000, stage="packing"), 31_200) == "packing 4M tokenised rows"
    assert progress_text(at(2 * GIB, stage="reading", total=10 * GIB), GIB) == (
        "reading rows through: 2 GiB of 10 GiB, 8.0s left"
    )
    assert progress_text(at(9, is_own=False), None) == (
        "waiting for process 7 on here, which builds the same store; tokenising: 9 of about 4M rows"
    )


def test_a_log_is_told_now_and_then_and_not_of_what_takes_a_moment(tmp_path: Path) -> None:
    now_s = 0.0
    with open(tmp_path / "log", "w+") as log:
        with show_tokenising(log, lambda: now_s) as report:
            for now_s in range(0, 40, 2):
                report(at(1_000_000 + 1000 * now_s, found=1_000_000, shards_found=64))
        log.seek(0)
        assert log.read().splitlines() == [
            "64 of 256 shards of these rows were tokenised before: going on from there.",
            "tokenising: 1M of about 4M rows, 1k rows/s, 49m56s left",
            "tokenising: 1.01M of about 4M rows, 1k rows/s, 49m46s left",
            "tokenising: 1.02M of about 4M rows, 1k rows/s, 49m36s left",
            "tokenising: 1.03M of about 4M rows, 1k rows/s, 49m26s left",
            "tokenised 1.04M rows in 38s",
        ]
        with show_tokenising(log, lambda: now_s) as report:
            report(at(3_000))
        assert not log.read()
