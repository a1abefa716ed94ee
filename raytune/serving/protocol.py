"""Requests in OpenAI's form, read into what an engine's process is asked: every parameter is honoured or refused by its name.

A parameter that changes no answer (who asks, what it is filed under) is taken and left alone; one that would, and that is not
done here, is refused unless it has the value that asks for nothing.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from raytune.config.sections.evaluation import SUITE_NAME
from raytune.serving.openai_errors import bad

MOST_CHOICES = 128
MOST_STOPS = 16
MOST_LOGPROBS_OF_CHAT, MOST_LOGPROBS_OF_TEXT = 20, 5
TEXT_TOKENS = 16
"""Of an answer of `/v1/completions` whose length is not asked for, as OpenAI has it."""
MOST_SEED = 1 << 63
MOST_DEPTH = 100
"""Of lists and objects in each other: what is deeper cannot be handed to another process."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Turns to be put into the model's template."""

    messages: tuple[Mapping[str, Any], ...]
    """As they came."""
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterAt:
    """An adapter that was loaded while the endpoint ran. Who is asked under its name and lacks it loads it."""

    name: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request, for the process of an engine."""

    id: str
    model: str
    adapter: AdapterAt | None = None
    prompts: tuple[Chat | str | tuple[int, ...], ...]
    """Chats, texts or token ids."""
    num_choices: int
    """For each prompt."""
    max_new_tokens: int | None
    """None: as many as there is room for."""
    temperature: float
    top_p: float
    top_k: int | None
    seed: int | None
    """Of the first choice; the others have the numbers that follow it."""
    stop: tuple[str, ...]
    num_logprobs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A request, and in which form its answer is wanted."""

    asked: Asked
    is_chat: bool
    streams: bool
    tells_usage: bool
    """In a stream; else it is always told."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Tokens = Annotated[int, Field(ge=1)]
_Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS), BeforeValidator(_as_list)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against those who listen to lengths, which is not done: it changes no answer."""


class _Body(BaseModel):
    """What both kinds of requests have. Whatever else there is, is looked at by `_refuse_others`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "repetition_penalty": (1,),
        "length_penalty": (1,),
        "min_p": (0,),
        "min_tokens": (0,),
        "best_of": (1,),
        "use_beam_search": (False,),
        "ignore_eos": (False,),
        "skip_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
        "stop_token_ids": ([],),
    }
    """Parameters that are not done here, and values of them that ask for nothing."""
    of_no_effect: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    )

    model: Annotated[str, Field(min_length=1, max_length=256)]
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Not OpenAI's: the likeliest tokens that are drawn from. -1 and 0: all."""
    seed: Annotated[int, Field(gt=-MOST_SEED, lt=MOST_SEED)] | None = None
    stop: _Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Tokens | None = None


class ChatBody(_Body):
    neutral = _Body.neutral | {
        "tool_choice": ("auto", "none"),
        "parallel_tool_calls": (True,),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "function_call": ("none",),
        "functions": ([],),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template_kwargs": ({},),
        "echo": (False,),
    }
    of_no_effect = _Body.of_no_effect | {"prediction"}

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    max_completion_tokens: _Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS_OF_CHAT)] | None = None


class TextBody(_Body):
    neutral = _Body.neutral | {"echo": (False,), "suffix": ("",)}

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS_OF_TEXT)] | None = None


class LoadBody(BaseModel):
    """As vLLM has it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    lora_name: Annotated[str, Field(pattern=SUITE_NAME, max_length=128)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
    lora_int_id: int | None = None
    """vLLM's number for it, which is none here."""


Body = TypeVar("Body", bound=BaseModel)


def read_chat(content: bytes) -> Wish:
    """A request to `/v1/chat/completions`.

    Raises:
        Refused: naming what is wrong with it.
    """
    body = read_body(content, ChatBody)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad("max_tokens and max_completion_tokens differ; give one of them.", "max_completion_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs needs logprobs: true.", "top_logprobs")
    # OpenAI's word for that no tool is called is obeyed by offering none.
    offers = (body.model_extra or {}).get("tool_choice") != "none"
    chat = Chat(messages=tuple(body.messages), tools=tuple(body.tools or ()) if offers else ())
    longest = body.max_completion_tokens or body.max_tokens
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _wish(body, (chat,), longest, num_logprobs, is_chat=True)


