"""Rows as documents: tokens, which of them are targets, and how much those count."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import numpy as np

from raytune.data.conversations.conversation import Conversation, Message, Origin, RowError
from raytune.data.conversations.fields import REASONING
from raytune.data.conversations.long_chats import AT_TURNS, made_to_fit
from raytune.data.conversations.masking import Targets, excepted_turns, target_mask, target_weights, trained_turns, weight_of
from raytune.data.conversations.shaping import shaped
from raytune.data.conversations.token_classes import Span, TokenClass, spans_in, weights_of
from raytune.data.rows.audit import tally_question, tally_text
from raytune.data.rows.shards import Tally, TokenisingOptions, TooLong
from raytune.data.templates.prompts import difference, prompts_to_compare
from raytune.data.templates.template import ChatTemplate, Rendered, behind_empty_thoughts
from raytune.data.templates.text_encoder import EncodedTexts, TextEncoder, bytes_before

_BLANK = re.compile(r"[\s\u00ad\u200b-\u200f\u2060\ufeff]*")
# Answers of a shard whose prompts are compared with what is trained, about.
_PROMPTS_COMPARED = 64


@dataclass(frozen=True, slots=True)
class Document:
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

    @property
    def num_targets(self) -> int:
        return int(self.is_target.sum())

    @property
    def num_uncut(self) -> int:
        """Tokens that it would have if it did not have to fit."""
        return max(len(self.input_ids), self.num_whole)


def chat_documents(
    rows: Sequence[tuple[Conversation, int]],
    encoder: TextEncoder,
    template: ChatTemplate,
    options: TokenisingOptions,
    too_long: TooLong,
    tally: Tally,
) -> Iterator[list[Document]]:
    """The documents of each row that can be used: one, or several where it is trained in pieces."""
    made = [shaped(row, options.shape, options.targets) for row, _ in rows]
    pieces = [(piece, file_index) for each, (_, file_index) in zip(made, rows) for piece in each.pieces]
    encode = partial(
        encoded_chats,
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
            if too_long in AT_TURNS:
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
        contents = (message.get(key) for message in row.messages for key in ("content", *REASONING))
        _tally_special_tokens(contents, row.origin, encoder, tally)
        for piece, document in zip(each.pieces, documents):
            if document.rendered and document.rendered.num_hidden_thoughts:
                tally.counts["thoughts_not_shown"] += document.rendered.num_hidden_thoughts
            if document.rendered and (num_hidden := _num_hidden_names(piece, document.rendered.text, template)):
                tally.counts["names_not_shown"] += num_hidden
            if tally.counts["prompts_compared"] < _PROMPTS_COMPARED:
                _compare_prompts(piece, document, encoder, template, options.targets, tally)
        if options.targets != "all":
            tally.counts["empty_thoughts"] += sum(one.rendered.num_empty_thoughts for one in fitted if one.rendered)
        yield fitted


def _num_hidden_names(conversation: Conversation, text: str, template: ChatTemplate) -> int:
    """Turns whose speaker has a name (as in OpenAI's chats of several people) that the template did not write, even where it
    stands in somebody's words. That of a tool stands in its call."""
    named = [(message["role"], message["name"]) for message in conversation.messages if message.get("name")]
    return sum(role != "tool" and (role in template.roles_without_names or str(name) not in text) for role, name in named)


def _usable(found: Document | RowError) -> Document:
    if isinstance(found, RowError):
        raise found
    return found


def encoded_chats(
    rows: Sequence[tuple[Conversation, int]],
    encoder: TextEncoder,
    template: ChatTemplate,
    targets: Targets,
    classes: Sequence[TokenClass] = (),
    *,
    train_empty_thought: bool = True,
) -> list[Document | RowError]:
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
    documents: list[Document | RowError] = []
    index = 0
    for (conversation, file_index), rendered in zip(rows, all_rendered, strict=True):
        if isinstance(rendered, RowError):
            documents.append(rendered)
            continue
        tokens = slice(encoded.first_tokens[index], encoded.first_tokens[index + 1])
        row_weights = None if all(weight == 1 for weight in weights[index]) or all_weights is None else all_weights[tokens]
        index += 1
        documents.append(
            Document(
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
    document: Document,
    encode: Callable[[Sequence[tuple[Conversation, int]]], list[Document | RowError]],
    encoder: TextEncoder,
    options: TokenisingOptions,
    too_long: TooLong,
) -> list[Document]:
    """The document, or, where it is too long and that is to be mended at turns, those of what is made of its conversation.

    Raises:
        RowError: if a part of the conversation cannot be rendered.
    """
    limit, num_whole = options.max_length, len(document.input_ids)
    if num_whole <= limit:
        return [document]

    def of(piece: Conversation) -> Document:
        return _usable(encode([(piece, document.file_index)])[0])

    def length(piece: Conversation) -> int:
        return len(of(piece).input_ids)

    pieces = made_to_fit(row, limit, too_long, length, encoder.starts_of, is_last_trained_alone=options.targets == "last")
    if pieces == [row]:
        return [document]
    fitted = [replace(of(piece), num_whole=num_whole) for piece in pieces]
    if too_long == "split_turns":
        return fitted
    return [replace(kept, lost_targets=kept.num_targets < document.num_targets) for kept in fitted]


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


def _compare_prompts(
    row: Conversation, document: Document, encoder: TextEncoder, template: ChatTemplate, targets: Targets, tally: Tally
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


def _tally_turns(row: Conversation, targets: Targets, tally: Tally) -> None:
    """Count the turns that their row excepts from training or weighs, and rows with trained answers that say nothing."""
    if targets != "all" and (excepted := excepted_turns(row.messages, targets)):
        tally.counts["skipped_turns"] += len(excepted)
    turns = range(len(row.messages)) if targets == "all" else trained_turns(row.messages, targets)
    if weighted := {turn for turn, message in enumerate(row.messages) if weight_of(message) != 1}:
        tally.counts["weighted_turns"] += len(weighted.intersection(turns))
        tally.unread_keys.update(
            f"weight of {row.messages[turn]['role']}, which is not trained" for turn in weighted.difference(turns)
        )
    tally_question(row, turns, targets, tally)
    blank = [turn for turn in turns if _is_blank_answer(row.messages[turn])]
    if blank:
        tally.add("blank_answers", row.origin, f"turn {blank[0] + 1}")


def _is_blank_answer(message: Message) -> bool:
    if message["role"] != "assistant" or message.get("tool_calls") or any(message.get(key) for key in REASONING):
        return False
    return _is_blank(message.get("content") or "")


def _is_blank(text: str) -> bool:
    """Whether nobody sees anything of it: white space, and characters of no width."""
    return not text.strip() or _BLANK.fullmatch(text) is not None


def _tally_special_tokens(texts: Iterable[str | None], origin: Origin, encoder: TextEncoder, tally: Tally) -> None:
    """Count a row whose own text has what the tokenizer takes for a special token."""
    if found := next((found for text in texts if text and (found := encoder.special_in(text))), None):
        tally.add("special_tokens", origin, repr(found))


def text_documents(
    rows: Sequence[tuple[Conversation, int]], encoder: TextEncoder, classes: Sequence[TokenClass], tally: Tally
) -> Iterator[list[Document]]:
    """Plain documents: every token is a target but the first, which nothing predicts."""
    before, behind = encoder.around_documents()
    texts = [row.text or "" for row, _ in rows]
    encoded = encoder.encode(texts)
    of_class = _tokens_of_classes(classes, texts, [[(0, len(text))] for text in texts], encoded)
    for index, (conversation, file_index) in enumerate(rows):
        _tally_special_tokens([conversation.text], conversation.origin, encoder, tally)
        if _is_blank(conversation.text or ""):
            tally.add("blank_answers", conversation.origin)
        tally_text(conversation, tally)
        tokens = slice(encoded.first_tokens[index], encoded.first_tokens[index + 1])
        input_ids = np.concatenate([np.array(before, np.int32), encoded.input_ids[tokens], np.array(behind, np.int32)])
        token_bytes = np.pad(encoded.token_bytes[tokens], (len(before), len(behind)))
        is_target = np.arange(len(input_ids)) > 0
        of_class_here = np.pad(of_class[:, tokens], ((0, 0), (len(before), len(behind))))
        weights = weights_of(classes, of_class_here, None)
        yield [Document(input_ids, is_target, token_bytes, file_index, conversation.origin, weights, of_class_here.T)]


def _byte_of(text: str, character: int) -> int:
    return character if text.isascii() else len(text[:character].encode())
