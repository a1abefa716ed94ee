"""The words a user types. Heavy imports happen inside verbs, so that `check` and `explain` answer at once.

Every verb has `--debug` (tracebacks), and `--json` (one JSON value on standard output) but where Ray's own output is shown. Exit
codes: 0 done, 1 failed, 2 refused as written, 10 try again later, 130 and 143 interrupted.
"""

import sys

from raytune.cli.checks import doctor, preflight
from raytune.cli.clusters import cluster
from raytune.cli.configs import check, explain, schema
from raytune.cli.group import cli, files_and_overrides
from raytune.cli.jobs import logs, status, stop, submit
from raytune.cli.runs import merge, plan, sweep, train
from raytune.cli.supervise import Notes, supervised

__all__ = ["cli", "files_and_overrides", "main"]

for verb in (check, explain, schema, plan, train, sweep, merge, cluster, preflight, doctor, submit, status, logs, stop):
    cli.add_command(verb)


def main() -> None:
    def answer(notes: Notes) -> None:
        cli(prog_name="raytune", obj=notes)

    supervised(answer, sys.argv[1:])
