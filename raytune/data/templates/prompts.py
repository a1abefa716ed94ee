"""Whether an answer is trained behind the very tokens that a model will be asked with.

A model is asked with the tokens of its prompt. In training the prompt's text is tokenised with the answer behind it, and a
tokenizer may take letters of both into one token, or the template may write another text: then the answer is learned behind
tokens that no prompt ends with, and is not found again, at the same loss.
"""

from collections.abc import Callable, Sequence

from raytune.data.conversations.conversation import Conversation, RowError
from raytune.data.conversations.masking import Targets, trained_turns
from raytune.data.templates.template import ChatTemplate

_NUM_SHOWN = 4


def prompts_to_compare(template: ChatTemplate, conversation: Conversation, text: str, targets: Targets) -> list[str]:
    """The prompts for the trained answers of a row.

    Without those of earlier answers where the template writes the turns before them otherwise once there are more, as templates
    do that keep the last thought only.

    Args:
        text: what the template made of the conversation.
    """
    trained = range(len(conversation.messages)) if targets == "all" else trained_turns(conversation.messages, targets)
    turns = [turn for turn in trained if turn > 0 and conversation.messages[turn]["role"] == "assistant"]
    prompts = zip(turns, template.prompts(conversation, turns))
    return [
        prompt for turn, prompt in prompts if not isinstance(prompt, RowError) and (turn == turns[-1] or text.startswith(prompt))
    ]


def difference(asked: Sequence[int], trained: Sequence[int], decode: Callable[[int], str]) -> str | None:
    """How the tokens of a prompt differ from those that a row begins with, in words; None if they do not."""
    same = next((i for i, (one, other) in enumerate(zip(asked, trained)) if one != other), min(len(asked), len(trained)))
    if same == len(asked):
        return None
    first = max(0, same - 2)
    theirs, ours = ("|".join(map(decode, map(int, ids[first : first + _NUM_SHOWN]))) for ids in (asked, trained))
    return f"asked with the tokens {theirs!r}, trained behind {ours!r}"
