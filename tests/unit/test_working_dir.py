"""Claims about what a job takes along: code and what its config names; no runs, caches, secrets or links out; never too much."""

import os
import re
import socket
import zipfile
from pathlib import Path

import pytest

from raytune.clusters.package import pack
from raytune.clusters.secret_files import looks_secret
from raytune.clusters.working_dir import LARGE, contents, named_by, path_in_job, rows_named_by
from raytune.config.load import config_from
from raytune.errors import UserError

ROOT = Path(__file__).parents[2]


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def own(folder: Path, *named: str) -> list[str]:
    """What is taken along besides the package that is added."""
    return [name for name in contents(folder, named).files if not name.startswith("raytune/")]


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
            "mine/checkpoints/__init__.py": "",
            "mine/checkpoints/rules.py": "",
            "kept/checkpoint-100/model.safetensors": "w",
            "env/pyvenv.cfg": "",
            "env/lib/huge.py": "x",
            ".git/config": "",
            "code/__pycache__/a.pyc": "",
            ".pytest_cache/x.py": "",
        },
    )
    code = ["mine/checkpoints/__init__.py", "mine/checkpoints/rules.py"]
    assert own(folder, "data") == ["data/rows.jsonl", *code, "run.yaml"]
    assert contents(folder, ["data"]).runs == ("env/", "kept/checkpoint-100/", "out/a/", "runs/")


SECRETS = """
.env .env.local prod.env server.pem id_rsa id_ed25519 auth_token hf_token aws_credentials.json secrets.yaml .netrc kubeconfig
my-service-account.json TLS.KEY .envrc .pypirc .npmrc kaggle.json .git-credentials client_secret_1.json
"""


@pytest.mark.parametrize("name", SECRETS.split())
def test_a_file_that_is_called_like_a_secret_stays_here_and_is_told(tmp_path: Path, name: str):
    folder = write(tmp_path, **{"run.yaml": "", f"deep/{name}": "canary"})
    assert contents(folder, []).refused == {f"deep/{name}": "its name is that of a secret"}
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
    assert contents(folder, []).refused == {".aws/": "a folder of secrets", "innocent.txt": "a link out of the folder"}
    assert own(folder) == ["run.yaml"]


