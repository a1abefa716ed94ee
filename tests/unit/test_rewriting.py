"""What a merge takes, by the headers of files and by arithmetic."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from raytune.config.words.guides import guides
from raytune.errors import ModelError
from raytune.model.files.rewriting import merging_of, rewriting_of
from raytune.model.files.stored_weights import StoredWeights
from raytune.plan.saved.rewriting import Rewriting
from raytune.units import GIB
from tests.tiny import save_tiny_model


def test_headers_tell_the_largest_tensor_and_the_largest_that_is_changed(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", tied=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["down_proj", "q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    need = merging_of([tmp_path / "adapter"] * 2, None, torch.bfloat16, 5 * GIB)
    num_values = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)
    assert need.total_bytes == 2 * num_values
    assert need.largest_bytes == 4 * 259 * 32  # as it is read, in fp32
    assert need.largest_merged == 64 * 32
    assert need.adapter_values == 2 * 2 * 2 * (64 + 32 + 32 + 32)
    assert rewriting_of(StoredWeights(base), None, 1000).largest_merged == 0
    with pytest.raises(ModelError, match="is not on this machine"):
        merging_of([tmp_path / "adapter"], "nobody/nothing", None, 5 * GIB)


def test_a_70b_takes_what_the_guide_says() -> None:
    width, inner, vocab, layers, rank = 8192, 28672, 128256, 80, 16
    sides = [(width, width), (width, 1024), (width, 1024), (width, width), (width, inner), (width, inner), (inner, width)]
    values = 2 * vocab * width + layers * (sum(a * b for a, b in sides) + 2 * width) + width
    for shard_bytes, said in ((5 * GIB, "14 GiB"), (10**9, "9.92 GiB")):
        need = Rewriting(
            total_bytes=2 * values,
            shard_bytes=shard_bytes,
            largest_bytes=2 * vocab * width,
            largest_merged=width * inner,
            adapter_values=layers * rank * sum(a + b for a, b in sides),
        )
        assert f"about {said} of memory" in need.sentence
        assert said in guides()["exporting"].text
        assert "131 GiB of disk" in need.sentence
