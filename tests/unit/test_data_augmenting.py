"""Rows that are made of training rows: what is changed, what never is, and that nothing held out comes back in other words."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.load import config_from
from raytune.config.sections.augment import AugmentSection
from raytune.data.conversations.conversation import Conversation, Origin
from raytune.data.formats.augmenting import Augmentation, copies_of, misspelt
from raytune.data.formats.recognising import AS_MESSAGES, Reading, read_row
from raytune.data.store.store import Store
from raytune.errors import DataError, UserError
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import Prepared, prepare
from raytune.model.demo import demo_tokenizer
from raytune.plan.run_plan import StorePlan
from raytune.user_code import UserCode

ORIGIN = Origin("rows.jsonl", 7)


def reading_as(name: Any) -> Reading:
    return replace(AS_MESSAGES, format=name)


CHAT, PAIR, TEXT = (reading_as(name) for name in ("messages", "prompt_completion", "text"))
ROW = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "How many apples are 12 and 30 apples together?"},
        {"role": "assistant", "content": "42 apples in total."},
        {"role": "user", "content": "And without the rotten ones?"},
        {"role": "assistant", "content": "I cannot know that."},
    ]
}


def augmentation(**changes: Any) -> Augmentation:
    return Augmentation(**{"copies": 1, "noise": 0.0, "wordings": (), "function": None, "seed": 0} | changes)


def made(row: dict[str, Any] = ROW, reading: Reading = CHAT, **changes: Any) -> list[Conversation]:
    return list(copies_of(row, read_row(row, reading, ORIGIN), reading, augmentation(**changes)))


def contents(row: Conversation, role: str) -> list[str]:
    return [message["content"] for message in row.messages if message["role"] == role]


@given(st.text(), st.floats(0, 1), st.integers())
def test_only_letters_of_plain_words_change(text: str, share: float, seed: int) -> None:
    found = misspelt(text, share, random.Random(seed))
    assert re.findall(r"\s", found) == re.findall(r"\s", text)
    assert re.findall(r"\d", found) == re.findall(r"\d", text)
    for before, after in zip(text.split(), found.split(), strict=True):
        assert before == after or re.search(r"[^\W\d_]{2}", before)


@pytest.mark.parametrize(
    "kept",
    [
        "3.14 is 2x2 and a1 b_2",
        "see https://example.org/path or me@example.org",
        "<image> <|im_start|> [INST] {name} #tag",
        "```python\nreturn several words of code\n```",
        "~~~\nwords words words\n~~~",
    ],
)
def test_numbers_addresses_markup_and_code_stay(kept: str) -> None:
    plain = {"is", "and", "see", "or"}
    found = misspelt(kept, 1.0, random.Random(1))
    assert [word for word in found.split() if word in kept.split()] == [word for word in kept.split() if word not in plain]


def test_as_many_letters_are_wrong_as_asked_for() -> None:
    text = "several quite ordinary words of letters alone " * 500
    letters = len(text.replace(" ", ""))
    found = misspelt(text, 0.1, random.Random(0))
    pairs = list(zip(text.split(), found.split(), strict=True))
    wrong = sum(abs(len(a) - len(b)) or sum(x != y for x, y in zip(a, b)) for a, b in pairs)
    # A letter left out or doubled is one that is wrong, one of another case too, and two that are swapped are two.
    assert 0.1 * 0.8 < wrong / letters < 0.1 * 1.6


def test_a_copy_has_other_prompts_and_the_same_answers() -> None:
    (copy,) = made(noise=0.2, wordings=("Question: {content}",))
    original = read_row(ROW, CHAT, ORIGIN)
    first, second = contents(copy, "user")
    assert first.startswith("Question: ")
    assert not second.startswith("Question: ")
    assert {"12", "30"} <= set(first.split())
    assert contents(copy, "user") != contents(original, "user")
    for role in ("system", "assistant"):
        assert contents(copy, role) == contents(original, role)
    assert copy.origin == ORIGIN


def test_copies_depend_on_the_row_its_number_and_the_seed_alone() -> None:
    assert made(copies=3, noise=0.2) == made(copies=3, noise=0.2)
    assert made(copies=3, noise=0.2)[:2] == made(copies=2, noise=0.2)
    assert len({contents(row, "user")[0] for row in made(copies=4, noise=0.2)}) == 4
    assert made(noise=0.2) != made(noise=0.2, seed=1)
    again = json.loads(json.dumps({"messages": ROW["messages"]}))
    assert made(again, noise=0.2) == made(noise=0.2)


def test_what_comes_out_as_the_row_is_is_left_out() -> None:
    assert made(copies=5, wordings=("{content}",)) == []
    assert made(copies=3, noise=1e-9) == []


def test_every_wording_is_drawn() -> None:
    wordings = ("One: {content}", "{content} Two", "{content}\nThree")
    prompts = [contents(row, "user")[0] for row in made(copies=40, wordings=wordings)]
    asked = ROW["messages"][1]["content"]
    assert set(prompts) == {f"One: {asked}", f"{asked} Two", f"{asked}\nThree"}


def test_braces_of_a_prompt_are_text() -> None:
    row = {"prompt": "What is {content} and {0}?", "completion": "Braces."}
    (copy,) = made(row, PAIR, wordings=("<{content}>",))
    assert contents(copy, "user") == ["<What is {content} and {0}?>"]


# --- a function of one's own


def code(text: str) -> UserCode:
    return UserCode(module="mine.py", name="make", text=text)


@pytest.mark.parametrize(
    ("body", "answers"),
    [
        ("return None", []),
        ("return {**row, 'completion': 'C'}", ["C"]),
        ("return [{**row, 'completion': text} for text in 'AB']", ["A", "B"]),
        ("row['completion'] = 'changed'; return row", ["changed"]),
        ("return row", []),
    ],
)
def test_a_function_makes_none_one_or_several_rows(body: str, answers: list[str]) -> None:
    row = {"prompt": "P", "completion": "Q"}
    found = made(row, PAIR, function=code(f"def make(row, chance):\n    {body}\n"))
    assert [contents(one, "assistant")[0] for one in found] == answers
    assert row == {"prompt": "P", "completion": "Q"}


def test_a_function_draws_from_what_it_is_given() -> None:
    row = {"text": "Some text."}
    draws = code("def make(row, chance):\n    return {'text': row['text'] + str(chance.random())}\n")
    found = [one.text for one in made(row, TEXT, copies=3, function=draws)]
    assert len(set(found)) == 3
    assert found == [one.text for one in made(row, TEXT, copies=3, function=draws)]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("return 1 / 0", UserError, r"mine.py:make, given the row rows.jsonl:7: mine.py:2, in make: ZeroDivisionError"),
        ("return 'text'", DataError, r"given the row rows.jsonl:7, returned str, where a row \(a dict\), a list of rows or None"),
        ("return {'prompt': 'P'}", DataError, r"What mine.py:make made of the row rows.jsonl:7 is none of the format"),
    ],
)
def test_what_is_wrong_with_a_function_is_said_with_the_row(body: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made({"prompt": "P", "completion": "Q"}, PAIR, function=code(f"def make(row, chance):\n    {body}\n"))


def test_plain_text_is_not_misspelt() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7 is plain text, which has no prompt"):
        made({"text": "All of it is trained."}, TEXT, noise=0.1)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"copies": 1}, "set noise, wordings or function"),
        ({"noise": 0.1}, "set copies"),
        ({"copies": 1, "wordings": ["no place for it"]}, "must have {content} once"),
        ({"copies": 1, "wordings": ["{content} {content}"]}, "must have {content} once"),
        ({"copies": -1, "noise": 0.1}, "greater than or equal to 0"),
        ({"copies": 1, "noise": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_makes_no_rows_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentSection.model_validate(section)


# --- in a run


def prepared(folder: Path, **data: Any) -> Prepared:
    """A run over rows of which every word is its row's own."""
    rows = [{"prompt": f"say word{number} again please", "completion": f"word{number}"} for number in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "general.jsonl").write_text(json.dumps({"prompt": "something else", "completion": "general"}) + "\n")
    resolved = config_from(
        {
            "name": "more",
            "storage": str(folder),
            "data": {"packing": "none", "train": str(folder / "rows.jsonl"), "validation_fraction": 0.25} | data,
            "strategy": {"replay": {"data": str(folder / "general.jsonl"), "share": 0.1}},
            "adapter": {"method": "lora", "rank": 4},
            "training": {"max_steps": 1, "global_batch_size": 1},
            "cluster": {"workers": 1},
        }
    )
    return prepare(resolved, this_machine(resolved.cluster), map)


