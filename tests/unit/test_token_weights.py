"""Tokens of a class of text weigh what `data.token_weights` says, from the text to the store; all others weigh what they did."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from raytune.config.load import config_from
from raytune.config.problems import ConfigError
from raytune.config.sections.data import TokenWeightsSection
from raytune.data.conversations.token_classes import TokenClass, token_classes
from raytune.data.store.store import Store
from raytune.launch.data.stores import DataBuilder
from raytune.model.demo import demo_base_path
from raytune.plan.data.data_report import store_text
from tests.tiny import tiny_store
from tests.unit.test_data_weights import chat, opened, weighed_text

NUMBERS = (TokenClass("numbers", 2.0),)


def found(name: str, text: str) -> list[str]:
    return [text[start:end] for start, end in TokenClass(name, 2.0).spans(text)]


def weighed(folder: Path, rows: Iterable[Any], *classes: TokenClass, **changes: Any) -> list[tuple[str, float]]:
    folder.mkdir(exist_ok=True)
    return weighed_text(opened(folder, rows, token_classes=classes, **changes))


def test_numbers_are_digits_and_not_the_signs_between_them() -> None:
    assert found("numbers", "It costs 1,250.75 € or ٣.") == ["1", "250", "75", "٣"]


def test_syntax_of_code_is_brackets_operators_and_keywords_inside_of_fences_only() -> None:
    text = "if (x) return\n```python\nif (for_each := 1):\n    return y\n```\nelse (z)\n~~~~\nfunc f()\n```\n"
    assert found("code_syntax", text) == ["if", "(", ":=", "):", "return", "func", "()"]


def test_a_fence_that_is_not_closed_goes_to_the_end_of_what_is_trained() -> None:
    assert found("code_syntax", "```\na = b") == ["="]


def test_a_pattern_is_pythons_and_what_it_finds_of_no_length_is_nothing() -> None:
    assert found("/(?i)\\byes\\b|x*/", "Yes, yesterday xx") == ["Yes", "xx"]


def test_tokens_of_a_class_have_its_weight_in_answers_and_nowhere_else(tmp_path: Path) -> None:
    assert weighed(tmp_path, [chat(("é 12 of 7", None))], *NUMBERS) == [
        ("é ", 1.0),
        ("12", 2.0),
        (" of ", 1.0),
        ("7", 2.0),
        ("<|im_end|>", 1.0),
    ]


def test_weights_of_classes_and_of_the_turn_are_multiplied(tmp_path: Path) -> None:
    classes = (*NUMBERS, TokenClass("/1/", 3.0))
    weights = weighed(tmp_path, [chat(("a12", 0.5), ("b1", None))], *classes)
    assert weights == [("a", 0.5), ("1", 3.0), ("2", 1.0), ("<|im_end|>", 0.5), ("b", 1.0), ("1", 6.0), ("<|im_end|>", 1.0)]


def test_plain_text_is_weighed_too_and_pieces_keep_their_weights(tmp_path: Path) -> None:
    text = "".join(f"word {number} " for number in range(40))
    changes = {"template": "", "max_length": 32, "too_long": "split"}
    runs = weighed(tmp_path, [{"text": text}], *NUMBERS, **changes)
    assert all((weight == 2.0) == run.isdigit() for run, weight in runs)
    assert "".join(run for run, _ in runs if run.isdigit()) == re.sub(r"\D", "", text)


def test_the_report_counts_the_targets_of_each_class_that_are_left(tmp_path: Path) -> None:
    rows = [chat(("12", None)), chat(("none", None))]
    classes = (*NUMBERS, TokenClass("code_syntax", 1.5))
    report = opened(tmp_path, rows, token_classes=classes).report
    assert report.sources[0].targets_of_class == {"numbers x 2": 2, "code_syntax x 1.5": 0}
    assert "numbers x 2: 2 of 8 targets; code_syntax x 1.5: 0 of 8 targets" in "\n".join(store_text(report))
    (tmp_path / "cut").mkdir()
    cut = opened(tmp_path / "cut", [chat(("1" * 80, None))], token_classes=NUMBERS, max_length=64).report
    assert cut.sources[0].targets_of_class == {"numbers x 2": cut.total("targets")}


def test_weights_of_1_are_no_classes_and_leave_the_store_as_it_is(tmp_path: Path) -> None:
    none = token_classes(TokenWeightsSection(numbers=1.0, code_syntax=1.0, patterns={"a": 1.0}))
    assert none == ()
    without, weighed_none, weighed = (
        tiny_store(tmp_path, token_classes=classes) for classes in ((), none, (TokenClass("/no such text/", 2.0),))
    )
    assert without.path == weighed_none.path
    assert without.path != weighed.path
    assert (Path(without.path) / "rows-00000.arrow").read_bytes() == (Path(weighed.path) / "rows-00000.arrow").read_bytes()


def test_held_out_rows_are_measured_without_the_weights(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(chat((f"{number}", None))) + "\n" for number in range(40)))
    for held_out in ({"validation": str(rows)}, {"validation_fraction": 0.5}):
        data = {"train": str(rows), "template": "chatml", "token_weights": {"numbers": 2.0}} | held_out
        config = config_from({"model": {"base": "demo"}, "data": data})
        facts = DataBuilder(config, str(demo_base_path()), 512, str(tmp_path), map, num_embeddings=10**6).build()
        assert Store.open(facts.train.path).weight_of_row is not None
        assert Store.open(facts.validation[0].path).weight_of_row is None


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"patterns": {"(": 2.0}}, "must be a regular expression"),
        ({"numbers": 0}, "must be"),
        ({"digits": 2.0}, "unknown key"),
    ],
)
def test_what_is_no_class_or_no_weight_is_refused(weights: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_from({"model": {"base": "demo"}, "data": {"token_weights": weights}})
