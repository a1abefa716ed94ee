"""An endpoint under load: requests per second, and how long the first token and the whole answer take, by the number of clients.

    python -m tests.bench.serving --output

The demo base, prompts of demo rows, 32 new tokens each, greedy, streamed by OpenAI's client; every client asks again as soon as
it has its answer. The rival is what one would write first: `generate` in a FastAPI route behind a lock, which streams nothing, so
that its first token comes with its last. Both in processes of this machine, one compute thread each; a client's own seconds are
part of it. Last, how many connections that wait are held at once.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import openai

from raytune.api import serve
from raytune.data.demo import demo_rows
from tests.bench.measure import report

CLIENTS = (1, 8, 32)
NEW_TOKENS = 32
SECONDS = 20.0
RIVAL_PORT = 8811
HELD = 400
RIVAL = f"""
import threading, torch, uvicorn
from fastapi import FastAPI, Request
from transformers import AutoModelForCausalLM, AutoTokenizer
from raytune.model.demo import demo_base_path
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(demo_base_path()).eval()
tokenizer = AutoTokenizer.from_pretrained(demo_base_path())
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
    parser.add_argument("--seconds", type=float, default=SECONDS)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    with serve("demo", address="here", max_waiting=HELD) as endpoint:
        client = openai.OpenAI(base_url=endpoint.url, api_key=endpoint.token, max_retries=0, timeout=300)
        figures["raytune"] = {f"{number} clients": load(client, number, arguments.seconds, streams=True) for number in CLIENTS}
        figures["held_connections"] = held(client)
    with rival() as url:
        client = openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=300)
        figures["generate behind a lock"] = {
            f"{number} clients": load(client, number, arguments.seconds, streams=False) for number in CLIENTS
        }
    report("serving", figures | {"new_tokens": NEW_TOKENS, "seconds": arguments.seconds}, arguments.output)


def load(client: openai.OpenAI, num_clients: int, seconds: float, *, streams: bool) -> dict[str, float]:
    """Figures of so many clients that ask for so long."""
    prompts = [row["messages"][:-1] for row in demo_rows("test", 64, 0)]
    ask(client, prompts[0], streams=streams)
    began = time.monotonic()
    deadline = began + seconds

    def ask_on(number: int) -> list[tuple[float, float]]:
        found = []
        while time.monotonic() < deadline:
            found.append(ask(client, prompts[(number + len(found)) % len(prompts)], streams=streams))
        return found

    with ThreadPoolExecutor(num_clients) as threads:
        times = [one for found in threads.map(ask_on, range(num_clients)) for one in found]
    took = time.monotonic() - began
    firsts, wholes = zip(*times, strict=True)
    return {
        "requests": len(times),
        "requests_per_s": round(len(times) / took, 2),
        **{f"first_token_{name}_s": value for name, value in percentiles(firsts).items()},
        **{f"whole_{name}_s": value for name, value in percentiles(wholes).items()},
    }


def percentiles(times: Any) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=20, method="inclusive")
    return {"p50": round(cuts[9], 3), "p95": round(cuts[18], 3)}


def ask(client: openai.OpenAI, messages: Any, *, streams: bool) -> tuple[float, float]:
    """Seconds to the first token and to the end."""
    began = time.monotonic()
    common: Any = {"model": "demo", "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
    if not streams:
        client.chat.completions.create(**common)
        return (time.monotonic() - began,) * 2
    first = None
    for chunk in client.chat.completions.create(**common, stream=True):
        if first is None and chunk.choices[0].delta.content:
            first = time.monotonic() - began
    whole = time.monotonic() - began
    return first or whole, whole


def held(client: openai.OpenAI) -> dict[str, float]:
    """Streams that are all open at once, most of them waiting for a place, and how many of them come to their end."""
    began = time.monotonic()
    messages: Any = [{"role": "user", "content": "hello"}]
    with ThreadPoolExecutor(HELD) as threads:
        common: Any = {"model": "demo", "messages": messages, "max_tokens": NEW_TOKENS, "stream": True}
        streams = list(threads.map(lambda _: client.chat.completions.create(**common), range(HELD)))
        opened = time.monotonic() - began
        complete = sum(threads.map(lambda stream: any(chunk.choices[0].finish_reason for chunk in stream), streams))
    return {"opened": len(streams), "opened_after_s": round(opened, 1), "complete": complete}


@contextmanager
def rival() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", RIVAL])
    url = f"http://127.0.0.1:{RIVAL_PORT}/v1"
    try:
        client = openai.OpenAI(base_url=url, api_key="x", max_retries=60)
        ask(client, [{"role": "user", "content": "hello"}], streams=False)
        yield url
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
