"""Which tokens of a run's rows are targets: the first documents of its store as pieces of text, and how long documents are."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from raytune.data.store.store import Store
from raytune.data.templates.pieces import Decode, Piece, TokenKind, pieces_of
from raytune.errors import RaytuneError
from raytune.plan.model.base_model import model_files
from raytune.plan.run_plan import RunPlan
from raytune.printable import in_a_line
from raytune.storage import is_local, local_path

NUM_DOCUMENTS = 3
MOST_TOKENS = 400
"""Shown of a document."""
MOST_ROWS = 2000
"""Packed rows whose documents are measured, spread over the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedDocument:
    """A document as it is trained."""

    origin: str
    """File and line."""
    num_tokens: int
    num_targets: int
    pieces: list[Piece]
    """Of its first tokens."""
    num_left_out: int
    """Tokens behind those that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """What can be seen of a run's rows."""

    documents: list[MarkedDocument]
    lengths: list[int]
    """Tokens of documents, in ascending order; of part of a large store."""


def marked(plan: RunPlan, model_folder: str) -> Marked | str:
    """The first documents of the training rows, or why they cannot be shown: they lie in a store, which may be elsewhere.

    Nothing is downloaded for it, and no code of a base runs.

    Args:
        model_folder: of the run, where its tokenizer lies once it has finished.
    """
    if plan.data.stream is not None:
        return "The rows were streamed: they lie in no store that could be looked into."
    try:
        store = Store.open(plan.data.train.path)
        file = _tokenizer_file(plan, model_folder)
        if file is None:
            return "The run's tokenizer is not on this machine, so that no row can be shown."
        tokenizer = Tokenizer.from_file(str(file))
    except (RaytuneError, OSError) as error:
        return str(error)
    except Exception as error:  # all that the library raises
        return f"{file} cannot be read: {in_a_line(error)}"
    return marked_rows(store, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))


def _tokenizer_file(plan: RunPlan, model_folder: str) -> Path | None:
    """That of the run's model, else that of its base, if one of them lies here."""
    folders = [local_path(model_folder)] if is_local(model_folder) else []
    folders.append(Path(model_files(plan.model.path, plan.model.revision)))
    return next((file for folder in folders if (file := folder / "tokenizer.json").is_file()), None)


def marked_rows(store: Store, decode: Decode) -> Marked:
    """The first documents of a store, and the lengths of those of rows spread over it."""
    documents: list[MarkedDocument] = []
    for index in range(min(NUM_DOCUMENTS, store.num_rows)):
        row, origins = store.row(index), store.origins(index)
        first = int(row.document_lengths[0])  # of each row one, since neighbours in a row may be much alike
        documents.append(_document(row.input_ids[:first], row.is_target[:first], origins[0], decode))
    chosen = np.unique(np.linspace(0, store.num_rows - 1, min(MOST_ROWS, store.num_rows)).astype(int))
    lengths = np.concatenate([store.row(int(index)).document_lengths for index in chosen])
    return Marked(documents=documents, lengths=sorted(lengths.tolist()))


def _document(ids: np.ndarray, is_target: np.ndarray, origin: str, decode: Decode) -> MarkedDocument:
    kinds = [TokenKind(is_target=bool(target)) for target in is_target[:MOST_TOKENS]]
    return MarkedDocument(
        origin=origin,
        num_tokens=len(ids),
        num_targets=int(is_target.sum()),
        pieces=pieces_of(ids[:MOST_TOKENS].tolist(), kinds, decode),
        num_left_out=max(0, len(ids) - MOST_TOKENS),
    )
