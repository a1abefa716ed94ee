"""Read all files of the sources of a store through, several at once, and say how far that is: with much data it takes minutes."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from raytune.config.sections.data import DataSource
from raytune.data.files.first_rows import find_first_files
from raytune.data.files.source_files import SourceFile
from raytune.data.files.sources import ScannedFile, scan
from raytune.data.store.drafts import BEAT_S, BuildProgress, Report, this_builder

_FILES_AT_ONCE = 8
"""Hashing leaves the interpreter lock alone."""


def scan_sources(sources: Sequence[DataSource], downloads: Path, report: Report) -> list[list[ScannedFile]]:
    """The files of each source, with fingerprints and parts.

    Args:
        downloads: folder for files behind URLs.

    Raises:
        DataError: about the first file that cannot be read.
    """
    files = [find_first_files(source, downloads) for source in sources]
    total = sum(os.stat(file.path).st_size for of_source in files for file in of_source if os.path.isfile(file.path))
    advance = _told(report, total)

    def scanned(file: SourceFile, max_rows: int | None) -> ScannedFile:
        return scan(file, max_rows, advance)

    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="reading") as pool:
        wanted = [
            [
                # Who imports `datasets` does that in the main thread.
                partial(scanned, file, source.max_rows)
                if file.kind == "dataset"
                else pool.submit(scanned, file, source.max_rows).result
                for file in of_source
            ]
            for source, of_source in zip(sources, files, strict=True)
        ]
        try:
            return [[result() for result in of_source] for of_source in wanted]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _told(report: Report, total: int) -> Callable[[int], None]:
    """What to call with each number of bytes that was read, from any thread. Of compressed files there are more than on disk."""
    lock, done, beat, told_s = threading.Lock(), 0, 0, time.monotonic()

    def advance(num_bytes: int) -> None:
        nonlocal done, beat, told_s
        with lock:
            done += num_bytes
            if time.monotonic() - told_s < BEAT_S:
                return
            beat, told_s = beat + 1, time.monotonic()
            progress = BuildProgress(
                builder=this_builder(),
                is_own=True,
                stage="reading",
                done=min(done, total),
                found=0,
                total=total,
                shards_found=0,
                num_shards=0,
                beat=beat,
            )
        report(progress)

    return advance
