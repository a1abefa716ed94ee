"""Rows answered on the workers of a cluster: actors that hold models, and chunks that are handed to whichever is free."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from raytune.errors import ClusterError
from raytune.evaluation.answers import Chunk, answer
from raytune.evaluation.suite_metrics import Given
from raytune.launch.cluster.waiting import free_in_words
from raytune.model.files.hub import bring_base
from raytune.model.inference import HeldModels
from raytune.plan.saved.asked_model import AskedModel
from raytune.plan.value import Plan
from raytune.printable import first_line
from raytune.units import format_seconds

MOST_DEATHS = 3
"""Of actors at the same chunk, or one after the other before any has answered."""
TELL_EVERY_S = 10.0

_log = logging.getLogger(__name__)

Answered = Callable[[int, dict[int, Given]], None]
"""Called with the place of a task and what it gave, as soon as that is known."""


class AnsweringPlan(Plan):
    """What each actor has, and how it computes: as the worker of a run where its numbers are to be those of the run."""

    device: str
    """cpu or cuda."""
    threads: int
    """Compute threads."""
    tf32: bool = False
    cpus: float = 1.0
    """That Ray sets aside."""


class Answerer:
    """A process that answers, made an actor by `ray.remote(Answerer)`. Nothing is loaded before it is asked."""

    def __init__(self, plan: AnsweringPlan) -> None:
        torch.set_num_threads(plan.threads)
        torch.backends.cuda.matmul.allow_tf32 = plan.tf32
        torch.backends.cudnn.allow_tf32 = plan.tf32
        self._models = HeldModels(torch.device(plan.device))

    def ready(self) -> tuple[str, int]:
        """Answers once the process is there: its node, and its number there."""
        return os.uname().nodename, os.getpid()

    def answer(self, one: AskedModel, chunk: Chunk) -> dict[int, Given]:
        """What a model makes of a chunk. Who hands over chunks model by model has each base loaded once.

        Raises:
            ModelError: if the model cannot be loaded as asked.
        """
        bring_base(one.model)
        with self._models.asked(one) as loaded:
            return answer(loaded, chunk.suite, chunk.rows)

    def forget(self, folder: str) -> None:
        """Keep no copy of a saved folder that is not asked again."""
        self._models.forget(folder)


def answer_on_cluster(
    plan: AnsweringPlan,
    tasks: Sequence[tuple[AskedModel, Chunk]],
    answered: Answered,
    *,
    num_actors: int,
    start_timeout: float,
) -> None:
    """Have actors answer all tasks, in their order as far as these are free. A task whose actor dies goes to another one.

    Raises:
        ClusterError: if no actor could be started in time, or too many of them died.
        RaytuneError: what an actor raised.
    """
    pool = _Pool(plan, num_actors, start_timeout)
    try:
        pool.work_off(tasks, answered)
    finally:
        pool.end()


class _Pool:
    """Actors, and what each of them is at."""

    def __init__(self, plan: AnsweringPlan, num_actors: int, start_timeout: float) -> None:
        self._plan, self._start_timeout = plan, start_timeout
        self._kind = ray.remote(num_cpus=plan.cpus, num_gpus=int(plan.device == "cuda"), max_restarts=0)(Answerer)
        self._at: dict[Any, tuple[Any, int | None]] = {}
        """By what is waited for: the actor, and the place of its task; None: it starts."""
        self._deaths_at_start = 0
        for _ in range(num_actors):
            self._start()

    def work_off(self, tasks: Sequence[tuple[AskedModel, Chunk]], answered: Answered) -> None:
        left, deaths, done = list(range(len(tasks))), dict.fromkeys(range(len(tasks)), 0), 0
        has_begun, began, told = False, time.monotonic(), time.monotonic()
        while done < len(tasks):
            ready, _ = ray.wait(list(self._at), timeout=1.0)
            for reference in ready:
                actor, place = self._at.pop(reference)
                try:
                    given = ray.get(reference)
                except RayTaskError as error:
                    raise error.cause from None  # what the actor raised, without Ray's traceback around it
                except RayActorError as error:
                    self._mourn(place, deaths, error)
                    left[:0] = [] if place is None else [place]
                    continue
                has_begun = True
                if place is not None:
                    answered(place, given)
                    done += 1
                if left:
                    place = left.pop(0)
                    self._at[actor.answer.remote(*tasks[place])] = actor, place
            if not has_begun and time.monotonic() - began > self._start_timeout:
                raise ClusterError(
                    f"Waited {format_seconds(self._start_timeout)} (cluster.start_timeout) for a worker to answer rows on, in "
                    f"vain; {free_in_words()}. Try again when other jobs have ended (`ray status` shows who holds what)."
                )
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                _log.warning("%d of %d chunks of rows answered", done, len(tasks))

    def end(self) -> None:
        for actor, _ in self._at.values():
            ray.kill(actor)

    def _start(self) -> None:
        actor = self._kind.remote(self._plan)
        self._at[actor.ready.remote()] = actor, None

    def _mourn(self, place: int | None, deaths: dict[int, int], error: RayActorError) -> None:
        """Start another actor for one that died.

        Raises:
            ClusterError: if that happened too often.
        """
        if place is None:
            self._deaths_at_start += 1
        else:
            deaths[place] += 1
        if max(self._deaths_at_start, *deaths.values()) >= MOST_DEATHS:
            raise ClusterError(
                f"{MOST_DEATHS} workers died one after the other over the same rows; the last one: {first_line(error)} Too "
                f"little memory is the usual reason: lower batch_size in the suite. What was answered is kept; the same command "
                f"goes on."
            ) from error
        _log.warning("A worker that answers rows died; another one does again what it was at.")
        self._start()
