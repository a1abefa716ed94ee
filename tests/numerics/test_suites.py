"""Suites are what plain transformers, row by row, says of the files of a run, whatever batches and workers are."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from raytune.evaluation.compare import comparisons_in
from raytune.evaluation.generation import write_answers
from raytune.evaluation.likelihood import Scored, log_likelihoods
from raytune.evaluation.questions import from_json_lines
from raytune.launch.state.result import RunResult
from raytune.model.demo import demo_base_path
from raytune.plan.run_plan import SamplingPlan
from raytune.run_folder import RunFolder
from tests.numerics.processes import run_on_ranks
from tests.numerics.test_whole_run import finished, prepared_run, train_rank
from tests.tiny import tiny_model, tiny_tokenizer

VIRTUAL = {"num_virtual_tokens": 3, "task_type": TaskType.CAUSAL_LM}
MODELS = {
    "llama": lambda: tiny_model(),
    "prompt tuning": lambda: get_peft_model(tiny_model(), PromptTuningConfig(**VIRTUAL)),
    "prefix tuning": lambda: get_peft_model(tiny_model(), PrefixTuningConfig(**VIRTUAL)),
}


@torch.no_grad()
def plain_log_likelihood(model: Any, ids: Sequence[int], counted: Sequence[int]) -> float:
    """Of one text alone, by a cross-entropy per token."""
    logits = model(input_ids=torch.tensor([[*ids]])).logits[0, -len(ids) :]
    return -sum(float(cross_entropy(logits[place - 1].double(), torch.tensor(ids[place]))) for place in counted)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_log_likelihoods_of_a_batch_are_those_of_each_text_alone(kind: str) -> None:
    model = MODELS[kind]().eval()
    random = torch.Generator().manual_seed(0)
    texts = []
    for length in (2, 3, 9, 17, 40, 40):
        ids = torch.randint(0, 256, (length,), generator=random).tolist()
        texts.append(Scored(ids, range(max(1, length // 2), length)))
    texts.append(Scored([5, 6, 7], []))
    for batch_size in (1, 4, 32):
        found = log_likelihoods(model, texts, batch_size=batch_size)
        for text, value in zip(texts, found, strict=True):
            # fp32, and sums of up to 20 terms of about 5 nats.
            assert value == pytest.approx(
                plain_log_likelihood(model, text.ids, text.counted), abs=1e-5 * max(1, len(text.counted))
            )


@pytest.mark.parametrize("way", ["drawn", "beams"])
def test_answers_are_the_same_whatever_the_batch_and_whoever_has_the_other_rows(way: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(demo_base_path()).eval()
    tokenizer = tiny_tokenizer()
    prompts = [tokenizer(text * (1 + number))["input_ids"] for number, text in enumerate(["Ana ", "b", "cc dd ", "x", "Who?"])]
    options: dict[str, Any] = {"max_new_tokens": 24}
    if way == "drawn":
        options["sampling"] = SamplingPlan(temperature=1.2, top_k=50, top_p=0.95, seed=3)
    else:
        options["num_beams"] = 3
    together = write_answers(model, tokenizer, prompts, batch_size=5, **options)
    assert write_answers(model, tokenizer, prompts, batch_size=2, **options) == together
    own = [
        write_answers(model, tokenizer, [prompt], batch_size=1, rows=[row], **options)[0] for row, prompt in enumerate(prompts)
    ]
    assert own == together
    assert together != write_answers(model, tokenizer, prompts, batch_size=5, max_new_tokens=24), "greedy ones are others"
    if way == "drawn":
        assert len({*write_answers(model, tokenizer, [prompts[0]] * 4, batch_size=4, **options)}) == 4
    else:
        oracle = model.generate(torch.tensor([prompts[2]]), max_new_tokens=24, num_beams=3, do_sample=False)
        assert tokenizer.decode(oracle[0, len(prompts[2]) :], skip_special_tokens=True) == together[2].text


def suites(folder: Path) -> dict[str, Any]:
    choices = [
        {"question": f"Which is {number}?", "choices": [str(one) for one in (1, 22, 333)], "answer": number}
        for number in range(3)
    ]
    labels = [{"prompt": text, "completion": label} for text, label in [("red", "colour"), ("two", "number"), ("blue", "colour")]]
    general = [{"text": text} for text in ("Once upon a time.", "A fox.", "The end of all things.")]
    paths = {}
    for name, rows in {"choices": choices, "labels": labels, "general": general}.items():
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "generation": {"rows": "demo:test", "max_rows": 3, "max_new_tokens": 6},
        "suites": [
            {"rows": "demo:test", "name": "drawn", "max_rows": 4, "max_new_tokens": 6, "temperature": 1.0, "metrics": ["chrf"]},
            {"rows": paths["choices"], "kind": "choices", "batch_size": 2},
            {"rows": paths["labels"], "kind": "labels"},
            {"rows": paths["general"], "kind": "loss", "name": "forgetting"},
        ],
    }


def test_one_process_and_two_sharded_ranks_measure_what_plain_peft_does(tmp_path: Path) -> None:
    changes = {"evaluation": suites(tmp_path), "training": {"max_steps": 3, "global_batch_size": 2, "learning_rate": 2e-3}}
    alone = finished(tmp_path / "one", changes)
    folder, plan = prepared_run(
        tmp_path / "two", changes | {"training": changes["training"] | {"zero": {"stage": 3}}, "cluster": {"workers": 2}}
    )
    run_on_ranks(train_rank, 2, plan)
    two = RunResult.read(folder)
    assert [*alone.comparisons] == [*two.comparisons] == ["generation", "drawn", "choices", "labels", "forgetting"]
    own = RunFolder(alone.plan.storage, alone.name)
    samples = [json.loads(line) for line in Path(own.samples).read_text().splitlines()]
    for sample, other in zip(samples, map(json.loads, Path(folder.samples).read_text().splitlines()), strict=True):
        assert (sample["suite"], sample["row"], sample["base"]) == (other["suite"], other["row"], other["base"])
        for name in ("base_numbers", "tuned_numbers"):  # the tuned ones: of two trainings that differ by rounding
            assert sample.get(name, []) == pytest.approx(other.get(name, []), rel=1e-5, abs=1e-4)

    questions = from_json_lines(Path(own.questions).read_bytes())
    base = AutoModelForCausalLM.from_pretrained(alone.plan.model.path).eval()
    tuned = AutoPeftModelForCausalLM.from_pretrained(alone.model_path).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(alone.model_path)
    for question, sample in zip(questions, samples, strict=True):
        assert (question.suite, question.expected) == (sample["suite"], sample["expected"])
        for name, model in (("base", base), ("tuned", tuned)):
            ids = [*question.prompt_ids]
            if question.choices:
                alike = [
                    plain_log_likelihood(model, [*ids, *choice], range(len(ids), len(ids) + len(choice)))
                    for choice in question.choice_ids
                ]
                assert sample[f"{name}_numbers"] == pytest.approx(alike, rel=1e-6, abs=1e-5)
                assert sample[name] == question.choices[alike.index(max(alike))]
                assert [tokenizer.decode(choice) for choice in question.choice_ids] == [*question.choices]
            elif question.targets:
                assert tokenizer.decode(ids) == question.prompt
                assert question.targets == tuple(range(1, len(ids)))
                loss = -plain_log_likelihood(model, ids, question.targets)
                assert sample[f"{name}_numbers"] == pytest.approx([loss, len(ids) - 1], rel=1e-6)

    record = json.loads(Path(own.result).read_text())
    assert comparisons_in(record) == alone.comparisons
    loss = alone.comparisons["forgetting"].scores["loss"]
    numbers = [sample["base_numbers"] for sample in samples if sample["suite"] == "forgetting"]
    assert loss.base == pytest.approx(sum(one for one, _ in numbers) / sum(count for _, count in numbers), rel=1e-9)
    right = [sample["tuned"] == sample["expected"] for sample in samples if sample["suite"] == "choices"]
    assert alone.comparisons["choices"].scores["accuracy"].tuned == sum(right) / 3
