"""Build the tokenised store, under an address that covers everything that decides its tokens (`store_request`).

A store is built in a draft (`drafts`) and renamed into place whole, so that who finds one finds a complete one. Of several that
would build it at once one does, and who comes after a killed one goes on with the shards that are done.
"""

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from raytune.config.data import DataSource
from raytune.config.model import NewToken
from raytune.data.drafts import SHARDS_FOLDER, Standing, Watch, held, noting, remove_unfinished, tidy, unwatched
from raytune.data.finished_shards import shard_address
from raytune.data.prompts import TOLERATED_SHARE
from raytune.data.reading_through import scan_sources
from raytune.data.recognising import Reading
from raytune.data.row_file import SourceUse, WrittenRows, write_rows
from raytune.data.shards import (
    ShardPart,
    ShardResult,
    ShardTask,
    Tally,
    TokenisingOptions,
    TooLong,
    bad_rows_error,
    prompt_mismatch_error,
    resolved_too_long,
    too_long_error,
)
from raytune.data.source_rows import readings_of
from raytune.data.sources import ScannedFile
from raytune.data.store import META_FILE, ROWS_FILE, StoreInfo, checksum_of, read_info
from raytune.data.store_place import intact, put_in_place
from raytune.data.store_request import StoreRequest, code_fingerprint, last_part
from raytune.errors import DataError, StorageFullError
from raytune.local_files import sync_local_folder
from raytune.plan.data_report import COUNTS, SourceReport, StoreReport
from raytune.plan.mixing import passes_of_epoch
from raytune.storage import file_digest, is_local, local_path, write_json

_MIN_SHARD_SEGMENTS = 2
_MAX_SHARDS = 256

_log = logging.getLogger(__name__)

ParallelMap = Callable[[Callable[[ShardTask], ShardResult], Sequence[ShardTask]], Iterable[ShardResult]]


def build_store(
    request: StoreRequest,
    *,
    tokenizer_path: str,
    folder: str | Path,
    tokenizer_revision: str | None = None,
    trust_remote_code: bool = False,
    new_tokens: Sequence[NewToken] = (),
    parallel_map: ParallelMap = map,
    watch: Watch = unwatched,
) -> StoreInfo:
    """Tokenise and pack what the request asks for, or find that it was done before.

    Args:
        tokenizer_path: folder or hub id of the tokenizer, for every process that `parallel_map` uses.
        new_tokens: that it is given.
        folder: local folder for stores, readable and writable for all these processes.
        parallel_map: calls a function on every task and gives each result when it is there.
        watch: is told how far it is.

    Raises:
        StorageFullError: if there is no room for tokenised rows.
        DataError: if rows cannot be used (and the policy is to stop), or nothing is left to train on; the message has counts, and
            the first rows with file and line.
    """
    if not is_local(folder):
        raise DataError(
            f"data.store is {folder}, but tokenised rows are mapped into memory. Set it to a folder that every node mounts."
        )
    from raytune.data.tokenising import tokenise_shard  # workers open stores and need none of its libraries

    stores = local_path(folder)
    with watch() as report, _downloads(stores, request) as downloads:
        scanned = scan_sources(request.sources, downloads, report)
        readings = readings_of(request.sources, scanned)
        policies: list[TooLong] = [resolved_too_long(request.too_long, reading.format) for reading in readings]
        address = request.address([[file.fingerprint for file in files] for files in scanned], policies)
        final, draft = stores / address, stores / f"draft-{address}"
        if (found := intact(final)) is not None:
            return _with_its_prompts(found, request)
        options = TokenisingOptions(
            tokenizer_path=tokenizer_path,
            tokenizer_revision=tokenizer_revision,
            trust_remote_code=trust_remote_code,
            new_tokens=tuple(new_tokens),
            tokenizer_fingerprint=request.tokenizer_fingerprint,
            template=request.template,
            targets=request.targets,
            token_classes=request.token_classes,
            max_length=request.max_length,
            side=request.side,
            validation_fraction=request.validation_fraction,
        )
        with held(draft, report) as is_alone:
            info = intact(final)  # another builder has been quicker
            if info is None:
                if final.exists():
                    _log.warning("The store %s is damaged: its rows are tokenised again.", final)
                tasks = _shards(request.sources, scanned, readings, policies, options, draft)
                if is_alone:
                    remove_unfinished(draft)
                    tidy(draft, [Path(task.output).name for task in tasks], time.time())
                standing = Standing(total_rows=_about_rows(request, scanned), num_shards=len(tasks))
                try:
                    with noting(draft, standing, report), _full_disk_in_words(stores, standing):
                        results = _tokenised(partial(parallel_map, tokenise_shard), tasks, standing)
                        info = _written(request, scanned, readings, policies, results, draft, final)
                except FileNotFoundError:  # removed by another builder in this draft, who is done
                    if (info := intact(final)) is None:
                        raise
            shutil.rmtree(draft, ignore_errors=True)
        return _with_its_prompts(info, request)


