"""Find a learning rate: workers, engine and data of a run, a range of rates in place of its schedule, and what the losses say.

Nothing of the run is read or changed, whether it has begun or finished: the test trains a copy that begins at the base, in a
folder of its own that goes when it ends.
"""

import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import count

from raytune.config.reading.rate_in_file import key_of_rate
from raytune.config.sections.run import RunConfig
from raytune.launch.attempts.going_on import task_failed
from raytune.launch.attempts.trainer import fit
from raytune.launch.cluster.cluster import connect, map_on_cluster
from raytune.launch.data.prepare import prepare, refuse_without_cluster
from raytune.launch.rates.found_rate import FoundRate
from raytune.metrics.json_numbers import decode_number
from raytune.plan.methods import method_of
from raytune.plan.rates.rate_advice import advise_rate
from raytune.plan.rates.rate_range import RangeOptions, RateRange, cautions
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RatesFolder, RunFolder
from raytune.storage import exists, read_json, remove_empty_folder, remove_folder, write_bytes, write_json

ATTEMPT = 1

Watch = Callable[[RunPlan, str], AbstractContextManager]


def find_rate(config: RunConfig, options: RangeOptions, watch: Watch = lambda plan, heading: nullcontext()) -> FoundRate:
    """Try a range of learning rates on the cluster that a run names, or inside this machine, and say what the losses show.

    Args:
        config: of the run.
        watch: given the plan of the test and what it does in a sentence, a context that lasts as long as the workers.

    Raises:
        UserError: before anything is started, if the range, the config, the model, the data or the machines do not allow it.
        RaytuneError: if the workers failed; ClusterError if that may pass. What they left stays, with its tracebacks.
    """
    base = refuse_without_cluster(config)
    tried = options.around(method_of(config.adapter).learning_rate(base.shape.num_parameters))
    with connect(config.cluster) as machine:
        on_cluster = partial(map_on_cluster, start_timeout=config.cluster.start_timeout)
        run = prepare(config, machine, on_cluster, base=base).plan
        test = range_test_plan(run, tried)
        scratch, root = RunFolder(test.storage, test.name), RatesFolder(run.storage, run.name).root
        try:
            with watch(test, heading(run, tried)):
                failure = fit(test, ATTEMPT, lambda: None, "find_rate", {"range": tried.model_dump(mode="json")})
        except BaseException:  # an interrupted test leaves nothing
            remove_folder(scratch.path, root)
            remove_empty_folder(root)
            raise
    if failure is not None:
        raise task_failed("Finding a learning rate", failure, scratch)
    measured = read_json(scratch.tried_losses)
    losses = tuple(decode_number(loss) for loss in measured["losses"])
    folder = _free_folder(run)
    found = FoundRate(
        name=run.name,
        folder=folder.path,
        key=key_of_rate(config),
        rate=first_rate(run),
        tried=tried,
        losses=losses,
        failure=measured["failure"],
        advice=advise_rate(losses, tried),
        num_epochs=num_epochs(run, tried),
        cautions=cautions(tried, num_epochs=num_epochs(run, tried), num_steps_of_run=run.optimization.num_steps),
    )
    write_bytes(folder.rates, found.table())
    write_json(folder.result, found.to_json())
    remove_folder(scratch.path, root)
    return found


def range_test_plan(run: RunPlan, tried: RateRange) -> RunPlan:
    """The plan of a run, for a test that takes its rows in the run's order for as many epochs as there are steps.

    Its folder is one that nobody else has.
    """
    num_rows = tried.num_steps * run.batch.global_batch_size
    return run.model_copy(
        update={
            "storage": RatesFolder(run.storage, run.name).root,
            "name": f"{run.name}-{uuid.uuid4().hex[:8]}.unfinished",
            "optimization": run.optimization.model_copy(update={"num_steps": tried.num_steps, "num_rows": num_rows}),
        }
    )


def num_epochs(run: RunPlan, tried: RateRange) -> float:
    """Passes over the training rows that all steps of a test make."""
    if run.data.stream is not None:
        return 0.0  # not counted
    return tried.num_steps * run.batch.global_batch_size / run.data.train.num_rows


def first_rate(run: RunPlan) -> float:
    """The peak rate of what a test trains: that of the first phase, where there are phases."""
    phases = run.optimization.phases
    return phases[0].learning_rate if phases else run.optimization.learning_rate


def heading(run: RunPlan, tried: RateRange) -> str:
    """What the test does, and what it leaves alone."""
    epochs, phases = num_epochs(run, tried), run.optimization.phases
    again = f", {epochs:.1f} times over the {run.data.train.num_rows} there are" if epochs > 1 else ""
    lines = [
        f"Learning rates from {tried.low:.2g} to {tried.high:.2g} in {tried.num_steps} steps of {run.batch.global_batch_size} "
        f"rows{again}, from a copy on the workers of the run. Run {run.name!r} is left as it is."
    ]
    if phases:
        lines.append(
            f"All steps train what the first of the {len(phases)} phases of strategy.unfreeze trains; the rate is for that."
        )
    if documents := run.optimization.ewc_documents:
        lines.append(
            f"First the importance of weights is estimated from {documents} documents of strategy.ewc.data, and not kept."
        )
    said = cautions(tried, num_epochs=epochs, num_steps_of_run=run.optimization.num_steps)
    return "\n".join([*lines, *(f"caution: {caution}" for caution in said)])


def _free_folder(run: RunPlan) -> RatesFolder:
    """Named like the run; a test takes no other's place."""
    names = (f"{run.name}{'' if number == 1 else f'-{number}'}" for number in count(1))
    folders = (RatesFolder(run.storage, name) for name in names)
    return next(folder for folder in folders if not exists(folder.path))
