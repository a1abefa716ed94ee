"""The card of a model: what the hub reads of it, what of the machine it keeps to itself, and that its own code runs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from raytune.cli import cli
from raytune.launch.asking.kept_answers import _files
from raytune.launch.state.finished import damage
from raytune.launch.state.record import RunRecord
from raytune.model.card import is_ours, save_merged_card
from raytune.model.files.base_content import base_content
from raytune.report.at_end import leave_page
from raytune.report.model_card import write_model_card
from raytune.report.run_seen import RunSeen
from raytune.run_folder import RunFolder
from raytune.storage import file_sizes, read_json, write_bytes, write_json
from tests.run_cases import left_run, planned, sample, score
from tests.tiny import save_tiny_model, tiny_tokenizer

TOKEN = "hf_aZ3kQ9xW2mN7pL5vB8cR1tY6uJ4hG0dF"
HOSTILE = f"</td><script>alert(1)</script> | [x](http://evil) `{TOKEN}` \x1b[31m\u202egnirts # {{{{ 7*7 }}}}"
LORA = {"method": "lora", "rank": 2, "alpha": 4}


def card_of(folder: RunFolder) -> str:
    path = write_model_card(RunSeen.read(folder.path))
    assert path is not None
    return Path(path).read_text()


def with_model(folder: RunFolder, **files: str) -> RunFolder:
    for name, text in ({"config.json": "{}"} | files).items():
        write_bytes(f"{folder.model}/{name}", text.encode())
    return folder


def adapted(tmp_path: Path, name: str = "r", **of_model: Any) -> RunFolder:
    """A run that left an adapter of plain PEFT over a tiny base in a folder."""
    base = save_tiny_model(tmp_path / "models/tiny-base")
    of_model |= {"path": str(base), "content": base_content(str(base), None)}
    plan = planned(tmp_path, name=name, adapter=LORA, model=of_model, template="x")
    folder = left_run(tmp_path, name=name, plan=plan, config={"model": {"base": str(base)}})
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder.model)
    Path(folder.model_card).unlink()  # PEFT's own
    model.generation_config.save_pretrained(folder.model)
    tiny_tokenizer().save_pretrained(folder.model)
    return folder


# --- What it says ------------------------------------------------------------------------------------------------------------


def test_a_hub_reads_base_library_data_license_and_scores(tmp_path: Path) -> None:
    plan = planned(
        tmp_path,
        adapter=LORA,
        evaluation={"suites": [{"name": "facts", "metrics": ["exact_match"], "batch_size": 8, "max_new_tokens": 64}]},
        model={"path": "owner/base", "revision": 40 * "a", "content": {"commit": 40 * "a"}},
    )
    config = {"model": {"base": "owner/base"}, "data": {"train": ["team/rows", "mine/rows.jsonl"]}, "adapter": {"method": "lora"}}
    samples = [sample(0, "yes", "no", "yes", suite="facts")]
    folder = left_run(tmp_path, plan=plan, config=config, samples=samples, comparisons={"facts": score(0.5, 0.75)})
    text = card_of(with_model(folder, **{"adapter_config.json": "{}"}))
    card: Any = ModelCard(text)
    data = card.data.to_dict()
    assert data["base_model"] == "owner/base"
    assert data["base_model_relation"] == "adapter"
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-generation")
    assert data["tags"] == ["raytune", "lora"]
    assert data["datasets"] == ["team/rows"]
    assert "license" not in data
    assert "The license of the base is not known here" in text
    (result,) = card.data.eval_results or []
    assert (result.task_type, result.dataset_name, result.metric_type) == ("text-generation", "facts", "exact_match")
    assert result.metric_value == 0.75
    for words in (
        "| facts: exact match | 50.0% | 75.0% | +25.0% | +15.0% to +35.0% | +50.0% |",
        f"owner/base of the Hugging Face hub, commit {40 * 'a'}",
        "| batch | 1 worker x 2 packed rows",
        f'BASE = "owner/base"  # its id on a hub, or its folder\nbase = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto", '
        f"revision='{40 * 'a'}')",
        "- rows.jsonl",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("files", "license_id"),
    [
        ({"README.md": "---\nlicense: llama3.1\nlanguage: en\n---\n# Base"}, "llama3.1"),
        ({"LICENSE": "                  Apache License\n            Version 2.0, January 2004"}, "apache-2.0"),
        ({"LICENSE": "All rights reserved."}, None),
        ({"README.md": "# license: mit"}, None),
    ],
)
def test_a_license_is_what_the_files_of_the_base_say(files: dict[str, str], license_id: str | None, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name, text in files.items():
        (base / name).write_text(text)
    folder = with_model(left_run(tmp_path, plan=planned(tmp_path, model={"path": str(base), "content": {"config.json": "ab"}})))
    text = card_of(folder)
    assert ModelCard(text).data.get("license") == license_id
    assert ("not known here" in text) == (license_id is None)
    (base / "README.md").unlink(missing_ok=True)
    (base / "LICENSE").unlink(missing_ok=True)
    assert card_of(folder) == text, "a base that is gone takes nothing from the card"


def test_nothing_of_the_machine_and_no_credential_is_given_away(tmp_path: Path) -> None:
    base = tmp_path / "secret place/base"
    plan = planned(
        tmp_path,
        model={"path": str(base), "content": {"config.json": "ab"}},
        notes=[f"of {base} and s3://private-bucket/x/rows.jsonl and ~/mine/y.txt", HOSTILE],
    )
    config = {
        "model": {"base": str(base)},
        "data": {"train": [f"{tmp_path}/my rows/rows.jsonl", "s3://private-bucket/x/more.jsonl", "rows/of/mine.jsonl"]},
        "cluster": {"address": "10.1.2.3:6379"},
        "tracking": {"mlflow": {"uri": "http://mlflow.internal:5000"}},
    }
    text = card_of(with_model(left_run(tmp_path, plan=plan, config=config)))
    for private in (str(tmp_path), "secret place", "my rows", "private-bucket", "~/mine", "10.1.2.3", "mlflow", TOKEN, "of/mine"):
        assert private not in text, private
    for name in ("rows.jsonl", "more.jsonl", "mine.jsonl", "y.txt"):
        assert name in text
    shown = text.split("## Limits")[1]
    assert "<script>" not in text
    assert r"\[x\](" in shown
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "{{ 7" in shown


def test_a_hostile_name_breaks_neither_front_matter_nor_page(tmp_path: Path) -> None:
    plan = planned(
        tmp_path, evaluation={"suites": [{"name": "s", "metrics": ["exact_match"], "batch_size": 8, "max_new_tokens": 64}]}
    )
    comparison = score(0.5, 0.75)
    comparison["scores"]["exact_match"]["words"] = 'a "quoted"\n---\nlicense: mit'
    text = card_of(with_model(left_run(tmp_path, plan=plan, comparisons={"s": comparison})))
    data = ModelCard(text).data
    assert data.get("license") is None
    assert data.get("pipeline_tag") == "text-generation"
    assert text.count("\n---\n") == 1


# --- Whose it is -------------------------------------------------------------------------------------------------------------


def test_a_card_is_written_again_while_nobody_has_edited_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = with_model(left_run(tmp_path))
    path = Path(folder.model_card)
    leave_page(folder)
    before, stamp = path.read_text(), path.stat().st_mtime_ns
    assert is_ours(before)
    assert json.loads(CliRunner().invoke(cli, ["report", folder.path, "--json"]).stdout)["model_card"] == str(path)
    assert path.stat().st_mtime_ns == stamp, "the same card is not written: whoever trains on this model sees no change"
    record = RunRecord.read(folder)
    assert record is not None
    write_json(folder.run, read_json(folder.run) | {"versions": {"raytune": "9.9"}})
    assert "9.9" in card_of(folder)
    edited = path.read_text().replace("# r\n", "# My model\n")
    path.write_text(edited)
    assert write_model_card(RunSeen.read(folder.path)) is None
    assert path.read_text() == edited
    assert "stays as it is" in caplog.text


def test_runs_without_a_model_get_no_card(tmp_path: Path) -> None:
    assert write_model_card(RunSeen.read(with_model(left_run(tmp_path, state="running")).path)) is None
    assert write_model_card(RunSeen.read(left_run(tmp_path / "other").path)) is None


def test_a_card_lies_on_an_object_store_too(tmp_path: Path) -> None:
    local = with_model(left_run(tmp_path))
    files = fsspec.filesystem("memory")
    files.put(local.path, "/cards/r", recursive=True)
    folder = RunFolder("memory://cards", "r")
    assert write_model_card(RunSeen.read(folder.path)) == "memory://cards/r/model/README.md"
    assert files.cat_file("/cards/r/model/README.md").decode().split("## Base")[1] == card_of(local).split("## Base")[1]
    files.rm("/cards", recursive=True)


def test_a_card_changes_neither_a_finished_run_nor_a_base(tmp_path: Path) -> None:
    folder = left_run(tmp_path)
    save_tiny_model(Path(folder.model))
    write_json(folder.result, read_json(folder.result) | {"model_files": file_sizes(folder.model)})
    content, asked = base_content(folder.model, None), _files(folder.model)
    card_of(folder)
    Path(folder.model_card).write_text("# Mine")
    assert not list(damage(folder))
    assert base_content(folder.model, None) == content
    assert _files(folder.model) == asked


# --- Its code ----------------------------------------------------------------------------------------------------------------

RUN_CODE = """
import os, sys
for place in sys.argv[1:]:
    os.chdir(place)
    exec(open("code.py").read(), {})
