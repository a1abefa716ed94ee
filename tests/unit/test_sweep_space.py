"""Claims about points of a search space: drawn once and for all, inside their ranges, and every corner a valid config."""

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from raytune.cli import cli
from raytune.config.checks.space import holds
from raytune.config.load import ConfigError, config_from, load_with_places
from raytune.config.reading.keys import keys
from raytune.config.sections.run import RunConfig
from raytune.config.sections.sweep import KINDS
from raytune.sweeps.axes import RandomChooser
from raytune.sweeps.space import (
    MAX_CORNERS,
    check_space,
    corners,
    draw,
    run_value,
    space_of,
    trial_config,
    trials_of,
)
from raytune.sweeps.trial import Trial

SPACE = {
    "adapter.rank": [4, 8, 16, 32],
    "adapter.alpha": "2 * adapter.rank",
    "training.learning_rate": {"log_uniform": [3e-4, 3e-2]},
    "adapter.dropout": {"uniform": [0, 0.2], "step": 0.05},
    "training.global_batch_size": {"integer": [4, 18], "step": 4},
    "training.seed": {"log_integer": [1, 100]},
    "training.weight_decay": {"uniform": [0, 0.1]},
    "adapter.lora_plus_ratio": {"choice": [4.0, 16.0], "when": "adapter.rank >= 16"},
}


def sweep(space: dict[str, Any], run: dict[str, Any] | None = None, **rest: Any) -> RunConfig:
    return config_from({"data": {"validation": "demo:validation"}, **(run or {}), "sweep": {"space": space, **rest}})


def points(run: RunConfig) -> list[dict[str, Any]]:
    return [dict(trial.values) for trial in trials_of(run)]


# --- draws

OPTIONS = st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True)
ENDS = st.tuples(st.integers(1, 50), st.integers(51, 100)).map(list)
DIMENSIONS = {
    "adapter.rank": st.one_of(OPTIONS, st.fixed_dictionaries({"integer": ENDS}), st.fixed_dictionaries({"log_integer": ENDS})),
    "adapter.alpha": st.one_of(
        st.just("2 * adapter.rank"),
        st.fixed_dictionaries({"uniform": ENDS}),
        st.fixed_dictionaries({"log_uniform": ENDS}),
        st.fixed_dictionaries({"uniform": st.just([0.1, 1.07]), "step": st.sampled_from([0.1, 0.05, 0.03, 0.97])}),
    ),
    "training.max_steps": st.one_of(st.fixed_dictionaries({"integer": ENDS, "step": st.integers(1, 1)}), OPTIONS),
    "training.logging_steps": st.fixed_dictionaries({"choice": OPTIONS, "when": st.just("adapter.rank > 20")}),
}
SPACES = st.fixed_dictionaries({}, optional=DIMENSIONS).filter(bool)


@given(SPACES, st.integers(0, 5), st.integers(1, 12), st.integers(1, 12))
def test_trials_are_a_function_of_space_and_seed_and_more_of_them_keep_the_first(space, seed: int, few: int, more: int):
    all_points = points(sweep(space, seed=seed, trials=few + more))
    assert all_points == points(sweep(space, seed=seed, trials=few + more))
    assert all_points[:few] == points(sweep(space, seed=seed, trials=few))
    assert len({str(point) for point in all_points}) == len(all_points)


@given(SPACES, st.integers(0, 10_000))
def test_every_drawn_value_is_one_that_its_dimension_has(space, seed: int):
    run = sweep(space)
    assert run.sweep is not None
    point = draw(space_of(run), RandomChooser(random.Random(seed)))
    assert list(point) == [key for key in space if key in point]
    for key, value in point.items():
        if run.sweep.space[key].kind != "expression":
            assert holds(run.sweep.space[key], value)
    assert ("training.logging_steps" in point) == (
        "training.logging_steps" in space and point.get("adapter.rank", 16) > 20
    )  # 16 is the rank of a run that says nothing
    if space.get("adapter.alpha") == "2 * adapter.rank":
        assert point["adapter.alpha"] == 2 * point.get("adapter.rank", 16)


def test_another_seed_gives_other_trials():
    assert points(sweep(SPACE, seed=1)) != points(sweep(SPACE, seed=2))


