"""A conversation with models, for a terminal, a script or a notebook."""

import json
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from raytune.data.conversations.conversation import Message
from raytune.errors import UserError
from raytune.evaluation.generation import Written
from raytune.serving.speaker import Speaker
from raytune.serving.talk import Style, Talk


class Chat:
    """A conversation. Its models are loaded when they are first asked, and its end lets go of them.

    One answer is written at a time: who asks on, or changes what was said, ends the one that is not read to its end.

    Attributes:
        model: name of the one that is asked.
        style: how answers are written.
        last: the last answer, how many tokens it has and whether the model ended it; None: there is none, or it was given up.
    """

    def __init__(self, speaker: Speaker, model: str, *, style: Style | None = None, system: str | None = None) -> None:
        self.style = style or Style()
        self.last: Written | None = None
        self.model = model
        self._speaker = speaker
        self._talk = Talk(system=system)
        self._num_answers = 0
        self._answer: Callable[[], Generator[str] | None] = lambda: None
        """The last one, as long as somebody may read on in it."""

    def __enter__(self) -> "Chat":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the models."""
        self._end_answer()
        self._speaker.close()

    @property
    def models(self) -> dict[str, str]:
        """Name -> what it is, of all that can be asked."""
        return dict(self._speaker.models)

    @property
    def messages(self) -> list[Message]:
        """What was said so far, with the system message."""
        return list(self._talk.messages)

    @property
    def system(self) -> str | None:
        """The system message."""
        return self._talk.system

    @system.setter
    def system(self, text: str | None) -> None:
        self._end_answer()
        self._talk = replace(self._talk, system=text or None)

    def use(self, model: str) -> None:
        """Ask another model from now on; it reads the conversation so far as its own.

        Raises:
            UserError: if there is none of that name.
        """
        if model not in self._speaker.models:
            raise UserError(f"There is no model {model!r} here: {', '.join(self._speaker.models)}.")
        self.model = model

    def ask(self, text: str) -> str:
        """Ask, and wait for the whole answer.

        Raises:
            UserError: if the model cannot be asked that: the conversation is longer than its positions, say. It stays as it was.
        """
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """Ask, and get the answer as it is written. Who stops reading ends it; what was read stays in the conversation.

        Raises:
            UserError: as `ask`.
        """
        self._end_answer()
        return self._begun(self._talk.asked(text))

    def retry(self) -> Iterator[str]:
        """Ask the last question again, as `stream`; another answer takes the place of the one that there was.

        Raises:
            UserError: if nothing was asked, or as `ask`.
        """
        self._end_answer()
        return self._begun(self._talk.without_last_answer())

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self._end_answer()
        self._talk = Talk(system=self._talk.system)

    def save(self, path: str) -> None:
        """Append the conversation to a file, as a row that training reads.

        Raises:
            UserError: if nothing was said, or the file cannot be written.
        """
        if not self._talk.turns:
            raise UserError("Nothing was said that could be saved.")
        row = json.dumps({"messages": self.messages}, ensure_ascii=False)
        try:
            with Path(path).expanduser().open("a", encoding="utf-8") as file:
                file.write(row + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error

    def _end_answer(self) -> None:
        """Have no model write on whose adapter the next one switches, and no answer come to a conversation that has gone on. A
        notebook keeps one alive that was interrupted."""
        if (answer := self._answer()) is not None:
            answer.close()

    def _begun(self, asked: Talk) -> Iterator[str]:
        answer = self._answers(asked)
        self._answer = weakref.ref(answer)  # what nobody reads any more ends by itself
        return answer

    def _answers(self, asked: Talk) -> Generator[str]:
        read: list[str] = []
        self.last, number = None, self._num_answers
        self._num_answers += 1
        try:
            style = self.style
            answer = self._speaker.answer(self.model, asked.messages, style.max_new_tokens, style.sampling, number)
            with closing(answer) as pieces:
                while True:
                    piece = next(pieces)
                    read.append(piece)
                    yield piece
        except StopIteration as end:
            self.last = end.value
        finally:
            if read or self.last is not None:
                self._talk = asked.answered("".join(read))
