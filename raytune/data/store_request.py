"""What a store is to hold, and its address: a hash of that, of the content of the sources and of the code that reads them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from raytune.config.data import DataSource
from raytune.data.masking import Targets
from raytune.data.packing import Packing
from raytune.data.shards import TooLong
from raytune.data.split import Side
from raytune.data.token_classes import TokenClass
from raytune.plan import data_report, mixing
from raytune.plan.mixing import EACH_ROW_ONCE, Mixture

# Modules whose code decides what a store holds.
_CODE = (
    "build",
    "compression",
    "conversation",
    "fields",
    "finished_shards",
    "formats",
    "masking",
    "mixing",
    "order",
    "packing",
    "prompts",
    "readers",
    "recognising",
    "rendering",
    "row_fields",
    "row_file",
    "shards",
    "source_files",
    "source_rows",
    "sources",
    "split",
    "store_request",
    "stream",
    "template",
    "template_text",
    "text_encoder",
    "token_classes",
    "tokenising",
    "tokenizers",
    "turn_ends",
    "turn_spans",
    "turns",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRequest:
    """What a store is to hold."""

    sources: tuple[DataSource, ...]
    template: str
    """Jinja text (`template_text.resolve_template`); empty if all sources are plain text."""
    targets: Targets
    token_classes: tuple[TokenClass, ...] = ()
    """Whose tokens weigh otherwise than the rest."""
    max_length: int
    """Tokens per packed row, and the longest document."""
    too_long: TooLong | Literal["auto"]
    packing: Packing
    num_virtual: int = 0
    """Virtual tokens that are laid in front of each document, and for which packed rows leave room."""
    on_bad_row: Literal["error", "skip"]
    on_prompt_mismatch: Literal["error", "accept"] = "error"
    """Decides whether the store may be used, and nothing of what is in it."""
    tokenizer_fingerprint: str
    """`tokenizers.tokenizer_fingerprint`."""
    side: Side | Literal["all"] = "all"
    """With `validation_fraction`, the side of the split that the store holds."""
    validation_fraction: float = 0.0
    mixture: Mixture = EACH_ROW_ONCE
    """How often the store has the documents of each source."""
    loss_weights: tuple[float, ...] = ()
    """Of each source; empty: each is 1."""

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
                    "constants": source.constants,
                    "labels": source.labels,
                    "max_rows": source.max_rows,
                    "files": list(files),
                    "too_long": policy,
                    # Messages about a row name its file, wherever that lies.
                    "name": last_part(source.path),
                }
                for source, files, policy in zip(self.sources, fingerprints, policies, strict=True)
            ],
            "code": code_fingerprint(),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def last_part(path: str) -> str:
    """Name of a file or folder, wherever that lies."""
    return path.rstrip("/").split("/")[-1]


@cache
def code_fingerprint() -> str:
    """Of the code that decides what a store holds."""
    here = Path(__file__).parent
    files = [*(here / f"{name}.py" for name in _CODE), Path(data_report.__file__), Path(mixing.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
