"""What `training.averaging` is planned as: over which steps, with what weights, what it costs, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.load import config_from, load_with_places
from raytune.config.words.places import errors_at
from raytune.errors import UserError
from raytune.plan.choosing.setting import settle
from raytune.plan.describe import plan_table
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.identity.settings import changes_in_keys
from raytune.plan.run_plan import AveragingPlan, RunPlan
from raytune.plan.strategies.averaging import share_after
from tests.unit.plan_cases import CPU, DEMO, config, data, gpus, planned


def plan(averaging: dict[str, Any] | None, *, max_steps: int = 100, **training: Any) -> RunPlan:
    return planned(facts=data(validation=("validation",)), training={"max_steps": max_steps, "averaging": averaging} | training)


def weights_in_average(averaging: AveragingPlan, num_steps: int) -> list[float]:
    """What the weights after each step count for in the average in the end, as its shares say."""
    counts = [0.0] * num_steps
    for step in range(1, num_steps + 1):
        share = share_after(step, averaging)
        if share is not None:
            counts = [count * (1 - share) for count in counts]
            counts[step - 1] = share
    return counts


@given(decay=st.floats(0.01, 0.9999), every=st.integers(1, 7), number=st.integers(1, 40))
def test_ema_weighs_each_step_by_its_decay_and_never_the_start(decay: float, every: int, number: int) -> None:
    counts = weights_in_average(AveragingPlan(decay=decay, first_step=every, every_steps=every), number * every)
    expected = [decay ** (number - 1 - index) for index in range(number)]
    assert counts[every - 1 :: every] == pytest.approx([one / sum(expected) for one in expected], rel=1e-9, abs=1e-12)
    assert sum(counts) == pytest.approx(1)


@given(num_steps=st.integers(2, 200), last=st.integers(2, 200), every=st.integers(1, 20))
def test_last_is_the_plain_mean_that_ends_with_the_last_step(num_steps: int, last: int, every: int) -> None:
    if last > num_steps or every >= last:
        return
    section = {"kind": "last", "last_steps": last, "every_steps": every}
    averaging = plan(section, max_steps=num_steps).optimization.averaging
    assert averaging is not None
    counts = weights_in_average(averaging, num_steps)
    counted = [step for step in range(1, num_steps + 1) if counts[step - 1]]
    assert counted == [step for step in range(num_steps - last + 1, num_steps + 1) if (num_steps - step) % every == 0]
    assert [counts[step - 1] for step in counted] == pytest.approx([1 / len(counted)] * len(counted))


def test_left_to_auto_ema_is_over_a_tenth_of_the_run_and_last_over_a_quarter() -> None:
    ema, last = plan({}), plan({"kind": "last"})
    assert ema.optimization.averaging == AveragingPlan(decay=0.9, first_step=1, every_steps=1)
    assert last.optimization.averaging == AveragingPlan(decay=1, first_step=76, every_steps=1)
    assert "training.averaging.decay is 0.9: about 10 of 100 steps are in the average." in ema.reasons
    assert "training.averaging.last_steps is 25: a quarter of 100." in last.reasons


def test_the_plan_says_that_the_model_is_the_average() -> None:
    words = dict(plan_table(plan({"decay": 0.99})))
    assert words["averaging"].startswith("moving average of the weights, decay 0.99: about the last 100 steps")
    assert words["averaging"].endswith("it is what is validated and saved")
    notes = " ".join(plan({"decay": 0.99}).notes)
    assert "validation/... and the choice of the best checkpoint are of the average" in notes
    assert "weights of its beginning count much" in notes
    last = plan({"kind": "last", "last_steps": 20, "every_steps": 5})
    assert dict(plan_table(last))["averaging"].startswith("mean of the weights after steps 85 to 100, every 5 steps")
    assert any("Until step 85" in note for note in last.notes)


def test_none_is_planned_as_if_there_were_no_such_thing() -> None:
    none = plan(None)
    assert none.optimization.averaging is None
    assert "averaging" not in dict(plan_table(none))
    assert not any("average of the weights" in part.name for part in none.memory)


def test_it_costs_four_bytes_per_trained_number_where_the_optimizer_is_and_its_traffic() -> None:
    sections = {"adapter": {"method": "full"}, "training": {"zero": {"stage": 2}}}
    averaged = sections | {"training": sections["training"] | {"averaging": {}}}
    bare, more = planned(gpus(4), **sections), planned(gpus(4), **averaged)
    part = next(part for part in more.memory if part.name == "average of the weights")
    assert part.num_bytes == more.num_trainable
    assert more.checkpoint_bytes - bare.checkpoint_bytes == 4 * more.num_trainable
    offloaded = averaged | {"training": averaged["training"] | {"zero": {"stage": 2, "offload_optimizer": "cpu"}}}
    part = next(part for part in planned(gpus(4), **offloaded).memory if part.name == "average of the weights")
    assert part.place == "host"


REFUSED = {
    "more steps than there are": ({"kind": "last", "last_steps": 200}, "the run has 100 steps"),
    "one step": ({"kind": "last", "last_steps": 10, "every_steps": 10}, "Set training.averaging.last_steps to 11 or more"),
    "too rarely": ({"every_steps": 60}, "Set it to 50 or less"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_averages_nothing_is_refused(case: str) -> None:
    section, said = REFUSED[case]
    with pytest.raises(UserError, match=said):
        plan(section)


def test_a_run_of_one_step_has_nothing_to_average() -> None:
    with pytest.raises(UserError, match="the run has one step"):
        plan({}, max_steps=1)


AT_ITS_PLACE = {
    "the last steps of a run that may end before": (
        "training:\n  averaging: {kind: last}\n  early_stopping: {}\ndata: {train: demo:train, validation_fraction: 0.1}",
        "training.averaging",
        "Set training.averaging.kind to ema",
    ),
    "state in files": (
        "training:\n  averaging: {}\n  zero: {stage: 3, offload_optimizer: nvme, nvme_path: /nvme}\ndata: {train: demo:train}",
        "training.averaging",
        "to cpu or none",
    ),
    "ranks that are pruned": (
        "adapter: {method: adalora}\ntraining:\n  averaging: {}\ndata: {train: demo:train}",
        "training.averaging",
        "Set adapter.method to lora",
    ),
}


@pytest.mark.parametrize("case", AT_ITS_PLACE)
def test_what_cannot_be_averaged_is_refused_at_its_place(case: str, tmp_path: Path) -> None:
    text, key, said = AT_ITS_PLACE[case]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    asked, places = load_with_places([path])
    with pytest.raises(UserError) as caught, errors_at(asked, places):
        settle(asked, DEMO, CPU)
    assert said in str(caught.value)
    assert key in str(caught.value).partition("\n")[0]


@pytest.mark.parametrize(
    ("averaging", "said"),
    [({"kind": "last", "decay": 0.9}, "kind last does not read it"), ({"last_steps": 9}, "kind ema does not read it")],
)
def test_a_key_of_the_other_kind_is_refused(averaging: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config_from({"training": {"averaging": averaging}, "data": {"train": "demo:train"}})


def test_another_average_is_another_run_told_in_its_key() -> None:
    before, after = ({"training": {"max_steps": 100, "averaging": one}} for one in ({"decay": 0.9}, {"decay": 0.99}))
    was, now = planned(**before), planned(**after)
    assert differences(identity_of(was), identity_of(now))
    changes = changes_in_keys(was, now, config(**before), config(**after))
    assert [change[0] for change in changes] == ["training.averaging.decay"]
