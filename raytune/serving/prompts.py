"""Prompts of requests as the tokens that a model goes on from: in its own template, tokenised as its rows were in training."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from raytune.data.conversation import Conversation, Origin, RowError
from raytune.data.formats import read_row
from raytune.data.rendering import Job, Renderer
from raytune.data.template_text import name_of
from raytune.errors import DataError
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
        param = "messages" if isinstance(prompt, Chat) else "prompt"
        if isinstance(prompt, tuple):
            ids: Any = prompt
        elif isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            ids = self.tokenizer(self._text_of(prompt), add_special_tokens=False)["input_ids"]
        if not ids:
            raise bad("The prompt is empty: there is nothing to go on from.", param)
        if (unknown := next((token for token in ids if not 0 <= token < self.vocab), None)) is not None:
            raise bad(f"The prompt has token {unknown}, and this model knows tokens 0 to {self.vocab - 1}.", param)
        return tuple(ids)

    def _text_of(self, chat: Chat) -> str:
        if not self.template:
            raise bad(
                "This model has no chat template, so that it cannot be asked in turns. Ask /v1/completions, or start "
                "the endpoint with --template.",
                "messages",
            )
        try:
            row = {"messages": [*chat.messages], "tools": [*chat.tools]}
            conversation = read_row(row, "messages", {}, Origin("request", 1))
            text = self._renderer.one(Job(conversation.messages, conversation.tools, opens_answer=True))
        except (RowError, DataError) as error:
            raise bad(f"{error}.", "messages") from error
        if isinstance(text, RowError):
            raise bad(f"{text}.", "messages")
        self._refuse_hidden(conversation, text)
        return text

    def _refuse_hidden(self, conversation: Conversation, text: str) -> None:
        """Refuse a chat of which the template leaves something out. What the model said before, it may shorten."""
        shown = _bare(text)
        for number, message in enumerate(conversation.messages):
            content = message.get("content")
            if message["role"] != "assistant" and isinstance(content, str) and _bare(content) not in shown:
                raise bad(f"{self._name} does not show messages[{number}], of role {message['role']}.", f"messages[{number}]")
        for number, tool in enumerate(conversation.tools or ()):
            name = tool.get("function", tool).get("name")
            if not isinstance(name, str) or _bare(name) not in shown:
                raise bad(f"{self._name} does not show tools[{number}]: this model was made for no tools.", "tools")

    @cached_property
    def _name(self) -> str:
        return name_of(self.template, self.tokenizer)

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.template, self._name)


def _bare(text: str) -> str:
    """Without case and white space, which are the template's."""
    return "".join(text.casefold().split())
