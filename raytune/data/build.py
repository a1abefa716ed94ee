"""Build the tokenised store, under an address that covers everything that decides its tokens.

A store is built in a folder of its own and renamed into place whole, so that who finds one finds a complete one, however many
build it at once. The address is a hash of the request, of the content of the sources and of the code that reads them.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raytune.config.data import DataFormat, DataSource
from raytune.data.formats import names_format
from raytune.data.masking import Targets
from raytune.data.packing import Packing, pack
from raytune.data.prompts import TOLERATED_SHARE
from raytune.data.shards import (
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
from raytune.data.source_rows import formats_of
from raytune.data.sources import ScannedFile, find_files, scan
from raytune.data.split import Side
from raytune.data.store import META_FILE, ROWS_FILE, WEIGHTS_COLUMN, StoreInfo, checksum_of, joined, read_info, read_meta, view
from raytune.errors import DataError
from raytune.local_files import local_errors, move_local_folder, sync_local_folder
from raytune.plan import data_report
from raytune.plan.data_report import COUNTS, SourceReport, StoreReport
from raytune.storage import file_digest, is_local, local_path, write_json

_ROWS_SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("is_target", pa.large_list(pa.bool_())),
        ("document_lengths", pa.list_(pa.int32())),
        ("files", pa.list_(pa.int32())),
        ("lines", pa.list_(pa.int64())),
        ("num_targets", pa.int64()),
        ("num_bytes", pa.int64()),
    ]
)
_WEIGHTED_ROWS_SCHEMA = pa.schema(
    [*_ROWS_SCHEMA, (WEIGHTS_COLUMN, pa.large_list(pa.float32())), ("weight", pa.float64())]  # of each row: sum over its targets
)
_TOKENS_PER_RECORD_BATCH = 1 << 20
_MIN_SHARD_SEGMENTS = 2
_MAX_SHARDS = 256
# Modules whose code decides what a store holds.
_CODE = (
    "build",
    "conversation",
    "fields",
    "formats",
    "masking",
    "packing",
    "prompts",
    "readers",
    "rendering",
    "shards",
    "source_rows",
    "sources",
    "split",
    "template",
    "template_text",
    "text_encoder",
    "tokenising",
    "tokenizers",
    "turn_ends",
    "turn_spans",
    "turns",
)

ParallelMap = Callable[[Callable[[ShardTask], ShardResult], Sequence[ShardTask]], Iterable[ShardResult]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRequest:
    """What a store is to hold."""

    sources: tuple[DataSource, ...]
    template: str
    """Jinja text (`template_text.resolve_template`); empty if all sources are plain text."""
    targets: Targets
    max_length: int
    """Tokens per packed row, and the longest document."""
    too_long: TooLong | Literal["auto"]
    packing: Packing
    on_bad_row: Literal["error", "skip"]
    on_prompt_mismatch: Literal["error", "accept"] = "error"
    """Decides whether the store may be used, and nothing of what is in it."""
    tokenizer_fingerprint: str
    """`tokenizers.tokenizer_fingerprint`."""
    side: Side | Literal["all"] = "all"
    """With `validation_fraction`, the side of the split that the store holds."""
    validation_fraction: float = 0.0

    def address(self, fingerprints: Sequence[Sequence[str]], policies: Sequence[TooLong]) -> str:
        """Name of the store: equal only for equal tokens in equal rows.

        Args:
            fingerprints: for each source, those of its files.
            policies: for each source, what `too_long` means for its rows.
        """
        what = {name: value for name, value in asdict(self).items() if name not in ("on_prompt_mismatch", "too_long")} | {
            "sources": [
                {
                    "format": source.format,
                    "columns": source.columns,
                    "max_rows": source.max_rows,
                    "files": list(files),
                    "too_long": policy,
                    # Messages about a row name its file, wherever that lies.
                    "name": _last_part(source.path),
                }
                for source, files, policy in zip(self.sources, fingerprints, policies, strict=True)
            ],
            "code": _code_fingerprint(),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def build_store(
    request: StoreRequest,
    *,
    tokenizer_path: str,
    folder: str | Path,
    tokenizer_revision: str | None = None,
    trust_remote_code: bool = False,
    parallel_map: ParallelMap = map,
) -> StoreInfo:
    """Tokenise and pack what the request asks for, or find that it was done before.

    Args:
        tokenizer_path: folder or hub id of the tokenizer, for every process that `parallel_map` uses.
        folder: local folder for stores, readable and writable for all these processes.
        parallel_map: calls a function on every task and gives the results in order.

    Raises:
        DataError: if rows cannot be used (and the policy is to stop), or nothing is left to train on; the message has counts, and
            the first rows with file and line.
    """
    if not is_local(folder):
        raise DataError(
            f"data.store is {folder}, but tokenised rows are mapped into memory. Set it to a folder that every node mounts."
        )
    from raytune.data.tokenising import tokenise_shard  # workers open stores and need none of its libraries

    stores = local_path(folder)
    draft = stores / f"draft-{uuid.uuid4().hex[:12]}"
    try:
        with local_errors(stores):
            draft.mkdir(parents=True)
        scanned = [
            [scan(file, source.max_rows) for file in find_files(source, draft / "downloads")] for source in request.sources
        ]
        formats = formats_of(request.sources, scanned)
        policies: list[TooLong] = [resolved_too_long(request.too_long, name) for name in formats]
        address = request.address([[file.fingerprint for file in files] for files in scanned], policies)
        final = stores / address
        if (found := _intact(final)) is not None:
            return _with_its_prompts(found, request)
        options = TokenisingOptions(
            tokenizer_path=tokenizer_path,
            tokenizer_revision=tokenizer_revision,
            trust_remote_code=trust_remote_code,
            tokenizer_fingerprint=request.tokenizer_fingerprint,
            template=request.template,
            targets=request.targets,
            max_length=request.max_length,
            side=request.side,
            validation_fraction=request.validation_fraction,
        )
        tasks = _shards(request.sources, scanned, formats, policies, options, draft)
        results = list(parallel_map(tokenise_shard, tasks))
        tallies = _checked_tallies(request, results)
        built = draft / "store"
        built.mkdir()
        sizes = _write_rows(built / ROWS_FILE, [result.path for result in results], request)
        digest = file_digest(built / ROWS_FILE)
        files = [file.file.name for source_files in scanned for file in source_files]
        meta = {
            "address": address,
            "source_files": files,
            "size": digest.size,
            "sha256": digest.sha256,
            **sizes,
            "report": _report(request, formats, policies, tallies, sizes["num_rows"]).model_dump(mode="json"),
        }
        write_json(built / META_FILE, meta | {"checksum": checksum_of(meta)})
        sync_local_folder(built)
        return _with_its_prompts(_put_in_place(built, final, read_info(final, meta)), request)
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
    formats: Sequence[DataFormat],
    policies: Sequence[TooLong],
    tallies: Sequence[Tally],
    num_rows: int,
) -> StoreReport:
    sources = [
        SourceReport(
            name=_last_part(source.path),
            format=name,
            too_long=policy,
            unread_columns=dict(tally.unread_columns),
            unread_keys=dict(tally.unread_keys),
            examples=tally.examples,
            **{count: tally.counts[count] for count in COUNTS},
        )
        for source, name, policy, tally in zip(request.sources, formats, policies, tallies, strict=True)
    ]
    return StoreReport(row_length=request.max_length, num_rows=num_rows, sources=sources)


def _shards(
    sources: Sequence[DataSource],
    scanned: Sequence[Sequence[ScannedFile]],
    formats: Sequence[DataFormat],
    policies: Sequence[TooLong],
    options: TokenisingOptions,
    draft: Path,
) -> list[ShardTask]:
    """Divide all segments into tasks of similar size, in order. A source of which only the first rows count is one task."""
    groups: list[tuple[int, list[ShardPart]]] = []
    num_segments = sum(len(file.segments) for files in scanned for file in files)
    per_shard = max(_MIN_SHARD_SEGMENTS, -(-num_segments // _MAX_SHARDS))
    file_index = 0
    for number, (source, files, name) in enumerate(zip(sources, scanned, formats, strict=True)):
        parts = []
        for file in files:
            parts += [
                ShardPart(
                    segment=segment,
                    file_index=file_index,
                    format=name,
                    is_named=names_format(source, name),
                    columns=source.columns,
                )
                for segment in file.segments
            ]
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


def _last_part(path: str) -> str:
    return path.rstrip("/").split("/")[-1]


def _first(tally: Tally, what: str) -> str:
    return f"; the first is {tally.examples[what][0]}" if what in tally.examples else ""


# --- Writing -----------------------------------------------------------------------------------------------------------------


class _Documents:
    """The documents of all shards, memory-mapped."""

    def __init__(self, paths: Sequence[str]) -> None:
        batches = [batch for path in paths for batch in _batches_of(path)]
        offsets = [view(batch.column("input_ids").offsets, np.int32) for batch in batches]
        self._input_ids = [view(batch.column("input_ids").values, np.int32) for batch in batches]
        self._is_target = [view(batch.column("is_target").values, np.uint8).view(bool) for batch in batches]
        weights = [batch.column("target_weights") for batch in batches]
        self._weights = [None if column.null_count else view(column.values, np.float32) for column in weights]
        self.are_weighted = any(one is not None for one in self._weights)
        self._batch = np.repeat(np.arange(len(batches)), [batch.num_rows for batch in batches])
        self._start = np.concatenate([one[:-1] for one in offsets])
        self.lengths = np.concatenate([np.diff(one) for one in offsets])
        self.num_bytes = joined([batch.column("num_bytes") for batch in batches])
        self.files = joined([batch.column("file") for batch in batches], np.int32)
        self.lines = joined([batch.column("line") for batch in batches])

    def tokens(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and targets of documents, end to end."""
        places = self._places(documents)
        return (
            np.concatenate([self._input_ids[batch][start:stop] for batch, start, stop in places]),
            np.concatenate([self._is_target[batch][start:stop] for batch, start, stop in places]),
        )

    def weights(self, documents: np.ndarray) -> np.ndarray:
        """Weights of the tokens of documents, end to end."""
        found = ((self._weights[batch], start, stop) for batch, start, stop in self._places(documents))
        return np.concatenate(
            [np.ones(stop - start, np.float32) if weights is None else weights[start:stop] for weights, start, stop in found]
        )

    def _places(self, documents: np.ndarray) -> list[tuple[int, int, int]]:
        """The record batch of each document, and where its tokens lie in it."""
        return list(zip(self._batch[documents], self._start[documents], self._start[documents] + self.lengths[documents]))