@contextmanager
def _downloads(stores: Path, request: StoreRequest) -> Iterator[Path]:
    """A folder for files behind URLs, while they are read."""
    draft = stores / f"draft-{uuid.uuid4().hex[:12]}"
    if all(is_local(source.path) for source in request.sources):
        yield draft  # where nothing comes
        return
    with held(draft, lambda progress: None):
        try:
            yield draft / "downloads"
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _tokenised(
    tokenise: Callable[[Sequence[ShardTask]], Iterable[ShardResult]], tasks: Sequence[ShardTask], standing: Standing
) -> list[ShardResult]:
    """All shards in order, made or found in the draft."""
    left = {task.number for task in tasks if Path(task.output).exists()}
    standing.shards_found = len(left)
    results: list[ShardResult] = []
    for result in tokenise(tasks):
        results.append(result)
        rows = result.tally.counts["rows"]
        standing.rows_done += rows
        standing.shards_done += 1
        if result.was_found:
            standing.rows_found += rows
    standing.is_packing = True
    results.sort(key=lambda result: result.number)
    if damaged := [result for result in results if result.number in left and not result.was_found]:
        _log.warning(
            "%d of %d shards that a build before this one left were damaged and have been tokenised again; the first is %s.",
            len(damaged),
            len(left),
            Path(damaged[0].path).parent,
        )
    return results


@contextmanager
def _full_disk_in_words(stores: Path, standing: Standing) -> Iterator[None]:
    """Say of a full disk what it was full of, and what became of the work.

    Raises:
        StorageFullError: if it is full.
    """
    try:
        yield
    except StorageFullError as error:
        raise StorageFullError(
            f"There is no room for tokenised rows in {stores} on {os.uname().nodename}: {error.__cause__ or error}. Free some "
            f"space, or set data.store to a folder with more of it. {standing.shards_done} of {standing.num_shards} shards are "
            f"done; they stay there, and the same command goes on from them."
        ) from error


def _about_rows(request: StoreRequest, scanned: Sequence[Sequence[ScannedFile]]) -> int | None:
    """Rows that will be read, about; None where nothing tells."""
    total = 0
    for source, files in zip(request.sources, scanned, strict=True):
        known = [file.about_rows for file in files if file.about_rows is not None]
        if len(known) < len(files):
            return None
        total += sum(known) if source.max_rows is None else min(source.max_rows, sum(known))
    return total


def _written(
    request: StoreRequest,
    scanned: Sequence[Sequence[ScannedFile]],
    readings: Sequence[Reading],
    policies: Sequence[TooLong],
    results: Sequence[ShardResult],
    draft: Path,
    final: Path,
) -> StoreInfo:
    """The store of tokenised shards, at its address."""
    tallies = _checked_tallies(request, results)
    built = draft / f"store-{uuid.uuid4().hex[:12]}"
    built.mkdir()
    uses = _uses(request, tallies)
    written = write_rows(built / ROWS_FILE, results, uses, request.max_length, request.packing, request.num_virtual)
    _refuse_empty_parts(request, tallies, written)
    digest = file_digest(built / ROWS_FILE)
    meta = {
        "address": final.name,
        "source_files": [file.file.name for source_files in scanned for file in source_files],
        "size": digest.size,
        "sha256": digest.sha256,
        **written.sizes,
        "report": _report(request, scanned, readings, policies, tallies, uses, written).model_dump(mode="json"),
    }
    write_json(built / META_FILE, meta | {"checksum": checksum_of(meta)})
    sync_local_folder(built)
    return put_in_place(built, final, read_info(final, meta), intact)


def _report(
    request: StoreRequest,
    scanned: Sequence[Sequence[ScannedFile]],
    readings: Sequence[Reading],
    policies: Sequence[TooLong],
    tallies: Sequence[Tally],
    uses: Sequence[SourceUse],
    written: WrittenRows,
) -> StoreReport:
    sources = [
        SourceReport(
            name=last_part(source.path),
            format=reading.format,
            files=_files_in(source, files),
            too_long=policy,
            unread_columns=dict(tally.unread_columns),
            unread_keys=dict(tally.unread_keys),
            targets_of_class={str(one): tally.targets_of_class[str(one)] for one in request.token_classes},
            examples=tally.examples,
            loss_weight=use.loss_weight,
            passes=use.passes,
            mixed=written.mixed[number] if written.mixed else None,
            is_replayed=number >= len(request.sources) - request.mixture.num_replayed,
            **{count: tally.counts[count] for count in COUNTS},
        )
        for number, (source, files, reading, policy, tally, use) in enumerate(
            zip(request.sources, scanned, readings, policies, tallies, uses, strict=True)
        )
    ]
    return StoreReport(row_length=request.max_length, num_rows=written.sizes["num_rows"], sources=sources)


