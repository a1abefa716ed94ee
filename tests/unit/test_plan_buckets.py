"""How much collectives carry: what links need, by model and fabric, and what that takes."""

from typing import Any

import pytest

from raytune.config.sections.adapter import FullAdapter, LoraAdapter
from raytune.plan.costs.buckets import (
    LARGEST_BYTES,
    LATENCY_SHARE,
    PERSISTENT_BYTES,
    SMALLEST_BYTES,
    Ring,
    buckets_of,
    num_persistent,
    parameter_sizes,
)
from raytune.plan.costs.hardware import load_catalogue
from raytune.plan.costs.throughput import Speed
from raytune.plan.facts.machine import Machine
from raytune.plan.methods import trained_by
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import BucketPlan, RunPlan
from raytune.training.engines.deepspeed_json import deepspeed_config
from tests.unit.plan_cases import DEMO, LLAMA_3_8B, LLAMA_3_70B, gpus, planned

FULL, LORA = FullAdapter(method="full"), LoraAdapter(method="lora", rank=16)


def speed_of(name: str) -> Speed:
    instance = load_catalogue().instance(name)
    return Speed.of(instance, load_catalogue().gpu_of(instance))


def on(name: str, workers: int, shape: ModelShape = LLAMA_3_8B, *, method: Any = FULL, engine: str = "zero") -> BucketPlan:
    width = 4 if engine == "plain" else 2
    trained, ring = trained_by(method, shape), speed_of(name).ring(workers)
    return buckets_of(engine=engine, width=width, workers=workers, shape=shape, trained=trained, quantization=None, ring=ring)


@pytest.mark.parametrize(
    ("name", "workers"), [("p5.48xlarge", 8), ("p5.48xlarge", 16), ("p4de.24xlarge", 16), ("g6e.48xlarge", 8)]
)
def test_latencies_take_a_tenth_of_what_a_bucket_takes(name: str, workers: int) -> None:
    ring, num_bytes = speed_of(name).ring(workers), 2 * on(name, workers).reduce_elements
    latencies, transfer = (workers - 1) * ring.hop_s, (workers - 1) / workers * num_bytes / ring.bytes_per_s
    if SMALLEST_BYTES < num_bytes < LARGEST_BYTES:
        assert latencies / (latencies + transfer) == pytest.approx(LATENCY_SHARE, rel=1e-3)
    else:
        assert num_bytes == pytest.approx(SMALLEST_BYTES, rel=1e-3)
        assert latencies / (latencies + transfer) < LATENCY_SHARE


def test_more_ranks_and_slower_hops_ask_for_larger_buckets() -> None:
    sizes = [on("p5.48xlarge", workers).reduce_elements for workers in (8, 16, 32, 64)]
    assert sizes == sorted(sizes)
    assert 2 * sizes[-1] <= LARGEST_BYTES
    within, between = speed_of("p5.48xlarge").ring(8), speed_of("p5.48xlarge").ring(16)
    assert within == Ring(450e9 * 0.8, 3.4e-6)
    assert between == Ring(400e9 * 0.8, pytest.approx((2 * 14e-6 + 14 * 3.4e-6) / 16))


def test_an_adapter_travels_in_several_buckets_none_of_which_is_tiny() -> None:
    trained = trained_by(LORA, LLAMA_3_70B)
    size = on("p5.48xlarge", 64, LLAMA_3_70B, method=LORA).reduce_elements
    assert size == trained.num_trainable // 4
    assert 4 * on("p5.48xlarge", 8, DEMO, engine="plain").reduce_elements == SMALLEST_BYTES


def test_a_weight_is_gathered_while_another_waits_for_its_product() -> None:
    assert on("p5.48xlarge", 16).prefetch_elements >= 2 * 4096 * 14336
    assert on("p5.48xlarge", 64, LLAMA_3_70B).prefetch_elements >= 2 * 8192 * 28672


def test_small_weights_stay_whole_as_far_as_there_is_room_for_them() -> None:
    trained, largest = trained_by(LORA, LLAMA_3_8B), on("p5.48xlarge", 8, method=LORA)
    assert largest.persistent_elements == 14336 * 16, "both factors of every update, and no weight of the base but norms"
    whole = num_persistent(LLAMA_3_8B, trained, largest)
    assert whole == trained.num_trainable + (2 * 32 + 1) * 4096
    assert 2 * whole <= PERSISTENT_BYTES
    assert on("p5.48xlarge", 8).persistent_elements == 4096


def test_sizes_are_of_all_parameters() -> None:
    for shape in (DEMO, LLAMA_3_8B):
        for method in (FULL, LORA):
            trained = trained_by(method, shape)
            beside = 0 if trained.is_base else trained.num_trainable
            sizes = parameter_sizes(shape, trained)
            assert sum(size * count for size, count in sizes.items()) == shape.num_parameters + beside


def plan_on(name: str, num_nodes: int, **sections: Any) -> RunPlan:
    instance = load_catalogue().instance(name)
    machine = Machine.rented(instance, load_catalogue().gpu_of(instance), num_nodes)
    return planned(machine, LLAMA_3_8B, cluster={"instance": name, "nodes": num_nodes}, **sections)


def test_a_plan_says_counts_and_hands_on_what_collectives_carry() -> None:
    plan = plan_on("p5.48xlarge", 2, training={"zero": {"stage": 3}, "precision": "bf16"})
    section, buckets = deepspeed_config(plan)["zero_optimization"], plan.engine.buckets
    assert section["reduce_bucket_size"] == section["allgather_bucket_size"] == buckets.reduce_elements
    assert section["stage3_prefetch_bucket_size"] == buckets.prefetch_elements
    assert section["stage3_param_persistence_threshold"] == buckets.persistent_elements
    parts = {part.name: part.num_bytes for part in plan.memory}
    assert parts["buckets of gradients"] == 2 * 2 * buckets.reduce_elements
    assert any("Gradients are summed over the GPUs up to" in reason for reason in plan.reasons)


def test_without_a_known_fabric_collectives_are_as_they_were() -> None:
    assert planned(gpus(8), LLAMA_3_8B, training={"zero": {"stage": 2}}).engine.buckets == BucketPlan()
    assert planned().engine.buckets == BucketPlan(reduce_elements=16 * 2**20)
