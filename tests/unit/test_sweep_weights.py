"""Trials are compared by one measure: no trial may win by counting a hard source less."""

import pytest

from raytune.errors import UserError
from raytune.plan.run_plan import RunPlan
from raytune.sweeps.planner import refuse_other_weights
from tests.tiny import tiny_plan


def trial(**weights: float) -> RunPlan:
    stores = [
        {"name": name, "path": name, "num_rows": 1, "num_tokens": 9, "num_targets": 9, "weight": weight}
        for name, weight in weights.items()
    ]
    return tiny_plan(data={"validation": stores})


@pytest.mark.parametrize(
    ("one", "other"),
    [({"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}), ({"validation": 1.0}, {"a": 1.0, "replayed": 0.5})],
    ids=["a_weight_is_drawn", "replay_is_drawn"],
)
def test_trials_that_count_held_out_sources_differently_are_not_ranked_by_their_mean(one: dict, other: dict) -> None:
    with pytest.raises(UserError, match=r"trials count them differently: .*data\.validation in place"):
        refuse_other_weights("validation/loss", [trial(**one), trial(**other)])


def test_weights_in_the_same_proportion_and_metrics_of_one_source_are_fair() -> None:
    refuse_other_weights("validation/loss", [trial(a=1.0, b=2.0), trial(a=2.0, b=4.0)])
    refuse_other_weights("validation/a/loss", [trial(a=1.0, b=2.0), trial(a=2.0, b=1.0)])
