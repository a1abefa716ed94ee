"""Where trials come from: drawn beforehand or proposed by Optuna, and again after a resume."""

import json
from typing import Any

import pytest
from ray.tune.search import Searcher

from raytune.config.load import config_from
from raytune.config.sections.run import RunConfig
from raytune.sweeps.search import Listed, Optuna, Source, TrialSearch
from raytune.sweeps.space import trials_of
from raytune.sweeps.trial import Trial

SPACE = {
    "adapter.rank": {"choice": [2, 4, 8]},
    "adapter.alpha": "2 * adapter.rank",
    "adapter.target_modules": {"choice": ["all-linear", ["q_proj", "v_proj"]]},
    "training.learning_rate": {"log_uniform": [1e-5, 1e-2]},
}


def config(**section: Any) -> RunConfig:
    values = {"space": SPACE, "trials": 8, **section}
    return config_from({"sweep": values, "data": {"validation_fraction": 0.1}})


def search(source: Source, known: list[Trial] | None = None, unbuildable: tuple[str, ...] = ()) -> TrialSearch:
    known = known or []
    return TrialSearch(source, known, len(known), lambda trial: trial.name not in unbuildable, lambda trial: float(trial.number))


def suggestions(search: TrialSearch) -> list[dict[str, Any]]:
    found = []
    while (values := search.suggest(f"id-{len(found)}")) != Searcher.FINISHED:
        found.append(values)
        search.on_trial_complete(f"id-{len(found) - 1}", {})
    return found


def test_listed_trials_come_in_order_with_their_names_and_values() -> None:
    trials = trials_of(config())
    assert suggestions(search(Listed(trials))) == [{"trial": trial.name, **trial.values} for trial in trials]


def test_trials_of_an_earlier_command_come_first_and_are_not_made_up_again() -> None:
    trials = trials_of(config())
    names = [values["trial"] for values in suggestions(search(Listed(trials), known=trials[:3]))]
    assert names == [trial.name for trial in trials]


def test_a_trial_that_cannot_be_built_is_passed_over() -> None:
    trials = trials_of(config())
    names = [values["trial"] for values in suggestions(search(Listed(trials), unbuildable=("trial-000", "trial-007")))]
    assert names == [f"trial-{number:03d}" for number in range(1, 7)]


def test_optuna_makes_up_as_many_trials_as_asked_for_all_inside_the_space() -> None:
    pytest.importorskip("optuna")
    found = suggestions(search(Optuna(config(search="optuna", trials=12))))
    assert [values["trial"] for values in found] == [f"trial-{number:03d}" for number in range(12)]
    for values in found:
        assert values["adapter.rank"] in (2, 4, 8)
        assert values["adapter.alpha"] == 2 * values["adapter.rank"]
        assert values["adapter.target_modules"] in ("all-linear", ["q_proj", "v_proj"])
        assert 1e-5 <= values["training.learning_rate"] <= 1e-2


def test_optuna_tries_the_first_points_first() -> None:
    pytest.importorskip("optuna")
    first = [{"adapter.rank": 2, "adapter.target_modules": ["q_proj", "v_proj"]}, {"training.learning_rate": 1e-3}]
    found = suggestions(search(Optuna(config(search="optuna", first=first))))
    assert (found[0]["adapter.rank"], found[0]["adapter.target_modules"]) == (2, ["q_proj", "v_proj"])
    assert found[1]["training.learning_rate"] == 1e-3


def test_optuna_gives_out_known_trials_again_unchanged_and_learns_from_them() -> None:
    optuna = pytest.importorskip("optuna")
    made_up = suggestions(search(Optuna(config(search="optuna"))))
    known = [
        Trial(number=number, values={key: value for key, value in values.items() if key != "trial"})
        for number, values in enumerate(made_up[:5])
    ]
    source = Optuna(config(search="optuna"))
    again = suggestions(search(source, known=known))
    assert again[:5] == made_up[:5]
    assert len(again) == 8
    told = source._study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    assert len(told) == 8
    rates = [trial.params["training.learning_rate"] for trial in told]
    assert rates[:5] == [values["training.learning_rate"] for values in made_up[:5]]


def test_optuna_proposes_nothing_twice_after_a_resume() -> None:
    pytest.importorskip("optuna")
    made_up = suggestions(search(Optuna(config(search="optuna", trials=6))))
    source = Optuna(config(search="optuna", trials=12), num_known=6)
    for number, values in enumerate(made_up):
        trial = Trial(number=number, values={key: value for key, value in values.items() if key != "trial"})
        source.again(trial)
        source.finished(trial, float(number))
    more = suggestions(TrialSearch(source, [], 6, lambda trial: True, lambda trial: 0.0))
    rates = [values["training.learning_rate"] for values in [*made_up, *more]]
    assert len(set(rates)) == len(rates) == 12


def test_optunas_proposals_follow_what_trials_came_to() -> None:
    """Where small learning rates win, later proposals are smaller than the first, random ones."""
    pytest.importorskip("optuna")
    source = Optuna(config(search="optuna", trials=40))
    trials = []
    for number in range(40):
        trial = source.next(number)
        assert trial is not None
        trials.append(trial)
        source.finished(trial, trial.values["training.learning_rate"])
    rates = [trial.values["training.learning_rate"] for trial in trials]
    assert sorted(rates[20:])[10] < sorted(rates[:10])[5]


def test_a_failed_trial_is_told_as_failed() -> None:
    optuna = pytest.importorskip("optuna")
    source = Optuna(config(search="optuna"))
    trial = source.next(0)
    assert trial is not None
    source.finished(trial, None)
    assert source._study.trials[0].state == optuna.trial.TrialState.FAIL


def test_a_search_survives_the_pickling_that_tune_does_before_a_start() -> None:
    import pickle

    pickle.dumps(search(Listed(trials_of(config()))))


def test_values_are_plain_json() -> None:
    for trial in trials_of(config()):
        assert json.loads(json.dumps(trial.values)) == trial.values
