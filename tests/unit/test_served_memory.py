"""How much an engine takes on, by the memory of its node or GPU."""

from typing import Any

import pytest

from raytune.errors import PlanError
from raytune.model.demo import demo_base_path
from raytune.plan.facts.machine import USABLE_SHARE, Machine
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.saved.asked_model import AskedModel, plain_model
from raytune.plan.saved.served_memory import engine_limits
from raytune.plan.saved.serving import SPARE_COLUMNS, most_cached_tokens
from raytune.units import MIB

SHAPE = read_model_shape(str(demo_base_path()))


def limits(memory_bytes: int, *, dtype: Any = "fp32", device: str = "cpu", nodes: int = 1, **options: Any) -> Any:
    machine = Machine(
        num_nodes=nodes,
        num_cpus=4,
        host_memory_bytes=memory_bytes,
        num_gpus=1,
        gpu_name=None,
        gpu_memory_bytes=memory_bytes,
        supports_bf16=True,
        attention=("sdpa",),
    )
    model = AskedModel(name="m", model=plain_model(str(demo_base_path()), dtype))
    how_many = {"replicas": 1, "max_batch": 32, "max_waiting": 5} | options
    return engine_limits(machine, SHAPE, model, device=device, **how_many)


def test_room_is_what_is_left_beside_the_weights_of_each_replica() -> None:
    memory = 64 * MIB
    beside = int(USABLE_SHARE * memory - SHAPE.num_parameters * 4)
    assert limits(memory).most_cached_tokens == most_cached_tokens(beside, SHAPE, 4)
    halved = int(USABLE_SHARE * memory / 2 - SHAPE.num_parameters * 4)
    assert limits(memory, replicas=2).most_cached_tokens == most_cached_tokens(halved, SHAPE, 4)
    assert limits(memory, replicas=2, nodes=2) == limits(memory)
    assert limits(memory, replicas=3, nodes=2) == limits(memory, replicas=2)
    assert limits(memory, device="cuda", replicas=2) == limits(memory, device="cuda"), "each has a GPU of its own"
    in_16_bits = most_cached_tokens(int(USABLE_SHARE * memory - SHAPE.num_parameters * 2), SHAPE, 2)
    assert limits(memory, device="cuda", dtype="bf16").most_cached_tokens == in_16_bits
    assert limits(memory, dtype="fp16") == limits(memory), "which a CPU holds in fp32"


def test_no_more_is_set_aside_than_answers_can_fill() -> None:
    found = limits(1 << 40, max_batch=3)
    assert found.most_cached_tokens == 3 * (SHAPE.max_positions + SPARE_COLUMNS)
    assert (found.most_at_once, found.most_waiting) == (3, 5)
    with pytest.raises(PlanError):
        limits(int(SHAPE.num_parameters * 4 / USABLE_SHARE) + 1024)
