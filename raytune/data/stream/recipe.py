"""What a stream is made of: its files as they were when the run was planned, and what is done with their rows."""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Self

from raytune.config.sections.data import DataSource, TrainSource
from raytune.config.sections.model import NewToken
from raytune.data.conversations.shaping import Shape
from raytune.data.conversations.token_classes import token_classes
from raytune.data.files.pieces import FilesAhead, Version, version_of
from raytune.data.files.source_files import SourceFile, find_files
from raytune.data.files.sources import files_of_hub
from raytune.data.formats.augmenting import augmentation_of
from raytune.data.rows.shards import TokenisingOptions
from raytune.data.store.build import tokenising_options
from raytune.data.store.request import StoreRequest
from raytune.plan.data.streaming import StreamedFile, StreamedSource, StreamPlan
from raytune.storage import in_parallel
from raytune.units import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a stream is made of, and how."""

    request: StoreRequest
    """What a store of its rows would hold."""
    options: TokenisingOptions
    files: tuple[tuple[SourceFile, ...], ...]
    """Of each source, in the order in which they are read."""
    ahead: tuple[FilesAhead, ...]
    """Of each source, for its files behind URLs."""
    plan: StreamPlan
    seed: int

    @property
    def sources(self) -> list[TrainSource]:
        return [one.source for one in self.plan.sources]

    @property
    def window(self) -> int:
        """Rows of files that are shuffled and packed among themselves."""
        return self.plan.window

    def first_file(self, source: int) -> int:
        """The number of a source's first file among those of all."""
        return sum(map(len, self.files[:source]))

    @property
    def file_names(self) -> list[str]:
        """Of all files, by their number."""
        return [file.name for files in self.files for file in files]

    def close(self) -> None:
        """Fetch nothing more."""
        for one in self.ahead:
            one.close()

    @classmethod
    def of(
        cls,
        stream: StreamPlan,
        *,
        template: str,
        row_length: int,
        tokenizer_path: str,
        tokenizer_revision: str | None,
        trust_remote_code: bool,
        new_tokens: Sequence[NewToken],
        seed: int,
    ) -> Self:
        """Args:
        stream: with its files (`with_files`).
        """
        request = _request_of(stream, template, row_length)
        options = tokenising_options(
            request,
            tokenizer_path=tokenizer_path,
            tokenizer_revision=tokenizer_revision,
            trust_remote_code=trust_remote_code,
            new_tokens=new_tokens,
        )
        num_far = max(1, sum(source.is_far for source in stream.sources))
        each = stream.read_ahead_mib * MIB // num_far
        ahead = tuple(_ahead(source.files, each) for source in stream.sources)
        files = tuple(
            tuple(_opened(file, of_source) for file in source.files)
            for source, of_source in zip(stream.sources, ahead, strict=True)
        )
        return cls(request=request, options=options, files=files, ahead=ahead, plan=stream, seed=seed)


@contextmanager
def looked_into(source: DataSource) -> Iterator[list[SourceFile]]:
    """The files of a source as a stream reads them, for who wants their first rows: of those behind URLs no more is fetched."""
    files = _files_of(source)
    with closing(_ahead(files, 0)) as ahead:
        yield [_opened(file, ahead) for file in files]


def with_files(stream: StreamPlan) -> StreamPlan:
    """A stream with the files of its sources, as they are now.

    Raises:
        DataError: if there are none, or they cannot be read.
        RaytuneError: if their storage cannot be asked.
    """
    sources = [StreamedSource(source=one.source, files=_files_of(one.source)) for one in stream.sources]
    return stream.model_copy(update={"sources": sources})


def _files_of(source: DataSource) -> list[StreamedFile]:
    found = find_files(source, None)
    if [file.kind for file in found] == ["dataset"] and not os.path.isdir(found[0].path):
        found = files_of_hub(found[0])
    asked = [file.path for file in found if file.version is None and file.kind not in ("dataset", "demo")]
    versions = dict(zip(asked, in_parallel(version_of, asked), strict=True))
    return [_as_planned(file, file.version or versions.get(file.path, Version(0, ""))) for file in found]


def _as_planned(file: SourceFile, version: Version) -> StreamedFile:
    return StreamedFile(name=file.name, path=file.path, kind=file.kind, split=file.split, size=version.size, mark=version.mark)


def _ahead(files: Sequence[StreamedFile], num_bytes: int) -> FilesAhead:
    return FilesAhead([(file.path, _version(file)) for file in files if file.is_far], num_bytes)


def _version(file: StreamedFile) -> Version:
    return Version(file.size, file.mark)


def _opened(file: StreamedFile, ahead: FilesAhead) -> SourceFile:
    has_version = file.kind not in ("dataset", "demo")
    return SourceFile(
        file.name,
        file.path,
        file.kind,
        file.split,
        version=_version(file) if has_version else None,
        ahead=ahead if file.is_far else None,
    )


def _request_of(stream: StreamPlan, template: str, row_length: int) -> StoreRequest:
    return StoreRequest(
        sources=tuple(one.source for one in stream.sources),
        template=template,
        shape=Shape(
            system=stream.system,
            system_when=stream.system_when,
            max_turns=stream.max_turns,
            reasoning=stream.reasoning,
        ),
        targets=stream.targets if isinstance(stream.targets, str) else tuple(stream.targets),
        train_empty_thought=stream.train_empty_thought,
        token_classes=token_classes(stream.token_weights),
        max_length=row_length,
        too_long=stream.too_long,
        packing=stream.packing,
        num_virtual=stream.num_virtual,
        on_bad_row=stream.on_bad_row,
        tokenizer_fingerprint=stream.tokenizer_fingerprint,
        augmentation=augmentation_of(stream.augment, stream.augment_code),
        loss_weights=tuple(one.source.loss_weight for one in stream.sources),
    )
