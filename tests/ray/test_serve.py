"""An endpoint on a cluster, asked by OpenAI's own client: answers are plain transformers', however it is asked, whoever dies."""

import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai.types import Completion
from ray.cluster_utils import Cluster
from transformers import GenerationConfig

from raytune import serve
from raytune.config.sections.cluster import ClusterSection
from raytune.errors import ClusterError, UserError
from raytune.serving.endpoint import Endpoint, _wait_for_room
from raytune.serving.front import MOST_BODY
from tests.served import LONGEST, STOPS, Plain, prompts, save_adapter, save_base
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(500)]

NAMES = ("base", "first", "second", "third")
ENDLESS = 460
"""Tokens of an answer of the third adapter, which never ends by itself."""
NEVER_ENDS: dict[str, Any] = {"eos_token_id": 2, "pad_token_id": 0, "suppress_tokens": (0, 2)}
TOKEN = "0123456789abcdef"
MOST = 8
"""Answers that are held at once."""
SLOW_READERS = 50


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_base(folder / "base", "llama")
    for name in NAMES[1:]:
        save_adapter(folder / "adapters" / name, folder / "base", name)
    GenerationConfig(**NEVER_ENDS).save_pretrained(folder / "adapters/third")
    shutil.copytree(folder / "adapters/second", folder / "adapters/later")
    return folder


@pytest.fixture(scope="module")
def plain(saved: Path) -> dict[str, Plain]:
    return {name: Plain(saved / "base", None if name == "base" else saved / "adapters" / name) for name in NAMES}


def started(saved: Path, cluster: Cluster, **options: Any) -> Endpoint:
    adapters = {name: saved / "adapters" / name for name in NAMES[1:]}
    limits: dict[str, Any] = {"max_batch": 4, "max_waiting": MOST - 4, "timeout_s": 120.0}
    where: dict[str, Any] = {"address": cluster.address, "adapters_in": [saved / "adapters"], "token": TOKEN}
    return serve(saved / "base", adapters=adapters, **(limits | where | options))


@pytest.fixture(scope="module")
def endpoint(saved: Path, one_node: Cluster) -> Iterator[Endpoint]:
    with started(saved, one_node) as endpoint:
        yield endpoint


@pytest.fixture
def client(endpoint: Endpoint) -> openai.OpenAI:
    return client_of(endpoint)


def client_of(endpoint: Endpoint, *, max_retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.url, api_key=endpoint.token, timeout=120, max_retries=max_retries)


def raw(endpoint: Endpoint, method: str, path: str, body: Any = None, token: str | None = TOKEN) -> tuple[int, Any, Any]:
    """Status, headers and content."""
    address = endpoint.url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
    response = connection.getresponse()
    return response.status, response.headers, response.read()


POST_COMPLETIONS = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"


def connected(endpoint: Endpoint) -> socket.socket:
    """With hardly any room for what is not read."""
    host, _, port = endpoint.url.removeprefix("http://").removesuffix("/v1").partition(":")
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    one.connect((host, int(port)))
    one.settimeout(60)
    return one


def gauge(endpoint: Endpoint, name: str) -> float:
    _, _, content = raw(endpoint, "GET", "/metrics")
    return sum(float(value) for value in re.findall(rf"^raytune_{name}(?:{{[^}}]*}})? (\S+)$", content.decode(), re.MULTILINE))


def until(holds: Callable[[], bool], *, patience_s: float = 60) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def expected(plain: dict[str, Plain], name: str, prompt: Sequence[int], most: int) -> tuple[str, str, int]:
    """Text, why it ends, and the tokens that are counted."""
    settings = NEVER_ENDS if name == "third" else {}
    ids = plain[name].ids(prompt, most, **settings)
    has_stopped = name != "third" and ids[-1] in STOPS
    text: Any = tiny_tokenizer().decode(ids[:-1] if has_stopped else ids, skip_special_tokens=True)
    return text, "stop" if has_stopped else "length", len(ids)


