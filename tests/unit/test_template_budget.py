"""Claims about chat templates of strangers: too much time, memory or text is a typed error within moments, in any thread."""

import sys
import threading
import time
from collections.abc import Callable

import pytest

from raytune.data.templates import budget
from raytune.data.templates.budget import SECONDS, within_budget
from raytune.data.templates.rendering import Job, Renderer
from raytune.data.templates.template import ChatTemplate
from raytune.errors import DataError
from raytune.units import MIB
from tests.tiny import tiny_tokenizer
from tests.variants import variants

USUAL = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SLOW = {
    "loop of loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion of two": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
}
LARGE = {
    "doubled text": "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubled sum": "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubled block": "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set b %}{{ n.s }}{{ n.s }}{% endset %}"
    "{% set n.s = b %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "product": "{{ (10 ** 1000) * (10 ** 1000) }}",
    "repeated text": "{{ 'x' * 10 ** 11 }}",
    "repeated by the right": "{% set n = 99999999999 %}{{ n * 'x' }}",
    "repeated list": "{{ [0] * 99999999999 }}",
    "width of a format": "{{ '%9999999999d' % 1 }}",
    "width as a value": "{{ '%*d' % (9999999999, 1) }}",
    "format method": "{{ '{:9999999999}'.format(1) }}",
    "format method with a value": "{{ '{:{}}'.format(1, 9999999999) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "center method": "{{ 'x'.center(9999999999) }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "zfill": "{{ 'x'.zfill(9999999999) }}",
    "expandtabs": "{{ '\\t'.expandtabs(9999999999) }}",
    "indent": "{{ 'a\\nb' | indent(9999999999) }}",
    "json": "{{ {'a': 1} | tojson(indent=9999999999) }}",
    "batch": "{{ [1] | batch(9999999999, 'x') | list }}",
    "replaced": "{{ ('x' * 9999999).replace('x', 'x' * 9999999) }}",
    "joined": "{{ ('x' * 999999).join('y' * 999999) }}",
}
REFUSED = {
    "python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes by a filter": "{{ (messages | attr('append')).__globals__ }}{{ (messages | attr('__class__')).__init__ }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "changed rows": "{{ messages.append(1) }}",
}


def opened(template: str) -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer(), template)


@pytest.mark.parametrize("kind", variants([*SLOW][:1], [*SLOW][1:]))
def test_a_template_without_end_is_ended_after_two_seconds_of_its_own_time(kind: str):
    began = time.thread_time()
    with pytest.raises(DataError, match=r"^the chat template takes more than .* to render a chat. Set data.template"):
        opened(SLOW[kind] + USUAL)
    assert time.thread_time() - began < 3 * SECONDS  # a busy machine takes more time for what is done once


@pytest.mark.parametrize("kind", LARGE)
def test_a_step_that_makes_too_much_is_refused_before_it_is_done(kind: str):
    began = time.thread_time()
    with pytest.raises(DataError, match="the chat template makes too much in one step"):
        opened(LARGE[kind] + USUAL)
    # Time would end it, too, and with other words. Memory that is touched for the first time has cost seconds on some machines.
    assert time.thread_time() - began < 3 * SECONDS


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_sandbox_refuses_is_a_reason_for_the_row(kind: str):
    text = Renderer(tiny_tokenizer(), REFUSED[kind] + USUAL).one(Job([{"role": "user", "content": "a"}]))
    assert "cannot render it" in str(text)


