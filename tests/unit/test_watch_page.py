"""The page of a storage folder: it shows what goes on, and obeys nobody who does not know its token."""

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from raytune.cli import cli
from raytune.launch.attempts.lease import this_process
from raytune.run_folder import RunFolder
from raytune.storage import exists, read_bytes, write_bytes
from raytune.watch.look import Watcher
from raytune.watch.server import page, serve
from tests.browser import CHROMIUM, Browser, running_browser
from tests.watched import write_run, write_steps, write_sweep

NASTY = "</script><img src=x onerror=\"document.title='owned'\">\x1b[31m\u202e"
REPORT = b"<!doctype html><title>a report</title><p>how it went</p><script>document.title = 'ran ' + (self.origin)</script>"


class Served:
    """A storage folder that is served from this process."""

    def __init__(self, storage: Path) -> None:
        self.storage = str(storage)
        told: list[str] = []
        ready = threading.Event()

        def tell(url: str) -> None:
            told.append(url)
            ready.set()

        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(serve(Watcher(self.storage), 0, tell))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert ready.wait(30)
        self.url = told[0]
        parts = urllib.parse.urlsplit(self.url)
        self.host, self.port = str(parts.netloc), int(parts.port or 0)
        self.token = urllib.parse.parse_qs(parts.query)["token"][0]

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            self._loop.close()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def ask(
        self, path: str, body: object = None, *, method: str | None = None, token: str | None = "own", **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of an answer; the path goes out as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        if token is not None:
            headers["Authorization"] = f"Bearer {self.token if token == 'own' else token}"
        content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, content, headers)
        response = connection.getresponse()
        found = response.status, response.headers, response.read()
        connection.close()
        return found

    def facts(self, path: str, body: object = None) -> Any:
        status, _, content = self.ask(path, body)
        assert status == 200, content
        return json.loads(content)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    storage = tmp_path_factory.mktemp("runs")
    outside = tmp_path_factory.mktemp("outside")
    (outside / "report.html").write_text("not yours")
    write_run(str(storage), "busy", holder=this_process())
    done = write_run(str(storage), "done", state="finished", steps=8)
    write_bytes(f"{done.path}/report.html", REPORT)
    write_run(str(storage), "nasty", state="failed", failure=NASTY)
    linked = write_run(str(storage), "linked", state="finished")
    os.symlink(outside / "report.html", f"{linked.path}/report.html")
    write_sweep(str(storage), holder=this_process())
    site = Served(storage)
    yield site
    site.end()


# --- Who may -----------------------------------------------------------------------------------------------------------------

STRANGERS: dict[str, dict[str, Any]] = {
    "no token": {"token": None},
    "another token": {"token": "x" * 43},
    "no text": {"token": "\xff"},
    "a name that was bound to this machine": {"Host": "evil.example:80"},
    "our name on another port": {"Host": "127.0.0.1:1"},
    "the page of another site": {"Origin": "https://evil.example"},
    "a page without an origin": {"Origin": "null"},
    "another server of this machine": {"Origin": "http://127.0.0.1:1"},
}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("path", ["/", "/api/rows", "/api/run?path=busy", "/api/ask"])
def test_strangers_learn_nothing_and_change_nothing(served: Served, stranger: str, path: str) -> None:
    body = {"path": "busy", "wish": "stop"} if path == "/api/ask" else None
    status, headers, content = served.ask(path, body, **STRANGERS[stranger])
    assert status == 403
    assert set(json.loads(content)) == {"message"}
    assert served.storage.encode() not in content
    assert "Access-Control-Allow-Origin" not in headers
    assert not exists(RunFolder(served.storage, "busy").stop_request)


def test_a_token_in_an_address_opens_the_page_and_nothing_else(served: Served) -> None:
    query = f"?token={served.token}"
    assert served.ask(f"/{query}", token=None)[0] == 200
    assert served.ask(f"/api/rows{query}", token=None)[0] == 403
    assert served.ask(f"/api/ask{query}", {"path": "busy", "wish": "save"}, token=None)[0] == 403
    assert not exists(RunFolder(served.storage, "busy").save_request)


@pytest.mark.parametrize("path", ["/", "/api/rows", "/api/run?path=done", "/nothing", "/api/run?path=gone"])
def test_every_answer_keeps_browsers_from_using_it_elsewhere(served: Served, path: str) -> None:
    _, headers, _ = served.ask(path, token="own" if path != "/" else None)
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_it_listens_on_this_machine_alone_and_each_start_has_a_token_of_its_own(served: Served, tmp_path: Path) -> None:
    assert served.host.startswith("127.0.0.1:")
    assert len(served.token) >= 43
    other = Served(tmp_path)
    assert other.token != served.token
    assert served.ask("/api/rows", token=other.token)[0] == 403
    other.end()


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "/etc/passwd",
        "busy/../done",
        "busy%2f..%2fdone",
        "busy/plan.json",
        ".",
        "",
        "done/report.html",
        "search/trials/../../done",
        "\x00",
    ],
)
def test_no_path_leads_to_what_is_no_row(served: Served, path: str) -> None:
    quoted = urllib.parse.quote(path, safe="%/.")
    assert served.ask(f"/api/run?path={quoted}")[0] == 404
    assert served.ask("/api/ask", {"path": path, "wish": "save"})[0] == 404
    key = served.facts("/api/run?path=done")["report"].split("/")[2]
    assert served.ask(f"/report/{key}/done/../{quoted}/report.html", token=None)[0] in (403, 404)
    assert served.ask(f"/report/{key}/{quoted}/report.html", token=None)[0] in (403, 404)


