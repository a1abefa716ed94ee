"""Suites: what may be asked, what becomes of rows, and what is counted."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from raytune.clusters.working_dir import named_by
from raytune.config.load import ConfigError, config_from, load_config
from raytune.config.sections.evaluation import METRICS_OF, SuiteKind, SuiteSection, suites_of
from raytune.data.conversations.conversation import Origin, RowError
from raytune.data.rows.choices import choice_row
from raytune.data.templates.template import ChatTemplate
from raytune.data.templates.text import resolve_template
from raytune.errors import UserError
from raytune.evaluation import lm_eval_tasks, suite_metrics
from raytune.evaluation.answers import chosen
from raytune.evaluation.compare import Comparison, Sample, Score, compare, comparisons_in
from raytune.evaluation.questions import Question, from_json_lines, read_questions, to_json_lines
from raytune.evaluation.sampling import DrawnTokens
from raytune.evaluation.suite_metrics import METRICS, Given, metrics_of, of_user
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.state.diagnosis import Evidence, diagnose
from raytune.metrics.history import History
from raytune.plan.choosing.suites import MOST_TASK_BYTES, suite_in_words, suite_plan
from raytune.plan.run_plan import EvaluationPlan, SamplingPlan, SuitePlan, TaskPlan
from raytune.report.chosen_samples import choose_samples
from raytune.user_code import UserCode
from tests.tiny import tiny_plan, tiny_tokenizer

MC = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}


def written(file: Path, rows: Sequence[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def config(*suites: dict[str, Any], **evaluation: Any) -> dict[str, Any]:
    return {"evaluation": {"suites": list(suites), **evaluation}}


def asked(suite: dict[str, Any], downloads: Path) -> list[Question]:
    section = SuiteSection.model_validate(suite)
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer, resolve_template("auto", tokenizer))
    metrics = metrics_of(suite_plan(section, "evaluation.suites.0"))
    return read_questions(section, "evaluation.suites.0", template, tokenizer, metrics, downloads)


# --- What may be asked -------------------------------------------------------------------------------------------------------


def test_generation_is_short_for_a_suite_of_that_name_and_others_are_named_after_their_file() -> None:
    found = suites_of(config_from(config({"rows": "data/gsm8k.jsonl"}, generation={"rows": "a.jsonl"})).evaluation)
    assert {key: suite.title for key, suite in found.items()} == {
        "evaluation.generation": "generation",
        "evaluation.suites.0": "gsm8k",
    }
    assert found["evaluation.generation"].named_metrics == ("exact_match",)


@pytest.mark.parametrize(
    ("evaluation", "line", "said"),
    [
        ("suites: [{rows: a.jsonl}, {rows: b/a.jsonl}]", 2, "two suites are called 'a'"),
        ("suites:\n  - {rows: []}", 3, "evaluation.suites.0.rows"),
        ("suites:\n  - {rows: a.jsonl, kind: loss, metrics: [exact_match]}", 3, "a suite of kind loss has no metric exact_match"),
        ("suites:\n  - {rows: a.jsonl, kind: choices, metrics: ['my.py:f']}", 3, "a suite of kind choices has no metric my.py:f"),
        ("suites:\n  - {rows: a.jsonl, metrics: [bertscore]}", 3, "bertscore compares texts by a model"),
        ("suites:\n  - rows: a.jsonl\n    kind: loss\n    num_beams: 4", 5, "only suites of kind answers read it"),
        ("suites:\n  - rows: a.jsonl\n    top_p: 0.9", 4, "nothing is drawn without a temperature"),
        ("suites:\n  - rows: a.jsonl\n    num_beams: 2\n    temperature: 0.9", 5, "draws nothing"),
        ("suites:\n  - rows: a.jsonl\n    num_examples: 2", 4, "the suite has no examples"),
        ("suites:\n  - rows: a.jsonl\n    name: a/b", 4, "letters, digits"),
        ("suites:\n  - kind: labels", 3, "evaluation.suites.0 a suite has rows that are asked"),
        ("suites:\n  - {rows: a.jsonl, metrics: [exact_mtch]}", 3, 'no metric exact_mtch. Did you mean "exact_match"?'),
        ("suites:\n  - {kind: lm_eval, task: t}", 3, "a suite of kind lm_eval names task_folder, metrics too"),
        ("suites:\n  - kind: loss\n    rows: a.jsonl\n    task: t", 5, "only suites of kind lm_eval read it"),
        (
            "suites:\n  - {kind: lm_eval, task: t, task_folder: f, metrics: [acc],\n     rows: a.jsonl}",
            3,
            "has rows of its own",
        ),
        ("suites:\n  - {kind: lm_eval, task: t, task_folder: f, metrics: [acc],\n     system: s}", 4, "kind answers or choices"),
        (
            "suites:\n  - {kind: lm_eval, task: t, task_folder: f, metrics: [acc],\n     examples: e}",
            3,
            "shows no examples",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_its_line(evaluation: str, line: int, said: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("evaluation:\n" + "".join(f"  {text}\n" for text in evaluation.splitlines()))
    with pytest.raises(ConfigError) as raised:
        load_config([file])
    (problem,) = raised.value.problems
    assert problem.place.line == line
    assert said in f"{problem.key} {problem.message}"


def test_every_kind_has_the_metrics_that_a_config_may_name() -> None:
    assert METRICS.keys() == METRICS_OF.keys() == {*get_args(SuiteKind)}
    for kind, names in METRICS_OF.items():
        assert {*METRICS[kind]} == {*names} - {"bertscore"}


def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_metrics, "find_spec", lambda name: None)
    plan = suite_plan(SuiteSection.model_validate({"rows": ["a"], "metrics": ["exact_match", "bleu"]}), "evaluation.suites.0")
    with pytest.raises(UserError, match=r"bleu needs the package sacrebleu.*\[metrics\]"):
        metrics_of(plan)


def test_a_task_of_lm_eval_is_planned_with_the_text_of_its_files_and_needs_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = {"kind": "lm_eval", "task": "t", "task_folder": str(tmp_path / "tasks"), "metrics": ["acc"]}
    section = SuiteSection.model_validate(suite)
    with pytest.raises(UserError, match="There is no folder"):
        suite_plan(section, "evaluation.suites.0")
    (tmp_path / "tasks" / "more" / ".git").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no file of a task \(\*\.yaml\)"):
        suite_plan(section, "evaluation.suites.0")
    for name in ("t.yaml", "more/functions.py", "rows.jsonl", "more/.git/hook.py"):
        (tmp_path / "tasks" / name).write_text(f"# {name}")
    plan = suite_plan(section, "evaluation.suites.0")
    assert plan.task
    assert plan.task.files == {"t.yaml": "# t.yaml", "more/functions.py": "# more/functions.py"}
    assert suite_in_words(plan) == "t: task t of lm_eval; acc"
    (tmp_path / "tasks" / "t.yaml").write_text("# another")
    assert suite_plan(section, "evaluation.suites.0") != plan
    monkeypatch.setattr(lm_eval_tasks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"evaluation\.suites\.0.*need the package lm_eval.*\[lm-eval\]"):
        metrics_of(plan, key="evaluation.suites.0")
    (tmp_path / "tasks" / "t.yaml").write_text("#" * (MOST_TASK_BYTES + 1))
    with pytest.raises(UserError, match="which go to every worker"):
        suite_plan(section, "evaluation.suites.0")


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_rows_of_a_task_are_told_apart_by_its_own_metric_the_way_it_is_better(lower_is_better: bool) -> None:
    suite = SuitePlan(name="t", kind="lm_eval", metrics=("m",), task=TaskPlan(name="t", files={}), batch_size=1, max_new_tokens=1)
    score = Score(words="m", base=2, tuned=2, gain_low=0, gain_high=0, lower_is_better=lower_is_better, is_share=False)
    rows = [
        Sample(suite="t", row=row, prompt="", expected="", base="b", tuned="t", base_values={"m": 2.0}, tuned_values={"m": value})
        for row, value in enumerate([1.0, 3.0])
    ]
    judged_by, groups = choose_samples([json.loads(json.dumps(row.to_json())) for row in rows], suite, {"m": score})
    assert judged_by == "m"
    shown = {group.heading: [(one.row, one.base_value, one.tuned_value) for one in group.samples] for group in groups}
    less, more = [(0, "2", "1")], [(1, "2", "3")]
    assert shown["Gained most"] == (less if lower_is_better else more)
    assert shown["Became worse"] == (more if lower_is_better else less)


def test_the_folder_of_a_task_is_taken_along_with_a_job() -> None:
    suite = {"kind": "lm_eval", "task": "t", "task_folder": "tasks", "metrics": ["acc"]}
    assert "tasks" in named_by(config_from(config(suite)))


def test_a_plan_with_generation_of_an_earlier_raytune_has_a_suite_of_that_name() -> None:
    fields = {"every_steps": 3, "at_saves": False, "at_start": True, "max_rows": None}
    generation = {"max_new_tokens": 9, "batch_size": 4, "metrics": ["exact_match"]}
    (suite,) = EvaluationPlan.model_validate(fields | {"generation": generation}).suites
    assert (suite.name, suite.kind, suite.max_new_tokens, suite.metrics) == ("generation", "answers", 9, ("exact_match",))
    assert EvaluationPlan.model_validate(fields | {"generation": None}).suites == ()


# --- Rows --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["3", "4"], 1, 1),
        (["3", "4"], "B", 1),
        (["3", "4"], "4", 1),
        (["B", "A"], "A", 1),  # the text of a choice is meant before its letter
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", 1),
    ],
)
def test_the_right_choice_is_a_place_a_text_or_a_letter(choices: Any, answer: Any, right: int) -> None:
    assert choice_row({"question": "q", "choices": choices, "answer": answer}, {}, Origin("f", 1)).right == right


@pytest.mark.parametrize(
    "change",
    [
        {"choices": None},
        {"choices": ["4"]},
        {"choices": ["4", "4 "]},
        {"choices": ["4", ""]},
        {"choices": "34"},
        {"answer": 2},
        {"answer": True},
        {"answer": "C"},
        {"answer": -1},
        {"question": " "},
    ],
)
def test_a_row_that_is_no_choice_is_told_with_file_and_line(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RowError):
        choice_row(MC | change, {}, Origin("f", 1))
    file = written(tmp_path / "mc.jsonl", [MC, MC | change])
    with pytest.raises(UserError, match=rf"(?s)1 row of evaluation.suites.0.rows cannot be asked.*{file}:2"):
        asked({"rows": [{"path": file}], "kind": "choices"}, tmp_path)


def test_choices_follow_the_prompt_without_the_end_of_their_turn(tmp_path: Path) -> None:
    (question,) = asked({"rows": [{"path": written(tmp_path / "mc.jsonl", [MC])}], "kind": "choices"}, tmp_path)
    assert question.prompt.endswith("2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert [tiny_tokenizer().decode([*ids]) for ids in question.choice_ids] == ["3", "4"]
    assert question.expected == "4"
    assert from_json_lines(to_json_lines([question])) == [question]


def test_labels_are_the_answers_that_rows_expect(tmp_path: Path) -> None:
    rows = [{"prompt": f"row {number}", "completion": label} for number, label in enumerate(["no", "yes", "no"])]
    found = asked({"rows": [{"path": written(tmp_path / "l.jsonl", rows)}], "kind": "labels"}, tmp_path)
    assert [(one.expected, one.choices) for one in found] == [(row["completion"], ("no", "yes")) for row in rows]
    with pytest.raises(UserError, match="expect 1 different answers"):
        asked({"rows": [{"path": written(tmp_path / "l.jsonl", rows[:1])}], "kind": "labels"}, tmp_path)


def test_a_row_is_asked_behind_the_system_message_and_examples_but_not_behind_itself(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", [{"prompt": f"q{number}", "completion": f"a{number}"} for number in range(3)])
    suite = {"rows": [{"path": file}], "examples": [{"path": file}], "num_examples": 2, "system": "Be brief."}
    first, second, third = (question.prompt for question in asked(suite, tmp_path))
    turns = [
        [text for text in ("Be brief.", "q0", "a0", "q1", "a1", "q2", "a2") if text in one] for one in (first, second, third)
    ]
    assert turns[0] == ["Be brief.", "q0", "q1", "a1", "q2", "a2"]
    assert first.index("a2") < first.index("q0") < first.index("assistant\n", first.index("q0"))
    assert turns[1] == ["Be brief.", "q0", "a0", "q1", "q2", "a2"]
    assert turns[2] == ["Be brief.", "q0", "a0", "q1", "a1", "q2"]
    with pytest.raises(UserError, match=r"of 3 examples .* there are 2 besides the row itself"):
        asked(suite | {"num_examples": 3}, tmp_path)


def test_a_metric_of_the_user_s_that_fails_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def closeness(answer, expected):\n    return 1 / (len(answer) - len(expected))\n")
    run = {
        "model": {"base": "demo"},
        "storage": str(tmp_path / "runs"),
        "data": {"train": {"path": "demo:train", "max_rows": 4}},
        "cluster": {"workers": 1},
    } | config({"rows": {"path": "demo:test"}, "max_rows": 2, "metrics": [f"{code}:closeness"]})
    resolved = config_from(run)
    with pytest.raises(UserError, match=r"(?s)evaluation.suites.0.metrics: .*mine.py:2, in closeness: ZeroDivisionError"):
        prepare(resolved, this_machine(resolved.cluster), map)
    code.write_text("def closeness(answer, expected):\n    return -1.5\ncloseness.lower_is_better = True\n")
    plan = prepare(resolved, this_machine(resolved.cluster), map).plan
    (metric,) = metrics_of(plan.evaluation.suites[0]).values()
    code.unlink()  # the plan carries it
    score = compare([Given(text="a")], [Given(text="b")], ["a"], {"closeness": metric}).scores["closeness"]
    assert (score.base, score.words, score.lower_is_better, score.is_share) == (-1.5, "closeness", True, False)


def test_a_metric_of_the_users_that_fails_for_an_answer_is_told_and_nothing_else_is_lost() -> None:
    code = UserCode(module="mine.py", name="digits", text="def digits(answer, expected):\n    return int(answer)\n")
    metrics = {"digits": of_user(code, "evaluation.suites.metrics"), "exact_match": METRICS["answers"]["exact_match"]}
    found = compare([Given(text="one")], [Given(text="1")], ["1"], metrics)
    assert (found.scores["exact_match"].tuned, list(found.scores)) == (1.0, ["exact_match"])
    assert (
        "mine.py:digits fails for the answer 'one' where '1' is expected. mine.py:2, in digits: ValueError"
        in found.failed["digits"]
    )
    assert Comparison.from_json(json.loads(json.dumps(found.to_json()))) == found
    evidence = Evidence.of(tiny_plan(), History(()), [], (), failed_metrics=list(found.failed.values()))
    assert [(symptom.name, symptom.key) for symptom in diagnose(evidence)] == [("failed_metric", "evaluation.suites")]


# --- Numbers -----------------------------------------------------------------------------------------------------------------


def test_a_comparison_has_all_its_metrics_and_survives_a_file() -> None:
    answers = [("no", "yes"), ("yes", "yes"), ("no", "no"), ("", "yes ")]
    base, tuned = ([Given(text=texts[side]) for texts in answers] for side in (0, 1))
    metrics = {name: METRICS["answers"][name] for name in ("exact_match", "token_f1", "rougeL")}
    found = compare(base, tuned, ["yes"] * 4, metrics)
    assert [*found.scores] == ["exact_match", "token_f1", "rougeL"]
    score = found.scores["exact_match"]
    assert (score.base, score.tuned, score.gain, found.num_rows) == (0.25, 0.75, 0.5, 4)
    assert (score.improvement, score.relative_improvement) == (0.5, 2.0)
    assert score.gain_low <= score.gain <= score.gain_high
    assert not math.isnan(score.gain_low)
    assert Comparison.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert compare(base, tuned, ["yes"] * 4, metrics) == found, "the same rows are drawn each time"


def test_the_result_of_an_earlier_raytune_has_a_comparison_called_generation() -> None:
    score = {"words": "exact match", "base": 0.0, "tuned": 0.5, "gain_low": 0.1, "gain_high": 0.9}
    (found,) = comparisons_in({"comparison": {"num_rows": 2, "scores": {"exact_match": score}}}).items()
    assert (found[0], found[1].scores["exact_match"].gain) == ("generation", 0.5)
    assert not found[1].scores["exact_match"].lower_is_better
    assert comparisons_in({"comparison": None}) == comparisons_in({"comparisons": {}}) == {}


def test_forgetting_is_a_loss_over_all_targets_that_is_better_when_lower() -> None:
    base = [Given(text="", numbers=(2.0, 1.0)), Given(text="", numbers=(3.0, 9.0))]
    tuned = [Given(text="", numbers=(4.0, 1.0)), Given(text="", numbers=(6.0, 9.0))]
    scores = compare(base, tuned, ["", ""], METRICS["loss"]).scores
    assert (scores["loss"].base, scores["loss"].tuned) == (0.5, 1.0)
    assert (scores["loss"].improvement, scores["loss"].relative_improvement) == (-0.5, -1.0)
    assert scores["perplexity"].tuned == pytest.approx(math.e)
    # Of the draws of two rows, a quarter has the first one twice, a quarter the second one: both ends of the interval.
    assert (scores["loss"].gain_low, scores["loss"].gain_high) == pytest.approx((3 / 9, 2.0))
    diverged = [Given(text="", numbers=(math.inf, 1.0)), Given(text="", numbers=(6.0, 9.0))]
    record = json.dumps(compare(base, diverged, ["", ""], {"loss": METRICS["loss"]["loss"]}).to_json())
    json.loads(record, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_likeliest_choice_is_that_of_the_sum_or_per_character() -> None:
    question = Question(suite="s", prompt="", prompt_ids=(), expected="no", choices=("no", "certainly not"))
    given = chosen(question, [-4.0, -6.5])
    assert (given.text, given.per_character) == ("no", "certainly not")  # -2 and -0.5 per character
    metrics = METRICS["choices"]
    values = {name: compare([given], [given], ["no"], {name: metric}).scores[name].base for name, metric in metrics.items()}
    assert values == {"accuracy": 1.0, "accuracy_per_character": 0.0}


def test_tokens_are_drawn_as_often_as_they_are_likely_and_by_row_alone() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -30.0]]).repeat(20_000, 1)
    rows = range(20_000)
    for sampling, kept in [
        (SamplingPlan(temperature=1.5, top_k=None, top_p=None, seed=1), 5),
        (SamplingPlan(temperature=0.7, top_k=3, top_p=None, seed=1), 3),
        (SamplingPlan(temperature=1.0, top_k=None, top_p=0.9, seed=1), 2 + 1),  # 0.64, 0.88, 0.97
    ]:
        draw = DrawnTokens(sampling, rows, 2, torch.device("cpu"))
        first, second = (draw(torch.zeros(20_000, 1), logits).argmax(-1) for _ in range(2))
        likely = (logits[0, :kept] / sampling.temperature).softmax(-1)
        frequent = torch.bincount(first, minlength=5)[:kept] / 20_000
        # Three standard deviations of a share of 20,000 draws are at most 1.1 %.
        assert torch.allclose(frequent, likely, atol=0.011)
        assert (first == second).float().mean() == pytest.approx(float((likely**2).sum()), abs=0.011), "draws are independent"
    alone = DrawnTokens(sampling, [7], 2, torch.device("cpu"))
    assert alone(torch.zeros(1, 1), logits[:1]).argmax(-1) == first[7]
    other = DrawnTokens(sampling.model_copy(update={"seed": 2}), rows, 2, torch.device("cpu"))
    assert not torch.equal(other(torch.zeros(20_000, 1), logits).argmax(-1), first)


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-40, 5e-324])
def test_however_cold_the_likeliest_token_is_drawn(temperature: float) -> None:
    logits = torch.tensor([[40.0, -90.0, 41.0, 3.0]])
    draw = DrawnTokens(SamplingPlan(temperature=temperature, top_k=3, top_p=0.9, seed=1), [0], 1, torch.device("cpu"))
    assert draw(torch.zeros(1, 1), logits).argmax(-1) == 2


def test_samples_hold_what_was_counted() -> None:
    sample = Sample(suite="s", row=3, prompt="p", expected="e", base="b", tuned="t", base_numbers=(-math.inf, 1.0))
    assert sample.to_json()["base_numbers"] == ["-Infinity", 1.0]
    assert "tuned_numbers" not in sample.to_json()
    assert (sample.to_json()["suite"], sample.to_json()["row"]) == ("s", 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of bert-score and transformers
def test_bert_score_is_that_of_its_package(tmp_path: Path) -> None:
    import bert_score
    from transformers import (
        BertConfig,
        BertModel,
        BertTokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
    )

    torch.manual_seed(0)
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat", "the"])
    )
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    small = BertConfig(vocab_size=10, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(small).save_pretrained(tmp_path)
    suite = {"rows": ["a"], "metrics": ["bertscore"], "bertscore": {"model": str(tmp_path), "layer": 2}}
    plan = suite_plan(SuiteSection.model_validate(suite), "evaluation.suites.0")
    (metric,) = metrics_of(plan).values()
    answers, expected = ["the cat sat", "a dog", ""], ["the dog sat", "a dog", "the cat"]
    counts = metric.counts([Given(text=answer) for answer in answers], expected)
    BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=512).save_pretrained(tmp_path)  # which the package needs
    oracle: Any = bert_score.score(answers[:2], expected[:2], model_type=str(tmp_path), num_layers=2)[2]
    assert counts[:, 0] == pytest.approx([*oracle.tolist(), 0.0], abs=1e-6)
    assert counts[1, 0] == pytest.approx(1.0, abs=1e-6)
    gone = suite | {"bertscore": {"model": str(tmp_path / "gone"), "layer": 2}}
    with pytest.raises(UserError, match=r"evaluation\.suites\.0\.bertscore.model: there is no folder"):
        metrics_of(suite_plan(SuiteSection.model_validate(gone), "evaluation.suites.0"), key="evaluation.suites.0")