TOKEN = "gh" + "p_CANARYaaaaBBBBccccDDDD1111"
HOLDERS = {
    "other.yaml": f"a: 1\nlogin: {TOKEN}\n",
    "explore.ipynb": '{"cells": [{"source": ["login(\\"' + TOKEN + '\\")"]}]}',
    "train.log": f"12:00 starting\n12:01 using {TOKEN}\n",
    "gcp.json": '{"type": "service_' + 'account", "project_id": "CANARY"}',
    "notes": "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nCANARY\n",
    "fetch.py": f"TOKEN = '{TOKEN}'\n",
    "utf16.md": f"my token is {TOKEN}".encode("utf-16"),
    "remote.cfg": "[remote]\nurl = https://me:CANARY@" + "host/repo.git\n",
    "wandb.sh": "export WANDB_API_KEY=" + "3f9a1c7e5b2d80463f9a1c7e5b2d80463f9a1c7e\n",
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_file_with_a_secret_inside_stays_here_and_is_told_with_the_reason(tmp_path: Path, name: str):
    folder = write(tmp_path, **{"run.yaml": "name: a\n"})
    text = HOLDERS[name]
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    packed = contents(folder, [])
    assert name not in packed.files
    (note,) = [note for note in packed.notes if name in note]
    assert "holds what looks like" in note
    assert "CANARY" not in note
    assert "3f9a1c7e" not in note


def test_a_secret_far_inside_a_large_file_is_found_with_its_line(tmp_path: Path):
    folder = write(tmp_path, **{"rows.jsonl": '{"text": "row"}\n' * 500_000 + TOKEN + "\n"})
    with pytest.raises(UserError, match=r"rows.jsonl:500001 holds what looks like a GitHub token \(ghp_...\)"):
        contents(folder, ["rows.jsonl"])


def test_what_the_config_names_is_refused_and_not_left_out_where_it_holds_a_secret(tmp_path: Path):
    folder = write(tmp_path, **{"rows.jsonl": f'{{"text": "{TOKEN}"}}\n'})
    with pytest.raises(UserError, match=r"rows.jsonl:1 holds what looks like a GitHub token.*The config names it") as refused:
        contents(folder, ["rows.jsonl"], rows=["rows.jsonl"])
    assert "CANARY" not in str(refused.value)


SAMPLES = {
    "url": "Connect to postgres://user:password@localhost:5432/db",
    "url of a host": "redis://:secret@cache.example.com:6379/0",
    "key in a url": "GET /v1/data?api_key=YOUR_API_KEY",
    "aws": "aws_access_key_id = AKIA" + "IOSFODNN7EXAMPLE",
    "github": "GITHUB_TOKEN=gh" + "p_1234567890abcdefghijklmnopqrstuvwxyz",
    "hub": "login('h" + "f_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx')",
    "openai": "openai.api_key = 's" + "k-abcdefghijklmnopqrstuvwxyz123456'",
    "key": "-----BEGIN RSA " + "PRIVATE KEY-----\\n...\\n-----END RSA PRIVATE KEY-----",
    "jwt": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIn0.SflKxwRJSMeKKF2QT4",
    "bearer": "curl -H 'Authorization: Bearer mF_9.B5f-4.1JqMqq11'",
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_rows_that_show_a_sample_of_a_credential_are_sent_and_told(tmp_path: Path, kind: str):
    folder = write(tmp_path, **{"run.yaml": "", "rows.jsonl": f'{{"text": "no"}}\n{{"text": "{SAMPLES[kind]}"}}\n'})
    packed = contents(folder, ["rows.jsonl"], rows=["rows.jsonl"])
    assert "rows.jsonl" in packed.files
    (note,) = packed.notes
    assert re.match(r"rows.jsonl:2 holds what looks like .*: sent, because rows may show samples", note)
    with pytest.raises(UserError, match=r"rows.jsonl:2 holds"):
        contents(folder, ["rows.jsonl"])  # as a template or a base


@pytest.mark.parametrize(
    "secret",
    [
        TOKEN,
        "h" + "f_aB3dE5gH7jK9mN1pQ2sT4vW6yZ8cX0fR5u",
        "h" + "f_QmZrTkWvBnHsLpXcJdYgFwRtKzNbVhMqPs",
        "AKIA" + "Z7Q2M4X9K1R8T3V6",
        "-----BEGIN PRIVATE " + "KEY-----\\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj",
    ],
)
def test_rows_that_hold_an_unmistakable_credential_are_not_sent_whatever_samples_stand_before_it(tmp_path: Path, secret: str):
    rows = f'{{"text": "{SAMPLES["url"]}"}}\n{{"text": "{secret}"}}\n'
    folder = write(tmp_path, **{"run.yaml": "", "rows.jsonl": rows})
    with pytest.raises(UserError, match=r"rows.jsonl:2 holds what looks like"):
        contents(folder, ["rows.jsonl"], rows=["rows.jsonl"])


def test_the_rows_of_a_config_are_those_of_training_validation_and_questions():
    config = config_from(
        {
            "data": {"train": "a.jsonl", "validation": "b.jsonl", "template": "t.jinja"},
            "evaluation": {"generation": {"rows": "c.jsonl"}},
        }
    )
    assert rows_named_by(config) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert set(rows_named_by(config)) < set(named_by(config))


def test_code_and_what_the_config_names_are_sent_and_nothing_else(tmp_path: Path):
    folder = write(
        tmp_path / "work",
        **{
            "run.yaml": "",
            "helper.py": "",
            "package/__init__.py": "",
            "package/words.txt": "",
            "data/rows.jsonl": "{}",
            "data/other.jsonl": "{}",
            "runs/first/run.json": "{}",
            "runs/first/plan.json": "{}",
            "runs/first/model/model.safetensors": "",
            "runs/second/model/model.safetensors": "",
            "diary.txt": "",
            "explore.ipynb": "{}",
        },
    )
    packed = contents(folder, ["data/r*.jsonl", "runs/first/model", "meta-llama/Llama-3.1-8B", "auto"])
    assert [name for name in packed.files if not name.startswith("raytune/")] == [
        "data/rows.jsonl",
        "helper.py",
        "package/__init__.py",
        "package/words.txt",
        "run.yaml",
        "runs/first/model/model.safetensors",
    ]
    assert packed.unnamed == ("data/other.jsonl", "diary.txt", "explore.ipynb")
    assert "left out, neither code nor named by the config: data/other.jsonl, diary.txt, explore.ipynb" in packed.notes


def test_every_path_of_a_config_is_known_those_of_a_sweep_too():
    config = config_from(
        {
            "model": {"base": "models/own"},
            "data": {"train": ["a.jsonl", "s3://bucket/b.jsonl", "/shared/c.jsonl"], "template": "own.jinja"},
            "evaluation": {"generation": {"rows": "questions.jsonl"}},
        }
    )
    assert named_by(config) == ["a.jsonl", "questions.jsonl", "own.jinja", "models/own"]
    sweep = config_from(
        {"data": {"validation_fraction": 0.1}, "sweep": {"space": {"data.template": ["one.jinja", "two.jinja"]}, "trials": 2}}
    )
    assert {"one.jinja", "two.jinja"} <= set(named_by(sweep))


def test_a_teacher_and_what_is_replayed_are_sent_along_those_of_a_sweep_too():
    strategy = {"distillation": {"teacher": "models/teacher"}, "replay": {"data": "old.jsonl"}}
    asked = {"data": {"train": "a.jsonl", "validation_fraction": 0.1}, "strategy": strategy}
    assert {"models/teacher", "old.jsonl"} <= set(named_by(config_from(asked)))
    space = {"strategy.distillation.teacher": ["models/one", "models/two"]}
    sweep = config_from(asked | {"sweep": {"space": space, "trials": 2}})
    assert {"models/one", "models/two"} <= set(named_by(sweep))


CODE = {"strategy": {"objective": "own/losses.py:focal"}, "callbacks": ["notes.py:note", "installed.package:told"]}


def test_the_users_code_is_sent_though_an_ignore_file_or_its_size_would_leave_it_here(tmp_path: Path):
    config = config_from({"data": {"train": "/shared/rows.jsonl"}} | CODE)
    assert [name for name in named_by(config) if name != "auto"] == ["own/losses.py", "notes.py"]
    large = "# " + "x" * (2 << 20)
    folder = write(tmp_path, **{"own/losses.py": large, "notes.py": "", "other.py": large})
    assert own(folder, *named_by(config)) == ["notes.py", "own/losses.py"]
    write(folder, **{".gitignore": "own/\n"})
    with pytest.raises(UserError, match=r"own/losses\.py, which is not sent with a job: \.gitignore"):
        contents(folder, named_by(config))


def test_a_secret_in_the_users_code_is_refused_and_not_sent(tmp_path: Path):
    folder = write(tmp_path, **{"own/losses.py": "", "notes.py": f"WHERE = '{TOKEN}'\n"})
    with pytest.raises(UserError, match=r"notes.py:1 holds what looks like a GitHub token.*The config names it"):
        contents(folder, named_by(config_from({"data": {"train": "/shared/rows.jsonl"}} | CODE)))


def test_links_out_of_the_folder_and_special_files_stay_here_by_whatever_name(tmp_path: Path):
    folder = write(tmp_path / "work", **{"run.yaml": "", "real/code.py": ""})
    write(tmp_path / "outside", **{"diary.py": "canary", "deep/x.py": "canary"})
    (folder / "diary.py").symlink_to(tmp_path / "outside" / "diary.py")
    (folder / "more").symlink_to(tmp_path / "outside")
    (folder / "twice.py").symlink_to(folder / "more" / "diary.py")
    (folder / "nowhere.py").symlink_to("gone.py")
    (folder / "loop.py").symlink_to("loop.py")
    (folder / "inside").symlink_to(folder / "real")
    os.mkfifo(folder / "pipe.py")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "sock.py"))
        packed = contents(folder, [])
    assert packed.refused == {
        **dict.fromkeys(("diary.py", "more", "twice.py"), "a link out of the folder"),
        **dict.fromkeys(("nowhere.py", "loop.py"), "a link that leads nowhere"),
        **dict.fromkeys(("pipe.py", "sock.py"), "no file, but a pipe, a socket or a device"),
    }
    assert [name for name in packed.files if not name.startswith("raytune/")] == ["inside/code.py", "real/code.py", "run.yaml"]


