"""What a job may be given beside its files: variables and packages, and nothing secret."""

import json
from pathlib import Path

import pytest

from raytune.clusters.job_environment import runtime_environment
from raytune.config.problems import ConfigError
from raytune.credentials import is_secret_name
from raytune.errors import UserError


def test_variables_come_from_a_file_and_the_command_line_wins(tmp_path: Path):
    file = tmp_path / "env.yaml"
    file.write_text("env_vars: {NCCL_DEBUG: INFO, A: 'from file'}\npip: [einops]\n")
    assert runtime_environment(["A=from here", "B=x=y", "C="], file) == {
        "env_vars": {"NCCL_DEBUG": "INFO", "A": "from here", "B": "x=y", "C": ""},
        "pip": ["einops"],
    }
    assert runtime_environment([], None) == {}
    as_json = tmp_path / "env.json"
    as_json.write_text(json.dumps({"env_vars": {"A": "1"}}))
    assert runtime_environment([], as_json) == {"env_vars": {"A": "1"}}


@pytest.mark.parametrize(
    "pair",
    [
        "HF_TOKEN=abc",
        "WANDB_API_KEY=abc",
        "AWS_SECRET_ACCESS_KEY=abc",
        "PGPASSWORD=abc",
        "DB_PASSWORD=abc",
        "hf_token=abc",
        "ANYTHING=hf_abcdefghijklmnopqrst",
        "DATABASE=postgres://me:secret@db/x",
        "AWS_SECRET_ACCESS_KEY=/aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zA1bC3dE",  # begins like a path
        "S3_KEY=aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zA1bC3dE5f",  # not called like a secret
    ],
)
def test_a_secret_is_refused_by_its_name_or_its_looks_and_not_repeated(pair: str):
    with pytest.raises(UserError, match="looks like a secret") as refused:
        runtime_environment([pair], None)
    assert pair.partition("=")[2] not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        *("TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "NUM_TOKENS", "KEYBOARD", "NCCL_SOCKET_IFNAME", "MAX_TOKEN_LENGTH_FILE"),
        *("token_count", "PAD_TOKEN_ID", "TOKEN_TYPE", "RAY_AUTH_MODE", "SECRET_NAME", "author", "primary_key", ""),
    ],
)
def test_names_that_only_sound_alike_are_taken(name: str):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "hf_token",
        "HFToken",
        "apiKey",
        "API-KEY",
        "clientSecret",
        "client-key-data",
        "AWS_ACCESS_KEY_ID",
        "npm_authToken",
        "PGPASSWORD",
    ],
)
def test_names_of_secrets_are_known_however_they_are_written(name: str):
    assert is_secret_name(name)


@pytest.mark.parametrize("pair", ["NCCL_DEBUG", "=x", "A B=1", "1A=x", "hf_abcdefghijklmnopqrst"])
def test_what_is_no_pair_is_refused_without_printing_what_may_be_a_secret(pair: str):
    with pytest.raises(UserError, match="--env takes KEY=VALUE") as refused:
        runtime_environment([pair], None)
    assert "abcdefghij" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("working_dir: .", "raytune sends the files of --working-dir itself"),
        ("py_modules: [x]", "raytune sends the files"),
        ("env_var: {A: b}", "env_var: not of the runtime environment of a job"),
        ("[1, 2]", "must map keys to values"),
        ("env_vars: {A: 1}", "env_vars"),
        ("env_vars: {HF_TOKEN: x}", "HF_TOKEN looks like a secret"),
        ("pip: ['git+https://me:password@host/x']", "pip holds what looks like a secret"),
        ("pip: 5", "no runtime environment of Ray"),
        ("pip: [a]\nconda: b", "no runtime environment of Ray"),
    ],
)
def test_a_file_that_is_none_is_refused_before_anything_is_sent(tmp_path: Path, text: str, message: str):
    file = tmp_path / "env.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        runtime_environment([], file)
    with pytest.raises(UserError, match="cannot be read"):
        runtime_environment([], tmp_path / "missing.yaml")


def test_a_file_that_is_no_yaml_is_told_with_its_place(tmp_path: Path):
    file = tmp_path / "env.yaml"
    file.write_text("env_vars: {A: b")
    with pytest.raises(ConfigError, match=r"env\.yaml:2:1 .* not valid YAML"):
        runtime_environment([], file)