def read_text(content: bytes) -> Wish:
    """A request to `/v1/completions`.

    Raises:
        Refused: naming what is wrong with it.
    """
    body = read_body(content, TextBody)
    prompts = _prompts(body.prompt)
    if len(prompts) * (body.n or 1) > MOST_CHOICES:
        raise bad(f"{len(prompts)} prompts with n={body.n or 1} are more than {MOST_CHOICES} answers.", "n")
    return _wish(body, prompts, body.max_tokens or TEXT_TOKENS, body.logprobs, is_chat=False)


def read_body(content: bytes, kind: type[Body]) -> Body:
    """The JSON of a request.

    Raises:
        Refused: if it is none, or not of that kind.
    """
    try:
        # As bytes, it would be read in any encoding that it looks like, halves of characters among it.
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise bad(f"The body is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise bad("The body is no JSON object.")
    if _is_deeper(value, MOST_DEPTH):
        raise bad(f"The body has lists or objects in each other, more than {MOST_DEPTH} deep.")
    if _SURROGATE.search(content) and not _is_text(value):
        raise bad("The body has half of a character (\\ud800 to \\udfff alone), which is no text.")
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        raise _of_validation(error) from error
    if isinstance(body, _Body):
        _refuse_others(body)
    return body


def _is_deeper(value: Any, most: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return most == 0 or any(_is_deeper(part, most - 1) for part in parts if isinstance(part, dict | list))


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_others(body: _Body) -> None:
    for name, value in (body.model_extra or {}).items():
        if value is None or name in body.of_no_effect:
            continue
        if name not in body.neutral:
            raise bad(f"{name} is a parameter that this endpoint does not know. Leave it out.", name, "unknown_parameter")
        if not any(_are_equal(value, neutral) for neutral in body.neutral[name]):
            fine = " or ".join(json.dumps(neutral) for neutral in body.neutral[name])
            raise bad(
                f"{name} would change the answer, and is not done here. Leave it out, or make it {fine}.",
                name,
                "unsupported_parameter",
            )
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options needs stream: true.", "stream_options")


def _are_equal(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _wish(
    body: _Body,
    prompts: tuple[Chat | str | tuple[int, ...], ...],
    longest: int | None,
    num_logprobs: int | None,
    *,
    is_chat: bool,
) -> Wish:
    asked = Asked(
        id=f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
        model=body.model,
        prompts=prompts,
        num_choices=body.n or 1,
        max_new_tokens=longest,
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
        seed=body.seed,
        stop=tuple(body.stop or ()),
        num_logprobs=num_logprobs,
    )
    tells_usage = body.stream_options is not None and body.stream_options.include_usage
    return Wish(asked=asked, is_chat=is_chat, streams=bool(body.stream), tells_usage=tells_usage)


def _prompts(prompt: str | Sequence[Any]) -> tuple[str | tuple[int, ...], ...]:
    """One prompt, or several: texts, or lists of tokens."""
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise bad("prompt is an empty list.", "prompt")
    if isinstance(prompt[0], int):
        return (tuple(prompt),)
    return tuple(one if isinstance(one, str) else tuple(one) for one in prompt)


def _of_validation(error: ValidationError) -> Exception:
    """The first problem, in OpenAI's way to name places: messages[0].content."""
    problem = error.errors(include_url=False, include_context=False)[0]
    place = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier():  # others are names of pydantic for a choice of types
            place += f".{part}" if place else part
    if place.split(".")[0].split("[")[0] == "prompt":
        return bad("prompt is expected to be a text, a list of texts, a list of tokens or a list of such lists.", "prompt")
    if problem["type"] == "missing":
        return bad(f"{place} is missing.", place)
    if problem["type"] == "extra_forbidden":
        return bad(f"{place} is a parameter that this endpoint does not know. Leave it out.", place, "unknown_parameter")
    return bad(f"{place}: {problem['msg'][:1].lower()}{problem['msg'][1:]}.", place)
