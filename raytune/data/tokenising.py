"""From rows to tokens and targets, one shard of the sources at a time.

A shard is one call of a top-level function with a picklable task and result: it can run in any process that sees the files.
Text is rendered whole and tokenised once, and targets are found by where a token's text lies, so tokens are exactly those of
`apply_chat_template(tokenize=True)` (`text_encoder`).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa

from raytune.config.model import NewToken
from raytune.data.conversation import Conversation, Message, Origin, RowError
from raytune.data.fields import REASONING
from raytune.data.long_chats import split_at_turns, without_beginning
from raytune.data.masking import Targets, excepted_turns, is_excepted, target_mask, target_weights, trained_turns, weight_of
from raytune.data.prompts import difference, prompts_to_compare
from raytune.data.shaping import shaped
from raytune.data.shards import ShardResult, ShardTask, Tally, TokenisingOptions, TooLong
from raytune.data.source_rows import read_parts
from raytune.data.template import ChatTemplate, Rendered, behind_empty_thoughts
from raytune.data.text_encoder import EncodedTexts, TextEncoder, bytes_before
from raytune.data.token_classes import Span, TokenClass, spans_in, weights_of
from raytune.data.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.data.turns import obeyed_requests
from raytune.errors import DataError

_DOCUMENTS_AT_ONCE = 256
_AT_TURNS = ("split_turns", "truncate_left")
"""Policies for long documents that make other conversations of them."""
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
        options.new_tokens,
        options.tokenizer_fingerprint,
        options.template,
    )
    with pa.OSFile(task.output, "wb") as sink, pa.ipc.new_file(sink, DOCUMENTS_SCHEMA) as writer:
        for is_text, rows in groupby(_conversations(task, tally), key=lambda row: row[0].text is not None):
            while batch := list(islice(rows, _DOCUMENTS_AT_ONCE)):
                if is_text:
                    documents = _text_documents(batch, encoder, options.token_classes, tally)
                else:
                    assert template is not None
                    documents = _chat_documents(batch, encoder, template, options, task.too_long, tally)
                pieces = [piece for of_row in documents for piece in _fitted(of_row, options.max_length, task.too_long, tally)]
                for piece in pieces:
                    _tally_classes(piece, options.token_classes, tally)
                    if not piece.is_cut and not _ends_with_special(piece, encoder):
                        tally.add("unending", piece.origin)
                if pieces:
                    writer.write_batch(_record_batch(pieces))
    for request in obeyed_requests(options.targets):
        tally.unread_keys.pop(request, None)
    return ShardResult(source=task.source, path=task.output, tally=tally)


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
    rendered: Rendered | None = None
    """What a template made of it; None: it is plain text."""
    is_cut: bool = False
    num_whole: int = 0
    """Tokens of the conversation that it is made of, where it has a part of its turns to fit; 0: it is whole."""
    lost_targets: bool = False
    """Whether some of what it has no part of was to be trained."""


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


def _conversations(task: ShardTask, tally: Tally) -> Iterator[tuple[Conversation, int]]:
    options = task.options
    rows = read_parts(task.parts, task.max_rows, tally, options.side, options.validation_fraction)
    return (row for row in rows if _can_be_obeyed(row[0], options.targets, tally))


def _chat_documents(
    rows: Sequence[tuple[Conversation, int]],
    encoder: TextEncoder,
    template: ChatTemplate,
    options: TokenisingOptions,
    too_long: TooLong,
    tally: Tally,
) -> Iterator[list[_Document]]:
    """The documents of each row that can be used: one, or several where it is trained in pieces."""
    made = [shaped(row, options.shape, options.targets) for row, _ in rows]
    pieces = [(piece, file_index) for each, (_, file_index) in zip(made, rows) for piece in each.pieces]
    encode = partial(
        _encoded_chats,
        encoder=encoder,
        template=template,
        targets=options.targets,
        classes=options.token_classes,
        train_empty_thought=options.train_empty_thought,
    )
    encoded = iter(encode(pieces))
    for (row, _), each in zip(rows, made, strict=True):
        found = list(islice(encoded, len(each.pieces)))
        try:
            fitted = documents = [_usable(one) for one in found]
            if too_long in _AT_TURNS:
                fitted = [
                    one
                    for piece, document in zip(each.pieces, documents)
                    for one in _fitted_at_turns(piece, document, encode, encoder, options, too_long)
                ]
        except RowError as error:
            tally.add("bad", row.origin, str(error))
            continue
        if each.counts:
            tally.counts.update(each.counts)
        _tally_turns(each.pieces[0] if len(each.pieces) == 1 else row, options.targets, tally)
        for piece, document in zip(each.pieces, documents):
            if document.rendered and document.rendered.num_hidden_thoughts:
                tally.counts["thoughts_not_shown"] += document.rendered.num_hidden_thoughts
            if tally.counts["prompts_compared"] < _PROMPTS_COMPARED:
                _compare_prompts(piece, document, encoder, template, options.targets, tally)
        if options.targets != "all":
            tally.counts["empty_thoughts"] += sum(one.rendered.num_empty_thoughts for one in fitted if one.rendered)
        yield fitted


def _usable(found: _Document | RowError) -> _Document:
    if isinstance(found, RowError):
        raise found
    return found


def _encoded_chats(
    rows: Sequence[tuple[Conversation, int]],
    encoder: TextEncoder,
    template: ChatTemplate,
    targets: Targets,
    classes: Sequence[TokenClass] = (),
    *,
    train_empty_thought: bool = True,
) -> list[_Document | RowError]:
    """The document of each conversation, or why there is none."""
    all_rendered = template.render([row for row, _ in rows], targets)
    if not train_empty_thought:
        all_rendered = [one if isinstance(one, RowError) else behind_empty_thoughts(one) for one in all_rendered]
    usable = [one for one in all_rendered if not isinstance(one, RowError)]
    texts, spans, weights = [one.text for one in usable], [one.targets for one in usable], [one.weights for one in usable]
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
    documents: list[_Document | RowError] = []
    index = 0
    for (conversation, file_index), rendered in zip(rows, all_rendered, strict=True):
        if isinstance(rendered, RowError):
            documents.append(rendered)
            continue
        tokens = slice(encoded.first_tokens[index], encoded.first_tokens[index + 1])
        row_weights = None if all(weight == 1 for weight in weights[index]) or all_weights is None else all_weights[tokens]
        index += 1
        documents.append(
            _Document(
                encoded.input_ids[tokens],
                is_target[tokens],
                encoded.token_bytes[tokens],
                file_index,
                conversation.origin,
                weights_of(classes, of_class[:, tokens], row_weights),
                of_class[:, tokens].T,
                rendered=rendered,
            )
        )
    return documents


def _fitted_at_turns(
    row: Conversation,
    document: _Document,
    encode: Callable[[Sequence[tuple[Conversation, int]]], list[_Document | RowError]],
    encoder: TextEncoder,
    options: TokenisingOptions,
    too_long: TooLong,
) -> list[_Document]:
    """The document, or, where it is too long and that is to be mended at turns, those of what is made of its conversation.

    Raises:
        RowError: if a part of the conversation cannot be rendered.
    """
    limit, num_whole = options.max_length, len(document.input_ids)
    if num_whole <= limit:
        return [document]

    def of(piece: Conversation) -> _Document:
        return _usable(encode([(piece, document.file_index)])[0])

    def length(piece: Conversation) -> int:
        return len(of(piece).input_ids)

    if too_long == "split_turns":
        pieces = split_at_turns(row, limit, length)
        if len(pieces) == 1:
            return [document]
        # That an answer is the last one is true of the conversation, not of each of its pieces.
        return [replace(of(piece), num_whole=num_whole) for piece in (pieces[-1:] if options.targets == "last" else pieces)]
    shorter = without_beginning(row, limit, length, encoder.starts_of)
    if shorter is None:
        return [document]
    kept = of(shorter)
    return [replace(kept, num_whole=num_whole, lost_targets=_num_targets(kept) < _num_targets(document))]


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
    row: Conversation, document: _Document, encoder: TextEncoder, template: ChatTemplate, targets: Targets, tally: Tally
) -> None:
    """Tally the trained answers of a row whose prompt is, and is not, token by token what they are trained behind."""
    assert document.rendered is not None
    prompts = prompts_to_compare(template, row, document.rendered.text, targets)
    encoded = encoder.encode(prompts)
    for index in range(len(prompts)):
        asked = encoded.input_ids[encoded.first_tokens[index] : encoded.first_tokens[index + 1]]
        tally.add("prompts_compared")
        if found := difference(asked.tolist(), document.input_ids.tolist(), encoder.decode):
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
) -> Iterator[list[_Document]]:
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
        yield [_Document(input_ids, is_target, token_bytes, file_index, conversation.origin, weights, of_class_here.T)]


def _fitted(documents: Sequence[_Document], limit: int, too_long: TooLong, tally: Tally) -> list[_Document]:
    """The documents of a row, or what the policy for long ones makes of them, without pieces that have no target."""
    with_targets, origin = [document for document in documents if document.is_target.any()], documents[0].origin
    if not with_targets:
        tally.add("no_target", origin)
        return []
    if any(document.num_whole or len(document.input_ids) > limit for document in documents):
        trained = _made_shorter(documents, with_targets, limit, too_long, tally)
    else:
        trained = with_targets
    if trained:
        tally.add("used")
        tally.counts["documents"] += len(trained)
        tally.counts["tokens"] += sum(len(piece.input_ids) for piece in trained)
        tally.counts["targets"] += sum(map(_num_targets, trained))
    return trained


def _made_shorter(
    documents: Sequence[_Document], with_targets: Sequence[_Document], limit: int, too_long: TooLong, tally: Tally
) -> list[_Document]:
    made = [(document, _cut(document, limit, too_long)) for document in with_targets]
    origin, length = documents[0].origin, f"{max(max(len(one.input_ids), one.num_whole) for one in documents)} tokens"
    if not any(pieces for _, pieces in made):
        tally.add("dropped", origin, length)
        return []
    if any(document.lost_targets or sum(map(_num_targets, pieces)) < _num_targets(document) for document, pieces in made):
        tally.add("cut", origin, length)
    is_whole = not any(document.num_whole for document in documents)
    if too_long == "truncate_left" and not is_whole:
        tally.add("shortened", origin, length)
    if any(len(pieces) > 1 for _, pieces in made) or (too_long == "split_turns" and not is_whole):
        tally.add("split", origin, length)
    trained = [piece for _, pieces in made for piece in pieces if piece.is_target.any()]
    if not trained:
        tally.add("cut_off", origin, length)
    return trained


def _cut(document: _Document, limit: int, too_long: TooLong) -> list[_Document]:
    """Pieces of a document that fit; none if it is left out."""
    num_tokens = len(document.input_ids)
    if num_tokens <= limit:
        return [document]
    match too_long:
        case "drop" | "error":
            return []
        case "truncate" | "split_turns":
            return [_piece(document, 0, limit)]
        case "truncate_left":  # of a chat no answer is cut
            return [] if document.rendered is not None else [_piece(document, num_tokens - limit, num_tokens)]
        case "split":
            # The last token of a piece begins the next one, which then predicts every target just once.
            return [_piece(document, start, start + limit) for start in range(0, num_tokens - 1, max(1, limit - 1))]


def _num_targets(document: _Document) -> int:
    return int(document.is_target.sum())


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
