"""A range test of learning rates as arithmetic, and how its suggestion gets into a file."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.load import load_with_places
from raytune.config.reading.rate_in_file import file_for_rate, write_rate
from raytune.config.sections.run import RunConfig
from raytune.config.yaml_nodes import with_value
from raytune.errors import UserError
from raytune.plan.rates.rate_advice import advise_rate
from raytune.plan.rates.rate_range import RangeOptions, RateRange, cautions, reason_to_stop, smoothed
from tests.tiny import PATIENT

TRIED = RateRange(low=1e-6, high=1.0, num_steps=100)
NOISE = [0.05 * math.sin(7.3 * step * step) for step in range(100)]
LOSSES = st.lists(st.floats(0.01, 100), min_size=1, max_size=60)


@PATIENT
@given(st.floats(1e-9, 1e-2), st.floats(1.5, 1e6), st.integers(20, 300), st.sampled_from(["exponential", "linear"]))
def test_rates_rise_from_the_first_to_the_last_by_equal_steps(low: float, factor: float, num_steps: int, shape) -> None:
    tried = RateRange(low=low, high=low * factor, num_steps=num_steps, shape=shape)
    rates = [tried.rate(step) for step in range(num_steps)]
    assert (rates[0], rates[-1]) == (tried.low, tried.high)
    middles = [(math.log(a), math.log(b), math.log(c)) if shape == "exponential" else (a, b, c)
               for a, b, c in zip(rates, rates[1:], rates[2:])]  # fmt: skip
    for before, here, after in middles:
        assert here == pytest.approx((before + after) / 2, rel=1e-9, abs=1e-9)


@PATIENT
@given(LOSSES, st.floats(0, 0.99))
def test_smoothed_losses_are_weighted_means_of_the_losses_so_far(losses: list[float], smoothing: float) -> None:
    for end, average in enumerate(smoothed(losses, smoothing), 1):
        weights = [smoothing ** (end - 1 - place) for place in range(end)]
        mean = sum(weight * loss for weight, loss in zip(weights, losses)) / sum(weights)
        assert average == pytest.approx(mean, rel=1e-6)  # 1 - smoothing^n loses digits where it is near 0


@PATIENT
@given(LOSSES, st.floats(1.01, 10))
def test_a_test_ends_where_the_smoothed_loss_passes_the_factor_and_wherever_it_is_not_finite(
    losses: list[float], factor: float
) -> None:
    tried = TRIED.model_copy(update={"stop_factor": factor})
    averages = smoothed(losses, tried.smoothing)
    assert (reason_to_stop(losses, tried) == "exploded") == (averages[-1] > factor * min(averages))
    assert {reason_to_stop([*losses, last], tried) for last in (math.nan, math.inf)} == {"not finite"}
    assert reason_to_stop([], tried) is None


@pytest.mark.parametrize("offset", [0.0, -3.0, -6.0, -12.0])
def test_a_loss_that_falls_below_0_is_tried_to_where_it_explodes_and_advised_on_as_any_other(offset: float) -> None:
    losses = [loss + offset for loss in curve(-3.5, -1)]
    assert {reason_to_stop(losses[:end], TRIED) for end in range(1, len(losses))} == {None}
    far = next(end for end in range(1, 200) if reason_to_stop([*losses, *[30.0] * end], TRIED))
    assert far < 20
    advice, above_0 = advise_rate(losses, TRIED), advise_rate(curve(-3.5, -1), TRIED)
    assert (advice.verdict, advice.steepest, advice.safe) == (above_0.verdict, above_0.steepest, above_0.safe)


def curve(falls: float, rises: float | None) -> list[float]:
    """A loss of 6 that falls to 2 around a rate and rises to 7 around another."""
    losses = []
    for step, noise in enumerate(NOISE):
        place = math.log10(TRIED.rate(step))
        fall = 4 / (1 + math.exp(-4 * (place - falls)))
        rise = 0 if rises is None else 5 / (1 + math.exp(-8 * (place - rises)))
        losses.append(6 - fall + rise + noise)
    return losses


def test_the_rate_of_the_steepest_descent_is_named_and_a_safe_one_below_it() -> None:
    advice = advise_rate(curve(-3.5, -1), TRIED)
    assert advice.steepest is not None
    assert advice.safe is not None
    assert advice.lowest is not None
    # The smoothed loss lags by 9 steps of 0.06 decades each.
    assert 10**-3.5 <= advice.steepest <= 10**-2.7
    assert advice.safe <= min(advice.steepest, 0.1 * advice.lowest * 1.05)


@pytest.mark.parametrize(
    ("losses", "verdict", "words"),
    [
        ([6 + noise for noise in NOISE], "flat", "no rate moved it"),
        (curve(0.0, None), "still falling", "Go on further \\(--high"),
        (curve(9.0, -3.0), "only rises", "No rate made the loss fall"),
        ([6.0, 40.0], "exploded at once", "Begin lower"),
        ([6.0, 7.0, math.nan], "exploded at once", "no longer finite within 3 steps"),
        ([6.0] * 50 + [math.nan], "only rises", "no longer finite"),
    ],
)
def test_a_curve_that_says_nothing_names_no_rate_and_says_why(losses: list[float], verdict: str, words: str) -> None:
    advice = advise_rate(losses, TRIED)
    assert (advice.verdict, advice.steepest, advice.safe) == (verdict, None, None)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(advice.words)


@pytest.mark.parametrize("high", [1e-3, 1.0, 100.0])
def test_a_curve_that_still_falls_is_sent_on_to_a_higher_rate(high: float) -> None:
    tried = TRIED.model_copy(update={"high": high})
    words = advise_rate([6.0 - 0.05 * step for step in range(100)], tried).words
    assert "still falling" in words
    assert float(words.partition("--high ")[2].rstrip(").")) > high


@PATIENT
@given(st.lists(st.floats(0.01, 100) | st.just(math.nan), min_size=1, max_size=100))
def test_no_edge_of_the_range_is_ever_suggested(losses: list[float]) -> None:
    end = next((place for place, loss in enumerate(losses, 1) if math.isnan(loss)), len(losses))
    advice = advise_rate(losses[:end], TRIED)
    assert (advice.steepest is None) == (not advice.is_found)
    assert advice.steepest is None or TRIED.low < advice.steepest < TRIED.rate(end - 1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"low": 0.0}, "--low is 0"),
        ({"low": 1e-2, "high": 1e-3}, "above that of --low"),
        ({"high": math.inf}, "--high is inf"),
        ({"num_steps": 5}, "--steps is 5, expected at least 20"),
        ({"smoothing": 1.0}, "--smoothing is 1"),
        ({"stop_factor": 1.0}, "--stop-factor is 1"),
    ],
)
def test_a_range_that_cannot_be_tried_is_refused_by_the_name_of_its_option(asked: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RangeOptions(**asked).around(2e-4)


def test_a_range_lies_around_the_usual_rate_of_the_method() -> None:
    tried = RangeOptions().around(2e-4)
    assert (tried.low, tried.high) == (2e-7, 2e-2)


def test_a_range_that_is_known_to_mislead_is_tried_with_a_caution() -> None:
    usual, long = RangeOptions().around(2e-4), RangeOptions(num_steps=3000).around(2e-4)
    assert cautions(usual, num_epochs=1.0, num_steps_of_run=1000) == ()
    (steps,) = cautions(long, num_epochs=1.0, num_steps_of_run=5000)
    (epochs,) = cautions(usual, num_epochs=7.0, num_steps_of_run=1000)
    (run,) = cautions(usual, num_epochs=1.0, num_steps_of_run=20)
    assert "3000 steps are a training run" in steps
    assert "7.0 times" in epochs
    assert "The run has 20 steps, and the test 100" in run


FILES = [
    ("# c\nname: a\n", "# c\nname: a\ntraining:\n  learning_rate: 2.0e-04\n"),
    ("training:\n  # c\n  max_steps: 5\n", "training:\n  learning_rate: 2.0e-04\n  # c\n  max_steps: 5\n"),
    ("training:\n    learning_rate: 1e-4  # c\nname: a", "training:\n    learning_rate: 2.0e-04  # c\nname: a"),
    ("training: {max_steps: 5}\n", "training: {learning_rate: 2.0e-04, max_steps: 5}\n"),
    ("training: # c\nname: a\n", "training: # c\n  learning_rate: 2.0e-04\nname: a\n"),
    ("{name: a}\n", "{training: {learning_rate: 2.0e-04}, name: a}\n"),
    ("training:\r\n  learning_rate: auto\r\nname: a\r\n", "training:\r\n  learning_rate: 2.0e-04\r\nname: a\r\n"),
]


@pytest.mark.parametrize(("before", "after"), FILES)
def test_a_rate_is_written_and_no_other_character_changes(before: str, after: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(before.encode())
    file.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    applied = write_rate(str(link), 2e-4)
    assert file.read_bytes().decode() == after == with_value(before, "training", "learning_rate", "2.0e-04")
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    assert "-> 2.0e-04" in applied.sentence
    assert load_with_places([str(file)])[0].training.learning_rate == 2e-4


@pytest.mark.parametrize(
    "text",
    [
        "training: &t {learning_rate: &r 1e-3}\nsweep: {space: {training.min_lr_ratio: [*r]}}\n",
        "seed: &s 3\ntraining: {learning_rate: *s}\n",
    ],
)
def test_a_file_whose_anchors_would_change_more_is_left_as_it_is(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises((UserError,), match="cannot be changed in without changing more"):
        write_rate(str(file), 2e-4)
    assert file.read_text() == text


def target_of(files: list[str], overrides: Sequence[str] = ()) -> str:
    config, places = load_with_places(files, overrides)
    return file_for_rate(files, places, config)


def test_a_rate_that_would_not_count_is_refused_with_its_place(tmp_path: Path) -> None:
    run, over, sweep = tmp_path / "run.yaml", tmp_path / "over.yaml", tmp_path / "sweep.yaml"
    run.write_text("training:\n  learning_rate: 1e-4\n")
    over.write_text("training:\n  learning_rate: 1e-3\n")
    sweep.write_text("name: s\nsweep:\n  space:\n    training.learning_rate: [1e-4, 1e-3]\n")
    cases = [
        ([run, over], [], "over.yaml:2:"),
        ([run], ["training.learning_rate=1e-2"], "command line"),
        ([sweep], ["sweep=null"], "sweep.yaml:4"),
    ]
    for files, overrides, place in cases:
        names = [str(file) for file in files]
        with pytest.raises(UserError, match=place):
            target_of(names, overrides)
    run.write_text(
        "adapter: {method: full}\nstrategy:\n  unfreeze:\n"
        "    - {last_layers: 1, learning_rate: 1e-3}\n    - {last_layers: all, from_step: 3}\n"
    )
    with pytest.raises(UserError, match="Leave --apply out"):
        target_of([str(run)])
    assert (
        load_with_places([str(run)], ["strategy.unfreeze.0.learning_rate=2.0e-4"])[0].strategy.unfreeze[0].learning_rate == 2e-4
    )
    run.write_text("training:\n  learning_rate: 1e-4\n")
    with pytest.raises(UserError, match="none is given"):
        file_for_rate([], {}, RunConfig())
    assert target_of([str(run)]) == str(run)
