"""A saved model stops where its answers end: plain transformers and PEFT, in a process without raytune, find that in its files.

The base's own eos is another token than the one that ends a turn of its chat template, and one that the model never writes.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raytune.config.load import config_from
from raytune.evaluation.generation import write_answers
from raytune.evaluation.questions import to_json_lines
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.state.record import write_plan
from raytune.launch.state.result import RunResult
from raytune.model.demo import TURN_END, TURN_END_ID, demo_base_path
from raytune.model.merging.merge import merge_adapter
from raytune.run_folder import RunFolder
from raytune.storage import write_bytes
from raytune.training.run import Worker, train
from tests.tiny import tiny_model, tiny_tokenizer

EOS = "<|endoftext|>"
QUESTION, ANSWER = "Which colour?", "green"
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
ASK = """
import json, sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
question, asked = sys.argv[1], json.loads(sys.argv[2])
answers = []
for folder, how in asked:
    loader = AutoModelForCausalLM if how == "transformers" else AutoPeftModelForCausalLM
    model, tokenizer = loader.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    arguments = {"generation_config": GenerationConfig.from_pretrained(folder)} if how == "peft, given its settings" else {}
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False, **arguments)[0, prompt["input_ids"].shape[1]:]
    answers.append(tokenizer.decode(written))
print(json.dumps(answers))
assert "raytune" not in sys.modules
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo base, with an eos that ends texts and no turns, and settings of generation that contradict each other."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": EOS})
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(demo_base_path())
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    settings = {"eos_token_id": tokenizer.eos_token_id, "do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def finished(base: Path, storage: Path, adapter: dict[str, Any], **data: Any) -> RunResult:
    storage.mkdir()
    rows = storage / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
    rows.write_text(json.dumps(row) + "\n")
    template = storage / "template.jinja"
    template.write_text(TEMPLATE)
    config = config_from(
        {
            "name": "run",
            "storage": str(storage),
            "model": {"base": str(base)},
            "data": {"train": {"path": str(rows)}, "max_length": 128, "template": str(template)} | data,
            "adapter": adapter,
            "training": {"max_steps": 25, "global_batch_size": 1, "learning_rate": 1e-2},
            "evaluation": {"generation": {"rows": {"path": str(rows)}, "max_new_tokens": 12}},
            "cluster": {"workers": 1, "cpus_per_worker": 1},
        }
    )
    prepared = prepare(config, this_machine(config.cluster), map)
    folder = RunFolder(prepared.plan.storage, prepared.plan.name)
    write_plan(folder, prepared.plan)
    write_bytes(folder.questions, to_json_lines(prepared.questions))
    train(prepared.plan, Worker(rank=0, world_size=1, device_index=0, attempt=1, report=lambda metrics: None))
    return RunResult.read(folder)


@dataclass(frozen=True, kw_only=True)
class Left:
    """What two runs left behind, and what a plain user's greedy `generate` writes with each folder, stop included."""

    full: RunResult
    adapted: RunResult
    folders: dict[str, Path]
    answers: dict[str, str]


@pytest.fixture(scope="module")
def left(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    root = tmp_path_factory.mktemp("left")
    full = finished(base, root / "full", {"method": "full"})
    adapted = finished(base, root / "adapted", {"method": "lora", "rank": 8})
    folders = {"full": Path(full.model_path), "adapter": Path(adapted.model_path)}
    # As raytune left them before, and as other tools leave adapters.
    for name in ("full", "adapter"):
        folders[f"{name} without settings"] = Path(shutil.copytree(folders[name], root / f"{name} without settings"))
    shutil.copy(base / "generation_config.json", folders["full without settings"])
    (folders["adapter without settings"] / "generation_config.json").unlink()
    for name in ("adapter", "adapter without settings"):
        folders[f"merged {name}"] = root / f"merged {name}"
        merge_adapter(folders[name], folders[f"merged {name}"])
    asked = [
        *(
            (name, "transformers")
            for name in ("full", "full without settings", "merged adapter", "merged adapter without settings")
        ),
        ("adapter", "peft, given its settings"),
        ("adapter", "peft"),
    ]
    command = [sys.executable, "-c", ASK, QUESTION, json.dumps([(str(folders[name]), how) for name, how in asked])]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env={"PATH": ""}).stdout
    answers = {f"{name} by {how}": answer for (name, how), answer in zip(asked, json.loads(said), strict=True)}
    return Left(full=full, adapted=adapted, folders=folders, answers=answers)


def test_a_whole_model_stops_and_is_scored_as_its_files_answer(left: Left) -> None:
    assert left.answers["full by transformers"] == ANSWER + TURN_END
    assert left.full.comparisons["generation"].scores["exact_match"].tuned == 1.0
    # Without the stop in its files, nobody who loads it would get that score.
    assert len(left.answers["full without settings by transformers"]) > len(ANSWER + TURN_END)


def test_an_adapter_brings_where_it_stops_which_peft_has_to_be_given(left: Left) -> None:
    assert left.answers["adapter by peft, given its settings"] == ANSWER + TURN_END
    # PEFT reads no settings beside an adapter. When it does, README need not say how to give them.
    assert len(left.answers["adapter by peft"]) > len(ANSWER + TURN_END)
    assert left.adapted.comparisons["generation"].scores["exact_match"].tuned == 1.0


@pytest.mark.parametrize("adapter", ["adapter", "adapter without settings"])
def test_a_merged_model_stops(adapter: str, left: Left) -> None:
    assert left.answers[f"merged {adapter} by transformers"] == ANSWER + TURN_END


@pytest.mark.parametrize("name", ["full", "adapter", "merged adapter"])
def test_every_way_out_carries_the_template_that_was_trained(name: str, left: Left) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(left.folders[name])
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == EOS  # what ends a text of the base still does
    settings = GenerationConfig.from_pretrained(left.folders[name])
    assert settings.eos_token_id == [TURN_END_ID, tokenizer.eos_token_id]
    assert settings.temperature == 0.6  # as the base has it


def test_an_answer_ends_before_its_stop_though_that_is_no_special_token() -> None:
    """Greedy answers of a random model, stopped at whatever token it writes third."""
    model, tokenizer = tiny_model(tied=False), tiny_tokenizer()
    prompt = list(b"a question")
    model.generation_config.eos_token_id = None
    (free,) = write_answers(model, tokenizer, [prompt], max_new_tokens=8, batch_size=1)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=256)[0, len(prompt) :].tolist()
    model.generation_config.eos_token_id = stop = next(token for token in ids[2:] if token not in ids[:2])
    (stopped,) = write_answers(model, tokenizer, [prompt], max_new_tokens=8, batch_size=1)
    assert stopped.text == tokenizer.decode(ids[: ids.index(stop)], skip_special_tokens=True)
    assert (stopped.num_tokens, stopped.has_ended) == (ids.index(stop), True)
    assert (free.num_tokens, free.has_ended) == (8, False)
