"""An engine answers many requests at once, each as plain transformers and PEFT answer it alone."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune.errors import ModelError, UserError
from raytune.evaluation.generation import write_answers
from raytune.plan.run_plan import SamplingPlan
from raytune.plan.saved.serving import SPARE_COLUMNS, EngineLimits
from raytune.serving.engine import AnsweringEngine
from raytune.serving.refusals import (
    AnswerFailedError,
    EngineDeadError,
    FullError,
    NotKnownError,
    TooLongError,
    UnfitError,
)
from raytune.serving.requests import Piece, Request
from tests.served import (
    BASES,
    LAYERS_WITH_STATES,
    LONGEST,
    PATIENCE_S,
    STOPS,
    Arrival,
    Heard,
    Plain,
    all_plain,
    asked,
    expect,
    play,
    prompts,
    save_adapter,
    save_base,
)
from tests.tiny import PATIENT, save_tiny_model, tiny_tokenizer
from tests.variants import variants

FEW = EngineLimits(most_at_once=5, most_waiting=40, most_cached_tokens=5 * (LONGEST + 40 + SPARE_COLUMNS), most_prefilled=16)
"""So few that requests wait for each other, and long prompts are read in parts."""
NAMES = ("base", "first", "second", "third")
OFTEN = ("gpt2, which has absolute positions", "gemma3, some of whose layers have a window", "lfm2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_base(folder / "base", "llama")
    for name in (*NAMES[1:], "prompt", "prefix", "biases"):
        save_adapter(folder / name, folder / "base", name)
    return folder


@pytest.fixture(scope="module")
def plain(saved: Path) -> dict[str, Plain]:
    return all_plain({name: of(saved, name) for name in (*NAMES, "prompt", "prefix")})


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
    for number in range(draw(st.integers(1, 9))):
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


@settings(PATIENT, max_examples=settings().max_examples // 2)
@given(schedules())
def test_requests_that_come_and_go_are_answered_as_each_is_alone(
    engine: AnsweringEngine, plain: dict[str, Plain], arrivals: list[Arrival]
) -> None:
    for arrival, heard in zip(arrivals, play(engine, arrivals), strict=True):
        expect(heard, arrival.request, plain[arrival.request.model])


@pytest.mark.parametrize("name", variants(OFTEN, [name for name in BASES if name not in OFTEN]))
def test_models_of_every_kind_write_what_plain_transformers_write(tmp_path: Path, name: str) -> None:
    base = save_base(tmp_path / "base", name)
    plain = Plain(base)
    arrivals = [
        Arrival(
            request(place, prompt=place % 8, max_new_tokens=LONGEST - place, num_logprobs=0),
            None if place < 4 else (place - 4, 3),
        )
        for place in range(7)
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


def asked_alone(engine: AnsweringEngine, one: Request) -> Heard:
    heard = Heard()
    engine.submit(one, heard)
    return heard.wait()


def until(is_so: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < ends, "it never came to that"
        time.sleep(0.005)


def test_what_is_drawn_depends_on_the_request_alone(engine: AnsweringEngine, plain: dict[str, Plain]) -> None:
    drawn: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 20}
    ones = [request(place, model=NAMES[place % 4], prompt=place, seed=place % 3, **drawn) for place in range(8)]
    together = play(engine, [Arrival(one, None if place < 5 else (place - 5, 2)) for place, one in enumerate(ones)])
    for one, heard in zip(ones, together, strict=True):
        written = write_answers(
            plain[one.model].model,
            tiny_tokenizer(),
            [one.prompt],
            max_new_tokens=LONGEST,
            batch_size=1,
            sampling=SamplingPlan(seed=one.seed or 0, **drawn),
            rows=[0],
        )
        assert heard.text == asked_alone(engine, one).text == written[0].text
    assert together[0].text != asked_alone(engine, request(0, seed=7, **drawn)).text
    free = {asked_alone(engine, request(0, temperature=1.5)).text for _ in range(4)}
    assert len(free) > 1, "without a seed it is drawn anew each time"


@torch.no_grad()
def test_log_probabilities_are_those_of_the_model(engine: AnsweringEngine, plain: dict[str, Plain]) -> None:
    one = request(0, model="second", prompt=3, temperature=0.5, seed=1, num_logprobs=2)
    tokens = asked_alone(engine, one).tokens
    ids = [token.id for token in tokens]
    logits = plain["second"].model(torch.tensor([[*one.prompt, *ids]])).logits[0, len(one.prompt) - 1 : -1]
    assert len(tokens) > 3
    for token, logits_V in zip(tokens, logits, strict=True):
        log_probabilities = logits_V.log_softmax(-1)
        assert token.logprob == pytest.approx(log_probabilities[token.id].item(), abs=1e-4)  # of sums in another order
        assert [other for other, *_ in token.likeliest] == log_probabilities.topk(2).indices.tolist()


def test_a_cancelled_request_leaves_at_once_and_others_stay_as_they_are(engine: AnsweringEngine, plain: dict[str, Plain]) -> None:
    ones = [request(place, prompt=place, model=NAMES[place % 2]) for place in range(8)]
    heard = [Heard() for _ in ones]

    def told(place: int, what: Any) -> None:
        heard[place](what)
        if place == 0:
            engine.cancel("1")  # which runs
            engine.cancel("7")  # which waits
            engine.cancel("nobody")

    for place, one in enumerate(ones):
        engine.submit(one, lambda what, place=place: told(place, what))
    for place, one in enumerate(ones):
        heard[place].wait()
        if place in (1, 7):
            assert heard[place].finish == "cancelled"
            assert heard[place].pieces[-1].num_tokens < LONGEST
        else:
            expect(heard[place], one, plain[one.model])
    assert heard[7].pieces == [Piece(text="", num_tokens=0, finish="cancelled")]


def test_memory_returns_when_rows_leave(saved: Path) -> None:
    with AnsweringEngine({"base": of(saved, "base")}, limits=FEW) as engine:
        most = 0

        def told(what: Piece | Exception) -> None:
            nonlocal most
            most = max(most, engine.state.cached_tokens)

        for place in range(8):
            engine.submit(request(place, prompt=place), told)
        until(lambda: engine.state.num_finished == 8 and not engine.state.cached_tokens)
        assert 0 < most <= FEW.most_cached_tokens
        state = engine.state
        assert (state.num_failed, state.num_waiting, state.num_running) == (0, 0, 0)
        assert state.num_prefilled == sum(map(len, prompts()))
        assert not any(lane.batches for lane in engine._lanes)


def test_what_cannot_be_answered_is_refused_at_once(saved: Path) -> None:
    limits = EngineLimits(most_at_once=1, most_waiting=1, most_cached_tokens=200)
    release = threading.Event()
    with AnsweringEngine({"base": of(saved, "base")}, limits=limits) as engine:
        with pytest.raises(NotKnownError, match="no model 'other' here; there are: base"):
            engine.submit(request(0, model="other"), print)
        with pytest.raises(TooLongError, match="at most 136, for which there is memory"):
            engine.submit(request(0, max_new_tokens=136), print)
        senseless: tuple[tuple[dict[str, Any], str], ...] = (
            ({"max_new_tokens": 0}, "max_new_tokens is 0"),
            ({"temperature": -1.0}, "temperature is -1.0"),
            ({"temperature": float("nan")}, "temperature is nan"),
            ({"top_p": 0.0}, "top_p is 0"),
            ({"top_k": 0}, "top_k is 0"),
            ({"stop": ("",)}, "stop is empty"),
        )
        for fields, words in senseless:
            with pytest.raises(UserError, match=words):
                engine.submit(request(0, **fields), print)
        for prompt, words in (((), "prompt is empty"), ((5, 259), "none of the 259")):
            with pytest.raises(UserError, match=words):
                engine.submit(Request(id="0", model="base", prompt=prompt, max_new_tokens=1), print)
        first, second = Heard(), Heard()

        def slow(what: Piece | Exception) -> None:
            assert release.wait(PATIENCE_S)
            first(what)

        engine.submit(request(0), slow)
        with pytest.raises(UserError, match="id '0' is being answered"):
            engine.submit(request(0), print)
        engine.submit(request(1), second)
        with pytest.raises(FullError, match="no more than 2 may"):
            engine.submit(request(2), print)
        release.set()
        assert first.wait().finish
        assert second.wait().finish
        assert asked_alone(engine, request(2)).finish
    with pytest.raises(EngineDeadError, match="closed"):
        engine.submit(request(3), print)


def test_positions_of_the_model_end_an_answer_before_it_begins(tmp_path: Path) -> None:
    with AnsweringEngine({"base": asked(save_base(tmp_path / "base", "gpt2, which has absolute positions"))}) as engine:
        assert engine.longest("base") == 256
        with pytest.raises(TooLongError, match="at most 256, which is what the model has positions for"):
            engine.submit(request(0, max_new_tokens=256), print)
        assert len(asked_alone(engine, request(0, max_new_tokens=255)).text) > 0


def test_adapters_come_and_go_while_others_are_answered(saved: Path, plain: dict[str, Plain], tmp_path: Path) -> None:
    moving = tmp_path / "moving"
    shutil.copytree(saved / "first", moving)
    over = asked(saved / "base", moving)
    with AnsweringEngine({"base": of(saved, "base"), "second": of(saved, "second")}, limits=FEW) as engine:
        stop, heard = threading.Event(), []

        def keep_asking() -> None:
            while not stop.is_set():
                ones = [request(place, model=("base", "second")[place % 2], prompt=place) for place in range(4)]
                heard.extend(zip(ones, play(engine, [Arrival(one) for one in ones]), strict=True))

        thread = threading.Thread(target=keep_asking)
        thread.start()
        try:
            for name in ("first", "third", "first"):
                shutil.rmtree(moving)
                shutil.copytree(saved / name, moving)
                engine.load("moving", over)
                assert [*engine.models] == ["base", "second", "moving"]
                with pytest.raises(UnfitError, match="'moving' already"):
                    engine.load("moving", over)
                last = Heard()
                engine.submit(request(9, model="moving", prompt=2), last)
                engine.unload("moving")
                with pytest.raises(NotKnownError):
                    engine.submit(request(10, model="moving"), print)
                expect(last.wait(), request(9, prompt=2), plain[name])
        finally:
            stop.set()
            thread.join()
        engine.unload("second")
        until(lambda: len(engine._lanes) == 1)
        expect(asked_alone(engine, request(0, prompt=4)), request(0, prompt=4), plain["base"])
    assert len(heard) >= 4
    for one, answer in heard:
        expect(answer, one, plain[one.model])


def test_a_model_that_does_not_fit_is_refused_and_nothing_else_is_disturbed(
    saved: Path, plain: dict[str, Plain], tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "wider", hidden_size=64)
    shutil.copytree(saved / "first", tmp_path / "of another")
    (tmp_path / "of another" / "base_content.json").write_text(json.dumps({"config.json": "0" * 32}))
    shutil.copytree(saved / "first", tmp_path / "torn")
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    (tmp_path / "empty").mkdir()
    base = saved / "base"
    with AnsweringEngine({"base": of(saved, "base"), "first": of(saved, "first")}, limits=FEW) as engine:
        for one, words in (
            (asked(tmp_path / "wider"), r"another base.*Merge it into its base .*or serve it alone"),
            (of(saved, "prompt"), "only LoRA in layers share a base"),
            (of(saved, "biases"), "only LoRA in layers share a base"),
            (asked(base, tmp_path / "of another"), "was trained on another base than"),
            (asked(base, tmp_path / "torn"), "cannot be put on"),
            (asked(base, tmp_path / "empty"), "cannot be read"),
        ):
            with pytest.raises(ModelError, match=words):
                engine.load("other", one)
            answer = request(0, model="first", prompt=5)
            expect(asked_alone(engine, answer), answer, plain["first"])
        assert [*engine.models] == ["base", "first"]
        assert engine.state.num_failed == 0
    states = save_base(tmp_path / "states", LAYERS_WITH_STATES)
    with pytest.raises(UnfitError, match="keeps the states of an answer in its layers"):
        AnsweringEngine({"states": asked(states)})
    with pytest.raises(UnfitError, match="changes the base itself"):
        AnsweringEngine({"base": of(saved, "base"), "biases": of(saved, "biases")})
    with AnsweringEngine({"biases": of(saved, "biases")}) as engine:
        answer = request(0, model="biases", prompt=5)
        expect(asked_alone(engine, answer), answer, Plain(base, saved / "biases"))


def test_a_model_without_numbers_fails_its_own_requests(saved: Path, plain: dict[str, Plain], tmp_path: Path) -> None:
    broken = save_adapter(tmp_path / "broken", saved / "base", "first", std=float("nan"))
    models = {"base": of(saved, "base"), "broken": asked(saved / "base", broken), "second": of(saved, "second")}
    with AnsweringEngine(models, limits=FEW) as engine:
        ones = [request(place, model=[*models][place % 3], prompt=place % 8) for place in range(9)]
        for one, heard in zip(ones, play(engine, [Arrival(one) for one in ones]), strict=True):
            if one.model == "broken":
                assert isinstance(heard.error, AnswerFailedError)
                assert "gives no numbers" in str(heard.error)
            else:
                expect(heard, one, plain[one.model])
        assert (engine.state.num_failed, engine.state.num_finished) == (3, 6)


def test_a_forward_pass_that_raises_fails_those_in_it_and_no_others(saved: Path, plain: dict[str, Plain]) -> None:
    with AnsweringEngine({name: of(saved, name) for name in ("base", "first")}, limits=FEW) as engine:
        lane: Any = engine._models["first"]
        whole = lane._windows
        lane._windows = [None]  # a cache with fewer layers than the model
        ones = [request(place, model=("base", "first")[place % 2], prompt=place) for place in range(6)]
        for one, heard in zip(ones, play(engine, [Arrival(one) for one in ones]), strict=True):
            if one.model == "first":
                assert isinstance(heard.error, AnswerFailedError)
                assert "first could not go on with an answer: IndexError" in str(heard.error)
            else:
                expect(heard, one, plain["base"])
        lane._windows = whole
        expect(asked_alone(engine, ones[1]), ones[1], plain["first"])


def test_everybody_hears_of_the_end_of_the_thread(saved: Path) -> None:
    with AnsweringEngine({"base": of(saved, "base")}, limits=FEW) as engine:
        heard = [Heard() for _ in range(8)]

        def dies(what: Piece | Exception) -> None:
            raise SystemExit("out of a delivery")

        for place, one in enumerate(heard):
            engine.submit(request(place), dies if place == 3 else one)
        for place, one in enumerate(heard):
            if place != 3:
                one.wait()
                assert isinstance(one.error, EngineDeadError) or one.finish
        assert any(isinstance(one.error, EngineDeadError) for one in heard)
        assert not engine.state.is_alive
        for late in (lambda: engine.submit(request(9), print), lambda: engine.load("other", of(saved, "first"))):
            with pytest.raises(EngineDeadError, match="has ended: SystemExit: out of a delivery"):
                late()


def test_a_listener_that_raises_is_let_go(saved: Path, plain: dict[str, Plain]) -> None:
    with AnsweringEngine({"base": of(saved, "base")}, limits=FEW) as engine:

        def raises(what: Piece | Exception) -> None:
            raise ValueError("of the listener")

        engine.submit(request(0), raises)
        expect(asked_alone(engine, request(1)), request(1), plain["base"])
        until(lambda: engine.state.num_cancelled == 1)


def test_a_burst_for_one_model_does_not_keep_another_waiting(engine: AnsweringEngine) -> None:
    ended: list[int] = []
    ones = [*(request(place, prompt=1) for place in range(30)), request(30, model="third", prompt=1)]
    heard = [Heard() for _ in ones]

    def told(place: int, what: Any) -> None:
        heard[place](what)
        if heard[place].over.is_set():
            ended.append(place)

    for place, one in enumerate(ones):
        engine.submit(one, lambda what, place=place: told(place, what))
    for one in heard:
        one.wait()
    assert ended.index(30) < 15


@pytest.mark.parametrize(
    "settings",
    variants(
        [{"repetition_penalty": 3.0, "min_new_tokens": 12}, {"stop_strings": ["k", "Q"]}],
        [
            {"no_repeat_ngram_size": 2},
            {"suppress_tokens": [237, 62], "begin_suppress_tokens": [60]},
            {"do_sample": True, "temperature": 0.3, "top_k": 3},
        ],
    ),
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_a_model_are_obeyed_as_its_generate_obeys_them(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base", "llama", **settings)
    plain, own = Plain(base), {"tokenizer": tiny_tokenizer()} if "stop_strings" in settings else {}
    ones = [request(place, prompt=place) for place in range(8)]
    with AnsweringEngine({"base": asked(base)}, limits=FEW) as engine:
        for one, heard in zip(ones, play(engine, [Arrival(one) for one in ones]), strict=True):
            ids = plain.ids(one.prompt, LONGEST, **own)
            assert heard.pieces[-1].num_tokens == len(ids)
            ids = ids[:-1] if ids[-1] in STOPS else ids
            assert heard.text == tiny_tokenizer().decode([each for each in ids if each < 256])


def test_a_text_of_stop_ends_an_answer_and_is_no_part_of_it(engine: AnsweringEngine, plain: dict[str, Plain]) -> None:
    whole: Any = tiny_tokenizer().decode([one for one in plain["base"].ids(prompts()[3], LONGEST) if one < 256])
    for place in range(1, len(whole) - 1, 4):
        heard = asked_alone(engine, request(0, prompt=3, stop=(whole[place : place + 2], "never")))
        assert heard.text == whole[: whole.index(whole[place : place + 2])]
        assert heard.finish == "stop"


_LITTLE_MEMORY = """
import resource, sys, torch
from pathlib import Path
from raytune.plan.saved.serving import EngineLimits
from raytune.serving.engine import AnsweringEngine
from raytune.serving.requests import Request
from tests.served import Heard, asked

