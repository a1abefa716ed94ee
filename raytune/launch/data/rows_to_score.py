"""Rows that are to be scored: named as `data.train` names them, looked at, and tokenised as the run would train on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from raytune.config.sections.adapter import num_virtual_tokens
from raytune.config.sections.data import DataFormat, DataSource
from raytune.config.sections.run import RunConfig
from raytune.data.conversations.shaping import Shape
from raytune.data.files.source_files import find_files
from raytune.data.files.sources import scan
from raytune.data.rows.shards import ParallelMap
from raytune.data.rows.source_rows import readings_of
from raytune.data.store.build import build_store
from raytune.data.store.request import StoreRequest
from raytune.data.store.store import Store, StoreInfo
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.errors import UserError
from raytune.launch.data.stores import STORES_FOLDER
from raytune.launch.data.tokenising import show_tokenising
from raytune.plan.run_plan import RunPlan
from raytune.storage import is_local


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


def look_at_rows(sources: Sequence[DataSource]) -> None:
    """Refuse local files that are missing, or whose rows have no format, before a cluster is started for them."""
    local = [source for source in sources if is_local(source.path)]
    readings_of(local, [[scan(file, source.max_rows) for file in find_files(source, Path())] for source in local])


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
    tokenizer = open_tokenizer(model.path, model.revision, model.trust_remote_code, model.new_tokens)
    request = StoreRequest(
        sources=tuple(sources),
        template=plan.template,
        shape=Shape.of(data),
        targets=data.targets if isinstance(data.targets, str) else tuple(data.targets),
        train_empty_thought=data.train_empty_thought,
        max_length=plan.data.row_length,
        too_long="drop" if data.too_long == "error" else data.too_long,  # counted, as all that has no score
        packing=data.packing,
        num_virtual=0 if data.packing == "none" else num_virtual_tokens(plan.adapter),
        on_bad_row="skip",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    info = build_store(
        request,
        tokenizer_path=model.path,
        tokenizer_revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        new_tokens=model.new_tokens,
        folder=data.store or f"{storage}/{STORES_FOLDER}",
        parallel_map=parallel_map,
        watch=show_tokenising,
    )
    _refuse_alike(info)
    return info


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