def test_a_template_of_megabytes_is_none():
    with pytest.raises(DataError, match="which is no chat template"):
        opened(USUAL + "{# #}" * 300_000)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the time."""
    monkeypatch.setattr(budget, "SECONDS", SECONDS / 5)


def test_a_bomb_in_a_later_row_ends_the_work_and_not_the_row_alone(hasty: None):
    template = "{% if messages | length > 2 %}" + SLOW["loop of loops"] + "{% endif %}" + USUAL
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    renderer = Renderer(tiny_tokenizer(), template)
    assert renderer.one(Job(chat)) == renderer.texts([Job(chat)])[0]
    for call in (lambda: renderer.one(Job(chat * 2)), lambda: renderer.texts([Job(chat), Job(chat * 2)])):
        with pytest.raises(DataError, match="takes more than"):
            call()


def test_threads_are_ended_each_for_itself_and_go_on_afterwards(hasty: None):
    results: list[object] = []

    def render(call: Callable[[], object]) -> None:
        for _ in range(2):
            try:
                results.append(call())
            except DataError as error:
                results.append(error)

    def without_end() -> None:
        while True:
            pass

    def patient() -> str:
        time.sleep(budget.SECONDS + 1)  # which takes time of the wall only
        return "patient"

    threads = [
        threading.Thread(target=render, args=(lambda call=call: within_budget(call, "x"),))
        for call in (without_end, patient, lambda: "quick")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(str(result) for result in results if not isinstance(result, DataError)) == ["patient"] * 2 + ["quick"] * 2
    assert sum(isinstance(result, DataError) for result in results) == 2


def test_the_beginnings_of_a_long_chat_may_take_as_long_as_they_have_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SECONDS", 0.1)
    monkeypatch.setattr(budget, "SECONDS_PER_CHAT", 0.0)
    renderer = Renderer(
        tiny_tokenizer(), "{% for turn in messages %}{% for at in range(200) %}{% endfor %}{{ turn.content }}{% endfor %}"
    )
    chat = [{"role": role, "content": "x"} for _ in range(100) for role in ("user", "assistant")]
    beginnings = [Job(chat[:length]) for length in range(1, len(chat) + 1)]
    started_s = time.thread_time()
    assert renderer.texts(beginnings) == ["x" * length for length in range(1, len(chat) + 1)]
    assert time.thread_time() - started_s > 2 * budget.SECONDS, "too fast to show anything"


def test_memory_that_another_thread_takes_is_not_the_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MEMORY", 32 * MIB)
    taken: list[bytes] = []
    num_begun = 0

    def render() -> str:
        nonlocal num_begun
        num_begun += 1
        other = threading.Timer(0.3, lambda: taken.append(b"x" * (64 * MIB)))
        if num_begun == 1:
            other.start()
        until = time.monotonic() + 0.8
        while time.monotonic() < until:
            pass
        return "rendered"

    assert within_budget(render, "x") == "rendered"
    assert num_begun == 2, "ended once"


def test_a_template_that_takes_memory_each_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MEMORY", 32 * MIB)

    def render() -> None:
        taken = []
        while True:
            time.sleep(0.01)
            taken.append(b"x" * (2 * MIB))

    with pytest.raises(DataError, match=r"^x takes more than 32 MiB of memory to render a chat"):
        within_budget(render, "x")


def test_ordinary_steps_are_as_they_were():
    template = (
        "{{ 'ab' * 3 }}|{{ 2 ** 10 }}|{{ 7 % 3 }}|{{ '%5d' % 7 }}|{{ '{:>4}'.format('x') }}|{{ 'x' | center(3) }}|"
        "{{ {'a': 'é'} | tojson(indent=2) }}|{{ 'a-b'.replace('-', '+') }}|{{ ', '.join(['a', 'b']) }}|{{ 'a\nb' | indent(2) }}|"
        "{{ 'until 20240630 %s' % 'x' }}|{{ 'id 20240630: {}'.format('x') }}|{{ 'abc' | truncate(200000) }}"
    )
    rendered = Renderer(tiny_tokenizer(), template).one(Job([]))
    assert rendered == 'ababab|1024|1|    7|   x| x |{\n  "a": "é"\n}|a+b|a, b|a\n  b|until 20240630 x|id 20240630: x|abc'


def test_marks_of_a_rendering_are_its_own_while_another_thread_renders_by_the_same_template() -> None:
    marked = "{% for m in messages %}{% generation %}{{ m.content }};{% endgeneration %}{% endfor %}"
    one, other = Renderer(tiny_tokenizer(), marked), Renderer(tiny_tokenizer(), marked)
    chat = [{"role": "assistant", "content": str(number)} for number in range(100)]
    alone = one.generation_blocks(chat, None)
    assert len(alone) == 100
    are_found = threading.Event()

    def render() -> None:
        while not are_found.is_set():
            other.texts([Job(chat)])

    thread = threading.Thread(target=render)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        found = [one.generation_blocks(chat, None) for _ in range(30)]
    finally:
        are_found.set()
        thread.join()
        sys.setswitchinterval(usual)
    assert found == [alone] * 30
