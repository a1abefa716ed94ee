"""What methods share that lay virtual tokens in front of documents: PEFT's models, which see packed rows here, and their files.

PEFT's own forward pass has one document per row: it takes no positions and lets the documents of a packed row see each other.
A model that PEFT made, or loaded, is given another one here (`sees_tokens`, `sees_keys`), which finds among its inputs where
documents begin.
Names, start and files stay PEFT's, so that plain PEFT reads what is saved.
"""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig, get_peft_model
from torch import Tensor
from transformers import Cache, PreTrainedModel

from raytune.data.batches.in_front import laid_out, virtual_positions
from raytune.errors import ModelError
from raytune.model.adapters.adapting import as_asked

# Shapes: N tokens of all documents, D documents, V virtual tokens of each.

NAME = "default"
"""PEFT's name of the adapter."""
ENCODER = f"prompt_encoder.{NAME}."
"""What PEFT puts before the names of what is trained."""


def added_in_front(model: PreTrainedModel, config: PromptLearningConfig, *, seed: int) -> PeftModel:
    """A frozen model with one of PEFT's prompts, as plain PEFT makes it after `torch.manual_seed(seed)`, that sees packed rows.

    Raises:
        ModelError: if the model takes token ids only.
    """
    if "inputs_embeds" not in signature(model.forward).parameters:
        raise ModelError(
            f"{type(model).__name__} takes token ids only, and virtual tokens have none. Set adapter.method to lora."
        )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), as_asked():
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=False, revision=config.revision)
    return adapted


def sees_tokens(model: PeftModel) -> None:
    """Have a model put the embeddings of its virtual tokens in front of each document."""
    model.forward = MethodType(_forward_with_tokens, model)


def sees_keys(model: PeftModel) -> None:
    """Have each layer of a model put keys and values of virtual tokens in front of each document's."""
    model.forward = MethodType(_forward_with_keys, model)


def _forward_with_tokens(model: PeftModel, input_ids: Tensor, token_positions: Tensor | None = None, **inputs: Any) -> Any:
    """A forward pass over packed rows; over rows of one document each without `token_positions`.

    Args:
        input_ids: (1, N)
        token_positions: (N,) where these lie among all tokens; the other inputs are those of all tokens.
    """
    base: Any = model.get_base_model()
    own, virtual = base.get_input_embeddings()(input_ids), _made(model)
    if token_positions is None:
        rows = torch.cat([virtual.expand(len(own), -1, -1).to(own.dtype), own], dim=1)
    else:
        rows = laid_out(own, virtual, token_positions, virtual_positions(inputs["cu_seq_lens_q"], len(virtual)))
    return model.base_model(inputs_embeds=rows, **inputs)


def _forward_with_keys(model: PeftModel, input_ids: Tensor, token_positions: Tensor | None = None, **inputs: Any) -> Any:
    """A forward pass over packed rows, whose other inputs say where the keys of documents begin; PEFT's own without them."""
    if token_positions is None:
        return type(model).forward(model, input_ids=input_ids, **inputs)
    config: Any = model.active_peft_config
    virtual = _made(model).to(model.dtype)  # as PEFT casts it
    virtual = virtual.view(config.num_virtual_tokens, config.num_layers, 2, config.num_attention_heads, -1).permute(1, 2, 3, 0, 4)
    keys = KeysInFront(virtual, token_positions, virtual_positions(inputs["cu_seq_lens_k"], config.num_virtual_tokens))
    return model.base_model(input_ids=input_ids, past_key_values=keys, **inputs)


class KeysInFront(Cache):
    """Keys and values that each document of a packed row has before its own; it keeps none of those that it is given.

    Args:
        virtual: (layers, 2, heads, V, width)
        token_positions: (N,) where a token's keys lie among all.
        positions: (D V,) where those of virtual tokens lie.
    """

    def __init__(self, virtual: Tensor, token_positions: Tensor, positions: Tensor) -> None:
        super().__init__(layers=[])
        self._virtual, self._token_positions, self._positions = virtual, token_positions, positions

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(1, heads, N, width) to (1, heads, N + D V, width)."""
        keys, values = self._virtual[layer_idx, :, None]
        return (
            laid_out(key_states, keys, self._token_positions, self._positions),
            laid_out(value_states, values, self._token_positions, self._positions),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._virtual.shape[-2]

    def __len__(self) -> int:
        return len(self._virtual)


def _made(model: PeftModel) -> Tensor:
    """(V, width) what the prompt encoder makes of the virtual tokens; of a loaded adapter, what it had made of them."""
    config: Any = model.active_peft_config
    encoder: Any = model.prompt_encoder[NAME]
    tokens = model.prompt_tokens[NAME].to(model.device)
    return (encoder.embedding if config.inference_mode else encoder)(tokens)


def encoded_by(encoder_of: Callable[[Any], torch.nn.Module]) -> Callable[[PeftModel, dict[str, Tensor], Any], dict[str, Tensor]]:
    """`Adapting.saved_tensors`: PEFT saves what an encoder makes of the virtual tokens, and not the encoder.

    Args:
        encoder_of: PEFT's, of its configuration.
    """

    def saved(model: PeftModel, state: dict[str, Tensor], config: PeftConfig) -> dict[str, Tensor]:
        values = {name.removeprefix(ENCODER): value for name, value in state.items()}
        with torch.device("meta"):  # draws no numbers
            encoder: Any = encoder_of(config)
        encoder.load_state_dict(values, assign=True)
        with torch.no_grad():
            return {"prompt_embeddings": encoder(torch.arange(len(values["embedding.weight"])))}

    return saved


def loaded_in_front(base: PreTrainedModel, folder: Path) -> PeftModel:
    """A saved prompt on its base: what its encoder had made, which is now what is trained. PEFT itself refuses to train it."""
    with as_asked():
        loaded = PeftModel.from_pretrained(base, str(folder))
    loaded.prompt_encoder.requires_grad_(True)
    return loaded


def taken_off(model: PeftModel) -> PreTrainedModel:
    """The base, which PEFT never changed."""
    return model.get_base_model()  # pyright: ignore[reportReturnType]
