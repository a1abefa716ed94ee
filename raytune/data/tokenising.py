"""From rows to tokens and targets, one shard of the sources at a time.

A shard is one call of a top-level function with a picklable task and result: it can run in any process that sees the files.
Text is rendered whole and tokenised once, and targets are found by where a token's text lies, so tokens are exactly those of
`apply_chat_template(tokenize=True)`. For byte-level BPE that place follows from the tokens' own lengths, and the tokenizer need
not track offsets, which takes it twice as long.
"""

import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from raytune.config.data import DataFormat, DataSource
from raytune.data.conversation import Conversation, Message, Origin, RowError
from raytune.data.fields import REASONING
from raytune.data.formats import format_of, names_format, read_row
from raytune.data.masking import Targets, excepted_turns, is_excepted, target_mask, target_weights, trained_turns, weight_of
from raytune.data.prompts import difference, prompts_to_compare
from raytune.data.readers import BadRow, read_segment
from raytune.data.shards import ShardPart, ShardResult, ShardTask, Tally, TooLong, bad_rows_error
from raytune.data.sources import ScannedFile, find_files, scan
from raytune.data.split import Side, side_of
from raytune.data.template import ChatTemplate
from raytune.data.tokenizers import adds_bos, open_tokenizer, tokenizer_fingerprint
from raytune.errors import DataError

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
    """Read, render and tokenise a shard's rows and write its documents to `task.output`, in the order of the rows."""
    tally = Tally()
    options = task.options
    encoder, template = _encoder_and_template(
        options.tokenizer_path,
        options.tokenizer_revision,
        options.trust_remote_code,
        options.tokenizer_fingerprint,
        options.template,
    )
    with pa.OSFile(task.output, "wb") as sink, pa.ipc.new_file(sink, DOCUMENTS_SCHEMA) as writer:
        for is_text, rows in groupby(_conversations(task, tally), key=lambda row: row[0].text is not None):
            while batch := list(islice(rows, _DOCUMENTS_AT_ONCE)):
                if is_text:
                    documents = _text_documents(batch, encoder, tally)
                else:
                    assert template is not None
                    documents = _chat_documents(batch, encoder, template, options.targets, tally)
                pieces = [
                    piece for document in documents for piece in _fitted(document, options.max_length, task.too_long, tally)
                ]
                for piece in pieces:
                    if not piece.is_cut and not _ends_with_special(piece, encoder):
                        tally.add("unending", piece.origin)
                if pieces:
                    writer.write_batch(_record_batch(pieces))
    return ShardResult(source=task.source, path=task.output, tally=tally)


def formats_of(sources: Sequence[DataSource], scanned: Sequence[Sequence[ScannedFile]]) -> list[DataFormat]:
    """The format of each source, by its first good row.

    Raises:
        DataError: if a source has no good row, or its format cannot be told.
    """
    formats = []
    for source, files in zip(sources, scanned, strict=True):
        tally = Tally()
        rows = ((file.file.name, row) for file in files for part in file.segments for row in read_segment(part))
        for name, row in rows:
            if not isinstance(row, BadRow):
                formats.append(format_of(source, row.values))
                break
            tally.add("bad", Origin(name, row.line), row.reason)
        else:
            if tally.counts:
                raise bad_rows_error(tally)
            raise DataError(f"{source.path} has no rows.")
    return formats


def read_conversations(source: DataSource, downloads: Path, tally: Tally) -> Iterator[Conversation]:
    """All conversations of a source up to `max_rows`, in order; for previews and generated answers.

    Args:
        tally: of rows that were read, and of those that cannot be used.

    Raises:
        DataError: if no row can be used, or their format cannot be told.
    """
    scanned = [scan(file, source.max_rows) for file in find_files(source, downloads)]
    (name,) = formats_of([source], [scanned])
    parts = [
        ShardPart(segment=segment, file_index=0, format=name, is_named=names_format(source, name), columns=source.columns)
        for file in scanned
        for segment in file.segments
    ]
    return (conversation for conversation, _ in _read(parts, source.max_rows, tally, "all", 0.0))


# --- Tokens of texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Tokens of several texts, one after the other. Places are bytes (UTF-8) in the concatenation of all texts."""

    input_ids: np.ndarray
    first_tokens: np.ndarray
    """Index of each text's first token, and the number of tokens."""
    starts: np.ndarray
    ends: np.ndarray
    first_bytes: np.ndarray
    """Place of each text's first byte, and the number of bytes."""
    token_bytes: np.ndarray
    """Bytes of text that each token adds; 0 for special tokens."""


