"""The side of an endpoint that speaks HTTP, before a real engine in this process: what is late, and what is asked twice."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from raytune.launch.asking.models_to_ask import Named, models_to_ask
from raytune.plan.saved.serving import EngineLimits
from raytune.serving.access import fingerprint
from raytune.serving.answers import Told
from raytune.serving.front import Front, FrontPlan, Lost
from raytune.serving.protocol import AdapterAt, Asked
from raytune.serving.refusals import EngineDeadError
from raytune.serving.replica import Replica, ReplicaPlan, served
from raytune.serving.subjects import served_subjects
from tests.served import Plain, save_adapter, save_base
from tests.tiny import tiny_tokenizer

TOKEN = "0123456789abcdef"
LONG: dict[str, Any] = {"model": "base", "prompt": [5, 6], "max_tokens": 500, "temperature": 0}


class Here:
    """Replicas in this process, of which some die on the way.

    Args:
        told_before: pieces that each of the first answers comes to before its replica dies.
    """

    def __init__(self, replica: Replica, told_before: Sequence[int] = ()) -> None:
        self._replica, self._told_before = replica, list(told_before)

    async def answer(self, asked: Asked) -> AsyncGenerator[Sequence[Told], None]:
        left = self._told_before.pop(0) if self._told_before else None
        async for batch in self._replica.answer(asked):
            if left is not None and left < len(batch):  # what is told at once depends on how fast it comes
                if left:
                    yield batch[:left]
                raise Lost
            left = None if left is None else left - len(batch)
            yield batch

    async def each(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        return [await getattr(self._replica, method)(*arguments)]


class Kept:
    def read(self) -> dict[str, str]:
        return {}

    def write(self, adapters: Mapping[str, str]) -> None:
        raise AssertionError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("saved") / "base", "llama", suppress_tokens=[2, 65, 101, 116, 200, 201, 202, 203])


@pytest.fixture(scope="module")
def replica(folder: Path) -> Iterator[Replica]:
    one = Replica(plan_of(str(folder)))
    yield one
    one.close()


def plan_of(folder: str) -> ReplicaPlan:
    (subject,) = served_subjects(models_to_ask(Named(model=folder)))
    limits = EngineLimits(most_at_once=4, most_waiting=4)
    above = (str(Path(folder).parent),)
    return ReplicaPlan(
        models={"base": served(subject)}, base=subject, adapter_folders=above, device="cpu", threads=1, limits=limits
    )


DEATH = """
import asyncio, ctypes, sys, threading
from raytune.serving.protocol import Asked
from raytune.serving.refusals import EngineDeadError
from tests.unit.test_serving_front import plan_of
from raytune.serving.replica import Replica

asked = Asked(id="x", model="base", prompts=((5, 6),), num_choices=1, max_new_tokens=500, temperature=0.0, top_p=1.0, top_k=None,
              seed=None, stop=(), num_logprobs=None)

