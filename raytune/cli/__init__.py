"""The words a user types. Heavy imports happen inside verbs, so that `check` and `explain` answer at once.

Every verb has `--debug` (tracebacks), and `--json` (one JSON value on standard output) but where Ray's own output is shown. Exit
codes: 0 done, 1 failed, 2 refused as written, 10 try again later, 130 and 143 interrupted.
"""

import logging
import sys
import warnings

from raytune.cli.chat import chat
from raytune.cli.checks import doctor, preflight
from raytune.cli.clusters import cluster
from raytune.cli.configs import check, explain, import_, schema
from raytune.cli.data import data
from raytune.cli.evaluate import evaluate
from raytune.cli.export import export, merge
from raytune.cli.find_rate import find_rate
from raytune.cli.generate import generate
from raytune.cli.group import cli, files_and_overrides
from raytune.cli.jobs import logs, status, stop, submit
from raytune.cli.push import push
from raytune.cli.reports import compare, report
from raytune.cli.runs import advise, plan, score, sweep, track, train
from raytune.cli.serve import serve
from raytune.cli.supervise import Notes, supervised
from raytune.cli.watch import top, ui

__all__ = ["cli", "files_and_overrides", "main", "quiet_libraries"]

for verb in (
    check,
    explain,
    schema,
    import_,
    data,
    plan,
    advise,
    train,
    sweep,
    find_rate,
    score,
    evaluate,
    generate,
    chat,
    serve,
    track,
    report,
    compare,
    merge,
    push,
    export,
    cluster,
    preflight,
    doctor,
    submit,
    status,
    logs,
    stop,
    top,
    ui,
):
    cli.add_command(verb)


def main() -> None:
    def answer(notes: Notes) -> None:
        quiet_libraries()
        cli(prog_name="raytune", obj=notes)

    supervised(answer, sys.argv[1:])


def quiet_libraries() -> None:
    """Keep from who types a command what libraries say to those who call them, before any of them is imported."""
    # transformers 5.23 deprecates what peft 0.21 asks of it, torch 2.13 what deepspeed 0.19 does.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch|deepspeed)\b")
    # bitsandbytes 0.50 misses a package that would make 4-bit products on CPUs faster, at every import.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
