"""A Hugging Face hub on this machine: commits, lists of files, files in pieces, uploads, and its refusals.

The protocol is that of huggingface_hub 2.4: `/api/models/ID/revision/REV`, `/api/models/ID/tree/REV` in pages, and
`/ID/resolve/REV/FILE`, which sends small files itself and large ones from another host. Uploads are those without Xet:
`/api/repos/create`, `preupload` (which files are large), Git LFS's `objects/batch`, a PUT to the other host for each large file
that is not there, and one `commit` of lines of JSON.
"""

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_BYTES = 10_000
"""From this size on, and always for weights, a file is sent by the other host."""
PAGE = 3


@dataclass(frozen=True)
class Refusal:
    """An answer that is none."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class StandIn:
    """What the hub holds, how it misbehaves, and what was asked of it."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Model -> commit -> file -> content."""
    references: dict[str, dict[str, str]] = field(default_factory=dict)
    """Model -> branch or tag -> commit."""
    refusals: dict[str, list[Refusal]] = field(default_factory=dict)
    """Part of a path -> answers to the next requests of it; the last one stays if `keeps_refusing`."""
    keeps_refusing: bool = False
    cut_after: int | None = None
    """Bytes of a body after which the connection is closed."""
    num_cuts: int = 0
    """How many bodies are cut."""
    bytes_per_s: float | None = None
    ignores_ranges: bool = False
    damages: int = 0
    """How many large bodies have another last byte."""
    needed_token: str | None = None
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Host's part (`hub` or `cdn`), path, range."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes by file."""
    tokens_at_cdn: list[str] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)
    """Models that were created, and whether others see them."""
    closed: set[str] = field(default_factory=set)
    """Owners whose models nobody may write to."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files that were uploaded, by their SHA-256, whether a commit has them or not."""
    received: list[str] = field(default_factory=list)
    """SHA-256 of each that arrived, in order."""
    num_put_cuts: int = 0
    """How many uploads are cut in their middle."""
    messages: list[str] = field(default_factory=list)
    """Of commits that were uploaded."""
    url: str = ""
    cdn: str = ""

    def add(self, model: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Make a commit, and let a branch point to it."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits.setdefault(model, {})[commit] = dict(files)
        self.references.setdefault(model, {})[branch] = commit
        return commit

    def add_folder(self, model: str, folder: Path, extra: Mapping[str, bytes] | None = None) -> str:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.add(model, files | dict(extra or {}))

    def find(self, model: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.references[model].get(revision, revision)
        files = self.commits[model].get(commit)
        return None if files is None else (commit, files)


@contextmanager
def serving() -> Iterator[StandIn]:
    """A hub and the host of its large files, each at a port of its own."""
    hub = StandIn()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub, part)) for part in ("hub", "cdn")]
    hub.url = f"http://127.0.0.1:{servers[0].server_port}"
    hub.cdn = f"http://localhost:{servers[1].server_port}"
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: StandIn, part: str, *arguments: Any) -> None:
        self.hub, self.part = hub, part
        super().__init__(*arguments)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        self.hub.asked.append((self.part, unquote(path.path), self.headers.get("Range")))
        if refusal := self._refusal(unquote(path.path)):
            self._answer(refusal.status, b"", refusal.headers)
        elif self.part == "cdn":
            if token := self.headers.get("Authorization"):
                self.hub.tokens_at_cdn.append(token)
            digest = path.path.strip("/")
            content = {_sha256(data): (name, data) for files in self._all_files() for name, data in files.items()}
            self._send(*content[digest])
        elif path.path.startswith("/api/models/"):
            self._api(unquote(path.path.removeprefix("/api/models/")), parse_qs(path.query))
        elif path.path.startswith("/api/datasets/"):
            self._api(unquote(path.path.removeprefix("/api/")), parse_qs(path.query))
        else:
            self._resolve(unquote(path.path.lstrip("/")))

    def _all_files(self) -> Iterator[dict[str, bytes]]:
        for commits in self.hub.commits.values():
            yield from commits.values()

    def _refusal(self, path: str) -> Refusal | None:
        token = self.headers.get("Authorization")
        if self.part == "hub" and self.hub.needed_token and token != f"Bearer {self.hub.needed_token}":
            said = (
                {"X-Error-Message": "Invalid credentials in Authorization header"} if token else {"X-Error-Code": "RepoNotFound"}
            )
            return Refusal(401, said)
        for part, refusals in self.hub.refusals.items():
            if part in path and refusals:
                return refusals[0] if self.hub.keeps_refusing else refusals.pop(0)
        return None

    def _api(self, path: str, query: Mapping[str, list[str]]) -> None:
        what = "/tree/" if "/tree/" in path else "/revision/"
        model, _, revision = path.partition(what)
        revision = revision or "main"
        if model not in self.hub.commits:
            return self._answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        revision, _, folder = revision.partition("/") if what == "/tree/" else (revision, "", "")
        found = self.hub.find(model, revision)
        if folder and (found is None or not any(name.startswith(f"{folder}/") for name in found[1])):
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if found is None:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if what == "/revision/":
            facts = {"id": model, "sha": commit, "private": self.hub.private.get(model, False)}
            return self._json(facts | {"siblings": [{"rfilename": name} for name in files]})
        entries = _entries(files, folder, is_recursive=query.get("recursive") == ["true"])
        start = int(query.get("cursor", ["0"])[0])
        more = f"{self.hub.url}{self.path.partition('&cursor=')[0]}{'' if '?' in self.path else '?'}&cursor={start + PAGE}"
        return self._json(entries[start : start + PAGE], {"Link": f'<{more}>; rel="next"'} if start + PAGE < len(entries) else {})

    # --- Uploads -------------------------------------------------------------------------------------------------------------

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.part, path, None))
        if refusal := self._refusal(path):
            return self._answer(refusal.status, b"", refusal.headers)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        model, what, revision = _of_model(path)
        if self.headers.get("Authorization") is None or model.partition("/")[0] in self.hub.closed:
            return self._answer(403, b"", {"X-Error-Message": "Forbidden: pass a token with write access"})
        if what == "branch":
            new = revision not in self.hub.references[model]
            self.hub.references[model].setdefault(revision, self.hub.references[model]["main"])
            return self._json({}) if new else self._answer(409, b"", {})
        found = self.hub.find(model, revision)
        if found is None:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if what == "preupload":
            return self._preupload(json.loads(body), found[1])
        return self._commit(model, revision, body, dict(found[1]))

    def _create(self, asked: Mapping[str, Any]) -> None:
        model = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] in self.hub.closed:
            return self._answer(403, b"", {"X-Error-Message": "You don't have the rights to create a model under this namespace"})
        if model in self.hub.commits:
            return self._answer(409, b'{"url": "%s"}' % f"{self.hub.url}/{model}".encode(), {})
        self.hub.private[model] = asked.get("visibility") == "private"
        self.hub.add(model, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.hub.url}/{model}"})

    def _preupload(self, asked: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        def answer(file: Mapping[str, Any]) -> dict[str, Any]:
            is_large = file["size"] >= LARGE_BYTES or file["path"].endswith(".safetensors")
            oid = _digest(file["path"], files[file["path"]]) if file["path"] in files else None
            return {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}

        self._json({"files": [answer(file) for file in asked["files"]]})

    def _batch(self, asked: Mapping[str, Any]) -> None:
        def answer(wanted: Mapping[str, Any]) -> dict[str, Any]:
            upload = {"actions": {"upload": {"href": f"{self.hub.cdn}/put/{wanted['oid']}"}}}
            return {**wanted, **({} if wanted["oid"] in self.hub.objects else upload)}

        self._json({"transfer": "basic", "objects": [answer(wanted) for wanted in asked["objects"]]})

    def do_PUT(self) -> None:
        if token := self.headers.get("Authorization"):
            self.hub.tokens_at_cdn.append(token)
        size, digest = int(self.headers["Content-Length"]), self.path.rpartition("/")[2]
        if self.hub.num_put_cuts > 0:
            self.hub.num_put_cuts -= 1
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        data = self.rfile.read(size)
        assert _sha256(data) == digest
        self.hub.objects[digest] = data
        self.hub.received.append(digest)
        self._answer(200, b"", {})

    def _commit(self, model: str, branch: str, body: bytes, files: dict[str, bytes]) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    self.hub.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commit = self.hub.add(model, files, branch)
        self._json({"commitUrl": f"{self.hub.url}/{model}/commit/{commit}", "commitOid": commit})

    # --- Downloads -----------------------------------------------------------------------------------------------------------

    def _resolve(self, path: str) -> None:
        model, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        found = self.hub.find(model, revision) if model in self.hub.commits else None
        if found is None or name not in found[1]:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = found[1][name]
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{_digest(name, data)}"'}
        if not _is_large(name, data):
            return self._send(name, data, headers)
        linked = {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
        return self._answer(302, b"", headers | linked | {"Location": f"{self.hub.cdn}/{_sha256(data)}"})

    def _json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | dict(headers or {}))

    def _send(self, name: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A file, or the piece of it that was asked for, at the speed and with the faults that the stand-in has."""
        asked, start, stop = self.headers.get("Range"), 0, len(data)
        if asked and not self.hub.ignores_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else len(data)
        if _is_large(name, data) and self.hub.damages > 0:
            self.hub.damages -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        body = data[start:stop]
        ranged = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"} if asked and not self.hub.ignores_ranges else {}
        self.send_response(206 if ranged else 200)
        for key, value in ({"Content-Length": str(len(body))} | ranged | dict(headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut_after if self.hub.num_cuts > 0 and _is_large(name, data) else None
        if cut is not None:
            self.hub.num_cuts -= 1
            body, self.close_connection = body[:cut], True
        piece = 1 << 14
        for at in range(0, len(body), piece):
            try:
                self.wfile.write(body[at : at + piece])
            except ConnectionError:
                return  # whoever asked is gone
            self.hub.sent[name] += len(body[at : at + piece])
            if self.hub.bytes_per_s:
                self.wfile.flush()
                time.sleep(piece / self.hub.bytes_per_s)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _of_model(path: str) -> tuple[str, str, str]:
    """Model, what is asked of it, and the revision."""
    owner, name, what, revision = path.removeprefix("/api/models/").split("/", 3)
    return f"{owner}/{name}", what, revision


def _is_large(name: str, data: bytes) -> bool:
    return len(data) >= LARGE_BYTES or name.endswith(".safetensors")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(name: str, data: bytes) -> str:
    return _sha256(data) if _is_large(name, data) else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entries(files: Mapping[str, bytes], folder: str, *, is_recursive: bool) -> list[dict[str, Any]]:
    """What is in a folder: files, and where it is not asked for all that is below it, the folders in it."""
    prefix = f"{folder}/" if folder else ""
    inside = {name: data for name, data in sorted(files.items()) if name.startswith(prefix)}
    if is_recursive:
        return [_entry(name, data) for name, data in inside.items()]
    deeper = [name.removeprefix(prefix) for name in inside if "/" in name.removeprefix(prefix)]
    folders = dict.fromkeys(prefix + name.partition("/")[0] for name in deeper)
    found = [{"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0} for name in folders]
    return found + [_entry(name, data) for name, data in inside.items() if "/" not in name.removeprefix(prefix)]


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
    if _is_large(name, data):
        pointer = b"version https://git-lfs.github.com/spec/v1\n"
        return entry | {
            "oid": hashlib.sha1(pointer + data).hexdigest(),
            "lfs": {"oid": _sha256(data), "size": len(data), "pointerSize": 135},
        }
    return entry | {"oid": _digest(name, data)}
