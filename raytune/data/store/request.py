"""What a store is to hold, and its address: a hash of that, of the content of the sources and of the code that reads them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from raytune.config.sections.data import DataSource, QualitySection
from raytune.data.conversations.masking import Targets
from raytune.data.conversations.shaping import AS_IT_IS, Shape
from raytune.data.conversations.token_classes import TokenClass
from raytune.data.formats.augmenting import Augmentation
from raytune.data.rows.shards import TooLong
from raytune.data.rows.split import EVERY_ROW_TRAINS, Side, Split
from raytune.data.store.packing import Packing
from raytune.plan.data import data_report, mixing, row_lengths
from raytune.plan.data.mixing import EACH_ROW_ONCE, Mixture

CODE = (
    "conversations/conversation",
    "conversations/fields",
    "conversations/long_chats",
    "conversations/masking",
    "conversations/shaping",
    "conversations/strict_json",
    "conversations/token_classes",
    "conversations/turns",
    "files/columns",
    "files/compression",
    "files/first_rows",
    "files/readers",
    "files/source_files",
    "files/sources",
    "formats/augmenting",
    "formats/formats",
    "formats/origins",
    "formats/recognising",
    "formats/row_fields",
    "quality/alike",
    "quality/passages",
    "quality/quality",
    "quality/row_findings",
    "quality/row_marks",
    "quality/signatures",
    "rows/audit",
    "rows/documents",
    "rows/fitting",
    "rows/shards",
    "rows/source_rows",
    "rows/split",
    "store/borders",
    "store/build",
    "store/finished_shards",
    "store/mixing",
    "store/order",
    "store/packing",
    "store/request",
    "store/row_file",
    "store/shard_documents",
    "store/tokenising",
    "stream/recipe",
    "stream/source",
    "stream/stream",
    "templates/date",
    "templates/known_words",
    "templates/prompts",
    "templates/rendering",
    "templates/template",
    "templates/text",
    "templates/text_encoder",
    "templates/tokenizers",
    "templates/turn_ends",
    "templates/turn_spans",
)
"""Modules of `data` whose code decides what a store holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRequest:
    """What a store is to hold."""

    sources: tuple[DataSource, ...]
    template: str
    """Jinja text (`template_front.template_of`); empty if all sources are plain text."""
    targets: Targets
    shape: Shape = AS_IT_IS
    """What is made of every conversation before the template sees it."""
    train_empty_thought: bool = True
    token_classes: tuple[TokenClass, ...] = ()
    """Whose tokens weigh otherwise than the rest."""
    max_length: int
    """Tokens per packed row, and the longest document."""
    too_long: TooLong | Literal["auto"]
    packing: Packing
    num_virtual: int = 0
    """Virtual tokens that are laid in front of each document, and for which packed rows leave room."""
    on_bad_row: Literal["error", "skip"]
    """With "error" a store with bad rows may not be used; what is in it is the same."""
    tokenizer_fingerprint: str
    """`tokenizers.tokenizer_fingerprint`."""
    side: Side | Literal["all"] = "all"
    """Of the split that the store holds."""
    split: Split = EVERY_ROW_TRAINS
    mixture: Mixture = EACH_ROW_ONCE
    """How often the store has the documents of each source."""
    augmentation: Augmentation | None = None
    """What is made of the rows of each source that is not replayed."""
    loss_weights: tuple[float, ...] = ()
    """Of each source; empty: each is 1."""
    quality: QualitySection | None = None
    held_out: tuple[DataSource, ...] = ()
    """Rows for validation or the test in files of their own, that `quality` looks for."""

    @property
    def all_sources(self) -> tuple[DataSource, ...]:
        """Those of its rows, and those that these are compared with."""
        return (*self.sources, *self.held_out, *(self.quality.benchmarks if self.quality else ()))

    def address(
        self, fingerprints: Sequence[Sequence[str]], policies: Sequence[TooLong], compared: Sequence[Sequence[Sequence[str]]] = ()
    ) -> str:
        """Name of the store: equal only for equal tokens in equal rows.

        Args:
            fingerprints: for each source, those of its files.
            policies: for each source, what `too_long` means for its rows.
            compared: fingerprints of what `quality` compares the rows with.
        """
        of_quality = [_of_source(source) for source in self.all_sources[len(self.sources) :]]
        what = {name: value for name, value in asdict(self).items() if name not in ("on_bad_row", "too_long")} | {
            "sources": [
                {**_of_source(source), "files": list(files), "too_long": "drop" if policy == "error" else policy}
                for source, files, policy in zip(self.sources, fingerprints, policies, strict=True)
            ],
            "quality": self.quality and self.quality.model_dump(mode="json", exclude={"benchmarks"}),
            "held_out": [of_quality, compared] if self.quality else None,
            "split": {"by": self.split.by.model_dump(), "bands": self.split.bands},
            "code": code_fingerprint(),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def _of_source(source: DataSource) -> dict[str, Any]:
    return {
        "format": source.format,
        "columns": source.columns,
        "constants": source.constants,
        "labels": source.labels,
        "max_rows": source.max_rows,
        # Messages about a row name its file, wherever that lies.
        "name": last_part(source.path),
    }


def last_part(path: str) -> str:
    """Name of a file or folder, wherever that lies."""
    return path.rstrip("/").split("/")[-1]


@cache
def code_fingerprint() -> str:
    """Of the code that decides what a store holds."""
    here = Path(__file__).parents[1]
    planned = (str(module.__file__) for module in (data_report, mixing, row_lengths))
    files = [*(here / f"{name}.py" for name in CODE), *map(Path, planned)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