class TextEncoder:
    """A tokenizer, and where its tokens lie in the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        self._backend.no_truncation()
        self._backend.no_padding()
        self._eos: Any = tokenizer.eos_token_id
        self._bos: list[Any] = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self._name = tokenizer.name_or_path
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        size = max(vocabulary.values(), default=0) + 1
        self.is_special = np.zeros(size, bool)
        self.is_special[[i for i, token in added.items() if token.special]] = True
        self.is_special[tokenizer.all_special_ids] = True
        self._normaliser, is_byte_level = _byte_level_bpe(self._backend)
        self._lengths: np.ndarray | None = None
        if is_byte_level:
            self._lengths = np.zeros(size, np.int64)
            self._lengths[list(vocabulary.values())] = [len(token) for token in vocabulary]
            for i, token in added.items():
                self._lengths[i] = len(token.content.encode())

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Tokenise texts as they are: no special token is added."""
        sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        first_bytes = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        return self._encode_by_length(texts, first_bytes) or self._encode_by_offset(texts, first_bytes)

    def decode(self, token: int) -> str:
        return self._backend.decode([token], skip_special_tokens=False)

    def around_documents(self) -> tuple[list[int], list[int]]:
        """The tokens that stand before and behind those of a plain document.

        Raises:
            DataError: if the tokenizer has no end-of-text token.
        """
        if self._eos is None:
            raise DataError(
                f"Plain text needs an end-of-text token, but the tokenizer '{self._name}' has none. "
                f"Set eos_token in its tokenizer_config.json."
            )
        return self._bos, [self._eos]

    def _encode_by_length(self, texts: Sequence[str], first_bytes: np.ndarray) -> EncodedTexts | None:
        """Places from the lengths of the tokens, or None where they do not add up to the texts."""
        if self._lengths is None:
            return None
        if self._normaliser == "NFC" and not all(unicodedata.is_normalized("NFC", text) for text in texts):
            return None
        input_ids, first_tokens = _flat_ids(self._backend.encode_batch_fast(list(texts), add_special_tokens=False))
        lengths = self._lengths[input_ids]
        ends = np.cumsum(lengths)
        # A token that swallows white space beside it, for one, makes the sums differ.
        if not np.array_equal(np.concatenate([[0], ends])[first_tokens], first_bytes):
            return None
        token_bytes = np.where(self.is_special[input_ids], 0, lengths)
        return EncodedTexts(input_ids, first_tokens, ends - lengths, ends, first_bytes, token_bytes)

    def _encode_by_offset(self, texts: Sequence[str], first_bytes: np.ndarray) -> EncodedTexts:
        """Places that the tokenizer has tracked, from characters to bytes."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        input_ids, first_tokens = _flat_ids(encodings)
        numbers = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
        places = np.fromiter(numbers, np.int64, 2 * len(input_ids)).reshape(-1, 2)
        for index, text in enumerate(texts):
            in_text = slice(first_tokens[index], first_tokens[index + 1])
            if not text.isascii():
                places[in_text] = _bytes_before(text)[places[in_text]]
            places[in_text] += first_bytes[index]
        # Neither may ever decrease; a token without text of its own lies where the one before it ended.
        starts, ends = np.maximum.accumulate(places[:, 0]), np.maximum.accumulate(places[:, 1])
        covered = np.concatenate([[0], ends[:-1]])
        token_bytes = np.where(self.is_special[input_ids], 0, np.maximum(0, ends - np.maximum(starts, covered)))
        return EncodedTexts(input_ids, first_tokens, starts, ends, first_bytes, token_bytes)


def _flat_ids(encodings: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    ids = [encoding.ids for encoding in encodings]
    first_tokens = np.concatenate([[0], np.cumsum([len(one) for one in ids], dtype=np.int64)])
    return np.fromiter(chain.from_iterable(ids), np.int32, int(first_tokens[-1])), first_tokens


def _bytes_before(text: str) -> np.ndarray:
    """UTF-8 bytes before each character of a text, and its size."""
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])


def _byte_level_bpe(backend: Any) -> tuple[str | None, bool]:
    """The normaliser's name, and whether a token's characters are the bytes of the text that it stands for."""
    description = json.loads(backend.to_str())
    normaliser = (description["normalizer"] or {}).get("type")
    before = description["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    is_byte_level = (
        description["model"]["type"] == "BPE"
        and normaliser in (None, "NFC")
        and sum(step.get("type") == "ByteLevel" for step in steps) == 1
        and all(
            not step.get("add_prefix_space") if step.get("type") == "ByteLevel" else step.get("behavior") == "Isolated"
            for step in steps
        )
    )
    return normaliser, is_byte_level


# --- Documents ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Document:
    input_ids: np.ndarray
    is_target: np.ndarray
    token_bytes: np.ndarray
    file_index: int
    origin: Origin
    target_weights: np.ndarray | None = None
    """float32, per token; None: each weighs 1."""
    is_cut: bool = False


@lru_cache(maxsize=2)
def _encoder_and_template(
    path: str, revision: str | None, trust_remote_code: bool, fingerprint: str, template: str
) -> tuple[TextEncoder, ChatTemplate | None]:
    """Loaded once per process, which may tokenise many shards. Plain text needs no template."""
    tokenizer = open_tokenizer(path, revision, trust_remote_code)
    if tokenizer_fingerprint(tokenizer) != fingerprint:
        raise DataError(
            f"The tokenizer at '{path}' on {os.uname().nodename} is not the one that this run was planned with. "
            f"Put the same model files on every node, or give a hub id with model.revision."
        )
    return TextEncoder(tokenizer), ChatTemplate(tokenizer, template) if template else None


def _conversations(task: ShardTask, tally: Tally) -> Iterator[tuple[Conversation, int]]:
    options = task.options
    rows = _read(task.parts, task.max_rows, tally, options.side, options.validation_fraction)
    return (row for row in rows if _can_be_obeyed(row[0], options.targets, tally))


def _read(
    parts: Sequence[ShardPart], max_rows: int | None, tally: Tally, side: Side | Literal["all"], validation_fraction: float
) -> Iterator[tuple[Conversation, int]]:
    """Conversations of the wanted side, each with the number of its file; bad rows are tallied."""
    rows = ((part, row) for part in parts for row in read_segment(part.segment))
    for part, row in islice(rows, max_rows):
        tally.add("rows")
        origin = Origin(part.segment.file.name, row.line)
        if isinstance(row, BadRow):
            tally.add("bad", origin, row.reason)
        elif side != "all" and side_of(row.values, validation_fraction) != side:
            tally.add("other_side")
        else:
            try:
                conversation = read_row(row.values, part.format, part.columns, origin, is_named=part.is_named)
            except RowError as error:
                tally.add("bad", origin, str(error))
            else:
                tally.unread_columns.update(conversation.unread_columns)
                tally.unread_keys.update(conversation.unread_keys)
                yield conversation, part.file_index


def _chat_documents(
    rows: Sequence[tuple[Conversation, int]], encoder: TextEncoder, template: ChatTemplate, targets: Targets, tally: Tally
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
    # Nothing comes before a document's first token that could predict it.
    is_target[encoded.first_tokens[:-1][np.diff(encoded.first_tokens) > 0]] = False
    for index, (conversation, file_index) in enumerate(usable):
        tokens = slice(encoded.first_tokens[index], encoded.first_tokens[index + 1])
        if tally.counts["prompts_compared"] < _PROMPTS_COMPARED:
            _compare_prompts(conversation, texts[index], encoded.input_ids[tokens], encoder, template, targets, tally)
        yield _Document(
            encoded.input_ids[tokens],
            is_target[tokens],
            encoded.token_bytes[tokens],
            file_index,
            conversation.origin,
            None if all(weight == 1 for weight in weights[index]) or all_weights is None else all_weights[tokens],
        )


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
    tally.counts["weighted_turns"] += sum(weight_of(row.messages[turn]) != 1 for turn in turns)
    blank = [turn for turn in turns if _is_blank_answer(row.messages[turn])]
    if blank:
        tally.add("blank_answers", row.origin, f"turn {blank[0] + 1}")


def _is_blank_answer(message: Message) -> bool:
    if message["role"] != "assistant" or message.get("tool_calls") or any(message.get(key) for key in REASONING):
        return False
    return not (message.get("content") or "").strip()


def _text_documents(rows: Sequence[tuple[Conversation, int]], encoder: TextEncoder, tally: Tally) -> Iterator[_Document]:
    """Plain documents: every token is a target but the first, which nothing predicts."""
    before, behind = encoder.around_documents()
    encoded = encoder.encode([row.text or "" for row, _ in rows])
    for index, (conversation, file_index) in enumerate(rows):
        if not (conversation.text or "").strip():
            tally.add("blank_answers", conversation.origin)
        tokens = slice(encoded.first_tokens[index], encoded.first_tokens[index + 1])
        input_ids = np.concatenate([np.array(before, np.int32), encoded.input_ids[tokens], np.array(behind, np.int32)])
        token_bytes = np.pad(encoded.token_bytes[tokens], (len(before), len(behind)))
        is_target = np.arange(len(input_ids)) > 0
        yield _Document(input_ids, is_target, token_bytes, file_index, conversation.origin)


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
