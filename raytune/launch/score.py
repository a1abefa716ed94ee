"""Score rows under the weights of a run: tokens as the run makes them, the workers of a run, a table of losses at the end."""

import csv
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from glob import glob
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any, get_args

from raytune.config.cluster import ClusterSection
from raytune.config.data import DataFormat, DataSource, source_name
from raytune.config.run import RunConfig
from raytune.data.build import ParallelMap, StoreRequest, build_store
from raytune.data.source_rows import formats_of
from raytune.data.sources import find_files, scan
from raytune.data.store import Store, StoreInfo
from raytune.data.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.errors import ClusterError, RaytuneError, UserError
from raytune.evaluate.perplexity import perplexity
from raytune.launch.attempts import Failure, details
from raytune.launch.base_here import refuse_changed_base
from raytune.launch.cluster import connect, map_on_cluster
from raytune.launch.going_on import tracebacks
from raytune.launch.record import RunRecord, read_plan, readable
from raytune.launch.stores import STORES_FOLDER, store_plan_of
from raytune.launch.trainer import fit
from raytune.metrics import decode_number, encode_number
from raytune.model.adapters import adapting
from raytune.plan.data_report import StoreReport, store_text
from raytune.plan.machine import Machine
from raytune.plan.run_plan import ModelPlan, RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import absolute, exists, is_local, local_path, read_bytes, remove_folder, write_bytes
from raytune.training.commit import best_commit, committed

TABLES = (".jsonl", ".csv")
ATTEMPT = 1
HERE = "here"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRow:
    file: str
    """As it was named."""
    row: int
    """Its number in the file, from 1: a line, or in a Parquet file or data set a row."""
    targets: int
    """Tokens that the loss is a mean of."""
    loss: float
    """Mean cross-entropy per target, in nats."""
    perplexity: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"loss": encode_number(self.loss), "perplexity": encode_number(self.perplexity)}


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


def cluster_of(run: str, address: str | None = None) -> ClusterSection:
    """Where a run is scored; arguments as for `score`."""
    section = _config_of(_run_folder(run)).cluster
    return section if address is None else section.model_copy(update={"address": None if address == HERE else address})


