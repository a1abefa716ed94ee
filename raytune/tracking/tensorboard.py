"""TensorBoard: an event file per run, which each command writes anew, so that it is whole and has nothing twice."""

# Protobuf makes the classes of messages when their modules are imported.
# pyright: reportAttributeAccessIssue=false

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytune.config.sections.tracking import TensorboardSection
from raytune.run_folder import RunFolder
from raytune.storage import is_local, local_path
from raytune.tracking.tracker import Happening, Row, Started, Status, TrackedRun

SUFFIX = ".raytune"
"""Of our own event files; others in the folder are left alone."""
SUBFOLDER = "tensorboard"


def environment(section: TensorboardSection, storage: str) -> dict[str, str]:
    """Of the process that writes them."""
    return {}


def problem(section: TensorboardSection, storage: str) -> str | None:
    """What is not right with the options, and what to do."""
    if section.folder is None and not is_local(storage):
        return f"storage is {storage}, where no event files are written. Set tracking.tensorboard.folder to a local folder."
    return None


class Tensorboard:
    """See `Tracker`. Where training went back, too, the file is written anew."""

    def __init__(self, section: TensorboardSection, folder: RunFolder, storage: str) -> None:
        self._root = local_path(section.folder).absolute() if section.folder else None
        self._own = f"{folder.path}/{SUBFOLDER}"
        self.place = str(self._root or self._own)
        self._run: TrackedRun | None = None
        self._writer: Any = None

    def start(self, run: TrackedRun, run_id: str | None) -> Started:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._run = run
        self._close()
        path = self._root / run.place if self._root else local_path(self._own)
        path.mkdir(parents=True, exist_ok=True)
        for old in path.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        self._writer = EventFileWriter(str(path), filename_suffix=SUFFIX)
        # Whoever shows the file that was here before drops what was in it.
        self._writer.add_event(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))
        shown = {"run": run.name, "group": run.group, **run.tags}
        lines = [f"| {name} | {value} |" for name, value in {**shown, **run.settings}.items() if value is not None]
        self._text("config", "\n".join(["| key | value |", "|---|---|", *lines]), 0, time.time())
        self._add(hparams_pb(dict(run.settings), trial_id=run.place), 0, time.time())
        self._writer.flush()
        return Started(run_id=str(path), keeps=False)

    def metrics(self, rows: Sequence[Row]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for row in rows:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.values.items()]
            self._add(Summary(value=values), row.step, row.time)
        self._writer.flush()

    def happened(self, happenings: Sequence[Happening], num_known: int) -> None:
        for number, one in enumerate(happenings[num_known:], num_known):
            self._text(f"events/{number:03}", one.text, one.step, one.time)
        self._writer.flush()

    def forget(self, first_step: int) -> bool:
        assert self._run is not None
        return self.start(self._run, None).keeps

    def result(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        self.metrics([Row(step=step, time=time, values=numbers)])

    def files(self, files: Sequence[Path], model: Path | None) -> None:
        """Event files hold none."""

    def end(self, status: Status | None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.api_pb2 import Status as Ended
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        if status is not None:
            code = Ended.Value("STATUS_SUCCESS" if status in ("finished", "stopped") else "STATUS_FAILURE")
            info = HParamsPluginData(session_end_info=SessionEndInfo(status=code, end_time_secs=time.time()))
            value = Summary.Value(
                tag=metadata.SESSION_END_INFO_TAG,
                metadata=metadata.create_summary_metadata(info),
                tensor=metadata.NULL_TENSOR,
            )
            self._add(Summary(value=[value]), 0, time.time())
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _text(self, tag: str, text: str, step: int, when: float) -> None:
        """A text as the plugin of that name reads it."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        metadata = create_summary_metadata(display_name=None, description="")
        value = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto([text], dtype="string"))
        self._add(Summary(value=[value]), step, when)

    def _add(self, summary: Any, step: int, when: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=when, step=step, summary=summary))
