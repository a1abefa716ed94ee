"""What a worker of a joined cluster starts as where `cluster.keep_warm` is set: it is forked from a process that stays on its
node between commands (`fork_server.stay`), and which the first one of them starts.

Called with the modules which that process is to have loaded, the seconds for which it stays when nobody uses it, the threads of
libraries in it, and what Python was to be called with. Standard library only, and little of that: it stands in each worker's way.
"""

import fcntl
import os
import signal
import socket
import sys
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from raytune.launch.cluster.fork_starter import LEAVE, as_libraries_see, forked
from raytune.launch.cluster.gpu_drivers import may_have_gpus

WORKER = "/default_worker.py"
RAYLET = "--raylet-name="
SOCKETS = "warm-"
LOG = "raytune-warm.log"
_SERVE = (
    "import sys; from raytune.launch.cluster.fork_server import stay; "
    "stay(int(sys.argv[1]), sys.argv[2], sys.argv[3].split(','), int(sys.argv[4]), float(sys.argv[5]))"
)


def main() -> None:
    modules, idle_s, threads, *arguments = sys.argv[1:]
    code = None
    # Libraries ask a GPU's driver while they are loaded, and a process that has asked it cannot be forked from.
    if arguments[0].endswith(WORKER) and not may_have_gpus():
        with suppress(OSError, StopIteration):
            sockets = Path(next(word for word in arguments if word.startswith(RAYLET)).removeprefix(RAYLET)).parent
            code = forked(_server(sockets, modules, idle_s, threads), arguments)
    if code is not None:
        os._exit(code)
    os.execv(sys.executable, [sys.executable, *arguments])


def _server(sockets: Path, modules: str, idle_s: str, threads: str) -> str:
    """Socket of this node's server for what libraries see of this environment; it is started if there is none.

    Args:
        sockets: folder of the raylet's own.
        modules, idle_s, threads: as this program is called.
    """
    environment = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1"} | {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    }
    seen = as_libraries_see(environment) | {"OMP_NUM_THREADS": environment["OMP_NUM_THREADS"]}
    path = sockets / f"{SOCKETS}{sha256(repr((sys.executable, modules, idle_s, sorted(seen.items()))).encode()).hexdigest()[:7]}"
    with open(sockets / "warm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _answers(path):
            for other in sockets.glob(f"{SOCKETS}*"):  # of settings or code that have changed since: half a gigabyte each
                _answers(other, LEAVE)
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen(128)  # who connects from now on waits until it has loaded everything
                _start(listener, environment, [str(path), modules, str(os.getppid()), idle_s], sockets.parent / "logs" / LOG)
    return str(path)


def _answers(path: Path, message: bytes = b"") -> bool:
    """Whether a server listens there, which is told something then."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
            connection.sendall(message)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def _start(listener: socket.socket, environment: dict[str, str], words: list[str], log: Path) -> None:
    """Start a server that is no child of the worker which this process may become: Ray ends those with it."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if not os.fork():
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            listener.set_inheritable(True)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for standard, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
                os.dup2(descriptor, standard)
            os.execve(sys.executable, [sys.executable, "-P", "-c", _SERVE, str(listener.fileno()), *words], environment)
    finally:
        os._exit(0)  # this is no worker, whatever failed


if __name__ == "__main__":
    main()
