"""Metrics of answers equal the packages that they are known from, and their intervals hold what they say."""

import json
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
import sacrebleu
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from raytune.config.sections.evaluation import AnswerMetricName
from raytune.evaluation.answer_metrics import ANSWER_METRICS
from raytune.evaluation.bootstrap import difference_interval
from raytune.evaluation.text_metrics import exact_match, json_fields, json_valid, numeric_match, token_f1

WORDS = st.sampled_from(
    ["the", "cat", "sat.", "Sat", "mat", "a", "12", "1,200", "ünï", "日本", "", "\n", "{}", "—", "\u202e", "it's"]
)
TEXTS = st.lists(WORDS, max_size=8).map(" ".join) | st.text(max_size=20)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=12)
CLASSES = st.sampled_from(["yes", "no", "perhaps"])


def value(name: AnswerMetricName, answers: Sequence[str], expected: Sequence[str]) -> float:
    metric = ANSWER_METRICS[name]
    return float(metric.value(metric.counts(answers, expected).sum(0)))


def test_every_name_has_a_metric() -> None:
    assert set(ANSWER_METRICS) == {*get_args(AnswerMetricName)}


@given(PAIRS)
def test_bleu_and_chrf_are_sacrebleu_s(pairs: list[tuple[str, str]]) -> None:
    answers, expected = [list(texts) for texts in zip(*pairs, strict=True)]
    assert value("bleu", answers, expected) == pytest.approx(sacrebleu.corpus_bleu(answers, [expected]).score / 100, abs=1e-12)
    assert value("chrf", answers, expected) == pytest.approx(sacrebleu.corpus_chrf(answers, [expected]).score / 100, abs=1e-12)


@given(PAIRS)
def test_rouge_is_the_mean_of_rouge_score_s(pairs: list[tuple[str, str]]) -> None:
    answers, expected = [list(texts) for texts in zip(*pairs, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([name])
        oracle = [scorer.score(wanted, answer)[name].fmeasure for answer, wanted in pairs]
        assert value(name, answers, expected) == pytest.approx(float(np.mean(oracle)), abs=1e-12)


@given(st.lists(st.tuples(CLASSES | st.text(max_size=3), CLASSES), min_size=1, max_size=30))
def test_metrics_of_classes_are_scikit_learn_s(pairs: list[tuple[str, str]]) -> None:
    answers, expected = [[text.strip() for text in texts] for texts in zip(*pairs, strict=True)]
    options: dict[str, Any] = {"labels": sorted({*expected}), "average": "macro", "zero_division": 0}
    assert value("accuracy", answers, expected) == pytest.approx(sklearn.metrics.accuracy_score(expected, answers))
    assert value("macro_f1", answers, expected) == pytest.approx(sklearn.metrics.f1_score(expected, answers, **options))
    precision = sklearn.metrics.precision_score(expected, answers, **options)
    assert value("macro_precision", answers, expected) == pytest.approx(precision)
    assert value("macro_recall", answers, expected) == pytest.approx(sklearn.metrics.recall_score(expected, answers, **options))


@given(st.text())
def test_exact_match_ignores_outer_white_space_only(text: str) -> None:
    assert exact_match(f" {text}\n", text) == 1.0
    assert exact_match(text + "x", text) == 0.0


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("The cat sat.", "cat sat", 1.0),
        ("a dog", "the dog", 1.0),
        ("blue, white and red", "red", 2 / 5),  # of 4 words 1 is right, of 1 wanted 1 is found
        ("red red", "red", 2 / 3),
        ("", "", 1.0),
        ("the", "a", 1.0),
        ("", "red", 0.0),
    ],
)
def test_token_f1_counts_as_squad_does(answer: str, expected: str, f1: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "expected", "is_same"),
    [
        ("so 5 + 7 is 12.", "She has 5 and 7.\n#### 12", True),
        ("$1,200.00", "#### 1200", True),
        ("12 of 13", "12", False),
        ("-3", "3", False),
        ("none", "3", False),
        ("10.5", "10.50", True),
        ("1e3", "3", True),  # two numbers with a letter between them, as GSM8K's own rule has it
        ("9" * 5000, "9" * 5000, True),
    ],
)
def test_the_last_number_counts_however_it_is_written(answer: str, expected: str, is_same: bool) -> None:
    assert numeric_match(answer, expected) == is_same


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ('{"who": "Ana", "goods": [{"qty": 2}, {"qty": 3}], "paid": true, "note": null}', 1.0),
        ('{"note": null, "paid": true, "goods": [{"qty": 2}, {"qty": 3}], "who": "Ana"}', 1.0),
        ('{"who": "Ana", "goods": [{"qty": 3}, {"qty": 2}], "paid": 1, "note": null}', 2 / 5),
        ('{"who": "Ana", "goods": [{"qty": "2"}, {"qty": 3.0}]}', 2 / 5),
        ('{"who": "Ana"', 0.0),
        ("[]", 0.0),
        ('{"who": NaN}', 0.0),
    ],
)
def test_json_fields_are_compared_where_they_stand(answer: str, share: float) -> None:
    expected = json.dumps({"who": "Ana", "goods": [{"qty": 2}, {"qty": 3}], "paid": True, "note": None})
    assert json_fields(answer, expected) == pytest.approx(share)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.text(max_size=30))
