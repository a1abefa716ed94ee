"""What one machine is like, as far as runs depend on it. Looks and changes nothing; imports no heavy library."""

import glob
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from raytune.errors import RaytuneError
from raytune.launch.cluster.host import memory_bytes_here
from raytune.storage import free_bytes, is_local
from raytune.token_file import token_path
from raytune.units import MIB
from raytune.versions import library_versions

NVIDIA_SMI_TIMEOUT_S = 20.0
SOCKET_SETTINGS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_DISABLE", "FI_PROVIDER")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """A GPU as the driver lists it, whatever this process may use."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpLock:
    """A lock that the build of a DeepSpeed kernel has left, or holds."""

    path: str
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A place that runs write to."""

    path: str
    free_bytes: int | None
    """None: not known, as of a bucket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """One machine, as the process that looked saw it."""

    host: str
    versions: dict[str, str]
    """Of raytune, Python and the libraries that are installed."""
    gpus: tuple[GpuFacts, ...]
    driver: str | None
    driver_cuda: str | None
    """The newest CUDA that the driver runs."""
    torch_cuda: str | None
    """The CUDA that torch was built for; None: built for CPUs."""
    nccl: str | None
    memory_bytes: int
    shared_memory_bytes: int
    """Free in /dev/shm."""
    disks: dict[str, Disk]
    """By use: `storage`, `scratch`."""
    op_locks: tuple[OpLock, ...]
    auth_mode: str | None
    """RAY_AUTH_MODE; None: not set."""
    token_file: str | None
    token_file_mode: int | None
    """Permission bits; None: no file."""
    resolves_to: tuple[str, ...]
    """Addresses that the machine's own name has for itself."""
    addresses: dict[str, str]
    """Addresses of its interfaces, by their names."""
    settings: dict[str, str]
    """Those of SOCKET_SETTINGS that are set."""
    fabric_devices: tuple[str, ...]
    """InfiniBand and EFA devices."""
    open_files: int
    """Limit of open files of a process."""
    product: str | None = None
    """What the machine says it is; in AWS the name of its type. None: it does not say."""


def machine_facts(storage: str | None = None) -> MachineFacts:
    """Look at the machine of this process. Takes well below a second, but where a driver is slow.

    Args:
        storage: where runs go, if that is known.
    """
    gpus, driver, driver_cuda = _gpus()
    token = token_path()
    return MachineFacts(
        host=socket.gethostname(),
        versions=library_versions(),
        gpus=gpus,
        driver=driver,
        driver_cuda=driver_cuda,
        torch_cuda=_torch_cuda(),
        nccl=_nccl(),
        memory_bytes=memory_bytes_here(),
        shared_memory_bytes=_free("/dev/shm") or 0,
        disks={"scratch": _disk(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())}
        | ({"storage": _disk(storage)} if storage else {}),
        op_locks=tuple(_op_locks()),
        auth_mode=os.environ.get("RAY_AUTH_MODE"),
        token_file=str(token) if token.exists() else None,
        token_file_mode=token.stat().st_mode & 0o777 if token.exists() else None,
        resolves_to=_resolves_to(socket.gethostname()),
        addresses=_addresses(),
        settings={name: os.environ[name] for name in SOCKET_SETTINGS if os.environ.get(name)},
        fabric_devices=tuple(sorted(os.listdir("/sys/class/infiniband"))) if os.path.isdir("/sys/class/infiniband") else (),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        product=_product(),
    )


def _product() -> str | None:
    try:
        return Path("/sys/class/dmi/id/product_name").read_text().strip() or None
    except OSError:
        return None


def _gpus() -> tuple[tuple[GpuFacts, ...], str | None, str | None]:
    """GPUs, driver and the CUDA of the driver. `nvidia-smi` sees all GPUs, whatever CUDA_VISIBLE_DEVICES says."""
    listed = _nvidia_smi("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    rows = [[part.strip() for part in line.split(",")] for line in listed.splitlines() if line.count(",") == 2]
    gpus = tuple(GpuFacts(name=name, memory_bytes=int(float(memory)) * MIB) for name, memory, _ in rows if memory[:1].isdigit())
    cuda = re.search(r"CUDA Version: *([\d.]+)", _nvidia_smi()) if gpus else None
    return gpus, rows[0][2] if rows else None, cuda[1] if cuda else None


def _nvidia_smi(*arguments: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False, env=_plain()
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _plain() -> Mapping[str, str]:
    return os.environ | {"LC_ALL": "C"}


def _torch_cuda() -> str | None:
    """From torch's own version file: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda(?:: [^=]+)? = ['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _nccl() -> str | None:
    for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _free(path: str) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _disk(path: str) -> Disk:
    if not is_local(path):
        return Disk(path=path, free_bytes=None)
    try:
        return Disk(path=path, free_bytes=free_bytes(path))
    except (RaytuneError, OSError):
        return Disk(path=path, free_bytes=None)


def _op_locks() -> list[OpLock]:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    locks = []
    for pattern in ("*/lock", "*/*/lock"):
        for path in sorted(glob.glob(os.path.join(root, pattern))):
            try:
                locks.append(OpLock(path=path, age_s=max(0.0, time.time() - os.stat(path).st_mtime)))
            except FileNotFoundError:  # that build has just ended
                continue
    return locks


def _resolves_to(name: str) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)))
    except OSError:
        return ()


def _addresses() -> dict[str, str]:
    """IPv4 addresses by interface, of those that are up."""
    import fcntl
    import struct

    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:  # SIOCGIFADDR
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
            except OSError:  # no address
                continue
            addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses
