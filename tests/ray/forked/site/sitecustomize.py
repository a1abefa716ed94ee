"""Read by a script that a test starts: the cluster inside it starts its workers by the program that the test names."""

import os
import sys

if sys.orig_argv[1:] and sys.orig_argv[1].endswith(("launch.py", "example.py")):
    sys.executable = os.environ.get("PYTHON_OF_RAYLETS", sys.executable)
