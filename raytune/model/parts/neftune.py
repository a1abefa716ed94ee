"""NEFTune (Jain et al. 2023): uniform noise on the embeddings in training, which makes instruction tuning less literal."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Shapes: T tokens of all documents, D width.


def add_neftune(model: PreTrainedModel, noise_alpha: float) -> None:
    """Add noise of at most alpha / sqrt(L * D) to the embeddings while training, L being the length of a token's document.

    For one document this is transformers' rule. In a packed row L stays the document's, so that packing does not weaken it.
    """
    lengths_T: list[Tensor] = []

    def note_lengths(_module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        ends = kwargs.get("cu_seq_lens_q")
        lengths_T.clear()
        if ends is not None:
            counts = ends.diff()
            lengths_T.append(counts.repeat_interleave(counts, output_size=kwargs["input_ids"].shape[1]))

    def add_noise(module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        length = lengths_T[0][:, None] if lengths_T else torch.tensor(output.shape[1], device=output.device)
        bound = noise_alpha / (length * output.shape[2]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * bound.to(output.dtype)

    decoder = model.base_model if isinstance(model.base_model, nn.Module) else model
    decoder.register_forward_pre_hook(note_lengths, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(add_noise)