def texts(plan: StorePlan) -> list[str]:
    store, tokenizer = Store.open(plan.path), demo_tokenizer()
    return [str(tokenizer.decode(store.row(number).input_ids.tolist())) for number in range(store.num_rows)]


def test_nothing_is_made_of_what_is_held_out_or_replayed(tmp_path: Path) -> None:
    augment = {"copies": 2, "noise": 0.3, "wordings": ["Please: {content}"]}
    found, plain = prepared(tmp_path, augment=augment), prepared(tmp_path)
    (held_out,) = (one for one in found.plan.data.validation if one.name == "rows")
    assert texts(held_out) == texts(next(one for one in plain.plan.data.validation if one.name == "rows"))
    trained = texts(found.plan.data.train)
    made = [text for text in trained if "Please: " in text]
    answers = Counter(re.findall(r"word\d+", " ".join(made)))
    others = set(re.findall(r"word\d+", " ".join(texts(held_out))))
    assert len(made) == 2 * (40 - len(others)) == sum(answers.values()) / 2
    assert not others & answers.keys()
    assert {text for text in trained if "Please: " not in text} == set(texts(plain.plan.data.train))
    assert found.plan.data_report
    rows, general = found.plan.data_report.train.sources
    assert (rows.rows, rows.augmented, rows.other_side) == (40 + len(made), len(made), len(others))
    assert general.augmented == 0
    assert f"40 read as prompt_completion and {len(made)} made of them" in str(found.plan.data_report)


def test_augmenting_that_makes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Nothing was made of any training row"):
        prepared(tmp_path, augment={"copies": 3, "wordings": ["{content}"]})


def test_code_that_is_not_there_is_refused_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.py cannot be read") as caught:
        prepared(tmp_path, augment={"copies": 1, "function": "gone.py:make"})
    assert caught.value.keys == ("data.augment.function",)
