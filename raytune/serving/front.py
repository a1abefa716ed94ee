"""The side of an endpoint that speaks HTTP: who may ask, what is asked, and what becomes of an answer whose replica dies.

It holds no model and imports no torch, so that it starts in a moment and hardly ever dies. Answers come from engines elsewhere:
an answer that is asked for whole is asked for a second time where its replica died, a stream as long as nothing of it has been
sent; after that, a stream ends with an event that says so, never in silence.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from raytune.serving import openai_errors as errors
from raytune.serving.access import is_allowed
from raytune.serving.answers import Answer, Begun, Told, event
from raytune.serving.counters import Counters
from raytune.serving.openai_errors import Refusal, Refused
from raytune.serving.protocol import AdapterAt, Asked, LoadBody, UnloadBody, Wish, read_body, read_chat, read_text

MOST_BODY = 4 << 20
"""Bytes of a request: a prompt of a million tokens."""
STATE_TIMEOUT_S = 5.0
LOAD_TIMEOUT_S = 300.0
CLOSED_BY_CLIENT = 499
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

_log = logging.getLogger(__name__)


class Lost(Exception):
    """The replica that was at an answer died."""


class Engines(Protocol):
    """Replicas with a model in each, wherever they are."""

    def answer(self, asked: Asked) -> AsyncGenerator[Sequence[Told], None]:
        """What one of them tells of a request, as it comes. Who closes it has the request cancelled.

        Raises:
            Lost: where that replica dies.
        """
        ...

    async def each(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        """What all of them say to something, exceptions of those that died among it."""
        ...


class KeptAdapters(Protocol):
    """Adapters that were loaded at run time, wherever they are remembered when this process dies."""

    def read(self) -> dict[str, str]:
        """Paths by names."""
        ...

    def write(self, adapters: Mapping[str, str]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPlan:
    """What an endpoint offers."""

    models: Mapping[str, str]
    """Sources by names."""
    token: str
    """Its fingerprint."""
    most_held: int
    """Answers that are waited for at once."""
    most_together: int
    """Answers of one request: all are one replica's."""
    timeout_s: float
    """Of one answer."""
    loads_adapters: bool
    started: int
    """Seconds since 1970."""


