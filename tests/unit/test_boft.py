"""BOFT with more than one rotation per layer, which plain PEFT has only with its CUDA extension, and what a plan says of BOFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import AutoModelForCausalLM

from raytune.config.sections.adapter import Adapter
from raytune.errors import ModelError
from raytune.model.adapters import add_adapter
from raytune.model.files.export import save_adapter
from raytune.model.merging.merge import merge_adapter
from raytune.plan.costs.memory import memory_parts
from raytune.plan.costs.throughput import flops_per_micro_batch
from raytune.plan.methods import trained_by
from tests.tiny import save_tiny_model
from tests.unit.plan_cases import CPU, DEMO, LLAMA_3_8B, gpus, planned
from tests.unit.test_plan_memory import workload

IDS = torch.arange(3, 40)[None]


def section(**changes: Any) -> Any:
    return TypeAdapter(Adapter).validate_python({"method": "boft", "block_size": 2} | changes)


def adapted(folder: Path, **changes: Any) -> Any:
    """A tiny base with rotations that turn something."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = add_adapter(base, section(**changes), revision=None, seed=0)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def rotated_as_written(x: Tensor, blocks: Tensor, permutations: Tensor) -> Tensor:
    """Liu et al. 2024, equation 4, of Cayley's rotations: each factor turns its blocks of what the factors before it gave."""
    rotation = torch.eye(x.shape[-1])
    for factor, permutation in zip(blocks, permutations):
        skew = [0.5 * (block - block.T) for block in factor]
        turns = [(torch.eye(len(one)) - one) @ torch.linalg.inv(torch.eye(len(one)) + one) for one in skew]
        rotation = permutation @ torch.block_diag(*turns) @ permutation.T @ rotation
    return x @ rotation


@pytest.mark.parametrize("factors", [2, 3])
def test_more_than_one_rotation_computes_what_the_paper_writes(factors: int, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path, hidden_size=32, intermediate_size=48)
    layer = adapted(base, num_butterfly_factors=factors).base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(5, 48)
    ours = layer(x)
    blocks, scale = layer.boft_R["default"], layer.boft_s["default"]
    assert [blocks.shape[0], layer.boft_P.shape[0]] == [factors, factors]
    theirs = rotated_as_written(x, blocks, layer.boft_P) @ layer.base_layer.weight.T * scale.squeeze(-1)
    assert (ours - theirs).abs().max() <= 1e-6
    (gradient,) = torch.autograd.grad(ours.square().sum(), blocks)
    (wanted,) = torch.autograd.grad(theirs.square().sum(), blocks)
    assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_far_inputs_meet_in_more_than_one_rotation(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path, hidden_size=32, intermediate_size=48)

    def met(factors: int) -> int:
        layer = adapted(base, num_butterfly_factors=factors).base_model.model.model.layers[0].mlp.down_proj
        return int((layer.get_delta_weight("default")[0][0].abs() > 1e-8).sum())

    assert [met(factors) for factors in (1, 2, 3)] == [2, 4, 8]


def test_more_than_one_rotation_is_merged(tmp_path: Path) -> None:
    model = adapted(save_tiny_model(tmp_path / "base", hidden_size=32, intermediate_size=48), num_butterfly_factors=2)
    state = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    save_adapter(model, state, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        difference = model.eval()(input_ids=IDS, use_cache=False).logits - merged(input_ids=IDS, use_cache=False).logits
    assert difference.abs().max() <= 1e-5


def test_permutations_have_the_dtype_of_the_base_and_hold_it_exactly(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path, hidden_size=32, intermediate_size=48)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model: Any = add_adapter(loaded, section(num_butterfly_factors=2), revision=None, seed=0)
    held = [module.boft_P for module in model.modules() if hasattr(module, "boft_P")]
    assert {one.dtype for one in held} == {torch.bfloat16}
    assert all(one.sum() == one.shape[0] * one.shape[1] for one in held)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 7}, r"which does not divide the \d+ inputs of .* Set adapter\.block_size to \d+ or \d+ or leave"),
        ({"block_size": 3, "num_butterfly_factors": 2}, r"in an even size and 2 blocks at a time, as PEFT needs it\. Set"),
        ({"num_butterfly_factors": 12}, r"No size does for all layers, set adapter\.num_butterfly_factors to 1, or leave"),
    ],
)
def test_blocks_that_do_not_divide_a_layer_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        planned(CPU, DEMO, adapter={"method": "boft"} | changes)


def test_a_plan_counts_a_square_matrix_per_layer_and_factor() -> None:
    squares = sum(module.inputs**2 for layer in LLAMA_3_8B.layers() for module in layer if module.is_linear)
    for factors in (1, 2):
        trained = trained_by(section(block_size=4, num_butterfly_factors=factors), LLAMA_3_8B)
        assert trained.num_constants == factors * squares
        weights = {part.name: part.num_bytes for part in memory_parts(workload(adapter=section(), zero_stage=3, workers=64))}
    assert weights["weights"] > 2 * squares, "whole on every rank"


def test_a_plan_that_does_not_fit_is_refused_by_memory() -> None:
    with pytest.raises(Exception, match="GiB"):
        planned(gpus(1, 24), LLAMA_3_8B, adapter={"method": "boft"})


def test_making_the_rotations_takes_time_in_a_plan() -> None:
    """Three products of square matrices in each of two passes, and six per token with what they give."""
    work = workload(adapter=section(block_size=4))
    oft = workload(adapter=TypeAdapter(Adapter).validate_python({"method": "oft"}))
    linear = [module for layer in LLAMA_3_8B.layers() for module in layer if module.is_linear]
    made = 2 * 3 * 2 * sum(module.inputs**3 for module in linear)
    per_token = 6 * (sum(module.inputs**2 for module in linear) - oft.trained.num_trainable)
    difference = flops_per_micro_batch(work, 1) - flops_per_micro_batch(oft, 1)
    assert difference == pytest.approx(made + per_token * work.num_tokens)


def test_a_plan_says_who_reads_more_than_one_rotation() -> None:
    said = planned(CPU, DEMO, adapter={"method": "boft", "num_butterfly_factors": 2}).reasons
    assert any("plain PEFT reads such an adapter only where it can compile" in reason for reason in said)
    assert not any("plain PEFT reads such" in reason for reason in planned(CPU, DEMO, adapter={"method": "boft"}).reasons)


def test_dropout_that_leaves_no_block_out_is_said_to_do_nothing() -> None:
    said = planned(CPU, DEMO, adapter={"method": "boft", "block_size": 16, "dropout": 0.01}).reasons
    assert any("adapter.dropout 0.01 is not read" in reason for reason in said)
