"""What a run says to experiment trackers beside its own metrics.jsonl."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from raytune.config.sections.section import Section, Text

TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
PROMETHEUS = "prometheus"
NAMES = (*TRACKERS, PROMETHEUS)
"""That can stand alone, without options."""


class TensorboardSection(Section):
    folder: Text | None = None
    """Local folder in which each run has one with its event files. Default: `tensorboard` in the run folder."""


class MlflowSection(Section):
    uri: Annotated[Text | None, Field(examples=["http://mlflow.internal:5000"])] = None
    """A server, or `sqlite:///FILE`. Default: `mlflow.db` in `storage`. MLFLOW_TRACKING_URI is not read: this key says it."""
    experiment: Text = "raytune"
    """Experiment that the runs belong to, made where there is none."""


class WandbSection(Section):
    project: Text = "raytune"
    """Project that the runs belong to."""
    entity: Text | None = None
    """User or team. Default: that of the API key."""
    mode: Literal["online", "offline"] = "online"
    """`online` needs WANDB_API_KEY in the environment of the command, or `wandb login` before it. `offline` writes files that
    `wandb sync` sends later."""
    folder: Text | None = None
    """Local folder for the files that `wandb` writes. Default: the run folder."""


class TrackioSection(Section):
    project: Annotated[Text, Field(pattern=r"^[A-Za-z0-9_-]+$", title="a name of letters, digits, - and _")] = "raytune"
    """Project that the runs belong to."""
    folder: Text | None = None
    """Local folder of its database, that `TRACKIO_DIR` names to `trackio show`. Default: `trackio` in `storage`."""


class PrometheusSection(Section):
    """Has no options: Prometheus is told by Ray where nodes are."""


class TrackingSection(Section):
    tensorboard: TensorboardSection | None = None
    """TensorBoard's event files."""
    mlflow: MlflowSection | None = None
    """An MLflow server or a local database."""
    wandb: WandbSection | None = None
    """Weights & Biases."""
    trackio: TrackioSection | None = None
    """A local database that `trackio show` draws."""
    prometheus: PrometheusSection | None = None
    """The newest values as gauges of Ray (`ray_raytune_metric`), which Prometheus reads from its nodes while a run trains."""
    run_name: Text | None = None
    """What the run is called there. Default: its `name`; a trial has its own behind it."""
    group: Text | None = None
    """Runs of one group stand together. Default: the trials of a sweep are a group of its name."""
    tags: Annotated[dict[str, Text], Field(examples=[{"team": "support"}])] = {}
    """Words by name, to find the run by."""
    log_model: bool = False
    """Send the files of the model, too, when the run has finished: to W&B and MLflow. The command waits for that as long as its
    size lets expect."""

    @property
    def chosen(self) -> dict[str, Section]:
        """The options of each tracker that keeps runs, by its name."""
        return {name: section for name in TRACKERS if (section := getattr(self, name)) is not None}

    @property
    def tells_anybody(self) -> bool:
        return bool(self.chosen) or self.prometheus is not None


def _by_name(value: Any) -> Any:
    """Names alone stand for trackers without options."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return value
    if strangers := [name for name in names if name not in NAMES]:
        raise ValueError(f"{strangers[0]!r} is no tracker that raytune knows; there are {', '.join(NAMES)}")
    return {name: {} for name in names}


Tracking = Annotated[
    TrackingSection,
    BeforeValidator(_by_name, json_schema_input_type=str | list[str] | TrackingSection),
    Field(
        title=f"names of trackers ({', '.join(NAMES)}), or a section of each with its options",
        examples=[["tensorboard"], {"mlflow": {"uri": "http://mlflow.internal:5000"}}],
    ),
]
