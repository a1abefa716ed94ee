"""What only plans loads neither Ray nor, for the built-in base, torch: seconds of a command that starts nothing."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FEW = "data.train={path: demo:train, max_rows: 20}"
ANSWER = """
import json, sys
from raytune.cli.group import cli
import raytune.cli
for words in json.loads(sys.argv[1]):
    cli(words, standalone_mode=False)
    print("loaded", sorted({"torch", "ray", "peft", "transformers"} & set(sys.modules)))
"""


def test_a_plan_of_the_built_in_base_loads_neither_ray_nor_torch(tmp_path: Path) -> None:
    plans = (["plan", "configs/recipes/quickstart.yaml"], ["sweep", "configs/sweeps/quickstart.yaml", "--dry-run"])
    command = [sys.executable, "-c", ANSWER, json.dumps([[*words, f"storage={tmp_path}", FEW] for words in plans])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert [line for line in done.stdout.splitlines() if line.startswith("loaded")] == ["loaded ['transformers']"] * 2
