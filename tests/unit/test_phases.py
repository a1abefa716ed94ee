"""What phases train and take, where they begin, and what is refused, with the place where it was written."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from raytune.config.load import load_with_places
from raytune.config.sections.run import RunConfig
from raytune.config.words.places import errors_at
from raytune.errors import PlanError, UserError
from raytune.plan.ahead import plan_ahead
from raytune.plan.choosing.choose import choose_plan
from raytune.plan.choosing.setting import settle
from raytune.plan.choosing.snapshot import COPY
from raytune.plan.costs.memory import bytes_in
from raytune.plan.describe import plan_table
from raytune.plan.facts.machine import Machine
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.identity.settings import changes_in_keys
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import RunPlan
from raytune.plan.strategies.phases import age, in_phase, phase_at, phase_of_state
from raytune.training.steps.schedule import learning_rate
from tests.tiny import PATIENT
from tests.unit.plan_cases import CPU, DEMO, LLAMA_3_8B, config, data, gpus, planned

FULL = {"method": "full"}
UNFREEZE: list[dict[str, Any]] = [
    {"last_layers": 1},
    {"from_epoch": 1, "last_layers": 2, "learning_rate": 2e-5, "warmup_steps": 3},
    {"from_fraction": 0.75, "last_layers": "all", "learning_rate": 1e-5},
]


def phased(unfreeze: list[dict[str, Any]], *, num_rows: int = 100, shape: ModelShape = DEMO, **training: Any) -> RunPlan:
    steps = {"global_batch_size": 4, "learning_rate": 1e-4} | ({} if "num_train_epochs" in training else {"max_steps": 60})
    return planned(shape=shape, facts=data(num_rows), adapter=FULL, strategy={"unfreeze": unfreeze}, training=steps | training)


# --- steps


START = st.one_of(
    st.fixed_dictionaries({"from_step": st.integers(0, 70)}),
    st.fixed_dictionaries({"from_epoch": st.floats(0, 3)}),
    st.fixed_dictionaries({"from_fraction": st.floats(0, 1, exclude_max=True)}),
)


@PATIENT
@given(starts=st.lists(START, min_size=1, max_size=2), max_steps=st.integers(2, 70), num_rows=st.integers(5, 90))
def test_every_step_is_in_exactly_one_phase(starts: list[dict[str, Any]], max_steps: int, num_rows: int) -> None:
    reach = [1, 2, "all"][-len(starts) - 1 :]
    unfreeze = [{"last_layers": reach[0]}, *({"last_layers": layers} | start for layers, start in zip(reach[1:], starts))]
    try:
        phases = phased(unfreeze, num_rows=num_rows, max_steps=max_steps, warmup_steps=0).optimization.phases
    except UserError:
        assume(False)
        raise
    borders = [phase.first_step for phase in phases]
    assert borders[0] == 0
    assert all(before < after for before, after in pairwise([*borders, max_steps]))
    for step in range(max_steps):
        own = [index for index, (first, end) in enumerate(pairwise([*borders, max_steps])) if first <= step < end]
        assert own == [phase_at(step, phases)]
        assert phase_of_state(step + 1, phases) == own[0], "what a step leaves is its phase's, at a border too"
    for border, start in zip(borders[1:], starts):
        asked = {"from_step": 1.0, "from_epoch": num_rows / 4, "from_fraction": max_steps}
        first = sum(value * asked[name] for name, value in start.items())
        assert first - 1e-5 <= border < first + 1


def test_phases_begin_by_epochs_shares_and_steps() -> None:
    def firsts(*unfreeze: dict[str, Any], **settings: Any) -> list[int]:
        given = [{"last_layers": 1} | unfreeze[0], *({"last_layers": "all", "learning_rate": 1e-5} | one for one in unfreeze[1:])]
        return [phase.first_step for phase in phased(given, **settings).optimization.phases]

    assert firsts({}, {"from_epoch": 1}) == [0, 25]
    assert firsts({}, {"from_epoch": 1}, num_rows=99) == [0, 25], "the 25th step has rows of both epochs"
    assert firsts({}, {"from_epoch": 0.5}, num_train_epochs=1) == [0, 13]
    assert firsts({"from_step": 0}, {"from_fraction": 0.1}) == [0, 6], "0.1 x 60, though its product is a hair above"
    assert firsts({"from_epoch": 0}, {"from_step": 59}) == [0, 59]


def test_a_rate_is_the_phase_s_peak_by_the_schedule_and_its_warm_up() -> None:
    optimization = phased(UNFREEZE, warmup_steps=5, lr_scheduler_type="linear").optimization
    assert [phase.first_step for phase in optimization.phases] == [0, 25, 45]
    share = [step / 5 if step < 5 else (60 - step) / 55 for step in range(60)]
    expected = [
        *(1e-4 * share[step] for step in range(25)),
        *(2e-5 * share[step] * min(1, (step - 25) / 3) for step in range(25, 45)),
        *(1e-5 * share[step] for step in range(45, 60)),
    ]
    assert [learning_rate(step, optimization) for step in range(60)] == pytest.approx(expected, rel=1e-12)


# --- what is trained, and what it takes


def test_each_phase_takes_what_a_run_frozen_so_takes_and_the_fullest_decides() -> None:
    training = {
        "zero": {"stage": 2}, "per_device_train_batch_size": 1, "gradient_checkpointing": False, "loss": "chunked",
        "max_steps": 100, "warmup_steps": 0,
    }  # fmt: skip
    unfreeze = [
        {"last_layers": 0},
        {"from_step": 10, "last_layers": 4},
        {"from_step": 20, "last_layers": 32},
        {"from_step": 30, "last_layers": "all"},
    ]
    plan = planned(gpus(8), LLAMA_3_8B, adapter=FULL, training=training, strategy={"unfreeze": unfreeze})
    for needs, phase, layers in zip(plan.phase_needs, plan.optimization.phases, (0, 4, 32, 32)):
        freeze = {"embeddings": True, "first_layers": 32 - layers} if phase.frozen else {}
        frozen = planned(gpus(8), LLAMA_3_8B, adapter=FULL, training=training, strategy={"freeze": freeze})
        # What checkpoints are copied into is allocated once, for the largest.
        memory, alone = ([part for part in one.memory if part.name != COPY] for one in (needs, frozen))
        assert (needs.num_trainable, memory, needs.checkpoint_bytes) == (frozen.num_trainable, alone, frozen.checkpoint_bytes)
        assert needs.lowest_layer == frozen.model.lowest_layer
        assert phase.frozen == frozen.model.frozen
    sizes = [bytes_in(needs.memory, "device") for needs in plan.phase_needs]
    assert sizes == sorted(sizes)
    assert bytes_in(plan.memory, "device") == sizes[-1]
    assert plan.checkpoint_bytes == plan.phase_needs[-1].checkpoint_bytes
    assert plan.num_trainable == LLAMA_3_8B.num_parameters
    with pytest.raises(PlanError, match="does not fit"):
        planned(gpus(8, 28), LLAMA_3_8B, adapter=FULL, training=training, strategy={"unfreeze": unfreeze})
    upper = {"freeze": {"embeddings": True, "first_layers": 28}}
    assert planned(gpus(8, 28), LLAMA_3_8B, adapter=FULL, training=training, strategy=upper).phase_needs == []


def test_phases_are_nested_and_a_parameter_is_as_old_as_its_first_phase() -> None:
    phases = phased(UNFREEZE).optimization.phases
    ages = {module.name: age(f"{module.name}.weight", phases) for module in DEMO.modules()}
    assert {name for name, born in ages.items() if born == 0} == {
        name for name in ages if "layers.2." in name or name == "model.norm"
    }, "the head is tied"
    assert {name for name, born in ages.items() if born == 1} == {name for name in ages if "layers.1." in name}
    assert all(ages[name] == 2 for name in ages if "layers.0." in name or "embed" in name)


def test_a_plan_in_a_phase_trains_what_that_does() -> None:
    plan = phased(UNFREEZE)
    first, last = in_phase(plan, 0), in_phase(plan, 2)
    assert first.model.frozen == ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"]
    assert (first.model.lowest_layer, last.model.lowest_layer) == (2, 0)
    assert (last.model, last.num_trainable) == (plan.model, plan.num_trainable)
    assert plan.model.frozen == []
    unphased = planned(adapter=FULL)
    assert in_phase(unphased, 0) is unphased


def test_what_is_frozen_in_the_whole_run_stays_so_in_each_phase() -> None:
    strategy = {"unfreeze": UNFREEZE, "freeze": {"modules": ["mlp"], "embeddings": True}}
    plan = planned(facts=data(100), adapter=FULL, strategy=strategy, training={"max_steps": 60, "global_batch_size": 4})
    assert all(any("mlp" in name for name in phase.frozen) for phase in plan.optimization.phases)
    assert "model.embed_tokens" in plan.model.frozen
    assert plan.model.frozen == plan.optimization.phases[-1].frozen


def test_rates_of_layers_hold_in_every_phase() -> None:
    def groups(**strategy: Any) -> Any:
        return planned(facts=data(100), adapter=FULL, training={"max_steps": 60}, strategy=strategy).optimization.update_groups

    assert groups(unfreeze=UNFREEZE, layer_rate_decay=0.5) == groups(layer_rate_decay=0.5)


def test_the_plan_shows_each_phase_with_its_steps_rate_and_bytes() -> None:
    plan = phased(UNFREEZE, warmup_steps=0)
    rows = plan_table(plan)
    start = next(index for index, (label, _) in enumerate(rows) if label == "phases")
    shown = [value for _, value in rows[start : start + 3]]
    assert shown[0].startswith("steps 1 to 25: the last layer and model.norm, ")
    assert "learning rate 0.0001; " in shown[0]
    assert shown[1].startswith("steps 26 to 45: the last 2 layers and model.norm, ")
    assert "learning rate 2e-05, 3 warm-up steps, the first at rate 0; " in shown[1]
    assert shown[2].startswith("steps 46 to 60: all, ")
    assert "per worker, checkpoints" in shown[2]
    assert "learning rate 1e-05 to 0.0001 by phase" in dict(rows)["optimizer"]
    assert any("lm_head is model.embed_tokens (tied)" in note and "until phase 3 trains all" in note for note in plan.notes)
    assert "phases" not in dict(plan_table(planned(adapter=FULL)))


def test_the_cost_is_that_of_all_phases() -> None:
    def cost(**strategy: Any) -> tuple[float, float]:
        sections: dict[str, Any] = {
            "model": {"base": "meta-llama/Llama-3.1-8B"},
            "adapter": FULL,
            "cluster": {"instance": "p5.48xlarge"},
            "training": {"zero": {"stage": 2}, "gradient_checkpointing": False, "max_steps": 100},
            "data": {"train": "x.jsonl"},
            "strategy": strategy,
        }
        plan = plan_ahead(config(**sections), 10_000_000)
        assert plan.cost is not None
        seconds = [needs.step_time.seconds for needs in plan.phase_needs if needs.step_time]
        return plan.cost.hours, sum(seconds) / max(1, len(seconds))

    half = {"last_layers": 0}, {"from_fraction": 0.5, "last_layers": "all"}
    hours, mean_step_s = cost(unfreeze=[*half])
    assert hours == pytest.approx(100 * mean_step_s / 3600)
    assert hours < 0.8 * cost()[0]


# --- refused


HEAD = "adapter: {method: full}\nstrategy:\n  unfreeze:\n"
REFUSED: dict[str, tuple[str, str, str]] = {
    "virtual tokens, which lie in no layer": (
        "adapter: {method: prompt_tuning}\n"
        "strategy:\n  unfreeze:\n    - {last_layers: 1}\n    - {from_step: 5, last_layers: all}",
        "strategy.unfreeze",
        "adapter.method prompt_tuning leaves them as they are. Set adapter.method to full.",
    ),
    "an adapter": (
        "strategy:\n  unfreeze:\n    - {last_layers: 1}\n    - {from_step: 5, last_layers: all}",
        "strategy.unfreeze",
        "Set adapter.method to full; or train updates of the last layers alone, in the whole run: strategy.freeze.first_layers",
    ),
    "one phase": (f"{HEAD}    - {{last_layers: 1}}", "strategy.unfreeze", "has one phase"),
    "a late first": (f"{HEAD}    - {{from_step: 3, last_layers: 1}}", "strategy.unfreeze.0.from_step", "nothing is trained"),
    "no start": (f"{HEAD}    - {{last_layers: 1}}\n    - {{last_layers: all}}", "strategy.unfreeze.1", "Give it one of"),
    "two starts": (
        f"{HEAD}    - {{last_layers: 1}}\n    - {{from_step: 3, from_epoch: 1, last_layers: all}}",
        "strategy.unfreeze.1.from_step",
        "says where it begins by from_epoch and by from_step",
    ),
    "not in order": (
        f"{HEAD}    - {{last_layers: 1}}\n    - {{from_step: 5, last_layers: 2}}\n    - {{from_step: 5, last_layers: all}}",
        "strategy.unfreeze.2.from_step",
        "in the order in which they begin",
    ),
    "more layers than there are": (
        f"{HEAD}    - {{last_layers: 1}}\n    - {{from_step: 5, last_layers: 4}}",
        "strategy.unfreeze.1.last_layers",
        "the model has 3. Set last_layers to 3 or less, or to all",
    ),
    "layers that are frozen": (
        f"{HEAD}    - {{last_layers: 1}}\n    - {{from_step: 5, last_layers: 3}}\n  freeze: {{first_layers: 1}}",
        "strategy.unfreeze.1.last_layers",
        "strategy.freeze.first_layers 1 freezes the others. Set last_layers to 2 or less",
    ),
    "fewer than before": (
        f"{HEAD}    - {{last_layers: 2}}\n    - {{from_step: 5, last_layers: 1}}",
        "strategy.unfreeze.1.last_layers",
        "Phases only unfreeze: set last_layers to 2 or more",
    ),
    "fewer than all": (
        f"{HEAD}    - {{last_layers: all}}\n    - {{from_step: 5, last_layers: 3}}",
        "strategy.unfreeze.1.last_layers",
        "set last_layers to all",
    ),
    "nothing new": (
        f"{HEAD}    - {{last_layers: 1}}\n    - {{from_step: 5, last_layers: 1}}",
        "strategy.unfreeze.1.last_layers",
        "trains the same as the one before it, at the same rate",
    ),
    "a warm-up of the first": (
        f"{HEAD}    - {{last_layers: 1, warmup_steps: 3}}\n    - {{from_step: 5, last_layers: all}}",
        "strategy.unfreeze.0.warmup_steps",
        "whose warm-up is training.warmup_steps",
    ),
    "two sayings of what is trained": (
        f"{HEAD}    - {{last_layers: 1}}\n    - {{from_step: 5, last_layers: all}}\n  freeze: {{train_only: [norms]}}",
        "strategy.freeze.train_only",
        "both say what is trained",
    ),
    "a rate of no phase": (
        f"{HEAD}    - {{last_layers: 1, learning_rate: 1.0e-4}}\n"
        "    - {from_step: 5, last_layers: all, learning_rate: 1.0e-5}\ntraining: {learning_rate: 1.0e-3}",
        "training.learning_rate",
        "every phase of strategy.unfreeze has a learning_rate of its own",
    ),
    "state in files": (
        f"{HEAD}    - {{last_layers: 1}}\n    - {{from_step: 5, last_layers: all}}\n"
        "training:\n  zero: {offload_optimizer: nvme, nvme_path: /nvme, stage: 3}",
        "training.zero.offload_optimizer",
        "Set it to cpu or none",
    ),
    "a start at the end": (
        f"{HEAD}    - {{last_layers: 1}}\n    - {{from_step: 60, last_layers: all}}",
        "strategy.unfreeze.1.from_step",
        "the run has 60 steps. Let it begin earlier, or train for longer",
    ),
    "an epoch that there is not": (
        f"{HEAD}    - {{last_layers: 1}}\n    - {{from_epoch: 3, last_layers: all}}",
        "strategy.unfreeze.1.from_epoch",
        "begins after 3 epochs, which is step 75, but the run has 60 steps",
    ),
    "no step between": (
        f"{HEAD}    - {{last_layers: 1}}\n    - {{from_epoch: 1, last_layers: 2}}\n    - {{from_step: 25, last_layers: all}}",
        "strategy.unfreeze.2.from_step",
        "each phase needs a step",
    ),
    "a warm-up as long as its phase": (
        f"{HEAD}    - {{last_layers: 1}}\n    - {{from_step: 50, last_layers: all, warmup_steps: 10}}",
        "strategy.unfreeze.1.warmup_steps",
        "has 10 warm-up steps, and 10 steps in all",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_phases_that_cannot_be_are_refused_at_their_place(case: str, tmp_path: Path) -> None:
    text, key, said = REFUSED[case]
    path = tmp_path / "run.yaml"
    training = "" if "training:" in text else "\ntraining: {max_steps: 60, global_batch_size: 4}"
    path.write_text(f"{text}{training}\ndata: {{train: demo:train}}\n")
    asked, places = load_with_places([path])
    machine = gpus(8) if "nvme" in text else CPU
    with pytest.raises(UserError) as caught, errors_at(asked, places):
        refuse(asked, machine)
    assert said in str(caught.value)
    place, _, named = str(caught.value).partition("\n")[0].partition("  ")
    assert named == key
    line = path.read_text().splitlines()[int(place.split(":")[1]) - 1]
    name = key.rpartition(".")[2]
    assert name in line or name.isdigit()


def refuse(asked: RunConfig, machine: Machine) -> None:
    choose_plan(settle(asked, DEMO, machine), data(100), model_path="/models/base", storage="/runs")


# --- identity


def test_other_phases_are_another_run_told_in_their_key() -> None:
    def sections(unfreeze: list[dict[str, Any]]) -> dict[str, Any]:
        training = {"max_steps": 60, "global_batch_size": 4, "learning_rate": 1e-4}
        return {"adapter": FULL, "strategy": {"unfreeze": unfreeze}, "training": training}

    def changed(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
        was, now = sections(before), sections(after)
        plans = planned(facts=data(100), **was), planned(facts=data(100), **now)
        assert bool(differences(*map(identity_of, plans))) == (before != after)
        return [change[0] for change in changes_in_keys(*plans, config(**was), config(**now))]

    later = [*UNFREEZE[:2], UNFREEZE[2] | {"from_fraction": 0.8}]
    slower = [UNFREEZE[0], UNFREEZE[1] | {"learning_rate": 1e-5}, UNFREEZE[2]]
    for other in (later, slower, []):
        assert all(key.startswith("strategy.unfreeze") for key in changed(UNFREEZE, other))
        assert changed(UNFREEZE, other)
    assert changed(UNFREEZE, UNFREEZE) == []


def test_phases_said_in_other_words_are_the_same_run() -> None:
    same = [UNFREEZE[0] | {"from_step": 0}, UNFREEZE[1] | {"from_epoch": None, "from_step": 25}, UNFREEZE[2]]
    assert differences(identity_of(phased(UNFREEZE)), identity_of(phased(same))) == {}
