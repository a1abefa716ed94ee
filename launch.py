"""Entry point for `python launch.py ...` and `ray job submit -- python launch.py ...`."""

from raytune.entry import main

if __name__ == "__main__":
    main()
