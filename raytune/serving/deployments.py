"""An endpoint as Ray Serve runs it: one process that speaks HTTP in front of replicas that hold an engine each.

Two deployments rather than one, for the sake of those who wait: where a replica with an engine dies, which is what memory and
drivers do to processes, the connections are in another one, which asks again or says what happened. That one is single, so that
it alone knows how much is waited for; Serve starts it again where it dies, and adapters loaded at run time are remembered by
the cluster.
"""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.experimental import internal_kv
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from raytune.serving.answers import Told
from raytune.serving.front import Front, FrontPlan, Lost
from raytune.serving.protocol import Asked
from raytune.serving.refusals import EngineDeadError
from raytune.serving.replica import Replica, ReplicaPlan

APP = "raytune"
DRAIN_S = 30.0
"""For answers that are being written when the endpoint ends."""
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 60.0
"""A replica that computes on all cores of a busy machine is slow to say that it is well."""
_NAMESPACE = b"raytune-serve"
_DIED = (RayActorError, EngineDeadError, DeploymentUnavailableError, ReplicaUnavailableError)


class RayEngines:
    """Replicas behind a handle of Serve."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def answer(self, asked: Asked) -> AsyncGenerator[Sequence[Told], None]:
        stream: Any = self._streaming.answer.remote(asked)
        is_over = False
        try:
            async for batch in stream:
                yield batch
            is_over = True
        except _DIED as error:
            is_over = True
            raise Lost from error
        finally:
            if not is_over:
                stream.cancel()

    async def each(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        with suppress(TimeoutError):
            return await self._handle.broadcast(method, *arguments).results_async(timeout_s=timeout_s, return_exceptions=True)
        return []


class ClusterMemory:
    """Adapters that were loaded at run time, where the cluster remembers them for as long as it lives.

    Args:
        key: of one endpoint.
    """

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def read(self) -> dict[str, str]:
        content = internal_kv._internal_kv_get(self._key, namespace=_NAMESPACE)
        return json.loads(content) if content else {}

    def write(self, adapters: Mapping[str, str]) -> None:
        internal_kv._internal_kv_put(self._key, json.dumps(adapters).encode(), True, namespace=_NAMESPACE)

    def forget(self) -> None:
        internal_kv._internal_kv_del(self._key, namespace=_NAMESPACE)


class Ingress:
    """The process that speaks HTTP."""

    def __init__(self, plan: FrontPlan, key: str, handle: DeploymentHandle) -> None:
        self._front = Front(plan, RayEngines(handle), ClusterMemory(key))

    def __serve_build_asgi_app__(self) -> Any:
        return self._front.app()


def application(
    front: FrontPlan, replica: ReplicaPlan, *, key: str, num_replicas: int, cpus: float, most_per_replica: int
) -> serve.Application:
    """What Serve is to run.

    Args:
        key: under which the cluster remembers adapters.
        cpus: that Ray sets aside for each replica.
        most_per_replica: answers that one holds.
    """
    engines = serve.deployment(
        Replica,
        name="engine",
        num_replicas=num_replicas,
        max_ongoing_requests=most_per_replica,
        ray_actor_options={"num_cpus": cpus, "num_gpus": int(replica.device == "cuda")},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        max_constructor_retry_count=2,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="http",
        max_ongoing_requests=front.most_held + 256,  # who is too many is told so, and does not wait for that
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
    )
    return ingress.bind(front, key, engines.bind(replica))
