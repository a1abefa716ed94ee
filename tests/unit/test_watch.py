"""What a person is shown of what goes on: rows that say what the folders say, on any screen, and keys that ask and ask first."""

import json
import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from raytune.cli import cli
from raytune.errors import UserError
from raytune.launch.attempts.lease import EXPIRES_S, Standing, StopAsked, Watched, hold, this_process
from raytune.metrics.events import EventFollower, EventLog
from raytune.run_folder import RunFolder
from raytune.storage import exists, write_bytes
from raytune.training.steps.requests import Request, SaveFile
from raytune.watch.asking import ask, refusal
from raytune.watch.blocks import chart, sampled, spark, stretched
from raytune.watch.look import Watcher
from raytune.watch.rows import Row, rows_of, run_at, run_state
from raytune.watch.screen import list_screen, run_screen
from raytune.watch.terminal import plain
from raytune.watch.view import View, Wanted, after_key, keys_in
from tests.terminal import Terminal
from tests.tiny import PATIENT
from tests.watched import COST, ELSEWHERE, GONE, PLANNED_BYTES, STEP_S, claim_as, url, write_run, write_steps, write_sweep

KINDS = ("local", "memory")


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return url(request.param, tmp_path)


def rows(storage: str) -> dict[str, Row]:
    return {row.name: row for row in rows_of(Watcher(storage).look())}


# --- Rows --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "standing", "has_steps", "expected"),
    [
        (None, Standing.HELD, False, "starting"),
        (None, Standing.FREE, False, "stale"),
        ("running", Standing.HELD, False, "starting"),
        ("running", Standing.HELD, True, "running"),
        ("running", Standing.UNCLEAR, True, "running"),
        ("running", Standing.FREE, True, "stale"),
        ("finished", Standing.FREE, True, "finished"),
        ("finished", Standing.HELD, True, "finished"),
        ("failed", Standing.FREE, True, "failed"),
        ("failed", Standing.HELD, True, "starting"),
        ("interrupted", Standing.FREE, True, "interrupted"),
        ("interrupted", Standing.HELD, True, "starting"),
    ],
)
def test_a_state_is_what_the_record_says_as_far_as_somebody_is_at_work(
    state: str | None, standing: Standing, has_steps: bool, expected: str
) -> None:
    assert run_state(state, standing, has_steps) == expected


def test_a_row_says_how_a_run_stands(storage: str) -> None:
    folder = write_run(storage, "r", holder=this_process(), cost=COST)
    row = rows(storage)["r"]
    assert (row.state, row.step, row.num_steps, row.attempt) == ("running", 5, 8, 1)
    assert (row.loss, row.validation_loss, row.tokens_per_s, row.memory_bytes) == (0.2, 0.5, 1500.0, 2.0**30)
    assert row.planned_bytes == PLANNED_BYTES
    assert row.left_s == pytest.approx(3 * STEP_S)
    assert row.at_work_s == pytest.approx(5 * STEP_S)
    assert row.usd == pytest.approx(5 * STEP_S / 3600 * 10.0)
    assert row.curve == (1.0, 0.5, 1 / 3, 0.25, 0.2)
    assert folder.name == row.path


def test_a_watcher_that_looks_again_knows_what_a_new_one_knows(storage: str) -> None:
    folder = write_run(storage, "r", holder=this_process(), steps=3)
    watcher = Watcher(storage)
    assert rows_of(watcher.look())[0].step == 3
    write_steps(folder, 4, 8)
    assert rows_of(watcher.look()) == rows_of(Watcher(storage).look())
    write_steps(folder, 5, 6, attempt=2)  # another attempt went back to step 4
    assert rows_of(watcher.look())[0].step == 6
    write_run(storage, "another")
    assert [row.name for row in rows_of(watcher.look())] == ["r", "another"], "those at work first"