async def main():
    replica = Replica(plan_of(sys.argv[1]))
    answer = replica.answer(asked)
    await anext(answer), await anext(answer)
    (thread,) = [one for one in threading.enumerate() if one.name == "answering"]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
    try:
        async for _ in answer:
            pass
    except EngineDeadError:
        print("who waited was told", flush=True)
    try:
        replica.check_health()
    except EngineDeadError:
        print("Serve is told", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_process_whose_engine_dies_says_so_and_ends(folder: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", DEATH, str(folder)], capture_output=True, text=True, check=False, timeout=300)
    assert ended.stdout == "who waited was told\nServe is told\n", ended.stderr
    assert ended.returncode == 1


def ask(
    replica: Replica, body: Mapping[str, Any], *, timeout_s: float = 60.0, told_before: Sequence[int] = ()
) -> tuple[httpx.Response, str]:
    """The answer, and what Prometheus reads afterwards."""

    async def both() -> tuple[httpx.Response, str]:
        plan = FrontPlan(
            models={"base": "x"},
            token=fingerprint(TOKEN),
            most_held=16,
            most_together=8,
            timeout_s=timeout_s,
            loads_adapters=False,
            started=0,
        )
        app = Front(plan, Here(replica, told_before), Kept()).app()
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here", headers=headers) as client:
            answer = await client.post("/v1/completions", json=body)
            while replica_is_busy(metrics := (await client.get("/metrics")).text):
                await asyncio.sleep(0.02)
            return answer, metrics

    return asyncio.run(both())


def replica_is_busy(metrics: str) -> bool:
    values = [line.rsplit(" ", 1)[1] for line in metrics.splitlines() if line.startswith("raytune_engine_num_running{")]
    return values != ["0.0"]


def events(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_an_answer_that_takes_too_long_is_a_504_that_clients_do_not_ask_for_again(replica: Replica) -> None:
    answer, metrics = ask(replica, LONG, timeout_s=0.1)
    assert answer.status_code == 504
    assert answer.headers["x-should-retry"] == "false"
    assert "0.1 s" in answer.json()["error"]["message"]
    assert 'raytune_requests_total{path="/v1/completions",status="504"} 1.0' in metrics
    assert "raytune_requests_in_flight 0.0" in metrics


def test_who_asks_as_a_model_goes_or_the_engine_dies_is_told_which(folder: Path) -> None:
    save_adapter(folder.parent / "first", folder, "first")
    one = Replica(plan_of(str(folder)))
    one._engine.unload("base")
    answer, _ = ask(one, LONG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    one.close()
    with pytest.raises(EngineDeadError):  # another replica may load it: nothing is wrong with the folder
        asyncio.run(one.load(AdapterAt(name="first", path="first")))


def test_an_adapter_that_has_taken_anothers_name_meanwhile_does_not_answer_for_it(folder: Path) -> None:
    for name in ("first", "second"):
        save_adapter(folder.parent / name, folder, name)
    one = Replica(plan_of(str(folder)))

    async def answer(path: str) -> list[int]:
        asked = Asked(
            id=path,
            model="mine",
            adapter=AdapterAt(name="mine", path=path),
            prompts=((5, 6),),
            num_choices=1,
            max_new_tokens=20,
            temperature=0.0,
            top_p=1.0,
            top_k=None,
            seed=None,
            stop=(),
            num_logprobs=0,
        )
        told = [piece async for batch in one.answer(asked) for piece in batch]
        return [token.id for piece in told if isinstance(piece, tuple) for token in piece[1].tokens]

    async def beside_another() -> None:
        first, second = await answer("first"), await answer("second")
        assert first != second
        await one.load(AdapterAt(name="mine", path="first"))
        may_read = threading.Event()
        one._reading.submit(may_read.wait)
        answering = asyncio.create_task(answer("first"))
        await asyncio.sleep(0)  # it has its adapter, and waits for its prompt to be read
        await one.load(AdapterAt(name="mine", path="second"))
        may_read.set()
        assert await answering == first

    try:
        asyncio.run(beside_another())
    finally:
        one.close()


@pytest.mark.parametrize("asked", [{"n": 9}, {"n": 3, "prompt": ["a", "b", "c"]}])
def test_more_answers_than_ever_fit_are_not_asked_for_again(replica: Replica, asked: dict[str, Any]) -> None:
    answer, _ = ask(replica, LONG | asked)
    assert answer.status_code == 400
    assert "9 answers are asked for, and a replica of this endpoint holds 8" in answer.json()["error"]["message"]


def test_a_stream_that_takes_too_long_says_so_in_an_event(replica: Replica) -> None:
    answer, _ = ask(replica, LONG | {"stream": True}, timeout_s=0.1)
    assert answer.status_code == 200
    *pieces, last = events(answer)
    assert last["error"]["code"] == "timeout"
    assert "[DONE]" not in pieces


def test_the_places_of_streamed_tokens_are_those_of_the_whole_answer(replica: Replica) -> None:
    body = LONG | {"max_tokens": 60, "logprobs": 0}
    whole = ask(replica, body)[0].json()["choices"][0]["logprobs"]
    pieces = events(ask(replica, body | {"stream": True})[0])[:-1]
    for name in ("text_offset", "tokens", "token_logprobs"):
        assert [one for piece in pieces for one in piece["choices"][0]["logprobs"][name]] == whole[name]
    assert len(whole["text_offset"]) == 60


def expected(folder: Path, most: int) -> str:
    text: Any = tiny_tokenizer().decode(Plain(folder).ids([5, 6], most), skip_special_tokens=True)
    return text


@pytest.mark.parametrize("told", [0, 1, 5])
def test_a_whole_answer_is_asked_for_once_more_wherever_its_replica_died(replica: Replica, folder: Path, told: int) -> None:
    body = LONG | {"max_tokens": 40}
    answer, metrics = ask(replica, body, told_before=[told])
    assert answer.json()["choices"][0]["text"] == expected(folder, 40)
    assert answer.json()["usage"]["completion_tokens"] == 40
    assert "raytune_retries_total 1.0" in metrics
    answer, _ = ask(replica, body, told_before=[told, told])
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
    assert answer.headers["Retry-After"] == "2"


def test_a_stream_is_asked_for_once_more_as_long_as_nothing_of_it_was_sent(replica: Replica, folder: Path) -> None:
    body = LONG | {"max_tokens": 40, "stream": True}
    for told in (0, 1):
        *pieces, last = events(ask(replica, body, told_before=[told])[0])
        assert last == "[DONE]"
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected(folder, 40)
    *pieces, last = events(ask(replica, body, told_before=[3])[0])
    assert last["error"]["code"] == "replica_lost"
    assert expected(folder, 40).startswith("".join(piece["choices"][0]["text"] for piece in pieces))
    answer, _ = ask(replica, body, told_before=[0, 0])
    assert answer.status_code == 503, "nothing was sent, so that the status can still say it"
    assert events(ask(replica, body, told_before=[1, 1])[0])[-1]["error"]["code"] == "replica_lost"
