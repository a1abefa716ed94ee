"""Texts that a quantiser measures a model's activations on: rows as a chat template renders them."""

import json
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from raytune.config.sections.data import DataSource
from raytune.data.conversations.conversation import Conversation, RowError
from raytune.data.rows.shards import Tally
from raytune.data.rows.source_rows import read_conversations
from raytune.data.rows.split import Split
from raytune.data.templates.rendering import Job, Renderer
from raytune.data.templates.text import resolve_template
from raytune.errors import DataError

CALIBRATION = "calibration.jsonl"
README = "README.md"


def save_calibration(
    sources: Sequence[DataSource],
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    num_rows: int,
    folder: Path,
    scratch: Path,
) -> int:
    """Write the first rows of sources, as many of each, as texts; and which tools take them.

    Args:
        split: says which rows were set aside from training, and are left out.
        template: as `data.template`.
        num_rows: at most, of all together.
        scratch: folder for what is downloaded.

    Returns:
        How many were written.

    Raises:
        DataError: if no row can be read, or rendered by the template.
    """
    of_each = ceil(num_rows / len(sources))
    tally, rows = Tally(), list[Conversation]()
    for source in sources:
        read = read_conversations(source, scratch, tally, "train", split)
        rows += [row for row, _ in zip(read, range(of_each), strict=False)]
    chats = [row for row in rows if row.text is None]
    rendered = iter(
        Renderer(tokenizer, resolve_template(template, tokenizer)).texts([Job(row.messages, row.tools) for row in chats])
        if chats
        else []
    )
    texts = [row.text if row.text is not None else next(rendered) for row in rows]
    usable = [text for text in texts if not isinstance(text, RowError)][:num_rows]
    if not usable:
        why = next((str(text) for text in texts if isinstance(text, RowError)), "none is there")
        raise DataError(f"No row can be used for calibration: {why}.")
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in usable)
    (folder / CALIBRATION).write_text("\n".join([*lines, ""]), encoding="utf-8")
    (folder / README).write_text(_readme(len(usable)), encoding="utf-8")
    return len(usable)


def _readme(num_rows: int) -> str:
    return (
        "# Ready to be quantised\n\n"
        f"The whole model in 16 bits, and {num_rows} texts to calibrate with (`{CALIBRATION}`, a JSON object with `text` a\n"
        "line). Tools that take a folder and such texts: llm-compressor (AWQ, GPTQ), AutoAWQ (`calib_data`), GPTQModel\n"
        "(`calibration`). The texts hold special tokens as text already: tokenise them with `add_special_tokens=False`.\n"
    )
