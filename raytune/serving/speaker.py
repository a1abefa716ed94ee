"""Who answers in a conversation: models that this process holds in memory, one after the other."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

import torch

from raytune.data.conversations.conversation import Message, Origin, RowError
from raytune.errors import UserError
from raytune.evaluation.asked_rows import IN_PYTHON, AskedRow, Prompter, TooLong, with_system
from raytune.evaluation.generation import Written
from raytune.evaluation.streaming import stream_answer
from raytune.launch.asking.models_to_ask import Subject, ToAsk
from raytune.model.files.hub import bring_base
from raytune.model.inference import HeldModels, Loaded
from raytune.plan.run_plan import SamplingPlan
from raytune.plan.saved.asked_model import on_device


class Speaker(Protocol):
    """Models by name that can be asked."""

    @property
    def models(self) -> Mapping[str, str]:
        """Name -> what it is."""
        ...

    def answer(
        self, model: str, messages: Sequence[Message], max_new_tokens: int, sampling: SamplingPlan | None, number: int
    ) -> Generator[str, None, Written]:
        """An answer, piece by piece. Who closes the generator ends it.

        Args:
            sampling: how it is drawn; None: the likeliest token each time.
            number: of the answer, from which its tokens are drawn.

        Raises:
            UserError: if the model cannot be asked that.
        """
        ...

    def close(self) -> None:
        """Let go of all that is held."""
        ...


class HeldSpeaker:
    """Models of this process, on its GPU if it has one."""

    def __init__(self, to_ask: ToAsk, *, in_turns: bool = True) -> None:
        self._subjects = {one.name: one for one in to_ask.subjects}
        self._in_turns = in_turns
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._held = HeldModels(self._device)
        self._prompters: dict[str, Prompter] = {}

    @property
    def models(self) -> Mapping[str, str]:
        return {name: one.source for name, one in self._subjects.items()}

    def question(self, model: str, text: str, system: str | None = None) -> tuple[Message, ...] | str:
        """What a model is asked by a text alone: turns, or itself where there is no template.

        Raises:
            UserError: if there is a system message, and no template.
        """
        prompter = self._prompter(model)
        asked = prompter.turns_of(AskedRow(origin=Origin(IN_PYTHON, 1), text=text))
        if not isinstance(asked, str):
            return with_system(asked, system)
        if system is not None:
            raise UserError(f"{model} is asked without a chat template, and a system message is a turn. Leave it out.")
        return asked

    def refuse_speechless(self, model: str) -> None:
        """Refuse a model that has no chat template to talk in.

        Raises:
            UserError: with what to do about it.
        """
        if not self._prompter(model).asks_in_turns:
            raise UserError(
                f"{model} has no chat template, or was trained on plain text, so that there are no turns to talk in. Name a "
                f"template with --template if it was trained with one; `raytune generate --prompt` continues texts."
            )

    def answer(
        self, model: str, messages: Sequence[Message] | str, max_new_tokens: int, sampling: SamplingPlan | None, number: int
    ) -> Generator[str, None, Written]:
        prompter = self._prompter(model)
        try:
            prompt = prompter.prompt_ids(messages)
        except RowError as error:
            shorter = " Ask something shorter, or begin another conversation." if isinstance(error, TooLong) else ""
            raise UserError(f"{model} cannot be asked that: {str(error).rstrip('.')}.{shorter}") from error
        room = prompter.room(prompt, max_new_tokens)
        with ExitStack() as stack:
            loaded = self._loaded(self._subjects[model], stack)
            return (yield from stream_answer(loaded, prompt, max_new_tokens=room, sampling=sampling, row=number))

    def close(self) -> None:
        self._held.__exit__()

    def _loaded(self, one: Subject, stack: ExitStack) -> Loaded:
        asked = on_device(one.asked, self._device.type)
        bring_base(asked.model)
        try:
            return stack.enter_context(self._held.asked(asked))
        except BaseException:  # what is half loaded, or half of an adapter, is not asked
            self.close()
            self._held = HeldModels(self._device)
            raise

    def _prompter(self, model: str) -> Prompter:
        if model not in self._prompters:
            self._prompters[model] = self._subjects[model].prompter(in_turns=self._in_turns)
        return self._prompters[model]
