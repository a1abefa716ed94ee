"""Prompts of requests as the tokens that a model goes on from: in its own template, tokenised as its rows were in training."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from raytune.data.conversations.conversation import Conversation, Origin, RowError
from raytune.data.formats.recognising import AS_MESSAGES, read_row
from raytune.data.templates.text import name_of
from raytune.errors import DataError
from raytune.evaluation.asked_rows import Prompter
from raytune.serving.openai_errors import bad
from raytune.serving.protocol import Chat


@dataclass(frozen=True)
class Prompts:
    """Of one model.

    Not for several threads at once: a tokenizer of the library below may be asked by one only.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    """Jinja; empty: none, so that only texts can be asked."""
    vocab: int
    """Tokens that the model has embeddings for."""

    def ids_of(self, prompt: Chat | str | tuple[int, ...]) -> tuple[int, ...]:
        """Tokens, at least one.

        Raises:
            Refused: if turns cannot be rendered, or the model knows no such token.
        """
        try:
            if isinstance(prompt, tuple):
                return self._prompter.checked(prompt)
            if isinstance(prompt, str):
                return self._prompter.prompt_ids(prompt)
            row = {"messages": [*prompt.messages], "tools": [*prompt.tools]}
            conversation = read_row(row, AS_MESSAGES, Origin("request", 1))
            self._refuse_hidden(conversation, self._prompter.rendered(conversation.messages, conversation.tools))
            return self._prompter.prompt_ids(conversation.messages, conversation.tools)
        except (RowError, DataError) as error:
            raise bad(f"{error}.", "messages" if isinstance(prompt, Chat) else "prompt") from error

    def _refuse_hidden(self, conversation: Conversation, text: str) -> None:
        """Refuse a chat of which the template leaves something out. What the model said before, it may shorten."""
        shown = _bare(text)
        for number, message in enumerate(conversation.messages):
            content = message.get("content")
            if message["role"] != "assistant" and isinstance(content, str) and _bare(content) not in shown:
                raise bad(f"{self._name} does not show messages[{number}], of role {message['role']}.", f"messages[{number}]")
        for number, tool in enumerate(conversation.tools or ()):
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str):
                raise bad(f"tools[{number}] is no function with a name.", f"tools[{number}]")
            if _bare(name) not in shown:
                raise bad(f"{self._name} does not show tools[{number}]: this model was made for no tools.", "tools")

    @cached_property
    def _name(self) -> str:
        return name_of(self.template, self.tokenizer)

    @cached_property
    def _prompter(self) -> Prompter:
        return Prompter(self.tokenizer, self.template, vocab=self.vocab, positions=None)  # the engine knows its positions


def _bare(text: str) -> str:
    """Without case and white space, which are the template's."""
    return "".join(text.casefold().split())
