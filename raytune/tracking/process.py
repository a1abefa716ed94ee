"""The process that tells runs to one tracker, beside the command that trains them. It hears when these have ended, says how its
tracker is, and ends at once when the command has.

    in   {"tracker": "mlflow", "tracking": {...}, "storage": ..., "name": ..., "is_sweep": false}
         end
    out  {"state": "well"} after each look, {"state": "away", "why": ...}, {"state": "back"}, {"state": "done"}
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from raytune.config.sections.tracking import TrackingSection
from raytune.errors import RaytuneError
from raytune.object_store import once
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import exists, is_local, list_folder, read_json
from raytune.tracking.follow import Following, TrackerAwayError
from raytune.tracking.tracker import Status
from raytune.tracking.trackers import LIBRARIES

LOOK_EVERY_S, REMOTE_LOOK_EVERY_S = 1.0, 20.0
TRY_AGAIN_AT_MOST_S = 30.0
"""Between two attempts to reach a tracker that is away; they begin at a second."""
END = "end"
_ENDS: dict[str, Status] = {"finished": "finished", "failed": "failed", "interrupted": "interrupted"}

Say = Callable[[dict[str, Any]], None]


class Runs:
    """The runs that a command trains: one, or the trials of a sweep."""

    def __init__(self, tracker: str, section: TrackingSection, storage: str, name: str, *, is_sweep: bool) -> None:
        self._tracker, self._section, self._folder, self._is_sweep = tracker, section, RunFolder(storage, name), is_sweep
        self._trials = SweepFolder(storage, name).trials
        self._followed: dict[str, Following] = {}
        self._ended: set[str] = set()

    def look(self) -> None:
        """Tell what is new. A trial that has finished is closed, others may be continued."""
        for name, following in self._found():
            following.look()
            if self._is_sweep and following.last_event == "run_finished":
                following.end("finished")
                self._ended.add(name)

    def end(self) -> None:
        for name, following in self._found():
            following.end(self._status(name))
            self._ended.add(name)

    def _found(self) -> list[tuple[str, Following]]:
        """Those that have not ended."""
        for name in list_folder(self._trials) if self._is_sweep else [self._folder.name]:
            if name not in self._followed:
                self._followed[name] = following = self._follow(name)
                self._ended |= {name} if following.is_complete else set()
        return [(name, following) for name, following in self._followed.items() if name not in self._ended]

    def _follow(self, name: str) -> Following:
        folder = RunFolder(self._trials, name) if self._is_sweep else self._folder
        tracker = LIBRARIES[self._tracker].make(getattr(self._section, self._tracker), folder, self._folder.storage)
        return Following(self._tracker, tracker, folder, self._section, self._folder if self._is_sweep else None)

    def _status(self, name: str) -> Status | None:
        folder = RunFolder(self._trials, name) if self._is_sweep else self._folder
        state = str(read_json(folder.run)["state"]) if exists(folder.run) else ""
        if state in _ENDS:
            return _ENDS[state]
        return "stopped" if self._is_sweep else None


def follow(runs: Runs, say: Say, ended: threading.Event, look_every_s: float) -> None:
    """Tell a tracker until it knows how the runs have ended, however often it is away."""
    num_failures = 0
    while True:
        is_over = ended.wait(min(2.0**num_failures, TRY_AGAIN_AT_MOST_S) if num_failures else look_every_s)
        try:
            with once():
                runs.end() if is_over else runs.look()
        except TrackerAwayError as error:
            num_failures += 1
            if num_failures == 1:
                say({"state": "away", "why": str(error)})
        except (RaytuneError, OSError) as error:  # the run folder; the next look will tell
            if is_over:
                say({"state": "away", "why": f"the run folder cannot be read: {error}"})
        else:
            say({"state": "back" if num_failures else "well"})
            num_failures = 0
            if is_over:
                say({"state": "done"})
                return
        if is_over:
            time.sleep(1.0)  # until the command waits no more


def main() -> None:
    said = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no message
    asked = json.loads(sys.stdin.readline())
    tracker, storage = asked["tracker"], asked["storage"]
    section = TrackingSection.model_validate(asked["tracking"])
    runs = Runs(tracker, section, storage, asked["name"], is_sweep=asked["is_sweep"])
    ended = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == END:
                ended.set()
        os._exit(0)  # the command is gone; another one tells the rest

    threading.Thread(target=listen, name="listen", daemon=True).start()
    follow(
        runs,
        lambda message: print(json.dumps(message), file=said, flush=True),
        ended,
        LOOK_EVERY_S if is_local(storage) else REMOTE_LOOK_EVERY_S,
    )
    os._exit(0)  # threads of libraries are nobody's to wait for


if __name__ == "__main__":
    main()
