"""A run that overfits for real ends where its rule says, resumed or not, and its model is the best checkpoint."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raytune.config.load import config_from
from raytune.launch.finished import goes_on, is_finished
from raytune.launch.record import RunRecord
from raytune.launch.result import RunResult
from raytune.launch.run import train_plan
from raytune.metrics.events import read_events
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.training.commit import committed
from raytune.training.run import Worker, train
from tests.numerics.saved_models import loss_by_plain_transformers
from tests.numerics.test_whole_run import config, prepared_run

# Eight rows again and again: the training loss goes to nothing, and the validation loss turns within a few dozen steps.
OVERFITS: dict[str, Any] = {
    "data": {"train": {"path": "demo:train", "max_rows": 8}, "validation": {"path": "demo:validation", "max_rows": 24}},
    "adapter": {"method": "full"},
    "training": {"max_steps": 60, "global_batch_size": 2, "learning_rate": 3e-3, "lr_scheduler_type": "constant"},
    "evaluation": {"every_steps": 4},
}
