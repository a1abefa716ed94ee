"""The process of an endpoint that speaks HTTP, as a deployment of Ray Serve. It loads neither torch nor transformers."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError
from ray.experimental import internal_kv
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from raytune.serving.answers import Told
from raytune.serving.front import Front, FrontPlan, Lost
from raytune.serving.protocol import Asked
from raytune.serving.refusals import EngineDeadError

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