def test_values_on_a_grid_of_steps_are_as_short_as_they_were_written():
    drawn = {point["adapter.dropout"] for point in points(sweep(SPACE, trials=200))}
    assert drawn == {0.0, 0.05, 0.1, 0.15, 0.2}
    assert {point["training.global_batch_size"] for point in points(sweep(SPACE, trials=200))} == {4, 8, 12, 16}


def test_draws_cover_choices_steps_and_integers_evenly():
    generator, space = random.Random(0), space_of(sweep({**SPACE, "training.seed": {"integer": [1, 5]}}))
    drawn = [draw(space, RandomChooser(generator)) for _ in range(4000)]
    for key in ("adapter.rank", "adapter.dropout", "training.global_batch_size", "training.seed"):
        counts = Counter(point[key] for point in drawn)
        expected = len(drawn) / len(counts)
        # Five standard deviations of a binomial count.
        assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in counts.values()), (key, counts)


def test_log_ranges_are_even_in_the_logarithm():
    generator, space = random.Random(0), space_of(sweep(SPACE))
    drawn = [draw(space, RandomChooser(generator)) for _ in range(4000)]
    rates = [math.log(point["training.learning_rate"] / 3e-4) / math.log(100) for point in drawn]
    tenths = Counter(int(rate * 10) for rate in rates)
    assert all(abs(tenths[i] - 400) < 5 * 20 for i in range(10)), tenths
    small = sum(point["training.seed"] <= 10 for point in drawn)
    # From 0.5 to 10.5 of 0.5 to 100.5, in the logarithm.
    assert abs(small / 4000 - math.log(21) / math.log(201)) < 0.04


# --- points, grids, references


def test_first_points_come_first_and_the_keys_they_leave_out_are_drawn():
    first = [{"adapter.rank": 16, "training.learning_rate": 3e-3}, {"adapter.dropout": 0.1}]
    found = points(sweep(SPACE, first=first, trials=5))
    assert len(found) == 5
    assert (found[0]["adapter.rank"], found[0]["adapter.alpha"], found[0]["training.learning_rate"]) == (16, 32, 3e-3)
    assert found[1]["adapter.dropout"] == 0.1
    assert set(found[1]) >= {"adapter.rank", "adapter.alpha", "training.weight_decay"}


def test_a_grid_is_crossed_with_the_draws_of_the_others():
    space = {
        "adapter.rank": {"grid": [4, 8]},
        "training.seed": {"grid": [1, 2, 3]},
        "training.weight_decay": {"uniform": [0, 0.1]},
    }
    found = points(sweep(space, trials=2))
    assert [(point["adapter.rank"], point["training.seed"]) for point in found] == [(r, s) for r in (4, 8) for s in (1, 2, 3)] * 2
    assert len({point["training.weight_decay"] for point in found[:6]}) == 1
    assert len({point["training.weight_decay"] for point in found}) == 2
    assert found == points(sweep(space, trials=5))[:12]


def test_a_grid_alone_is_complete_whatever_the_number_of_trials():
    space = {"adapter.rank": {"grid": [4, 8]}, "adapter.alpha": "2 * adapter.rank"}
    assert points(sweep(space, trials=1)) == [
        {"adapter.rank": 4, "adapter.alpha": 8},
        {"adapter.rank": 8, "adapter.alpha": 16},
    ]


def test_a_small_space_is_tried_to_its_last_point_and_none_twice():
    space = {"training.seed": {"integer": [1, 20]}, "adapter.rank": list(range(1, 26))}
    found = points(sweep(space, trials=1000))
    assert {(point["training.seed"], point["adapter.rank"]) for point in found} == {
        (s, r) for s in range(1, 21) for r in range(1, 26)
    }
    assert len(found) == 500
    assert len(points(sweep({"training.seed": [1, 2]}, trials=16))) == 2


def test_expressions_see_other_keys_in_any_order_and_the_run():
    space = {
        "adapter.alpha": "adapter.rank * training.logging_steps",
        "adapter.rank": "training.max_steps // 4",
        "training.max_steps": [40],
    }
    (point,) = points(sweep(space, {"training": {"logging_steps": 3}}))
    assert point == {"adapter.alpha": 30, "adapter.rank": 10, "training.max_steps": 40}
    assert list(point) == list(space)