def test_a_run_whose_command_is_gone_is_stale_and_one_elsewhere_when_its_heart_stands_still(tmp_path: Path) -> None:
    write_run(str(tmp_path), "dead", holder=GONE)
    folder = write_run(str(tmp_path), "elsewhere", holder=ELSEWHERE)
    found = rows(str(tmp_path))
    assert found["dead"].state == "stale"
    assert found["elsewhere"].state == "running"
    claims = Watched(folder)
    assert claims.look(lambda: 0.0)[0] is Standing.UNCLEAR
    claim_as(folder, ELSEWHERE, beat=1)
    assert claims.look(lambda: 10.0)[0] is Standing.HELD
    assert claims.look(lambda: 9.0 + EXPIRES_S)[0] is Standing.UNCLEAR
    assert claims.look(lambda: 10.0 + EXPIRES_S)[0] is Standing.FREE
    assert claims.look(lambda: 20.0 + EXPIRES_S)[0] is Standing.FREE


def test_trials_stand_behind_their_sweep_those_at_work_first(storage: str) -> None:
    write_sweep(storage, holder=this_process())
    found = rows_of(Watcher(storage).look())
    assert [(row.path, row.kind, row.state, row.step, row.num_steps) for row in found] == [
        ("search", "sweep", "running", 1, 4),
        ("search/trials/trial-001", "trial", "running", 4, 8),
        ("search/trials/trial-000", "trial", "finished", 8, 8),
        ("search/trials/trial-002", "trial", "waiting", 0, None),
    ]
    assert found[0].validation_loss == 0.25
    assert found[0].note == "1 finished, 1 running"
    assert found[3].note == "rank=16"


def test_a_folder_that_is_a_run_or_a_sweep_itself_is_shown_alone(tmp_path: Path) -> None:
    write_run(str(tmp_path), "a")
    write_run(str(tmp_path), "b")
    write_sweep(str(tmp_path))
    assert [row.name for row in rows_of(Watcher(str(tmp_path / "a")).look())] == ["a"]
    assert [row.kind for row in rows_of(Watcher(str(tmp_path / "search")).look())] == ["sweep", "trial", "trial", "trial"]


def test_what_cannot_be_read_says_why_and_hides_nothing_else(tmp_path: Path) -> None:
    broken = write_run(str(tmp_path), "broken")
    write_run(str(tmp_path), "good")
    write_bytes(broken.plan, b'{"name": "of another raytune"}')
    (tmp_path / "stores").mkdir()
    found = rows(str(tmp_path))
    assert set(found) == {"broken", "good"}
    assert found["broken"].state == "unreadable"
    assert "plan.json is not what raytune" in found["broken"].note
    assert found["good"].state == "stale"


def test_events_are_read_as_they_come_and_again_where_the_file_is_another(storage: str) -> None:
    path = f"{storage}/r/events.jsonl"
    follower = EventFollower(path)
    assert follower.look() == ([], True)
    with EventLog(path, attempt=1) as log:
        log.write("one")
    assert [event["event"] for event in follower.look()[0]] == ["one"]
    with EventLog(path, attempt=1) as log:
        log.write("two")
    found, are_all = follower.look()
    assert ([event["event"] for event in found], are_all) == (["two"], False)
    write_bytes(path, b'{"event": "three"}\n{"eve')
    assert follower.look() == ([{"event": "three"}], True)
    assert follower.events == [{"event": "three"}]
    write_bytes(path, b'{"event": "three"}\nno event\n')
    with pytest.raises(UserError, match="not JSON"):
        follower.look()


# --- Asking ------------------------------------------------------------------------------------------------------------------


def test_a_save_is_heard_once_and_a_request_that_comes_meanwhile_is_kept(storage: str) -> None:
    folder = write_run(storage, "r", holder=this_process())
    row, heard = rows(storage)["r"], SaveFile(folder)
    heard.look()
    assert not heard()
    ask(storage, row, "save")
    heard.look()
    assert heard() == {Request.SAVE}
    ask(storage, row, "save")  # while the run saves
    heard.saved()
    assert not heard()
    heard.look()
    assert heard() == {Request.SAVE}
    heard.saved()
    heard.look()
    assert not exists(folder.save_request)
    assert not heard()


