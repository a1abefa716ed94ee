"""Planned memory against the allocator's; on machines without a GPU, of a small model on the CPU's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import plan
from tests.gpu.conftest import Lines

ROOT = Path(__file__).parents[2]
SMALL = ("--size", "small", "--device", "cpu", "--tokens", "256", "--document", "64")


@pytest.mark.parametrize(
    ("options", "moments"),
    [
        pytest.param(("--stages", "0", "2", "3"), {"forward", "loss", "update"}, marks=pytest.mark.slow),
        pytest.param(
            ("--stages", "0", "1", "3", "--methods", "full", "--set", "training.gradient_accumulation_steps=2"),
            {"forward", "loss"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--stages", "0", "2", "--methods", "full", "--set", "training.loss=chunked"),
            {"forward", "update"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one pass", "accumulation", "chunked loss"],
)
def test_a_step_takes_the_planned_memory_of_a_cpu_in_every_way(options: tuple[str, ...], moments: set[str]) -> None:
    """In a process of its own: stage 3 replaces torch's linear function for the rest of one."""
    command = [sys.executable, "-m", "tests.gpu.plan", *SMALL, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    measured = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    wrong = [json.dumps(line) for line in measured if not line["is_within"]]
    assert done.returncode == 0, "\n".join(wrong) or done.stderr  # in text, of which pytest shows all
    for line in measured:
        ratios = line["planned_over_measured"]
        assert abs(ratios["weights"] - 1) < 0.02, line
        assert abs(ratios["optimizer"] - 1) < 0.02, line
        assert abs(ratios["peak"] - 1) < 0.05, line
    assert {line["fullest_moment"] for line in measured} == moments, "one kind of peak proves little"


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({"weights": 1.019, "optimizer": 0.981, "peak": 1.049}, True),
        ({"weights": 1.021, "optimizer": 1.0, "peak": 1.0}, False),
        ({"weights": 1.0, "optimizer": 0.979, "peak": 1.0}, False),
        ({"weights": 1.0, "optimizer": 1.0, "peak": 0.94}, False),
    ],
)
def test_a_plan_is_off_if_any_ratio_is(ratios: dict[str, float], expected: bool) -> None:
    assert plan.is_within(ratios) is expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_it_skips(lines: Lines) -> None:
    plan.main(())
    assert "no CUDA device" in lines()[0]["skipped"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees no CUDA device here")
def test_planned_peaks_are_those_of_the_allocator_on_a_gpu(lines: Lines) -> None:
    plan.main(("--size", "1b"))
    assert all(line["is_within"] for line in lines())