def test_json_of_any_form_has_all_of_its_own_fields_and_no_text_fails(document: Any, text: str) -> None:
    written = json.dumps(document)
    assert json_valid(written, "") == json_fields(written, written) == 1.0
    assert json_fields(json.dumps(document, indent=3), written) == 1.0
    assert 0 <= json_fields(text, written) <= 1


@given(TEXTS, TEXTS)
def test_the_same_text_is_right_by_every_metric_of_a_row(text: str, other: str) -> None:
    assert token_f1(text, text) == exact_match(text, text) == 1.0
    for metric in (token_f1, numeric_match):
        assert 0 <= metric(other, text) <= 1


def test_what_is_expected_has_to_be_of_a_kind_that_answers_can_be_judged_by() -> None:
    assert ANSWER_METRICS["numeric_match"].refusal("no number") == "the expected answer has to be a text with a number"
    assert ANSWER_METRICS["json_fields"].refusal("{") == "the expected answer has to be JSON"
    assert ANSWER_METRICS["macro_f1"].refusal(" ") == "the expected answer is empty, and so no class"
    assert all(metric.refusal('{"a": 1}') is None for metric in ANSWER_METRICS.values())


def test_the_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    """Answers drawn at known rates: of 200 intervals of 95 %, about 190 hold the difference of the rates."""
    random, held = np.random.default_rng(3), 0
    metric = ANSWER_METRICS["exact_match"]
    for trial in range(200):
        easy = random.random(80)  # a row that one model answers, the other is likely to answer too
        before, after = easy < 0.4, 0.7 * easy + 0.3 * random.random(80) < 0.5
        counts = [np.stack([right, np.ones(80)], axis=1) for right in (before, after)]
        low, high = difference_interval(counts[0], counts[1], metric.value, seed=trial)
        # Of 0.7 u + 0.3 v < 0.5 with u, v uniform: the area under the line, by its trapezium.
        true = (0.5 / 0.7 + 0.2 / 0.7) / 2 - 0.4
        held += low <= true <= high
    assert 0.91 <= held / 200 <= 0.985


@pytest.mark.parametrize("name", ["macro_f1", "bleu", "chrf", "rougeL", "exact_match"])
def test_the_sums_of_drawn_rows_have_the_value_of_those_rows(name: AnswerMetricName) -> None:
    """Which an interval is made of: 2,000 times."""
    random = np.random.default_rng(0)
    expected = [f"class {one} of three classes" for one in random.integers(3, size=40)]
    answers = [one if random.random() < 0.6 else f"class {random.integers(3)} of three" for one in expected]
    metric = ANSWER_METRICS[name]
    counts = metric.counts(answers, expected)
    drawn = random.integers(40, size=(5, 40))
    values = metric.value(counts[drawn].sum(1))
    for rows, found in zip(drawn, values, strict=True):
        assert found == pytest.approx(value(name, [answers[row] for row in rows], [expected[row] for row in rows]))
