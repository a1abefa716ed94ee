"""Whether an answer is trained behind the very tokens that a model will be asked with.

A model is asked with the tokens of its prompt. In training the prompt's text is tokenised with the answer behind it, and a
tokenizer may take letters of both into one token, or the template may write another text: then the answer is learned behind
tokens that no prompt ends with, and is not found again, at the same loss.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from raytune.data.conversation import Conversation, RowError
from raytune.data.masking import Targets, trained_turns
from raytune.data.template import ChatTemplate

_NUM_SHOWN = 4


def prompt_differences(
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    text: str,
    input_ids: Sequence[int],
    targets: Targets,
) -> list[str | None]:
    """Compare the prompts of a row's trained answers with what the row is trained on.

    An answer that another follows is left out where the template writes the turns before it otherwise once there are
    more, as those do that keep only the last thought; its prompt is then no part of the row.

    Args:
        text: what the template made of the conversation.
        input_ids: its tokens.

    Returns:
        For each answer that was compared None if its prompt is, token by token, what stands in front of it; else how they differ.
    """
    if targets == "all" or not isinstance(targets, str):
        return []
    turns = [turn for turn in trained_turns(conversation.messages, targets) if turn > 0]
    compared: list[str | None] = []
    for turn, prompt in zip(turns, template.prompts(conversation, turns)):
        if isinstance(prompt, RowError):
            continue
        is_prefix = text.startswith(prompt)
        if not is_prefix and turn != turns[-1]:
            continue
        compared.append(_difference(tokenizer, prompt, input_ids))
    return compared


def _difference(tokenizer: PreTrainedTokenizerBase, prompt: str, input_ids: Sequence[int]) -> str | None:
    prompt_ids: Sequence[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    same = next((i for i, (one, other) in enumerate(zip(prompt_ids, input_ids)) if one != other), len(prompt_ids))
    if same == len(prompt_ids):
        return None

    def shown(ids: Sequence[int]) -> str:
        first = max(0, same - 2)
        return "|".join(repr(tokenizer.decode([id_]))[1:-1] for id_ in ids[first : first + _NUM_SHOWN])

    return f"asked with ...{shown(prompt_ids)}, trained on ...{shown(input_ids)}..."
