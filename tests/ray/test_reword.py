"""`raytune data reword` on workers of a cluster: the words of `raytune generate`, interrupted or not, and a run on them."""

import json
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

import raytune
from raytune.launch.asking.reword import Rewording
from tests.ray.interrupting import interrupted_in
from tests.tiny import save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

ASK = "In other words: {content}"
DRAWING: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "seed": 3, "batch_size": 4, "workers": 1}
NUM_ROWS, VERSIONS = 24, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a model of random weights that ends most of its answers soon: at any letter of half the alphabet."""
    folder = tmp_path_factory.mktemp("reworded")
    model = save_tiny_model(folder / "model", tied=False)
    settings = json.loads((model / "generation_config.json").read_text())
    stops = [settings["eos_token_id"]] if isinstance(settings["eos_token_id"], int) else settings["eos_token_id"]
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [*stops, *range(ord("a"), ord("n"))]}))
    rows = [{"prompt": f"Question {number}", "completion": str(number)} for number in range(NUM_ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder: Path, cluster: Cluster, *more: str) -> dict[str, Any]:
    return {
        "name": "small",
        "storage": str(folder / "runs"),
        "model": {"base": str(folder / "model")},
        "data": {"train": [str(folder / "rows.jsonl"), *more], "validation_fraction": 0.25, "max_length": 128, "packing": "none"},
        "adapter": {"method": "lora", "rank": 2},
        "training": {"max_steps": 2, "global_batch_size": 2},
        "cluster": {"workers": 1, "address": cluster.address, "threads_per_worker": 1},
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_words_are_those_of_generate_and_what_was_answered_is_not_asked_again(
    folder: Path, cluster: Cluster, tmp_path: Path
) -> None:
    output = tmp_path / "reworded.jsonl"

    def reword() -> Rewording:
        return raytune.data_reword(
            config(folder, cluster), model=folder / "model", ask=ASK, output=output, per_row=VERSIONS, **DRAWING
        )

    done = interrupted_in(tmp_path / "reworded.jsonl.unfinished" / "chunks", reword)
    assert not output.exists()
    found = reword()
    assert [path.name for path in tmp_path.iterdir()] == ["reworded.jsonl"]
    assert found.not_asked["held_out"] == NUM_ROWS - found.num_asked > 0
    assert found.num_versions == VERSIONS * found.num_asked == found.num_kept + sum(found.dropped.values())

    kept = lines(output)
    origins = [json.loads(row["raytune_origin"]) for row in kept]
    prompts = list(dict.fromkeys(row["prompt"] for row in lines(folder / "rows.jsonl")))
    held_out = raytune.data_preview(config(folder, cluster), rows=NUM_ROWS)
    trained = [prompts[int(document.origin.rpartition(":")[2]) - 1] for document in held_out.documents]
    asked = [ASK.replace("{content}", prompt) for prompt in trained for _ in range(VERSIONS)]
    plain = raytune.generate(folder / "model", prompts=asked, address=cluster.address, **DRAWING)
    by_version = {(trained[place // VERSIONS], place % VERSIONS + 1): row for place, row in enumerate(plain.rows)}
    for row, origin in zip(kept, origins, strict=True):
        answer = by_version[origin["prompt"], row["raytune_made_by"]["version"]]
        assert (row["messages"][0]["content"], answer.finish) == (answer.answer.strip(), "stop")
        assert row["messages"][1] == {"role": "assistant", "content": origin["completion"]}
        assert row["raytune_made_by"]["model"] == str(folder / "model")
    assert found.dropped["cut"] == sum(row.finish == "length" for row in plain.rows) > 0
    assert found.num_kept > found.num_asked / 2
    written_now = found.num_tokens / sum(row.tokens for row in plain.rows)
    num_chunks = -(-len(asked) // DRAWING["batch_size"])
    assert 0 < written_now < 1 - 0.3 * len(done) / num_chunks, "chunks that were there are asked no second time"


@pytest.mark.slow
def test_a_run_is_trained_on_rows_and_what_was_made_of_them(folder: Path, cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "reworded.jsonl"
    made = raytune.data_reword(
        config(folder, cluster, "demo:train"), model=folder / "model", ask=ASK, output=output, limit=10, **DRAWING
    )
    assert made.num_asked == 10
    result = raytune.train(config(folder, cluster, str(output)), progress=False)
    assert result.data_report is not None
    rows, reworded = result.data_report.train.sources
    assert (reworded.name, reworded.format, reworded.made, reworded.used) == (
        "reworded",
        "messages",
        made.num_kept,
        made.num_kept,
    )
    assert reworded.origin_held_out == 0 < rows.other_side
    assert "rows made of others by a model" in str(result.data_report)
