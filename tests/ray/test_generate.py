"""`raytune generate` on workers of a cluster: the answers of plain transformers, in the order of the rows, interrupted or not."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM

import raytune
from raytune.launch.asking.generate import Answers
from tests.ray.interrupting import interrupted_in
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

LIMIT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters, and rows of many lengths, some of them bad."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "base", tied=False)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = get_peft_model(tiny_model(tied=False), config)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(str(folder / name))
    rows: list[Any] = [{"prompt": f"Question {number}: {'x' * (37 * number % 90)}"} for number in range(12)]
    rows[3] = "torn"
    rows[5]["completion"] = "Five."
    (folder / "rows.jsonl").write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return folder


def plain_answers(folder: Path, adapter: str | None, prompts: list[Any]) -> list[str]:
    tokenizer: Any = tiny_tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = (PeftModel.from_pretrained(model, str(folder / adapter)) if adapter else model).eval()
    answers = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        written = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=LIMIT, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answers.append(tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))
    return answers


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_base_and_adapters_answer_each_row_as_alone_and_in_its_order(folder: Path, cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    found = raytune.generate(
        folder / "one",
        folder / "rows.jsonl",
        adapters={"second": folder / "two"},
        base_too=True,
        output=output,
        max_new_tokens=LIMIT,
        batch_size=3,
        address=cluster.address,
        workers=2,
    )
    rows = lines(output)
    assert rows == [row.to_json() for row in found.rows]
    numbers = [number for number in range(1, 13) if number != 4]
    assert [(row["row"], row["model"]) for row in rows] == [
        (number, name) for number in numbers for name in ("base", "one", "second")
    ]
    for place, (name, adapter) in enumerate((("base", None), ("one", "one"), ("second", "two"))):
        own = rows[place::3]
        assert [row["answer"] for row in own] == plain_answers(folder, adapter, [row["prompt"] for row in own]), name
    assert {row["row"]: row["expected"] for row in rows if "expected" in row} == {6: "Five."}
    assert all((row["finish"] == "length") == (row["tokens"] == LIMIT) for row in rows)
    assert (found.num_rows, [one.place.split(": ")[0] for one in found.refused]) == (12, [f"{folder}/rows.jsonl:4"])
    assert found.to_json()["answers"] == 33
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


@pytest.mark.slow  # often of reworded rows, which are asked the same way: test_reword
def test_what_was_answered_before_an_interruption_is_not_asked_again(folder: Path, cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    chunks = tmp_path / "answers.jsonl.unfinished" / "chunks"

    def generate() -> Answers:
        return raytune.generate(
            folder / "base",
            folder / "rows.jsonl",
            output=output,
            max_new_tokens=150,
            batch_size=1,
            temperature=1.5,
            seed=3,
            address=cluster.address,
            workers=1,
        )

    before = interrupted_in(chunks, generate)
    assert not output.exists()
    assert 0 < len(before) < 11
    marked: dict[int, str] = {}
    for path in before:
        ((row, given),) = json.loads(path.read_text()).items()
        marked[int(row)] = given["text"]
        path.write_text(json.dumps({row: given | {"text": "as it was"}}))
    found = generate()
    kept = [place for place, row in enumerate(found.rows) if row.answer == "as it was"]
    numbers = [row.row - 1 for row in found.rows]
    rows_asked = [number - (number > 3) for number in numbers]  # one row could not be read
    assert [rows_asked[place] for place in kept] == sorted(marked)
    assert not chunks.exists()
    output.unlink()
    anew = generate()
    assert {rows_asked[place]: anew.rows[place].answer for place in kept} == marked, "drawn alike, by row and seed"
    assert [row for row in found.rows if row.answer != "as it was"] == [
        row for place, row in enumerate(anew.rows) if place not in kept
    ]


def test_prompts_of_a_notebook_are_answered_under_its_event_loop(folder: Path, cluster: Cluster) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]

    asked = ["Who?", turns, {"messages": "none"}]

    async def cell() -> Answers:
        return raytune.generate(folder / "one", prompts=asked, max_new_tokens=LIMIT, address=cluster.address, workers=1)

    found = asyncio.run(cell())
    prompts = [[{"role": "user", "content": "Who?"}], turns]
    assert [list(row.prompt) for row in found.rows] == prompts
    assert [row.answer for row in found.rows] == plain_answers(folder, "one", prompts)
    assert [one.place for one in found.refused] == ["prompts:3: 'messages' is text, expected a list of turns"]
    assert found.output is None
