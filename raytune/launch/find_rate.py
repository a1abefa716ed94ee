"""Find a learning rate: workers, engine and data of a run, a range of rates in place of its schedule, and what the losses say.

Nothing of the run is read or changed, whether it has begun or finished: the test trains a copy that begins at the base, in a
folder of its own that goes when it ends.
"""

import json
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from raytune.config.run import RunConfig
from raytune.launch.cluster import connect, map_on_cluster
from raytune.launch.going_on import task_failed
from raytune.launch.prepare import prepare, refuse_without_cluster
from raytune.launch.trainer import fit
from raytune.metrics.json_numbers import decode_number, encode_number
from raytune.plan.methods import method_of
from raytune.plan.rate_advice import RateAdvice, advise_rate
from raytune.plan.rate_range import RangeOptions, RateRange, Stop, reason_to_stop, smoothed
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RatesFolder, RunFolder
from raytune.storage import exists, read_json, remove_empty_folder, remove_folder, write_bytes, write_json

ATTEMPT = 1

Watch = Callable[[RunPlan, str], AbstractContextManager]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRate:
    """What a range test measured, and what that says.

    Attributes:
        name: of the run.
        folder: where the curve lies.
        rate: that the run would have without it.
        losses: mean over the targets of each step's global batch, before its update; the last may not be finite.
        num_epochs: passes of the whole range over the training rows.
    """

    name: str
    folder: str
    rate: float
    tried: RateRange
    losses: tuple[float, ...]
    advice: RateAdvice
    num_epochs: float

    @property
    def rates(self) -> list[float]:
        """Of each step."""
        return [self.tried.rate(step) for step in range(len(self.losses))]

    @property
    def smoothed(self) -> list[float]:
        return smoothed(self.losses, self.tried.smoothing)

    @property
    def stop(self) -> Stop | None:
        return reason_to_stop(self.losses, self.tried)

    @property
    def suggestion(self) -> float | None:
        """The rate that `--apply` writes; None where the curve names none."""
        return self.advice.steepest

    @property
    def lines(self) -> list[str]:
        """What a person reads: a few points of the curve, what they say, and the rates."""
        advice = self.advice
        shown = sorted({round(share * (len(self.losses) - 1) / 9) for share in range(10)})
        table = [f"{self.rates[step]:>13.2e}  {self.losses[step]:>9.4f}  {self.smoothed[step]:>9.4f}" for step in shown]
        return [
            f"{'learning rate':>13}  {'loss':>9}  {'smoothed':>9}",
            *table,
            advice.words,
            *(
                [
                    f"suggested  {advice.steepest:.1e}  (steepest descent)",
                    f"safe       {advice.safe:.1e}  (at most a tenth of {advice.lowest:.1e}, where the loss was lowest)",
                ]
                if advice.is_found
                else ["suggested  none"]
            ),
            f"the run's  {self.rate:.1e}",
            f"curve      {RatesFolder(*self._place).rates}",
        ]

    @property
    def _place(self) -> tuple[str, str]:
        root, _, name = self.folder.rpartition("/")
        return root.removesuffix("/rates"), name

    def to_json(self) -> dict[str, Any]:
        """The facts without the curve, which is in rates.jsonl."""
        return {
            "name": self.name,
            "folder": self.folder,
            "rate": self.rate,
            "suggestion": self.suggestion,
            "advice": self.advice.model_dump(mode="json"),
            "stop": self.stop,
            "num_steps": len(self.losses),
            "num_epochs": self.num_epochs,
            "range": self.tried.model_dump(mode="json"),
        }

    def table(self) -> bytes:
        """A line per step: `{"step", "learning_rate", "loss", "smoothed"}`."""
        rows = zip(self.rates, self.losses, self.smoothed, strict=True)
        return b"".join(
            json.dumps(
                {"step": step, "learning_rate": rate, "loss": encode_number(loss), "smoothed": encode_number(average)}
            ).encode()
            + b"\n"
            for step, (rate, loss, average) in enumerate(rows, 1)
        )


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
    losses = tuple(decode_number(loss) for loss in read_json(scratch.tried_losses))
    folder = _free_folder(run)
    found = FoundRate(
        name=run.name,
        folder=folder.path,
        rate=run.optimization.learning_rate,
        tried=tried,
        losses=losses,
        advice=advise_rate(losses, tried),
        num_epochs=num_epochs(run, tried),
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
    return tried.num_steps * run.batch.global_batch_size / run.data.train.num_rows


def heading(run: RunPlan, tried: RateRange) -> str:
    """What the test does, and what it leaves alone."""
    epochs = num_epochs(run, tried)
    again = f", {epochs:.1f} times over the {run.data.train.num_rows} there are" if epochs > 1 else ""
    return (
        f"Learning rates from {tried.low:.2g} to {tried.high:.2g} in {tried.num_steps} steps of {run.batch.global_batch_size} "
        f"rows{again}, from a copy on the workers of the run. Run {run.name!r} is left as it is."
    )


def _free_folder(run: RunPlan) -> RatesFolder:
    """Named like the run; a test takes no other's place."""
    names = (f"{run.name}{'' if number == 1 else f'-{number}'}" for number in count(1))
    folders = (RatesFolder(run.storage, name) for name in names)
    return next(folder for folder in folders if not exists(folder.path))
