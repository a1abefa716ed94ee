"""What a sweep is going to do: configs and plans of its trials, and how they are compared. Starts nothing."""

import math
from dataclasses import dataclass, replace

from raytune.config.sections.model import ModelSection
from raytune.config.sections.run import RunConfig
from raytune.config.sections.sweep import SweepSection
from raytune.config.words.metric_names import is_of_validation
from raytune.data.rows.shards import ParallelMap
from raytune.errors import PlanError, UserError
from raytune.launch.data.prepare import Preparation, Prepared
from raytune.launch.data.stores import STORES_FOLDER
from raytune.launch.planning import looked_at
from raytune.model.files.base_content import Content, is_known_by_commit
from raytune.plan.facts.machine import Machine
from raytune.plan.run_plan import RunPlan
from raytune.plan.strategies.distillation import teacher_section
from raytune.run_folder import SweepFolder
from raytune.storage import absolute
from raytune.sweeps.space import Places, check_space, corners, space_of, trial_config, trials_of
from raytune.sweeps.sweep_plan import SweepPlan, num_slots, plan_sweep, share_of
from raytune.sweeps.trial import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A sweep that is ready to start."""

    plan: SweepPlan
    trials: list[Trial]
    """All trials; with Optuna none are known before the first has ended."""
    plans: list[RunPlan]
    """Of the trials, or of the corners of the space."""


class Planner:
    """Makes configs and plans of trials. What several trials read is tokenised once.

    Args:
        config: of the sweep.
        machine: the whole cluster.
    """

    def __init__(self, config: RunConfig, folder: SweepFolder, machine: Machine, parallel_map: ParallelMap) -> None:
        self._config, self._folder = config, folder
        self.slots = num_slots(machine, config, _workers(config))
        self._preparation = Preparation(share_of(machine, self.slots), parallel_map)

    def config(self, trial: Trial) -> RunConfig:
        """The run config of a trial: in the sweep's folder, without questions at its end. What is measured while it trains is
        measured between its steps: nobody knows a later value when trials are compared."""
        config = self._ranked(trial)
        evaluation, measured = config.evaluation, config.evaluation.while_training
        if measured is None:
            evaluation = evaluation.model_copy(update={"generation": None, "suites": []})
        else:
            measured = measured.model_copy(update={"where": "between_steps"})
            evaluation = evaluation.model_copy(update={"while_training": measured})
        store = config.data.store or f"{absolute(self._config.storage)}/{STORES_FOLDER}"
        return config.model_copy(
            update={
                "storage": self._folder.trials,
                "data": config.data.model_copy(update={"store": store}),
                "evaluation": evaluation,
                "checkpoint": config.checkpoint.model_copy(update={"resume": True}),
            }
        )

    def winner(self, trial: Trial) -> RunConfig:
        """The run config that trains a trial again, beside the sweep; a base of a hub at the commit of the trial."""
        config, model = self._ranked(trial), self.plan(trial).model
        if is_known_by_commit(model):
            config = config.model_copy(update={"model": config.model.model_copy(update={"revision": model.revision})})
        return config.model_copy(update={"name": f"{self._config.name}-best"})

    def _ranked(self, trial: Trial) -> RunConfig:
        """A trial's config with its number of workers and the metric of the sweep."""
        section, config = section_of(self._config), trial_config(self._config, trial)
        return config.model_copy(
            update={
                "checkpoint": config.checkpoint.model_copy(update={"metric": section.metric, "mode": section.mode}),
                "cluster": config.cluster.model_copy(update={"workers": _workers(config)}),
            }
        )

    def plan(self, trial: Trial) -> RunPlan:
        """The plan of a trial, without its rungs.

        Raises:
            UserError: if it cannot be done; the message names the trial's values.
        """
        return self.prepared(trial).plan

    def prepared(self, trial: Trial) -> Prepared:
        """The same, with the questions that it is measured by while it trains.

        Raises:
            UserError: as `plan` does.
        """
        try:
            prepared = self._preparation.prepare(self.config(trial))
            _refuse_roll_backs(prepared.plan)
            _refuse_streams(prepared.plan)
            at_end = prepared.plan.evaluation.model_copy(update={"suites": ()})
            # The test decides nothing: the winner is measured on it, when it is trained again.
            data = prepared.plan.data.model_copy(update={"test": []})
            return replace(prepared, plan=prepared.plan.model_copy(update={"evaluation": at_end, "data": data}))
        except UserError as error:
            values = ", ".join(f"{key}={value}" for key, value in trial.values.items())
            shared = f" {self.slots} trials share the machines: a smaller sweep.max_concurrent leaves more to each."
            is_crowded = isinstance(error, PlanError) and self.slots > 1
            raise type(error)(f"With {values}: {error}{shared if is_crowded else ''}") from error

    def models(self, trial: Trial) -> dict[str, ModelSection]:
        """Models whose files a trial reads, in the order of `RunPlan.models`, by the keys that name them."""
        config = self.config(trial)
        teacher = teacher_section(config)
        return {"model.base": config.model} | ({"strategy.distillation.teacher": teacher} if teacher else {})

    def content(self, model: ModelSection) -> Content:
        """What a model holds now, wherever it lies.

        Raises:
            ModelError: if it is not here, or is no whole model.
        """
        return self._preparation.base(model)


