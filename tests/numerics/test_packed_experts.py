"""Training over experts in 4 bits: as over their expanded weights, divided as whole, resumed as unbroken."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.oracles import plain_packed_losses
from tests.numerics.runs import (
    QLORA,
    SAME_SUMS,
    Material,
    Outcome,
    largest_difference,
    make_plan,
    relative_difference,
    run,
    train,
)
from tests.numerics.test_resume_engine import assert_resumes_exactly
from tests.unit.test_expert_updates import saved_base

FROZEN: dict[str, Any] = QLORA | {"target_modules": "attention"}
ONE_OF_TWO: dict[str, Any] = FROZEN | {"target_parameters": ["experts.down_proj"]}
CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing": True}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def over_experts(material: Material, mixtral: Path) -> Material:
    return replace(material, model=mixtral)


@pytest.fixture(scope="module")
def alone(request: pytest.FixtureRequest, mixtral: Path) -> Outcome:
    return train(make_plan(replace(request.getfixturevalue("material"), model=mixtral), adapter=FROZEN))


def test_training_over_packed_experts_equals_plain_peft_over_their_expanded_weights(
    over_experts: Material, alone: Outcome
) -> None:
    plan = make_plan(over_experts, adapter=FROZEN)
    assert relative_difference(alone.losses, plain_packed_losses(plan, ["gate_up_proj", "down_proj"])) <= SAME_SUMS
    recomputed = train(make_plan(over_experts, adapter=FROZEN, model=CHECKPOINTING))
    assert recomputed.losses == alone.losses
    assert largest_difference(recomputed, alone) == 0


def test_one_matrix_may_be_trained_over_while_the_other_is_packed(over_experts: Material) -> None:
    plan = make_plan(over_experts, adapter=ONE_OF_TWO)
    plain = plain_packed_losses(plan, ["gate_up_proj"], parameters=["experts.down_proj"])
    assert relative_difference(train(plan).losses, plain) <= SAME_SUMS


@pytest.mark.parametrize(
    ("stage", "recomputes"),
    [(1, True), (3, False), *(pytest.param(*way, marks=pytest.mark.slow) for way in ((0, False), (2, False), (3, True)))],
)
def test_packed_experts_on_two_ranks_train_as_on_one(
    stage: int, recomputes: bool, over_experts: Material, alone: Outcome
) -> None:
    plan = make_plan(over_experts, workers=2, stage=stage, adapter=FROZEN, model={"gradient_checkpointing": recomputes})
    divided = run(plan)[0]
    assert relative_difference(divided.losses, alone.losses) <= SAME_SUMS
    assert largest_difference(divided, alone) <= SAME_SUMS
    share = 2 if stage == 3 else 1
    assert divided.held.weights < 1.05 * alone.held.weights / share, "stage 3 divides packed numbers, and gives them back"


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_resumed_run_over_packed_experts_equals_the_unbroken_one(
    workers: int, stage: int, over_experts: Material, tmp_path: Path
) -> None:
    plan = make_plan(over_experts, workers=workers, stage=stage, adapter=FROZEN)
    assert_resumes_exactly(plan, plan, tmp_path)


@pytest.mark.slow
def test_compiling_changes_nothing_for_packed_experts(over_experts: Material, alone: Outcome) -> None:
    compiled = train(make_plan(over_experts, adapter=FROZEN, model={"compile": True}))
    assert relative_difference(compiled.losses, alone.losses) <= SAME_SUMS
