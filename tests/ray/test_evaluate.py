"""`raytune evaluate` on workers of a cluster: the numbers of a run's end again, whoever dies and whatever was there before."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from ray.cluster_utils import Cluster
from transformers import AutoTokenizer

from raytune import data_rank, evaluate, train
from raytune.evaluation.side_by_side import Evaluation
from raytune.launch.state.result import RunResult

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def run(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Finished, on two workers, with suites of three kinds."""
    folder = tmp_path_factory.mktemp("runs")
    choices = [{"question": f"Which is {number}?", "choices": ["1", "22", "333"], "answer": number % 3} for number in range(5)]
    for name, rows in {"choices": choices, "text": [{"text": "A fox."}, {"text": "Once upon a time."}, {"text": "b"}]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suites = [
        {"name": "answers", "rows": "demo:test", "max_rows": 5, "max_new_tokens": 8, "metrics": ["chrf"], "batch_size": 2},
        {"name": "choices", "kind": "choices", "rows": str(folder / "choices.jsonl"), "batch_size": 2},
        {"name": "general", "kind": "loss", "rows": str(folder / "text.jsonl"), "batch_size": 2},
    ]
    config: dict[str, Any] = {
        "name": "small",
        "storage": str(folder),
        "data": {"train": {"path": "demo:train", "max_rows": 40}, "max_length": 256},
        "adapter": {"method": "lora", "rank": 4},
        "training": {"max_steps": 4, "global_batch_size": 2, "learning_rate": 2e-3},
        "cluster": {"workers": 2, "address": cluster.address, "threads_per_worker": 1},
        "evaluation": {"suites": suites},
    }
    return train(config, progress=False)


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def assert_is_that_of(run: RunResult, found: Evaluation) -> None:
    """To the last bit: values, intervals, answers and log-likelihoods."""
    assert [(pair.before, pair.after) for pair in found.pairs] == [("base", "small")]
    assert found.pairs[0].comparisons == run.comparisons
    assert [*run.comparisons] == ["answers", "choices", "general"]
    samples, own = lines(f"{found.output}/samples.jsonl"), lines(f"{run.folder}/samples.jsonl")
    for sample, wanted in zip(samples, own, strict=True):
        assert [sample[key] for key in ("suite", "row", "prompt", "expected")] == [
            wanted[key] for key in ("suite", "row", "prompt", "expected")
        ]
        assert sample["answers"] == {"base": wanted["base"], "small": wanted["tuned"]}
        assert sample.get("numbers", {}).get("base") == wanted.get("base_numbers")
        assert sample.get("numbers", {}).get("small") == wanted.get("tuned_numbers")


def test_a_run_on_its_own_suites_gives_what_it_wrote_itself_and_goes_on_from_what_is_there(
    run: RunResult, tmp_path: Path
) -> None:
    output = tmp_path / "again"
    assert_is_that_of(run, evaluate(run.folder, output=output))
    chunks = sorted((output / "chunks").iterdir())
    before = {chunk: (chunk.stat().st_mtime_ns, chunk.read_bytes()) for chunk in chunks}
    for lost in chunks[::3]:
        lost.unlink()
    (output / "result.json").unlink()
    assert_is_that_of(run, evaluate(run.folder, output=output, workers=1))
    assert sorted((output / "chunks").iterdir()) == chunks
    for number, chunk in enumerate(chunks):
        assert chunk.read_bytes() == before[chunk][1]
        assert (chunk.stat().st_mtime_ns == before[chunk][0]) == (number % 3 != 0), "what was there is answered no second time"


def answerers() -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if "ray::Answerer" in " ".join(one.info["cmdline"] or [])]


def test_what_a_dead_worker_was_at_is_done_by_another(run: RunResult, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output, killed = tmp_path / "killed", []
    ended = {process.pid for process in answerers()}  # of the test before, as long as they take to go

    def kill_one() -> None:
        while not killed:
            for process in answerers():
                if process.pid not in ended:
                    process.kill()
                    killed.append(process.pid)
                    return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    found = evaluate(run.folder, output=output, workers=1)
    killer.join(timeout=60)
    assert killed
    assert "A worker that answers rows died" in caplog.text
    assert_is_that_of(run, found)


def test_an_adapter_in_its_folder_and_a_suite_of_a_file_are_measured_as_in_the_run(
    run: RunResult, cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "suites.yaml").write_text(
        "suites:\n  - {name: answers, rows: 'demo:test', max_rows: 5, max_new_tokens: 8, metrics: [chrf], batch_size: 2}\n"
    )
    common: dict[str, Any] = {"suite": tmp_path / "suites.yaml", "address": cluster.address, "workers": 1}
    found = evaluate("demo", adapters={"one": run.model_path, "two": run.model_path}, output=tmp_path / "out", **common)
    wanted = run.comparisons["answers"]
    assert [(pair.before, pair.after) for pair in found.pairs] == [("base", "one"), ("base", "two")]
    for pair in found.pairs:
        assert pair.comparisons["answers"].scores["chrf"].tuned == wanted.scores["chrf"].tuned
    assert json.loads((tmp_path / "out/result.json").read_text()) == found.to_json()


@pytest.mark.slow
def test_rows_are_ranked_by_what_the_model_holds_of_its_own_answers(run: RunResult, tmp_path: Path) -> None:
    """As plain transformers and PEFT count it."""
    rows = [{"prompt": f"Where does {name} live?"} for name in ("Ada", "Bo", "Cy", "a person whom nobody knows", "42")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "first.jsonl"
    ranking = data_rank(run.folder, tmp_path / "rows.jsonl", output=output, top=3, max_new_tokens=6)
    tokenizer: Any = AutoTokenizer.from_pretrained(run.model_path)
    model: Any = AutoPeftModelForCausalLM.from_pretrained(run.model_path).eval()
    wanted = []
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        written = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        answer = tokenizer.decode(written, skip_special_tokens=True)
        whole = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": answer}], return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0, :-1].log_softmax(-1)
        losses = -logits.gather(1, whole[0, 1:, None])[:, 0]
        end = int((whole[0] == tokenizer.eos_token_id).nonzero()[-1])
        wanted.append((losses[ids.shape[1] - 1 : end].mean().item(), answer))
    order = sorted(range(len(rows)), key=lambda number: -wanted[number][0])
    assert [(row.asked.row - 1, row.asked.answer) for row in ranking.rows] == [
        (number, wanted[number][1]) for number in order[:3]
    ]
    assert [row.uncertainty for row in ranking.rows] == pytest.approx([wanted[number][0] for number in order[:3]], rel=1e-4)
    assert [line["row"] for line in lines(str(output))] == [number + 1 for number in order[:3]]
    assert not [path for path in Path(f"{run.folder}/scores").glob("*") if "ranked" in path.name]
