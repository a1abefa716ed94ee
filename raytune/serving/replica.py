"""A process that answers: one engine, and the prompts of its models."""

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytune.errors import RaytuneError, UserError
from raytune.launch.asking.models_to_ask import Subject, adapter_over
from raytune.plan.saved.asked_model import AskedModel, on_device
from raytune.plan.saved.serving import EngineLimits
from raytune.serving import openai_errors as errors
from raytune.serving.answers import Begun, Told
from raytune.serving.counters import ENGINE_GAUGES
from raytune.serving.engine import AnsweringEngine
from raytune.serving.openai_errors import Refusal, Refused
from raytune.serving.prompts import Prompts
from raytune.serving.protocol import AdapterAt, Asked
from raytune.serving.refusals import AnswerFailedError, EngineDeadError, FullError, NotKnownError
from raytune.serving.requests import Piece, Request

TOLD = ("is_alive", *(name for name in ENGINE_GAUGES if name != "most_cached_tokens"))
"""Of an engine's state."""
TOGETHER_S = 0.02
"""For which pieces behind the first are gathered: each message between processes costs more than a small model's token."""
_GRACE_S = 0.2
"""In which those who wait are told that the engine has died, before its process goes."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    asked: AskedModel
    template: str
    """Jinja; empty: none."""
    vocab: int
    """Tokens that it has embeddings for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """What each replica has, and how it computes."""

    models: Mapping[str, ServedModel]
    base: Subject | None
    """That adapters may be laid over at run time."""
    adapter_folders: tuple[str, ...]
    """In which such adapters may lie."""
    device: str
    threads: int
    """Compute threads."""
    limits: EngineLimits


