"""MLflow: a server or a database, by its client. It keeps what it has been told, and takes a point that it knows only once."""

import os
import posixpath
import re
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from raytune.config.sections.tracking import MlflowSection
from raytune.credentials import redacted
from raytune.printable import in_a_line
from raytune.run_folder import RunFolder
from raytune.storage import is_local
from raytune.tracking.tracker import Happening, Row, Setting, Started, Status, TrackedRun

SCHEMES = ("http://", "https://", "sqlite:///", "postgresql", "mysql", "databricks")
FILE_NAME = "mlflow.db"
ARTIFACTS = "mlflow-artifacts"
RUN_TAG, SWEEP_TAG = "raytune.run", "raytune.sweep"
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "stopped": "KILLED"}
_MOST_METRICS, _MOST_PARAMETERS, _LONGEST_NAME, _LONGEST_VALUE = 1000, 100, 250, 6000
"""Limits of MLflow 3: of a request, and of texts."""


def environment(section: MlflowSection, storage: str) -> dict[str, str]:
    """Of the process that talks to it."""
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",  # mlflow 3.17 tells a host of its makers otherwise
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # who is away is asked again later
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    }


def problem(section: MlflowSection, storage: str) -> str | None:
    """What is not right with the options, and what to do."""
    known = os.environ.get("MLFLOW_TRACKING_URI")
    if section.uri is None and known:
        return f"MLFLOW_TRACKING_URI is set and is not read. Write tracking.mlflow.uri={in_a_line(redacted(known))}, or unset it."
    if section.uri is None and not is_local(storage):
        return f"storage is {storage}, where no database can be. Set tracking.mlflow.uri."
    if section.uri is not None and not section.uri.startswith(SCHEMES):
        return f"tracking.mlflow.uri is {section.uri}: plain folders are no store of MLflow 3 any more. Write sqlite:///FILE, or http://..."
    return None


class Mlflow:
    """See `Tracker`. Where training went back it shows both values of a step: of these, that with the later time counts."""

    def __init__(self, section: MlflowSection, folder: RunFolder, storage: str) -> None:
        self._section = section
        self._uri = section.uri or f"sqlite:///{storage}/{FILE_NAME}"
        self.place = f"{self._uri} {section.experiment}"
        self._run_id = ""

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self._uri)

    def start(self, run: TrackedRun, run_id: str | None) -> Started:
        from mlflow.entities import RunTag
        from mlflow.exceptions import MlflowException

        known, keeps = None, run_id is not None
        if run_id is not None:
            try:
                known = self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                keeps = False
        tags = {**run.tags, RUN_TAG: run.key, **({"raytune.group": run.group} if run.group else {})}
        if known is None:
            experiment = self._experiment()
            known = self._found(experiment, RUN_TAG, run.key)  # it was made, and the answer was lost
        if known is None:
            nested = {"mlflow.parentRunId": self._parent(experiment, run)} if run.sweep else {}
            known = self._client.create_run(experiment, run_name=run.name, tags={**tags, **nested})
        else:
            self._client.update_run(known.info.run_id, "RUNNING")
            self._client.log_batch(known.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        self._run_id = known.info.run_id
        self._tell_settings(run.settings, known.data.params)
        return Started(run_id=self._run_id, keeps=keeps)

    def metrics(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(_name(name), value, round(row.time * 1000), row.step) for row in rows for name, value in row.values.items()
        ]
        for first in range(0, len(points), _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=points[first : first + _MOST_METRICS])

    def happened(self, happenings: Sequence[Happening], num_known: int) -> None:
        lines = [f"{time.strftime('%F %T', time.gmtime(one.time))} UTC  step {one.step}: {one.text}\n" for one in happenings]
        self._client.set_tag(self._run_id, "raytune.last_event", happenings[-1].text[:_LONGEST_VALUE])
        self._client.log_text(self._run_id, "".join(lines), "events.txt")

    def forget(self, first_step: int) -> bool:
        self._client.set_tag(self._run_id, "raytune.trained_again_from_step", str(first_step))
        return True

    def result(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        self.metrics([Row(step=step, time=time, values=numbers)])

    def files(self, files: Sequence[Path], model: Path | None) -> None:
        for file in files:
            self._client.log_artifact(self._run_id, str(file))
        if model is not None:
            self._client.log_artifacts(self._run_id, str(model), "model")

    def end(self, status: Status | None) -> None:
        if status is not None:
            self._client.set_terminated(self._run_id, _STATUS[status])

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._section.experiment
        if (found := self._client.get_experiment_by_name(name)) is not None:
            return found.experiment_id
        # Beside a database of our own; a server knows where its files go. MLflow's default is the working directory.
        file = self._uri.removeprefix("sqlite:///")
        place = str(Path(file).absolute().parent / ARTIFACTS) if file != self._uri else None
        try:
            return self._client.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another command has just made it
                raise
            return self._client.get_experiment_by_name(name).experiment_id

    def _found(self, experiment: str, tag: str, value: str) -> Any | None:
        """The run with this tag."""
        quoted = value.replace("'", "''")
        return next(iter(self._client.search_runs([experiment], f"tags.`{tag}` = '{quoted}'", max_results=1)), None)

    def _parent(self, experiment: str, run: TrackedRun) -> str:
        """The run that stands for the sweep."""
        assert run.sweep is not None
        if found := self._found(experiment, SWEEP_TAG, run.sweep):
            return found.info.run_id
        name = posixpath.basename(run.sweep)
        made = self._client.create_run(experiment, run_name=name, tags={**run.tags, SWEEP_TAG: run.sweep})
        self._client.set_terminated(made.info.run_id)  # it computes nothing itself
        return made.info.run_id

    def _tell_settings(self, settings: Mapping[str, Setting], known: Mapping[str, str]) -> None:
        """Parameters cannot change: of a run that goes on divided otherwise, those of its beginning stay."""
        from mlflow.entities import Param

        new = [Param(_name(name), str(value)[:_LONGEST_VALUE]) for name, value in settings.items() if _name(name) not in known]
        for first in range(0, len(new), _MOST_PARAMETERS):
            self._client.log_batch(self._run_id, params=new[first : first + _MOST_PARAMETERS])


def _name(name: str) -> str:
    """As MLflow takes names: those with other letters, or that are no plain path, are refused by it."""
    return posixpath.normpath(re.sub(r"[^\w./ -]", "_", name)).strip("./")[:_LONGEST_NAME] or "_"
