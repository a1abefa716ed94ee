"""An engine answers many requests at once, each as plain transformers and PEFT answer it alone."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.plan.serving import SPARE_COLUMNS, EngineLimits
from raytune.serving.engine import AnsweringEngine
from raytune.serving.requests import Request
from tests.served import (
    BASES,
    LONGEST,
    Arrival,
    Plain,
    all_plain,
    asked,
    expect,
    play,
    prompts,
    save_adapter,
    save_base,
)
from tests.tiny import PATIENT
from tests.variants import variants

FEW = EngineLimits(most_at_once=5, most_waiting=40, most_cached_tokens=5 * (LONGEST + 40 + SPARE_COLUMNS), most_prefilled=16)
"""So few that requests wait for each other, and long prompts are read in parts."""
NAMES = ("base", "first", "second", "third")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_base(folder / "base", "llama")
    for name in (*NAMES[1:], "prompt", "prefix", "biases"):
        save_adapter(folder / name, folder / "base", name)
    return folder


@pytest.fixture(scope="module")
def plain(saved: Path) -> dict[str, Plain]:
    return all_plain(saved, {name: of(saved, name) for name in (*NAMES, "prompt", "prefix")})


def of(saved: Path, name: str) -> Any:
    return asked(saved / "base", None if name == "base" else saved / name, can_pad=name not in ("prompt", "prefix"))


@pytest.fixture(scope="module")
def engine(saved: Path) -> Iterator[AnsweringEngine]:
    with AnsweringEngine({name: of(saved, name) for name in NAMES}, limits=FEW) as one:
        yield one


def request(number: int, *, model: str = "base", prompt: int = 0, max_new_tokens: int = LONGEST, **fields: Any) -> Request:
    return Request(id=str(number), model=model, prompt=prompts()[prompt], max_new_tokens=max_new_tokens, **fields)


@st.composite
def schedules(draw: st.DrawFn) -> list[Arrival]:
    found: list[Arrival] = []
    for number in range(draw(st.integers(1, 12))):
        after = st.none() if not found else st.none() | st.tuples(st.integers(0, len(found) - 1), st.integers(1, 12))
        found.append(
            Arrival(
                request(
                    number,
                    model=draw(st.sampled_from(NAMES)),
                    prompt=draw(st.integers(0, len(prompts()) - 1)),
                    max_new_tokens=draw(st.integers(1, LONGEST)),
                    num_logprobs=draw(st.sampled_from([None, 0, 2])),
                ),
                draw(after),
            )
        )
    return found


@PATIENT
@given(schedules())
def test_requests_that_come_and_go_are_answered_as_each_is_alone(
    engine: AnsweringEngine, plain: dict[str, Plain], arrivals: list[Arrival]
) -> None:
    for arrival, heard in zip(arrivals, play(engine, arrivals), strict=True):
        expect(heard, arrival.request, plain[arrival.request.model])


@pytest.mark.parametrize("name", variants(list(BASES), []))
def test_models_of_every_kind_write_what_plain_transformers_write(tmp_path: Path, name: str) -> None:
    base = save_base(tmp_path / "base", name)
    plain = Plain(base)
    arrivals = [
        Arrival(
            request(place, prompt=place % 8, max_new_tokens=LONGEST - place, num_logprobs=0),
            None if place < 4 else (place - 4, 3),
        )
        for place in range(10)
    ]
    with AnsweringEngine({"base": asked(base)}, limits=FEW) as engine:
        for arrival, heard in zip(arrivals, play(engine, arrivals), strict=True):
            expect(heard, arrival.request, plain)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_prompt_in_front_is_served_beside_its_base(saved: Path, plain: dict[str, Plain], name: str) -> None:
    arrivals = [
        Arrival(request(place, model=("base", name)[place % 2], prompt=place), None if place < 4 else (place - 4, 3))
        for place in range(8)
    ]
    with AnsweringEngine({each: of(saved, each) for each in ("base", name)}, limits=FEW) as engine:
        for arrival, heard in zip(arrivals, play(engine, arrivals), strict=True):
            expect(heard, arrival.request, plain[arrival.request.model])
