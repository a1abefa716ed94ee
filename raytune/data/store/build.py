"""Build the tokenised store, under an address that covers everything that decides its tokens (`store_request`).

A store is built in a draft (`drafts`) and renamed into place whole, so that who finds one finds a complete one. Of several that
would build it at once one does, and who comes after a killed one goes on with the shards that are done.
"""

import logging
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from raytune.config.sections.data import DataSource
from raytune.config.sections.model import NewToken
from raytune.data.files.sources import ScannedFile
from raytune.data.formats.recognising import Reading
from raytune.data.quality.quality import Findings, compared_with, look_at
from raytune.data.rows.shards import (
    ParallelMap,
    ShardPart,
    ShardResult,
    ShardTask,
    Tally,
    TokenisingOptions,
    TooLong,
    bad_rows_error,
    in_report,
    resolved_too_long,
    too_long_error,
)
from raytune.data.rows.source_rows import readings_of
from raytune.data.store.drafts import SHARDS_FOLDER, Standing, Watch, held, noting, remove_unfinished, tidy, unwatched
from raytune.data.store.finished_shards import shard_address
from raytune.data.store.place import intact, local_stores, put_in_place
from raytune.data.store.reading_through import scan_sources
from raytune.data.store.request import StoreRequest, code_fingerprint, last_part
from raytune.data.store.row_file import WrittenRows, write_rows
from raytune.data.store.shard_documents import SourceUse
from raytune.data.store.store import META_FILE, StoreInfo, checksum_of, read_info
from raytune.errors import DataError, StorageFullError
from raytune.local_files import sync_local_folder
from raytune.plan.data.data_report import COUNTS, EpochPart, SourceReport, StoreReport
from raytune.plan.data.mixing import passes_of_epoch
from raytune.storage import file_digest, is_local, write_json

_MIN_SHARD_SEGMENTS = 2
_MAX_SHARDS = 256

_log = logging.getLogger(__name__)


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
    stores = local_stores(folder)
    from raytune.data.store.tokenising import tokenise_shard  # workers open stores and need none of its libraries

    with watch() as report, _downloads(stores, request) as downloads:
        scanned = scan_sources(request.sources, downloads, report)
        readings = readings_of(request.sources, scanned)
        policies: list[TooLong] = [resolved_too_long(request.too_long, reading.format) for reading in readings]
        others = compared_with(request.quality, request.held_out, downloads) if request.quality else None
        fingerprints = [[file.fingerprint for file in files] for files in scanned]
        address = request.address(fingerprints, policies, others.fingerprints if others else ())
        final, draft = stores / address, stores / f"draft-{address}"
        if (found := intact(final)) is not None:
            _refuse_by_policy(request, _counted_again(found.report))
            return found
        options = tokenising_options(
            request,
            tokenizer_path=tokenizer_path,
            tokenizer_revision=tokenizer_revision,
            trust_remote_code=trust_remote_code,
            new_tokens=new_tokens,
        )
        with held(draft, report) as is_alone:
            info = intact(final)  # another builder has been quicker
            if info is None:
                if final.exists():
                    _log.warning("The store %s is damaged: its rows are tokenised again.", final)
                if is_alone:
                    remove_unfinished(draft)
                tasks, findings = _shards(request, scanned, readings, policies, options), None
                if request.quality and others:
                    findings = look_at(request.quality, tasks, _names(scanned), others, draft, parallel_map)
                    tasks = findings.tasks
                tasks = _with_places(tasks, draft)
                if is_alone:
                    tidy(draft, [Path(task.output).name for task in tasks], time.time())
                there = {task.number for task in tasks if Path(task.output).exists()}
                standing = Standing(total_rows=_about_rows(request, scanned), num_shards=len(tasks), shards_found=len(there))
                try:
                    with noting(draft, standing, report), _full_disk_in_words(stores, standing):
                        results = _tokenised(partial(parallel_map, tokenise_shard), tasks, there, standing)
                        info = _written(request, scanned, readings, policies, results, findings, draft, final)
                except FileNotFoundError:  # removed by another builder in this draft, who is done
                    if (info := intact(final)) is None:
                        raise
            shutil.rmtree(draft, ignore_errors=True)
        _refuse_by_policy(request, _counted_again(info.report))
        return info


