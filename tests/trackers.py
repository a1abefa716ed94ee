"""What trackers hold of a run, by the readers of their own libraries; and a server that speaks MLflow's protocol."""

# Protobuf makes the classes of messages when their modules are imported.
# pyright: reportAttributeAccessIssue=false

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Points = dict[tuple[str, int], list[float]]
"""Every value that is kept of a metric at a step, in the order of their times."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One run of a tracker."""

    run_id: str
    points: Points
    settings: dict[str, str]
    events: list[str]
    status: str | None = None
    """Where the tracker has one."""


def in_tensorboard(folder: Path) -> list[Kept]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    kept = []
    for path in sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}):
        read = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
        read.Reload()
        points = {
            (tag, step): [scalar.value for scalar in read.Scalars(tag) if scalar.step == step]
            for tag in read.Tags()["scalars"]
            for step in {scalar.step for scalar in read.Scalars(tag)}
        }
        tags = sorted(tag for tag in read.Tags()["tensors"] if tag.startswith("events/"))
        events = [read.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags]
        plugin = HParamsPluginData.FromString(read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
        settings = {
            name: str(value.string_value or value.number_value) for name, value in plugin.session_start_info.hparams.items()
        }
        kept.append(Kept(run_id=str(path), points=points, settings=settings, events=events))
    return kept


def in_mlflow(folder: Path) -> list[Kept]:
    return at_mlflow(f"sqlite:///{folder}/mlflow.db")


def at_mlflow(uri: str) -> list[Kept]:
    """What a server or a database has."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    kept = []
    for run in client.search_runs([client.get_experiment_by_name("raytune").experiment_id]):  # pyright: ignore
        points = defaultdict(list)
        for name in run.data.metrics:
            for one in sorted(client.get_metric_history(run.info.run_id, name), key=lambda one: one.timestamp):
                points[name, one.step].append(one.value)
        files = Path(str(run.info.artifact_uri))
        events = (files / "events.txt").read_text().splitlines() if (files / "events.txt").exists() else []
        kept.append(
            Kept(
                run_id=run.info.run_id,
                points=dict(points),
                settings={**run.data.params, **{f"tag {name}": value for name, value in run.data.tags.items()}},
                events=[line.partition(": ")[2] for line in events],
                status=run.info.status,
            )
        )
    return kept


def in_wandb(folder: Path) -> list[Kept]:
    from wandb.proto.wandb_internal_pb2 import Record

    kept = []
    for file in sorted(folder.rglob("run-*.wandb")):
        if file.parent.is_symlink():
            continue
        points, events, settings, run_id, code = defaultdict(list), [], {}, "", None
        for data in _records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                run_id = record.run.run_id
                settings |= {item.key: str(json.loads(item.value_json)) for item in record.run.config.update}
                settings |= {"name": record.run.display_name, "group": record.run.run_group}
            if record.HasField("exit"):
                code = str(record.exit.exit_code)
            if record.HasField("history"):
                line = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
                if "event" in line:
                    events.append(line["event"])
                    continue
                for name, value in line.items():
                    if name != "step" and not name.startswith("_"):
                        points[name, int(line["step"])].append(float(value))
            if record.HasField("summary"):
                for item in record.summary.update:
                    name = "/".join(item.nested_key) or item.key
                    if name.startswith("result/"):
                        points[name, -1] = [json.loads(item.value_json)]
        kept.append(Kept(run_id=run_id, points=dict(points), settings=settings, events=events, status=code))
    return kept


def _records(data: bytes) -> Iterator[bytes]:
    """Of a file of W&B: blocks of 32 KiB, behind a header of 7 bytes, in which records are cut (the log format of LevelDB)."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole = data[at + 7 : at + 7 + length] if kind in (1, 2) else whole + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole


def in_trackio(folder: Path) -> list[Kept]:
    kept = []
    with closing(sqlite3.connect(folder / "trackio" / "raytune.db")) as database:
        for run_id, config in database.execute("SELECT run_id, config FROM configs").fetchall():
            points = defaultdict(list)
            rows = database.execute("SELECT step, metrics FROM metrics WHERE run_id = ? ORDER BY timestamp", (run_id,))
            for step, metrics in rows:
                for name, value in json.loads(metrics).items():
                    points[name, step].append(float(value))
            events = database.execute("SELECT title FROM alerts WHERE run_id = ? ORDER BY id", (run_id,)).fetchall()
            settings = {name: str(value) for name, value in json.loads(config).items()}
            kept.append(Kept(run_id=run_id, points=dict(points), settings=settings, events=[title for (title,) in events]))
    return kept


READERS = {"tensorboard": in_tensorboard, "mlflow": in_mlflow, "wandb": in_wandb, "trackio": in_trackio}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@dataclass
class RealMlflowServer:
    """`mlflow server` over a database and a folder of artefacts, as a process that can be killed."""

    folder: Path
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port and with what was kept before; waits until it answers."""
        database, files = f"sqlite:///{self.folder}/server.db", str(self.folder / "files")
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--backend-store-uri", database, "--artifacts-destination", files],
                stdout=log,
                stderr=log,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
                start_new_session=True,
            )
        deadline = time.monotonic() + 180  # seconds, of which it takes 10 on a machine of its own
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


@dataclass
class MlflowServer:
    """As much of a tracking server as a run needs, in memory, with ways to fall ill."""

    files: Path
    mood: str = "well"
    """Or `fails` (500), or `hangs`."""
    runs: dict[str, dict] = field(default_factory=dict)
    num_refused: int = 0
    port: int = 0
    _server: Any = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                self._answer(url.path, {name: values[0] for name, values in parse_qs(url.query).items()})

            def do_POST(self) -> None:
                self._answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}"))

            do_PATCH = do_POST

            def _answer(self, path: str, asked: dict) -> None:
                if owner.mood == "hangs":
                    owner.num_refused += 1
                    time.sleep(60)
                    return
                owner.num_refused += owner.mood == "fails"
                code, answer = (500, {"error_code": "INTERNAL_ERROR", "message": "ill"}) if owner.mood == "fails" else (200, {})
                if owner.mood == "well":
                    answer = owner.answer(path.rpartition("/mlflow/")[2], asked)
                body = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def answer(self, what: str, asked: dict) -> dict:
        """What a server says to a request of MLflow 3's client."""
        if what == "experiments/get-by-name":
            return {"experiment": {"experiment_id": "1", "name": asked["experiment_name"]}}
        if what == "runs/create":
            run_id = f"{len(self.runs):032x}"
            self.runs[run_id] = {"tags": asked.get("tags", []), "params": [], "metrics": [], "status": "RUNNING"}
            return {"run": self._shown(run_id)}
        if what == "runs/search":
            tagged = [
                run_id for run_id, run in self.runs.items() if any(f"'{tag['value']}'" in asked["filter"] for tag in run["tags"])
            ]
            return {"runs": [self._shown(run_id) for run_id in tagged]}
        run = self.runs[asked["run_id"]]
        if what == "runs/update":
            run["status"] = asked.get("status", run["status"])
            return {"run_info": self._shown(asked["run_id"])["info"]}
        if what == "runs/log-batch":
            run["tags"] += [one for one in asked.get("tags", []) if one not in run["tags"]]
            run["metrics"] += [one for one in asked.get("metrics", []) if one not in run["metrics"]]
            run["params"] += asked.get("params", [])
        if what == "runs/set-tag":
            run["tags"] += [{"key": asked["key"], "value": asked["value"]}]
        return {"run": self._shown(asked["run_id"])} if what == "runs/get" else {}

    def points(self, run_id: str) -> Points:
        points = defaultdict(list)
        for one in self.runs[run_id]["metrics"]:
            points[one["key"], int(one["step"])].append(float(one["value"]))
        return dict(points)

    def _shown(self, run_id: str) -> dict:
        run = self.runs[run_id]
        info = {"run_id": run_id, "run_uuid": run_id, "experiment_id": "1", "status": run["status"], "start_time": 0}
        info |= {"artifact_uri": str(self.files / run_id), "lifecycle_stage": "active"}
        return {"info": info, "data": {"tags": run["tags"], "params": run["params"]}}


@contextmanager
def mlflow_server(files: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(files)
    server.start()
    try:
        yield server
    finally:
        server.stop()
