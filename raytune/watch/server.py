"""The page of a storage folder, served to browsers of this machine by aiohttp, which Ray's dashboard is served by too.

Who may use it knows its token, which is random, new at each start, and in the address that the command prints. A page of
somebody else's that a browser has open knows neither it nor our origin: requests are refused whose Host is not ours (a name that
was bound to 127.0.0.1 afterwards), whose Origin is another, and whose token is missing. What changes something takes the token
from a header alone, which no form and no link can set. Files are never found by a path of a request: a request names a row, and
rows are what the storage holds.
"""

import asyncio
import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.resources import files
from typing import Any

from aiohttp import web

from raytune.errors import RaytuneError
from raytune.metrics.json_numbers import encode_number
from raytune.printable import first_line, printable
from raytune.storage import is_local, local_path, read_bytes
from raytune.watch.asking import WISHES, Wish, ask, refusal, warning
from raytune.watch.look import FollowedRun, Seen, Watcher, asked_of
from raytune.watch.rows import Row, rows_of, run_at, series_of
from raytune.watch.screen import event_line

HOST = "127.0.0.1"
CURVE_POINTS = 400
MOST_EVENTS = 100
MOST_BODY = 4096
CURVES = ("train/loss", "validation/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_s")
MOST_SUITES = 8
"""Metrics of suites with a curve."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""A report may be a stranger's file: it has no origin, can fetch nothing and knows no token."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Site:
    """What is served of one storage folder.

    Args:
        token: that every request has to know.
        clock: in seconds.
    """

    def __init__(self, watcher: Watcher, token: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._watcher, self._token, self._clock = watcher, token, clock
        self._seen: Seen = ()
        self._rows: list[Row] = []
        self._problem = ""
        self._looking: asyncio.Task[None] | None = None
        self._looked = float("-inf")
        self.hosts: frozenset[str] = frozenset()
        """Values of Host that are ours; none before it is known where it is served."""

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=MOST_BODY)
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/api/rows", self._all),
                web.get("/api/run", self._one),
                web.post("/api/ask", self._ask),
                web.get("/report/{key}/{path:.+}", self._report),
            ]
        )
        return app

    # --- Who may -------------------------------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._refuse_strangers(request)
            response = await handler(request)
        except web.HTTPException as refused:
            response = web.json_response({"message": refused.text or refused.reason}, status=refused.status)
        response.headers.update({name: value for name, value in HEADERS.items() if name not in response.headers})
        return response

    def _refuse_strangers(self, request: web.Request) -> None:
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if host not in self.hosts:
            raise web.HTTPForbidden(text="This page is for browsers of this machine, under the address that the command printed.")
        if origin is not None and origin != f"http://{host}":
            raise web.HTTPForbidden(text="This request comes from the page of another site.")
        if request.path.startswith("/report/"):
            return  # has a key of its own
        header = request.headers.get("Authorization", "").removeprefix("Bearer ")
        given = header or (request.query.get("token", "") if request.method == "GET" and request.path == "/" else "")
        if not _are_equal(given, self._token):
            raise web.HTTPForbidden(
                text="The token is missing or that of another start. Use the address that the command printed."
            )

    def _key(self, name: str) -> str:
        """What a link to reports of a run or sweep has instead of the token: it opens these and nothing else."""
        return hmac.new(self._token.encode(), _bytes(name), hashlib.sha256).hexdigest()[:32]

    # --- What there is -------------------------------------------------------------------------------------------------------

    async def _page(self, request: web.Request) -> web.StreamResponse:
        html, policy = page()
        return web.Response(text=html, content_type="text/html", headers={"Content-Security-Policy": policy})

    async def _all(self, request: web.Request) -> web.StreamResponse:
        await self._look()
        facts = {"storage": self._watcher.storage, "every_s": self._watcher.look_every_s, "problem": self._problem}
        return web.json_response(facts | {"rows": [_shown(row) for row in self._rows]})

    async def _one(self, request: web.Request) -> web.StreamResponse:
        await self._look()
        row = self._row(request.query.get("path", ""))
        refusals = {wish: refusal(row, wish) for wish in WISHES}
        facts = {"row": _shown(row), "refusals": refusals, "warning": warning(row)}
        run = run_at(self._seen, row.path)
        if run is not None:
            facts |= await asyncio.to_thread(_details, run)
        content = await asyncio.to_thread(self._read_report, row)
        top = row.path.partition("/")[0]
        link = None if content is None else f"/report/{self._key(top)}/{row.path}/report.html"
        return web.json_response(facts | {"report": link})

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        try:
            asked = await request.json()
            path, wish = asked["path"], asked["wish"]
        except (ValueError, KeyError, TypeError):
            raise web.HTTPBadRequest(text="Expected a path and a wish.") from None
        if wish not in WISHES or not isinstance(path, str):
            raise web.HTTPBadRequest(text="A wish is save or stop.")
        await self._look(at_once=True)
        row = self._row(path)
        if reason := refusal(row, wish):
            raise web.HTTPConflict(text=reason)
        return web.json_response({"message": await asyncio.to_thread(self._asked, row, wish)})

    def _asked(self, row: Row, wish: Wish) -> str:
        try:
            return ask(self._watcher.storage, row, wish)
        except (RaytuneError, OSError) as error:
            raise web.HTTPServiceUnavailable(text=first_line(error)) from error

    async def _report(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        top = path.partition("/")[0]
        if not _are_equal(request.match_info["key"], self._key(top)):
            raise web.HTTPForbidden(text="This link is that of another start.")
        await self._look()
        content = await asyncio.to_thread(self._read_report, self._row(path.removesuffix("/report.html")))
        if content is None:
            raise web.HTTPNotFound(text="There is no report yet.")
        return web.Response(
            body=content, content_type="text/html", charset="utf-8", headers={"Content-Security-Policy": REPORT_POLICY}
        )

    def _read_report(self, row: Row) -> bytes | None:
        """The page of a run or sweep; None if there is none below the storage: a link that leads out of it is not followed."""
        storage = self._watcher.storage
        path = f"{storage}/{row.path}/report.html"
        if is_local(storage) and not local_path(path).resolve().is_relative_to(local_path(storage).resolve()):
            return None
        try:
            return read_bytes(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (RaytuneError, OSError) as error:
            raise web.HTTPServiceUnavailable(text=first_line(error)) from error

    def _row(self, path: str) -> Row:
        row = next((row for row in self._rows if row.path == path), None)
        if row is None:
            raise web.HTTPNotFound(text="There is no such run.")
        return row

    # --- Looking -------------------------------------------------------------------------------------------------------------

    async def _look(self, *, at_once: bool = False) -> None:
        """Look at the storage if that is due. Nobody looks while no page is open, and only the first look is waited for."""
        if self._looking is None and (at_once or self._clock() - self._looked >= self._watcher.look_every_s):
            self._looking = asyncio.create_task(self._look_now())
        if self._looking is not None and (at_once or not self._rows):
            await asyncio.shield(self._looking)

    async def _look_now(self) -> None:
        try:
            self._seen = await asyncio.to_thread(self._watcher.look)
            self._rows, self._problem = rows_of(self._seen), ""
        except (RaytuneError, OSError) as error:
            self._problem = first_line(error)
        finally:
            self._looked, self._looking = self._clock(), None


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # as headers and names of files come, whatever they hold


def _are_equal(given: str, expected: str) -> bool:
    """In the same time, wherever they differ."""
    return hmac.compare_digest(_bytes(given), _bytes(expected))


def _shown(row: Row) -> dict[str, Any]:
    """A row as a page may show it."""
    return row.to_json() | {"name": printable(row.name), "note": printable(row.note)}


def _details(run: FollowedRun) -> dict[str, Any]:
    """Curves, events and what was asked for."""
    points = list(run.metrics.points)
    names = (*CURVES, *run.metrics.suites[:MOST_SUITES])
    curves = {name: [(step, encode_number(value)) for step, value in series_of(points, name, CURVE_POINTS)] for name in names}
    return {
        "curves": {printable(name): curve for name, curve in curves.items() if curve},
        "saves": [event["step"] for event in run.events.events if event["event"] == "checkpoint_saved"][-MOST_EVENTS:],
        "events": [event_line(event) for event in run.events.events[: -MOST_EVENTS - 1 : -1]],
        "asked": printable(asked_of(run.record)) if run.record else "",
    }


@cache
def page() -> tuple[str, str]:
    """The page and its policy: nothing runs and nothing is fetched but what is ours."""
    own = files("raytune.watch")
    style = files("raytune.report").joinpath("page.css").read_text(encoding="utf-8") + own.joinpath("page.css").read_text(
        encoding="utf-8"
    )
    script = own.joinpath("page.js").read_text(encoding="utf-8")
    html = own.joinpath("page.html").read_text(encoding="utf-8").replace("/* style */", style).replace("/* script */", script)
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        f"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


async def serve(watcher: Watcher, port: int, told: Callable[[str], None]) -> None:
    """Serve until the task is ended.

    Args:
        port: 0: any that is free.
        told: gets the address, with the token, once it answers.

    Raises:
        OSError: if the port is taken.
    """
    token = secrets.token_urlsafe(32)
    site = Site(watcher, token)
    runner = web.AppRunner(site.app(), access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, port).start()
        taken = runner.addresses[0][1]
        site.hosts = frozenset({f"{HOST}:{taken}", f"localhost:{taken}"})
        told(f"http://{HOST}:{taken}/?token={token}")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
