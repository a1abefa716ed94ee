"""Variables of a chat template are those that it reads, and go wherever it goes."""

import json
from typing import Any

import pytest

from raytune.config.load import config_from
from raytune.config.sections.data import DataSection, TrainSource
from raytune.data.templates.front import template_of, variables_of
from raytune.data.templates.rendering import Job, Renderer
from raytune.errors import DataError, UserError
from tests.templates.shapes import tokenizer_for
from tests.tiny import tiny_tokenizer

READS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
READS += "{% if effort is defined %}[{{ effort | tojson }}]{% endif %}"


def data(**keys: Any) -> DataSection:
    return DataSection(train=[TrainSource(path="r.jsonl")], **keys)


@pytest.mark.parametrize(
    "value", [True, None, 3, -1.5, "low", "", 'it\'s "x"\n\t\\ {{ y }} {% z %} é 😀 \x00 \u2028', [1, ["a"]], {"a": {"b": None}}]
)
def test_a_template_reads_the_value_as_it_is_written(value: Any) -> None:
    tokenizer = tokenizer_for(READS)
    text = template_of(data(template_options={"effort": value}), tokenizer)
    written = Renderer(tokenizer, text).one(Job([{"role": "user", "content": "Q"}]))
    assert written == f"<|user|>Q<|end|>[{json.dumps(value, ensure_ascii=False)}]"


def test_a_caller_has_his_way_and_what_is_saved_is_not_given_it_twice() -> None:
    tokenizer: Any = tokenizer_for(READS)
    section = data(template_options={"effort": "low"})
    tokenizer.chat_template = template_of(section, tokenizer)
    asked = [{"role": "user", "content": "Q"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False).endswith('["low"]')
    assert tokenizer.apply_chat_template(asked, tokenize=False, effort="high").endswith('["high"]')
    assert template_of(section, tokenizer) == tokenizer.chat_template
    again: Any = tokenizer_for(tokenizer.chat_template)
    again.chat_template = template_of(data(template_options={"effort": "none"}), again)
    assert again.apply_chat_template(asked, tokenize=False).endswith('["none"]'), "a model that is trained on is given another"


@pytest.mark.parametrize("own", ["\n a {{ x }}", "  {% if x %}\n  b {% endif %}", "{{- x }}", "{# c #}\n\n{{ x }}"])
def test_nothing_else_of_the_text_changes(own: str) -> None:
    tokenizer, asked = tiny_tokenizer(), [{"role": "user", "content": "Q"}]
    tokenizer.chat_template = own
    front = template_of(data(template_options={"x": "y"}), tokenizer)
    plain: Any = tokenizer.apply_chat_template(asked, tokenize=False, x="y")
    assert tokenizer.apply_chat_template(asked, tokenize=False, chat_template=front) == plain


def test_what_a_template_does_not_read_is_refused_with_what_it_reads() -> None:
    own = "{% set a = b %}{% if c is not defined %}{% set c = 1 %}{% endif %}"
    own += "{% for d in messages %}{{ d.x + e | default('') }}{% endfor %}"
    own += (
        "{% macro f(g) %}{{ g + h + bos_token }}{% endmacro %}{{ raise_exception }}{{ strftime_now('%Y') }}"
        "{{ add_generation_prompt }}"
    )
    own += "{% for m in messages %}{% if m %}{% set i = 1 %}{% endif %}{{ i }}{% endfor %}"
    assert variables_of(own) == ["b", "c", "e", "h"]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = own
    with pytest.raises(
        DataError, match=r"data\.template_options\.a: .* does not read a variable 'a'\. It reads b, c, e, h\."
    ) as error:
        template_of(data(template_options={"b": 1, "a": 2}), tokenizer)
    assert error.value.keys == ("data.template_options.a",)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(DataError, match="It reads none"):
        template_of(data(template_options={"b": 1}), tokenizer)


@pytest.mark.parametrize("options", [{"a b": 1}, {"x": float("nan")}, {"x": [object()]}, {"{{": 1}])
def test_names_and_values_that_no_template_could_read_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\.template_options"):
        config_from({"data": {"template_options": options}})