def asked(client: openai.OpenAI, name: str, prompt: Sequence[int], most: int, *, stream: bool) -> tuple[str, str, int]:
    common: Any = {"model": name, "prompt": list(prompt), "max_tokens": most, "temperature": 0}
    if not stream:
        whole = client.completions.create(**common)
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == len(prompt)
        return whole.choices[0].text, whole.choices[0].finish_reason, whole.usage.completion_tokens
    chunks: list[Completion] = list(client.completions.create(**common, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage is not None
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert len(reasons) == 1
    return "".join(choice.text for chunk in chunks for choice in chunk.choices), reasons[0], chunks[-1].usage.completion_tokens


def test_base_and_three_adapters_at_once_answer_as_plain_transformers_do(client: openai.OpenAI, plain: dict[str, Plain]) -> None:
    assert [model.id for model in client.models.list()] == [*NAMES]
    assert client.models.retrieve("first").id == "first"
    wanted = [(name, prompt, number % 2 == 0) for number, prompt in enumerate(prompts()[:4]) for name in NAMES]
    with ThreadPoolExecutor(MOST) as threads:
        found = list(threads.map(lambda one: asked(client, one[0], one[1], LONGEST, stream=one[2]), wanted))
    for (name, prompt, _), answer in zip(wanted, found, strict=True):
        assert answer == expected(plain, name, prompt, LONGEST), (name, prompt)
    assert len({answer[0] for answer in found[:4]}) > 1, "models that write the same would show nothing"


def test_a_chat_is_asked_in_the_models_template_streamed_or_not(client: openai.OpenAI, plain: dict[str, Plain]) -> None:
    turns: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    prompt: Any = tiny_tokenizer().apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    text, reason, num_tokens = expected(plain, "first", prompt, LONGEST)
    common: Any = {"model": "first", "messages": turns, "max_tokens": LONGEST, "temperature": 0}
    whole = client.chat.completions.create(**common)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (text, reason)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), num_tokens)
    streamed = [chunk.choices[0] for chunk in client.chat.completions.create(**common, stream=True)]
    assert "".join(choice.delta.content or "" for choice in streamed) == text
    assert streamed[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in streamed if choice.finish_reason] == [reason]


def test_seeds_choices_stops_and_log_probabilities(client: openai.OpenAI) -> None:
    def drawn(seed: int, **options: Any) -> Completion:
        return client.completions.create(model="third", prompt=[5, 6], max_tokens=20, seed=seed, **options)

    one, again, next_one = (drawn(seed).choices[0].text for seed in (3, 3, 4))
    assert one == again != next_one
    assert [choice.text for choice in drawn(3, n=2).choices] == [one, next_one]
    stop = one[7:9]
    stopped = drawn(3, stop=stop).choices[0]
    assert (stopped.text, stopped.finish_reason) == (one[: one.index(stop)], "stop")
    logprobs = drawn(3, logprobs=2).choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == one or "\ufffd" in one
    assert len(logprobs.token_logprobs or ()) == 20
    several = client.completions.create(model="first", prompt=[[5, 6], [7]], max_tokens=3, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage is not None
    assert several.usage.prompt_tokens == 3


def test_what_cannot_be_answered_is_refused_in_openais_form(client: openai.OpenAI, endpoint: Endpoint) -> None:
    turns: Any = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=endpoint.url, api_key="wrong", max_retries=0).models.list()
    for path in ("/v1/models", "/metrics", "/v1/models/base"):
        assert raw(endpoint, "GET", path, token=None)[0] == 401
    for path in ("chat/completions", "completions", "load_lora_adapter", "unload_lora_adapter"):
        assert raw(endpoint, "POST", f"/v1/{path}", "{", token="wrong")[0] == 401
    assert raw(endpoint, "GET", "/health", token=None)[0] == 200
    with pytest.raises(openai.NotFoundError, match="There are: base, first, second, third"):
        client.chat.completions.create(model="fourth", messages=turns)
    with pytest.raises(openai.BadRequestError, match="presence_penalty") as refused:
        client.chat.completions.create(model="base", messages=turns, presence_penalty=1)
    assert refused.value.param == "presence_penalty"
    with pytest.raises(openai.BadRequestError, match=r"The prompt has 600 tokens .* takes 512 tokens") as refused:
        client.completions.create(model="base", prompt=[5] * 600)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="500 tokens of an answer"):
        client.completions.create(model="base", prompt=[5] * 20, max_tokens=500)
    status, _, content = raw(endpoint, "POST", "/v1/chat/completions", "{")
    assert (status, json.loads(content)["error"]["type"]) == (400, "invalid_request_error")
    for path in ("/", "/docs", "/openapi.json", "/v1/embeddings"):
        status, _, content = raw(endpoint, "GET", path)
        assert (status, json.loads(content)["error"]["code"]) == (404, "not_found")