def score(run: str, sources: Sequence[DataSource], *, output: str | None = None, address: str | None = None) -> Scores:
    """Score every row of the sources under the weights of a run, on the cluster that the run names or inside this machine.

    A finished run is scored by its final model, another one by its best checkpoint. Rows are read, rendered and cut as those of
    the run are; what cannot be used is left out and counted.

    Args:
        run: a run folder.
        output: file for the table, .jsonl or .csv. Default: `scores/NAME.jsonl` in the run folder.
        address: of a Ray cluster, as `cluster.address`, instead of the run's; HERE starts one inside this machine.

    Raises:
        UserError: before anything is started, if there is no such run, it has no weights yet, or no row can be scored.
        RaytuneError: if the workers failed.
    """
    if output is not None and not output.endswith(TABLES):
        raise UserError(f"--output is {output}, expected a name that ends in {' or '.join(TABLES)}.")
    folder = _run_folder(run)
    config, cluster = _config_of(folder), cluster_of(run, address)
    plan, weights = read_plan(folder), _weights_of(folder)
    plan = plan.model_copy(update={"model": standing_alone(plan, weights)})
    table = _table_for(sources, folder, output)
    refuse_changed_base(plan.model)
    if not plan.template:  # nothing but plain text was trained
        sources = as_text(sources)
    _look_at_rows(sources)
    with connect(cluster, scales=False) as machine:
        info = tokenised(sources, config, plan, folder.storage, partial(map_on_cluster, start_timeout=cluster.start_timeout))
        scoring = scoring_plan(plan, machine, weights).model_copy(
            update={
                "storage": folder.scores,
                "name": f"{_name_of(sources)}-{uuid.uuid4().hex[:8]}.unfinished",
                "data": plan.data.model_copy(update={"train": store_plan_of("rows", info), "validation": []}),
            }
        )
        failure = fit(scoring, ATTEMPT, lambda: None, "score", weights.request)
    scratch = RunFolder(scoring.storage, scoring.name)
    if failure is not None:
        raise _failed(failure, scratch)
    rows = read_scores(scratch)
    write_bytes(table, _table(rows, as_csv=table.endswith(".csv")))
    remove_folder(scratch.path, scratch.storage)
    return Scores(run=folder.path, weights=str(weights), output=table, rows=rows, report=info.report)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What rows are scored under."""

    folder: RunFolder
    step: int | None
    """Of a checkpoint; None: the final model."""

    @property
    def request(self) -> dict[str, Any]:
        """What the workers are asked (training.score)."""
        if self.step is None:
            return {"saved_model": self.folder.model}
        return {"checkpoint": {"storage": self.folder.storage, "name": self.folder.name, "step": self.step}}

    def __str__(self) -> str:
        return "the final model" if self.step is None else f"the checkpoint of step {self.step}"


def standing_alone(plan: RunPlan, weights: Weights) -> ModelPlan:
    """What is loaded of a run: a final model that was trained whole needs its base no more, whose place it takes."""
    if weights.step is not None or not adapting(plan.adapter).is_whole or not is_local(weights.folder.model):
        return plan.model
    folder = str(local_path(weights.folder.model))
    return plan.model.model_copy(update={"path": folder, "revision": None, "content": None})


def sources_of(
    rows: Sequence[str], row_format: str, max_rows: int | None, columns: Mapping[str, str] | None = None
) -> list[DataSource]:
    """What `data.train` would be for these files.

    Args:
        columns: names of columns where they are not those of the format, as `data.train.columns`.

    Raises:
        UserError: if there is no such format.
    """
    formats = [*get_args(DataFormat), "auto"]
    if row_format not in formats:
        raise UserError(f"--format is {row_format!r}, expected one of {', '.join(formats)}.")
    of_all = {"format": row_format, "max_rows": max_rows, "columns": dict(columns or {})}
    return [DataSource.model_validate({"path": path} | of_all) for path in rows]


def as_text(sources: Sequence[DataSource]) -> list[DataSource]:
    """Rows for a run that was trained on plain text, and so has no template for others.

    Raises:
        UserError: if they are named as others.
    """
    other = next((source.format for source in sources if source.format not in ("auto", "text")), None)
    if other is not None:
        raise UserError(f"--format is {other}, but the run was trained on plain text, and has no template for turns. Score text.")
    return [source.model_copy(update={"format": "text"}) for source in sources]


def columns_of(text: str | None) -> dict[str, str]:
    """Columns by their names in the format, of `prompt=question,completion=answer`.

    Raises:
        UserError: if it is written in another way.
    """
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    if any(not (name.strip() and column.strip()) for name, _, column in pairs):
        raise UserError(f"--columns is {text!r}, expected names as in prompt=question,completion=answer.")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _look_at_rows(sources: Sequence[DataSource]) -> None:
    """Refuse local files that are missing, or whose rows have no format, before a cluster is started for them."""
    local = [source for source in sources if is_local(source.path)]
    formats_of(local, [[scan(file, source.max_rows) for file in find_files(source, Path())] for source in local])


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


def _refuse_alike(info: StoreInfo) -> None:
    """Refuse rows that a file and a line do not tell apart, since each is to have a loss of its own."""
    store = Store.open(info.path)
    named = {source for row in range(store.num_rows) for source in store.sources(row)}
    if len(named) < info.report.total("used"):
        used = info.report.total("used")
        raise UserError(
            f"{used} rows stand on {len(named)} lines, so that a table cannot tell them apart: several objects of a JSON array "
            f"on one line, or a file that is named twice. Write a row per line (.jsonl), and name each file once."
        )


def scoring_plan(plan: RunPlan, machine: Machine, weights: Weights) -> RunPlan:
    """The plan of a run, for scoring on the machines that are there: nothing of it that only training needs.

    Raises:
        UserError: if a checkpoint is loaded whose division does not fit the machines.
    """
    divides_as_before = weights.step is not None and plan.engine.zero_stage > 0
    on_gpus = machine.num_gpus > 0
    room = machine.num_gpus if on_gpus else int(machine.num_cpus // max(plan.cluster.cpus_per_worker, 1e-9))
    workers = max(1, min(plan.batch.workers, room))
    if divides_as_before and workers < plan.batch.workers:
        raise UserError(
            f"The checkpoints of run {plan.name!r} are divided among {plan.batch.workers} workers (ZeRO stage "
            f"{plan.engine.zero_stage}), and here is room for {workers}. Score it where the run is trained, or when it has "
            f"finished."
        )
    keeps_shards = divides_as_before or (plan.engine.zero_stage == 3 and workers == plan.batch.workers)
    whole = plan.engine.model_copy(
        update={"kind": "plain", "zero_stage": 0, "offload_optimizer": "none", "offload_parameters": "none", "nvme_path": None}
    )
    is_here = plan.model.attention in machine.attention or not plan.model.packs
    is_fp16_here = plan.precision == "fp16" and not on_gpus  # CPUs compute some products in fp16 not at all, others slowly
    precision = "fp32" if is_fp16_here else plan.precision
    quantization = plan.model.quantization
    if quantization and is_fp16_here:
        quantization = quantization.model_copy(update={"compute_dtype": precision})
    return plan.model_copy(
        update={
            "precision": precision,
            "batch": plan.batch.model_copy(update={"workers": workers, "accumulation": 1}),
            "engine": plan.engine if keeps_shards else whole,
            "model": plan.model.model_copy(
                update={
                    "attention": plan.model.attention if is_here else machine.attention[0],
                    "dtype": precision if is_fp16_here else plan.model.dtype,
                    "compute_dtype": precision,
                    "quantization": quantization,
                    "gradient_checkpointing": False,
                    "compile": False,
                    "liger": plan.model.liger and on_gpus,
                    "neftune_noise_alpha": 0.0,
                }
            ),
            "cluster": plan.cluster.model_copy(
                update={"device": "cuda" if on_gpus else "cpu", "gpus_per_worker": int(on_gpus), "max_failures": 0}
            ),
        }
    )


def _run_folder(run: str) -> RunFolder:
    parent, _, name = absolute(run).rpartition("/")
    return RunFolder(parent, name)


def _config_of(folder: RunFolder) -> RunConfig:
    record = RunRecord.read(folder)
    if record is None or not exists(folder.plan):
        raise UserError(f"{folder.path} is no run folder: it holds no run.json and plan.json. Name the folder of a run.")
    with readable(folder.run, folder):
        return RunConfig.model_validate(record.config)


def _weights_of(folder: RunFolder) -> Weights:
    """The final model of a finished run, else the best checkpoint.

    Raises:
        UserError: if there is neither.
    """
    record, plan = RunRecord.read(folder), read_plan(folder)
    if record is not None and record.state == "finished":
        return Weights(folder=folder, step=None)
    commit = best_commit(committed(folder), plan.checkpoint.metric, plan.checkpoint.mode)
    if commit is None:
        raise UserError(f"Run {folder.name!r} in {folder.storage} has neither finished nor saved a checkpoint yet.")
    return Weights(folder=folder, step=commit.step)


def tokenised(
    sources: Sequence[DataSource], config: RunConfig, plan: RunPlan, storage: str, parallel_map: ParallelMap
) -> StoreInfo:
    """Rows as the run would train on them, in a store beside its own.

    Raises:
        UserError: if none can be scored, nothing tells them apart, or there is no place for the store.
    """
    data, model = config.data, plan.model
    if data.store is None and not is_local(storage):
        raise UserError(
            f"The run lies in {storage}, but tokenised rows are mapped into memory from files, and its config names no "
            f"data.store. Copy its folder to a disk that every node mounts."
        )
    tokenizer = open_tokenizer(model.path, model.revision, model.trust_remote_code)
    request = StoreRequest(
        sources=tuple(sources),
        template=plan.template,
        targets=data.targets if isinstance(data.targets, str) else tuple(data.targets),
        max_length=plan.data.row_length,
        too_long="drop" if data.too_long == "error" else data.too_long,  # counted, as all that has no score
        packing=data.packing,
        on_bad_row="skip",
        on_prompt_mismatch="accept",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    info = build_store(
        request,
        tokenizer_path=model.path,
        tokenizer_revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        folder=data.store or f"{storage}/{STORES_FOLDER}",
        parallel_map=parallel_map,
    )
    _refuse_alike(info)
    return info


def read_scores(folder: RunFolder) -> tuple[ScoredRow, ...]:
    """What the workers have left."""
    lines = read_bytes(folder.scored_rows).splitlines()
    return tuple(_row_of(json.loads(line)) for line in lines)


def _failed(failure: Failure, scratch: RunFolder) -> RaytuneError:
    lines = [
        *([where] if (where := tracebacks(scratch, ATTEMPT)) else []),
        *details(failure.message),
        f"Scoring failed: {failure.headline}",
    ]
    return (ClusterError if failure.may_pass else RaytuneError)("\n".join(lines))


def _row_of(values: Mapping[str, Any]) -> ScoredRow:
    loss, value = decode_number(values["loss"]), decode_number(values["perplexity"])
    return ScoredRow(file=values["file"], row=values["row"], targets=values["targets"], loss=loss, perplexity=value)


def _table(rows: Sequence[ScoredRow], *, as_csv: bool) -> bytes:
    if not as_csv:
        return "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows).encode()
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(ScoredRow.__dataclass_fields__)
    writer.writerows(row.to_json().values() for row in rows)
    return text.getvalue().encode()