def test_a_command_that_is_asked_to_stop_ends_as_by_a_ctrl_c_and_the_next_one_is_not_asked(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "r")
    with hold(folder) as holding:
        holding.renew()
        holding.check()
        ask(folder.storage, Row(path="r", kind="run", state="running"), "stop")
        holding.renew()
        with pytest.raises(StopAsked, match="stopped as asked"):
            holding.check()
        holding.renew()  # whoever ends still holds the run
    assert not exists(folder.stop_request)
    write_bytes(folder.stop_request, b"to a command that was killed")
    with hold(folder) as holding:
        holding.renew()
        holding.check()
    assert issubclass(StopAsked, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("row", "wish", "reason"),
    [
        (Row(path="r", kind="run", state="finished"), "stop", "r is finished: there is nothing to stop."),
        (Row(path="r", kind="run", state="stale"), "save", "r is stale: there is nothing to save."),
        (Row(path="r", kind="run", state="starting"), "save", "r has not trained yet: there is nothing to save."),
        (Row(path="s", kind="sweep", state="running"), "save", "Trials save, a sweep does not: choose one of s."),
        (Row(path="s/trials/t", kind="trial", state="running"), "stop", "stop s to end them all."),
    ],
)
def test_what_makes_no_sense_is_not_asked(row: Row, wish: str, reason: str) -> None:
    assert reason in (refusal(row, wish) or "")  # pyright: ignore[reportArgumentType]
    assert after_key(View(selected=row.path), wish, [row]) == (  # pyright: ignore[reportArgumentType]
        View(selected=row.path, message=refusal(row, wish) or ""),  # pyright: ignore[reportArgumentType]
        None,
    )


# --- Keys and screens --------------------------------------------------------------------------------------------------------

RUNNING = [Row(path=name, kind="run", state="running") for name in ("a", "b", "c")]


def test_a_stop_is_asked_for_with_a_second_key_only() -> None:
    view, wanted = after_key(View(), "down", RUNNING)
    assert (view.selected, wanted) == ("b", None)
    asked, wanted = after_key(view, "stop", RUNNING)
    assert wanted is None
    assert "Stop b?" in asked.message
    assert after_key(asked, "yes", RUNNING)[1] == Wanted(RUNNING[1], "stop")
    for key in ("stop", "enter", "escape", "quit", "save", "down", "other"):
        left, wanted = after_key(asked, key, RUNNING)  # pyright: ignore[reportArgumentType]
        assert wanted is None
        assert (left.is_asked, left.has_left, left.selected) == (False, False, "b")


def test_the_selection_stays_on_its_run_and_within_the_rows() -> None:
    view, _ = after_key(View(selected="b"), "end", RUNNING)
    assert view.selected == "c"
    view, _ = after_key(view, "down", RUNNING)
    assert view.selected == "c"
    view, _ = after_key(View(selected="gone"), "up", RUNNING)
    assert view.selected == "a"
    opened, _ = after_key(View(selected="b"), "enter", RUNNING)
    assert after_key(opened, "down", RUNNING)[0].offset == 1
    assert not after_key(opened, "escape", RUNNING)[0].is_open
    for key in ("down", "enter", "save", "stop", "home"):
        assert after_key(View(), key, []) == (View(), None)  # pyright: ignore[reportArgumentType]


def test_keys_are_told_apart_in_whatever_pieces_a_terminal_sends() -> None:
    assert keys_in(b"\x1b[A\x1bOBq") == ["up", "down", "quit"]
    assert keys_in(b"\x1b") == ["escape"]
    assert keys_in(b"\x1b[200~y") == ["other", "yes"]
    assert keys_in("é".encode()) == ["other", "other"]


NAMES = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="/"), min_size=1, max_size=40)
NUMBERS = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 10)


@PATIENT
@given(
    names=st.lists(NAMES, max_size=30, unique=True),
    value=NUMBERS,
    size=st.tuples(st.integers(60, 200), st.integers(10, 60)),
    at=st.integers(0, 29),
    message=st.sampled_from(["", "a message " * 30]),
)
def test_a_screen_is_filled_exactly_whatever_it_shows(
    names: list[str], value: float | None, size: tuple[int, int], at: int, message: str
) -> None:
    width, height = size
    shown = [
        Row(path=name, kind="run", state="running", loss=value, validation_loss=value, step=10**9, num_steps=10**9, note=name)
        for name in names
    ]
    view = View(selected=names[at % len(names)] if names else None, message=message)
    lines = list_screen("/some/where", shown, view, width, height)
    assert len(lines) == height
    assert {cell_len(line.plain) for line in lines} == {width}
    if names:
        assert any("reverse" in str(span.style) for line in lines[:-1] for span in line.spans), "the selected row is in sight"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("height", [10, 24, 60])