def test_a_body_without_end_is_not_read_to_its_end(endpoint: Endpoint) -> None:
    assert raw(endpoint, "POST", "/v1/completions", b" " * (MOST_BODY + 1))[0] == 413
    sent = 0
    with connected(endpoint) as endless:
        endless.sendall(f"{POST_COMPLETIONS}Transfer-Encoding: chunked\r\n\r\n".encode())
        while sent < 2 * MOST_BODY and not select.select([endless], [], [], 0)[0]:
            endless.sendall(b"10000\r\n" + b" " * (1 << 16) + b"\r\n")
            sent += 1 << 16
        # On a busy machine Ray's proxy has taken more by the time that the answer comes.
        assert select.select([endless], [], [], 60)[0], "nobody says that it is too much"
        assert endless.recv(100).startswith(b"HTTP/1.1 413 ")


def test_as_many_wait_as_may_and_who_leaves_makes_room(client: openai.OpenAI, endpoint: Endpoint) -> None:
    streams = [client.completions.create(model="third", prompt=[5, 6], max_tokens=ENDLESS, stream=True) for _ in range(MOST)]
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model="base", prompt=[5], n=MOST)
    assert refused.value.response.headers["Retry-After"] == "1"
    cancelled = gauge(endpoint, "engine_num_cancelled")
    for stream in streams:
        next(iter(stream))
        stream.close()
    until(lambda: gauge(endpoint, "engine_num_running") + gauge(endpoint, "engine_num_waiting") == 0)
    assert gauge(endpoint, "engine_num_cancelled") > cancelled, "some were still being written"
    assert gauge(endpoint, "requests_in_flight") == 0
    assert client.completions.create(model="base", prompt=[5], n=MOST).choices


