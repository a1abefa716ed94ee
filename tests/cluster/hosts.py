"""Machines made of namespaces of this one, with addresses, processes, homes, /dev/shm and sshd of their own. Needs root."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

TOOLS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "unshare": "util-linux"}
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NETWORK = "10.78.0"


def missing() -> str | None:
    """Why no such machines can be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [f"{tool} ({package})" for tool, package in TOOLS.items() if not shutil.which(tool, path=SEARCHED)]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    if (
        subprocess.run(["ip", "route", "get", f"{NETWORK}.1"], capture_output=True, text=True, check=False).stdout.find(" dev rt")
        > 0
    ):
        return f"{NETWORK}.0/24 is in use, by another run of these tests"
    allowed = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], capture_output=True, check=False
    )
    return None if allowed.returncode == 0 else f"namespaces are not allowed here: {allowed.stderr.decode().strip()}"


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    init_pid: int
    """Its first process, as this machine counts; everything on the host ends with it."""

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the host."""
        inside = ["nsenter", "-t", str(self.init_pid), "-n", "-p", "-m", "-u", "--"]
        return subprocess.run([*inside, *command], capture_output=True, text=True, check=False)


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[tuple[list[Host], Path]]:
    """Hosts in one network that is reached from here too, and the ssh key that opens them.

    Args:
        folder: for their homes, keys and Ray's session folders; a short path, because sockets lie below it.
    """
    key = folder / "key"
    _call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)])
    _call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key")])
    settings = {"HostKey": folder / "host_key", "AuthorizedKeysFile": folder / "key.pub", "PermitRootLogin": "yes"}
    settings |= {"UsePAM": "no", "StrictModes": "no", "PasswordAuthentication": "no", "PidFile": "none", "MaxStartups": "50"}
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    bridge = f"rt{os.getpid()}"
    with ExitStack() as cleaning:
        _call(["ip", "link", "add", bridge, "type", "bridge"])
        cleaning.callback(_call, ["ip", "link", "del", bridge])
        _call(["ip", "addr", "add", f"{NETWORK}.1/24", "dev", bridge])
        _call(["ip", "link", "set", bridge, "up"])
        made = [
            cleaning.enter_context(_host(f"rt{number}-{os.getpid()}", f"{NETWORK}.{10 + number}", bridge, folder))
            for number in range(count)
        ]
        for host in made:
            _wait_for_ssh(host, key)
        yield made, key


@contextmanager
def _host(name: str, address: str, bridge: str, folder: Path) -> Iterator[Host]:
    home, ray = folder / name / "home", folder / name / "ray"
    home.mkdir(parents=True)
    ray.mkdir()
    real_home = Path.home()
    # The interpreter and its environment may live in the home that the host gets another one of.
    of_python = {Path(prefix) for prefix in (sys.base_prefix, sys.prefix) if Path(prefix).is_relative_to(real_home)}
    within = {prefix: home / prefix.relative_to(real_home) for prefix in of_python}
    for place in within.values():
        place.mkdir(parents=True)
    link = f"v{name}"[:15]
    _call(["ip", "netns", "add", name])
    try:
        _call(["ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name])
        _call(["ip", "link", "set", link, "master", bridge, "up"])
        for words in (
            f"addr add {address}/24 dev eth0",
            "link set eth0 up",
            "link set lo up",
            f"route add default via {NETWORK}.1",
        ):
            _call(["ip", "-n", name, *words.split()])
        script = [
            f"hostname {name.partition('-')[0]}",
            f"mkdir -p /tmp/ray && mount --bind {ray} /tmp/ray",
            *(f"mount --bind {prefix} {place}" for prefix, place in within.items()),
            f"mount --rbind {home} {real_home}",
            "mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && mkdir -p /run/sshd",
            f"{shutil.which('sshd', path=SEARCHED)} -f {folder}/sshd_config",
            # The first process of a process namespace must collect the dead, which `sleep` would not.
            "trap : CHLD; while :; do sleep 1; done",
        ]
        spaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--mount-proc"]
        log = (folder / f"{name}.log").open("w")
        outer = subprocess.Popen(
            ["ip", "netns", "exec", name, *spaces, "bash", "-c", "set -e\n" + "\n".join(script)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield Host(name, address, _child_of(outer.pid))
        finally:
            os.kill(_child_of(outer.pid), signal.SIGKILL)
            outer.wait(timeout=30)
            log.close()
    finally:
        _call(["ip", "netns", "del", name])


def _child_of(pid: int) -> int:
    """The process below `unshare`, when it is there."""
    for _ in range(100):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.1)
    raise TimeoutError(f"process {pid} has started nothing")


def _wait_for_ssh(host: Host, key: Path) -> None:
    options = ["-i", str(key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=2"]
    for _ in range(30):
        done = subprocess.run(["ssh", *options, f"root@{host.address}", "hostname"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        time.sleep(1)
    raise TimeoutError(f"no ssh on {host.address}: {done.stderr}")


def _call(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
