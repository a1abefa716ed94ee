"""What is pushed is looked at first, arrives whole or not at all, is read back, and loads where no raytune is."""

import hashlib
import inspect
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import raytune
from raytune.errors import ClusterError, ModelError, UserError
from raytune.launch.export.push_targets import MANIFEST
from raytune.model.card import is_ours
from raytune.storage import file_sizes, read_bytes, read_json, write_json
from tests.hub_stand_in import Refusal, StandIn
from tests.run_cases import left_run
from tests.tiny import save_tiny_model, tiny_model

NAME = "me/tiny"
WEIGHTS = "model.safetensors"
IDS = [[257, 72, 101, 108, 108, 111]]


def found(model: Any) -> tuple[str, list[float]]:
    weights = hashlib.sha256(b"".join(weight.numpy().tobytes() for _, weight in sorted(model.state_dict().items()))).hexdigest()
    with torch.no_grad():
        return weights, model.eval()(torch.tensor(IDS)).logits.flatten().tolist()


LOADS = f"""
import hashlib, json, sys
from typing import Any
import fsspec, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

IDS = {IDS}

{inspect.getsource(found)}

fsspec.filesystem("s3").get("runs/pushed/", "from_s3/", recursive=True)
base = AutoModelForCausalLM.from_pretrained("{NAME}")
assert AutoTokenizer.from_pretrained("{NAME}").chat_template
models = [found(base), found(AutoModelForCausalLM.from_pretrained("from_s3"))]
models.append(found(PeftModel.from_pretrained(base, "me/adapter")))
assert not any(name.split(".")[0] == "raytune" for name in sys.modules)
print(json.dumps(models))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()  # PEFT's own
    return folder


@pytest.fixture
def logged_in(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.needed_token = "hf_right"
    return hub


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def files_of(hub: StandIn, name: str = NAME, branch: str = "main") -> dict[str, bytes]:
    found = hub.find(name, branch)
    assert found is not None
    return found[1]


# --- It arrives --------------------------------------------------------------------------------------------------------------


def test_what_was_pushed_is_the_model_byte_for_byte(logged_in: StandIn, s3: str, tiny: Path, adapter: Path) -> None:
    pushed = raytune.push(tiny, NAME)
    assert pushed.commit == logged_in.references[NAME]["main"]
    assert logged_in.private[NAME]
    in_bucket = raytune.push(tiny, f"{s3}/pushed")
    assert in_bucket.files == pushed.files
    own = {path.name: path.read_bytes() for path in tiny.iterdir()}
    assert {name: data for name, data in files_of(logged_in).items() if name in own} == own
    assert {name: read_bytes(f"{s3}/pushed/{name}") for name in file_sizes(f"{s3}/pushed") if name in own} == own
    again = raytune.push(adapter, "hub://me/adapter", base=NAME)
    there = files_of(logged_in, "me/adapter")
    assert there["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == NAME
    assert any(f"calls its base '{NAME}'" in note for note in again.notes)


@pytest.mark.slow  # often its bytes are looked at, above, and the code of cards runs without raytune, in test_model_card
def test_what_was_pushed_computes_the_same_where_no_raytune_is(
    logged_in: StandIn, s3: str, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    raytune.push(tiny, NAME)
    raytune.push(adapter, "hub://me/adapter", base=NAME)
    raytune.push(tiny, f"{s3}/pushed")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        **{"HF_ENDPOINT": logged_in.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
    }
    process = subprocess.run(
        [sys.executable, "-c", LOADS], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    base: Any = tiny_model()
    own = found(base)
    adapted = found(PeftModel.from_pretrained(base, adapter))
    assert adapted != own
    for (weights, logits), (own_weights, own_logits) in zip(
        json.loads(process.stdout.splitlines()[-1]), (own, own, adapted), strict=True
    ):
        assert weights == own_weights
        # Equal weights; but a product sums in the order that suits where in memory they lie, which is another in each process.
        assert logits == pytest.approx(own_logits, abs=1e-6)


def test_only_the_model_is_sent_and_the_rest_is_named(logged_in: StandIn, tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "model")
    for name in ("optimizer.pt", "train.log", "pytorch_model.bin", "helper.py", ".env"):
        (folder / name).write_text("mine")
    pushed = raytune.push(folder, NAME, revision="candidate", message="rank 32")
    here = {path.name for path in tiny.iterdir()}
    assert set(files_of(logged_in, branch="candidate")) == here | {MANIFEST, ".gitattributes"}
    assert set(pushed.files) == here
    assert set(files_of(logged_in)) == {".gitattributes"}
    assert logged_in.messages == ["rank 32"]
    assert any("helper.py, optimizer.pt, pytorch_model.bin and 1 others" in note for note in pushed.notes)


def test_a_second_push_sends_what_has_changed_and_takes_away_what_is_gone(logged_in: StandIn, tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "model")
    places = [NAME, str(tmp_path / "there")]
    first = [raytune.push(folder, place) for place in places]
    (folder / "generation_config.json").unlink()
    (folder / "LICENSE").write_text("mine")
    second = [raytune.push(folder, place) for place in places]
    assert [pushed.num_sent for pushed in first] == [len(first[0].files)] * 2
    assert [pushed.num_sent for pushed in second] == [1, 1]
    assert len(logged_in.received) == 1, "the weights were there"
    for there in (set(files_of(logged_in)), {path.name for path in Path(places[1]).iterdir()}):
        assert "generation_config.json" not in there
        assert "LICENSE" in there


# --- It is refused -----------------------------------------------------------------------------------------------------------


def test_who_may_not_write_is_told_why_without_the_token(hub: StandIn, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.needed_token = "hf_right"
    with pytest.raises(ModelError, match="Nobody is logged in"):
        raytune.push(tiny, NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(ModelError, match=r"refuses the token .*HTTP 401") as refused:
        raytune.push(tiny, NAME)
    assert "hf_wrongwrongwrong" not in str(refused.value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.closed = {"me"}
    with pytest.raises(ModelError, match=r"may not write .*HTTP 403"):
        raytune.push(tiny, NAME)
    assert not hub.received


def test_a_public_model_is_written_to_only_if_that_is_meant(logged_in: StandIn, tiny: Path) -> None:
    raytune.push(tiny, NAME, private=False)
    assert not logged_in.private[NAME]
    with pytest.raises(UserError, match=r"is public.*--public"):
        raytune.push(tiny, NAME)
    assert raytune.push(tiny, NAME, private=False).num_sent == 0


def nan_in_a_row(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    weights[name][5, 3] = float("nan")  # neither in the first row, nor in the middle or the last
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def bad_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content.nothing() }}")


def bad_stops(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "two"}')


def a_token(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine\n\nexport HF_TOKEN=hf_aZ3kQ9xW2mN7pL5vB8cR1tY6uJ4hG0dF\n")


DAMAGES = {
    nan_in_a_row: r"not finite .*up_proj",
    cut: "cut off",
    no_tokenizer: "no usable tokenizer",
    bad_template: "template",
    bad_stops: "eos_token_id",
    a_token: r"README.md:3 holds what looks like a Hugging Face token",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_model_is_refused_before_anything_is_asked(damage: Any, logged_in: StandIn, tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=DAMAGES[damage]) as refused:
        raytune.push(folder, NAME)
    assert "hf_aZ3k" not in str(refused.value)
    assert not logged_in.asked


def test_an_adapter_that_lacks_tensors_of_its_base_is_refused(logged_in: StandIn, adapter: Path, tmp_path: Path) -> None:
    folder = copied(adapter, tmp_path / "model")
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="missing adapter keys"):
        raytune.push(folder, NAME)
    assert not logged_in.asked


@pytest.mark.parametrize(
    ("target", "message"),
    {
        "": "no id",
        "me": "no owner",
        "me/" + 200 * "x": "no id of a model on a hub",
        "me/..": "no id of a model",
        "hub://": "no id",
        "foo://a/b": "Protocol not known",
        "s3://": "names no place",
        "s3://no-such-bucket-here/x": "bucket",
        "s3://AKIAIOSFODNN7EXAMPLX:abcdefghijklmnop@bucket/x": "holds a credential",
        "/etc/passwd/there": "is a file, not a folder",
        "./" + 300 * "x": "too long",
    }.items(),
)
def test_a_bad_target_is_refused(target: str, message: str, logged_in: StandIn, s3: str, tiny: Path) -> None:
    with pytest.raises(UserError, match=message) as refused:
        raytune.push(tiny, target)
    assert "abcdefghijklmnop" not in str(refused.value)


def test_a_target_in_or_around_the_model_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(tiny, tmp_path / "model")
    for target in (folder, folder / "inside", tmp_path):
        with pytest.raises(UserError, match="one folder"):
            raytune.push(folder, str(target), replace=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    with pytest.raises(UserError, match=r"Write \./a/b"):
        raytune.push(folder, "a/b")
    with pytest.raises(UserError, match="--revision is for a target on a hub"):
        raytune.push(folder, "./a/b", revision="x")
    with pytest.raises(UserError, match=r"--base is .* whole model"):
        raytune.push(folder, "./a/b", base="x/y")


def test_files_of_others_stay_unless_they_are_to_be_replaced(logged_in: StandIn, tiny: Path, tmp_path: Path) -> None:
    theirs = {"adapter_config.json": b"{}", "model-00001-of-00002.safetensors": b"x", "notes.txt": b"theirs", "mine.py": b"1"}
    logged_in.add(NAME, theirs)
    logged_in.private[NAME] = True
    there = tmp_path / "there"
    there.mkdir()
    for name, data in theirs.items():
        (there / name).write_bytes(data)
    for target in (NAME, str(there)):
        with pytest.raises(UserError, match=r"holds files that raytune did not push there: adapter_config\.json"):
            raytune.push(tiny, target)
    assert files_of(logged_in) == theirs == {path.name: path.read_bytes() for path in there.iterdir()}
    for target in (NAME, str(there)):
        raytune.push(tiny, target, replace=True)
    own = {path.name for path in tiny.iterdir()} | {MANIFEST, "notes.txt", "mine.py"}
    assert set(files_of(logged_in)) == {path.name for path in there.iterdir()} == own


def test_a_card_that_was_edited_there_stays(logged_in: StandIn, tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "model")
    (folder / "README.md").write_text("# From here\n")
    for target in (NAME, str(tmp_path / "there")):
        raytune.push(folder, target)
    logged_in.add(NAME, files_of(logged_in) | {"README.md": b"# Edited\n"})
    (tmp_path / "there/README.md").write_text("# Edited\n")
    for target in (NAME, str(tmp_path / "there")):
        assert any("README.md that is there was edited" in note for note in raytune.push(folder, target).notes)
    assert files_of(logged_in)["README.md"] == (tmp_path / "there/README.md").read_bytes() == b"# Edited\n"


# --- What may pass -----------------------------------------------------------------------------------------------------------


def test_a_hub_that_asks_for_patience_is_asked_again_when_it_said(
    logged_in: StandIn, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged_in.refusals = {"/api/repos/create": [Refusal(429, {"Retry-After": "1"})]}
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING):
        raytune.push(tiny, NAME)
    assert time.monotonic() - begun >= 1
    assert "too many requests (HTTP 429); trying again in 1.0s" in caplog.text


def test_an_upload_that_is_cut_goes_on_and_one_that_failed_sends_no_large_file_twice(
    logged_in: StandIn, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged_in.num_put_cuts = 1
    logged_in.refusals = {f"/api/models/{NAME}/commit/": [Refusal(403, {"X-Error-Message": "quota"})]}
    with pytest.raises(ModelError, match="quota"):
        raytune.push(tiny, NAME)
    assert set(files_of(logged_in)) == {".gitattributes"}, "all or nothing"
    assert len(logged_in.received) == 1
    raytune.push(tiny, NAME)
    assert len(logged_in.received) == 1
    assert WEIGHTS in files_of(logged_in)
    assert not logged_in.tokens_at_cdn


def test_a_push_into_a_folder_that_failed_half_way_is_no_model_until_it_is_whole(tiny: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    raytune.push(tiny, str(there))
    folder = copied(tiny, tmp_path / "model")
    tiny_model(seed=1).save_pretrained(folder)
    (folder / "LICENSE").write_text("new")
    (there / "LICENSE").mkdir()  # in the way of a file
    (there / "LICENSE/x").write_text("x")
    with pytest.raises((UserError, ClusterError)):
        raytune.push(folder, str(there))
    assert not (there / "config.json").exists(), "nobody loads a mixture"
    assert json.loads((there / MANIFEST).read_text())["state"] == "sending"
    (there / "LICENSE/x").unlink()
    (there / "LICENSE").rmdir()
    raytune.push(folder, str(there))
    assert json.loads((there / MANIFEST).read_text())["state"] == "whole"
    assert (there / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


# --- Runs --------------------------------------------------------------------------------------------------------------------


def test_a_run_is_pushed_with_its_card_if_it_has_finished_and_its_model_is_whole(
    logged_in: StandIn, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has not finished \(it is running\)"):
        raytune.push(left_run(tmp_path / "other", state="running").path, NAME)
    folder = left_run(tmp_path)
    copied(tiny, Path(folder.model))
    write_json(folder.result, read_json(folder.result) | {"model_files": file_sizes(folder.model)})
    files = fsspec.filesystem("memory")
    files.put(folder.path, "/pushed/r", recursive=True)
    raytune.push("memory://pushed/r", NAME)  # a run on an object store
    files.rm("/pushed", recursive=True)
    raytune.push(folder.path, "me/other")
    for name in (NAME, "me/other"):
        card = files_of(logged_in, name)["README.md"].decode()
        assert is_ours(card)
        assert f'MODEL = "{name}"  # this folder' in card
    assert 'MODEL = "."' in Path(folder.model_card).read_text()
    (Path(folder.model) / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(UserError, match=r"model\.safetensors has 3 bytes instead of \d+"):
        raytune.push(folder.path, "me/third")