def test_who_reads_slowly_holds_up_nobody_and_loses_nothing(
    client: openai.OpenAI, endpoint: Endpoint, plain: dict[str, Plain]
) -> None:
    body = json.dumps({"model": "third", "prompt": [5, 6], "max_tokens": ENDLESS, "temperature": 0, "stream": True})
    with connected(endpoint) as slow:
        slow.sendall(f"{POST_COMPLETIONS}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        assert asked(client, "base", prompts()[2], LONGEST, stream=True) == expected(plain, "base", prompts()[2], LONGEST)
        until(lambda: gauge(endpoint, "engine_num_running") == 0)  # its answer is written, though nobody has read it
        content = b""
        while piece := slow.recv(4096):
            content += piece
    events = re.findall(rb"data: (\{.*\})", content)
    assert "".join(json.loads(one)["choices"][0]["text"] for one in events) == expected(plain, "third", [5, 6], ENDLESS)[0]
    assert b"data: [DONE]" in content


def load(endpoint: Endpoint, name: str, path: str) -> tuple[int, str]:
    body = json.dumps({"lora_name": name, "lora_path": path})
    status, _, content = raw(endpoint, "POST", "/v1/load_lora_adapter", body)
    return status, content.decode()


@pytest.fixture
def with_kept(endpoint: Endpoint, client: openai.OpenAI) -> Endpoint:
    """It has the second adapter as "kept", loaded while it ran."""
    if "kept" not in [model.id for model in client.models.list()]:
        assert load(endpoint, "kept", "second")[0] == 200
    return endpoint


def test_adapters_come_and_go_while_others_are_answered(
    client: openai.OpenAI, endpoint: Endpoint, saved: Path, plain: dict[str, Plain]
) -> None:
    (saved / "outside").symlink_to(saved / "base")
    (saved / "adapters/link").symlink_to(saved / "base")
    outside = [str(saved / "base"), "../base", "link", "/etc", "first/../../base", "none", "\x00"]
    found = [load(endpoint, "later", path) for path in outside]
    assert {status for status, _ in found} == {400}
    assert all("no folder in one of those" in words for _, words in found)
    for name in ("../x", "a/b", "", "first", "base"):
        assert load(endpoint, name, "later")[0] == 400
    (saved / "adapters/broken").mkdir()
    assert "adapter_config.json" in load(endpoint, "broken", "broken")[1]
    assert load(endpoint, "later", str(saved / "adapters/later"))[0] == 200
    assert [model.id for model in client.models.list()] == [*NAMES, "later"]
    assert asked(client, "later", prompts()[3], LONGEST, stream=False) == expected(plain, "second", prompts()[3], LONGEST)
    unload = json.dumps({"lora_name": "later"})
    assert raw(endpoint, "POST", "/v1/unload_lora_adapter", unload)[0] == 200
    assert raw(endpoint, "POST", "/v1/unload_lora_adapter", unload)[0] == 404
    assert raw(endpoint, "POST", "/v1/unload_lora_adapter", '{"lora_name": "first"}')[0] == 400
    with pytest.raises(openai.NotFoundError):
        asked(client, "later", [5], 1, stream=False)
    assert load(endpoint, "later", "first")[0] == 200, "a name can be another adapter's later"
    assert asked(client, "later", prompts()[3], LONGEST, stream=False) == expected(plain, "first", prompts()[3], LONGEST)
    assert raw(endpoint, "POST", "/v1/unload_lora_adapter", unload)[0] == 200


def replicas(endpoint: Endpoint) -> set[int]:
    _, _, content = raw(endpoint, "GET", "/metrics")
    return {int(pid) for pid in re.findall(r'raytune_engine_num_running{replica="[^"]*-(\d+)"}', content.decode())}


@pytest.mark.slow  # often without Ray: unit/test_serving_front.py
def test_where_a_replica_dies_whole_answers_are_asked_for_again_and_streams_say_so(
    client: openai.OpenAI, with_kept: Endpoint, plain: dict[str, Plain]
) -> None:
    endpoint = with_kept
    (before,), wanted = replicas(endpoint), expected(plain, "third", [5, 6], ENDLESS)[0]

    def stream(_: int) -> str | Exception:
        pieces = client.completions.create(model="third", prompt=[5, 6], max_tokens=ENDLESS, temperature=0, stream=True)
        try:
            return "".join(piece.choices[0].text for piece in pieces)
        except openai.APIError as error:
            return error

    def whole(_: int) -> str:
        return asked(client, "third", [5, 6], ENDLESS, stream=False)[0]

    with ThreadPoolExecutor(MOST) as threads:
        streams = [threads.submit(stream, number) for number in range(2)]
        until(lambda: gauge(endpoint, "engine_num_running") == 2)
        wholes = [threads.submit(whole, number) for number in range(MOST - 2)]
        until(lambda: gauge(endpoint, "requests_in_flight") >= MOST - 2)
        os.kill(before, signal.SIGKILL)
        assert [one.result() for one in wholes] == [wanted] * (MOST - 2)
        for one in streams:
            ended = one.result()
            assert ended == wanted or "died" in str(ended)
    assert gauge(endpoint, "retries_total") > 0
    (after,) = replicas(endpoint)
    assert after != before
    # What was loaded at run time, the new replica loads when it is asked under the name.
    assert asked(client, "kept", prompts()[3], LONGEST, stream=False) == expected(plain, "second", prompts()[3], LONGEST)


def test_where_the_process_that_speaks_http_dies_another_one_knows_the_same_adapters(with_kept: Endpoint) -> None:
    (ingress,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ServeReplica:raytune:http" in " ".join(process.info["cmdline"] or ())  # None: it has just ended
    ]
    ingress.kill()
    patient = client_of(with_kept, max_retries=8)
    until(lambda: [model.id for model in patient.models.list()] == [*NAMES, "kept"])


def test_a_cluster_serves_once_and_a_port_is_taken_once(endpoint: Endpoint, saved: Path, one_node: Cluster) -> None:
    with pytest.raises(UserError, match="runs Ray Serve already"):
        started(saved, one_node)
    port = int(endpoint.url.removesuffix("/v1").rpartition(":")[2])
    with pytest.raises(ClusterError, match="room for 9 replicas, in vain"):
        _wait_for_room(9, ClusterSection(start_timeout=1), on_gpus=False)
    with pytest.raises(UserError, match="no token is set"):
        serve(saved / "base", host="0.0.0.0", port=port)


@pytest.mark.slow
def test_of_many_requests_none_is_lost_while_replicas_are_killed(
    endpoint: Endpoint, saved: Path, one_node: Cluster, plain: dict[str, Plain]
) -> None:
    """And when the endpoint ends, what is being written is written to its end."""
    endpoint.close()
    with started(saved, one_node, replicas=2) as two:
        assert len(replicas(two)) == 2
        client, wanted = client_of(two), expected(plain, "third", [5, 6], 100)[0]
        answers: list[tuple[str, bool]] = []
        failures: list[tuple[openai.APIError, bool]] = []
        has_ended = threading.Event()

        def ask(streams: bool) -> None:
            while not has_ended.is_set():
                try:
                    answers.append((asked(client, "third", [5, 6], 100, stream=streams)[0], streams))
                except openai.APIError as error:
                    failures.append((error, streams))

        with ThreadPoolExecutor(MOST) as threads:
            work = [threads.submit(ask, number % 2 == 0) for number in range(MOST)]
            try:
                for _ in range(3):
                    until(lambda: len(replicas(two)) == 2, patience_s=110)  # it starts beside all that is asked
                    time.sleep(1)
                    os.kill(min(replicas(two)), signal.SIGKILL)
                until(lambda: len(replicas(two)) == 2, patience_s=110)
            finally:
                has_ended.set()
            for one in work:
                one.result()
        assert len(answers) > 100
        assert {text for text, _ in answers} == {wanted}
        assert len(failures) <= 3 * MOST, "at most those that a killed replica was at"
        assert all("died" in str(error) for error, _ in failures)
        assert all(streams for _, streams in failures), "a whole answer is asked for again"
        with ThreadPoolExecutor(1) as threads:
            last = threads.submit(asked, client, "third", [5, 6], ENDLESS, stream=True)
            until(lambda: gauge(two, "engine_num_running") > 0)
            two.close()
            assert last.result()[0] == expected(plain, "third", [5, 6], ENDLESS)[0]


@pytest.mark.slow
def test_memory_is_bounded_and_others_are_answered_while_many_read_a_byte_a_second(
    endpoint: Endpoint, saved: Path, one_node: Cluster, plain: dict[str, Plain]
) -> None:
    endpoint.close()
    with started(saved, one_node, max_batch=SLOW_READERS + MOST) as wide:
        client, wanted = client_of(wide), expected(plain, "base", prompts()[2], LONGEST)
        # Many bytes a token.
        turns = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 20}
        body = json.dumps({"model": "third", "max_tokens": ENDLESS, "temperature": 0, "stream": True} | turns)
        path = "/v1/chat/completions"
        size = len(raw(wide, "POST", path, body)[2])
        request = POST_COMPLETIONS.replace("/v1/completions", path) + f"Content-Length: {len(body)}\r\n\r\n{body}"
        before, grown = rss_of_serve(), []
        for _ in range(2):
            most, began = before, time.monotonic()
            with ExitStack() as stack:
                slow = [stack.enter_context(connected(wide)) for _ in range(SLOW_READERS)]
                for one in slow:
                    one.sendall(request.encode())
                while time.monotonic() < began + 60 or gauge(wide, "engine_num_running") > 0:
                    for one in slow:
                        one.recv(1)
                    assert asked(client, "base", prompts()[2], LONGEST, stream=True) == wanted
                    most = max(most, rss_of_serve())
                    time.sleep(1)
            grown.append(most - before)
        facts = f"{size} bytes an answer, {before >> 20} MiB before, and then {[one >> 20 for one in grown]} MiB more"
        # What is not read lies in several pieces of several processes: as text, pickled, and in heaps that stay as large.
        assert grown[0] < 3 * SLOW_READERS * size, facts
        assert grown[1] < 1.3 * grown[0], f"who has left leaves nothing behind: {facts}"


def rss_of_serve() -> int:
    """Bytes of the processes between an engine and a socket, and of the engine's."""
    names = ("ProxyActor", "ServeReplica:")
    every = [(one, " ".join(one.info["cmdline"] or ())) for one in psutil.process_iter(["cmdline"])]
    return sum(one.memory_info().rss for one, words in every if any(name in words for name in names))
