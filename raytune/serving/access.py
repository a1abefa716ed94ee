"""Who may use an endpoint: whoever knows its token, of which the cluster is given a fingerprint only."""

import hashlib
import hmac
import ipaddress
import secrets
from pathlib import Path

from raytune.errors import UserError

LEAST_TOKEN = 16
"""Characters of one that a user chose, so that nobody guesses it."""
TOKEN_VARIABLE = "RAYTUNE_API_KEY"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def chosen_token(host: str, given: str | None) -> str:
    """The token of an endpoint: that of the user, or a new one, which is enough where only this machine reaches it.

    Args:
        given: by the user.

    Raises:
        UserError: if a token is needed and there is none, or it is none that can be sent or is hard to guess.
    """
    if given is None:
        if not is_loopback(host):
            raise UserError(
                f"--host is {host}, which other machines reach, and no token is set: whoever found the port could use the "
                f"models. Put one into {TOKEN_VARIABLE} or a file for --token-file (python -c 'import secrets; "
                f"print(secrets.token_urlsafe(32))' makes one), or leave --host out. Nothing was started."
            )
        return secrets.token_urlsafe(32)
    if len(given) < LEAST_TOKEN or not given.isascii() or not given.isprintable() or " " in given:
        raise UserError(
            f"The token has to be at least {LEAST_TOKEN} printable characters of ASCII without spaces; this one has "
            f"{len(given)}. Nothing was started."
        )
    return given


def token_in(path: Path) -> str:
    """The token in a file that its owner alone may read.

    Raises:
        UserError: if there is none, or others may read it.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise UserError(f"{path} can be read by other users of this machine. chmod 600 {path}")
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file is {path}, which cannot be read: {error}") from error


def fingerprint(token: str) -> str:
    """What a token is recognised by, and cannot be told from."""
    return hashlib.sha256(token.encode()).hexdigest()


def is_allowed(authorization: str | None, expected: str) -> bool:
    """Whether a header has the token with a fingerprint; in the same time, wherever they differ."""
    scheme, _, token = (authorization or "").partition(" ")
    given = hashlib.sha256(token.strip().encode(errors="surrogateescape")).hexdigest()
    return hmac.compare_digest(given, expected) and scheme.lower() == "bearer"