def test_a_key_that_is_not_drawn_has_the_value_of_the_run_for_expressions():
    space = {
        "adapter.rank": {"choice": [64], "when": "training.seed > 1"},
        "training.seed": [1, 2],
        "adapter.alpha": "adapter.rank",
    }
    found = {point["training.seed"]: point for point in points(sweep(space, {"adapter": {"rank": 8}}))}
    assert found[1] == {"training.seed": 1, "adapter.alpha": 8}
    assert found[2] == {"adapter.rank": 64, "training.seed": 2, "adapter.alpha": 64}


def test_a_value_of_the_run_is_plain_data():
    run = config_from({"adapter": {"method": "full"}, "checkpoint": {"every": "1h"}})
    assert (run_value(run, "checkpoint.every"), run_value(run, "data.train")[0]["path"]) == (3600, "demo:train")
    with pytest.raises(ValueError, match=r"adapter\.rank is not set in this run"):
        run_value(run, "adapter.rank")


# --- corners


@given(SPACES)
def test_corners_hold_every_option_and_both_ends_of_each_range(space):
    run = sweep(space)
    assert run.sweep is not None
    found = corners(space_of(run))
    for key, dimension in run.sweep.space.items():
        if dimension.kind == "expression" or dimension.when:
            continue
        extremes = getattr(dimension, dimension.kind)
        if dimension.step:
            low, high = extremes
            extremes = [low, max(x for k in range(200) if (x := round(low + k * dimension.step, 6)) <= high)]
        assert {point[key] for point in found} == set(extremes)


def test_corners_are_all_combinations_where_these_are_few():
    space = {key: SPACE[key] for key in ("adapter.rank", "adapter.alpha", "training.learning_rate", "adapter.lora_plus_ratio")}
    assert len(corners(space_of(sweep(space)))) == 2 * 2 + 2 * 2 * 2  # two ranks without a ratio, two with one of two


def test_corners_of_a_large_space_are_bounded_and_hold_every_extreme_with_conditional_ones():
    space: dict[str, Any] = {f"training.zero.overrides.key{i}": [0, 1, 2] for i in range(12)}
    space["adapter.lora_plus_ratio"] = {"choice": [4.0, 16.0], "when": "training.zero.overrides.key0 == 2"}
    found = corners(space_of(sweep(space)))
    assert len(found) <= MAX_CORNERS
    assert found == corners(space_of(sweep(space)))
    for key, values in {**{key: {0, 1, 2} for key in list(space)[:12]}, "adapter.lora_plus_ratio": {4.0, 16.0}}.items():
        assert {point[key] for point in found if key in point} == values


# --- configs


def test_a_trial_is_the_run_with_its_values_and_its_own_name():
    run = sweep(SPACE, {"name": "s", "training": {"max_steps": 7}})
    trial = trials_of(run)[3]
    config = trial_config(run, trial)
    assert (config.name, config.sweep, config.training.max_steps) == ("trial-003", None, 7)
    for key, value in trial.values.items():
        assert run_value(config, key) == value


def test_a_trial_of_another_method_drops_the_keys_of_the_old_one():
    run = sweep({"adapter.method": ["full", "lora"]}, {"adapter": {"rank": 4}})
    full = trial_config(run, Trial(number=1, values={"adapter.method": "full"}))
    assert full.adapter.model_dump() == {"method": "full"}
    assert trial_config(run, Trial(number=1, values={"adapter.method": "lora"})).adapter.model_dump()["rank"] == 4


def refusal(folder: Path, text: str) -> list[tuple[str, str, str]]:
    """(line:column, key, message) of all that is wrong with the corners of a file that loads."""
    path = folder / "sweep.yaml"
    path.write_text("data: {validation: demo:validation}\nsweep:\n  space:\n" + text)
    run, places = load_with_places([path])
    with pytest.raises(ConfigError) as caught:
        check_space(run, places)
    return [(f"{p.place.line}:{p.place.column}", p.key.removeprefix("sweep.space."), p.message) for p in caught.value.problems]