@pytest.mark.parametrize("named", ["link.jsonl", "pipe.jsonl", "ignored.jsonl", "folder", "../outside.jsonl", ".env"])
def test_what_the_config_names_and_cannot_be_sent_is_refused_with_a_way_out(tmp_path: Path, named: str):
    folder = write(tmp_path / "work", **{".gitignore": "ignored.jsonl\n", "ignored.jsonl": "", ".env": "", "folder/a.jsonl": ""})
    write(tmp_path, **{"outside.jsonl": "canary"})
    (folder / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")
    (folder / "folder" / "b.jsonl").symlink_to(tmp_path / "outside.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(UserError, match=r"The config names .*put it where every node sees it"):
        contents(folder, [named])


def test_a_file_is_sent_by_its_name_and_not_what_this_would_match(tmp_path: Path):
    """Training reads the file of that name where there is one; a job would find another, or none."""
    folder = write(tmp_path, **{"run.yaml": "", "rows[1].jsonl": "", "rows1.jsonl": "", "more [v2]/a.jsonl": ""})
    assert own(folder, "rows[1].jsonl") == ["rows[1].jsonl", "run.yaml"]
    assert own(folder, "more [v2]") == ["more [v2]/a.jsonl", "run.yaml"]
    assert own(folder, "rows[0-9].jsonl") == ["rows1.jsonl", "run.yaml"]


def test_a_name_that_no_archive_can_hold_stays_here_and_is_told(tmp_path: Path):
    folder = write(tmp_path, **{"run.yaml": "", "caf\udce9.py": ""})  # as an old archive leaves it, in Latin-1
    assert contents(folder, []).refused == {"caf\udce9.py": "its name is no text in UTF-8"}


def test_large_files_are_spoken_of(tmp_path: Path):
    folder = write(tmp_path, **{"run.yaml": ""})
    with (folder / "rows.jsonl").open("w") as file:
        file.truncate(LARGE)
    assert "large: rows.jsonl (20 MiB) is sent to every node" in contents(folder, ["rows.jsonl"]).notes


def test_raytunes_own_files_hold_nothing_that_looks_like_a_secret():
    assert not [name for name in contents(ROOT, []).refused if name.startswith(("raytune/", "configs/", "cluster/", "launch.py"))]


def test_ignore_files_count(tmp_path: Path):
    folder = write(
        tmp_path,
        **{".gitignore": "*_log.py\nbig/\n", ".rayignore": "notes.yaml\n"},
        **{"a_log.py": "", "big/x.py": "", "notes.yaml": "", "run.yaml": ""},
    )
    assert own(folder) == [".gitignore", ".rayignore", "run.yaml"]


def test_a_circle_of_links_ends(tmp_path: Path):
    folder = write(tmp_path, **{"a/run.yaml": ""})
    (folder / "a" / "again").symlink_to(folder)
    assert own(folder) == ["a/run.yaml"]


def test_a_folder_without_the_package_gets_it_and_a_checkout_takes_its_own(tmp_path: Path):
    alone = contents(write(tmp_path, **{"run.yaml": ""}), [])
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "raytune").rglob("*.py")}
    assert {*modules, "raytune/model/demo_base/model.safetensors"} <= alone.files.keys()
    catalogue = {name.rpartition("/")[2] for name in alone.files if name.startswith("raytune/plan/hardware_files/")}
    assert catalogue == {"gpus.yaml", "instances.yaml"}
    assert alone.command == ("python", "-m", "raytune.cli")
    checkout = contents(ROOT, [])
    assert checkout.files["raytune/cli/__main__.py"] == ROOT / "raytune" / "cli" / "__main__.py"
    assert modules <= checkout.files.keys()
    assert checkout.command == ("python", "launch.py")