def _batches_of(path: str) -> Iterator[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(path))
    return (reader.get_batch(index) for index in range(reader.num_record_batches))


def _write_rows(path: Path, shard_paths: Sequence[str], request: StoreRequest) -> dict[str, int]:
    """Pack the documents of all shards and write the rows.

    Returns:
        The counts of `StoreInfo`.
    """
    documents = _Documents(shard_paths)
    rows = pack(documents.lengths, request.max_length, request.packing)
    num_targets = 0
    schema = _WEIGHTED_ROWS_SCHEMA if documents.are_weighted else _ROWS_SCHEMA
    with local_errors(path), pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for some_rows in _in_batches(rows, documents.lengths):
            batch = _record_batch(some_rows, documents)
            num_targets += int(view(batch.column("num_targets"), np.int64).sum())
            writer.write_batch(batch)
    return {
        "num_rows": len(rows),
        "num_documents": len(documents.lengths),
        "num_tokens": int(documents.lengths.sum(dtype=np.int64)),
        "num_targets": num_targets,
        "num_bytes": int(documents.num_bytes.sum()),
        "longest_document": int(documents.lengths.max()),
    }


def _in_batches(rows: Sequence[list[int]], lengths: np.ndarray) -> Iterator[list[list[int]]]:
    some_rows, num_tokens = [], 0
    for row in rows:
        some_rows.append(row)
        num_tokens += int(lengths[row].sum())
        if num_tokens >= _TOKENS_PER_RECORD_BATCH:
            yield some_rows
            some_rows, num_tokens = [], 0
    if some_rows:
        yield some_rows


