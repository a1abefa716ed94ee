"""`raytune serve`: models behind an endpoint in OpenAI's form, from their names to its end."""

import atexit
import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig
from ray.util.placement_group import placement_group, remove_placement_group

from raytune.config.sections.cluster import ClusterSection
from raytune.errors import ClusterError, UserError
from raytune.launch.asking.models_to_ask import Named, Subject, models_to_ask
from raytune.launch.asking.score import HERE
from raytune.launch.cluster.address import named_address
from raytune.launch.cluster.cluster import connect
from raytune.launch.cluster.host import this_machine
from raytune.launch.cluster.waiting import wait_for
from raytune.plan.facts.machine import Machine
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.saved.served_memory import engine_limits
from raytune.plan.saved.serving import EngineLimits
from raytune.printable import first_line
from raytune.serving.access import chosen_token, fingerprint
from raytune.serving.deployments import APP, application
from raytune.serving.front import FrontPlan
from raytune.serving.ingress import ClusterMemory
from raytune.serving.replica import ReplicaPlan, served
from raytune.serving.subjects import served_subjects

_ANY = "0.0.0.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How models are served, in words of the command line."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    replicas: int = 1
    max_batch: int = 32
    max_waiting: int = 256
    timeout_s: float = 600.0
    adapters_in: tuple[str, ...] = ()
    address: str | None = None

    def refuse_odd(self) -> None:
        """
        Raises:
            UserError: if a number is none that can be served with.
        """
        for name, value in (("replicas", self.replicas), ("max-batch", self.max_batch), ("max-waiting", self.max_waiting)):
            if value < 1:
                raise UserError(f"--{name} is {value}, and 1 is the least.")
        if not 0 < self.timeout_s < inf:
            raise UserError(f"--timeout is {self.timeout_s:g}, expected seconds above 0.")
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port is {self.port}, expected 0 (any that is free) to 65535.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToServe:
    """Models that are ready to be served."""

    subjects: tuple[Subject, ...]
    base: Subject | None
    cluster: ClusterSection
    options: ServeOptions
    token: str


def prepare_serving(named: Named, options: ServeOptions, token: str | None = None) -> ToServe:
    """Look at everything that is to be served, before anything is started.

    Args:
        token: that the user chose.

    Raises:
        UserError: if a model cannot be had, or the endpoint would be open to strangers.
    """
    options.refuse_odd()
    chosen = chosen_token(options.host, token)
    for folder in options.adapters_in:
        if not Path(folder).expanduser().is_dir():
            raise UserError(f"--adapters-in is {folder}, which is no folder.")
    to_ask = models_to_ask(named)
    subjects = served_subjects(to_ask)
    base = next((one for one in subjects if not one.asked.adapter), None)
    section = to_ask.run.config.cluster if to_ask.run else ClusterSection()
    changes: dict[str, Any] = {"workers": options.replicas}
    if options.address is not None:
        changes["address"] = None if options.address == HERE else options.address
    section = section.model_copy(update=changes)
    return ToServe(subjects=subjects, base=base, cluster=section, options=options, token=chosen)


class Endpoint:
    """A running endpoint. A context manager, that ends it.

    Attributes:
        url: what clients of OpenAI take as `base_url`.
        token: what they take as `api_key`.
        models: names.
    """

    def __init__(self, url: str, token: str, models: Sequence[str], held: ExitStack) -> None:
        self.url, self.token, self.models = url, token, tuple(models)
        self._held = held
        atexit.register(self.close)  # a cluster elsewhere would go on serving

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Endpoint(url={self.url!r}, models={self.models!r})"

    def wait(self) -> None:
        """Until something interrupts this process."""
        threading.Event().wait()

    def close(self) -> None:
        """Take no more requests, let answers that are being written end, and end what was started. Idempotent."""
        atexit.unregister(self.close)
        self._held.close()


def start_serving(to_serve: ToServe) -> Endpoint:
    """Start what was prepared; returns once it answers.

    Raises:
        UserError: if the port is taken, or the cluster serves something already.
        ClusterError: if the cluster cannot be reached, or replicas do not become ready.
    """
    options = to_serve.options
    with ExitStack() as stack:
        is_ours = named_address(to_serve.cluster) is None and not ray.is_initialized()
        if is_ours:
            _refuse_taken_port(options)
        machine = stack.enter_context(connect(to_serve.cluster, scales=False))
        port = options.port or _free_port(options.host)
        stack.enter_context(_serve_running(options.host, port, ends_with_cluster=is_ours))
        stack.enter_context(_deployed(to_serve, machine))
        shown = "127.0.0.1" if options.host == _ANY else options.host
        names = [one.name for one in to_serve.subjects]
        return Endpoint(f"http://{_bracketed(shown)}:{port}/v1", to_serve.token, names, stack.pop_all())


@contextmanager
def _serve_running(host: str, port: int, *, ends_with_cluster: bool) -> Iterator[None]:
    found = serve.status()
    if found.proxies or found.applications:
        raise UserError(
            "The cluster runs Ray Serve already, whose port and host are those of its first application. End that first (serve "
            "shutdown), or serve inside this machine: --address here."
        )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
    try:
        yield
    finally:
        if not ends_with_cluster and ray.is_initialized():
            serve.shutdown()


