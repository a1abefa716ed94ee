"""After `release` an engine holds nothing: the next model has the whole device."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from raytune.plan.run_plan import RunPlan
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import LORA, QLORA, Change, Material, make_plan, start, steps_of
from tests.variants import variants

FULL = {"method": "full"}

# Scalars of the last step, and the tables of 256 numbers that bitsandbytes keeps as long as the process lives.
SMALL_BYTES = 2000


def bytes_of_tensors() -> int:
    """Of all that Python can find."""
    return sum(thing.nbytes for thing in gc.get_objects() if issubclass(type(thing), Tensor))  # not isinstance: proxies


def train_and_release(plan: RunPlan) -> tuple[int, int, int, int]:
    """Bytes of tensors before, while and after an engine trained; how many of the model's parameters and modules outlived it."""
    before = bytes_of_tensors()
    engine, loss_sum, batches_of = start(plan)
    for result in steps_of(plan, engine, loss_sum, batches_of, Change(stop=2)):
        result.read(engine)
    held = bytes_of_tensors()
    things = [*engine.model.parameters(), *engine.model.modules()]
    references = [weakref.ref(thing) for thing in things]
    del loss_sum, things
    engine.release()
    assert engine.gather_objects(engine.rank) == list(range(engine.world_size))
    assert engine.all_reduce_sum(torch.ones(1)) == engine.world_size
    return before, held, bytes_of_tensors(), sum(reference() is not None for reference in references)


@pytest.mark.parametrize(
    ("workers", "stage", "adapter"),
    variants([(1, 0, FULL), (2, 1, LORA), (2, 3, QLORA)], [(1, 0, QLORA), (2, 2, FULL), (2, 3, FULL)]),
    ids=str,
)
def test_a_released_engine_leaves_no_tensor(workers: int, stage: int, adapter: dict, material: Material) -> None:
    model = {"path": str(material.model), "dtype": "fp32" if stage == 0 and adapter == FULL else "bf16", "compute_dtype": "bf16"}
    plan = make_plan(material, workers=workers, stage=stage, precision="bf16", adapter=adapter, model=model)
    for before, held, after, num_alive in run_on_ranks(train_and_release, workers, plan):
        assert held > before + plan.num_parameters // 2  # bytes: four bits per weight at least
        assert after - before < SMALL_BYTES
        assert num_alive == 0
