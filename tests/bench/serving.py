"""An endpoint under load: requests per second, and how long the first token and the whole answer take, by the number of clients.

    python -m tests.bench.serving --output

A random Llama of 4 layers and width 256, prompts of demo rows, 32 new tokens each, greedy, asked by OpenAI's client; every client
asks again as soon as it has its answer. The rival is what one would write first: `generate` in a FastAPI route behind a lock,
which streams nothing, so that its first token comes with its last. Both run beside each other in processes of this machine, one
compute thread each, and are asked in turn, a few seconds each, so that drifts of the machine hit both. CPU seconds are those of
all processes of the endpoint. Last, how many streams are held open at once.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import openai
import psutil

from raytune import serve
from raytune.data.files.demo import demo_rows
from tests.bench.measure import report, tree_cpu_s
from tests.tiny import save_tiny_model

CLIENTS = (1, 8, 32)
NEW_TOKENS = 32
RIVAL_PORT = 8811
HELD = 400
RIVAL = f"""
import sys, threading, torch, uvicorn
from fastapi import FastAPI, Request
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
app, lock = FastAPI(), threading.Lock()

@app.post("/v1/chat/completions")
def answer(body: dict):
    ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with lock, torch.inference_mode():
        new = model.generate(**ids, max_new_tokens=body["max_tokens"], do_sample=False)[0, ids["input_ids"].shape[1]:]
    text = tokenizer.decode(new, skip_special_tokens=True)
    message = {{"role": "assistant", "content": text}}
    return {{"id": "x", "object": "chat.completion", "created": 0, "model": "demo",
            "choices": [{{"index": 0, "message": message, "finish_reason": "stop"}}]}}

uvicorn.run(app, port={RIVAL_PORT}, log_level="warning")
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", action="store_true", help="append to the baselines")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each rival in each round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
        save_tiny_model(Path(folder), num_key_value_heads=4, **shape)
        with serve(folder, address="here", max_waiting=HELD) as endpoint, rival(folder) as (url, pid):
            client = openai.OpenAI(base_url=endpoint.url, api_key=endpoint.token, max_retries=0, timeout=300)
            plain = openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=300)

            def own_cpu_s() -> float:
                return tree_cpu_s() - tree_cpu_s(pid) - sum(psutil.Process().cpu_times()[:2])

            ours = Load(client, endpoint.models[0], streams=True, cpu_s=own_cpu_s)
            theirs = Load(plain, "any", streams=False, cpu_s=lambda: tree_cpu_s(pid))
            figures: dict[str, Any] = {"raytune": {}, "generate behind a lock": {}}
            for number in CLIENTS:
                for load in (ours, theirs) * arguments.rounds:
                    load.ask(number, arguments.seconds)
                for name, load in zip(figures, (ours, theirs), strict=True):
                    figures[name][f"{number} clients"] = load.figures()
            figures["held"] = held(client, endpoint.models[0])
    report(
        "serving", figures | {"new_tokens": NEW_TOKENS, "seconds_each": arguments.seconds * arguments.rounds}, arguments.output
    )


class Load:
    """Clients that ask an endpoint, and what became of their requests.

    Args:
        cpu_s: CPU seconds of the endpoint so far.
    """

    def __init__(self, client: openai.OpenAI, model: str, *, streams: bool, cpu_s: Callable[[], float]) -> None:
        self._client, self._model, self._streams, self._cpu_s = client, model, streams, cpu_s
        self._prompts = [row["messages"][:-1] for row in demo_rows("test", 64, 0)]
        self._times: list[tuple[float, float]] = []
        self._took = self._used = 0.0
        ask(client, model, self._prompts[0], streams=streams)

    def ask(self, num_clients: int, seconds: float) -> None:
        """Have so many clients ask for so long."""
        began, used = time.monotonic(), self._cpu_s()

        def ask_on(number: int) -> list[tuple[float, float]]:
            found = []
            while time.monotonic() < began + seconds:
                prompt = self._prompts[(number + len(found)) % len(self._prompts)]
                found.append(ask(self._client, self._model, prompt, streams=self._streams))
            return found

        with ThreadPoolExecutor(num_clients) as threads:
            self._times += [one for found in threads.map(ask_on, range(num_clients)) for one in found]
        self._took += time.monotonic() - began
        self._used += self._cpu_s() - used

    def figures(self) -> dict[str, float]:
        """Of what was asked since the last time."""
        times, took, used = self._times, self._took, self._used
        self._times, self._took, self._used = [], 0.0, 0.0
        firsts, wholes = zip(*times, strict=True)
        return {
            "requests": len(times),
            "requests_per_s": round(len(times) / took, 2),
            "cpu_s_per_request": round(used / len(times), 3),
            **{f"first_token_{name}_s": value for name, value in percentiles(firsts).items()},
            **{f"whole_{name}_s": value for name, value in percentiles(wholes).items()},
        }


def percentiles(times: Any) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=20, method="inclusive")
    return {"p50": round(cuts[9], 3), "p95": round(cuts[18], 3)}


def ask(client: openai.OpenAI, model: str, messages: Any, *, streams: bool) -> tuple[float, float]:
    """Seconds to the first token and to the end."""
    began = time.monotonic()
    common: Any = {"model": model, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
    if not streams:
        client.chat.completions.create(**common)
        whole = time.monotonic() - began
        return whole, whole
    first = None
    for chunk in client.chat.completions.create(**common, stream=True):
        if first is None and chunk.choices[0].delta.content:
            first = time.monotonic() - began
    whole = time.monotonic() - began
    return first or whole, whole


def held(client: openai.OpenAI, model: str) -> dict[str, float]:
    """Streams that are all open at once, most of them waiting for a place, and how many of them come to their end."""
    began = time.monotonic()
    messages: Any = [{"role": "user", "content": "hello"}]
    with ThreadPoolExecutor(HELD) as threads:
        common: Any = {"model": model, "messages": messages, "max_tokens": NEW_TOKENS, "stream": True}
        streams = list(threads.map(lambda _: client.chat.completions.create(**common), range(HELD)))
        opened = time.monotonic() - began
        complete = sum(threads.map(lambda stream: any(chunk.choices[0].finish_reason for chunk in stream), streams))
    return {"opened": len(streams), "opened_after_s": round(opened, 1), "complete": complete}


@contextmanager
def rival(folder: str) -> Iterator[tuple[str, int]]:
    process = subprocess.Popen([sys.executable, "-c", RIVAL, folder])
    url = f"http://127.0.0.1:{RIVAL_PORT}/v1"
    try:
        client = openai.OpenAI(base_url=url, api_key="x", max_retries=60)
        ask(client, "any", [{"role": "user", "content": "hello"}], streams=False)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