def limits_on(machine: Machine, to_serve: ToServe) -> tuple[str, EngineLimits]:
    """The kind of device that replicas compute on, and what each takes on at once.

    Raises:
        PlanError: if there is too little memory.
    """
    options, first = to_serve.options, to_serve.subjects[0].asked
    device = "cuda" if machine.num_gpus and to_serve.cluster.gpus_per_worker != 0 else "cpu"
    shape = read_model_shape(first.model.path, first.model.revision, trust_remote_code=first.model.trust_remote_code)
    how_many = {"replicas": options.replicas, "max_batch": options.max_batch, "max_waiting": options.max_waiting}
    return device, engine_limits(machine, shape, first, device=device, **how_many)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What would be served on this machine, and with how much room."""

    models: Mapping[str, str]
    """Sources by names."""
    device: str
    limits: EngineLimits
    options: ServeOptions

    @property
    def lines(self) -> list[str]:
        options, limits = self.options, self.limits
        return [
            *(f"model    {name}: {source}" for name, source in self.models.items()),
            f"replicas {options.replicas} on {self.device}; each writes {limits.most_at_once} answers at once, "
            f"{limits.most_waiting} wait",
            f"memory   for keys and values of {limits.most_cached_tokens} tokens in each",
            f"listens  on {options.host}, port {options.port or 'any'}",
        ]

    def to_json(self) -> dict[str, Any]:
        options, limits = self.options, self.limits
        return {
            "models": dict(self.models),
            "replicas": options.replicas,
            "device": self.device,
            "max_batch": limits.most_at_once,
            "max_waiting": limits.most_waiting,
            "cached_tokens": limits.most_cached_tokens,
            "host": options.host,
            "port": options.port,
        }


def would_serve(to_serve: ToServe) -> Served:
    """What was prepared, measured against this machine.

    Raises:
        PlanError: if there is too little memory.
    """
    device, limits = limits_on(this_machine(to_serve.cluster), to_serve)
    models = {one.name: one.source for one in to_serve.subjects}
    return Served(models=models, device=device, limits=limits, options=to_serve.options)


@contextmanager
def _deployed(to_serve: ToServe, machine: Machine) -> Iterator[None]:
    options, section = to_serve.options, to_serve.cluster
    key = f"{APP}/{time.time_ns()}"
    device, limits = limits_on(machine, to_serve)
    threads = max(1, machine.num_cpus // options.replicas) if device == "cpu" else max(1, int(section.cpus_per_worker))
    most = options.max_batch + options.max_waiting
    front = FrontPlan(
        models={one.name: one.source for one in to_serve.subjects},
        token=fingerprint(to_serve.token),
        most_held=most * options.replicas,
        most_together=most,
        timeout_s=options.timeout_s,
        loads_adapters=bool(options.adapters_in) and to_serve.base is not None,
        started=int(time.time()),
    )
    replica = ReplicaPlan(
        models={one.name: served(one) for one in to_serve.subjects},
        base=to_serve.base,
        adapter_folders=tuple(str(Path(folder).expanduser().resolve()) for folder in options.adapters_in),
        device=device,
        threads=threads if section.threads_per_worker == "auto" else section.threads_per_worker,
        limits=limits,
    )
    what = application(
        front, replica, key=key, num_replicas=options.replicas, cpus=section.cpus_per_worker, most_per_replica=most
    )
    _wait_for_room(options.replicas, section, on_gpus=device == "cuda")
    try:
        serve.run(what, name=APP, route_prefix="/")
    except RuntimeError as error:
        raise ClusterError(f"The models could not be served: {_why(error)}") from error
    try:
        yield
    finally:
        if ray.is_initialized():
            serve.delete(APP)
            ClusterMemory(key).forget()


def _wait_for_room(replicas: int, section: ClusterSection, *, on_gpus: bool) -> None:
    """Wait until the cluster has room for all replicas, as Serve would without end and without a word.

    Raises:
        ClusterError: if it has none in time.
    """
    needs = {"CPU": section.cpus_per_worker} | ({"GPU": 1} if on_gpus else {})
    group = placement_group([needs] * replicas)
    try:
        wait_for(group.ready(), f"room for {replicas} replicas", section.start_timeout)
    finally:
        remove_placement_group(group)


def _why(error: Exception) -> str:
    """What Serve says of replicas that did not start; their own words are in its status."""
    found = serve.status().applications.get(APP)
    words = [one.message for one in found.deployments.values() if one.message] if found else []
    return "\n".join([first_line(error), *words])


def _refuse_taken_port(options: ServeOptions) -> None:
    if options.port == 0:
        return
    try:
        _bound(options.host, options.port).close()
    except OSError as error:
        raise UserError(
            f"--port {options.port} on {options.host} cannot be used ({error.strerror}). Name another one, or 0 for any "
            f"that is free."
        ) from error


def _free_port(host: str) -> int:
    with _bound(host, 0) as bound:
        return bound.getsockname()[1]


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
