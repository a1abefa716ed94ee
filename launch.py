"""Entry point for `python launch.py ...` and `ray job submit -- python launch.py ...`."""

from raytune.cli import main

if __name__ == "__main__":
    main()