def _files_in(source: DataSource, files: Sequence[ScannedFile]) -> list[str]:
    """Names of the files that a source stands for, where it is not one itself."""
    names = [last_part(file.file.name) for file in files]
    return [] if names == [last_part(source.path)] else names


def _uses(request: StoreRequest, tallies: Sequence[Tally]) -> list[SourceUse]:
    """What is made of each source, once it is known how much there is of it."""
    names = [source.path for source in request.sources]
    passes = passes_of_epoch(request.mixture, [tally.counts["targets"] for tally in tallies], names)
    weights = request.loss_weights or (1.0,) * len(names)
    return [SourceUse(passes=each, loss_weight=weight) for each, weight in zip(passes, weights, strict=True)]


def _refuse_empty_parts(request: StoreRequest, tallies: Sequence[Tally], written: WrittenRows) -> None:
    """Refuse a mixture that has no room for any document of a source that has some.

    Raises:
        DataError: with what to change.
    """
    for number, (tally, part) in enumerate(zip(tallies, written.mixed or [])):
        if tally.counts["documents"] and not part.documents:
            is_replayed = number >= len(request.sources) - request.mixture.num_replayed
            key = "strategy.replay.share" if is_replayed else "data.mixing"
            raise DataError(
                f"An epoch has no document of {request.sources[number].path}: the smallest is larger than its part. Raise that "
                f"({'strategy.replay.share' if is_replayed else 'its proportion, or data.mixing.temperature'}), or leave it out.",
                keys=(key, "data.train"),
            )


def _shards(
    sources: Sequence[DataSource],
    scanned: Sequence[Sequence[ScannedFile]],
    readings: Sequence[Reading],
    policies: Sequence[TooLong],
    options: TokenisingOptions,
    draft: Path,
) -> list[ShardTask]:
    """Divide all segments into tasks of similar size, in order. A source of which only the first rows count is one task."""
    groups: list[tuple[int, list[ShardPart]]] = []
    num_segments = sum(len(file.segments) for files in scanned for file in files)
    per_shard = max(_MIN_SHARD_SEGMENTS, -(-num_segments // _MAX_SHARDS))
    file_index = 0
    for number, (source, files, reading) in enumerate(zip(sources, scanned, readings, strict=True)):
        parts = []
        for file in files:
            parts += [
                ShardPart(segment=segment, file_index=file_index, reading=reading, fingerprint=file.fingerprint)
                for segment in file.segments
            ]
            file_index += 1
        step = len(parts) if source.max_rows is not None else per_shard
        groups += [(number, parts[start : start + step]) for start in range(0, len(parts), max(1, step))]
    tasks = [
        ShardTask(
            number=index,
            source=number,
            parts=tuple(parts),
            max_rows=sources[number].max_rows,
            too_long=policies[number],
            options=options,
            output="",
        )
        for index, (number, parts) in enumerate(groups)
    ]
    code = code_fingerprint()
    return [replace(task, output=str(draft / SHARDS_FOLDER / shard_address(task, code))) for task in tasks]


def _checked_tallies(request: StoreRequest, results: Sequence[ShardResult]) -> list[Tally]:
    """What happened in all shards of each source.

    Raises:
        DataError: if a policy says to stop, or nothing is left.
    """
    tallies, total = [Tally() for _ in request.sources], Tally()
    for result in results:
        tallies[result.source].merge(result.tally)
        total.merge(result.tally)
    counts = total.counts
    if counts["bad"] and request.on_bad_row == "error":
        raise bad_rows_error(total)
    if counts["dropped"] and request.too_long == "error":
        raise too_long_error(total, request.max_length)
    if not counts["documents"]:
        longer = f"data.max_length, {request.max_length} tokens"
        reasons = {
            "bad": "cannot be used",
            "dropped": f"are longer than {longer} (data.too_long: {request.too_long})",
            "cut_off": f"have their targets behind {longer}",
            "no_target": f"have no target (data.targets: {request.targets})",
            "other_side": f"lie on the other side of the split (data.validation_fraction: {request.validation_fraction})",
        }
        lost = [f"  {counts[what]} {why}{_first(total, what)}" for what, why in reasons.items() if counts[what]]
        names = ", ".join(source.path for source in request.sources)
        raise DataError("\n".join([f"No row of {names} can be trained on. Of {counts['rows']} rows", *lost]))
    return tallies


def _with_its_prompts(info: StoreInfo, request: StoreRequest) -> StoreInfo:
    """The store, unless the answers of a source are trained behind other tokens than their prompts have.

    Raises:
        DataError: if they are, and that is not accepted.
    """
    if request.on_prompt_mismatch == "error":
        for source in info.report.sources:
            if source.prompts_differ > TOLERATED_SHARE * source.prompts_compared:
                raise prompt_mismatch_error(source)
    return info


def _first(tally: Tally, what: str) -> str:
    return f"; the first is {tally.examples[what][0]}" if what in tally.examples else ""
