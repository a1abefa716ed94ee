"""The command's side of tracking: a process for each tracker, for as long as the command trains.

Nothing here waits for a tracker, but for a few seconds at the end, and nothing that happens to one is an error of the run.
"""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raytune.config.sections.tracking import TrackingSection
from raytune.errors import RaytuneError
from raytune.metrics.events import EventLog, read_events
from raytune.object_store import once
from raytune.printable import in_a_line
from raytune.run_folder import RunFolder
from raytune.storage import exists, file_sizes
from raytune.tracking.process import END
from raytune.tracking.trackers import LIBRARIES

WAIT_AT_END_S, WAIT_FOR_ABSENT_S = 15.0, 3.0
"""For a tracker that takes what it is told, and for one that is away or has not been heard of for SILENT_S; from the end of the
runs on."""
SILENT_S = 15.0
MODEL_BYTES_PER_S = 20e6
"""That `log_model` is given time for."""

_log = logging.getLogger(__name__)


@contextmanager
def tracking(section: TrackingSection, folder: RunFolder, *, is_sweep: bool = False) -> Iterator[None]:
    """Tell the trackers of a config what a run, or a sweep, does while the block lasts, and how it ended.

    Args:
        folder: of the run, or of the sweep.
    """
    if not section.chosen:
        yield
        return
    with _log_of(folder, is_sweep) as events:
        telling = [Telling(name, section, folder, events, is_sweep=is_sweep) for name in section.chosen]
        try:
            yield
        finally:
            for one in telling:
                one.finish()
            for one in telling:
                one.wait()


def tell_now(section: TrackingSection, folder: RunFolder, *, is_sweep: bool) -> dict[str, str | None]:
    """Tell the trackers of a config everything about runs that no command is at work on.

    Returns:
        For each tracker, why it does not know everything; None if it does.
    """
    with _log_of(folder, is_sweep) as events:
        telling = {name: Telling(name, section, folder, events, is_sweep=is_sweep) for name in section.chosen}
        try:
            for one in telling.values():
                one.finish()
            return {name: one.wait_patiently() for name, one in telling.items()}
        finally:
            for one in telling.values():
                one.kill()


@contextmanager
def _log_of(folder: RunFolder, is_sweep: bool) -> Iterator[EventLog | None]:
    """Where it is noted how trackers are. A sweep has no such file."""
    if is_sweep:
        yield None
    else:
        with EventLog(folder.events, attempt=0) as events:
            yield events


class Telling:
    """One tracker, and the process that tells it."""

    def __init__(
        self, name: str, section: TrackingSection, folder: RunFolder, events: EventLog | None, *, is_sweep: bool
    ) -> None:
        self._library, self._section, self._folder, self._events = LIBRARIES[name], section, folder, events
        self._why_away: str | None = None
        self._heard = self._finished_at = time.monotonic()
        self._is_done = False
        self._has_news = threading.Condition()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (for as long as the process)
        options = section.chosen[name]
        package = str(Path(__file__).parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "raytune.tracking.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={
                **os.environ,
                **self._library.environment(options, folder.storage),
                "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
            },
            start_new_session=True,  # an interrupt is the command's to hear; and what it starts itself ends with it
        )
        asked = {"tracker": name, "tracking": section.model_dump(mode="json"), "is_sweep": is_sweep}
        self._say(json.dumps({**asked, "storage": folder.storage, "name": folder.name}))
        threading.Thread(target=self._listen, name=f"tracker {name}", daemon=True).start()

    def finish(self) -> None:
        """Ask for the rest, now that the runs have ended."""
        self._finished_at = time.monotonic()
        self._say(END)

    def wait(self) -> None:
        """Until the rest is told, or for as long as the tracker may be waited for; and say what is left."""
        if self._finished_at - self._heard < SILENT_S:
            self._wait_until(lambda: self._why_away is not None, self._finished_at + WAIT_AT_END_S + self._model_s())
        self._wait_until(lambda: False, self._finished_at + WAIT_FOR_ABSENT_S)
        self.kill()
        if not self._is_done:
            _log.warning(
                "%s does not know everything of %s%s. Later, this tells it the rest: raytune track %s",
                self._library.words,
                self._folder.name,
                f" ({self._why_away})" if self._why_away else "",
                self._folder.path,
            )

    def wait_patiently(self) -> str | None:
        """Until all is told, or the tracker is away; why it is."""
        self._wait_until(lambda: self._why_away is not None, math.inf)
        self.kill()
        return None if self._is_done else self._why_away or "it does not say why"

    def kill(self) -> None:
        """End the process, and what it has started."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _wait_until(self, holds: Callable[[], bool], deadline: float) -> None:
        with self._has_news:
            left_s = max(0.0, deadline - time.monotonic()) if math.isfinite(deadline) else None
            self._has_news.wait_for(lambda: self._is_over or holds(), left_s)

    @property
    def _is_over(self) -> bool:
        return self._is_done or self._process.poll() is not None

    def _model_s(self) -> float:
        """Seconds that sending the model may take."""
        with suppress(RaytuneError, OSError), once():
            if self._section.log_model and exists(self._folder.result):
                return sum(file_sizes(self._folder.model).values()) / MODEL_BYTES_PER_S
        return 0.0

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended, which is heard of elsewhere
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            self._heard = time.monotonic()
            if message["state"] == "away":
                self._is_away(message["why"])
            elif message["state"] == "back":
                self._is_back()
            with self._has_news:
                self._is_done = self._is_done or message["state"] == "done"
                self._has_news.notify_all()
        code = self._process.wait()
        if not self._is_done and code != -signal.SIGKILL:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            self._is_away(f"its process ended with code {code}: {in_a_line(last)}")
        with self._has_news:
            self._has_news.notify_all()

    def _is_away(self, why: str) -> None:
        self._why_away = why
        _log.warning("%s does not take what it is told, which is kept for it; training goes on. %s", self._library.words, why)
        self._note("tracker_away", why=why)

    def _is_back(self) -> None:
        self._why_away = None
        _log.warning("%s answers again, and knows by now what it had missed.", self._library.words)
        self._note("tracker_back")

    def _note(self, event: str, **facts: object) -> None:
        if self._events is None:
            return
        with suppress(RaytuneError, OSError, ValueError), once():
            attempt = max((known["attempt"] for known in read_events(self._folder.events)), default=0)
            self._events.write(event, tracker=self._library.words, **facts, **{"attempt": attempt})
