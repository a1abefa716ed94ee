"""Entry point for `python launch.py ...` and `ray job submit -- python launch.py ...`."""

import sys

from raytune.errors import EXIT_REFUSED
from raytune.missing import is_ours, missing_package

try:
    from raytune.cli import main
except ModuleNotFoundError as error:
    if is_ours(error):
        raise
    sys.stderr.write(f"{missing_package(error)}\n")
    sys.exit(EXIT_REFUSED)

if __name__ == "__main__":
    main()
