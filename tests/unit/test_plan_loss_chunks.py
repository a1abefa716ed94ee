"""How many targets are projected at a time, as a function; and what a plan makes of it."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.plan.costs.loss_chunks import (
    FEWEST,
    MOST,
    SHARE_OF_PRODUCTS,
    bytes_per_weight,
    chunk_within,
    exceeds_full_logits,
    num_chunks,
    smallest_chunk,
    wanted_chunk,
)
from raytune.plan.costs.memory import bytes_in
from raytune.units import GIB, MIB
from tests.tiny import PATIENT
from tests.unit.plan_cases import CPU, LLAMA_3_8B, gpus, planned

VOCABULARIES = st.integers(2, 300_000)
WANTED = st.sampled_from([1024, 2048, 4096])
BYTES = st.integers(1, 4 * 300_000)
ROOMS = st.integers(-(2**40), 2**40)


@pytest.mark.parametrize("vocab", [259, 32_000, 50_257, 128_256, 262_208])
def test_the_smallest_chunk_of_logits_is_between_32_and_64_mib(vocab: int) -> None:
    assert 32 * MIB < 4 * vocab * smallest_chunk(vocab) <= 64 * MIB


@PATIENT
@given(vocab=VOCABULARIES, wanted=WANTED, each=BYTES, room=ROOMS)
def test_a_chunk_is_a_power_of_two_that_takes_no_more_than_its_room(vocab: int, wanted: int, each: int, room: int) -> None:
    chunk, smallest = chunk_within(vocab, wanted, bytes_per_target=each, room=room), smallest_chunk(vocab)
    assert chunk & (chunk - 1) == 0
    assert smallest <= chunk <= max(smallest, wanted)
    assert chunk == smallest or (chunk - smallest) * each <= room
    # Nor less: twice as many would be more than is wanted, or than there is room for.
    assert chunk >= wanted or (2 * chunk - smallest) * each > room


@PATIENT
@given(vocab=VOCABULARIES, wanted=WANTED, each=BYTES, rooms=st.tuples(ROOMS, ROOMS).map(sorted))
def test_more_room_and_fewer_bytes_never_mean_a_smaller_chunk(vocab: int, wanted: int, each: int, rooms: list[int]) -> None:
    little, much = (chunk_within(vocab, wanted, bytes_per_target=each, room=room) for room in rooms)
    assert little <= much
    assert chunk_within(vocab, wanted, bytes_per_target=2 * each, room=rooms[1]) <= much
    assert much <= chunk_within(vocab, wanted, bytes_per_target=each, room=None) == max(wanted, smallest_chunk(vocab))


@PATIENT
@given(vocabularies=st.tuples(VOCABULARIES, VOCABULARIES).map(sorted), wanted=WANTED, room=ROOMS)
def test_a_larger_vocabulary_never_means_a_larger_chunk(vocabularies: list[int], wanted: int, room: int) -> None:
    # What is there beside the loss is the same; 10 bytes per logit are those of products in bf16.
    chunks = []
    for vocab in vocabularies:
        left = room - 10 * vocab * smallest_chunk(vocab)
        chunks.append(chunk_within(vocab, wanted, bytes_per_target=10 * vocab, room=left))
    # The smallest is a power of two of its own.
    assert chunks[1] <= max(chunks[0], smallest_chunk(vocabularies[0]))


@pytest.mark.parametrize("is_trained", [False, True])
def test_what_is_wanted_keeps_a_chunk_s_traffic_small_beside_its_products(is_trained: bool) -> None:
    wanted = [wanted_chunk(width=2, is_trained=is_trained, flops_per_byte=balance) for balance in range(1, 1000, 7)]
    assert all(left <= right for left, right in pairwise(wanted)), "faster products want more targets"
    assert (wanted[0], wanted[-1]) == (FEWEST, MOST)
    for balance, chunk in zip(range(1, 1000, 7), wanted):
        share = bytes_per_weight(width=2, is_trained=is_trained) * balance / ((6 if is_trained else 4) * chunk)
        assert share <= SHARE_OF_PRODUCTS or chunk == MOST
        assert chunk == FEWEST or 2 * share > SHARE_OF_PRODUCTS, "no more than it takes"


def test_a_frozen_head_wants_fewer_targets_than_a_trained_one() -> None:
    # Of an H100: 221 operations per byte. 2 x 2 + 8 bytes and 6 operations per weight against 4 and 4.
    assert wanted_chunk(width=2, is_trained=True, flops_per_byte=None) == 2048
    assert wanted_chunk(width=2, is_trained=False, flops_per_byte=None) == 1024


def test_chunks_are_counted_as_they_are_cut() -> None:
    assert [num_chunks(targets, 1024) for targets in (1, 1024, 1025, 8192)] == [1, 1, 2, 8]
    assert num_chunks(8192, None) == 1
    assert not exceeds_full_logits(1024, 65_536)
    assert exceeds_full_logits(1025, 65_536)


# --- in a plan


def test_a_gpu_with_room_projects_thousands_of_targets_at_a_time() -> None:
    trained = planned(gpus(8), LLAMA_3_8B, adapter={"method": "full"})
    frozen = planned(gpus(8), LLAMA_3_8B, adapter={"method": "lora"})
    assert (trained.loss.chunk_tokens, frozen.loss.chunk_tokens) == (2048, 1024)
    reason = next(reason for reason in trained.reasons if reason.startswith("training.loss"))
    assert "chunked, 2048 targets at a time" in reason


def test_with_less_room_a_chunk_is_smaller_before_anything_else_is() -> None:
    tight, sizes = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}, []
    for tenths in range(1535, 1565, 1):
        machine = replace(gpus(1), gpu_memory_bytes=tenths * GIB // 10)
        plan = planned(machine, LLAMA_3_8B, adapter={"method": "full"}, training=tight)
        assert bytes_in(plan.memory, "device") <= 0.9 * tenths / 10 * GIB
        sizes.append(plan.loss.chunk_tokens)
    assert sizes == sorted(sizes)
    assert {256, 512, 1024, 2048} <= {*sizes} <= {128, 256, 512, 1024, 2048}


def test_a_cpu_and_fp32_keep_the_smallest_chunk() -> None:
    for machine, training in ((CPU, {"loss": "chunked"}), (gpus(1), {"loss": "chunked", "precision": "fp32"})):
        plan = planned(machine, training=training)
        assert plan.loss.chunk_tokens == smallest_chunk(259)
    large = replace(CPU, host_memory_bytes=100 * GIB)
    on_cpu = planned(large, LLAMA_3_8B, adapter={"method": "lora"}, training={"loss": "chunked"})
    assert on_cpu.loss.chunk_tokens == smallest_chunk(LLAMA_3_8B.vocab) == 128
