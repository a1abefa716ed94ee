"""Tasks of lm_eval as suites: values are those of `lm_eval.simple_evaluate`, which loads the saved folder in its way; what cannot
be measured so is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from raytune.config.sections.evaluation import SuiteSection
from raytune.errors import RaytuneError
from raytune.evaluation.answers import all_chunks, together
from raytune.evaluation.lm_eval_documents import read_task
from raytune.evaluation.questions import Question, from_json_lines, to_json_lines
from raytune.evaluation.suite_metrics import Given, metrics_of
from raytune.model.inference import HeldModels
from raytune.plan.choosing.suites import suite_plan
from raytune.plan.run_plan import SuitePlan
from raytune.plan.saved.asked_model import AskedModel, plain_model
from raytune.training.measuring.suites import of_model
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra lm-eval)")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's and its packages' own

KEY = "evaluation.suites.0"
ROWS = "dataset_path: json\ndataset_kwargs: {data_files: {test: tasks/rows.jsonl, train: tasks/train.jsonl}}\ntest_split: test\n"
FILES = {
    "choice.yaml": "task: choice\nfewshot_split: train\noutput_type: multiple_choice\n"
    'doc_to_text: "{{question}}\\nAnswer:"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: right\n'
    "metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]\n",
    "write.yaml": "task: write\nfewshot_split: train\nprocess_docs: !function functions.with_answer\n"
    'doc_to_text: "{{question}}"\ndoc_to_target: answer\ngeneration_kwargs: {until: ["q", "E"], max_gen_toks: 9}\n'
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    "filter_list:\n  - {name: strict, filter: [{function: take_first}]}\n"
    '  - {name: letter, filter: [{function: regex, regex_pattern: "([a-z])"}, {function: take_first}]}\n',
    "own.yaml": "include: write.yaml\ntask: own\nfilter_list: null\nprocess_results: !function functions.length\n"
    "metric_list: [{metric: length, aggregation: mean, higher_is_better: false}]\n",
    "text.yaml": "task: text\noutput_type: loglikelihood_rolling\n"
    'doc_to_text: ""\ndoc_to_target: "{{question}} {{choices[0]}}"\n'
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
    "target.yaml": 'task: target\noutput_type: loglikelihood\ndoc_to_text: "{{question}}"\ndoc_to_target: " {{choices[right]}}"\n'
    "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    "zero.yaml": "include: choice.yaml\ntask: zero\nnum_fewshot: 0\n",
    "drawn.yaml": "include: own.yaml\ntask: drawn\ngeneration_kwargs: {until: [x], do_sample: true, temperature: 1.0}\n",
    "twice.yaml": "include: own.yaml\ntask: twice\nrepeats: 2\n",
    "broken.yaml": "include: own.yaml\ntask: broken\nprocess_results: !function functions.broken\n",
    "fragile.yaml": "include: own.yaml\ntask: fragile\nprocess_results: !function functions.fragile\n",
    "function.yaml": "include: write.yaml\ntask: function\nfilter_list: null\n"
    "metric_list: [{metric: !function functions.same, aggregation: mean, higher_is_better: true}]\n",
    "silent.yaml": "include: own.yaml\ntask: silent\nmetric_list: [{metric: width, aggregation: mean, higher_is_better: true}]\n",
    "hub.yaml": "include: choice.yaml\ntask: hub\ndataset_path: nobody/nothing\ndataset_kwargs: null\n",
    "empty.yaml": "include: target.yaml\ntask: empty\ndoc_to_target: nothing\n",
    "both.yaml": "group: both\ntask: [choice, write]\n",
    "functions.py": "def with_answer(rows):\n    return rows.map(lambda row: {'answer': row['choices'][row['right']]})\n\n"
    "def length(row, results):\n    return {'length': len(results[0]) - len(row['answer'])}\n\n"
    "def broken(row, results):\n    return {'length': 1 / (len(row['answer']) - len(results[0]))}\n\n"
    "def same(references, predictions):\n    return float(references[0][0] in predictions[0])\n\n"
    "def fragile(row, results):\n    return {'length': 1 / (results[0] == row['answer'])}\n",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with tasks and their rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    for name, text in FILES.items():
        is_whole = name.endswith(".yaml") and not text.startswith(("include", "group"))
        (tmp_path / "tasks" / name).write_text((ROWS if is_whole else "") + text)
    rows = [
        {
            "question": f"What is {number} times {'many ' * (number % 4)}{number + 3}?",
            "choices": [f"{number} it is", f"{2 * number} or so", f"{'no ' * (number % 3)}none"],
            "right": number % 3,
            "nothing": "",
        }
        for number in range(13)
    ]
    for name, part in (("rows", rows[:9]), ("train", rows[9:])):
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return tmp_path


def planned(task: str, metrics: list[str], **changes: Any) -> tuple[SuiteSection, SuitePlan]:
    suite = {"kind": "lm_eval", "task": task, "task_folder": "tasks", "metrics": metrics, "batch_size": 4, **changes}
    section = SuiteSection.model_validate(suite)
    return section, suite_plan(section, KEY)


def asked(section: SuiteSection, plan: SuitePlan) -> list[Question]:
    metrics_of(plan, key=KEY)
    return read_task(section, KEY, plan, tiny_tokenizer())


def answered(one: AskedModel, plan: SuitePlan, questions: list[Question], *, workers: int = 1) -> list[Given]:
    by_suite = {plan.name: from_json_lines(to_json_lines(questions))}
    chunks = all_chunks([plan], by_suite)
    with HeldModels(torch.device("cpu")) as models:
        return together([of_model(models, one, chunks[rank::workers]) for rank in range(workers)], by_suite)[plan.name]


def plain(folder: Path) -> AskedModel:
    return AskedModel(name="tuned", model=plain_model(str(folder), "fp32"))


def of_lm_eval(section: SuiteSection, **model: Any) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path="tasks", include_defaults=False)
    own = HFLM(device="cpu", dtype="float32", batch_size=1, **model)
    return lm_eval.simple_evaluate(
        model=own,
        tasks=[section.task],
        task_manager=index,
        num_fewshot=section.num_fewshot,
        limit=section.max_rows,
        bootstrap_iters=0,
    )


TASKS = {
    "choice": (["acc", "acc_norm"], {"num_fewshot": 2}),
    "write": (["exact_match,strict", "exact_match,letter"], {"max_rows": 7}),
    "own": (["length"], {"num_fewshot": 1}),
    "function": (["same"], {}),
    "text": (["word_perplexity", "byte_perplexity", "bits_per_byte"], {}),
    "target": (["perplexity", "acc"], {}),
}


@pytest.mark.parametrize("task", TASKS)
def test_each_document_and_the_whole_are_worth_what_lm_eval_says_of_the_saved_folder(task: str, folder: Path) -> None:
    metrics, changes = TASKS[task]
    section, plan = planned(task, metrics, **changes)
    saved = save_tiny_model(folder / "model", tied=False, initializer_range=0.4)
    questions = asked(section, plan)
    given = answered(plain(saved), plan, questions)
    truth = of_lm_eval(section, pretrained=str(saved))
    assert [json.loads(one.document)["row"] for one in questions] == [
        one["doc"] for one in truth["samples"][task][: len(questions)]
    ]
    for name, metric in metrics_of(plan).items():
        of_name, _, filter_name = name.partition(",")
        printed = f"{of_name},{filter_name or 'none'}"
        found = float(metric.value(metric.counts(given, []).sum(0)))
        assert found == pytest.approx(truth["results"][task][printed], rel=1e-6)
        assert metric.lower_is_better == (not truth["higher_is_better"][task][of_name])
        documents = [one for one in truth["samples"][task] if one["filter"] == (filter_name or "none")]
        for own, one in zip(given, documents, strict=True):
            values = one[of_name] if isinstance(one[of_name], tuple) else (one[of_name], 1.0)
            assert own.values[name] == pytest.approx(values, rel=1e-6)
    responses = [one for one in truth["samples"][task] if one["filter"] == truth["samples"][task][0]["filter"]]
    for own, one in zip(given, responses, strict=True):
        if own.numbers:
            numbers = [each[0] if isinstance(each, tuple) else each for (each,) in one["resps"]]
            assert own.numbers == pytest.approx([float(number) for number in numbers], rel=1e-6)
        else:
            assert [own.text] == one["resps"][0]
    assert len({one.text for one in given}) > 1


@pytest.mark.parametrize("own", [None, ["lm_head"]], ids=["factors", "head"])
def test_an_adapter_is_worth_what_lm_eval_says_of_its_files(own: list[str] | None, folder: Path) -> None:
    section, plan = planned("choice", ["acc"])
    base = save_tiny_model(folder / "base", tied=False)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "up_proj"], modules_to_save=own)
    adapted: Any = get_peft_model(tiny_model(tied=False), config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name:
                weight.mul_(2)
    adapted.save_pretrained(str(folder / "adapter"))
    questions = asked(section, plan)
    one = plain(base)
    given = answered(one.model_copy(update={"adapter": str(folder / "adapter")}), plan, questions)
    if own is None:
        truth = of_lm_eval(section, pretrained=str(base), peft=str(folder / "adapter"))
    else:  # lm_eval fails on an adapter with a head of its own
        adapted.merge_and_unload().save_pretrained(folder / "merged")
        tiny_tokenizer().save_pretrained(folder / "merged")
        truth = of_lm_eval(section, pretrained=str(folder / "merged"))
    for own_one, document in zip(given, truth["samples"]["choice"], strict=True):
        # A merged matrix is rounded once more.
        assert own_one.numbers == pytest.approx([float(each[0]) for (each,) in document["resps"]], rel=1e-5 if own else 1e-6)
    assert [each.numbers for each in given] != [each.numbers for each in answered(one, plan, questions)]


def test_answers_of_two_workers_are_those_of_one_to_the_last_bit(folder: Path) -> None:
    section, plan = planned("choice", ["acc"])
    questions, one = asked(section, plan), plain(save_tiny_model(folder / "model"))
    assert answered(one, plan, questions, workers=2) == answered(one, plan, questions)


def test_a_function_that_fails_on_an_answer_is_told_of_its_metrics(folder: Path) -> None:
    section, plan = planned("fragile", ["length"])
    given = answered(plain(save_tiny_model(folder / "model")), plan, asked(section, plan))
    with pytest.raises(RaytuneError, match=r"Task fragile fails on rows \d.*ZeroDivisionError"):
        metrics_of(plan)["length"].counts(given, [])


@pytest.mark.parametrize(
    ("task", "metric", "changes", "said"),
    [
        ("choise", "acc", {}, "lm_eval finds no task choise .*It finds: broken, choice,"),
        ("both", "acc", {}, "both is a group of lm_eval"),
        ("choice", "exact_match", {}, "has no metric exact_match; it has acc; acc_norm; brier_score"),
        ("write", "exact_match", {}, "it has exact_match,strict; exact_match,letter"),
        ("choice", "brier_score", {}, "put together by 'brier_score', of all documents at once"),
        ("drawn", "length", {}, "draws its answers"),
        ("twice", "length", {}, "asks each row several times"),
        ("zero", "acc", {"num_fewshot": 2}, "task zero says 0 itself"),
        ("broken", "length", {}, "cannot read or ask task broken of tasks: ZeroDivisionError"),
        ("silent", "width", {}, "names the metric width, but gives"),
        ("hub", "acc", {}, "cannot read or ask task hub .*files that this machine has"),
        ("empty", "acc", {}, "row 0 has an empty text, target or choice"),
        ("choice", "acc", {"num_fewshot": 99}, "cannot read or ask task choice"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(task: str, metric: str, changes: dict[str, Any], said: str) -> None:
    section, plan = planned(task, [metric], **changes)
    with pytest.raises(RaytuneError, match=said):
        asked(section, plan)


def test_the_files_of_a_task_are_part_of_what_is_asked_and_others_beside_them_are_not(folder: Path) -> None:
    _, plan = planned("own", ["length"])
    (folder / "tasks" / "notes.txt").write_text("no part of it")
    assert planned("own", ["length"])[1] == plan
    (folder / "tasks" / "functions.py").write_text(FILES["functions.py"] + "\n# another\n")
    assert planned("own", ["length"])[1].task != plan.task
