"""What to say where a package is not installed. Standard library only: it may be any package that is missing."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = "raytune"
OPTIONAL = {
    **{"s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure", "optuna": "optuna"},
    **{"sacrebleu": "metrics", "rouge_score": "metrics", "bert_score": "bertscore", "schedulefree": "schedule-free"},
    **{"lm_eval": "lm-eval", "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"},
    **{"starlette": "serve", "fastapi": "serve", "uvicorn": "serve"},
    **{"mlflow": "mlflow", "sqlalchemy": "mlflow", "alembic": "mlflow"},
    **{"gguf": "gguf", "rensa": "quality", "liger_kernel": "gpu"},
}
"""Extra of raytune that brings a package which not everybody needs."""
TAKEN_ALONG = ("mlflow", "boto3")
"""What DeepSpeed's tuner and accelerate's dialogue about SageMaker load where it is installed, and no rank uses."""


def install_command(extra: str | None = None) -> str:
    """What installs raytune with everything that it needs for the Python of this process."""
    checkout = Path(__file__).parents[1]
    suffix = f"[{extra}]" if extra else ""
    target = f"-e '{checkout}{suffix}'" if (checkout / "pyproject.toml").exists() else f"'{PACKAGE}{suffix}'"
    return f"{sys.executable} -m pip install {target}"


@contextmanager
def left_out(*names: str) -> Iterator[None]:
    """Modules that are not loaded while the block imports what would take them along where they are installed."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # pyright: ignore[reportArgumentType, reportCallIssue]  (None: not to be found)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def missing_package(error: ModuleNotFoundError) -> str:
    """The message for a module that cannot be imported."""
    name = (error.name or str(error)).partition(".")[0]
    return (
        f"The package {name} is missing: the Python of this process is {sys.executable} (version "
        f"{'.'.join(map(str, sys.version_info[:3]))}) on {os.uname().nodename}. If another Python there has it, start raytune "
        f"with that one by its full path; else install what raytune needs, on every node: {install_command(OPTIONAL.get(name))}"
    )


def is_ours(error: ModuleNotFoundError) -> bool:
    """Whether a module of raytune itself cannot be found, which is a fault of raytune."""
    return (error.name or "").partition(".")[0] == PACKAGE