def test_every_invalid_corner_is_reported_at_once_at_its_key(tmp_path: Path):
    text = """\
    adapter.rank: [2, 4, 8]
    adapter.alpha: adapter.rank - 4
    training.max_steps: {integer: [10, 100]}
    training.warmup_steps: {integer: [5, 50]}
    training.weight_decay: 2 * training.learning_rate
    adapter.dropout: 1 / (adapter.rank - 8)
"""
    assert refusal(tmp_path, text) == [
        ("5:5", "adapter.alpha", "must be a number > 0, got -2 (for example 32.0) (with adapter.rank 2)"),
        ("5:5", "adapter.alpha", "must be a number > 0, got 0 (for example 32.0) (with adapter.rank 4)"),
        (
            "6:5",
            "training.max_steps",
            "training: warmup_steps 50 is more than max_steps 10 (with training.max_steps 10, training.warmup_steps 50)",
        ),
        ("8:5", "training.weight_decay", "training.learning_rate is 'auto', which is no number"),
        (
            "9:5",
            "adapter.dropout",
            "must be a number >= 0 and < 1, got -0.16666666666666666 (for example 0.0) (with adapter.rank 2)",
        ),
        ("9:5", "adapter.dropout", "must be a number >= 0 and < 1, got -0.25 (for example 0.0) (with adapter.rank 4)"),
        ("9:5", "adapter.dropout", "1 / (adapter.rank - 8) divides by zero (with adapter.rank 8)"),
    ]


def test_a_key_of_a_method_that_is_not_always_drawn_needs_a_condition(tmp_path: Path):
    ((place, key, message),) = refusal(tmp_path, "    adapter.method: [full, lora]\n    adapter.rank: [4, 8]\n")
    assert (place, key) == ("5:5", "adapter.rank")
    methods = "lora or qlora or lokr or loha or vera or adalora"
    assert message == f"unknown key for method full; it belongs to method {methods}; draw it `when` the method has it"
    run = sweep({"adapter.method": ["full", "lora"], "adapter.rank": {"choice": [4, 8], "when": "adapter.method == 'lora'"}})
    check_space(run)
    assert len(trials_of(run)) == 3


def test_a_condition_that_is_neither_true_nor_false_is_refused(tmp_path: Path):
    ((place, key, message),) = refusal(tmp_path, "    training.seed: {choice: [1], when: adapter.rank}\n")
    assert (place, key) == ("4:5", "training.seed")
    assert "neither true nor false" in message


def test_a_first_point_that_its_condition_rules_out_is_refused(tmp_path: Path):
    text = "    adapter.rank: [4, 8]\n    training.seed: {choice: [1], when: adapter.rank > 4}\n"
    ((_, key, message),) = refusal(tmp_path, text + "  first: [{adapter.rank: 4, training.seed: 1}]\n")
    assert key == "sweep.first"
    assert "condition does not hold" in message


def test_the_check_verb_reports_corners_with_their_places(tmp_path: Path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "data: {validation: demo:validation}\nsweep:\n  space:\n    adapter.rank: [4, 8]\n    adapter.alpha: adapter.rank - 4\n"
    )
    done = CliRunner().invoke(cli, ["check", str(path)])
    assert done.exit_code == 2
    assert f"{path}:5:5  sweep.space.adapter.alpha  must be a number > 0, got 0" in done.output


KEYS = st.sampled_from([*keys(), "adapter.rank_pattern.q", "data.train.0.max_rows", "nonsense", "training.zero.overrides.a"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["auto", "2 * adapter.rank", "lora", ""])
)
ANY_DIMENSION = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from([*KINDS, "step", "when"]), st.one_of(SCALARS, st.lists(SCALARS, max_size=2)), max_size=3),
)


@given(
    st.dictionaries(KEYS, ANY_DIMENSION, min_size=1, max_size=4), st.lists(st.dictionaries(KEYS, SCALARS, max_size=2), max_size=2)
)
@example({"adapter.alpha": {"uniform": [0, 1e300], "step": 1e-300}}, [])
@example({"training.weight_decay": {"uniform": [-1e308, 1e308]}}, [])
@example({"training.seed": {"integer": [0, 2**62], "step": 1e300}}, [])
@example({"training.seed": {"log_integer": [1, 2**62]}}, [])
@example({"data.train.7.path": ["x"]}, [])
@example({"data.train.0.max_rows": "data.train"}, [])
def test_any_space_passes_or_is_refused_and_nothing_else(space, first):
    try:
        run = sweep(space, first=first, trials=3)
        check_space(run)
    except ConfigError as error:
        message = str(error)
    else:
        assert all(trial_config(run, trial) for trial in trials_of(run))
        return
    assert all(line.isprintable() for line in message.splitlines())


def test_a_good_space_passes():
    check_space(sweep(SPACE, first=[{"adapter.rank": 16}], trials=8))
