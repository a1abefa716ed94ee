"""Faults that a row can have and that training would not show, looked for while rows become tokens. How many of them a run may
have, `plan.data.data_limits` says."""

from collections.abc import Sequence

import numpy as np

from raytune.data.conversations.conversation import Conversation, Origin
from raytune.data.conversations.masking import Targets
from raytune.data.rows.shards import Tally
from raytune.plan.data.row_lengths import bucket_of

TURNS_IN_TEXT = (
    ("<|im_start|>user", "<|im_start|>assistant"),
    ("<|start_header_id|>user", "<|start_header_id|>assistant"),
    ("<start_of_turn>user", "<start_of_turn>model"),
    ("<|start_of_role|>user", "<|start_of_role|>assistant"),
    ("<|start|>user", "<|start|>assistant"),
    ("<|user|>", "<|assistant|>"),
    ("<|prompter|>", "<|assistant|>"),
    ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
    ("[INST]", "[/INST]"),
    ("### Instruction:", "### Response:"),
    ("### Human:", "### Assistant:"),
    ("### User:", "### Assistant:"),
    ("<human>:", "<bot>:"),
    ("USER:", "ASSISTANT:"),
)
"""How templates and files of rows begin a question and, behind it, its answer."""

_CHARACTERS_LOOKED_AT = 1 << 14
"""Of a document: a chat begins with its first turns, and books are long."""
_LEAST_QUESTION, _LEAST_ANSWER = 24, 16
"""Characters of a question that is repeated and of what is behind it: an answer may begin with a word of its question, and a
corrected sentence with the sentence."""


def tally_document(input_ids: np.ndarray, num_tokens: int, bos: int | None, origin: Origin, tally: Tally) -> None:
    """Count a row that became tokens by its length, and as one that begins with two beginning-of-text tokens.

    Args:
        input_ids: of the document, or the first of several, that it became.
        num_tokens: that it has where nothing is cut to fit.
    """
    if not len(input_ids):
        return
    tally.lengths[bucket_of(num_tokens)] += 1
    if bos is not None and input_ids[:2].tolist() == [bos, bos]:
        tally.add("double_bos", origin)


def tally_question(row: Conversation, trained: Sequence[int], targets: Targets, tally: Tally) -> None:
    """Count a chat whose answer has its question in it, which is trained with it.

    Args:
        trained: its turns that carry loss.
    """
    if targets == "all" or "user" in targets:
        return
    for turn in trained:
        if turn and row.messages[turn]["role"] == "assistant" and row.messages[turn - 1]["role"] == "user":
            question, answer = (_text_of(row.messages[index].get("content")) for index in (turn - 1, turn))
            if len(question) >= _LEAST_QUESTION and len(answer) >= len(question) + _LEAST_ANSWER and answer.startswith(question):
                tally.add("prompt_trained", row.origin, f"the answer in turn {turn + 1} begins with all of its question")
                return


def tally_text(row: Conversation, tally: Tally) -> None:
    """Count a plain document that holds the turns of a chat."""
    text = (row.text or "")[:_CHARACTERS_LOOKED_AT]
    for question, answer in TURNS_IN_TEXT:
        if (at := text.find(question)) >= 0 and text.find(answer, at) >= 0:
            tally.add("prompt_trained", row.origin, f"a chat as plain text: {question!r} and {answer!r}")
            return


def _text_of(content: object) -> str:
    return content.strip() if isinstance(content, str) else ""
