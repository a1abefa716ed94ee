"""The loss in chunks at a real size on a GPU; on machines without one, the same code at a small size."""

import pytest
import torch

from raytune.training.losses.projections import add_product
from tests.gpu.conftest import Lines
from tests.gpu.loss import main

SMALL = ("--device", "cpu", "--width", "32", "--vocabulary", "512", "--targets", "256", "--rounds", "1", "--chunks", "64", "256")


def test_every_size_of_chunks_is_measured_and_gives_the_gradients_of_fp32(lines: Lines) -> None:
    main(SMALL)
    measured = lines()
    assert [line["chunk_tokens"] for line in measured] == [64, 256, 64, 256]
    assert all(0 < line["largest_error"] < 0.02 for line in measured), measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_it_skips(lines: Lines) -> None:
    main(())
    assert "no CUDA device" in lines()[0]["skipped"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees no CUDA device here")
def test_a_gpu_adds_products_of_16_bits_to_sums_in_fp32() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(768, 256, device="cuda").bfloat16(), torch.randn(768, 512, device="cuda").bfloat16()
    total = torch.randn(256, 512, device="cuda")
    expected = total.double() + left.double().T @ right.double()
    add_product(total, left.T, right)
    # 768 terms of about 1, added in fp32; in bf16 the error would be some 0.1.
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees no CUDA device here")
def test_planned_chunks_are_no_slower_than_small_ones_on_a_gpu(lines: Lines) -> None:
    main(())
    measured = lines()
    for head in ("trained", "frozen"):
        of_head = [line for line in measured if line["head"] == head]
        planned = next(line for line in of_head if line["is_planned"])
        assert planned["seconds"] < next(line for line in of_head if line["chunk_tokens"] == 128)["seconds"], of_head