def test_equal_contents_make_equal_packages_whenever_they_were_written(tmp_path: Path):
    packages = []
    for index in range(2):
        folder = write(tmp_path / str(index), **{"run.yaml": "name: a\n", "b.txt": "b"})
        os.utime(folder / "run.yaml", (1e9 + index, 1e9 + index))
        pack(contents(folder, ["b.txt"]), tmp_path / f"{index}.zip")
        packages.append((tmp_path / f"{index}.zip").read_bytes())
    assert packages[0] == packages[1]


def test_a_package_holds_the_files_as_they_are(tmp_path: Path):
    folder = write(tmp_path / "work", **{"run.yaml": "name: a\n", "tool.sh": "#!/bin/sh\n"})
    (folder / "tool.sh").chmod(0o755)
    pack(contents(folder, []), tmp_path / "p.zip")
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.read("run.yaml") == b"name: a\n"
        assert archive.getinfo("tool.sh").external_attr >> 16 & 0o777 == 0o755


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(tmp_path: Path):
    folder = write(tmp_path / "work", **{"run.yaml": ""})
    (folder / "weights.bin").write_bytes(os.urandom(3_000_000))
    with pytest.raises(UserError, match=r"too large for a job.*The largest: weights.bin \(2.86 MiB\)") as refused:
        pack(contents(folder, ["weights.bin"]), tmp_path / "p.zip", limit_bytes=2_500_000)
    assert ".rayignore" in str(refused.value)


def test_a_folder_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not a folder"):
        contents(tmp_path / "nowhere", [])


def test_files_are_named_as_the_job_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert path_in_job(Path(), "configs/run.yaml") == "configs/run.yaml"
    assert path_in_job(tmp_path, str(tmp_path / "run.yaml")) == "run.yaml"
    assert path_in_job(tmp_path / "configs", "configs/run.yaml") == "run.yaml"
    with pytest.raises(UserError, match="outside"):
        path_in_job(tmp_path / "configs", "run.yaml")
