"""Every command of the README, run as it is written there, in a folder of its own; and the claims that stand beside them."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from raytune.launch.state.result import RunResult
from raytune.run_folder import RunFolder
from tests.ray.forking import forking_environment, forking_python

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def commands() -> list[str]:
    """Lines of the README's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's relative paths mean what they mean in a checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "launch.py", folder)
    (folder / "raytune").symlink_to(ROOT / "raytune")
    return folder


def run(command: str, folder: Path, tmp: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the README with this test's interpreter."""
    return subprocess.run(
        [forking_python(), *command.split()[1:]],
        cwd=folder,
        env=forking_environment(os.environ | {"RAY_TMPDIR": tmp, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(folder)}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def ray_tmp() -> str:
    folder = Path("/tmp") / f"rr{os.getpid()}"
    folder.mkdir(exist_ok=True)
    return str(folder)


FEWER_TOKENS = "data.max_length=256 training.max_steps=90 evaluation.every_steps=90"
"""Three sixteenths of the tokens that the quickstart trains on, after which 99 % of the answers are exact: 98 % are after all."""


@pytest.fixture(scope="module")
def quickstart(folder: Path, ray_tmp: str, request: pytest.FixtureRequest) -> subprocess.CompletedProcess[str]:
    """As it is written with --slow alone."""
    (command,) = [line.split("&&")[-1].strip() for line in commands() if "install -e . " in line]
    assert command == ".venv/bin/python launch.py train configs/recipes/quickstart.yaml"
    return run(command if request.config.getoption("--slow") else f"{command} {FEWER_TOKENS}", folder, ray_tmp)


def test_the_quickstart_takes_held_out_exact_match_from_under_10_to_over_95_percent(
    quickstart: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert quickstart.returncode == 0, quickstart.stderr
    result = RunResult.read(RunFolder(str(folder / "runs"), "quickstart"))
    assert result.comparisons["generation"].num_rows == 200
    score = result.comparisons["generation"].scores["exact_match"]
    assert score.base < 0.10
    assert score.tuned >= 0.95
    assert score.gain_low > 0.9
    assert f"{score.tuned:.1%}" in quickstart.stdout, "the table at the end shows it"


def test_the_samples_of_the_quickstart_are_the_answers_that_were_counted(
    quickstart: subprocess.CompletedProcess[str], folder: Path
) -> None:
    result = RunResult.read(RunFolder(str(folder / "runs"), "quickstart"))
    samples = [json.loads(line) for line in (folder / "runs/quickstart/samples.jsonl").read_text().splitlines()]
    assert (
        sum(sample["tuned"] == sample["expected"] for sample in samples) / len(samples)
        == result.comparisons["generation"].scores["exact_match"].tuned
    )


OTHERS = [line for line in commands() if line.startswith(".venv/bin/python launch.py")]
SHORTER = {
    ".venv/bin/python launch.py sweep configs/sweeps/quickstart.yaml": (
        "sweep.trials=2 training.max_steps=12 training.global_batch_size=2 data.max_length=256 data.train.0.max_rows=100 "
        "data.validation.0.max_rows=8"
    ),
    ".venv/bin/python launch.py train --from-sweep runs/quickstart-sweep": "evaluation.generation=null",
}
"""Commands that take minutes as they are written, and what makes them short."""


def test_the_readme_has_commands_besides_the_first_two() -> None:
    assert len(OTHERS) >= 5
    assert set(AS_ANOTHER) <= set(OTHERS)


SCORE = ".venv/bin/python launch.py score runs/quickstart demo:test --max-rows 50"
AS_ANOTHER = (
    ".venv/bin/python launch.py check configs/recipes/quickstart.yaml training.learning_rate=1e-3 adapter.method=full",
    ".venv/bin/python launch.py plan configs/recipes/quickstart.yaml data.max_length=256",
)
"""Commands that differ from others by their overrides alone."""


def as_they_run(commands: list[str]) -> list[Any]:
    return [pytest.param(command, marks=[pytest.mark.slow] if command in AS_ANOTHER else []) for command in commands]


@pytest.mark.parametrize("command", as_they_run([line for line in OTHERS if line not in (*SHORTER, SCORE)]))
def test_the_other_commands_work(quickstart: subprocess.CompletedProcess[str], folder: Path, ray_tmp: str, command: str) -> None:
    done = run(command, folder, ray_tmp)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # tests/ray scores by workers too
def test_rows_are_scored_by_the_workers_of_a_cluster_of_their_own(
    quickstart: subprocess.CompletedProcess[str], folder: Path, ray_tmp: str
) -> None:
    assert SCORE in OTHERS
    done = run(SCORE, folder, ray_tmp)
    assert done.returncode == 0, done.stderr
    (table,) = (folder / "runs/quickstart/scores").iterdir()  # what workers leave goes again
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert [(row["file"], row["row"]) for row in rows] == [("demo:test", number) for number in range(1, 51)]
    assert all(row["targets"] > 0 and row["loss"] >= 0 for row in rows)


@pytest.mark.parametrize("is_short", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["short", "as written"])
def test_a_sweep_and_its_winner_work(folder: Path, ray_tmp: str, is_short: bool) -> None:
    assert set(SHORTER) <= set(OTHERS)
    for name in ("quickstart-sweep", "quickstart-sweep-best"):
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)
    for command, short in SHORTER.items():
        done = run(f"{command} {short if is_short else ''}", folder, ray_tmp)
        assert done.returncode == 0, done.stderr
    assert "trial" in done.stdout, "it says how it compares with its trial"


OF_AN_ADAPTER, OF_A_RUN = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_of_an_adapter_works(quickstart: subprocess.CompletedProcess[str], folder: Path, ray_tmp: str) -> None:
    claims = "assert prompt['input_ids'].shape[1] < written.shape[1]\nassert not {'raytune', 'ray'} & set(sys.modules)\n"
    (folder / "adapter.py").write_text(f"import sys\n{OF_AN_ADAPTER}{claims}")
    done = run("python adapter.py", folder, ray_tmp)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("is_short", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["short", "as written"])
def test_the_python_example_works(folder: Path, ray_tmp: str, is_short: bool) -> None:
    """Short, it writes no answers: the quickstart's own run has written them."""
    steps = 'training={"max_steps": 20}'
    assert steps in OF_A_RUN
    shorter = OF_A_RUN.replace(steps, 'training={"max_steps": 2, "warmup_steps": 0}, evaluation={"generation": None}')
    shutil.rmtree(folder / "runs" / "from-python", ignore_errors=True)
    (folder / "example.py").write_text(shorter if is_short else OF_A_RUN)
    done = run("python example.py", folder, ray_tmp)
    assert done.returncode == 0, done.stderr
    assert "from-python/model" in done.stdout


def test_ci_runs_the_readme_test_command_word_for_word() -> None:
    (command,) = [line for line in commands() if line.endswith("-m pytest")]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_readme_yamls_are_valid_configs(tmp_path: Path) -> None:
    from raytune.config.load import load_config
    from raytune.sweeps.space import check_space

    run, sweep = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my-run.yaml").write_text(run)
    (tmp_path / "sweep.yaml").write_text(sweep)
    assert load_config([tmp_path / "my-run.yaml"]).adapter.method == "qlora"
    config = load_config([tmp_path / "sweep.yaml"])
    assert config.model.base == "Qwen/Qwen3-8B"
    check_space(config)
