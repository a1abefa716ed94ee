"""Build the tokenised store, under an address that covers everything that decides its tokens (`store_request`).

A store is built in a folder of its own and renamed into place whole, so that who finds one finds a complete one, however many
build it at once.
"""

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from raytune.config.data import DataFormat, DataSource
from raytune.config.model import NewToken
from raytune.data.prompts import TOLERATED_SHARE
from raytune.data.recognising import Reading
from raytune.data.row_file import SourceUse, WrittenRows, write_rows
from raytune.data.shards import (
    ParallelMap,
    ShardPart,
    ShardResult,
    ShardTask,
    Tally,
    TokenisingOptions,
    TooLong,
    bad_rows_error,
    prompt_mismatch_error,
    too_long_error,
)
from raytune.data.source_files import find_files
from raytune.data.source_rows import readings_of
from raytune.data.sources import ScannedFile, scan
from raytune.data.store import META_FILE, ROWS_FILE, StoreInfo, checksum_of, read_info
from raytune.data.store_place import intact, local_stores, put_in_place
from raytune.data.store_request import StoreRequest, last_part
from raytune.errors import DataError
from raytune.local_files import local_errors, sync_local_folder
from raytune.plan.data_report import COUNTS, SourceReport, StoreReport
from raytune.plan.mixing import passes_of_epoch
from raytune.storage import file_digest, write_json

_MIN_SHARD_SEGMENTS = 2
_MAX_SHARDS = 256


def build_store(
    request: StoreRequest,
    *,
    tokenizer_path: str,
    folder: str | Path,
    tokenizer_revision: str | None = None,
    trust_remote_code: bool = False,
    new_tokens: Sequence[NewToken] = (),
    parallel_map: ParallelMap = map,
) -> StoreInfo:
    """Tokenise and pack what the request asks for, or find that it was done before.

    Args:
        tokenizer_path: folder or hub id of the tokenizer, for every process that `parallel_map` uses.
        new_tokens: that it is given.
        folder: local folder for stores, readable and writable for all these processes.
        parallel_map: calls a function on every task and gives the results in order.

    Raises:
        DataError: if rows cannot be used (and the policy is to stop), or nothing is left to train on; the message has counts, and
            the first rows with file and line.
    """
    stores = local_stores(folder)
    from raytune.data.tokenising import tokenise_shard  # workers open stores and need none of its libraries

    draft = stores / f"draft-{uuid.uuid4().hex[:12]}"
    try:
        with local_errors(stores):
            draft.mkdir(parents=True)
        scanned = [
            [scan(file, source.max_rows) for file in find_files(source, draft / "downloads")] for source in request.sources
        ]
        readings = readings_of(request.sources, scanned)
        policies: list[TooLong] = [resolved_too_long(request.too_long, reading.format) for reading in readings]
        address = request.address([[file.fingerprint for file in files] for files in scanned], policies)
        final = stores / address
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
            split=request.split,
        )
        tasks = _shards(request.sources, scanned, readings, policies, options, draft)
        results = list(parallel_map(tokenise_shard, tasks))
        tallies = _checked_tallies(request, results)
        built = draft / "store"
        built.mkdir()
        uses = _uses(request, tallies)
        written = write_rows(built / ROWS_FILE, results, uses, request.max_length, request.packing, request.num_virtual)
        _refuse_empty_parts(request, tallies, written)
        digest = file_digest(built / ROWS_FILE)
        files = [file.file.name for source_files in scanned for file in source_files]
        meta = {
            "address": address,
            "source_files": files,
            "size": digest.size,
            "sha256": digest.sha256,
            **written.sizes,
            "report": _report(request, scanned, readings, policies, tallies, uses, written).model_dump(mode="json"),
        }
        write_json(built / META_FILE, meta | {"checksum": checksum_of(meta)})
        sync_local_folder(built)
        return _with_its_prompts(put_in_place(built, final, read_info(final, meta)), request)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def resolved_too_long(policy: TooLong | Literal["auto"], name: DataFormat) -> TooLong:
    """What `data.too_long` means for the rows of a format: a cut document of plain text would lose most of a book, and a cut chat
    only its last answers."""
    if policy != "auto":
        return policy
    return "split" if name == "text" else "truncate"


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
            parts += [ShardPart(segment=segment, file_index=file_index, reading=reading) for segment in file.segments]
            file_index += 1
        step = len(parts) if source.max_rows is not None else per_shard
        groups += [(number, parts[start : start + step]) for start in range(0, len(parts), max(1, step))]
    return [
        ShardTask(
            source=number,
            parts=tuple(parts),
            max_rows=sources[number].max_rows,
            too_long=policies[number],
            options=options,
            output=str(draft / f"shard-{index:05d}.arrow"),
        )
        for index, (number, parts) in enumerate(groups)
    ]


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
            "other_side": "lie on another side of the split (data.validation_fraction, data.test_fraction, data.fold)",
            "test_side": "are held out for the test (data.test_fraction)",
        }
        lost = [f"  {counts[what]} {why}{_first(total, what)}" for what, why in reasons.items() if counts[what]]
        names = ", ".join(source.path for source in request.sources)
        of_sides = {"validation": "is held out for validation", "test": "is held out for the test"}
        what = of_sides.get(request.side, "can be trained on")
        raise DataError("\n".join([f"No row of {names} {what}. Of {counts['rows']} rows", *lost]))
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
