"""What the machine that a person sits at is like, as a place to start from. Looks, changes nothing, imports no heavy library."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from raytune.clusters.checks.facts import GpuFacts
from raytune.hub.cache import default_hub_cache, is_offline


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatFacts:
    """What matters besides where raytune is started by hand."""

    requirements: tuple[str, ...] | None
    """Of raytune, as its package declares them; None: neither installed nor in a checkout."""
    installed: dict[str, str]
    """Versions of what it requires, by name."""
    missing_modules: tuple[str, ...]
    """Libraries that are installed and still cannot be found by import."""
    python: tuple[int, int]
    machine: str
    cpu_flags: frozenset[str]
    """Of /proc/cpuinfo; empty where that does not tell."""
    listening: dict[int, str]
    """Ports that something listens on, and the address it listens on."""
    ray_processes: dict[int, str]
    """Processes of Ray that this user may see: by pid, the name."""
    cache: str
    """Where Hugging Face keeps what it loads."""
    cache_is_writable: bool
    is_offline: bool
    encoding: str
    torch_sees: str | None
    """What torch says of this machine's GPUs, or why it fails; None: there is no GPU, so it was not asked."""


def seat_facts(gpus: tuple[GpuFacts, ...], *, torch_timeout_s: float = 90.0) -> SeatFacts:
    """Look at this machine as a place to start from. torch is asked, in a process of its own, only where there is a GPU."""
    requirements = _requirements()
    cache = str(default_hub_cache())
    return SeatFacts(
        requirements=requirements,
        installed=_installed(requirements or ()),
        missing_modules=tuple(
            name for name in ("ray", "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "datasets") if not _found(name)
        ),
        python=sys.version_info[:2],
        machine=platform.machine(),
        cpu_flags=_cpu_flags(),
        listening=_listening(),
        ray_processes=_ray_processes(),
        cache=cache,
        cache_is_writable=_may_write(Path(cache)),
        is_offline=is_offline(),
        encoding=sys.getfilesystemencoding(),
        torch_sees=_torch_sees(torch_timeout_s) if gpus else None,
    )


def _requirements() -> tuple[str, ...] | None:
    """What raytune requires, without its extras: as pip recorded it, or from the checkout that this is."""
    project = Path(__file__).parents[3] / "pyproject.toml"
    if project.exists():
        import tomllib

        declared = tomllib.loads(project.read_text()).get("project", {})
        if declared.get("name") == "raytune":
            return tuple(declared["dependencies"])
    from importlib.metadata import requires

    try:
        return tuple(line for line in requires("raytune") or () if "extra ==" not in line)
    except PackageNotFoundError:
        return None


def _installed(requirements: tuple[str, ...]) -> dict[str, str]:
    from packaging.requirements import Requirement

    versions = {}
    for line in requirements:
        name = Requirement(line).name
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def _listening() -> dict[int, str]:
    ports = {}
    for table, is_any in (("/proc/net/tcp", "00000000"), ("/proc/net/tcp6", "0" * 32)):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, _, state, *_ = row.split()
            if state == "0A":  # LISTEN
                address, port = local.split(":")
                ports[int(port, 16)] = "every address" if address == is_any else "this machine or one address"
    return ports


def _ray_processes() -> dict[int, str]:
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # gone, or another user's
            continue
        program = words[0].decode(errors="replace")
        name = program.rpartition("/")[2]
        if name in ("raylet", "gcs_server") or program.startswith("ray::"):
            found[int(folder.name)] = name
    return found


def _may_write(path: Path) -> bool:
    """Whether the folder can be written to or made."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return os.access(path, os.W_OK)


def _torch_sees(timeout_s: float) -> str:
    script = (
        "import torch\n"
        "count = torch.cuda.device_count()\n"
        "for index in range(count): torch.ones(8, device=f'cuda:{index}').sum().item()\n"
        "print(f'{count} GPUs')"
    )
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer in {timeout_s:.0f} s"
    return done.stdout.strip() if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
