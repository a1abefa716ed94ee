"""Models to a Hugging Face hub, by huggingface_hub's own upload: files first, then one commit that has all of them or none.

Asked again while that may help, as downloads are. Large files that have arrived stay with the hub, which is asked for them before
anything is sent: an upload that was cut goes on with those that it lacks.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from json import JSONDecodeError
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers

from raytune.errors import ClusterError, ModelError
from raytune.hub.cache import is_commit
from raytune.hub.client import Hub, HubFile, MayPassError, Patience
from raytune.units import format_seconds

MOST_ANSWER = 300
"""Letters of what a hub says that are repeated."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileToSend:
    """A file of this machine, and what is in it."""

    path: Path
    size: int
    sha256: str
    git_sha1: str
    """As git names its content, and a hub that of a small file."""


class HubTarget(Hub):
    """A model on the hub that is written to, with the login of this machine.

    Args:
        name: its id, owner/name.
        revision: the branch that is written to; None: main.

    Raises:
        ModelError: if that is no such id, the network is not to be used, or nobody is logged in.
    """

    def __init__(self, name: str, revision: str | None, patience: Patience | None = None) -> None:
        super().__init__(name, revision, patience)
        if "/" not in name:
            raise self._no_id("it names no owner")
        if is_commit(revision):
            raise ModelError(f"--revision is the commit {revision}, and nothing can be added to one. Name a branch.")
        if not get_token():
            raise ModelError(
                f"Nobody is logged in to {self._endpoint} on {self._node}, and to write there takes a token with the right to "
                f"write: hf auth login, or HF_TOKEN in the environment."
            )
        self._api = HfApi(endpoint=self._endpoint)

    @property
    def named(self) -> str:
        at = f" at branch {self._revision!r}" if self._revision else ""
        return f"the model {self.base!r}{at} on {self._endpoint}"

    def is_public(self) -> bool | None:
        """Whether everybody can read the model; None: there is none.

        Raises:
            ModelError: if this machine's login may not ask.
            ClusterError: if the hub cannot be reached, or asks for too much patience.
        """

        def ask() -> bool | None:
            try:
                return not self._api.model_info(self.base).private
            except RepositoryNotFoundError as error:  # what a hub also says to whom it does not know
                if "credentials" in (error.server_message or "").lower():
                    raise
                return None

        return self._called(ask, f"asking for {self.base}")

    def create(self, *, private: bool) -> None:
        """Make the model, where there is none, and its branch.

        Raises:
            ModelError, ClusterError: as `is_public` does; also if this login may not write there.
        """
        self._called(lambda: self._api.create_repo(self.base, private=private, exist_ok=True), f"making {self.base}")
        if branch := self._revision:
            self._called(lambda: self._api.create_branch(self.base, branch=branch, exist_ok=True), f"making branch {branch!r}")

    def there(self) -> tuple[str, dict[str, HubFile]]:
        """The newest commit and its files.

        Raises:
            ModelError, ClusterError: as `is_public` does.
        """
        commit = self.commit()
        return commit, {file.name: file for file in self.files(commit)}

    def read(self, commit: str, name: str, most: int) -> bytes:
        """A file at a commit, or its first bytes.

        Raises:
            ModelError, ClusterError: as `is_public` does.
        """

        def ask() -> bytes:
            with self._stream(f"{self._endpoint}/{self.base}/resolve/{commit}/{quote(name)}", build_hf_headers()) as response:
                return next(islice(response.iter_bytes(most), 1), b"")

        return self._patient(ask, f"{name} of {self.base}")

    def send(self, files: Mapping[str, FileToSend], without: Sequence[str], message: str) -> str:
        """Make a commit that has some files, and has others no more.

        Args:
            without: names, of which those that are not there any more are no matter.

        Returns:
            The commit; the newest one, if that has all of it already.

        Raises:
            ModelError, ClusterError: as `create` does.
        """

        def commit() -> str:
            there = self.there()[1]  # the answer to an earlier try may have been lost
            removed = [CommitOperationDelete(name) for name in without if name in there]
            made = self._api.create_commit(
                self.base,
                [*map(_addition, files, files.values()), *removed],
                commit_message=message,
                revision=self._revision,
            )
            return str(made.oid)

        return self._called(commit, f"sending to {self.base}")

    def _called(self, action: Callable[[], T], what: str) -> T:
        """What huggingface_hub makes of something, again while that may help, its errors in our words."""

        def act() -> T:
            with self._in_our_words():
                answer = action()
            self._has_answered = True
            return answer

        return self._patient(act, what)

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except HfHubHTTPError as error:
            self._check(error.response)
            raise
        except PermissionError as error:  # of hf_xet
            raise ModelError(self._refusal(403, None, str(error)[:MOST_ANSWER])) from error
        except RuntimeError as error:  # one of several files, in a thread; or what hf_xet says
            cause = error.__cause__
            if isinstance(cause, HfHubHTTPError):
                self._check(cause.response)
            if isinstance(cause, httpx2.RequestError):
                raise MayPassError(f"{error} ({cause or type(cause).__name__})") from error
            raise ClusterError(
                f"Sending to {self.base} failed: {error}{f' ({cause})' if cause else ''}. The model on the hub is as it was; the "
                f"same command goes on."
            ) from error
        except JSONDecodeError as error:
            raise MayPassError("an answer that is no JSON: a login page, or no hub at all?") from error
        except ValueError as error:  # a card or an answer that huggingface_hub does not take
            raise ModelError(f"{self._endpoint} does not take what is sent to {self.base}: {str(error)[:MOST_ANSWER]}") from error

    # --- Words ---------------------------------------------------------------------------------------------------------------

    def _no_id(self, why: str) -> ModelError:
        return ModelError(
            f"{self.base[:120]!r} is no id of a model on a hub that could be written to ({why}). Give owner/name; or a URL such "
            f"as s3://bucket/folder, or a folder that is written as a path (./{self.base[:40]})."
        )

    def _offline(self) -> ModelError:
        return ModelError(f"HF_HUB_OFFLINE is set on {self._node}, so that nothing is sent to {self.named}. Unset it.")

    def _lost(self, what: str, cause: str, waited_s: float) -> ClusterError:
        waited = format_seconds(waited_s)
        if not self._has_answered:
            return ClusterError(
                f"The Hugging Face hub at {self._endpoint} cannot be reached from {self._node} ({cause}; tried for {waited}). "
                f"Check the network and HF_ENDPOINT."
            )
        return ClusterError(
            f"{what[:1].upper()}{what[1:]} does not succeed: {cause}, again and again for {waited}. The model on the hub is as "
            f"it was, and large files that have arrived there are not sent again: give the same command later."
        )

    def _refusal(self, status: int, code: str | None, said: str) -> str:
        words = f" (HTTP {status}{f': {said}' if said else ''})"
        if status == 401:
            return (
                f"{self._endpoint} refuses the token of {self._node}{words}. Set one with the right to write: HF_TOKEN, or hf "
                f"auth login."
            )
        if status == 403:
            return (
                f"The token of {self._node} may not write to {self.named}{words}. Take one with the right to write, of a member "
                f"of {self.base.partition('/')[0]!r}; or name another target (a folder is written as a path, ./{self.base})."
            )
        if code == "RevisionNotFound":
            return f"{self.named} has no such branch{words}."
        if status == 413 or "storage" in said.lower():
            return f"{self._endpoint} has no room for {self.named}{words}."
        return f"{self._endpoint} refuses to write to {self.named}{words}."


def _addition(name: str, file: FileToSend) -> CommitOperationAdd:
    addition = CommitOperationAdd(name, os.fspath(file.path))
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # which it would read the file for
    return addition
