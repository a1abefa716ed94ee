"""Documents that are longer than a packed row: what `data.too_long` makes of them."""

from collections.abc import Sequence

from raytune.data.rows.documents import Document
from raytune.data.rows.shards import Tally, TooLong


def fitted(documents: Sequence[Document], limit: int, too_long: TooLong, tally: Tally) -> list[Document]:
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
        tally.counts["targets"] += sum(one.num_targets for one in trained)
    return trained


def _made_shorter(
    documents: Sequence[Document], with_targets: Sequence[Document], limit: int, too_long: TooLong, tally: Tally
) -> list[Document]:
    made = [(document, _cut(document, limit, too_long)) for document in with_targets]
    origin, length = documents[0].origin, f"{max(one.num_uncut for one in documents)} tokens"
    if not any(pieces for _, pieces in made):
        tally.add("dropped", origin, length)
        return []
    if any(document.lost_targets or sum(one.num_targets for one in pieces) < document.num_targets for document, pieces in made):
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


def _cut(document: Document, limit: int, too_long: TooLong) -> list[Document]:
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


def _piece(document: Document, start: int, stop: int) -> Document:
    is_target = document.is_target[start:stop].copy()
    is_target[0] = False
    return Document(
        document.input_ids[start:stop],
        is_target,
        document.token_bytes[start:stop],
        document.file_index,
        document.origin,
        None if document.target_weights is None else document.target_weights[start:stop],
        document.of_class[start:stop],
        is_cut=stop < len(document.input_ids),
    )
