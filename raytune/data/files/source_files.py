"""The files behind a source: one, those of a glob or a folder, those behind a URL, or a data set."""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from raytune.config.sections.data import COMPRESSED_ENDINGS, DataSource, FileKind, ending_of
from raytune.data.files.pieces import FilesAhead, Version, refuse_another
from raytune.errors import DataError
from raytune.storage import download_file, is_local, list_folder, local_path

DEMO_ROWS = {"train": 4000, "validation": 400, "test": 400}
_KINDS: dict[str, FileKind] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words of file names -> the split that they stand for, as `datasets` has them."""
_NAMED_IN_A_FOLDER = 8


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file (or data set) of a source."""

    name: str
    """As the user knows it: for messages."""
    path: str
    """What is opened: a local path, a hub id, the split of the demo, or a URL of `ahead`."""
    kind: FileKind
    split: str
    """Split of a data set; empty for files."""
    version: Version | None = None
    """What it has to be; None: what it is when it is read."""
    ahead: FilesAhead | None = field(default=None, compare=False, repr=False)
    """Who fetches it piece by piece; None: it is no URL."""

    def open(self) -> BinaryIO:
        """Its bytes, from the first on.

        Raises:
            DataError: if it is not what it has to be.
        """
        if self.ahead is not None:
            return self.ahead.open(self.path)
        self.refuse_another()
        return open(self.path, "rb")

    def refuse_another(self) -> None:
        """Refuse a local file that is not what it has to be; one behind a URL is held against that with each piece.

        Raises:
            DataError: with what it was and what it is.
        """
        if self.version is not None and self.ahead is None:
            refuse_another(self.path, self.version)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.version.size if self.version is not None else os.path.getsize(self.path)


def find_files(source: DataSource, downloads: Path | None) -> list[SourceFile]:
    """The files behind a source, in the order in which they are read.

    Args:
        downloads: folder that files behind URLs are copied to first; None: they stay there, and their path is the URL.

    Raises:
        DataError: if there are none, one of them has an ending that we cannot read, or a folder does not say which are meant.
    """
    path = source.path
    if path.startswith("demo:"):
        split = path.removeprefix("demo:")
        if split not in DEMO_ROWS:
            raise DataError(f"There is no data set '{path}'. The built-in ones are demo:train, demo:validation, demo:test.")
        return [SourceFile(path, split, "demo", "")]
    if not is_local(path):
        urls = _matching_urls(path, source.split)
        return [_downloaded(url, downloads) if downloads else SourceFile(url, url, kind_of_file(url), "") for url in urls]
    local = local_path(path)
    if local.is_dir():
        if any((local / marker).exists() for marker in ("state.json", "dataset_dict.json")):
            return [SourceFile(path, str(local), "dataset", source.split)]
        files = [f"{path.rstrip('/')}/{name}" for name in _files_of_folder(path, sorted(os.listdir(local)), source.split)]
        return [SourceFile(file, str(local_path(file)), kind_of_file(file), "") for file in files]
    if local.is_file():
        return [SourceFile(path, str(local), kind_of_file(path), "")]
    if glob.has_magic(path):
        matches = [match for match in sorted(glob.glob(str(local), recursive=True)) if os.path.isfile(match)]
        if not matches:
            raise DataError(f"No file matches '{path}' (looked in {local.parent} on {os.uname().nodename}).")
        return [SourceFile(match, match, kind_of_file(match), "") for match in matches]
    if _HUB_ID.fullmatch(path) and ending_of(path) not in _KINDS and not path.startswith("."):
        return [SourceFile(path, path, "dataset", source.split)]
    raise DataError(f"There is no file '{path}' on {os.uname().nodename} (looked for {local}).")


