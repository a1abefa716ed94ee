"""From rows to tokens and targets, one shard of the sources at a time.

A shard is one call of a top-level function with a picklable task and result: it can run in any process that sees the files.
Text is rendered whole and tokenised once, and targets are found by where a token's text lies, so tokens are exactly those of
`apply_chat_template(tokenize=True)` (`text_encoder`).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raytune.config.model import NewToken
from raytune.data.conversation import Conversation, Message, Origin, RowError
from raytune.data.fields import REASONING
from raytune.data.finished_shards import DOCUMENTS_FILE, finished_shard, put_shard, rows_noted, shard_draft
from raytune.data.masking import Targets, excepted_turns, is_excepted, target_mask, target_weights, trained_turns, weight_of
from raytune.data.prompts import difference, prompts_to_compare
from raytune.data.shards import ShardResult, ShardTask, Tally, TokenisingOptions, TooLong
from raytune.data.source_rows import read_parts
from raytune.data.template import ChatTemplate
from raytune.data.text_encoder import EncodedTexts, TextEncoder, bytes_before
from raytune.data.token_classes import Span, TokenClass, spans_in, weights_of
from raytune.data.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.data.turns import obeyed_requests
from raytune.errors import DataError
from raytune.local_files import local_errors

_DOCUMENTS_AT_ONCE = 256
# Answers of a shard whose prompts are compared with what is trained, about.
_PROMPTS_COMPARED = 64

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
    rows = read_parts(task.parts, task.max_rows, tally, options.side, options.validation_fraction)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, DOCUMENTS_SCHEMA) as writer:
        for batch in documents_of(rows, options, task.too_long, tally):
            writer.write_batch(batch)
            note_rows(tally.counts["rows"])
    for request in obeyed_requests(options.targets):
        tally.unread_keys.pop(request, None)


def documents_of(
    rows: Iterable[tuple[Conversation, int]], options: TokenisingOptions, too_long: TooLong, tally: Tally
) -> Iterator[pa.RecordBatch]:
    """Documents of conversations, each with the number of its file, in their order; as DOCUMENTS_SCHEMA has them."""
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
                documents = _text_documents(batch, encoder, options.token_classes, tally)
            else:
                assert template is not None
                documents = _chat_documents(batch, encoder, template, options.targets, options.token_classes, tally)
            pieces = [piece for document in documents for piece in _fitted(document, options.max_length, too_long, tally)]
            for piece in pieces:
                _tally_classes(piece, options.token_classes, tally)
                if not piece.is_cut and not _ends_with_special(piece, encoder):
                    tally.add("unending", piece.origin)
            if pieces:
                yield _record_batch(pieces)


# --- Documents ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Document:
    input_ids: np.ndarray
    is_target: np.ndarray
    token_bytes: np.ndarray
    file_index: int
    origin: Origin
    target_weights: np.ndarray | None
    """float32, per token; None: each weighs 1."""
    of_class: np.ndarray
    """bool, per token and class of `data.token_weights`."""
    is_cut: bool = False


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


def _chat_documents(
    rows: Sequence[tuple[Conversation, int]],
    encoder: TextEncoder,
    template: ChatTemplate,
    targets: Targets,
    classes: Sequence[TokenClass],
    tally: Tally,
) -> Iterator[_Document]:
    usable, texts, spans, weights = [], [], [], []
    for row, rendered in zip(rows, template.render([row for row, _ in rows], targets), strict=True):
        if isinstance(rendered, RowError):
            tally.add("bad", row[0].origin, str(rendered))
        else:
            _tally_turns(row[0], targets, tally)
            usable.append(row)
            texts.append(rendered.text)
            spans.append(rendered.targets)
            weights.append(rendered.weights)
    encoded = encoder.encode(texts)
    places = [
        (int(first) + _byte_of(text, start), int(first) + _byte_of(text, end))
        for text, text_spans, first in zip(texts, spans, encoded.first_bytes)
        for start, end in text_spans
    ]
    starts, ends = [start for start, _ in places], [end for _, end in places]
    is_target = target_mask(encoded.starts, encoded.ends, starts, ends)
    all_weights = None
    if any(weight != 1 for row_weights in weights for weight in row_weights):
        all_weights = target_weights(encoded.starts, encoded.ends, starts, ends, list(chain.from_iterable(weights)))
    of_class = _tokens_of_classes(classes, texts, spans, encoded)
    # Nothing comes before a document's first token that could predict it.
    is_target[encoded.first_tokens[:-1][np.diff(encoded.first_tokens) > 0]] = False
    for index, (conversation, file_index) in enumerate(usable):
        tokens = slice(encoded.first_tokens[index], encoded.first_tokens[index + 1])
        row_weights = None if all(weight == 1 for weight in weights[index]) or all_weights is None else all_weights[tokens]
        if tally.counts["prompts_compared"] < _PROMPTS_COMPARED:
            _compare_prompts(conversation, texts[index], encoded.input_ids[tokens], encoder, template, targets, tally)
        yield _Document(
            encoded.input_ids[tokens],
            is_target[tokens],
            encoded.token_bytes[tokens],
            file_index,
            conversation.origin,
            weights_of(classes, of_class[:, tokens], row_weights),
            of_class[:, tokens].T,
        )


def _tokens_of_classes(
    classes: Sequence[TokenClass], texts: Sequence[str], trained: Sequence[Sequence[Span]], encoded: EncodedTexts
) -> np.ndarray:
    """Which tokens share trained text with each class: bool, a row per class."""
    of_class = np.zeros((len(classes), len(encoded.input_ids)), bool)
    if not classes:
        return of_class
    places: list[list[np.ndarray]] = [[] for _ in classes]
    for text, spans, first in zip(texts, trained, encoded.first_bytes):
        to_byte = np.arange(len(text) + 1) if text.isascii() else bytes_before(text)
        for number, found in enumerate(spans_in(classes, text, spans)):
            places[number].append(first + to_byte[np.array(found, np.int64).reshape(-1, 2)])
    for number, found in enumerate(places):
        spans_S2 = np.concatenate([*found, np.empty((0, 2), np.int64)])
        of_class[number] = target_mask(encoded.starts, encoded.ends, spans_S2[:, 0], spans_S2[:, 1])
    return of_class


def _tally_classes(piece: _Document, classes: Sequence[TokenClass], tally: Tally) -> None:
    for one, count in zip(classes, piece.of_class[piece.is_target].sum(axis=0).tolist()):
        tally.targets_of_class[str(one)] += count


def _compare_prompts(
    row: Conversation,
    text: str,
    input_ids: np.ndarray,
    encoder: TextEncoder,
    template: ChatTemplate,
    targets: Targets,
    tally: Tally,
) -> None:
    """Tally the trained answers of a row whose prompt is, and is not, token by token what they are trained behind."""
    prompts = prompts_to_compare(template, row, text, targets)
    encoded = encoder.encode(prompts)
    for index in range(len(prompts)):
        asked = encoded.input_ids[encoded.first_tokens[index] : encoded.first_tokens[index + 1]]
        tally.add("prompts_compared")
        if found := difference(asked.tolist(), input_ids.tolist(), encoder.decode):
            tally.add("prompts_differ", row.origin, found)


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


def _tally_turns(row: Conversation, targets: Targets, tally: Tally) -> None:
    """Count the turns that their row excepts from training or weighs, and rows with trained answers that say nothing."""
    if targets != "all" and (excepted := excepted_turns(row.messages, targets)):
        tally.counts["skipped_turns"] += len(excepted)
    turns = range(len(row.messages)) if targets == "all" else trained_turns(row.messages, targets)
    weighted = {turn for turn, message in enumerate(row.messages) if weight_of(message) != 1}
    tally.counts["weighted_turns"] += len(weighted.intersection(turns))
    tally.unread_keys.update(
        f"weight of {row.messages[turn]['role']}, which is not trained" for turn in weighted.difference(turns)
    )
    blank = [turn for turn in turns if _is_blank_answer(row.messages[turn])]
    if blank:
        tally.add("blank_answers", row.origin, f"turn {blank[0] + 1}")


def _is_blank_answer(message: Message) -> bool:
    if message["role"] != "assistant" or message.get("tool_calls") or any(message.get(key) for key in REASONING):
        return False
    return not (message.get("content") or "").strip()


def _text_documents(
    rows: Sequence[tuple[Conversation, int]], encoder: TextEncoder, classes: Sequence[TokenClass], tally: Tally
) -> Iterator[_Document]:
    """Plain documents: every token is a target but the first, which nothing predicts."""
    before, behind = encoder.around_documents()
    texts = [row.text or "" for row, _ in rows]
    encoded = encoder.encode(texts)
    of_class = _tokens_of_classes(classes, texts, [[(0, len(text))] for text in texts], encoded)
    for index, (conversation, file_index) in enumerate(rows):
        if not (conversation.text or "").strip():
            tally.add("blank_answers", conversation.origin)
        tokens = slice(encoded.first_tokens[index], encoded.first_tokens[index + 1])
        input_ids = np.concatenate([np.array(before, np.int32), encoded.input_ids[tokens], np.array(behind, np.int32)])
        token_bytes = np.pad(encoded.token_bytes[tokens], (len(before), len(behind)))
        is_target = np.arange(len(input_ids)) > 0
        of_class_here = np.pad(of_class[:, tokens], ((0, 0), (len(before), len(behind))))
        weights = weights_of(classes, of_class_here, None)
        yield _Document(input_ids, is_target, token_bytes, file_index, conversation.origin, weights, of_class_here.T)


def _fitted(document: _Document, limit: int, too_long: TooLong, tally: Tally) -> list[_Document]:
    """The document, or what the policy for long ones makes of it, without pieces that have no target."""
    num_tokens, origin = len(document.input_ids), document.origin
    if not document.is_target.any():
        tally.add("no_target", origin)
        return []
    pieces = [document]
    if num_tokens > limit:
        length = f"{num_tokens} tokens"
        if too_long in ("drop", "error"):
            tally.add("dropped", origin, length)
            return []
        if too_long == "truncate":
            if document.is_target[limit:].any():
                tally.add("cut", origin, length)
            pieces = [_piece(document, 0, limit)]
        else:
            # The last token of a piece begins the next one, which then predicts every target just once.
            pieces = [_piece(document, start, start + limit) for start in range(0, num_tokens - 1, max(1, limit - 1))]
            tally.add("split", origin, length)
    trained = [piece for piece in pieces if piece.is_target.any()]
    if not trained:
        tally.add("cut_off", origin, length)
        return []
    tally.add("used")
    tally.counts["documents"] += len(trained)
    tally.counts["tokens"] += sum(len(piece.input_ids) for piece in trained)
    tally.counts["targets"] += sum(int(piece.is_target.sum()) for piece in trained)
    return trained


def _ends_with_special(document: _Document, encoder: TextEncoder) -> bool:
    """Whether the last target of a document is a special token, white space behind it aside."""
    targets = document.input_ids[document.is_target].tolist()
    last = next((token for token in reversed(targets) if encoder.is_special[token] or encoder.decode(token).strip()), None)
    return last is not None and bool(encoder.is_special[last])


def _piece(document: _Document, start: int, stop: int) -> _Document:
    is_target = document.is_target[start:stop].copy()
    is_target[0] = False
    return _Document(
        document.input_ids[start:stop],
        is_target,
        document.token_bytes[start:stop],
        document.file_index,
        document.origin,
        None if document.target_weights is None else document.target_weights[start:stop],
        document.of_class[start:stop],
        is_cut=stop < len(document.input_ids),
    )


def _record_batch(documents: Sequence[_Document]) -> pa.RecordBatch:
    offsets = np.concatenate([[0], np.cumsum([len(document.input_ids) for document in documents])]).astype(np.int32)
    input_ids = np.concatenate([document.input_ids for document in documents])
    is_target = np.concatenate([document.is_target for document in documents])
    weights: Any = pa.nulls(len(documents), pa.list_(pa.float32()))
    if any(document.target_weights is not None for document in documents):
        weights = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([_weights_of(document) for document in documents])))
    return pa.record_batch(
        [
            pa.ListArray.from_arrays(offsets, pa.array(input_ids)),
            pa.ListArray.from_arrays(offsets, pa.array(is_target.view(np.uint8))),
            weights,
            pa.array([int(document.token_bytes[document.is_target].sum()) for document in documents], pa.int64()),
            pa.array([document.file_index for document in documents], pa.int32()),
            pa.array([document.origin.line for document in documents], pa.int64()),
        ],
        schema=DOCUMENTS_SCHEMA,
    )


def _weights_of(document: _Document) -> np.ndarray:
    return np.ones(len(document.input_ids), np.float32) if document.target_weights is None else document.target_weights


def _byte_of(text: str, character: int) -> int:
    return character if text.isascii() else len(text[:character].encode())
