"""Whether a Ray dashboard answers at an address, asked before Ray's client is: that one waits for ever for a server that is
silent, and takes any server for Ray."""

import re

import requests

from raytune.errors import ClusterError, UserError
from raytune.printable import first_line

ANSWER_TIMEOUT_S = 20.0


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
