"""Ray's authentication token on this machine: who reads it runs code on the cluster, so its owner alone may.

Ray 2.60 writes it for everybody to read (0644) when `ray.init` finds none.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def token_path() -> Path:
    """Where Ray looks for the token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def make_token(path: Path) -> bool:
    """A new token, readable by its owner only. Whether one was made: an existing one is kept, and closed to others.

    Raises:
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        close_token(path)
        return False
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return True


def close_token(path: Path) -> None:
    """Take a token's file from everybody but its owner, if there is one. That of another user is left to `doctor` to speak of."""
    with suppress(OSError):
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


def prepare_token() -> None:
    """Before Ray starts a cluster here: make the token that it would make, or close the one that is there."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_MODE") == "disabled":
        close_token(token_path())
        return
    with suppress(OSError):  # a home that cannot be written to: Ray says so
        make_token(token_path())
