"""`python -m raytune.cli`, for jobs without a launch.py."""

from raytune.cli import main

if __name__ == "__main__":
    main()
