"""Versions of everything whose behaviour decides a run's numbers."""

import platform
from importlib.metadata import PackageNotFoundError, version

import raytune

LIBRARIES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "deepspeed")


def library_versions() -> dict[str, str]:
    """Installed versions, ours and Python's among them. A library that is not installed is left out."""
    versions = {"raytune": raytune.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
