"""Where a cluster's dashboard is, whether it may be used, and what its silence means. Asked before Ray's client is: that one
waits for ever for a server that is silent, and takes any server for Ray.

A target is where a dashboard listens: on this machine, or at the end of a tunnel (`ray dashboard`, `kubectl port-forward`), or
behind HTTPS.
"""

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

import requests
from ray.dashboard.utils import ray_address_to_api_server_url
from ray.exceptions import AuthenticationError

from raytune.errors import ClusterError, UserError
from raytune.printable import first_line

LOCAL = "local"
ENVIRONMENT = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where a target may be named, first found first; `ray job` reads the same."""

ANSWER_TIMEOUT_S = 20.0


def named_target(target: str | None, environ: Mapping[str, str]) -> str:
    """The target that an option or the environment names: `local`, a URL, or a Ray address from the environment.

    Raises:
        UserError: if the option is neither.
    """
    if target is None or target == "auto":
        return next((environ[name] for name in ENVIRONMENT if environ.get(name)), LOCAL)
    if target == LOCAL or (target.startswith(("http://", "https://")) and urlsplit(target).hostname):
        return target.rstrip("/")
    hint = f" Did you mean http://{target}?" if "://" not in target else ""
    raise UserError(f"Target {target!r} is neither local, auto, nor an http:// or https:// address of a dashboard.{hint}")


def refuse_open(url: str, *, has_token: bool, insecure: bool) -> str | None:
    """Refuse to send code and a config over a network to a dashboard that asks nobody who they are.

    Returns:
        What is risked, where it was allowed by `insecure`; None where nothing is.

    Raises:
        UserError: where it was not.
    """
    host = urlsplit(url).hostname or ""
    if url.startswith("https://") or has_token or _is_loopback(host):
        return None
    why = (
        f"{url} is neither this machine nor HTTPS, and no token is set: whoever reaches that port can run code on the cluster as "
        f"you do now, and whoever is on the way reads what you send (CVE-2023-48022)."
    )
    if insecure:
        return why
    raise UserError(
        f"{why} Nothing was sent. Reach it through a tunnel (`ray dashboard CLUSTER.yaml`, `kubectl port-forward "
        f"service/HEAD-SERVICE 8265`, `ssh -L 8265:localhost:8265 HEAD`) and target http://127.0.0.1:8265, or start the cluster "
        f"with RAY_AUTH_MODE=token and have its token in ~/.ray/auth_token. --insecure goes on all the same."
    )


def refuse_what_is_no_dashboard(url: str) -> None:
    """Refuse an address where something else answers, or nothing.

    Raises:
        UserError: if that is not Ray.
        ClusterError: if nothing answers in time.
    """
    try:
        answer = requests.get(f"{url}/api/version", timeout=ANSWER_TIMEOUT_S)
    except requests.exceptions.InvalidURL as error:
        raise UserError(f"Target {url!r} is no address ({error}).") from error
    except (OSError, requests.exceptions.RequestException) as error:
        if "BadStatusLine" in str(error):  # not even HTTP
            raise _no_dashboard(url, "it does not speak HTTP") from error
        raise ClusterError(
            f"No dashboard answers at {url} ({type(error).__name__}: {_reason(error)}). Is the cluster up, and the tunnel to it "
            f"open (`ray dashboard CLUSTER.yaml`, `kubectl port-forward service/HEAD-SERVICE 8265`)?"
        ) from error
    if answer.status_code in (401, 403):  # it wants a token, or another one
        return
    try:
        is_ray = answer.status_code == 200 and "ray_version" in answer.json()
    except (ValueError, TypeError):
        is_ray = False
    if not is_ray:
        server = answer.headers.get("Server")
        raise _no_dashboard(url, f"status {answer.status_code} for {url}/api/version" + (f", from {server}" if server else ""))


def dashboard_url(target: str) -> str:
    """Address of the dashboard of a target."""
    if target.startswith(("http://", "https://")):
        return target
    address = "auto" if target == LOCAL else target
    try:
        with no_other_address():
            url = ray_address_to_api_server_url(address)
    except Exception as error:  # Ray raises what it likes here: ConnectionError, ValueError, RpcError
        where = "on this machine" if target == LOCAL else f"at {target}"
        raise ClusterError(
            f"No Ray cluster with a dashboard was found {where} ({type(error).__name__}: {first_line(error)}). Start "
            f"one (`ray start --head`), or name the dashboard of another: --target http://127.0.0.1:8265. To train on this "
            f"machine without a cluster: `raytune train`."
        ) from error
    return url.rstrip("/")


@contextmanager
def no_other_address() -> Iterator[None]:
    """Ray's client prefers these variables to what it is given."""
    before = {name: os.environ.pop(name) for name in ENVIRONMENT if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextmanager
def answered(url: str) -> Iterator[None]:
    """Say what to do where a dashboard does not answer, or does not know us."""
    try:
        yield
    except AuthenticationError as error:
        first = first_line(error)
        raise UserError(
            f"{url} does not let this user in ({first}). Put the cluster's token into ~/.ray/auth_token (mode 600), or name its "
            f"file in RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token."
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise ClusterError(
            f"No dashboard answers at {url} ({type(error).__name__}: {first_line(error)}). Is the cluster up, and the "
            f"tunnel to it open (`ray dashboard CLUSTER.yaml`, `kubectl port-forward service/HEAD-SERVICE 8265`)?"
        ) from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _no_dashboard(url: str, what: str) -> UserError:
    return UserError(
        f"What answers at {url} is no Ray dashboard ({what}). Nothing was sent. The dashboard's port is 8265 by default; the "
        f"head's own, 6379, is for cluster.address."
    )


def _reason(error: Exception) -> str:
    """What a chain of libraries says about a connection, in the words of the system where they are in it."""
    first = first_line(error)
    found = re.search(r"\[Errno -?\d+\] ([^\"')]+)", first)
    return found[1].strip() if found else first