@contextmanager
def _downloads(stores: Path, request: StoreRequest) -> Iterator[Path]:
    """A folder for files behind URLs, while they are read."""
    draft = stores / f"draft-{uuid.uuid4().hex[:12]}"
    if all(is_local(source.path) for source in request.all_sources):
        yield draft  # where nothing comes
        return
    with held(draft, lambda progress: None):
        try:
            yield draft / "downloads"
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _tokenised(
    tokenise: Callable[[Sequence[ShardTask]], Iterable[ShardResult]],
    tasks: Sequence[ShardTask],
    there: Collection[int],
    standing: Standing,
) -> list[ShardResult]:
    """All shards in order, made or found in the draft.

    Args:
        there: numbers of those that a build before this one left.
    """
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
    if damaged := [result for result in results if result.number in there and not result.was_found]:
        _log.warning(
            "%d of %d shards that a build before this one left were damaged and have been tokenised again; the first is %s.",
            len(damaged),
            len(there),
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
    findings: Findings | None,
    draft: Path,
    final: Path,
) -> StoreInfo:
    """The store of tokenised shards, at its address."""
    tallies = _checked_tallies(request, results)
    built = draft / f"store-{uuid.uuid4().hex[:12]}"
    built.mkdir()
    uses = _uses(request, tallies)
    written = write_rows(built, results, uses, request.max_length, request.packing, request.num_virtual)
    _refuse_empty_parts(request, tallies, written)
    report = _report(request, scanned, readings, policies, tallies, uses, written)
    report = findings.told_in(report) if findings else report
    epoch = written.epoch
    meta = {
        "address": final.name,
        "source_files": _names(scanned),
        "files": {file.name: asdict(file_digest(file)) for file in sorted(built.iterdir())},
        "drawn": [asdict(part) for part in written.drawn],
        "num_rows": written.num_rows,
        "rows_per_epoch": epoch.rows,
        "num_documents": epoch.documents,
        "num_tokens": epoch.tokens,
        "num_targets": epoch.targets,
        "num_bytes": epoch.bytes,
        "longest_document": epoch.longest_document,
        "report": report.model_dump(mode="json"),
    }
    write_json(built / META_FILE, meta | {"checksum": checksum_of(meta)})
    sync_local_folder(built)
    return put_in_place(built, final, read_info(final, meta), intact)


def tokenising_options(
    request: StoreRequest,
    *,
    tokenizer_path: str,
    tokenizer_revision: str | None,
    trust_remote_code: bool,
    new_tokens: Sequence[NewToken],
) -> TokenisingOptions:
    """What a request asks to be done with every row of every source."""
    return TokenisingOptions(
        tokenizer_path=tokenizer_path,
        tokenizer_revision=tokenizer_revision,
        trust_remote_code=trust_remote_code,
        new_tokens=tuple(new_tokens),
        tokenizer_fingerprint=request.tokenizer_fingerprint,
        template=request.template,
        shape=request.shape,
        targets=request.targets,
        train_empty_thought=request.train_empty_thought,
        token_classes=request.token_classes,
        max_length=request.max_length,
        side=request.side,
        split=request.split,
    )


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
            loss_weight=use.loss_weight,
            passes=passes,
            mixed=None if all(each == 1 for each in written.passes) else _part_of_epoch(tally, passes),
            is_replayed=number >= len(request.sources) - request.mixture.num_replayed,
            **in_report(tally, request.token_classes),
        )
        for number, (source, files, reading, policy, tally, use, passes) in enumerate(
            zip(request.sources, scanned, readings, policies, tallies, uses, written.passes, strict=True)
        )
    ]
    return StoreReport(row_length=request.max_length, num_rows=written.epoch.rows, sources=sources)


def _part_of_epoch(tally: Tally, passes: float) -> EpochPart:
    return EpochPart(**{count: round(passes * tally.counts[count]) for count in EpochPart.model_fields})


def _names(scanned: Sequence[Sequence[ScannedFile]]) -> list[str]:
    return [file.file.name for files in scanned for file in files]


def _files_in(source: DataSource, files: Sequence[ScannedFile]) -> list[str]:
    """Names of the files that a source stands for, where it is not one itself."""
    names = [last_part(file.file.name) for file in files]
    return [] if names == [last_part(source.path)] else names


def _uses(request: StoreRequest, tallies: Sequence[Tally]) -> list[SourceUse]:
    """What is made of each source, once it is known how much there is of it."""
    names = [source.path for source in request.sources]
    passes = passes_of_epoch(request.mixture, [tally.counts["targets"] for tally in tallies], names)
    weights = request.loss_weights or (1.0,) * len(names)
    return [
        SourceUse(passes=each, loss_weight=weight, num_documents=tally.counts["documents"], num_tokens=tally.counts["tokens"])
        for each, weight, tally in zip(passes, weights, tallies, strict=True)
    ]


