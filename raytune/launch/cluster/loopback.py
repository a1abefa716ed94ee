"""A cluster that lives inside this machine listens to this machine alone: whoever reaches Ray's ports runs code."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ray._private import services
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

LOOPBACK = "127.0.0.1"


@contextmanager
def loopback_kept() -> Iterator[None]:
    """Let `ray.init` take 127.0.0.1 for a node's address as it is given.

    Ray 2.60 binds every port of a node to its address, and to all interfaces unless that is 127.0.0.1; but on Linux it replaces
    127.0.0.1 by the machine's address in the network first. When it takes the address as given, this can go.
    """
    resolve = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = resolve


@dataclass
class LoopbackTorchConfig(TorchConfig):
    """Ray Train's, of whose process groups the one inside a machine meets where only that machine can come."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_keep_store_on_loopback)
        super().on_start(worker_group, backend_config)


def _keep_store_on_loopback() -> None:
    """In a worker: torch 2.13 opens the store at which ranks meet on all interfaces, whatever its address (`TCPStore`)."""
    from torch.distributed import TCPStore

    rendezvous: Any = import_module("torch.distributed.rendezvous")  # by name: torch.distributed has a function that is called so

    def store(*, host_name: str, port: int, is_master: bool, **options: Any) -> TCPStore:
        if host_name == LOOPBACK and is_master and port:
            listener = socket.create_server((host_name, port), backlog=128)
            options["master_listen_fd"] = listener.detach()
        return TCPStore(host_name=host_name, port=port, is_master=is_master, **options)

    rendezvous.TCPStore = store
