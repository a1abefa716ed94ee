"""A file of `trl sft`, imported, trains what `trl sft` trains: the loss and the gradient norm of each step, and the weights."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import trl
from safetensors.torch import load_file
from trl.scripts.sft import main, make_parser

import raytune
from raytune.config.yaml_nodes import write_yaml
from raytune.model.demo import demo_base_path
from tests.numerics.test_whole_run import finished

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "what", "it", "could", "not", "see"]
NUM_ROWS = 12
ROWS = {
    "text": lambda words: {"text": words(3, 20)},
    "pairs": lambda words: {"prompt": words(3, 6), "completion": f" {words(2, 9)}"},
    "messages": lambda words: {
        "messages": [{"role": "user", "content": words(3, 6)}, {"role": "assistant", "content": words(2, 9)}]
    },
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer takes a LOCAL_RANK, which other tests leave behind, for a distributed run."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def write_rows(kind: str, file: Path) -> None:
    chance = random.Random(0)

    def words(fewest: int, most: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(fewest, most)))

    file.write_text("".join(json.dumps(ROWS[kind](words)) + "\n" for _ in range(NUM_ROWS)))


def trained_by_trl(file: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []
    log = trl.SFTTrainer.log
    monkeypatch.setattr(trl.SFTTrainer, "log", lambda self, said, *more: (lines.append(dict(said)), log(self, said, *more))[1])
    main(*make_parser().parse_args_and_config(args=["--config", str(file)]))
    return [line for line in lines if "loss" in line]


# All rows are one step: what order they come in is each program's own. What the account of the import says is to be decided
# about pairs is decided as it says.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "decided"),
    [
        ("text", {"weight_decay": 0.1, "lr_scheduler_type": "cosine"}, {}),
        ("pairs", {"max_grad_norm": 0.5, "gradient_accumulation_steps": 3}, {"targets": "completion", "template": "plain"}),
        ("messages", {"optim": "adafactor", "lr_scheduler_type": "polynomial"}, {}),
    ],
)
def test_an_imported_file_trains_what_trl_trains(
    kind: str, settings: dict[str, Any], decided: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(kind, tmp_path / "rows.jsonl")
    written = {
        "model_name_or_path": str(demo_base_path()),
        "datasets": [{"path": "json", "data_files": str(tmp_path / "rows.jsonl")}],
        "per_device_train_batch_size": NUM_ROWS // settings.get("gradient_accumulation_steps", 1),
        "num_train_epochs": 5,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "output_dir": str(tmp_path / "theirs"),
    }
    (tmp_path / "sft.yaml").write_text(write_yaml(written | settings))
    theirs = trained_by_trl(tmp_path / "sft.yaml", monkeypatch)

    found = raytune.import_config(tmp_path / "sft.yaml", gpus=1)
    assert not found.left
    sections = {name: section for name, section in found.config.items() if isinstance(section, dict)}
    data = sections["data"] | {"validation": []} | decided
    result = finished(
        tmp_path / "ours",
        sections | {"data": data, "training": {"max_steps": None} | sections["training"], "evaluation": {"every_steps": "auto"}},
    )
    # Sums of fp32 in another order; 1e-6 of a loss is a few units in the last place.
    assert [loss for _, loss in result.history.series("train/loss")] == pytest.approx([line["loss"] for line in theirs], rel=1e-6)
    norms = [norm for _, norm in result.history.series("train/grad_norm")]
    assert norms == pytest.approx([line["grad_norm"] for line in theirs], rel=1e-5)
    ours = load_file(next((tmp_path / "ours").rglob("model/model.safetensors")))
    for name, weight in load_file(tmp_path / "theirs" / "model.safetensors").items():
        assert (ours[name] - weight).abs().max() < 2e-5, name  # of ways of up to 4e-3