def _files_of_folder(path: str, names: Sequence[str], split: str) -> list[str]:
    """The names in a folder that are its rows: the files of the one kind that it has, and of one split where they name splits.

    Raises:
        DataError: saying what is in the folder, where that does not say which of them are meant.
    """
    rows = [name for name in names if ending_of(name) in _KINDS and not name.startswith((".", "_"))]
    inside = ", ".join(names[:_NAMED_IN_A_FOLDER]) + (
        f" and {len(names) - _NAMED_IN_A_FOLDER} more" if len(names) > _NAMED_IN_A_FOLDER else ""
    )
    is_a_folder = f"{path} is a folder, but not one that `save_to_disk` wrote, with {inside or 'nothing'} in it"
    folder = path.rstrip("/")
    if not rows:
        raise DataError(f"{is_a_folder}. It has no file of rows itself. Name some, for example '{folder}/*/*.jsonl'.")
    endings = Counter(ending_of(name) for name in rows)
    if len(endings) > 1:
        kinds = ", ".join(f"{count} {ending}" for ending, count in endings.items())
        raise DataError(f"{is_a_folder}. Its files of rows are of several kinds: {kinds}. Name those that are meant, for example "
                        f"'{folder}/*{next(iter(endings))}'.")  # fmt: skip
    splits = {name: split_in_name(name) for name in rows}
    # Without a word of the config, files of one split are what is meant, whichever it is.
    if len(set(splits.values())) > 1 or split != DataSource.model_fields["split"].default:
        if wanted := [name for name in rows if splits[name] == _SPLITS.get(split, split) and None not in splits.values()]:
            return wanted
        raise DataError(f"{is_a_folder}. Not all of its files say that they are of a split, or none is of the split '{split}'. "
                        f"Name those that are meant, for example "
                        f"'{folder}/{rows[-1]}', or all of them as '{folder}/*{next(iter(endings))}'.")  # fmt: skip
    return rows


def split_in_name(name: str) -> str | None:
    """The split that a file is of, if its name says so."""
    words = [_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS]
    return words[-1] if words else None


def _matching_urls(url: str, split: str) -> list[str]:
    """The URL itself, those of the files in the folder that it is, or those in its folder that match its last part."""
    folder, _, pattern = url.rpartition("/")
    if not glob.has_magic(pattern):
        if ending_of(url) not in _KINDS and (names := list_folder(url.rstrip("/"))):
            return [f"{url.rstrip('/')}/{name}" for name in _files_of_folder(url, names, split)]
        return [url]
    matches = [f"{folder}/{name}" for name in list_folder(folder) if fnmatchcase(name, pattern)]
    if not matches:
        raise DataError(f"No file matches '{url}'.")
    return matches


def _downloaded(url: str, downloads: Path) -> SourceFile:
    kind = kind_of_file(url)
    target = downloads / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.split('/')[-1]}"
    try:
        download_file(url, target)
    except FileNotFoundError as error:
        raise DataError(f"There is no file '{url}'.") from error
    return SourceFile(url, str(target), kind, "")


def kind_of_file(path: str) -> FileKind:
    """How a file is read, by its name.

    Raises:
        DataError: if it says none that we can read.
    """
    ending = ending_of(path)
    kind = _KINDS.get(ending)
    if kind is not None and (kind not in ("parquet", "arrow") or path.lower().endswith(ending)):
        return kind
    if kind is not None:
        raise DataError(f"{path}: a {kind} file is compressed inside; decompress it first.")
    hint = ""
    if ending in _ARCHIVES or path.lower().endswith(_ARCHIVES):
        hint = " Unpack the archive, and name the files that were in it."
    elif ending in COMPRESSED_ENDINGS or not ending:
        hint = f" Let its name say what it holds, for example {Path(path).stem}.jsonl{Path(path).suffix}."
    what = f"that end in '{ending}'" if ending else "whose name has no ending"
    raise DataError(f"{path}: cannot read files {what}, only {', '.join(_KINDS)}, of text also with "
                    f"{', '.join(COMPRESSED_ENDINGS)} behind it.{hint}")  # fmt: skip