def _record_batch(rows: Sequence[list[int]], documents: _Documents) -> pa.RecordBatch:
    members = np.concatenate([np.asarray(row) for row in rows])
    document_offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    lengths = documents.lengths[members]
    token_offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[document_offsets]
    input_ids, is_target = documents.tokens(members)
    offsets = pa.array(document_offsets, pa.int32())
    columns: list[Any] = [
        pa.LargeListArray.from_arrays(pa.array(token_offsets), pa.array(input_ids)),
        pa.LargeListArray.from_arrays(pa.array(token_offsets), pa.array(is_target)),
        pa.ListArray.from_arrays(offsets, pa.array(lengths, pa.int32())),
        pa.ListArray.from_arrays(offsets, pa.array(documents.files[members])),
        pa.ListArray.from_arrays(offsets, pa.array(documents.lines[members])),
        pa.array(np.add.reduceat(is_target, token_offsets[:-1], dtype=np.int64)),
        pa.array(np.add.reduceat(documents.num_bytes[members], document_offsets[:-1])),
    ]
    if not documents.are_weighted:
        return pa.record_batch(columns, schema=_ROWS_SCHEMA)
    weights = documents.weights(members)
    columns += [
        pa.LargeListArray.from_arrays(pa.array(token_offsets), pa.array(weights)),
        pa.array(np.add.reduceat(np.where(is_target, weights, 0), token_offsets[:-1], dtype=np.float64)),
    ]
    return pa.record_batch(columns, schema=_WEIGHTED_ROWS_SCHEMA)


# --- Finding and placing -----------------------------------------------------------------------------------------------------


def _put_in_place(built: Path, final: Path, info: StoreInfo) -> StoreInfo:
    """Rename a built store to its address. Another builder's store, finished first, is as good; a damaged one is replaced."""
    while True:
        try:
            os.rename(built, final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            if (found := _intact(final)) is not None:
                return found
            aside = final.with_name(f"damaged-{uuid.uuid4().hex[:12]}")
            with suppress(FileNotFoundError):  # another builder was quicker
                move_local_folder(final, aside)
            if _intact(aside) is not None:  # another builder has just put a good one there
                with suppress(OSError):
                    os.rename(aside, final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            return info


def _intact(folder: Path) -> StoreInfo | None:
    """The store in a folder if it is complete and every byte is what was written; else None."""
    meta = read_meta(folder)
    if meta is None:
        return None
    try:
        digest = file_digest(folder / ROWS_FILE)
    except FileNotFoundError:
        return None
    return read_info(folder, meta) if (digest.size, digest.sha256) == (meta["size"], meta["sha256"]) else None


@cache
def _code_fingerprint() -> str:
    here = Path(__file__).parent
    files = [*(here / f"{name}.py" for name in _CODE), Path(data_report.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
