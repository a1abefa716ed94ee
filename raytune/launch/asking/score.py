"""Score rows under the weights of a run: tokens as the run makes them, the workers of a run, a table of losses at the end."""

import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from itertools import count
from typing import Any

from raytune.config.sections.cluster import ClusterSection
from raytune.config.sections.data import DataSource, source_name
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.evaluation.perplexity import perplexity
from raytune.evaluation.scored_rows import TABLES, ScoredRow, csv_table, jsonl_table, read_jsonl_table
from raytune.launch.attempts.going_on import task_failed
from raytune.launch.attempts.trainer import fit
from raytune.launch.cluster.cluster import connect, map_on_cluster
from raytune.launch.data.base_here import refuse_changed_base
from raytune.launch.data.rows_to_score import as_text, look_at_rows, tokenised
from raytune.launch.data.stores import store_plan_of
from raytune.launch.state.record import RunRecord, read_plan, readable
from raytune.metrics.history import History
from raytune.metrics.json_numbers import encode_number
from raytune.model.adapters import adapting
from raytune.plan.data.data_report import StoreReport, store_text
from raytune.plan.run_plan import ModelPlan, RunPlan
from raytune.plan.scoring import Weights, scoring_plan
from raytune.run_folder import RunFolder
from raytune.storage import absolute, exists, is_local, local_path, read_bytes, remove_folder, write_bytes
from raytune.training.checkpoints.commit import best_commit, committed, measured

