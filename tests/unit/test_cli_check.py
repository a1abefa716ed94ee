"""Claims about the verbs that start nothing: exit codes, streams, JSON, and how little they import."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from raytune.cli import cli, files_and_overrides

LAUNCH = Path(__file__).parents[2] / "launch.py"
HEAVY = {"torch", "ray", "transformers", "deepspeed", "datasets", "peft", "bitsandbytes", "numpy", "pyarrow", "rich"}


@pytest.fixture
def good(tmp_path: Path) -> str:
    path = tmp_path / "good.yaml"
    path.write_text("name: tiny\nmodel:\n  base: demo\ntraining:\n  seed: 7\n")
    return str(path)


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text("training:\n  learning_rat: 1e-4\n  seed: 16a\nadapter:\n  rank: 0\n")
    return str(path)


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(LAUNCH), *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_a_good_config_is_summarised_with_exit_code_0(good: str):
    done = CliRunner().invoke(cli, ["check", "--fast", good, "training.seed=8"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        'OK: run "tiny", as written here, the rest by default:',
        "  name: tiny",
        "  model:",
        "    base: demo",
        "  training:",
        "    seed: 8",
        "Changed on the command line:",
        "  training.seed: 7 -> 8",
    ]


def test_what_overrides_change_is_told_with_what_they_drop(good: str):
    assert "Changed" not in CliRunner().invoke(cli, ["check", "--fast", good]).stdout
    assert "Changed" not in CliRunner().invoke(cli, ["check", "--fast", good, "training.seed=7"]).stdout
    told = CliRunner().invoke(cli, ["check", "--fast", good, "adapter.method=full", "storage=/runs", "--json"]).stdout
    changes = {change["key"]: (change["before"], change["after"]) for change in json.loads(told)["overridden"]}
    assert (changes["storage"], changes["adapter.method"]) == (("runs", "/runs"), ("lora", "full"))
    assert changes["adapter.rank"] == (16, None)
    Path(good).write_text("data: {train: demo:train}")
    told = CliRunner().invoke(cli, ["check", "--fast", good, "data.train.max_rows=20"]).stdout
    assert told.endswith("Changed on the command line:\n  data.train.0.max_rows: nothing -> 20\n")


def test_files_that_need_their_overrides_are_checked_with_them(tmp_path: Path):
    incomplete = tmp_path / "incomplete.yaml"
    incomplete.write_text("model: {base: demo}\ntraining: {zero: {offload_optimizer: nvme}}")
    assert CliRunner().invoke(cli, ["check", str(incomplete)]).exit_code == 2
    done = CliRunner().invoke(cli, ["check", str(incomplete), "training.zero.nvme_path=/nvme"])
    assert (done.exit_code, "Changed" in done.stdout) == (0, False)


def test_a_bad_config_is_refused_on_stderr_with_exit_code_2_and_no_traceback(bad: str):
    done = launch("check", bad)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "3 problems; nothing was started. `raytune explain E101`"
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(bad: str):
    assert "Traceback" in launch("check", bad, "--debug").stderr


def test_json_answers_are_one_object_on_stdout(good: str, bad: str):
    assert json.loads(CliRunner().invoke(cli, ["check", good, "--json"]).stdout)["config"]["training"]["seed"] == 7
    refused = CliRunner().invoke(cli, ["check", bad, "--json"])
    facts = json.loads(refused.stdout)
    assert (refused.exit_code, refused.stderr, facts["ok"], facts["error"]) == (2, "", False, "ConfigError")
    assert facts["problems"][0] == {
        "id": "E101",
        "file": bad,
        "line": 2,
        "column": 3,
        "key": "training.learning_rat",
        "message": 'unknown key. Did you mean "learning_rate"?',
    }
    assert json.loads(CliRunner().invoke(cli, ["explain", "E101", "--json"]).stdout)["title"] == "unknown key"
    assert json.loads(CliRunner().invoke(cli, ["schema", "--json"]).stdout)["$schema"].endswith("draft-07/schema#")
    unknown = CliRunner().invoke(cli, ["explain", "lora_r", "--json"])
    assert (unknown.exit_code, json.loads(unknown.stdout)["error"]) == (2, "UserError")


@pytest.mark.parametrize("arguments", [["check"], ["chekc"], ["check", "--jsno", "x"], ["explain", "a", "b"]])
def test_a_mistyped_command_is_refused_with_exit_code_2(arguments: list[str]):
    assert CliRunner().invoke(cli, arguments).exit_code == 2


def test_files_and_overrides_are_told_apart():
    files = ["run.yaml", "./a=b.yaml", "runs/name=x.yaml", "/tmp/a=b.yaml", "=", "-"]
    overrides = ["a=b.yaml", "training.seed=1", "data.train.0.path=x=y", "x-y=1", "a="]
    assert files_and_overrides([*files, *overrides]) == (files, overrides)


def test_version_and_help_answer():
    assert launch("--version").stdout.startswith("raytune ")
    for verb in ([], ["check"], ["explain"], ["schema"]):
        assert "Usage: raytune" in CliRunner().invoke(cli, [*verb, "--help"], prog_name="raytune").stdout


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} {LAUNCH} schema | head -c 1", shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


@pytest.mark.parametrize("verb", [["check", "FILE"], ["explain", "training"], ["schema"]])
def test_verbs_that_start_nothing_import_nothing_heavy(verb: list[str], bad: str):
    arguments = [bad if word == "FILE" else word for word in verb]
    script = f"import sys; sys.argv[1:] = {arguments}\ntry: from raytune.cli import main; main()\nfinally: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False, cwd=LAUNCH.parent
    )
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert {"pydantic", "click"} <= loaded
    assert not HEAVY & loaded


def test_check_answers_at_once(bad: str, capsys: pytest.CaptureFixture[str]):
    spent = min(cpu_seconds([str(LAUNCH), "check", bad]) for _ in range(2))
    bare = min(cpu_seconds(["-c", "pass"]) for _ in range(2))
    with capsys.disabled():
        sys.stdout.write(f"\ncheck of a bad file: {spent - bare:.3f} s of CPU over bare Python\n")
    assert spent - bare < 2  # the goal is 0.3 s (measured: 0.19 s); machines differ, a heavy import costs 2 s anywhere


def cpu_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments], capture_output=True, timeout=60, check=False, env=os.environ | {"PYTHONPATH": ""}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