def test_an_opened_run_fills_the_screen_with_curves_events_and_what_was_asked(tmp_path: Path, width: int, height: int) -> None:
    write_run(str(tmp_path), "r", holder=this_process(), steps=8, config={"training": {"learning_rate": 0.01}})
    seen = Watcher(str(tmp_path)).look()
    run = run_at(seen, "r")
    assert run is not None
    lines = run_screen(rows_of(seen)[0], run, View(is_open=True), width, height)
    assert len(lines) == height
    assert {cell_len(line.plain) for line in lines} == {width}
    text = "\n".join(line.plain for line in lines)
    assert "step 8/8" in text
    assert "train/loss, steps 1 to 8" in text
    assert height < 24 or "checkpoint saved" in text
    assert height < 60 or "learning_rate: 0.01" in text


def test_a_narrow_screen_keeps_what_matters_most_and_a_wide_one_shows_all(tmp_path: Path) -> None:
    write_run(str(tmp_path), "r", holder=this_process(), cost=COST)
    shown = rows_of(Watcher(str(tmp_path)).look())
    assert plain(shown, 60).splitlines()[0].split() == ["run", "state", "step", "loss", "left"]
    wide = plain(shown, 160).splitlines()
    assert "GiB/plan" in wide[0]
    assert re.search(r"r +running +5/8 +0\.2000 +0\.5000 +1\.5k +1\.0/3\.0 +6\.0s +\$0\.03 +█▄▂▁▁", wide[1])


def test_curves_have_the_height_of_their_values() -> None:
    assert spark([0.0, 1.0, 2.0], 10) == "▁▅█"
    assert spark([3.0, 3.0], 10) == "▁▁"
    assert spark([1.0, math.nan, math.inf], 10) == "▁××"
    assert spark([], 10) == ""
    assert chart([0.0, 1.0], 2, 2) == [" █", " █"]
    assert spark([1.0, 10.0, 100.0], 3) == spark([0.0, 1.0, 2.0], 3), "equal factors, equal heights"
    assert sampled(range(1000), 3) == [0, 500, 999]
    assert stretched([1, 2], 4) == [1, 1, 2, 2]


# --- The verb ----------------------------------------------------------------------------------------------------------------


def test_without_a_terminal_it_prints_a_table_and_ends(tmp_path: Path) -> None:
    write_run(str(tmp_path), "r", state="failed", failure="it \x1b[2J broke")
    text = CliRunner().invoke(cli, ["top", str(tmp_path)]).output
    assert "failed" in text
    assert "\x1b" not in text
    facts = json.loads(CliRunner().invoke(cli, ["top", str(tmp_path), "--json"]).stdout)
    assert [(row["state"], row["step"], row["loss"]) for row in facts["runs"]] == [("failed", 5, 0.2)]
    nowhere = CliRunner().invoke(cli, ["top", str(tmp_path / "nowhere")])
    assert nowhere.exit_code == 2
    assert "There is no folder" in nowhere.output


def test_a_person_watches_chooses_saves_and_stops_in_a_terminal(tmp_path: Path) -> None:
    first = write_run(str(tmp_path), "first", holder=this_process())
    second = write_run(str(tmp_path), "second", holder=this_process())
    terminal = Terminal("top", str(tmp_path), columns=110, lines=20)
    try:
        assert "\x1b[?1049h" in terminal.wait_for("second"), "a screen of its own"
        terminal.press("s")
        terminal.wait_for("first saves after a logged step")
        assert exists(first.save_request)
        terminal.press("\x1b[Bx")
        terminal.wait_for("Stop second?")
        terminal.press("n")
        terminal.wait_for("Nothing was asked.")
        assert not exists(second.stop_request)
        terminal.press("x")
        terminal.wait_for("Stop second?")
        terminal.press("y")
        terminal.wait_for("second ends when it has seen this")
        assert exists(second.stop_request)
        terminal.press("\r")
        terminal.wait_for("checkpoint saved")
        write_steps(second, 6, 8)
        terminal.wait_for("8/8")
        terminal.resize(60, 10)
        terminal.press("\x1b")
        terminal.wait_for("Enter open")
        terminal.press("q")
        assert "\x1b[?1049l" in terminal.wait_for("\x1b[?1049l")
        assert terminal.end() == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
