"""`RunConfig`: everything a user can say about a run. Sections only; each lives in its own file."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from raytune.config.sections.adapter import Adapter, LoraAdapter
from raytune.config.sections.checkpoint import CheckpointSection
from raytune.config.sections.cluster import ClusterSection
from raytune.config.sections.data import DataSection
from raytune.config.sections.evaluation import EvaluationSection
from raytune.config.sections.model import ModelSection
from raytune.config.sections.provider import ProviderSection
from raytune.config.sections.section import Section, Text
from raytune.config.sections.strategy import StrategySection
from raytune.config.sections.sweep import SweepSection
from raytune.config.sections.tracking import Tracking, TrackingSection
from raytune.config.sections.training import TrainingSection
from raytune.config.sections.user_code import CodeName

Preset = Literal["chat", "code", "domain", "style", "task", "qa", "classification", "summarisation", "small_data"]

RUN_NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"


def _a_place(storage: str) -> str:
    kind, slashes, place = storage.partition("://")
    if slashes and kind != "file" and not place.partition("/")[0]:
        raise ValueError("must name a bucket, as s3://bucket/folder does")
    if storage.startswith("memory:"):
        raise ValueError("must be a folder or a bucket: memory:// is the memory of one process, which no other can read")
    if re.match(r"(s3a?|gs|gcs|abfss?|az):(?!//)", storage):  # would be a folder of this machine
        raise ValueError("must have two slashes, as s3://bucket/folder has")
    return storage


class RunConfig(Section):
    version: Literal[1] = 1
    """Version of this file format."""
    name: Annotated[str, Field(pattern=RUN_NAME, title="a name of lower-case letters, digits and . _ -")] = "run"
    """Name of the run and of its folder: lower-case letters, digits, dots, dashes and underscores, at most 63. The same name
    continues an unfinished run."""
    preset: Preset | None = None
    """Documented defaults for a kind of training, below all that is written here; the plan says what it set and why
    (`raytune explain presets`)."""
    storage: Annotated[Text, AfterValidator(_a_place)] = "runs"
    """Where run folders live: a folder that every node sees, or an s3:// gs:// abfs:// URL. Relative paths start at the
    working directory."""
    model: ModelSection = ModelSection()
    """Which weights to start from and how the model computes."""
    data: DataSection = DataSection()
    """The rows, and how they become tokens and targets."""
    adapter: Adapter = LoraAdapter()
    """Which parameters are trained, and how (`method`)."""
    strategy: StrategySection = StrategySection()
    """What of these stays frozen, how fast each of the others learns, and by which loss."""
    training: TrainingSection = TrainingSection()
    """Optimisation, precision, memory and sharding."""
    evaluation: EvaluationSection = EvaluationSection()
    """What is measured on held-out rows, and when."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When state is saved and what is kept."""
    callbacks: Annotated[list[CodeName], Field(examples=[["my_callbacks.py:tell"]])] = []
    """Functions of your own that are called with what happens to the run (`raytune explain user_code`), as `module:function` or
    `file.py:function`; a module is looked for beside this file, in the working directory and among those that are installed."""
    tracking: Tracking = TrackingSection()
    """Experiment trackers that are told what the run does (`raytune explain trackers`): by name, or with options."""
    cluster: ClusterSection = ClusterSection()
    """Which Ray cluster, how many workers, and what each of them gets."""
    sweep: SweepSection | None = None
    """Train many variants of this run, early losers stopped: which keys vary and how."""
    provider: ProviderSection = ProviderSection()
    """What only you know about the machines: `cluster render` writes it into cluster files. Training reads none of it."""
