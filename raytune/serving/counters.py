"""What an endpoint counts, as Prometheus reads it."""

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)
ENGINE_GAUGES = {
    "num_waiting": "Requests that wait for a place in a batch.",
    "num_running": "Requests that are written.",
    "cached_tokens": "Tokens whose keys and values there is a place for.",
    "most_cached_tokens": "Tokens that there is room for.",
    "tokens_per_s": "Generated, over the last seconds.",
    "num_generated": "Tokens generated since the replica started.",
    "num_failed": "Requests that failed in the engine since it started.",
    "num_cancelled": "Requests that nobody waited for any more, since it started.",
}
"""What an engine says of itself."""


class Counters:
    """Of the process that speaks HTTP: requests, times and tokens; and of each engine, what it said last."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("raytune_requests", "Requests by path and status.", ("path", "status"), **own)
        self.in_flight = Gauge("raytune_requests_in_flight", "Answers that are waited for now.", **own)
        self.retries = Counter("raytune_retries", "Requests that were asked anew because a replica died.", **own)
        self.first_token = Histogram("raytune_first_token_seconds", "To the first token.", ("model",), buckets=_SECONDS, **own)
        self.whole = Histogram("raytune_answer_seconds", "To the end of an answer.", ("model",), buckets=_SECONDS, **own)
        self.prompt_tokens = Counter("raytune_prompt_tokens", "Tokens of prompts.", ("model",), **own)
        self.new_tokens = Counter("raytune_generated_tokens", "Tokens of answers.", ("model",), **own)
        self._of_engines = {
            name: Gauge(f"raytune_engine_{name}", words, ("replica",), **own) for name, words in ENGINE_GAUGES.items()
        }

    def text(self, engines: Sequence[Mapping[str, Any]]) -> bytes:
        """Everything, in Prometheus' format.

        Args:
            engines: what each says of itself now.
        """
        for name, gauge in self._of_engines.items():
            gauge.clear()  # those that have gone
            for state in engines:
                gauge.labels(replica=state["replica"]).set(state[name])
        return generate_latest(self._registry)
