"""Whether a Ray cluster answers at an address, asked before Ray is: where nobody does, Ray prints for a minute and may end the
process. Also finds out whether the cluster wants a token, which Ray has to know before it connects.
"""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from contextlib import suppress

import grpc
import ray
from ray._private.authentication.authentication_token_setup import _enable_token_auth
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from raytune.errors import ClusterError, UserError
from raytune.token_file import token_path
from raytune.units import format_seconds

RESOLVE_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 10.0
TOKEN_FILE = "~/.ray/auth_token"


def ready_for(address: str) -> None:
    """Make sure that a Ray cluster answers at `host:port`, `ray://host:port` or on this machine (`auto`), and turn its token on
    in this process if it wants one and this user has it.

    Raises:
        ClusterError: if the name has no address, or nothing or something else answers.
        UserError: if the address is none, or the cluster wants a token that this user does not have.
    """
    if address == "auto":
        with suppress(ConnectionError):  # there is none: Ray says so itself
            if found := canonicalize_bootstrap_address(address):
                ready_for(found)
        return
    is_client = address.startswith("ray://")
    host, port = _host_and_port(address)
    _connect(address, _resolve(address, host), port)
    if is_client or os.environ.get("RAY_USE_TLS", "0") != "0":  # another protocol, and certificates that Ray knows of
        return
    _ask(address, f"{host}:{port}")


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host.startswith(("http:", "https:")):
        raise UserError(
            f"cluster.address (or RAY_ADDRESS) is {address}, a dashboard's. `raytune submit --target {address} ...` sends a job "
            f"there; to train from here, name the head itself: host:port, 6379 by default. Nothing was started."
        )
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"cluster.address (or RAY_ADDRESS) is {address!r}, which is neither auto, host:port (6379 is Ray's usual port) nor "
            f"ray://host:port. Nothing was started."
        )
    return host.strip("[]"), int(port)


def _resolve(address: str, host: str) -> list[str]:
    """Addresses of a name, in a limited time."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="resolve")
    try:
        found = pool.submit(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM).result(RESOLVE_TIMEOUT_S)
    except (OSError, TookTooLong) as error:
        why = "no answer of the name service" if isinstance(error, TookTooLong) else str(error)
        raise _nobody(address, f"the name {host!r} has no address ({why})") from error
    finally:
        pool.shutdown(wait=False)
    return [str(one[4][0]) for one in found]


def _connect(address: str, hosts: list[str], port: int) -> None:
    refused = None
    for host in hosts:
        try:
            socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
            return
        except OSError as error:
            refused = error
    if isinstance(refused, ConnectionRefusedError):
        raise _nobody(address, "nothing listens on that port") from refused
    what = f"no connection within {format_seconds(CONNECT_TIMEOUT_S)}" if isinstance(refused, TimeoutError) else str(refused)
    raise _nobody(address, what) from refused


def _ask(address: str, target: str) -> None:
    """Ask the head whether it lives, first as somebody without a token."""
    token = _token()
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]) as channel:
        refusal = _refusal(channel, address, None)
        if refusal is None:
            return
        if token is None:
            raise UserError(
                f"The Ray cluster at {address} wants a token and none is here. Copy {TOKEN_FILE} of its head to the same "
                f"place on this machine (mode 600), or name the file in RAY_AUTH_TOKEN_PATH. `ray start` on other nodes and `ray "
                f"job` need it too, with RAY_AUTH_MODE=token. Nothing was started."
            )
        if _refusal(channel, address, token[0]) is not None:
            raise UserError(
                f"The Ray cluster at {address} refuses the token of {token[1]}. Use the one of its head: {TOKEN_FILE} there, or "
                f"what RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH name. Nothing was started."
            )
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        raise UserError(
            f"The Ray cluster at {address} wants a token, and RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']} here. Set "
            f"RAY_AUTH_MODE=token; the token of {token[1]} fits. Nothing was started."
        )
    _enable_token_auth()


def _refusal(channel: grpc.Channel, address: str, token: str | None) -> str | None:
    """Why the head does not let somebody in; None: it does.

    Raises:
        ClusterError: if what answers is no head of this Ray's version.
    """
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
    try:
        request = gcs_service_pb2.CheckAliveRequest()  # pyright: ignore[reportAttributeAccessIssue]
        reply = stub.CheckAlive(request, timeout=ANSWER_TIMEOUT_S, metadata=metadata)
    except grpc.RpcError as error:
        code = error.code()  # pyright: ignore[reportAttributeAccessIssue]
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return code.name
        what = f"no answer within {format_seconds(ANSWER_TIMEOUT_S)}" if code is grpc.StatusCode.DEADLINE_EXCEEDED else code.name
        raise _nobody(address, f"something listens on that port, but it is no head of a Ray cluster ({what})") from error
    if reply.ray_version and reply.ray_version != ray.__version__:
        raise ClusterError(
            f"The cluster at {address} runs Ray {reply.ray_version}, and this is Ray {ray.__version__}. All nodes and the "
            f"command need the same: pip install ray=={ray.__version__} there, or {reply.ray_version} here."
        )
    return None


def _token() -> tuple[str, str] | None:
    """The token that Ray would use, and where it was found, in Ray's order; None: there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip(), "RAY_AUTH_TOKEN"
    path = token_path()
    with suppress(OSError, UnicodeDecodeError):
        if token := path.read_text().strip():
            return token, str(path)
    return None


def _nobody(address: str, why: str) -> ClusterError:
    return ClusterError(
        f"No Ray cluster answers at {address}: {why}. Check cluster.address or RAY_ADDRESS (host:port, 6379 by default, not the "
        f"dashboard's 8265), that the head is up, and that no firewall is between. To run on this machine, unset both addresses."
    )
