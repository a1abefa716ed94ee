"""One process per node of a cluster that looks at it, and writes and reads where runs go."""

import os
import time
from collections.abc import Mapping
from contextlib import suppress

import ray

from raytune.clusters.checks.facts import MachineFacts, machine_facts
from raytune.errors import RaytuneError
from raytune.storage import exists, is_local, read_bytes, remove_empty_folder, remove_folder, write_bytes

FOLDER = ".raytune-preflight"
# NFS may answer from what it remembers for a few seconds.
READ_PATIENCE_S = 6.0


@ray.remote(num_cpus=0)
class Inspector:
    """Looks at the node that it was placed on."""

    def __init__(self) -> None:
        self._storage_was_there: bool | None = None

    def facts(self, storage: str | None) -> MachineFacts:
        return machine_facts(storage)

    def clock(self) -> float:
        """Seconds since 1970, as this node counts them."""
        return time.time()

    def write_token(self, storage: str, node: str, token: str) -> str | None:
        """Leave a token in the storage, and say what went wrong."""
        try:
            self._storage_was_there = not is_local(storage) or exists(storage)
            write_bytes(_file(storage, node), token.encode())
        except (RaytuneError, OSError) as error:
            return str(error)
        return None

    def read_tokens(self, storage: str, tokens: Mapping[str, str]) -> dict[str, str]:
        """What went wrong in reading the tokens of other nodes, by node."""
        deadline = time.monotonic() + READ_PATIENCE_S
        while True:
            failures = {node: what for node, token in tokens.items() if (what := _misread(storage, node, token))}
            if not failures or time.monotonic() > deadline:
                return failures
            time.sleep(0.5)

    def remove_tokens(self, storage: str) -> None:
        """Remove what all nodes wrote here. Where they do not share the storage, each has one of its own."""
        folder = f"{storage}/{FOLDER}"
        with suppress(RaytuneError, OSError):  # another node may be at it
            if not is_local(storage) or exists(folder):
                remove_folder(folder, storage)

    def remove_new_storage(self, storage: str) -> None:
        """Remove a storage folder that is here since the tokens only; after every node has removed those."""
        if self._storage_was_there is False:
            with suppress(RaytuneError, OSError):
                remove_empty_folder(storage)


def _file(storage: str, node: str) -> str:
    return f"{storage}/{FOLDER}/{node.replace(os.sep, '_')}"


def _misread(storage: str, node: str, token: str) -> str | None:
    try:
        return None if read_bytes(_file(storage, node)) == token.encode() else "the file has other content"
    except FileNotFoundError:
        return "the file is not there"
    except (RaytuneError, OSError) as error:
        return str(error)
