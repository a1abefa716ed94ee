"""The script that holds the plan against the allocator; on machines without a GPU, its bytes by part at a tiny size."""

from itertools import product

import pytest
import torch

from tests.gpu import plan
from tests.gpu.conftest import Lines
from tests.gpu.material import METHODS

TINY = ("--size", "tiny", "--device", "cpu", "--tokens", "256", "--document", "64", "--stages", "0", "2", "3")


def test_planned_parts_are_those_of_the_engine_in_every_way(lines: Lines) -> None:
    plan.main(TINY)
    measured = lines()
    assert [(line["method"], line["stage"], line["gradient_checkpointing"]) for line in measured] == list(
        product(METHODS, (0, 2, 3), (False, True))
    )
    for line in measured:
        ratios = line["planned_over_measured"]
        assert line["is_within"], line
        assert abs(ratios["weights"] - 1) < 0.02, line
        assert abs(ratios["optimizer"] - 1) < 0.02, line
        assert ratios["peak"] is None, "a CPU's peak is the process's"


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({"weights": 1.019, "optimizer": 0.981, "peak": 1.049}, True),
        ({"weights": 1.0, "optimizer": 1.0, "peak": None}, True),
        ({"weights": 1.021, "optimizer": 1.0, "peak": 1.0}, False),
        ({"weights": 1.0, "optimizer": 0.979, "peak": None}, False),
        ({"weights": 1.0, "optimizer": 1.0, "peak": 0.94}, False),
    ],
)
def test_a_plan_is_off_if_any_measured_ratio_is(ratios: dict[str, float | None], expected: bool) -> None:
    assert plan.is_within(ratios) is expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_it_skips(lines: Lines) -> None:
    plan.main(())
    assert "no CUDA device" in lines()[0]["skipped"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees no CUDA device here")
def test_planned_peaks_are_those_of_the_allocator_on_a_gpu(lines: Lines) -> None:
    plan.main(
        (
            "--size",
            "1b",
        )
    )
    assert all(line["is_within"] for line in lines())
