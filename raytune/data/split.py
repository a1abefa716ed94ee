"""Which side of a split a row is on: a function of its content, so that a row lies on the same side in every file and order."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

Side = Literal["train", "validation"]


def side_of(row: Mapping[str, Any], validation_fraction: float) -> Side:
    """Put about `validation_fraction` of all rows on the validation side. Equal rows always share a side, so no row leaks.

    A larger fraction keeps every row on the validation side that a smaller one had put there.
    """
    content = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    share = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64
    return "validation" if share < validation_fraction else "train"
