"""Steps at a real size on a GPU; on machines without one, the same code at a tiny size."""

import pytest
import torch

from tests.gpu.conftest import Lines
from tests.gpu.material import METHODS
from tests.gpu.steps import main

TINY = ("--size", "tiny", "--device", "cpu", "--tokens", "256", "--document", "64", "--warmup", "1", "--steps", "2")


def test_every_method_makes_steps_of_a_tiny_model_on_a_cpu(lines: Lines) -> None:
    main(TINY)
    measured = lines()
    assert [line["method"] for line in measured] == list(METHODS)
    # Random bytes: the loss starts at the logarithm of the vocabulary, 6.2, and 3 steps change little.
    assert all(5 < line["last_loss"] < 7 and line["tokens_per_s"] > 0 for line in measured), measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_it_skips(lines: Lines) -> None:
    main(())
    assert "no CUDA device" in lines()[0]["skipped"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees no CUDA device here")
def test_every_method_makes_steps_of_a_1b_model_on_a_gpu(lines: Lines) -> None:
    main(("--size", "1b", "--steps", "10"))
    measured = lines()
    assert [line["method"] for line in measured] == list(METHODS)
    # No figure of speed: it depends on the GPU. Memory is arithmetic, so the plan must cover it.
    assert all(line["peak_memory_gib"] <= line["planned_memory_gib"] for line in measured), measured
