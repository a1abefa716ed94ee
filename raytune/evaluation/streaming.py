"""An answer as it is written, piece by piece: the same text, tokens and end as of an answer that is written whole."""

import re
from collections.abc import Generator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from raytune.evaluation.generation import Ends, Written, continued
from raytune.model.inference import Loaded
from raytune.plan.run_plan import SamplingPlan

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NO_CHARACTER = "\ufffd"


class TextSoFar:
    """The text of tokens that come one by one. What may still become another text is held back: bytes of a character that is not
    whole, and the last word where the tokenizer closes up spaces behind its back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._closes_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._tokens: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """What is new, once a token has come."""
        self._tokens.append(token)
        if _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))):
            return ""
        text = self._text().rstrip(_NO_CHARACTER)
        return self._new(text[: max(text.rfind(" "), 0)] if self._closes_up else text)

    def rest(self) -> str:
        """What was held back, when no token comes any more."""
        return self._new(self._text())

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens))

    def _new(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        new = text[len(self._given) :]
        self._given = text if new else self._given
        return new


def stream_answer(
    loaded: Loaded,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingPlan | None = None,
    row: int = 0,
) -> Generator[str, None, Written]:
    """Continue a prompt as `write_answers` does, and yield the text as it comes. Who closes the generator ends the answer.

    Args:
        row: number from which tokens are drawn.

    Returns:
        The whole answer, of which the pieces are the text.
    """
    ends, text = Ends(loaded.model, loaded.tokenizer, loaded.kept_tokens), TextSoFar(loaded.tokenizer)
    heard: SimpleQueue[int | BaseException | None] = SimpleQueue()
    unwanted = Event()

    def write() -> None:
        try:
            continued(
                loaded.model,
                loaded.tokenizer,
                [prompt],
                ends,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                rows=[row],
                streamer=_Told(heard),
                unless=StoppingCriteriaList([_Unwanted(unwanted)]),
            )
        except BaseException as error:  # who waits for tokens raises it
            heard.put(error)
        else:
            heard.put(None)

    writer = Thread(target=write, daemon=True)
    writer.start()
    generated: list[int] = []
    is_over = False
    try:
        while isinstance(token := heard.get(), int):
            generated.append(token)
            is_over = is_over or token in ends.stops
            if not is_over and ends.is_text(token) and (new := text.add(token)):
                yield new
        if token is not None:
            raise token
    finally:
        unwanted.set()
        writer.join()
    if rest := text.rest():
        yield rest
    return ends.written([generated])[0]


class _Told(BaseStreamer):
    """Passes tokens on, but for those of the prompt."""

    def __init__(self, heard: SimpleQueue[Any]) -> None:
        self._heard, self._is_prompt = heard, True

    def put(self, value: Tensor) -> None:
        for token in [] if self._is_prompt else value.flatten().tolist():
            self._heard.put(token)
        self._is_prompt = False

    def end(self) -> None:
        pass


class _Unwanted(StoppingCriteria):
    """Ends what nobody waits for any more."""

    def __init__(self, unwanted: Event) -> None:
        self._unwanted = unwanted

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._unwanted.is_set(), device=input_ids.device, dtype=torch.bool)
