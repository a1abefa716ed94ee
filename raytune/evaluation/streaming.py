"""An answer as it is written, piece by piece: the same text, tokens and end as of an answer that is written whole."""

from collections.abc import Generator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from raytune.evaluation.answer_text import AnswerText
from raytune.evaluation.generation import Ends, Written, continued
from raytune.model.inference import Loaded
from raytune.plan.run_plan import SamplingPlan


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
    ends, text = Ends(loaded.model, loaded.tokenizer, loaded.kept_tokens), AnswerText(loaded.tokenizer)
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
    if rest := text.end():
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