assert not any(name.split(".")[0] == "raytune" for name in sys.modules)
print("done")
"""


def code_in(card: str) -> str:
    match = re.search(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert match
    return match[1]


def test_the_code_of_cards_loads_adapter_merged_and_whole_model(tmp_path: Path) -> None:
    folder = adapted(tmp_path)
    adapter_card = card_of(folder)
    merged = save_tiny_model(tmp_path / "merged")
    save_merged_card(Path(folder.model), merged)
    merged_card = (merged / "README.md").read_text()
    assert is_ours(merged_card)
    data = ModelCard(merged_card).data
    assert data.get("library_name") == "transformers"
    assert "PeftModel" not in merged_card
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    rope = {"parameters": yarn, "original_positions": 512, "max_position_embeddings": 1024}
    other = adapted(tmp_path, "other", rope=rope, num_embeddings=300)
    whole = left_run(tmp_path, name="whole", plan=planned(tmp_path, name="whole", template="", num_trainable=7))
    save_tiny_model(Path(whole.model)).joinpath("chat_template.jinja").unlink()
    cards = {folder.model: adapter_card, other.model: card_of(other), str(merged): merged_card, whole.model: card_of(whole)}
    for place, card in cards.items():
        Path(place, "code.py").write_text(code_in(card))
    for place in (folder.model, other.model):
        Path(place, "tiny-base").symlink_to(tmp_path / "models/tiny-base")  # what the card calls the base
    process = subprocess.run(
        [sys.executable, "-c", RUN_CODE, *cards],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.endswith("done\n")
