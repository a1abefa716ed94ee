"""A whole model as one GGUF file, written tensor by tensor, and read back: for the architectures that we can write exactly."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    dequantize,
    get_tensor_name_map,
    quantize,
)
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from raytune.errors import ModelError
from raytune.model.files.export import in_dtype
from raytune.model.files.freed_memory import freed_at_once
from raytune.model.files.stored_weights import StoredWeights
from raytune.model.files.weight_files import StoredTensor
from raytune.model.gguf.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from raytune.plan.saved.rewriting import ExportDtype

_TYPES: Mapping[ExportDtype, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "fp32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "fp16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_NUMBERS_AT_ONCE = 1 << 20
_ROPE_FACTORS = "rope_freqs.weight"
_OLD_BUFFERS = "rotary_emb.inv_freq"
"""Frequencies that files of early Llamas hold, and nobody reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    """What GGUF makes of a kind of model of transformers'."""

    arch: MODEL_ARCH
    is_interleaved: bool
    """Whether llama.cpp turns neighbours of a head's query where transformers turns its halves."""


ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture(arch=MODEL_ARCH.LLAMA, is_interleaved=True),
    "mistral": _Architecture(arch=MODEL_ARCH.LLAMA, is_interleaved=True),
    "qwen2": _Architecture(arch=MODEL_ARCH.QWEN2, is_interleaved=False),
    "qwen3": _Architecture(arch=MODEL_ARCH.QWEN3, is_interleaved=False),
}
"""By `model_type` of config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """One of the file, before any weight is read."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Its numbers, as they are stored in the model's folder but for their order."""

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        block, size = GGML_QUANT_SIZES[self.type]
        return (*self.shape[:-1], self.shape[-1] // block * size)

    @property
    def num_bytes(self) -> int:
        return prod(self.bytes_shape)


class GgufModel:
    """A model that can be written as GGUF; what cannot is refused when it is made."""

    def __init__(
        self,
        weights: StoredWeights,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        stops: GenerationConfig | None,
        kind: ExportDtype,
        name: str,
    ) -> None:
        """
        Args:
            stops: which tokens end an answer.
            name: of the model, for people.

        Raises:
            ModelError: with what cannot be said in the format, and what to do.
        """
        self._weights, self._config, self._name = weights, config, name
        self._kind: ExportDtype = kind
        self._architecture = _architecture(config)
        self._rope_factors, self._rope_keys = _rope(config)
        self._context, notes = _context(config)
        self._tensors = [*self._all_tensors()]
        rows = next(tensor.shape[0] for tensor in self._tensors if tensor.name == "token_embd.weight")
        self._tokenizer = gguf_tokenizer(tokenizer, stops, rows)
        plain = [one.name for one in self._tensors if kind == "q8_0" and len(one.shape) > 1 and one.type in _PLAIN]
        if plain:
            notes.append(f"{len(plain)} tensors whose rows are no multiple of 32 are in fp16, such as {plain[0]}.")
        self.notes = (*notes, *self._tokenizer.notes)
        """What a reader of the file should know, in sentences."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.num_bytes for tensor in self._tensors)

    @freed_at_once()
    def write(self, path: Path) -> None:
        """Write the file; memory holds one tensor.

        Raises:
            ModelError: if a number is too large for the type.
        """
        writer = GGUFWriter(path, MODEL_ARCH_NAMES[self._architecture.arch])
        try:
            self._add_fields(writer)
            _add_tokenizer(writer, self._tokenizer)
            for tensor in self._tensors:
                writer.add_tensor_info(tensor.name, tensor.bytes_shape, np.dtype(np.uint8), tensor.num_bytes, tensor.type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in self._tensors:
                writer.write_tensor_data(_packed(tensor))
        finally:
            writer.close()

    def check(self, path: Path) -> None:
        """Read the file with gguf's own reader, and hold every tensor against its source.

        Raises:
            ModelError: naming what is missing or differs by more than the type allows.
        """
        reader = GGUFReader(path)
        found = {tensor.name: tensor for tensor in reader.tensors}
        if found.keys() != {tensor.name for tensor in self._tensors}:
            raise ModelError(f"{path} does not hold the tensors that were written: {len(found)} of {len(self._tensors)}.")
        with path.open("rb") as file:
            for tensor in self._tensors:
                file.seek(found[tensor.name].data_offset)  # the reader maps the file, which would be in memory in the end
                read = np.fromfile(file, np.uint8, tensor.num_bytes)
                if found[tensor.name].tensor_type != tensor.type or not _is_near(read, tensor):
                    raise ModelError(f"{path} holds other numbers for {tensor.name} than were written. Is its disk damaged?")
        tokens = reader.get_field("tokenizer.ggml.tokens")
        if tokens is None or tokens.contents() != self._tokenizer.tokens:
            raise ModelError(f"{path} holds other tokens than were written. Is its disk damaged?")

    def _all_tensors(self) -> Iterator[_Tensor]:
        text: Any = self._config.get_text_config()
        names = get_tensor_name_map(self._architecture.arch, text.num_hidden_layers)
        wanted = _TYPES[self._kind][0]
        for name, stored in self._weights.tensors.items():
            if name.endswith(_OLD_BUFFERS) or (name == "lm_head.weight" and text.tie_word_embeddings):
                continue
            own = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if own is None:
                raise ModelError(f"GGUF has no name for {name} of a {text.model_type} model. {_other_way()}")
            yield _Tensor(name=own, type=_type_of(stored, wanted), shape=stored.shape, read=self._reading(name))
        if self._rope_factors is not None:
            factors = self._rope_factors
            yield _Tensor(name=_ROPE_FACTORS, type=GGMLQuantizationType.F32, shape=tuple(factors.shape), read=lambda: factors)

    def _reading(self, name: str) -> Callable[[], Tensor]:
        text: Any = self._config.get_text_config()
        heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}.get(name.split(".")[-2])
        if heads is None or not self._architecture.is_interleaved:
            return lambda: self._weights.read(name)
        return lambda: _interleaved(self._weights.read(name), heads)

    def _add_fields(self, writer: GGUFWriter) -> None:
        text: Any = self._config.get_text_config()
        writer.add_type("model")
        writer.add_name(self._name)
        writer.add_file_type(_TYPES[self._kind][1])
        if self._kind == "q8_0":
            writer.add_quantization_version(2)
        writer.add_vocab_size(text.vocab_size)
        writer.add_context_length(self._context)
        writer.add_embedding_length(text.hidden_size)
        writer.add_block_count(text.num_hidden_layers)
        writer.add_feed_forward_length(text.intermediate_size)
        writer.add_head_count(text.num_attention_heads)
        writer.add_head_count_kv(text.num_key_value_heads)
        writer.add_layer_norm_rms_eps(text.rms_norm_eps)
        writer.add_key_length(_head_dim(text))
        writer.add_value_length(_head_dim(text))
        writer.add_rope_dimension_count(_head_dim(text))
        writer.add_rope_freq_base(float(text.rope_parameters["rope_theta"]))
        for add, value in self._rope_keys.items():
            getattr(writer, add)(value)


def refuse_config(config: PretrainedConfig) -> None:
    """Refuse what its config tells already.

    Raises:
        ModelError: with what cannot be said in the format, and what to do.
    """
    _architecture(config)
    _rope(config)


def check_foreign(path: Path) -> None:
    """Read a file that another program wrote.

    Raises:
        ModelError: if gguf's own reader cannot, or it holds no model.
    """
    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ModelError(f"The converter left {path.name}, which gguf's reader cannot read: {error}.") from error
    if not reader.tensors or reader.get_field("general.architecture") is None:
        raise ModelError(f"The converter left {path.name}, which holds no model: {len(reader.tensors)} tensors.")


def _architecture(config: PretrainedConfig) -> _Architecture:
    text: Any = config.get_text_config()
    if text is not config or text.model_type not in ARCHITECTURES:
        raise ModelError(
            f"Models of the type {config.model_type} are not written as GGUF here, only those of {', '.join(ARCHITECTURES)}. "
            f"{_other_way()}"
        )
    odd = {
        "hidden_act": text.hidden_act != "silu" and text.hidden_act,
        "attention_bias": getattr(text, "attention_bias", False),
        "mlp_bias": getattr(text, "mlp_bias", False),
        "partial_rotary_factor": text.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0,
    }
    if found := [name for name, value in odd.items() if value]:
        raise ModelError(
            f"A {text.model_type} model with {found[0]}: {odd[found[0]]} is not written as GGUF here. {_other_way()}"
        )
    return ARCHITECTURES[text.model_type]


def _other_way() -> str:
    return "With llama.cpp at hand, its converter may: --converter /path/to/convert_hf_to_gguf.py."


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _rope(config: PretrainedConfig) -> tuple[Tensor | None, dict[str, Any]]:
    """What rotary positions are scaled by: factors that each frequency is divided by, and fields by the writer's methods."""
    text: Any = config.get_text_config()
    values = text.rope_parameters
    kind = values.get("rope_type", "default")
    if kind == "default":
        return None, {}
    if kind == "linear":
        return None, {"add_rope_scaling_type": RopeScalingType.LINEAR, "add_rope_scaling_factor": float(values["factor"])}
    if kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
        dim = _head_dim(text)
        plain = 1.0 / values["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
        return (plain / scaled).float(), {}
    own = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"}
    is_usual = values.get("beta_fast") in (None, 32) and values.get("beta_slow") in (None, 1) and values.get("truncate", True)
    if kind == "yarn" and is_usual and not {name for name, value in values.items() if value is not None} - own:
        original = values.get("original_max_position_embeddings") or text.max_position_embeddings
        return None, {
            "add_rope_scaling_type": RopeScalingType.YARN,
            "add_rope_scaling_factor": float(values["factor"]),
            "add_rope_scaling_orig_ctx_len": original,
        }
    raise ModelError(f"Rotary positions that are scaled by {values} are not written as GGUF here. {_other_way()}")


def _context(config: PretrainedConfig) -> tuple[int, list[str]]:
    """How far the model reads, and what is to be said of that."""
    text: Any = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    slides = text.model_type == "mistral" or "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if window is None or not slides or window >= text.max_position_embeddings:
        return text.max_position_embeddings, []
    note = (
        f"The file says a context of {window} tokens, not {text.max_position_embeddings}: that is the window of attention, which "
        f"llama.cpp does not have for this architecture, and up to there both compute the same."
    )
    return window, [note]


def _type_of(stored: StoredTensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """Norms and biases stay in fp32, as llama.cpp has them."""
    if len(stored.shape) < 2:
        return GGMLQuantizationType.F32
    return wanted if stored.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order first half's first, second half's first, first half's second, ..."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _packed(tensor: _Tensor) -> np.ndarray:
    """The bytes of a tensor in the file."""
    if tensor.type in _PLAIN:
        cast = next(in_dtype([(tensor.name, tensor.read())], _PLAIN[tensor.type]))[1].contiguous()
        return cast.view(torch.uint8).numpy()
    source = _rows(tensor.read())
    packed = np.empty((len(source), tensor.bytes_shape[-1]), np.uint8)
    for rows in _some_rows(source):
        packed[rows] = quantize(source[rows].float().numpy(), tensor.type)
    return packed


def _is_near(read: np.ndarray, tensor: _Tensor) -> bool:
    """Whether bytes of the file are the numbers of the model, as near as the type comes."""
    source = _rows(tensor.read())
    packed = read.reshape(len(source), -1)
    for rows in _some_rows(source):
        numbers = torch.from_numpy(np.array(dequantize(packed[rows], tensor.type))).reshape(source[rows].shape)
        if tensor.type in _PLAIN:
            if not numbers.equal(source[rows].to(_PLAIN[tensor.type]).float()):
                return False
            continue
        blocks = source[rows].float().reshape(-1, GGML_QUANT_SIZES[tensor.type][0])
        # Half a step of 127, and a scale of 11 bits (where it is not smaller than fp16 counts).
        allowed = blocks.abs().amax(1, keepdim=True) * (0.5 / 127 + 2.0**-11) + 127 * 2.0**-25
        if not ((numbers.reshape(blocks.shape) - blocks).abs() <= allowed).all():
            return False
    return True


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _some_rows(rows: Tensor) -> Iterator[slice]:
    """Few at a time, since some arithmetic makes several copies of them in fp32."""
    num = max(1, _NUMBERS_AT_ONCE // rows.shape[1])
    return (slice(start, start + num) for start in range(0, len(rows), num))


def _add_tokenizer(writer: GGUFWriter, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_scores(tokenizer.scores)
    writer.add_token_types(tokenizer.kinds)
    writer.add_token_merges(tokenizer.merges)
    for name, number in tokenizer.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    if tokenizer.add_space_prefix is not None:
        writer.add_add_space_prefix(tokenizer.add_space_prefix)
    if tokenizer.template is not None:
        writer.add_chat_template(tokenizer.template)
