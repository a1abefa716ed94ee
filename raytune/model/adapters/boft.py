"""BOFT on a model: PEFT's configuration of it, its permutations, and blocks laid out without PEFT's CUDA extension."""

from typing import Any

import peft.tuners.boft.layer as peft_boft
from peft import BOFTConfig, PeftModel
from peft.tuners.boft.layer import BOFTLayer
from torch import Tensor
from transformers import PreTrainedModel

from raytune.config.sections.adapter import BoftAdapter
from raytune.model.adapters.adapting import Adapting, added
from raytune.model.adapters.targets import peft_names, unchanged_experts

ADAPTER = "default"


class _BlockDiagonals:
    """Stands for the CUDA extension that PEFT 0.21 compiles in each process before it adds anything: the same numbers from torch.

    Where PEFT cannot compile it, one layer after the other tries, and more than one rotation per layer becomes one in silence.
    """

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        """Matrices (N, D H, D H) with blocks (N, D, H, H) along their diagonals."""
        rotations, count, size, _ = blocks.shape
        whole = blocks.new_zeros(rotations, count, size, count, size)
        whole.diagonal(dim1=1, dim2=3).copy_(blocks.permute(0, 2, 3, 1))
        return [whole.view(rotations, count * size, count * size)]

    @staticmethod
    def backward(gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        """The gradient of the blocks, of that of the matrices."""
        rotations, count, size, _ = blocks.shape
        whole = gradient.reshape(rotations, count, size, count, size)
        return [whole.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).to(blocks.dtype).contiguous()]


peft_boft._FBD_CUDA = _BlockDiagonals()  # pyright: ignore[reportPrivateUsage]


def _add(model: PreTrainedModel, adapter: BoftAdapter, revision: str | None, seed: int) -> PeftModel:
    config = BOFTConfig(
        task_type="CAUSAL_LM",
        boft_block_size=adapter.block_size,
        boft_n_butterfly_factor=adapter.num_butterfly_factors,
        boft_dropout=adapter.dropout,
        revision=revision,
        **peft_names(model, adapter),
    )
    adapted = added(model, config, adapter, seed=seed)
    _place_permutations(adapted)
    return adapted


def _place_permutations(model: PeftModel) -> None:
    """Permutations where what they permute lies, in the dtype of the base's whole weights, which hold 0 and 1 exactly: PEFT 0.21
    makes them on the CPU in fp32, and copies them in each pass."""
    whole: Any = model.get_input_embeddings()
    for layer in model.modules():
        if isinstance(layer, BOFTLayer):
            permuted: Any = layer
            permuted.boft_P = permuted.boft_P.to(permuted.boft_s[ADAPTER].device, whole.weight.dtype)


ADAPTING = Adapting(
    add=_add,
    frozen_experts=unchanged_experts,
    leaves_base_alone=lambda adapter, is_quantised: not (adapter.modules_to_save or is_quantised),
    peft_type="BOFT",
    merges=True,
    mend=_place_permutations,
)
