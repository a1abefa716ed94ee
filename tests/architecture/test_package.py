"""What a wheel carries, what CI runs, and what the types say."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel that is built from here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return set(archive.namelist())


def test_a_wheel_has_every_file_of_the_package_its_catalogue_its_templates_and_the_licence(wheel: set[str]) -> None:
    ignored = {"__pycache__"}
    own = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "raytune").rglob("*")
        if path.is_file() and not ignored.intersection(path.parts)
    }
    hardware = {f"raytune/plan/hardware_files/{path.name}" for path in (ROOT / "configs" / "hardware").iterdir()}
    cluster = ROOT / "cluster"
    rendered = {f"raytune/clusters/templates/{path.relative_to(cluster)}" for path in cluster.rglob("*") if path.is_file()}
    assert {"raytune/docs/faults.md", "raytune/config/run.schema.json"} <= own
    assert not (own | hardware | rendered) - wheel
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in wheel)


def test_a_wheel_has_nothing_else(wheel: set[str]) -> None:
    strange = {name for name in wheel if not name.startswith(("raytune/", "raytune-")) or name.endswith((".pyc", ".log"))}
    assert not strange


def test_the_licence_is_the_one_that_the_project_states() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "LICENSE").read_text()
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "9. Accepting Warranty or Additional Liability." in text  # to its end


def test_pyright_has_nothing_to_say() -> None:
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", str(ROOT)]
    # What it reads lives on: with more room for what is young, Node collects less, an eighth of its time.
    environment = os.environ | {"NODE_OPTIONS": "--max-semi-space-size=128"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit_with_their_release_beside_it(workflow: Path) -> None:
    used = re.findall(r"uses: (.*)", workflow.read_text())
    assert used
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", one) for one in used), used


def test_ci_runs_every_folder_of_tests_and_the_slow_ones_at_night() -> None:
    texts = {path.stem: path.read_text() for path in WORKFLOWS}
    assert all(isinstance(yaml.safe_load(text)["jobs"], dict) for text in texts.values())
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").glob("*/test_*.py")} - {Path("tests/gpu")}
    assert len(folders) >= 6
    assert not [str(folder) for folder in folders if str(folder) not in texts["tests"]]
    assert "pytest --slow" in texts["nightly"]


def test_hooks_take_the_range_of_ruff_that_the_project_takes() -> None:
    tests = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    ruff = next(line for line in tests if line.startswith("ruff"))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["additional_dependencies"] for hook in hooks] == [[ruff], [ruff]]
