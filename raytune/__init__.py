"""raytune: one YAML to a fine-tuned model on a Ray cluster.

Floors, from the ground up; each imports only itself and lower ones:
errors, units, missing, versions, printable, credentials, run_folder, token_file, user_code < local_files < object_store, hub <
storage < metrics < config < importing < plan < data < model < evaluation < training < tracking < launch < sweeps < report <
watch < clusters < serving < api < cli < entry

One run passes through them in this order: `config.load` reads the YAML, `launch.run` connects to Ray, `data.store` tokenises
once, `plan.choosing.choose` resolves everything into a `RunPlan`, `training.worker` trains it on every rank, and
`launch.state.result` reads what it left.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytune.api.configs import import_config as import_config
    from raytune.api.data import data_check as data_check
    from raytune.api.data import data_preview as data_preview
    from raytune.api.data import data_rank as data_rank
    from raytune.api.data import data_reword as data_reword
    from raytune.api.jobs import doctor as doctor
    from raytune.api.jobs import logs as logs
    from raytune.api.jobs import preflight as preflight
    from raytune.api.jobs import status as status
    from raytune.api.jobs import stop as stop
    from raytune.api.jobs import submit as submit
    from raytune.api.models import chat as chat
    from raytune.api.models import evaluate as evaluate
    from raytune.api.models import export as export
    from raytune.api.models import generate as generate
    from raytune.api.models import merge as merge
    from raytune.api.models import push as push
    from raytune.api.models import serve as serve
    from raytune.api.runs import RunEvent as RunEvent
    from raytune.api.runs import advise as advise
    from raytune.api.runs import check as check
    from raytune.api.runs import compare as compare
    from raytune.api.runs import find_rate as find_rate
    from raytune.api.runs import make_plan as make_plan
    from raytune.api.runs import score as score
    from raytune.api.runs import sweep as sweep
    from raytune.api.runs import track as track
    from raytune.api.runs import train as train
    from raytune.api.runs import write_report as write_report

__version__ = "0.1.0"
_IN = {
    "configs": ("import_config",),
    "data": ("data_check", "data_preview", "data_rank", "data_reword"),
    "jobs": ("doctor", "logs", "preflight", "status", "stop", "submit"),
    "models": ("chat", "evaluate", "export", "generate", "merge", "push", "serve"),
    "runs": (
        "RunEvent",
        "advise",
        "check",
        "compare",
        "find_rate",
        "make_plan",
        "score",
        "sweep",
        "track",
        "train",
        "write_report",
    ),
}
"""Files of `api/`, and what they offer."""
_HOME = {name: file for file, names in _IN.items() for name in names}
__all__ = [
    "RunEvent",
    "advise",
    "chat",
    "check",
    "compare",
    "data_check",
    "data_preview",
    "data_rank",
    "data_reword",
    "doctor",
    "evaluate",
    "export",
    "find_rate",
    "generate",
    "import_config",
    "logs",
    "make_plan",
    "merge",
    "preflight",
    "push",
    "score",
    "serve",
    "status",
    "stop",
    "submit",
    "sweep",
    "track",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # Late, so that `raytune check` and every worker import what they use and no more.
    if name in _HOME:
        return getattr(import_module(f"raytune.api.{_HOME[name]}"), name)
    raise AttributeError(f"module 'raytune' has no attribute {name!r}")
