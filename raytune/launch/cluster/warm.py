"""`cluster.keep_warm`: workers of a joined cluster start in a moment, because each node keeps a process that has loaded what they
load (`warm_starter`)."""

import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from raytune.config.sections.cluster import ClusterSection
from raytune.errors import UserError
from raytune.launch.cluster import warm_starter
from raytune.launch.cluster.forking import OF_RANKS

OF_ANOTHER_PYTHON = ("pip", "uv", "conda", "image_uri", "container", "py_executable", "nsight", "rocprof_sys")
"""Fields of Ray's runtime environments that have workers start with another Python than the cluster's own."""

_log = logging.getLogger(__name__)


def python_kept_warm(section: ClusterSection) -> dict[str, str]:
    """What Ray's runtime environment of a command says of it: nothing without `cluster.keep_warm`.

    Raises:
        UserError: as `refuse_another_python` does, inside a job.
    """
    if section.keep_warm is None:
        return {}
    of_job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    refuse_another_python(section, of_job.get("runtime_env") or {})
    here = shlex.quote(sys.executable)
    # Nodes of one image have their Python where this one has it; else it is found as that of a job is.
    script = f'[ -x {here} ] && exec {here} "$@"; exec python "$@"'
    threads = max(int(section.cpus_per_worker), 1)
    starter = ["-P", "-m", warm_starter.__name__, ",".join(OF_RANKS), f"{section.keep_warm:g}", str(threads)]
    return {"py_executable": shlex.join(["sh", "-c", script, "python", *starter])}


def refuse_another_python(section: ClusterSection, runtime_env: Mapping[str, Any]) -> None:
    """Refuse what cannot be had at once: a Python of a job's own, which no node has loaded.

    Raises:
        UserError: naming both.
    """
    others = [name for name in OF_ANOTHER_PYTHON if runtime_env.get(name)]
    if section.keep_warm is not None and others:
        raise UserError(
            f"cluster.keep_warm keeps processes of the cluster's own Python, and the job's runtime environment has "
            f"{', '.join(others)}, with which workers start another one. Leave cluster.keep_warm out, or have what the job needs "
            f"installed on the nodes.",
            keys=("cluster.keep_warm",),
        )


def say_that_nothing_stays(section: ClusterSection, why: str) -> None:
    """Say that `cluster.keep_warm` does nothing, where it is set."""
    if section.keep_warm is not None:
        _log.warning("cluster.keep_warm has no effect: %s", why)
