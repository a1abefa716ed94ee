"""Claims about forgotten keys: the built-in toy is trained where it is asked for by name, and never else."""

from pathlib import Path

import pytest
from click.testing import CliRunner

import raytune
from raytune.api.asked import resolved_config
from raytune.cli import cli
from raytune.config.checks.asked import NEITHER, named_values
from raytune.config.load import ConfigError, config_from, dump_yaml, load_config

FORGOTTEN = {
    "": ["model.base", "data.train"],
    "# nothing\n": ["model.base", "data.train"],
    "model:\ndata:\n": ["model.base", "data.train"],
    "training: {seed: 1}": ["model.base", "data.train"],
    "model: {base: org/model}": ["data.train"],
    "model: {base: org/model}\ndata: {max_length: 64}": ["data.train"],
    "data: {train: org/rows}": ["model.base"],
    "data: {train: [demo:train, org/rows]}": ["model.base"],
    "model: {attention: sdpa}\ndata: {train: org/rows}": ["model.base"],
    "sweep: {space: {training.seed: [1, 2]}}\ndata: {validation_fraction: 0.1}": ["model.base", "data.train"],
    "sweep: {space: {model.base: [demo, org/model]}}\ndata: {validation_fraction: 0.1}": ["data.train"],
}
SETTINGS_ALONE = ["training: {seed: 1}", "sweep: {space: {training.seed: [1, 2]}}\ndata: {validation_fraction: 0.1}"]
ASKED = [
    "model: {base: demo}",
    "data: {train: demo:train}",
    "data: {train: {path: demo:train, max_rows: 10}}",
    "model: {base: demo}\ndata: {train: org/rows}",
    "model: {base: org/model}\ndata: {train: demo:train}",
    "sweep: {space: {model.base: [demo, org/model]}}\ndata: {train: org/rows, validation_fraction: 0.1}",
]


def forgotten(text: str, folder: Path, verb: str, *more: str) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(text)
    done = CliRunner().invoke(cli, [verb, str(path), *more])
    assert done.exit_code == 2, done.output
    assert done.stderr.splitlines()[-1].endswith("nothing was started. `raytune explain E103`")
    assert all(line.startswith(str(path)) for line in done.stderr.splitlines()[:-1]), done.stderr
    return [line.split()[1] for line in done.stderr.splitlines()[:-1]]


@pytest.mark.parametrize("text", FORGOTTEN)
def test_a_run_that_names_no_model_or_no_rows_is_refused_by_every_verb(text: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    is_alone = text in SETTINGS_ALONE
    verbs = [("sweep",), ("submit", "--verb", "sweep")] if "sweep" in text else [("train",), ("submit",)]
    verbs += [] if is_alone else [("check",), ("check", "--fast")]
    verbs += [] if is_alone or "sweep" in text else [("plan",)]
    for verb, *more in verbs:
        assert forgotten(text, tmp_path, verb, *more) == FORGOTTEN[text]
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("text", FORGOTTEN)
def test_the_python_interface_refuses_them_too(text: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    for config in (path, load_config([path]), load_config([path]).model_dump(exclude_unset=True)):
        with pytest.raises(ConfigError) as caught:
            raytune.sweep(config) if "sweep" in text else raytune.train(config)
        assert [problem.key for problem in caught.value.problems] == FORGOTTEN[text]
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("text", ASKED)
def test_the_toy_may_be_asked_for_by_name(text: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    load_config([path], check_files=True)
    assert resolved_config(path, {})[0] == load_config([path])


@pytest.mark.parametrize("text", SETTINGS_ALONE)
def test_a_check_of_settings_alone_says_that_they_are_no_run(text: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(text)
    done = CliRunner().invoke(cli, ["check", str(tmp_path / "run.yaml")])
    assert (done.exit_code, done.stderr.strip()) == (0, NEITHER)
    assert "Looked at" not in done.stdout


def test_a_plan_of_settings_alone_says_that_it_is_the_toys(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("training: {max_steps: 2}\ndata: {max_length: 256}")
    done = CliRunner().invoke(cli, ["plan", "run.yaml", "--json"])
    assert (done.exit_code, done.stderr.splitlines()[0][:44]) == (0, NEITHER[:44])


def test_an_override_and_a_keyword_name_it_as_a_file_does(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {seed: 1}")
    load_config([path], ["model.base=demo"], check_files=True)
    assert resolved_config(path, {"model": {"base": "demo"}})[0].model.base == "demo"


def test_a_plan_that_is_told_how_much_data_there_is_needs_no_rows(tmp_path: Path):
    assert forgotten("cluster: {instance: p5.48xlarge}", tmp_path, "plan", "--tokens", "1M") == ["model.base"]
    (tmp_path / "run.yaml").write_text("cluster: {instance: p5.48xlarge}\nmodel: {base: Qwen/Qwen3-8B}")
    assert CliRunner().invoke(cli, ["plan", str(tmp_path / "run.yaml"), "--tokens", "1M"]).exit_code == 0


@pytest.mark.parametrize("text", ASKED)
def test_what_is_written_out_still_names_them(text: str, tmp_path: Path):
    """best.yaml and a job's config are such texts."""
    path, again = tmp_path / "run.yaml", tmp_path / "again.yaml"
    path.write_text(text)
    config = load_config([path])
    again.write_text(dump_yaml(config))
    assert load_config([again], check_files=True) == config
    assert named_values(load_config([again])) == named_values(config)


def test_the_defaults_of_a_config_alone_stay_as_they_are():
    assert dump_yaml(config_from({})) == ""
