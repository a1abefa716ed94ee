"""What only plans loads neither Ray nor, for the built-in base, torch: seconds of a command that starts nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ANSWER = """
import sys
from raytune.cli.group import cli
import raytune.cli
cli(sys.argv[1:], standalone_mode=False)
print("loaded", sorted({"torch", "ray", "peft", "transformers"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "words", [("plan", "configs/recipes/quickstart.yaml"), ("sweep", "configs/sweeps/quickstart.yaml", "--dry-run")]
)
def test_a_plan_of_the_built_in_base_loads_neither_ray_nor_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-c", ANSWER, *words, f"storage={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "loaded ['transformers']"
