"""A state of a GPU in pinned memory: what it was, though training goes on at once."""

from pathlib import Path

import pytest
import torch
from torch import nn

from raytune.training.checkpoints.snapshot import HostMemory, Snapshot
from raytune.training.engines.plain_engine import PlainEngine


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees no CUDA device here")
def test_a_copy_of_a_gpus_state_is_of_its_step(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4))).to(device)
    engine = PlainEngine(model, torch.optim.AdamW(model.parameters()), precision="fp32", max_grad_norm=1.0, device=device)

    def train() -> None:
        engine.backward(engine.module(torch.randn(64, 2048, device=device)).square().mean())
        engine.step(0.01)

    train()
    engine.save(tmp_path / "now")
    memory = HostMemory(4 * 3 * sum(parameter.numel() for parameter in model.parameters()) + (1 << 16), device)
    planned = memory.num_bytes
    snapshot = Snapshot(memory)
    engine.save(tmp_path / "later", snapshot)
    for _ in range(3):
        train()
    snapshot.write()
    assert memory.num_bytes == planned
    assert all(block.is_pinned() for block in memory._blocks)
    for path in (tmp_path / "now").iterdir():
        assert path.read_bytes() == (tmp_path / "later" / path.name).read_bytes()
    memory.release()
    assert memory.num_bytes == 0