class Replica:
    """What Serve makes an actor of. Ready once all models are loaded.

    Raises:
        RaytuneError: if a model cannot be loaded as asked.
    """

    def __init__(self, plan: ReplicaPlan) -> None:
        torch.set_num_threads(plan.threads)
        self._plan = plan
        served = {name: on_device(one.asked, plan.device) for name, one in plan.models.items()}
        self._engine = AnsweringEngine(served, device=plan.device, limits=plan.limits)
        self._prompts = {name: self._prompts_of(name, one) for name, one in plan.models.items()}
        self._number = itertools.count()
        self._loaded: dict[str, AdapterAt] = {}
        self._loading = asyncio.Lock()
        # One at a time asks a tokenizer; a template that takes its two seconds then holds up prompts, and not the answers.
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    def close(self) -> None:
        """End the engine; whoever waits is told."""
        self._engine.close()
        self._reading.shutdown()

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        if not self._engine.state.is_alive:
            raise EngineDeadError("The engine of this replica has died.")

    async def state(self) -> dict[str, Any]:
        state = self._engine.state
        return {name: getattr(state, name) for name in TOLD} | {
            "replica": f"{os.uname().nodename}-{os.getpid()}",
            "most_cached_tokens": self._plan.limits.most_cached_tokens,
        }

    # --- Answers -------------------------------------------------------------------------------------------------------------

    async def answer(self, asked: Asked) -> AsyncGenerator[Sequence[Told], None]:
        """What becomes of a request, as it comes. Whoever closes this, or cancels it, wants no more of it.

        Raises:
            EngineDeadError: if the engine dies over it.
        """
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()  # of at most as many as tokens were asked for

        def deliver_to(number: int) -> Any:
            return lambda told: loop.call_soon_threadsafe(news.put_nowait, (number, told))

        requests: list[Request] = []
        left: set[int] = set()
        try:
            while asked.adapter is not None:
                await self._have(asked.adapter)
                requests = await loop.run_in_executor(self._reading, self._requests_of, asked)
                there = self._loaded.get(asked.adapter.name)
                if there is None:
                    raise Refused(errors.unknown_model(asked.model, [*self._prompts]))
                if there == asked.adapter:
                    break  # else another one has taken its name meanwhile, and would answer
            else:
                requests = await loop.run_in_executor(self._reading, self._requests_of, asked)
            for number, request in enumerate(requests):
                self._engine.submit(request, deliver_to(number))
                left.add(number)
            num_prompt_tokens = sum(len(request.prompt) for request in requests[:: asked.num_choices])
            yield [Begun(num_prompt_tokens)]
            while left:
                batch = [await news.get()]
                while not news.empty():
                    batch.append(news.get_nowait())
                told: list[Told] = []
                for number, piece in batch:
                    if isinstance(piece, Exception):
                        raise piece
                    told.append((number, piece))
                    if piece.finish is not None:
                        left.discard(number)
                yield told
                if left:
                    await asyncio.sleep(TOGETHER_S)
        except EngineDeadError:
            # A process without an engine is of no use. Serve starts another one as soon as it ends.
            loop.call_later(_GRACE_S, os._exit, 1)
            raise
        except (RaytuneError, Refused) as error:
            yield [_refusal(error)]
        finally:
            for number in left:
                self._engine.cancel(requests[number].id)

    def _requests_of(self, asked: Asked) -> list[Request]:
        """A request of the engine for each choice of each prompt."""
        prompts = self._prompts.get(asked.model)
        if prompts is None:
            raise Refused(errors.unknown_model(asked.model, [*self._prompts]))
        ids = [prompts.ids_of(prompt) for prompt in asked.prompts]
        longest = [self._longest(asked.model, len(one), asked.max_new_tokens) for one in ids]
        return [
            Request(
                id=f"{asked.id}/{next(self._number)}",  # asked for again, it is another one
                model=asked.model,
                prompt=prompt,
                max_new_tokens=most,
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=asked.top_k,
                seed=None if asked.seed is None else asked.seed + choice,
                stop=asked.stop,
                num_logprobs=asked.num_logprobs,
            )
            for prompt, most in zip(ids, longest, strict=True)
            for choice in range(asked.num_choices)
        ]

    def _longest(self, model: str, num_prompt_tokens: int, asked: int | None) -> int:
        most = self._engine.longest(model)
        if num_prompt_tokens + (asked or 1) > most:
            wanted = f" and {asked} tokens of an answer were asked for" if asked else ""
            raise errors.bad(
                f"The prompt has {num_prompt_tokens} tokens{wanted}, and this endpoint takes {most} tokens of prompt and answer "
                f"together.",
                code="context_length_exceeded",
            )
        return asked or most - num_prompt_tokens

    # --- Adapters ------------------------------------------------------------------------------------------------------------

    async def load(self, adapter: AdapterAt) -> Refusal | None:
        """Have an adapter; None: it is there."""
        try:
            await self._have(adapter)
        except Refused as refused:
            return refused.refusal
        return None

    async def unload(self, name: str) -> None:
        """Forget an adapter that was loaded at run time. What it is at ends as it would."""
        async with self._loading:
            if self._loaded.pop(name, None) is not None:
                del self._prompts[name]
                self._engine.unload(name)

    async def _have(self, adapter: AdapterAt) -> None:
        if self._loaded.get(adapter.name) == adapter:
            return
        async with self._loading:
            if self._loaded.get(adapter.name) == adapter:
                return
            try:
                if self._loaded.pop(adapter.name, None) is not None:  # it has been another one, and this replica did not hear
                    del self._prompts[adapter.name]
                    self._engine.unload(adapter.name)
                self._prompts[adapter.name] = await asyncio.to_thread(self._load, adapter)
            except EngineDeadError:
                raise
            except RaytuneError as error:
                raise errors.bad(str(error), "lora_path") from error
            self._loaded[adapter.name] = adapter

    def _load(self, adapter: AdapterAt) -> Prompts:
        if self._plan.base is None:
            raise UserError("No adapter can be laid over what is served here.")
        folder = folder_within(adapter.path, self._plan.adapter_folders)
        one = served(adapter_over(self._plan.base, str(folder), adapter.name))
        self._engine.load(adapter.name, on_device(one.asked, self._plan.device))
        return self._prompts_of(adapter.name, one)

    def _prompts_of(self, name: str, one: ServedModel) -> Prompts:
        return Prompts(self._engine.tokenizer(name), one.template, one.vocab)


def served(subject: Subject) -> ServedModel:
    """A model with what its prompts are made by."""
    return ServedModel(asked=subject.asked, template=subject.reader.same_rows[1], vocab=subject.vocab)


def folder_within(path: str, roots: Sequence[str]) -> Path:
    """A folder by a path from outside, if it lies in one of these, links followed.

    Raises:
        UserError: if not; it does not say whether there is such a folder.
    """
    for root in roots if "\0" not in path else ():
        above = Path(root).resolve()
        folder = (above / path).resolve()  # an absolute path stays as it is
        if folder.is_relative_to(above) and folder.is_dir():
            return folder
    raise UserError(f"{path!r} is no folder in one of those that adapters are loaded from (--adapters-in).")


def _refusal(error: RaytuneError | Refused) -> Refusal:
    match error:
        case Refused():
            return error.refusal
        case FullError():
            return errors.TOO_BUSY
        case NotKnownError():
            return Refusal(status=404, message=str(error), type=errors.NOT_FOUND, param="model", code="model_not_found")
        case UserError():
            return Refusal(status=400, message=str(error))
        case AnswerFailedError():
            return Refusal(status=500, message=str(error), type=errors.FAILED, code="answer_failed", headers=errors.NO_RETRY)
    _log.error("a request failed: %s", error)
    return errors.FAULT