ATTEMPT = 1
HERE = "here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The rows of a data set with their losses.

    Attributes:
        weights: what they were scored under: the final model, or a checkpoint of a run that has not finished.
        output: where the table lies.
        rows: in the order of the files; those that could not be scored are missing, and counted in `report`.
        report: what became of the rows.
    """

    run: str
    weights: str
    output: str
    rows: tuple[ScoredRow, ...]
    report: StoreReport

    @property
    def loss(self) -> float:
        """Mean over all targets of all rows."""
        return sum(row.loss * row.targets for row in self.rows) / sum(row.targets for row in self.rows)

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def num_lost(self) -> int:
        """Rows that were read and have no score."""
        return self.report.total("rows") - self.report.total("used")

    @property
    def lines(self) -> list[str]:
        """What a person reads: the mean, what became of the rows, and where the table is."""
        targets = sum(row.targets for row in self.rows)
        lost = f"; {self.num_lost} row{'s' * (self.num_lost != 1)} without a score" if self.num_lost else ""
        return [
            f"{len(self.rows)} rows scored under {self.weights}: loss {self.loss:.4f}, perplexity {self.perplexity:.3f} over "
            f"{targets} targets{lost}",
            *(f"rows     {line}" for line in store_text(self.report)),
            f"table    {self.output}",
        ]

    def to_json(self) -> dict[str, Any]:
        """The facts without the rows, which are in the table."""
        return {
            "run": self.run,
            "weights": self.weights,
            "output": self.output,
            "num_rows": len(self.rows),
            "num_lost": self.num_lost,
            "loss": encode_number(self.loss),
            "perplexity": encode_number(self.perplexity),
            "data_report": self.report.model_dump(mode="json"),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunToScore:
    """A run under whose weights rows are scored, and where they are."""

    folder: RunFolder
    record: RunRecord
    config: RunConfig
    """That it was started with."""
    plan: RunPlan
    cluster: ClusterSection
    """Of the config, or of the address that was given instead."""

    @property
    def weights(self) -> Weights:
        """The final model of a finished run, else the best checkpoint.

        Raises:
            UserError: if there is neither.
        """
        if self.record.state == "finished":
            return Weights(folder=self.folder, step=None)
        known = {point.step: point.evaluation for point in History.read(self.folder.metrics).points}
        commit = best_commit(measured(committed(self.folder), known), self.plan.checkpoint.metric, self.plan.checkpoint.mode)
        if commit is None:
            raise UserError(f"Run {self.folder.name!r} in {self.folder.storage} has neither finished nor saved a checkpoint yet.")
        return Weights(folder=self.folder, step=commit.step)


def run_to_score(run: str, address: str | None = None) -> RunToScore:
    """Read what is to be known of a run.

    Args:
        run: a run folder.
        address: of a Ray cluster, as `cluster.address`, instead of the run's; HERE starts one inside this machine.

    Raises:
        UserError: if there is no such run, or another raytune wrote it.
    """
    parent, _, name = absolute(run).rpartition("/")
    folder = RunFolder(parent, name)
    record = RunRecord.read(folder)
    if record is None or not exists(folder.plan):
        raise UserError(f"{folder.path} is no run folder: it holds no run.json and plan.json. Name the folder of a run.")
    with readable(folder.run, folder):
        config = RunConfig.model_validate(record.config)
    cluster = config.cluster
    if address is not None:
        cluster = cluster.model_copy(update={"address": None if address == HERE else address})
    return RunToScore(folder=folder, record=record, config=config, plan=read_plan(folder), cluster=cluster)


def score(run: RunToScore, sources: Sequence[DataSource], *, output: str | None = None) -> Scores:
    """Score every row of the sources under the weights of a run, on the cluster that the run names or inside this machine.

    A finished run is scored by its final model, another one by its best checkpoint. Rows are read, rendered and cut as those of
    the run are; what cannot be used is left out and counted.

    Args:
        output: file for the table, .jsonl or .csv. Default: `scores/NAME.jsonl` in the run folder.

    Raises:
        UserError: before anything is started, if the run has no weights yet, or no row can be scored.
        RaytuneError: if the workers failed.
    """
    if output is not None and not output.endswith(TABLES):
        raise UserError(f"--output is {output}, expected a name that ends in {' or '.join(TABLES)}.")
    folder, cluster, weights = run.folder, run.cluster, run.weights
    plan = run.plan.model_copy(update={"model": standing_alone(run.plan, weights)})
    table = _table_for(sources, folder, output)
    refuse_changed_base(plan.model)
    if not plan.template:  # nothing but plain text was trained
        sources = as_text(sources)
    look_at_rows(sources)
    with connect(cluster, scales=False) as machine:
        info = tokenised(sources, run.config, plan, folder.storage, partial(map_on_cluster, start_timeout=cluster.start_timeout))
        scoring = scoring_plan(plan, machine, weights).model_copy(
            update={
                "storage": folder.scores,
                "name": f"{_name_of(sources)}-{uuid.uuid4().hex[:8]}.unfinished",
                "data": plan.data.model_copy(
                    update={"train": store_plan_of("rows", info), "validation": [], "test": [], "stream": None}
                ),
            }
        )
        failure = fit(scoring, ATTEMPT, lambda: None, "score", weights.request)
    scratch = RunFolder(scoring.storage, scoring.name)
    if failure is not None:
        raise task_failed("Scoring", failure, scratch)
    rows = read_jsonl_table(read_bytes(scratch.scored_rows))
    write_bytes(table, csv_table(rows) if table.endswith(".csv") else jsonl_table(rows))
    remove_folder(scratch.path, scratch.storage)
    return Scores(run=folder.path, weights=str(weights), output=table, rows=rows, report=info.report)


def standing_alone(plan: RunPlan, weights: Weights) -> ModelPlan:
    """What is loaded of a run: a final model that was trained whole needs its base no more, whose place it takes."""
    if weights.step is not None or not adapting(plan.adapter).is_whole or not is_local(weights.folder.model):
        return plan.model
    folder = str(local_path(weights.folder.model))
    return plan.model.model_copy(update={"path": folder, "revision": None, "content": None, "new_tokens": []})


def _name_of(sources: Sequence[DataSource]) -> str:
    """Of the table: the first source's, as far as a file can be called that."""
    return re.sub(r"[^\w.-]+", "-", source_name(sources[0])).strip("-.") or "rows"


def _table_for(sources: Sequence[DataSource], folder: RunFolder, output: str | None) -> str:
    """Where the table is to lie. One that nobody named takes no other's place.

    Raises:
        UserError: if it would take the place of rows.
    """
    if output is None:
        names = (f"{folder.scores}/{_name_of(sources)}{'' if number == 1 else f'-{number}'}.jsonl" for number in count(1))
        return next(name for name in names if not exists(name))
    table = absolute(output)
    read = [path for source in sources if is_local(source.path) for path in glob(str(local_path(source.path)), recursive=True)]
    if is_local(table) and any(os.path.exists(table) and os.path.samefile(path, table) for path in read):
        raise UserError(f"--output is {output}, which holds the rows that are to be scored. Name another file.")
    return table
