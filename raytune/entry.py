"""Where a command begins. From its first line on a signal ends it without a traceback, and a missing package has a name."""

import signal
import sys

from raytune.errors import EXIT_REFUSED
from raytune.launch.cluster.signals import HANDED_ON, leave
from raytune.missing import is_ours, missing_package


def main() -> None:
    for number in HANDED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in a job of a shell that is in the background
            signal.signal(number, leave)
    try:
        from raytune.cli import main as answer
    except ModuleNotFoundError as error:
        if is_ours(error):
            raise
        sys.stderr.write(f"{missing_package(error)}\n")
        sys.exit(EXIT_REFUSED)
    answer()


if __name__ == "__main__":
    main()
