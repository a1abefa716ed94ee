"""A date that a chat template writes is the same on every day, for rows and for whoever reads the template that is saved."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

import raytune
from raytune.config.load import config_from
from raytune.config.sections.data import DataSection, TrainSource
from raytune.data.templates.date import USUAL_DATE
from raytune.data.templates.front import template_of
from raytune.data.templates.template import ChatTemplate
from raytune.errors import DataError, UserError
from tests.templates.shapes import tokenizer_for
from tests.tiny import tiny_rows

CHATS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATS += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA = "{% if date_string is not defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
LLAMA += "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}Today Date: {{ date_string }}\n" + CHATS
IN_MACRO = "{% macro head() %}Current date: {{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ head() }}\n" + CHATS
ASKED = [{"role": "user", "content": "Q"}]


class Clock(datetime):
    """A day that a test sets."""

    is_now = datetime(2031, 5, 6)

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return cls.is_now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return Clock


def data(**keys: Any) -> DataSection:
    return DataSection(train=[TrainSource(path="r.jsonl")], **keys)


def written(text: str, **variables: Any) -> str:
    tokenizer: Any = tokenizer_for(text)
    return tokenizer.apply_chat_template(ASKED, tokenize=False, **variables).partition("\n")[0]


@pytest.mark.parametrize(
    ("own", "usual", "other"),
    [
        (LLAMA, "Today Date: 26 Jul 2024", "Today Date: 30 Nov 2026"),
        (IN_MACRO, "Current date: 2024-07-26", "Current date: 2026-11-30"),
    ],
)
def test_the_date_is_the_same_on_every_day_and_another_one_if_asked(own: str, usual: str, other: str) -> None:
    tokenizer = tokenizer_for(own)
    assert "2031" in written(own), "the clock is read"
    saved = template_of(data(), tokenizer)
    assert written(saved) == usual
    assert written(template_of(data(template_date="2026-11-30"), tokenizer)) == other
    again = tokenizer_for(template_of(data(template_date="2026-11-30"), tokenizer))
    assert template_of(data(), again) == again.chat_template, "a saved template keeps its date"
    assert template_of(data(template_date=USUAL_DATE), again) == saved, "or is given another one"


def test_fronts_are_not_given_twice() -> None:
    section = data(system="Be brief.", template_date="2026-11-30")
    saved = template_of(section, tokenizer_for(IN_MACRO))
    assert template_of(section, tokenizer_for(saved)) == saved


def test_a_variable_of_the_template_goes_before_the_clock() -> None:
    text = template_of(data(template_options={"date_string": "1 Jan 2030"}), tokenizer_for(LLAMA))
    assert written(text) == "Today Date: 1 Jan 2030"
    assert written(text, date_string="2 Jan 2030") == "Today Date: 2 Jan 2030"
    assert not any("today" in note for note in ChatTemplate(tokenizer_for(LLAMA), text).notes)


def test_it_is_said_which_date_rows_have() -> None:
    tokenizer = tokenizer_for(LLAMA)
    (note,) = [note for note in ChatTemplate(tokenizer, template_of(data(), tokenizer)).notes if "date" in note]
    assert note.startswith("the chat template writes today's date: rows have 26 Jul 2024 whatever the day")


def test_a_template_without_a_date_is_as_it_was_and_refuses_one() -> None:
    tokenizer = tokenizer_for(CHATS)
    assert template_of(data(), tokenizer) == CHATS
    with pytest.raises(DataError, match=r"data\.template_date is 2026-11-30, but the chat template asks for no date") as error:
        template_of(data(template_date="2026-11-30"), tokenizer)
    assert error.value.keys == ("data.template_date",)


@pytest.mark.parametrize(
    "call", ["strftime_now(form)", "strftime_now('%d' + '%Y')", "strftime_now(format='%Y')", "f(strftime_now)"]
)
def test_a_format_that_only_rendering_tells_is_refused(call: str) -> None:
    with pytest.raises(DataError, match="in a format that only rendering tells"):
        template_of(data(), tokenizer_for("{{ " + call + " }}" + CHATS))


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "20261130", "2026-1-1", "2026-02-30"])
def test_what_is_no_date_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"data\.template_date  must be a date that there is"):
        config_from({"data": {"template_date": text}})


def test_rows_are_tokenised_once_whatever_the_day(tmp_path: Path, clock: type[Clock], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(8)))
    (tmp_path / "own.jinja").write_text(LLAMA)
    config = {
        "name": "dated",
        "model": {"base": "demo"},
        "storage": str(tmp_path),
        "data": {"train": str(rows), "template": str(tmp_path / "own.jinja")},
        "training": {"max_steps": 1, "global_batch_size": 1},
    }
    first = raytune.make_plan(config)
    monkeypatch.setattr(clock, "is_now", datetime(2031, 5, 7))
    assert raytune.make_plan(config).data.train.path == first.data.train.path
    other = raytune.make_plan(config, data={"template_date": "2026-11-30"})
    assert other.data.train.path != first.data.train.path