def _refuse_empty_parts(request: StoreRequest, tallies: Sequence[Tally], written: WrittenRows) -> None:
    """Refuse a mixture that has no room for any document of a source that has some.

    Raises:
        DataError: with what to change.
    """
    for number, (tally, passes) in enumerate(zip(tallies, written.passes, strict=True)):
        if tally.counts["documents"] and not passes:
            is_replayed = number >= len(request.sources) - request.mixture.num_replayed
            key = "strategy.replay.share" if is_replayed else "data.mixing"
            what = key if is_replayed else "its passes or proportion, or data.mixing.temperature"
            raise DataError(
                f"An epoch has no document of {request.sources[number].path}: its part is less than half of one. Raise that "
                f"({what}), or leave it out.",
                keys=(key, "data.train"),
            )


def _shards(
    request: StoreRequest,
    scanned: Sequence[Sequence[ScannedFile]],
    readings: Sequence[Reading],
    policies: Sequence[TooLong],
    options: TokenisingOptions,
) -> list[ShardTask]:
    """Divide all segments into tasks of similar size, in order. A source of which only the first rows count is one task."""
    groups: list[tuple[int, list[ShardPart]]] = []
    first_replayed = len(request.sources) - request.mixture.num_replayed
    num_segments = sum(len(file.segments) for files in scanned for file in files)
    per_shard = max(_MIN_SHARD_SEGMENTS, -(-num_segments // _MAX_SHARDS))
    file_index = 0
    for number, (source, files, reading) in enumerate(zip(request.sources, scanned, readings, strict=True)):
        parts = []
        for file in files:
            parts += [
                ShardPart(segment=segment, file_index=file_index, reading=reading, fingerprint=file.fingerprint)
                for segment in file.segments
            ]
            file_index += 1
        step = len(parts) if source.max_rows is not None else per_shard
        groups += [(number, parts[start : start + step]) for start in range(0, len(parts), max(1, step))]
    return [
        ShardTask(
            number=index,
            source=number,
            parts=tuple(parts),
            max_rows=request.sources[number].max_rows,
            too_long=policies[number],
            options=options,
            augmentation=None if number >= first_replayed else request.augmentation,
            output="",
        )
        for index, (number, parts) in enumerate(groups)
    ]


def _with_places(tasks: Sequence[ShardTask], draft: Path) -> list[ShardTask]:
    """The tasks with the folders that they write, each named after what will be in it."""
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
    _refuse_by_policy(request, total)
    counts = total.counts
    if not counts["documents"]:
        longer = f"data.max_length, {request.max_length} tokens"
        reasons = {
            "bad": "cannot be used",
            "dropped": f"are longer than {longer} (data.too_long: {request.too_long})",
            "cut_off": f"have their targets behind {longer}",
            "filtered": "are left out by data.quality",
            "no_target": f"have no target (data.targets: {request.targets})",
            "other_side": "lie on another side of the split (data.validation_fraction, data.test_fraction, data.fold)",
            "test_side": "are held out for the test (data.test_fraction)",
            "origin_held_out": "were made of rows that are held out (raytune data reword)",
        }
        lost = [f"  {counts[what]} {why}{_first(total, what)}" for what, why in reasons.items() if counts[what]]
        names = ", ".join(source.path for source in request.sources)
        of_sides = {"validation": "is held out for validation", "test": "is held out for the test"}
        what = of_sides.get(request.side, "can be trained on")
        raise DataError("\n".join([f"No row of {names} {what}. Of {counts['rows']} rows", *lost]))
    return tallies


def _refuse_by_policy(request: StoreRequest, total: Tally) -> None:
    """Refuse rows that are not to be left out, whatever is left without them.

    Raises:
        DataError: with the first of them.
    """
    if total.counts["bad"] and request.on_bad_row == "error":
        raise bad_rows_error(total)
    if total.counts["dropped"] and request.too_long == "error":
        raise too_long_error(total, request.max_length)


def _counted_again(report: StoreReport) -> Tally:
    """What was counted when a store was built, over all of its sources."""
    total = Tally()
    for source in report.sources:
        total.merge(Tally(counts=Counter({count: getattr(source, count) for count in COUNTS}), examples=source.examples))
    return total


def _first(tally: Tally, what: str) -> str:
    return f"; the first is {tally.examples[what][0]}" if what in tally.examples else ""
