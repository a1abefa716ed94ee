"""What is refused before Ray starts, or before Ray is asked: addresses where nobody answers, folders for its files, packages."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from raytune.clusters import dashboard
from raytune.clusters.dashboard import refuse_what_is_no_dashboard
from raytune.config.load import load_with_places
from raytune.config.problems import ConfigError
from raytune.errors import ClusterError, RaytuneError, UserError
from raytune.launch.attempts.lease import hold
from raytune.launch.cluster import reach
from raytune.launch.cluster.cluster import refuse_long_folder
from raytune.run_folder import RunFolder
from raytune.sweeps.space import check_space

ROOT = Path(__file__).parents[2]


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def web() -> Iterator[int]:
    """Port of a web server that is no Ray."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.fixture
def mute() -> Iterator[int]:
    """Port of a server that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("127.0.0.1:1", ClusterError, "nothing listens on that port"),
        ("ray://127.0.0.1:1", ClusterError, "nothing listens on that port"),
        ("no-such-host.invalid:6379", ClusterError, "'no-such-host.invalid' has no address"),
        ("head", UserError, "neither auto, host:port"),
        ("head:port", UserError, "neither auto, host:port"),
        ("http://127.0.0.1:8265", UserError, "a dashboard's. `raytune submit --target http://127.0.0.1:8265"),
    ],
)
def test_an_address_where_no_cluster_can_be_is_refused_at_once(address: str, kind: type[RaytuneError], message: str) -> None:
    with pytest.raises(kind, match=message):
        reach.ready_for(address)


def test_what_listens_and_is_no_ray_is_refused(web: int, mute: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(dashboard, "ANSWER_TIMEOUT_S", 1.0)
    with pytest.raises(ClusterError, match="it is no head of a Ray cluster"):
        reach.ready_for(f"127.0.0.1:{web}")
    with pytest.raises(ClusterError, match=r"no head of a Ray cluster \(no answer within"):
        reach.ready_for(f"127.0.0.1:{mute}")
    with pytest.raises(UserError, match=r"no Ray dashboard.*404.*Nothing was sent"):
        refuse_what_is_no_dashboard(f"http://127.0.0.1:{web}")
    with pytest.raises(ClusterError, match="No dashboard answers"):
        refuse_what_is_no_dashboard(f"http://127.0.0.1:{mute}")


def test_a_folder_whose_sockets_would_have_too_long_paths_is_refused(tmp_path: Path) -> None:
    refuse_long_folder("/tmp")
    with pytest.raises(UserError, match=r"Set RAY_TMPDIR to a folder with at most \d+ characters"):
        refuse_long_folder(f"{tmp_path}/{'x' * 60}")
    with pytest.raises(UserError, match="cannot keep its files"):
        refuse_long_folder("/dev/null/ray")


def test_a_search_without_its_package_is_a_problem_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"name: s\nsweep:\n  run: {ROOT}/configs/recipes/quickstart.yaml\n  search: optuna\n  space: {{adapter.rank: [4, 8]}}\n"
    )
    config, places = load_with_places([str(file)], [])
    check_space(config, places)
    monkeypatch.setattr("raytune.sweeps.space.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sweep\.yaml:4:.*needs the package optuna.*-m pip install .*\[optuna\]"):
        check_space(config, places)


@pytest.mark.parametrize(("missing", "verb"), [("click", "check"), ("pydantic", "check"), ("ray", "train")])
def test_a_missing_package_is_named_with_the_interpreter_that_lacks_it(missing: str, verb: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['launch.py', {verb!r}, 'configs/recipes/quickstart.yaml', "
        f"'storage={tmp_path}']\nfrom raytune.entry import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"The package {missing} is missing: the Python of this process is {sys.executable}" in done.stderr
    assert f"{sys.executable} -m pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_storage_that_nobody_can_make_is_refused_before_a_run_is_held() -> None:
    with pytest.raises(UserError, match=r"Cannot make the folder /proc/raytune/x/lease"), hold(RunFolder("/proc/raytune", "x")):
        pass


@pytest.fixture
def guarded_head(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address of a real GCS that wants a token, and the file with it."""
    token = tmp_path / "auth_token"
    token.write_text("a" * 64)
    program = Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [f"--log_dir={tmp_path}", "--config_list=e30=", f"--gcs_server_port={port}", "--node-ip-address=127.0.0.1"]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    head = subprocess.Popen([str(program), *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield f"127.0.0.1:{port}", token
    finally:
        head.kill()
        head.wait()


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "wants a token and none is here. Copy ~/.ray/auth_token of its head"),
        ({"RAY_AUTH_TOKEN": "b" * 64}, "refuses the token of RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN_PATH": "{token}", "RAY_AUTH_MODE": "disabled"}, "Set RAY_AUTH_MODE=token; the token of {token} fits"),
        ({"RAY_AUTH_TOKEN_PATH": "{token}"}, "let in, RAY_AUTH_MODE=token"),
    ],
)
def test_a_head_that_wants_a_token_gets_it_or_a_message_says_where_it_lies(
    guarded_head: tuple[str, Path], settings: dict[str, str], answer: str
) -> None:
    address, token = guarded_head
    code = (
        f"import os\nfrom raytune.errors import UserError\nfrom raytune.launch.cluster.reach import ready_for\n"
        f"try: ready_for({address!r}); print('let in, RAY_AUTH_MODE=' + os.environ['RAY_AUTH_MODE'])\n"
        f"except UserError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {name: value.format(token=token) for name, value in settings.items()}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.format(token=token) in done.stdout, done.stderr
