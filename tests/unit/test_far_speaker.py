"""A conversation with an endpoint of OpenAI's protocol: what is sent, what is read, and what is said where it fails."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import raytune
from raytune.errors import ClusterError, UserError
from raytune.serving.far_speaker import TOKEN


class Endpoint(BaseHTTPRequestHandler):
    """Repeats the last message, a character at a time, and counts what it is told. A question of one word is a wish."""

    protocol_version = "HTTP/1.1"
    asked: list[dict[str, Any]]

    def log_message(self, format: str, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.headers["Authorization"] != "Bearer secret":
            self.answer(401, {"error": {"message": "No such token."}})
        elif self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "base"}, {"id": "terse"}]})
        else:
            self.answer(200, {"data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        text = body["messages"][-1]["content"]
        if text == "refuse":
            self.answer(400, {"error": {"message": "There is no room."}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for character in text[: body["max_tokens"]]:
            self.event({"choices": [{"delta": {"content": character}}]})
        if text == "fail":
            self.event({"error": {"message": "The worker died."}})
        if text in ("fail", "break"):
            return
        finish = "length" if len(text) > body["max_tokens"] else "stop"
        self.event({"choices": [{"delta": {}, "finish_reason": finish}], "usage": None})
        self.event({"choices": [], "usage": {"completion_tokens": 2 * len(text)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def event(self, body: Any) -> None:
        self.wfile.write(f": a comment\n\ndata: {json.dumps(body)}\n\n".encode())


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(TOKEN, "secret")
    Endpoint.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_conversation_goes_to_the_endpoint_whole_and_its_answer_comes_in_pieces(url: str) -> None:
    with raytune.chat(url, system="Be kind.", temperature=0.5, top_k=4, seed=7) as chat:
        assert chat.models == {"base": url, "terse": url}
        assert list(chat.stream("Wé?")) == ["W", "é", "?"]
        assert chat.last is not None
        assert (chat.last.num_tokens, chat.last.has_ended) == (6, True)
        chat.use("terse")
        chat.style = chat.style.changed("temperature=0 top_k=none max_new_tokens=2")
        assert chat.ask("Why?") == "Wh"
        assert not chat.last.has_ended
        messages = chat.messages
    first, second = Endpoint.asked
    assert first["messages"] == messages[:2]
    assert second["messages"] == messages[:4]
    assert {key: first[key] for key in ("model", "temperature", "top_k", "seed", "max_tokens", "stream")} == {
        "model": "base",
        "temperature": 0.5,
        "top_k": 4,
        "seed": 7,
        "max_tokens": 256,
        "stream": True,
    }
    assert (second["model"], second["temperature"], second["max_tokens"]) == ("terse", 0, 2)
    assert not {"top_k", "top_p", "seed"} & second.keys()


@pytest.mark.parametrize(
    ("text", "error", "says", "kept"),
    [
        ("refuse", UserError, r"refuses \(400\): There is no room", []),
        ("fail", UserError, "ended its answer: The worker died", ["fail", "fail"]),
        ("break", ClusterError, "ended in the middle of an answer of base", ["break", "break"]),
    ],
)
def test_what_an_endpoint_refuses_or_breaks_off_is_said(
    url: str, text: str, error: type[Exception], says: str, kept: list[str]
) -> None:
    chat = raytune.chat(url)
    with pytest.raises(error, match=says):
        chat.ask(text)
    assert [turn["content"] for turn in chat.messages] == kept


def test_who_is_no_endpoint_or_is_not_there_is_told_before_anything_is_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has its models: base, adapters"):
        raytune.chat(url, adapters={"a": "somewhere"})
    with pytest.raises(UserError, match="lists no models"):
        raytune.chat(f"{url}/deeper")
    with pytest.raises(ClusterError, match=r"Nobody answers at http://127.0.0.1:9/v1"):
        raytune.chat("http://127.0.0.1:9/v1")
    for wrong in ("me:mine@127.0.0.1:9", "127.0.0.1:99999", "127.0.0.1:x", "[::1", "a host", "\u00fc..x", "host\n"):
        with pytest.raises(UserError, match="named by its address"):
            raytune.chat(f"http://{wrong}/v1")
    for wrong in ("top-secret\n", "top-secr\u00e9t", "top-secret\u20ac"):
        monkeypatch.setenv(TOKEN, wrong)
        with pytest.raises(UserError, match="RAYTUNE_API_KEY has characters") as refused:
            raytune.chat(url)
        assert "top" not in str(refused.value)
    monkeypatch.setenv(TOKEN, "other")
    with pytest.raises(UserError, match=r"refuses \(401\): No such token. The token is taken from RAYTUNE_API_KEY"):
        raytune.chat(url)
