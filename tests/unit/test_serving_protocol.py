"""What an endpoint makes of requests and answers, in OpenAI's form: honoured or refused by name, nothing ignored."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from raytune.data.templates.text import resolve_template
from raytune.errors import UserError
from raytune.serving.access import chosen_token, fingerprint, is_allowed, is_loopback, token_in
from raytune.serving.answers import Answer, Begun
from raytune.serving.openai_errors import Refused
from raytune.serving.prompts import Prompts
from raytune.serving.protocol import MOST_DEPTH, Chat, Wish, read_chat, read_text
from raytune.serving.requests import Piece, Token
from tests.tiny import tiny_tokenizer

TURNS = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "Say the weather", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> Wish:
    return read_chat(json.dumps({"model": "m", "messages": TURNS} | fields).encode())


def text(**fields: Any) -> Wish:
    return read_text(json.dumps({"model": "m", "prompt": "once"} | fields).encode())


def refusal(read: Any, *content: Any, **fields: Any) -> Any:
    with pytest.raises(Refused) as refused:
        read(*content, **fields)
    assert refused.value.refusal.status == 400
    return refused.value.refusal


# --- Requests ----------------------------------------------------------------------------------------------------------------


def test_every_parameter_that_is_honoured_arrives() -> None:
    asked = chat(
        temperature=0, top_p=0.5, top_k=7, seed=3, stop=["a", "b"], n=2, max_completion_tokens=9, logprobs=True, top_logprobs=4
    ).asked
    assert (asked.temperature, asked.top_p, asked.top_k, asked.seed, asked.stop) == (0.0, 0.5, 7, 3, ("a", "b"))
    assert (asked.num_choices, asked.max_new_tokens, asked.num_logprobs) == (2, 9, 4)
    assert text(stop="x", max_tokens=5, logprobs=2).asked.stop == ("x",)


def test_what_is_left_out_is_as_openai_has_it() -> None:
    asked = chat().asked
    assert (asked.temperature, asked.top_p, asked.top_k, asked.seed, asked.stop) == (1.0, 1.0, None, None, ())
    assert (asked.num_choices, asked.max_new_tokens, asked.num_logprobs) == (1, None, None)
    assert chat(logprobs=True).asked.num_logprobs == 0
    assert text().asked.max_new_tokens == 16
    assert chat(top_k=-1).asked.top_k is None


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1},
        {"logit_bias": {"5": 10}},
        {"repetition_penalty": 1.1},
        {"min_p": 0.1},
        {"response_format": {"type": "json_object"}},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"parallel_tool_calls": False},
        {"functions": [{"name": "weather"}]},
        {"reasoning_effort": "high"},
        {"guided_json": {}},
        {"best_of": 3},
        {"ignore_eos": True},
    ],
)
def test_a_parameter_that_would_change_the_answer_is_refused_by_its_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    found = refusal(chat, **fields)
    assert found.param == name
    assert name in found.message
    assert found.code in ("unsupported_parameter", "unknown_parameter")


def test_a_parameter_that_asks_for_nothing_is_taken() -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}}
    of_no_effect = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "logit_bias": None}
    given, plain = chat(**(neutral | of_no_effect)).asked, chat().asked
    assert _fields(given) | {"id": ""} == _fields(plain) | {"id": ""}
    assert refusal(chat, frequency_penalty=False).param == "frequency_penalty"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"n": 1000}, "n"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ({"model": 5}, "model"),
    ],
)
def test_a_value_that_is_none_is_refused_with_its_place(fields: dict[str, Any], param: str) -> None:
    assert refusal(chat, **fields).param == param


HALF = b'{"model":"m","messages":[{"a":"\\ud800"}]}'


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": "m"}'),
        HALF,
        HALF.replace(b"\\ud800", b"\xed\xa0\x80"),
        HALF.decode().encode("utf-16"),
        b'{"model":"m","messages":[{"role":"user","content":' + b"[" * 200 + b"]" * 200 + b"}]}",
    ],
)
def test_what_is_no_request_is_refused(content: bytes) -> None:
    assert refusal(read_chat, content).message


def test_a_request_as_deep_as_it_may_be_goes_to_another_process() -> None:
    deep: Any = {}
    for _ in range(MOST_DEPTH - 4):  # in a message, in their list, in the body
        deep = {"a": deep}
    assert pickle.loads(pickle.dumps(wish := chat(messages=[{"role": "user", "content": deep}]))) == wish


def test_prompts_are_texts_or_tokens_one_or_several() -> None:
    assert text(prompt="a").asked.prompts == ("a",)
    assert text(prompt=["a", "b"]).asked.prompts == ("a", "b")
    assert text(prompt=[5, 6]).asked.prompts == ((5, 6),)
    assert text(prompt=[[5, 6], [7]]).asked.prompts == ((5, 6), (7,))
    for wrong in ([], [5, "a"], [[5], "a"], 5, [1.5], [True]):
        assert refusal(text, prompt=wrong).param == "prompt", wrong
    assert refusal(text, prompt=["a"] * 100, n=2).param == "n"


def test_no_tool_is_offered_where_none_may_be_called() -> None:
    assert chat(tools=[TOOL]).asked.prompts == (Chat(messages=tuple(TURNS), tools=(TOOL,)),)
    assert chat(tools=[TOOL], tool_choice="none").asked.prompts == (Chat(messages=tuple(TURNS)),)


# --- Prompts -----------------------------------------------------------------------------------------------------------------


def prompts(template: str = "auto") -> Prompts:
    tokenizer = tiny_tokenizer()
    return Prompts(tokenizer, resolve_template(template, tokenizer) if template else "", len(tokenizer))


def asked_of(*messages: dict[str, Any], tools: tuple[dict[str, Any], ...] = ()) -> Chat:
    return Chat(messages=messages, tools=tools)


def test_a_chat_is_what_the_template_makes_of_it_with_the_generation_prompt() -> None:
    ours, turns = prompts(), [{"role": "system", "content": "Be brief."}, *TURNS]
    wanted = ours.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ours.ids_of(asked_of(*turns)) == tuple(wanted)
    in_parts = {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
    assert ours.ids_of(asked_of(turns[0], in_parts)) == tuple(wanted)
    assert ours.ids_of(asked_of({"role": "developer", "content": "Be brief."}, *TURNS)) == tuple(wanted)
    assert ours.ids_of("once") == tuple(ours.tokenizer("once")["input_ids"])
    assert ours.ids_of((5, 6)) == (5, 6)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "king", "content": "x"}], "king"),
        ([{"role": "user", "content": 5}], "a number"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "not text"),
        ([{"content": "x"}], "role"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "JSON"),
    ],
)
def test_turns_that_cannot_be_rendered_are_refused_in_words(messages: list[dict[str, Any]], words: str) -> None:
    assert words in refusal(prompts().ids_of, asked_of(*messages)).message


def test_a_template_that_takes_no_system_message_or_no_tools_says_so_itself_or_is_found_out() -> None:
    refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    turns = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"
    system = {"role": "system", "content": "Be brief."}
    tokenizer = tiny_tokenizer()
    for template in (refusing + "{{ m.content }}{% endfor %}", turns):
        found = refusal(Prompts(tokenizer, template, len(tokenizer)).ids_of, asked_of(system, *TURNS))
        assert "ystem" in found.message
    found = refusal(Prompts(tokenizer, turns, len(tokenizer)).ids_of, asked_of(*TURNS, tools=(TOOL,)))
    assert found.param == "tools"
    for tool in ({}, {"type": "function", "function": "weather"}, {"type": "function", "function": {"name": 5}}):
        assert "no function with a name" in refusal(prompts().ids_of, asked_of(*TURNS, tools=(tool,))).message
    assert "no chat template" in refusal(prompts("").ids_of, asked_of(*TURNS)).message


def test_tokens_that_a_model_does_not_know_and_prompts_of_none_are_refused() -> None:
    ours = prompts()
    for wrong in ((len(ours.tokenizer),), (-1,), ()):
        assert refusal(ours.ids_of, wrong).param == "prompt"


# --- Answers -----------------------------------------------------------------------------------------------------------------

TOKEN = Token(id=1, text="ab", logprob=-0.5, likeliest=((1, "ab", -0.5), (2, "\ufffd", -2.0)))


def told(wish: Wish, *pieces: tuple[int, Piece]) -> Answer:
    answer = Answer(wish, clock=12.9)
    answer.take(Begun(7))
    for piece in pieces:
        answer.take(piece)
    return answer


def test_a_whole_chat_has_texts_reasons_and_counts() -> None:
    pieces = [
        (0, Piece(text="Hel", num_tokens=2)),
        (1, Piece(text="x", num_tokens=1)),
        (0, Piece(text="lo", num_tokens=4, finish="stop")),
        (1, Piece(text="", num_tokens=9, finish="length")),
    ]
    wish = chat(n=2)
    answer = told(wish, *pieces[:3])
    assert not answer.is_complete
    answer = told(wish, *pieces)
    assert answer.is_complete
    value = answer.to_json()
    assert (value["id"], value["object"], value["created"], value["model"]) == (wish.asked.id, "chat.completion", 12, "m")
    assert [choice["message"]["content"] for choice in value["choices"]] == ["Hello", "x"]
    assert [choice["finish_reason"] for choice in value["choices"]] == ["stop", "length"]
    assert value["usage"] == {"prompt_tokens": 7, "completion_tokens": 13, "total_tokens": 20}


def test_log_probabilities_have_the_form_of_each_kind() -> None:
    piece = (0, Piece(text="ab", num_tokens=1, tokens=(TOKEN,), finish="stop"))
    (content,) = told(chat(logprobs=True, top_logprobs=2), piece).to_json()["choices"][0]["logprobs"]["content"]
    assert (content["token"], content["logprob"], content["bytes"]) == ("ab", -0.5, [97, 98])
    assert [one["bytes"] for one in content["top_logprobs"]] == [[97, 98], None]
    first = (0, Piece(text="ab", num_tokens=1, tokens=(TOKEN,)))
    last = (0, Piece(text="ab", num_tokens=2, tokens=(TOKEN,), finish="stop"))
    found = told(text(logprobs=2), first, last).to_json()["choices"][0]["logprobs"]
    assert found == {
        "tokens": ["ab", "ab"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"ab": -0.5, "\ufffd": -2.0}] * 2,
        "text_offset": [0, 2],
    }


def test_the_chunks_of_a_stream_are_the_whole_answer() -> None:
    wish = chat(stream=True, stream_options={"include_usage": True})
    answer = Answer(wish, clock=0)
    answer.take(Begun(3))
    written = list(answer.opening())
    for piece in (Piece(text="a\n", num_tokens=1), Piece(text="", num_tokens=2, finish="stop")):
        answer.take((0, piece))
        written.append(answer.chunk(0, piece))
    written += answer.ending()
    assert written.pop() == b"data: [DONE]\n\n"
    values = [json.loads(event.removeprefix(b"data: ")) for event in written]
    assert [value["choices"][0]["delta"] for value in values[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "a\n"},
        {},
    ]
    assert [value["choices"][0]["finish_reason"] for value in values[:-1]] == [None, None, "stop"]
    assert [value["usage"] for value in values] == [None] * 3 + [{"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}]
    assert values[-1]["choices"] == []
    assert all(event.endswith(b"\n\n") and event.count(b"\n") == 2 for event in written), "a line end in a text ends no event"


# --- Who may ask -------------------------------------------------------------------------------------------------------------


def test_other_machines_need_a_token_that_the_user_chose() -> None:
    assert len(chosen_token("127.0.0.1", None)) > 30
    assert chosen_token("127.0.0.1", None) != chosen_token("127.0.0.1", None)
    for host in ("0.0.0.0", "::", "10.0.0.5", "example.org", "127.0.0.1.example.org"):
        assert not is_loopback(host)
        with pytest.raises(UserError, match="no token is set"):
            chosen_token(host, None)
    assert chosen_token("0.0.0.0", "0123456789abcdef") == "0123456789abcdef"
    for weak in ("", "short", "0123456789 abcdef", "0123456789äbcdef"):
        with pytest.raises(UserError):
            chosen_token("127.0.0.1", weak)


def test_a_header_is_held_against_a_fingerprint() -> None:
    expected = fingerprint("0123456789abcdef")
    assert "0123" not in expected
    assert is_allowed("Bearer 0123456789abcdef", expected)
    assert is_allowed("bearer 0123456789abcdef", expected)
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "0123456789abcdef",
        "Basic 0123456789abcdef",
        "Bearer \udc80",
        f"Bearer {expected}",
    ):
        assert not is_allowed(wrong, expected)


def test_a_file_with_a_token_is_its_owners(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o600)
    assert token_in(file) == "0123456789abcdef"
    file.chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        token_in(file)
    with pytest.raises(UserError, match="cannot be read"):
        token_in(tmp_path / "none")
