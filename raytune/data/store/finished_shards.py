"""Shards that are done, each a folder named after what is in it, so that who builds the same again after a kill finds them.

<draft>/shards/<address>/documents.arrow    documents, before they are packed
                        /shard.json         what happened to the rows, size and hash of the documents; its own checksum
               /<address>.<random>/         being written; renamed when it is whole
"""

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from raytune.data.rows.shards import ShardResult, ShardTask, Tally
from raytune.data.store.place import put_in_place
from raytune.data.store.store import checksum_of, read_meta
from raytune.local_files import sync_local_folder
from raytune.storage import file_digest, write_json

DOCUMENTS_FILE = "documents.arrow"
SHARD_FILE = "shard.json"
ROWS_FILE = "rows"
"""In a shard that is being written: how many rows were read so far."""
NOTED_EVERY_S = 2.0


def shard_address(task: ShardTask, code: str) -> str:
    """Name of a shard: equal only for equal documents and equal words about them.

    Args:
        code: fingerprint of the code that reads and tokenises.
    """
    options = task.options
    what = {
        "code": code,
        # Where the tokenizer lies says nothing; its fingerprint says all.
        "options": {name: value for name, value in asdict(options).items() if name != "tokenizer_path"},
        "max_rows": task.max_rows,
        "too_long": task.too_long,
        "source": task.source,
        "augmentation": repr(task.augmentation),
        "left_out": None if task.left_out is None else hashlib.sha256(task.left_out).hexdigest(),
        "parts": [
            {
                "content": part.fingerprint,
                "name": part.segment.file.name,
                "kind": part.segment.file.kind,
                "split": part.segment.file.split,
                "place": (part.segment.start, part.segment.stop, part.segment.first_line),
                "file_index": part.file_index,
                "reading": repr(part.reading),
            }
            for part in task.parts
        ],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=repr).encode()).hexdigest()[:24]


def finished_shard(folder: Path, task: ShardTask) -> ShardResult | None:
    """The shard in a folder if it is complete and every byte is what was written; else None."""
    meta = read_meta(folder, SHARD_FILE)
    if meta is None:
        return None
    documents = folder / DOCUMENTS_FILE
    try:
        digest = file_digest(documents)
    except FileNotFoundError:
        return None
    if (digest.size, digest.sha256) != (meta["size"], meta["sha256"]):
        return None
    return ShardResult(source=task.source, number=task.number, path=str(documents), tally=Tally.of(meta["tally"]), was_found=True)


@contextmanager
def shard_draft(task: ShardTask) -> Iterator[Path]:
    """A folder to write a shard in; gone afterwards if it was not put in place."""
    folder = Path(f"{task.output}.{uuid.uuid4().hex[:12]}")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_shard(draft: Path, task: ShardTask, tally: Tally) -> ShardResult:
    """Give a written shard its name."""
    with suppress(FileNotFoundError):
        (draft / ROWS_FILE).unlink()
    digest = file_digest(draft / DOCUMENTS_FILE)
    meta = {"size": digest.size, "sha256": digest.sha256, "tally": tally.as_json()}
    write_json(draft / SHARD_FILE, meta | {"checksum": checksum_of(meta)})
    sync_local_folder(draft)
    final = Path(task.output)
    path = str(final / DOCUMENTS_FILE)
    result = ShardResult(source=task.source, number=task.number, path=path, tally=tally, was_found=False)
    return put_in_place(draft, final, result, lambda folder: finished_shard(folder, task))


def rows_noted(draft: Path, clock: Callable[[], float] = time.monotonic) -> Callable[[int], None]:
    """What to call with the rows that were read, as often as one likes; from time to time they are noted in a shard's draft."""
    noted_s = clock()

    def note(rows: int) -> None:
        nonlocal noted_s
        if clock() - noted_s >= NOTED_EVERY_S:
            noted_s = clock()
            (draft / ROWS_FILE).write_text(str(rows))

    return note


def rows_in_progress(shards: Path) -> int:
    """Rows that were read of all shards that are being written."""
    rows = 0
    for file in shards.glob(f"*.*/{ROWS_FILE}"):
        with suppress(OSError, ValueError):  # gone by now, or half written
            rows += int(file.read_text())
    return rows
