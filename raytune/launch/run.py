"""One run from the driver's side: config -> cluster -> data -> plan (`run`), plan -> attempts -> result (`train_plan`)."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial

from raytune.config.sections.run import RunConfig
from raytune.errors import EXIT_FAILED, EXIT_REFUSED, EXIT_RETRY_LATER, ModelError, RaytuneError, TakenOverError, UserError
from raytune.evaluation.questions import Question, to_json_lines
from raytune.launch.attempts.attempts import Decision, Failure, decide, details
from raytune.launch.attempts.going_on import going_on, tracebacks
from raytune.launch.attempts.lease import Holding, hold, own_job
from raytune.launch.attempts.trainer import fit
from raytune.launch.cluster.address import named_address
from raytune.launch.cluster.cluster import connect, map_on_cluster
from raytune.launch.data.base_here import bring_base, refuse_changed_base
from raytune.launch.data.prepare import prepare, refuse_without_cluster
from raytune.launch.state.begun import as_begun, begun_for, refuse_unloadable
from raytune.launch.state.callbacks import Callback, calling, load_callbacks
from raytune.launch.state.finished import answer, damage, damage_text, goes_on, is_finished
from raytune.launch.state.gauges import gauges_of, refuse_unseen
from raytune.launch.state.record import RunRecord, refuse_changed_settings, write_plan
from raytune.launch.state.result import RunResult, write_outcome
from raytune.metrics.events import EventLog
from raytune.plan.choosing.while_training import room_for_exports
from raytune.plan.identity.division import Division
from raytune.plan.run_plan import RunPlan
from raytune.plan.strategies.penalty import importance_bytes
from raytune.printable import first_line
from raytune.run_folder import RunFolder
from raytune.storage import absolute, write_bytes
from raytune.tracking.trackers import refuse_unready
from raytune.tracking.watching import tracking
from raytune.training.checkpoints.commit import next_attempt, refuse_small_disk
from raytune.training.measuring.exports import remove_all
from raytune.training.start.fetched_base import noted
from raytune.versions import library_versions

logger = logging.getLogger(__name__)

Watch = Callable[[RunPlan], AbstractContextManager]
Attempt = Callable[[RunPlan, int, Callable[[], None]], Failure | None]
"""Trains a plan once, as attempt of this number: None if it came to its end. What the function given raises ends it."""


_EXIT_CODES = {ModelError.__name__: EXIT_REFUSED}
"""By kind of failure; the rest failed. A base may be refused by the node that is to download it."""


class RunFailedError(RaytuneError):
    """A run ended before its last step. `failure` says what ended it."""

    def __init__(self, message: str, failure: Failure) -> None:
        super().__init__(message)
        self.failure = failure
        self.exit_code = EXIT_RETRY_LATER if failure.may_pass else _EXIT_CODES.get(failure.kind, EXIT_FAILED)

    def __reduce__(self) -> tuple:
        return type(self), (self.args[0], self.failure)


def run(
    config: RunConfig,
    watch: Watch = lambda plan: nullcontext(),
    callbacks: Sequence[Callback] = (),
    leave: Callable[[RunFolder], None] = lambda folder: None,
) -> RunResult:
    """Train what `config` says, or return the result of the finished run of that name.

    Args:
        config: what the user wrote.
        watch: given the plan, a context that lasts as long as the training: progress for a person, for example.
        callbacks: called with what happens, behind those that the config names.
        leave: called when the run has finished or failed, before trackers are sent what its folder has.

    Raises:
        UserError: before anything is started, if the config, the model, the data or the machines do not allow the run.
        RunHeldError: before anything is started, if another command is at work on the run.
        TakenOverError: if another command took the run over while this one gave no sign of life.
        RunFailedError: if training failed and the budget of attempts is spent or another attempt would fail alike.
    """
    folder = RunFolder(absolute(config.storage), config.name)
    if result := answer(config, folder):
        return replace(result, finished_before=True)
    refuse_changed_settings(folder, config)
    told = [*load_callbacks(config.callbacks), *callbacks]
    refuse_unready(config.tracking, folder.storage)
    refuse_unseen(config)
    base = refuse_without_cluster(config)

    @contextmanager
    def watched(plan: RunPlan) -> Iterator[None]:
        own = [gauges_of(config.tracking, plan)] if config.tracking.prometheus else []
        with watch(plan), tracking(config.tracking, folder), _leaving(leave, folder), calling([*own, *told], plan):
            yield

    with _held_unless_finished(folder, config) as lease:
        begun = begun_for(config, folder)
        with connect(config.cluster) as machine:
            on_cluster = partial(map_on_cluster, start_timeout=config.cluster.start_timeout)
            prepared = prepare(config, machine, on_cluster, begun=begun, base=base)
            get_ready = (
                _base_here if named_address(config.cluster) is None else lambda plan: None
            )  # else nodes download their own
            return _train_held(prepared.plan, prepared.questions, config, watched, _fit_measured, lease, get_ready)


def _fit_measured(plan: RunPlan, number: int, check: Callable[[], None]) -> Failure | None:
    """`fit`, with somebody beside it who measures suites, where the plan wants that."""
    if not plan.measures_beside:
        return fit(plan, number, check)
    from raytune.launch.asking.evaluator import evaluating  # loads what models take

    with evaluating(plan, number):
        failure = fit(plan, number, check)
    if failure is None:
        with suppress(RaytuneError, OSError):  # nobody reads them any more
            remove_all(RunFolder(plan.storage, plan.name))
    return failure


def train_plan(
    plan: RunPlan,
    questions: Sequence[Question],
    config: RunConfig,
    watch: Watch = lambda plan: nullcontext(),
    attempt: Attempt = fit,
) -> RunResult:
    """Train a ready plan on the cluster that this process is connected to, or return the result of the finished run of its name.

    Args:
        plan: what is trained, in the folder that it names.
        questions: what both models answer at the end.
        config: what the plan was made from; it goes into the record, and says whether an unfinished run may be continued.
        watch: as for `run`.
        attempt: trains the plan once; by default on a worker group.

    Raises:
        UserError: if the folder holds another run, or an unfinished one that is not to be continued.
        RunHeldError, TakenOverError, RunFailedError: as `run` does.
    """
    with _held_unless_finished(RunFolder(plan.storage, plan.name), config) as lease:
        return _train_held(plan, questions, config, watch, attempt, lease)


@contextmanager
def _held_unless_finished(folder: RunFolder, config: RunConfig) -> Iterator[Holding | None]:
    """A finished run is only read, by any number of commands at once and where nobody may write."""
    with nullcontext() if is_finished(folder, config) else hold(folder) as lease:
        yield lease


def _train_held(
    plan: RunPlan,
    questions: Sequence[Question],
    config: RunConfig,
    watch: Watch,
    attempt: Attempt,
    lease: Holding | None,
    get_ready: Callable[[RunPlan], None] = lambda plan: None,
) -> RunResult:
    """See `run` and `train_plan`. `get_ready` is called before the first attempt, while progress is shown."""
    folder = RunFolder(plan.storage, plan.name)
    known = RunRecord.read(folder)
    plan, begun = as_begun(folder, plan, config)
    if known and not begun:  # its plan is gone, so the record is of what is planned now
        known = replace(known, config=config.model_dump(mode="json"))
    if known and goes_on(folder, config):
        logger.warning("Run %r had ended early; by the rules that it has now it goes on.", plan.name)
    elif known and known.state == "finished":  # by now, where there is a lease
        problems = list(damage(folder))
        if lease is None or not problems:
            return replace(RunResult.read(folder), finished_before=True)
        if not config.checkpoint.resume:
            raise UserError(
                f"{damage_text(folder, problems)} checkpoint.resume is false, so that its model is not exported again. Set it to "
                f"true, or give this run another name (name=...)."
            )
        logger.warning("%s The model is exported again from its best checkpoint.", damage_text(folder, problems))
    assert lease is not None, "a run that is not finished is held"
    if known and not config.checkpoint.resume:
        raise UserError(
            f"Run {plan.name!r} in {folder.storage} is {known.state} after {known.attempts} attempts, and "
            f"checkpoint.resume is false. Set it to true to continue, or give this run another name (name=...)."
        )
    if begun:
        refuse_unloadable(begun, plan)
        if changes := Division.of(begun.plan).changes_to(Division.of(plan)):
            logger.warning(
                "Run %r goes on divided otherwise: %s. Each step computes the same, but for rounding and for what dropout and "
                "noise draw, if it has any.",
                plan.name,
                changes,
            )
    refuse_small_disk(folder, plan.checkpoint_bytes, plan.checkpoint, importance_bytes(plan), room_for_exports(plan))
    record = known or RunRecord(
        name=plan.name,
        state="running",
        attempts=0,
        created=time.time(),
        config=config.model_dump(mode="json"),
        versions=library_versions(),
    )
    write_plan(folder, plan)
    write_bytes(folder.questions, to_json_lines(questions))
    with watch(plan):
        get_ready(plan)
        _train(plan, record, folder, attempt, lease, resumes=config.checkpoint.resume)
        result = RunResult.read(folder)
        try:
            write_outcome(result)
        except (RaytuneError, OSError) as error:  # the run has ended well, and whoever reads it can tell it again
            logger.warning("%s lacks what the run came to in words: %s", folder.result, first_line(error))
    return result


@contextmanager
def _leaving(leave: Callable[[RunFolder], None], folder: RunFolder) -> Iterator[None]:
    """See `run`. A run that was interrupted has not ended."""
    try:
        yield
    except RunFailedError:
        leave(folder)
        raise
    leave(folder)


def _base_here(plan: RunPlan) -> None:
    """See `bring_base`."""
    with noted(RunFolder(plan.storage, plan.name)) as report:
        for model in plan.models:
            bring_base(model, report)


def _train(plan: RunPlan, record: RunRecord, folder: RunFolder, attempt: Attempt, lease: Holding, *, resumes: bool) -> None:
    """Make attempts until one trains to the end or trying again makes no sense."""
    failures: list[Failure] = []
    while True:
        record = record.next_attempt(at_least=max(next_attempt(folder), lease.number))
        lease.renew()
        record.write(folder)
        with closing(EventLog(folder.events, attempt=record.attempts)) as events:
            events.write("attempt_started", workers=plan.batch.workers, job=own_job())
            try:
                failure = attempt(plan, record.attempts, lease.check)
            except (KeyboardInterrupt, SystemExit) as end:
                with suppress(TakenOverError):
                    lease.renew()
                    events.write("run_interrupted")
                    replace(record, state="interrupted").write(folder)
                if isinstance(end, KeyboardInterrupt):
                    raise KeyboardInterrupt(f"{str(end) or 'interrupted'}. {going_on(folder, resumes=resumes)}") from None
                raise
            if failure is not None and failure.kind == TakenOverError.__name__:
                raise TakenOverError(failure.message)
            lease.renew()  # what is written now is for the holder to write
            if failure is None:
                events.write("run_finished")
                replace(record, state="finished").write(folder)
                return
            failures.append(failure)
            decision = decide(failures, plan.cluster.max_failures)
            events.write("attempt_failed", cause=failure.headline, collateral=failure.collateral, decision=decision.value)
        if decision is Decision.RAISE:
            replace(record, state="failed", failure=failure.headline).write(folder)
            raise RunFailedError(explanation(failures, folder, resumes=resumes), failure)
        try:
            for model in plan.models:
                refuse_changed_base(model)
        except ModelError as error:
            replace(record, state="failed", failure=str(error)).write(folder)
            raise
        logger.warning("Attempt %d failed: %s. Starting again.", record.attempts, failure.headline.rstrip("."))


def explanation(failures: Sequence[Failure], folder: RunFolder, *, resumes: bool = True) -> str:
    """What a person reads when a run has failed; its last line is the cause."""
    failure = failures[-1]
    others = ", ".join(str(rank) for rank in failure.collateral)
    # Why there was no room for an attempt, for one.
    before = [one for one in failures[:-1] if failure.may_pass and one.cause != failure.cause]
    lines = [
        *([f"Rank {others} ended after it, as a consequence."] if others else []),
        *([where] if (where := tracebacks(folder, failure.attempt)) else []),
        *([going_on(folder, resumes=resumes)] if failure.may_pass else []),
        *details(failure.message),
        f"Training failed in attempt {failure.attempt}: {failure.headline}"
        + "".join(f" (attempt {one.attempt} had ended by {one.headline})" for one in before[-1:]),
    ]
    return "\n".join(lines)