torch.set_num_threads(1)
with AnsweringEngine({"base": asked(Path(sys.argv[1]))}, limits=EngineLimits(most_prefilled=10_000)) as engine:
    def ask(number, length):
        heard = Heard()
        ids = tuple(number + place % 200 for place in range(length))
        engine.submit(Request(id=str(number), model="base", prompt=ids, max_new_tokens=6), heard)
        return heard
    alone = [ask(number, 900).wait().text for number in range(8)]
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 150 * 2**20, now + 150 * 2**20))
    together = [heard.wait().text for heard in [ask(number, 900) for number in range(8)]]
    assert together == alone, (together, alone)
    fewest = engine._most_now
    large = ask(8, 9_000).wait()
    print(fewest < 32, type(large.error).__name__, large.error, ask(9, 20).wait().finish)
"""


@pytest.mark.slow
def test_too_little_memory_makes_batches_smaller_and_then_fails_what_does_not_fit_alone(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", num_key_value_heads=4, head_dim=512, max_position_embeddings=10_000)
    command = [sys.executable, "-c", _LITTLE_MEMORY, str(tmp_path / "base")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.splitlines()[-1]
    assert said.startswith("True AnswerFailedError base could not go on with an answer: there is too little memory"), said
    assert said.endswith(("length", "stop"))
    assert "Too little memory for" in ended.stderr


def test_a_long_prompt_keeps_nobody_waiting(saved: Path, plain: dict[str, Plain]) -> None:
    long = Request(id="long", model="base", prompt=prompts()[5] * 8, max_new_tokens=2)
    ones = [request(0), long, request(2, prompt=1, max_new_tokens=4)]
    ended: list[int] = []
    with AnsweringEngine({"base": of(saved, "base")}, limits=EngineLimits(most_prefilled=8)) as engine:
        heard = [Heard() for _ in ones]

        def told(place: int, what: Any) -> None:
            heard[place](what)
            if heard[place].over.is_set():
                ended.append(place)

        for place, one in enumerate(ones):
            engine.submit(one, lambda what, place=place: told(place, what))
        for one, each in zip(ones, heard, strict=True):
            expect(each.wait(), one, plain["base"])
    assert ended[-1] == 1
    assert len(long.prompt) // 8 > LONGEST, "else it would be read before the first is over"
