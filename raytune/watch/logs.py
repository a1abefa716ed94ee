"""What the workers of a run printed, read from its folder (training.output), while they do or later."""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raytune.errors import UserError
from raytune.launch.attempts.lease import Standing, Watched
from raytune.metrics.tail import Tail
from raytune.run_folder import RunFolder
from raytune.storage import absolute, exists, is_local, list_folder, read_bytes
from raytune.watch.look import LOOK_EVERY_S, REMOTE_LOOK_EVERY_S

_ATTEMPT, _RANK = re.compile(r"attempt-(\d+)"), re.compile(r"rank-(\d+)\.log")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLogs:
    """The output of one attempt."""

    folder: RunFolder
    attempt: int
    ranks: tuple[int, ...]


def run_folder_of(name: str) -> RunFolder | None:
    """The run in a folder; None if there is none."""
    folder = RunFolder(*absolute(name).rsplit("/", 1))
    return folder if exists(folder.run) or exists(folder.logs) else None


def logs_of(folder: RunFolder, attempt: int | None, rank: int | None) -> WorkerLogs:
    """The output of an attempt, by default of the newest, and of one rank or of all.

    Raises:
        UserError: if nothing was kept of it.
    """
    attempts = sorted(int(match[1]) for name in list_folder(folder.logs) if (match := _ATTEMPT.fullmatch(name)))
    if not attempts:
        raise UserError(f"{folder.logs} holds nothing: no worker of {folder.name} has printed anything yet.")
    chosen = attempts[-1] if attempt is None else attempt
    ranks = sorted(int(match[1]) for name in list_folder(f"{folder.logs}/attempt-{chosen}") if (match := _RANK.fullmatch(name)))
    if chosen not in attempts or (rank is not None and rank not in ranks):
        what = f"rank {rank} of attempt {chosen}" if chosen in attempts else f"attempt {chosen}"
        there = f"ranks {_words(ranks)}" if chosen in attempts else f"attempts {_words(attempts)}"
        raise UserError(f"{folder.logs} holds nothing of {what}; there are {there}.")
    return WorkerLogs(folder=folder, attempt=chosen, ranks=tuple(ranks) if rank is None else (rank,))


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def printed(logs: WorkerLogs) -> dict[int, str]:
    """What each rank has printed, as far as it was kept."""
    return {
        rank: _text(logs.folder.older_log(logs.attempt, rank)) + _text(logs.folder.log(logs.attempt, rank)) for rank in logs.ranks
    }


def _text(path: str) -> str:
    try:
        return read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return ""


def in_lines(texts: Mapping[int, str], tail: int | None) -> list[str]:
    """Lines as one reads them: marked with their rank where there are several.

    Args:
        tail: so many of each rank.
    """
    return [
        f"[{rank}] {line}" if len(texts) > 1 else line
        for rank, text in texts.items()
        for line in (text.splitlines() if tail is None else text.splitlines()[-tail:] if tail else [])
    ]


def print_logs(
    folder: RunFolder,
    attempt: int | None,
    rank: int | None,
    tail: int | None,
    say: Callable[[str], None],
    *,
    follow: bool = False,
    as_json: bool = False,
) -> None:
    """Print what workers have printed.

    Args:
        attempt, rank: see `logs_of`.
        tail: so many lines of each rank.
        follow: go on until nobody is at work on the run.

    Raises:
        UserError: if nothing was kept.
    """
    logs = logs_of(folder, attempt, rank)
    if as_json:
        facts = {"run": folder.name, "attempt": logs.attempt}
        texts = printed(logs)
        say(json.dumps(facts | {"ranks": {str(one): "\n".join(in_lines({one: text}, tail)) for one, text in texts.items()}}))
        return
    if not follow:
        for line in in_lines(printed(logs), tail):
            say(line)
        return
    tails, claims = {one: Tail(folder.log(logs.attempt, one)) for one in logs.ranks}, Watched(folder)
    texts = {one: _text(folder.older_log(logs.attempt, one)) for one in logs.ranks}
    while True:
        is_over = claims.look()[0] is Standing.FREE
        for one, source in tails.items():
            texts[one] += b"".join(line + b"\n" for line in source.look()).decode(errors="replace")
        for line in in_lines(texts, tail):
            say(line)
        if is_over:
            return
        texts, tail = dict.fromkeys(texts, ""), None
        time.sleep(LOOK_EVERY_S if is_local(folder.path) else REMOTE_LOOK_EVERY_S)
