"""Claims about what a job takes along: configs and code; no runs, caches or secrets; never more than Ray takes."""

import os
import zipfile
from pathlib import Path

import pytest

from raytune.clusters.working_dir import contents, looks_secret, pack, path_in_job
from raytune.errors import UserError

ROOT = Path(__file__).parents[2]


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def own(folder: Path) -> list[str]:
    """What is taken along besides the package that is added."""
    return [name for name in contents(folder).files if not name.startswith("raytune/")]


def test_configs_and_data_are_taken_and_runs_caches_and_environments_are_not(tmp_path: Path):
    folder = write(
        tmp_path,
        **{
            "run.yaml": "name: a\n",
            "data/rows.jsonl": "{}\n",
            "out/a/run.json": "{}",
            "out/a/plan.json": "{}",
            "out/a/model/model.safetensors": "w",
            "runs/b/metrics.jsonl": "",
            "kept/checkpoint-100/model.safetensors": "w",
            "env/pyvenv.cfg": "",
            "env/lib/huge.so": "x",
            ".git/config": "",
            "code/__pycache__/a.pyc": "",
            ".pytest_cache/x": "",
        },
    )
    assert own(folder) == ["data/rows.jsonl", "run.yaml"]
    assert contents(folder).runs == ("env/", "kept/checkpoint-100/", "out/a/", "runs/")


SECRETS = """
.env .env.local prod.env server.pem id_rsa id_ed25519 auth_token hf_token aws_credentials.json secrets.yaml .netrc kubeconfig
my-service-account.json TLS.KEY
"""


@pytest.mark.parametrize("name", SECRETS.split())
def test_a_file_that_is_called_like_a_secret_stays_here_and_is_told(tmp_path: Path, name: str):
    folder = write(tmp_path, **{"run.yaml": "", f"deep/{name}": "canary"})
    assert contents(folder).secrets == (f"deep/{name}",)
    assert own(folder) == ["run.yaml"]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "run.yaml", "environment.yaml", "keys.py", "monkey.md"]
)
def test_ordinary_files_do_not_look_secret(name: str):
    assert not looks_secret(name)


def test_a_folder_of_secrets_and_a_link_to_one_stay_here(tmp_path: Path):
    folder = write(tmp_path / "work", **{"run.yaml": "", ".aws/config": "x"})
    write(tmp_path / "home", id_rsa="canary")
    (folder / "innocent.txt").symlink_to(tmp_path / "home" / "id_rsa")
    assert contents(folder).secrets == (".aws/", "innocent.txt")
    assert own(folder) == ["run.yaml"]


def test_a_secret_inside_a_config_is_refused_with_its_line(tmp_path: Path):
    folder = write(tmp_path, **{"other.yaml": "a: 1\nlogin: hf_" + "a" * 24 + "\n"})
    with pytest.raises(UserError, match=r"other.yaml:2 holds what looks like a secret") as refused:
        contents(folder)
    assert "a" * 24 not in str(refused.value)


def test_ignore_files_count(tmp_path: Path):
    folder = write(
        tmp_path,
        **{".gitignore": "*.log\nbig/\n", ".rayignore": "notes.md\n", "a.log": "", "big/x": "", "notes.md": "", "run.yaml": ""},
    )
    assert own(folder) == [".gitignore", ".rayignore", "run.yaml"]


def test_a_circle_of_links_ends(tmp_path: Path):
    folder = write(tmp_path, **{"a/run.yaml": ""})
    (folder / "a" / "again").symlink_to(folder)
    assert own(folder) == ["a/run.yaml"]


def test_a_folder_without_the_package_gets_it_and_a_checkout_takes_its_own(tmp_path: Path):
    alone = contents(write(tmp_path, **{"run.yaml": ""}))
    assert {"raytune/cli/__main__.py", "raytune/model/demo_base/model.safetensors"} <= alone.files.keys()
    catalogue = {name.rpartition("/")[2] for name in alone.files if name.startswith("raytune/plan/hardware_files/")}
    assert catalogue == {"gpus.yaml", "instances.yaml"}
    assert alone.command == ("python", "-m", "raytune.cli")
    checkout = contents(ROOT)
    assert checkout.files["raytune/cli/__main__.py"] == ROOT / "raytune" / "cli" / "__main__.py"
    assert checkout.command == ("python", "launch.py")


def test_equal_contents_make_equal_packages_whenever_they_were_written(tmp_path: Path):
    packages = []
    for index in range(2):
        folder = write(tmp_path / str(index), **{"run.yaml": "name: a\n", "b.txt": "b"})
        os.utime(folder / "run.yaml", (1e9 + index, 1e9 + index))
        pack(contents(folder), tmp_path / f"{index}.zip")
        packages.append((tmp_path / f"{index}.zip").read_bytes())
    assert packages[0] == packages[1]


def test_a_package_holds_the_files_as_they_are(tmp_path: Path):
    folder = write(tmp_path / "work", **{"run.yaml": "name: a\n", "tool.sh": "#!/bin/sh\n"})
    (folder / "tool.sh").chmod(0o755)
    size = pack(contents(folder), tmp_path / "p.zip")
    assert size == (tmp_path / "p.zip").stat().st_size
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.read("run.yaml") == b"name: a\n"
        assert archive.getinfo("tool.sh").external_attr >> 16 & 0o777 == 0o755


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(tmp_path: Path):
    folder = write(tmp_path / "work", **{"run.yaml": ""})
    (folder / "weights.bin").write_bytes(os.urandom(3_000_000))
    with pytest.raises(UserError, match=r"too large for a job.*The largest: weights.bin \(2.86 MiB\)") as refused:
        pack(contents(folder), tmp_path / "p.zip", limit_bytes=2_500_000)
    assert ".rayignore" in str(refused.value)


def test_a_folder_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not a folder"):
        contents(tmp_path / "nowhere")


def test_files_are_named_as_the_job_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert path_in_job(Path(), "configs/run.yaml") == "configs/run.yaml"
    assert path_in_job(tmp_path, str(tmp_path / "run.yaml")) == "run.yaml"
    assert path_in_job(tmp_path / "configs", "configs/run.yaml") == "run.yaml"
    with pytest.raises(UserError, match="outside"):
        path_in_job(tmp_path / "configs", "run.yaml")