def test_a_link_to_a_report_opens_that_report_without_an_origin_and_without_the_token(served: Served) -> None:
    link = served.facts("/api/run?path=done")["report"]
    status, headers, content = served.ask(link, token=None)
    assert (status, content) == (200, REPORT)
    assert headers["Content-Security-Policy"].startswith("sandbox allow-scripts; default-src 'none'")
    assert served.token not in link
    assert served.ask(link.replace("/done/", "/busy/"), token=None)[0] == 403
    assert served.ask(link, token=None, Host="evil.example")[0] == 403


def test_a_link_that_leads_out_of_the_storage_is_not_followed(served: Served) -> None:
    assert read_bytes(f"{served.storage}/linked/report.html") == b"not yours"
    assert served.facts("/api/run?path=linked")["report"] is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"no json", 400),
        (b"\xff\xfe", 400),
        (["busy", "save"], 400),
        ({"path": "busy"}, 400),
        ({"path": ["busy"], "wish": "save"}, 400),
        ({"path": "busy", "wish": "delete"}, 400),
        ({"path": "busy", "wish": "save", "more": "x" * 5000}, 413),
        ({"path": "done", "wish": "stop"}, 409),
        ({"path": "search/trials/trial-001", "wish": "stop"}, 409),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(served: Served, body: object, expected: int) -> None:
    status, _, content = served.ask("/api/ask", body)
    assert status == expected
    assert json.loads(content)["message"]


def test_only_a_post_asks(served: Served) -> None:
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        assert served.ask("/api/ask", method=method)[0] == 405


def test_the_page_is_allowed_its_own_script_and_style_and_nothing_else() -> None:
    html, policy = page()
    assert not re.search(r"\son\w+=|\sstyle=|src=|https?://(?!www\.w3\.org)", html)
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; connect-src 'self';")


# --- What it shows -----------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_terminal(served: Served) -> None:
    found = served.facts("/api/rows")
    assert found["storage"] == served.storage
    assert [(row["path"], row["state"]) for row in found["rows"]][:2] == [("busy", "running"), ("search", "running")]
    run = served.facts("/api/run?path=busy")
    assert run["curves"]["train/loss"] == [[step, 1.0 / step] for step in range(1, 6)]
    assert run["refusals"] == {"save": None, "stop": None}
    assert run["saves"] == [2, 4]
    sweep = served.facts("/api/run?path=search")
    assert "curves" not in sweep


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with running_browser() as found:
        yield found


def test_a_person_watches_saves_and_stops_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    folder = write_run(str(tmp_path), "busy", holder=this_process())
    done = write_run(str(tmp_path), "done", state="finished", steps=8)
    write_bytes(f"{done.path}/report.html", REPORT)
    write_run(str(tmp_path), "nasty", state="failed", failure=NASTY)
    site = Served(tmp_path)
    try:
        browser.open(site.url)
        browser.wait_for("document.querySelectorAll('#runs tbody tr').length === 3")
        assert browser.value("document.querySelector('#runs tr.failed .note').textContent") == (
            "</script><img src=x onerror=\"document.title='owned'\">\\u202e"
        )
        assert browser.value("document.querySelectorAll('#runs img').length") == 0
        browser.press("tr[data-path=busy] button")
        browser.wait_for("document.querySelector('#curves figure')")
        write_steps(folder, 6, 7)
        browser.wait_for("document.querySelector('.facts').innerText.includes('7/8')")
        browser.press("#save")
        browser.wait_for("document.querySelector('#message').textContent.includes('busy saves after a logged step')")
        assert exists(folder.save_request)
        browser.press("#stop")
        assert browser.value("document.querySelector('dialog').innerText").startswith("Stop busy?")
        browser.press("dialog button[value=no]")
        browser.wait_for("!document.querySelector('dialog').open")
        browser.press("#stop")
        assert not exists(folder.stop_request)
        browser.press("#yes")
        browser.wait_for("document.querySelector('#message').textContent.includes('busy ends when it has seen this')")
        assert exists(folder.stop_request)
        browser.press("tr[data-path=done] button")
        browser.wait_for("!document.querySelector('#report').hidden")
        assert browser.value("document.querySelector('#stop').disabled && document.querySelector('#save').disabled")
        link = browser.value("document.querySelector('#report').href")
        assert browser.value("document.title").startswith("raytune")
        assert browser.problems == []
        browser.open(link)
        browser.wait_for("document.title === 'ran null'")
    finally:
        site.end()
    browser.problems.clear()


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (820, True), (380, False), (380, True)])
def test_the_page_fits_its_window_in_light_and_dark(browser: Browser, served: Served, width: int, dark: bool) -> None:
    browser.open(f"{served.url}&w={width}{dark}#busy", width=width, dark=dark)
    browser.wait_for("document.querySelector('#curves path')")
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    paper, ink = browser.value("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (paper, ink)]
    assert (lightness[0] < lightness[1]) == dark
    assert browser.problems == []


def test_a_page_whose_command_has_ended_says_so(browser: Browser, tmp_path: Path) -> None:
    site = Served(tmp_path)
    browser.open(site.url)
    browser.wait_for("!document.querySelector('#empty').hidden")
    site.end()
    browser.wait_for("document.querySelector('#message').textContent.includes('does not answer')")
    browser.problems.clear()


def test_the_command_prints_the_address_and_ends_at_a_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "raytune.cli", "ui", str(tmp_path), "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # shells have what they run in the background ignore it
    )
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        port = int(urllib.parse.urlsplit(url).port or 0)
        taken = CliRunner().invoke(cli, ["ui", str(tmp_path), "--json", "--port", str(port)])
        assert taken.exit_code == 2
        assert "Leave --port out" in taken.stdout
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.communicate()