def _refuse_streams(plan: RunPlan) -> None:
    if plan.data.stream is not None:
        raise UserError(
            "data.streaming: each trial would tokenise the same rows again. Leave it out and name max_rows of data.train: a "
            "sweep on part of the rows, tokenised once, finds the settings to stream all of them with.",
            keys=("data.streaming",),
        )


def _refuse_roll_backs(plan: RunPlan) -> None:
    if plan.divergence and plan.divergence.policy == "roll_back":
        raise UserError(
            "training.divergence.policy is roll_back, but trials are not rolled back: one would go on at another learning rate "
            "than the one that it is ranked by. Set it to stop (such a trial fails and never wins), skip or warn."
        )


def resolve(config: RunConfig, planner: Planner) -> Resolved:
    """Make the trials and plan each of them.

    Raises:
        UserError: if a point of the space cannot be done on these machines.
    """
    section = section_of(config)
    trials = [] if section.search == "optuna" else trials_of(config)
    # Beside the trials themselves, so that a longer search of this space cannot run into a wall later.
    points = [Trial(number=number, values=values) for number, values in enumerate(corners(space_of(config)))]
    plans = [planner.plan(trial) for trial in [*trials, *points]]
    if config.data.holds_out:
        refuse_other_weights(section.metric, plans)
    plan = plan_sweep(section, config.name, len(trials) or section.trials, plans, planner.slots)
    return Resolved(plan=plan, trials=trials, plans=plans[: len(trials)] or plans)


def plan_of_sweep(config: RunConfig, places: Places | None = None) -> Resolved:
    """What `raytune sweep` would do, on the cluster that is named, or else on this machine. Tokenises the data, trains nothing.

    Args:
        places: where the keys of the sweep were written, for messages.

    Raises:
        UserError: as `sweep` does.
    """
    folder = checked_folder(config, places)
    with looked_at(config.cluster) as (machine, parallel_map):
        return resolve(config, Planner(config, folder, machine, parallel_map))


def checked_folder(config: RunConfig, places: Places | None) -> SweepFolder:
    """The folder of a sweep whose space has no point that is no valid config."""
    section_of(config)
    check_space(config, places)
    return SweepFolder(absolute(config.storage), config.name)


def section_of(config: RunConfig) -> SweepSection:
    if config.sweep is None:
        raise UserError("This config has no `sweep` section, so there is nothing to search. Train it with `raytune train`.")
    return config.sweep


def _workers(config: RunConfig) -> int:
    """Workers of a trial: one, unless the config says otherwise, so that as many trials as possible run side by side."""
    return 1 if config.cluster.workers == "auto" else config.cluster.workers


def refuse_other_weights(metric: str, plans: list[RunPlan]) -> None:
    """Refuse to compare trials by a mean over sets that each of them weighs in its own way: one that counts a hard source less
    would win by that alone.

    Raises:
        UserError: if they do.
    """
    if not is_of_validation(metric) or metric.count("/") > 1:  # of one set
        return
    first, *others = ({store.name: store.weight for store in plan.data.validation} for plan in plans)
    other = next((each for each in others if not _are_alike(first, each)), None)
    if other is None:
        return
    name = next((name for name in first if name in other), None)
    by_one = f" Set sweep.metric to that of one source, such as validation/{name}/loss, or" if name else ""
    raise UserError(
        f"sweep.metric is {metric}, a mean over held-out rows in which each source counts as in training, and trials count them "
        f"differently: {_weights_in_words(first)}; or {_weights_in_words(other)}.{by_one or ' For one measure'} give rows as "
        f"data.validation in place of data.validation_fraction.",
        keys=("sweep.metric", "data.validation_fraction"),
    )


def _are_alike(weights: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two sets of weights make the same mean."""
    if weights.keys() != other.keys():
        return len(weights) == len(other) == 1  # called after the file
    ratios = [other[name] / weights[name] for name in weights]
    return all(math.isclose(ratio, ratios[0], rel_tol=1e-6) for ratio in ratios)


def _weights_in_words(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} by {weight:.3g}" for name, weight in weights.items())