class Front:
    def __init__(self, plan: FrontPlan, engines: Engines, kept: KeptAdapters) -> None:
        self._plan, self._engines, self._kept = plan, engines, kept
        self._counters = Counters()
        self._held = 0
        self._changing = asyncio.Lock()
        self._adapters = kept.read()

    def app(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/health", self._guarded(self._health, is_open=True), methods=["GET"])
        for method, path, handler in (
            ("GET", "/metrics", self._metrics),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{name}", self._model),
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/completions", self._text),
            ("POST", "/v1/load_lora_adapter", self._load),
            ("POST", "/v1/unload_lora_adapter", self._unload),
        ):
            app.add_api_route(path, self._guarded(handler), methods=[method])
        app.add_exception_handler(HTTPException, _no_such_page)
        return app

    def _guarded(
        self, handler: Callable[[Request], Awaitable[Response]], *, is_open: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        """A handler behind the question who asks, in front of which every error has OpenAI's form."""

        async def answer(request: Request) -> Response:
            try:
                if not is_open and not is_allowed(request.headers.get("Authorization"), self._plan.token):
                    raise Refused(errors.UNKNOWN_TOKEN)
                response = await handler(request)
            except Refused as refused:
                response = _response(refused.refusal)
            except (ClientDisconnect, asyncio.CancelledError):
                self._count(request, CLOSED_BY_CLIENT)
                raise
            except Exception:
                _log.exception("a request to %s failed", request.url.path)
                response = _response(errors.FAULT)
            self._count(request, response.status_code)
            response.headers.update(HEADERS)
            return response

        return answer

    def _count(self, request: Request, status: int) -> None:
        path = request.scope["route"].path if "route" in request.scope else ""
        self._counters.requests.labels(path=path, status=status).inc()

    # --- What there is -------------------------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        states = await self._states()
        is_ready = any(state["is_alive"] for state in states)
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    async def _metrics(self, request: Request) -> Response:
        self._counters.in_flight.set(self._held)
        return Response(self._counters.text(await self._states()), media_type="text/plain; version=0.0.4")

    async def _states(self) -> list[dict[str, Any]]:
        found = await self._engines.each("state", timeout_s=STATE_TIMEOUT_S)
        return [state for state in found if isinstance(state, dict)]

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._names]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._require(name)
        return JSONResponse(self._card(name))

    @property
    def _names(self) -> list[str]:
        return [*self._plan.models, *self._adapters]

    def _require(self, name: str) -> None:
        if name not in self._names:
            raise Refused(errors.unknown_model(name, self._names))

    def _card(self, name: str) -> dict[str, Any]:
        source = self._plan.models.get(name) or self._adapters[name]
        return {"id": name, "object": "model", "created": self._plan.started, "owned_by": "raytune", "root": source}

    # --- Answers -------------------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._answered(read_chat(await _body(request)))

    async def _text(self, request: Request) -> Response:
        return await self._answered(read_text(await _body(request)))

    async def _answered(self, wish: Wish) -> Response:
        name = wish.asked.model
        self._require(name)
        if name in self._adapters:
            wish = replace(wish, asked=replace(wish.asked, adapter=AdapterAt(name=name, path=self._adapters[name])))
        work = _Work(wish, self._engines, self._counters, self._plan.timeout_s)
        number = len(wish.asked.prompts) * wish.asked.num_choices
        if number > self._plan.most_together:
            most = self._plan.most_together
            raise errors.bad(f"{number} answers are asked for, and a replica of this endpoint holds {most}. Ask for fewer.", "n")
        if self._held + number > self._plan.most_held:
            raise Refused(errors.TOO_BUSY)
        if not wish.streams:
            with self._holding(number):
                return JSONResponse((await work.whole()).to_json())
        events = self._held_while(number, work)
        first = await anext(events)  # whether there will be an answer shows before its status is sent
        return _Events(_together(first, events), media_type="text/event-stream")

    async def _held_while(self, number: int, work: "_Work") -> AsyncGenerator[bytes, None]:
        with self._holding(number):
            async with aclosing(work.events()) as events:
                async for one in events:
                    yield one

    @contextmanager
    def _holding(self, number: int) -> Any:
        self._held += number
        try:
            yield
        finally:
            self._held -= number

    # --- Adapters ------------------------------------------------------------------------------------------------------------

    async def _load(self, request: Request) -> Response:
        body = read_body(await _body(request), LoadBody)
        name = body.lora_name
        if not self._plan.loads_adapters:
            raise errors.bad("This endpoint loads no adapters: it was started without a folder for them (--adapters-in).")
        async with self._changing:
            if name in self._names:
                raise errors.bad(f"There is a model {name!r} already; unload it first, or take another name.", "lora_name")
            said = await self._engines.each("load", AdapterAt(name=name, path=body.lora_path), timeout_s=LOAD_TIMEOUT_S)
            if refusal := next((one for one in said if isinstance(one, Refusal)), None):
                await self._engines.each("unload", name, timeout_s=STATE_TIMEOUT_S)
                raise Refused(refusal)
            if not said or all(isinstance(one, Exception) for one in said):
                raise Refused(errors.NOT_READY)
            # A replica that has died meanwhile, or starts later, loads it when it is asked under the name.
            self._adapters[name] = body.lora_path
            self._kept.write(self._adapters)
        return Response(f"Success: LoRA adapter '{name}' added successfully.", media_type="text/plain")

    async def _unload(self, request: Request) -> Response:
        body = read_body(await _body(request), UnloadBody)
        name = body.lora_name
        async with self._changing:
            if name in self._plan.models:
                raise errors.bad(f"{name!r} is there since the endpoint was started, and stays.", "lora_name")
            self._require(name)
            del self._adapters[name]
            self._kept.write(self._adapters)
            await self._engines.each("unload", name, timeout_s=STATE_TIMEOUT_S)
        return Response(f"Success: LoRA adapter '{name}' removed successfully.", media_type="text/plain")


class _Events(StreamingResponse):
    """A stream that is closed as soon as nobody reads it, and with it what is asked of an engine."""

    async def __call__(self, *arguments: Any) -> None:
        async with aclosing(cast(AsyncGenerator[Any, None], self.body_iterator)):
            await super().__call__(*arguments)


class _Work:
    """One request on its way."""

    def __init__(self, wish: Wish, engines: Engines, counters: Counters, timeout_s: float) -> None:
        self._wish, self._engines, self._counters, self._timeout_s = wish, engines, counters, timeout_s
        self._began = time.monotonic()
        self._has_first = False

    async def whole(self) -> Answer:
        """
        Raises:
            Refused: where there is none.
        """
        for is_last in (False, True):
            answer = Answer(self._wish)
            try:
                async with aclosing(self._told(answer)) as batches:
                    async for told in batches:
                        for one in told:
                            answer.take(one)
            except Lost as lost:
                if is_last:
                    raise Refused(errors.LOST) from lost
                self._counters.retries.inc()
            else:
                self._ended(answer)
                return answer
        raise AssertionError

    async def events(self) -> AsyncGenerator[bytes, None]:
        """
        Raises:
            Refused: before the first event.
        """
        answer, has_opened, was_lost = Answer(self._wish), False, False
        while True:
            try:
                async with aclosing(self._told(answer)) as batches:
                    async for told in batches:
                        written = [] if has_opened else [*answer.opening()]
                        has_opened = True
                        for one in told:
                            answer.take(one)
                            if not isinstance(one, Begun):
                                written.append(answer.chunk(*one))
                        yield b"".join(written)
            except Refused as refused:
                if not has_opened:
                    raise
                yield event(refused.refusal.to_json())
                return
            except Lost as lost:
                if answer.has_text or was_lost:
                    if not has_opened:
                        raise Refused(errors.LOST) from lost
                    yield event(errors.LOST.to_json())
                    return
                was_lost = True
                self._counters.retries.inc()
            except Exception:
                if not has_opened:
                    raise
                _log.exception("a stream failed")
                yield event(errors.FAULT.to_json())
                return
            else:
                break
        self._ended(answer)
        for one in answer.ending():
            yield one

    async def _told(self, answer: Answer) -> AsyncGenerator[list[Begun | tuple[int, Any]], None]:
        """What an engine tells, of which whoever hears it has the answer take note.

        Raises:
            Refused: where there is no answer, or it takes too long.
            Lost: where it ends before the answer does.
        """
        async with aclosing(self._engines.answer(self._wish.asked)) as batches:
            while True:
                try:
                    async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._left_s):
                        batch = await anext(batches)
                except StopAsyncIteration:
                    break
                except TimeoutError:
                    raise Refused(errors.too_late(self._timeout_s)) from None
                if refusal := next((told for told in batch if isinstance(told, Refusal)), None):
                    raise Refused(refusal)
                news = [told for told in batch if not isinstance(told, Refusal)]
                if not self._has_first and any(not isinstance(told, Begun) for told in news):
                    self._has_first = True
                    self._counters.first_token.labels(model=self._wish.asked.model).observe(time.monotonic() - self._began)
                yield news
        if not answer.is_complete:
            raise Lost

    @property
    def _left_s(self) -> float:
        return max(0.0, self._began + self._timeout_s - time.monotonic())

    def _ended(self, answer: Answer) -> None:
        model = self._wish.asked.model
        self._counters.whole.labels(model=model).observe(time.monotonic() - self._began)
        self._counters.prompt_tokens.labels(model=model).inc(answer.num_prompt_tokens)
        self._counters.new_tokens.labels(model=model).inc(answer.num_new_tokens)


async def _body(request: Request) -> bytes:
    """What was sent, if that is not too much: the rest is not read."""
    told = request.headers.get("Content-Length", "")
    content, size = [], 0
    if not (told.isdigit() and int(told) > MOST_BODY):
        async for part in request.stream():
            content.append(part)
            size += len(part)
            if size > MOST_BODY:
                break
        else:
            return b"".join(content)
    raise Refused(
        Refusal(
            status=413,
            message=f"The body has more than {MOST_BODY} bytes, which is the most that is read.",
            code="body_too_large",
            headers=errors.NO_RETRY,
        )
    )


async def _together(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        if first:
            yield first
        async for one in events:
            yield one


def _response(refusal: Refusal) -> Response:
    return JSONResponse(refusal.to_json(), refusal.status, dict(refusal.headers))


async def _no_such_page(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = f"There is no {request.method} {request.url.path} here."
    return _response(Refusal(status=status, message=message, type=errors.NOT_FOUND, code="not_found"))
