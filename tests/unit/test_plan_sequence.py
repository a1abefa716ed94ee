"""Workers that share rows: how a batch is cut, what the plan makes of it, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.sections.run import RunConfig
from raytune.config.sections.training import TrainingSection
from raytune.data.batches.batches import Batch
from raytune.data.batches.slices import Seat, slice_of
from raytune.errors import PlanError, UserError
from raytune.plan.identity.division import most_that_divide
from raytune.plan.identity.identity import identity_of
from raytune.plan.model.architectures import model_shape
from raytune.plan.model.shapes import Rope
from raytune.plan.run_plan import BatchPlan, RunPlan
from raytune.plan.strategies.sequence import check_groups, check_sequence
from tests.tiny import tiny_plan
from tests.unit.plan_cases import DEMO, LLAMA_3_8B, data, gpus, planned


def batch_of(lengths: list[int], targets: list[int]) -> Batch:
    """Documents end to end; `targets` are places of tokens that are to be predicted."""
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.arange(1, int(ends[-1]) + 1)
    return Batch(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cumulative_lengths=ends,
        max_document_length=max(lengths),
        target_positions=torch.tensor(targets, dtype=torch.long) - 1,
        target_ids=ids[torch.tensor(targets, dtype=torch.long)],
        target_weights=torch.tensor(targets, dtype=torch.float32),
        num_targets_in_step=len(targets),
        weight_in_step=1.0,
        rows=(0,),
    )


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=4), size=st.integers(2, 5), drawn=st.data())
def test_the_parts_of_a_row_are_the_row(lengths: list[int], size: int, drawn: st.DataObject) -> None:
    targets = sorted(drawn.draw(st.sets(st.integers(1, sum(lengths) - 1))))
    whole = batch_of(lengths, targets)
    parts = [slice_of(whole, place, size) for place in range(size)]
    num_tokens = {part.input_ids.shape[1] for part in parts} | {part.num_tokens for part in parts}
    assert len(num_tokens) == 1, "equal parts"
    length = num_tokens.pop()
    joined = torch.cat([part.input_ids for part in parts], dim=1)
    positions = torch.cat([part.position_ids for part in parts], dim=1)
    num_filled = size * length - whole.num_tokens
    assert 0 <= num_filled < size
    assert torch.equal(joined[:, : whole.num_tokens], whole.input_ids)
    assert torch.equal(positions[:, : whole.num_tokens], whole.position_ids)
    found = [
        (place * length + int(position), int(target), float(weight))
        for place, part in enumerate(parts)
        if part.target_weights is not None
        for position, target, weight in zip(part.target_positions, part.target_ids, part.target_weights)
    ]
    assert whole.target_weights is not None
    assert found == list(
        zip(whole.target_positions.tolist(), whole.target_ids.tolist(), whole.target_weights.tolist(), strict=True)
    )
    for part in parts:
        filled = [num_filled] if num_filled else []
        assert part.cumulative_lengths.diff().tolist() == [*lengths, *filled], "attention sees where all documents lie"
        assert part.step_weight == whole.step_weight


def test_neighbours_share_rows() -> None:
    batch = BatchPlan(workers=4, micro_batch_size=1, accumulation=3, sequence_parallel=2)
    seats = [Seat.of(batch, rank, 4) for rank in range(4)]
    assert [(seat.group, seat.num_groups, seat.place) for seat in seats] == [(0, 2, 0), (0, 2, 1), (1, 2, 0), (1, 2, 1)]
    assert batch.global_batch_size == 6
    assert batch.equation == "2 groups of 2 workers x 1 packed row x 3 accumulation = 6 packed rows per step"


def asked(size: int, **sections: Any) -> RunConfig:
    training = {"sequence_parallel_size": size} | sections.pop("training", {})
    return RunConfig.model_validate({"training": training} | sections)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"attention": "sdpa"}}, "only varlen exchanges heads"),
        ({"adapter": {"method": "prompt_tuning"}}, "virtual tokens"),
        ({"adapter": {"method": "lora", "init": "eva"}}, "looks at whole rows"),
        ({"model": {"rope_scaling": {"type": "dynamic", "factor": 2}}}, "scaled by dynamic"),
        ({"training": {"compile": True}}, "training.compile"),
        ({"training": {"liger": True}}, "training.liger"),
        ({"training": {"neftune_noise_alpha": 5.0}}, "neftune"),
    ],
    ids=str,
)
def test_what_a_part_of_a_row_does_not_tell_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_sequence(asked(2, **sections), DEMO)
    check_sequence(asked(1, **sections), DEMO)


def test_bases_whose_layers_or_positions_see_the_row_are_refused() -> None:
    with pytest.raises(UserError, match="carry state"):
        check_sequence(asked(2), replace(DEMO, why_lone="Its layers carry state"))
    with pytest.raises(UserError, match="longrope"):
        check_sequence(asked(2), replace(DEMO, rope=Rope(kind="longrope")))


def test_heads_are_shared_evenly_or_refused() -> None:
    for size in (2, 4, 8, 16, 32):
        check_sequence(asked(size), LLAMA_3_8B)  # 32 heads over 8
    with pytest.raises(UserError, match=r"Set it to 2 or 4\."):
        check_sequence(asked(3), LLAMA_3_8B)
    with pytest.raises(UserError, match=r"Set it to 32\."):
        check_sequence(asked(64), LLAMA_3_8B)


def test_workers_make_whole_groups() -> None:
    check_groups(4, 8)
    with pytest.raises(PlanError, match=r"cluster\.workers to 4, cluster\.workers to 8 or training\.sequence_parallel_size to 1"):
        check_groups(4, 6)
    section = TrainingSection(sequence_parallel_size=2, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    assert most_that_divide(3, 8, section) == 6


def bytes_of(name: str, plan: RunPlan) -> int:
    return sum(part.num_bytes for part in plan.memory if part.name == name)


def test_rows_that_no_worker_holds_are_shared() -> None:
    long = data(64, row_length=131_072)
    base = replace(LLAMA_3_8B, max_positions=131_072)
    sections: dict[str, Any] = {"data": {"max_length": 131_072}, "adapter": {"method": "full"}}
    with pytest.raises(PlanError, match=r"What would fit: training\.sequence_parallel_size=2"):
        planned(gpus(8), base, long, **sections)
    plan = planned(gpus(8), base, long, **sections, training={"sequence_parallel_size": 8})
    assert plan.batch.data_parallel == 1
    assert plan.model.attention == "varlen"
    assert any(note.startswith("8 workers share each row") for note in plan.notes)
    quarters = planned(gpus(8), base, long, **sections, training={"sequence_parallel_size": 4, "zero": {"stage": 3}})
    eighths = planned(gpus(8), base, long, **sections, training={"sequence_parallel_size": 8, "zero": {"stage": 3}})
    for name in ("activations", "activations of a layer", "gradients of activations"):
        assert 2 * bytes_of(name, eighths) == bytes_of(name, quarters)
    assert bytes_of("weights", eighths) == bytes_of("weights", quarters)


def test_how_rows_are_shared_is_none_of_a_runs_identity() -> None:
    whole = {"workers": 2, "micro_batch_size": 1, "accumulation": 2}
    shared = {"workers": 2, "micro_batch_size": 1, "accumulation": 4, "sequence_parallel": 2}
    assert identity_of(tiny_plan(batch=whole)) == identity_of(tiny_plan(batch=shared))


def test_gpt_2_can_share_rows() -> None:
    shape = model_shape({"model_type": "gpt2", "n_embd": 24, "n_head": 4, "n_layer": 2, "vocab_size": 99}, "gpt2")
    check_sequence(asked(4), shape)
