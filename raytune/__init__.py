"""raytune: one YAML to a fine-tuned model on a Ray cluster.

Floors, from the ground up; each imports only itself and lower ones:
errors, units, missing, versions, printable, credentials, run_folder, token_file, user_code < local_files < object_store, hub <
storage < metrics < config < plan < data < model < evaluation < training < tracking < launch < sweeps < report < watch <
clusters < serving < api < cli < entry

One run passes through them in this order: `config.load` reads the YAML, `launch.run` connects to Ray, `data.store` tokenises
once, `plan.choose` resolves everything into a `RunPlan`, `training.worker` trains it on every rank, and
`launch.result` reads what it left.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytune.api import RunEvent as RunEvent
    from raytune.api import advise as advise
    from raytune.api import compare as compare
    from raytune.api import evaluate as evaluate
    from raytune.api import find_rate as find_rate
    from raytune.api import score as score
    from raytune.api import serve as serve
    from raytune.api import sweep as sweep
    from raytune.api import train as train
    from raytune.api import write_report as write_report

__version__ = "0.1.0"
__all__ = ["RunEvent", "advise", "compare", "evaluate", "find_rate", "score", "serve", "sweep", "train", "write_report"]


def __getattr__(name: str) -> Any:
    # Late, so that `raytune check` and every worker import what they use and no more.
    if name in __all__:
        from raytune import api

        return getattr(api, name)
    raise AttributeError(f"module 'raytune' has no attribute {name!r}")
