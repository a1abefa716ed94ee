"""From rows to tokens and targets, one shard of the sources at a time.

A shard is one call of a top-level function with a picklable task and result: it can run in any process that sees the files.
Text is rendered whole and tokenised once, and targets are found by where a token's text lies, so tokens are exactly those of
`apply_chat_template(tokenize=True)` (`text_encoder`).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raytune.config.sections.model import NewToken
from raytune.data.conversations.conversation import Conversation
from raytune.data.conversations.masking import Targets, is_excepted, weight_of
from raytune.data.conversations.token_classes import TokenClass
from raytune.data.conversations.turns import obeyed_requests
from raytune.data.files.columns import column, lists
from raytune.data.rows.audit import tally_document
from raytune.data.rows.documents import Document, chat_documents, text_documents
from raytune.data.rows.fitting import fitted
from raytune.data.rows.shards import ShardResult, ShardTask, Tally, TokenisingOptions, TooLong
from raytune.data.rows.source_rows import read_parts
from raytune.data.store.finished_shards import DOCUMENTS_FILE, finished_shard, put_shard, rows_noted, shard_draft
from raytune.data.templates.template import ChatTemplate
from raytune.data.templates.text_encoder import TextEncoder
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.errors import DataError
from raytune.local_files import local_errors

_DOCUMENTS_AT_ONCE = 256

DOCUMENTS_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("is_target", pa.list_(pa.uint8())),
        ("target_weights", pa.list_(pa.float32())),
        ("num_bytes", pa.int64()),
        ("file", pa.int32()),
        ("line", pa.int64()),
    ]
)
"""A shard's documents on disk, before they are packed. `num_bytes`: UTF-8 bytes of the text behind the targets. `target_weights`
is null in every document of a record batch, or in none."""


def tokenise_shard(task: ShardTask) -> ShardResult:
    """Read, render and tokenise a shard's rows and write its documents to `task.output`, or find that it was done before.

    Raises:
        DataError: if a file cannot be read on.
        StorageFullError: if there is no room for the documents.
    """
    if (found := finished_shard(Path(task.output), task)) is not None:
        return found
    tally = Tally()
    with local_errors(task.output), shard_draft(task) as draft:
        _write_documents(task, draft / DOCUMENTS_FILE, tally, rows_noted(draft))
        return put_shard(draft, task, tally)


def _write_documents(task: ShardTask, path: Path, tally: Tally, note_rows: Callable[[int], None]) -> None:
    """Write the documents of a shard in the order of its rows."""
    options = task.options
    left_out = None if task.left_out is None else np.frombuffer(task.left_out, bool)
    rows = read_parts(
        task.parts, task.max_rows, tally, options.side, options.split, left_out=left_out, augmentation=task.augmentation
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, DOCUMENTS_SCHEMA) as writer:
        for batch in documents_of(rows, options, task.too_long, tally):
            writer.write_batch(batch)
            note_rows(tally.counts["rows"])


def documents_of(
    rows: Iterable[tuple[Conversation, int]], options: TokenisingOptions, too_long: TooLong, tally: Tally
) -> Iterator[pa.RecordBatch]:
    """Documents of conversations, each with the number of its file, in their order; as DOCUMENTS_SCHEMA has them. Behind the last
    one the tally is complete."""
    encoder, template = _encoder_and_template(
        options.tokenizer_path,
        options.tokenizer_revision,
        options.trust_remote_code,
        options.new_tokens,
        options.tokenizer_fingerprint,
        options.template,
    )
    obeyed = (row for row in rows if _can_be_obeyed(row[0], options.targets, tally))
    for is_text, alike in groupby(obeyed, key=lambda row: row[0].text is not None):
        while batch := list(islice(alike, _DOCUMENTS_AT_ONCE)):
            if is_text:
                documents = text_documents(batch, encoder, options.token_classes, tally)
            else:
                assert template is not None
                documents = chat_documents(batch, encoder, template, options, too_long, tally)
            pieces = []
            for of_row in documents:
                first, num_tokens = of_row[0], max(one.num_uncut for one in of_row)
                tally_document(first.input_ids, num_tokens, encoder.bos, first.origin, tally)
                pieces += fitted(of_row, options.max_length, too_long, tally)
            for piece in pieces:
                if options.token_classes:
                    _tally_classes(piece, options.token_classes, tally)
                if not piece.is_cut and not _ends_with_special(piece, encoder):
                    tally.add("unending", piece.origin)
            if pieces:
                yield _record_batch(pieces)
    for request in obeyed_requests(options.targets):
        tally.unread_keys.pop(request, None)


# --- Documents ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _encoder_and_template(
    path: str,
    revision: str | None,
    trust_remote_code: bool,
    new_tokens: tuple[NewToken, ...],
    fingerprint: str,
    template: str,
) -> tuple[TextEncoder, ChatTemplate | None]:
    """Loaded once per process, which may tokenise many shards. Plain text needs no template."""
    tokenizer = open_tokenizer(path, revision, trust_remote_code, new_tokens)
    if tokenizer_fingerprint(tokenizer) != fingerprint:
        raise DataError(
            f"The tokenizer at '{path}' on {os.uname().nodename} is not the one that this run was planned with. "
            f"Put the same model files on every node, or give a hub id with model.revision."
        )
    return TextEncoder(tokenizer), ChatTemplate(tokenizer, template) if template else None


def _tally_classes(piece: Document, classes: Sequence[TokenClass], tally: Tally) -> None:
    for one, count in zip(classes, piece.of_class[piece.is_target].sum(axis=0).tolist()):
        tally.targets_of_class[str(one)] += count


def _can_be_obeyed(row: Conversation, targets: Targets, tally: Tally) -> bool:
    """Whether what a row says of its turns goes together with `data.targets`; tallied if not."""
    if targets != "all" or not any(is_excepted(message) or weight_of(message) != 1 for message in row.messages):
        return True
    what = "are not to be trained (weight: 0, train: false)" if any(map(is_excepted, row.messages)) else "have a weight"
    reason = (
        f"has turns that {what}, but data.targets: all trains the whole text. "
        "Name roles instead: data.targets: [system, user, assistant, tool]"
    )
    tally.add("bad", row.origin, reason)
    return False


def _ends_with_special(document: Document, encoder: TextEncoder) -> bool:
    """Whether the last target of a document is a special token, white space behind it aside."""
    targets = document.input_ids[document.is_target].tolist()
    last = next((token for token in reversed(targets) if encoder.is_special[token] or encoder.decode(token).strip()), None)
    return last is not None and bool(encoder.is_special[last])


def _record_batch(documents: Sequence[Document]) -> pa.RecordBatch:
    offsets = np.concatenate([[0], np.cumsum([len(document.input_ids) for document in documents])])
    weights: Any = pa.nulls(len(documents), pa.list_(pa.float32()))
    if any(document.target_weights is not None for document in documents):
        weights = lists(offsets, np.concatenate([_weights_of(document) for document in documents]), pa.float32())
    return pa.record_batch(
        [
            lists(offsets, np.concatenate([document.input_ids for document in documents]), pa.int32()),
            lists(offsets, np.concatenate([document.is_target for document in documents]), pa.uint8()),
            weights,
            column([int(document.token_bytes[document.is_target].sum()) for document in documents], pa.int64()),
            column([document.file_index for document in documents], pa.int32()),
            column([document.origin.line for document in documents], pa.int64()),
        ],
        schema=DOCUMENTS_SCHEMA,
    )


def _weights_of(document: Document) -> np.ndarray:
    return np.ones(len(document.input_ids), np.float32) if document.target_weights is None else document.target_weights
