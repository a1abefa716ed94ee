"""Steps at a real size on a GPU; on machines without one, the same code at a tiny size."""

import json
from typing import Any

import pytest
import torch

from tests.gpu.steps import METHODS, main

TINY = ("--size", "tiny", "--device", "cpu", "--tokens", "256", "--document", "64", "--warmup", "1", "--steps", "2")


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_every_method_makes_steps_of_a_tiny_model_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        main(TINY)
    finally:
        torch.set_num_threads(threads)
    lines = lines_of(capsys)
    assert [line["method"] for line in lines] == list(METHODS)
    # Random bytes: the loss starts at the logarithm of the vocabulary, 6.2, and 3 steps change little.
    assert all(5 < line["last_loss"] < 7 and line["tokens_per_s"] > 0 for line in lines), lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_it_skips(capsys: pytest.CaptureFixture[str]) -> None:
    main(())
    assert "no CUDA device" in lines_of(capsys)[0]["skipped"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees no CUDA device here")
def test_every_method_makes_steps_of_a_1b_model_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    main(("--size", "1b", "--steps", "10"))
    lines = lines_of(capsys)
    assert [line["method"] for line in lines] == list(METHODS)
    # No figure of speed: it depends on the GPU. Memory is arithmetic, so the plan must cover it.
    assert all(line["peak_memory_gib"] <= line["planned_memory_gib"] for line in lines), lines
