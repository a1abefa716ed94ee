"""An adapter laid into its base, tensor by tensor: memory holds a shard of the result, one layer and the adapter.

PEFT's own layers do the arithmetic, on a model whose weights do not exist but for the layer at hand. A base that was quantised in
training is first turned into what the training saw: quantised and expanded again.

Longer than most files, because what is refused, read, computed and written of a merge shares names of adapter and base.
"""

import copy
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from raytune.config.sections.training import Precision
from raytune.data.templates.tokenizers import load_tokenizer
from raytune.errors import DataError, ModelError
from raytune.hub.snapshot import described, in_lines
from raytune.model.adapters import ADAPTERS, adapting_with
from raytune.model.adapters.adapting import Adapting, as_asked
from raytune.model.card import save_merged_card
from raytune.model.files.base_check import check_files
from raytune.model.files.export import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_QUANTIZATION,
    COMBINATION,
    MAX_SHARD_BYTES,
    in_dtype,
    save_own_code,
    write_weights,
)
from raytune.model.files.files import resolve_model_path
from raytune.model.files.freed_memory import freed_at_once
from raytune.model.files.hub import download_base
from raytune.model.files.pretrained import load_config, model_class
from raytune.model.files.saved_adapter import adapter_config, changes_of_base, refuse_changed_base
from raytune.model.files.stopping import base_config, save_generation_config, saved_config, stopping_config
from raytune.model.files.stored_weights import StoredWeights
from raytune.model.files.whole_folder import refuse_taken, require_room, written_whole
from raytune.model.merging.merge_experts import PackedExperts
from raytune.model.merging.merge_parameters import ParameterUpdates
from raytune.model.merging.merge_rows import TrainedRows, num_rows_with
from raytune.model.parts.dtypes import DTYPES
from raytune.model.parts.quantize import as_seen_in_training
from raytune.model.parts.rope import saved_rope, stretch
from raytune.plan.model.base_model import is_on_hub, model_files
from raytune.plan.model.stored_quantization import stored_quantization
from raytune.printable import in_a_line

_log = logging.getLogger(__name__)
_OF_BASE = (".base_layer.weight", ".base_layer.bias")
"""Ends of the names of what belongs to the base in an adapter's file."""


@freed_at_once()
def merge_adapter(
    adapter_folder: Path,
    output_folder: Path,
    *,
    base: str | None = None,
    dtype: Precision | None = None,
    dequantise: bool = True,
    any_base: bool = False,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model that a base and its adapter make together, with tokenizer and chat template.

    Args:
        base: folder, hub id or `demo`; None: the one that the adapter names.
        dtype: of the result; None: as in the base's files.
        dequantise: for an adapter trained on a quantised base: merge into the weights that training saw (quantised and expanded
            again), so that the result computes what was trained. False: into the original weights.
        any_base: merge into this base though it is not the one that the adapter was trained on.
        trust_remote_code: run the Python code that comes with the base, and leave a copy of it in the output.

    Raises:
        ModelError: if the adapter is missing, damaged or not of this base, the base has changed since, or the output exists.
        ClusterError: if the base is to be downloaded and the hub does not answer.
    """
    refuse_taken(output_folder, "the merged model")
    peft_config = adapter_config(adapter_folder)
    row = adapting_with(peft_config)
    if row is not None and row.why_unmerged:
        raise ModelError(f"{adapter_folder} merges into nothing: {row.why_unmerged}.")
    if row is None or not row.merges:
        merged = ", ".join(sorted(name for name, row in ADAPTERS.items() if row.merges))
        raise ModelError(
            f"{adapter_folder} is an adapter of the kind {str(peft_config.peft_type).rpartition('.')[2]}, and only those of "
            f"{merged} are merged. PEFT loads it beside its base: PeftModel.from_pretrained(base, {str(adapter_folder)!r})."
        )
    refuse_changed_base(adapter_folder, peft_config)
    if getattr(peft_config, "lora_bias", False):
        raise ModelError(
            f"{adapter_folder} has biases of its own (lora_bias), which are not merged here. PEFT merges them where every layer "
            f"of the base has a bias: PeftModel.from_pretrained(base, {str(adapter_folder)!r}).merge_and_unload()."
        )
    base = base or peft_config.base_model_name_or_path
    if not base:
        raise ModelError(f"{adapter_folder / ADAPTER_CONFIG} does not name its base model. Name it with --base.")
    path, revision = resolve_model_path(base, None), peft_config.revision
    if not is_on_hub(path):
        path = model_files(path)
    if not any_base:
        refuse_other_base(adapter_folder, path, base, revision)
    if is_on_hub(path):
        revision = described(path, revision, with_code=trust_remote_code, report=in_lines(_log.warning))
    config = load_config(path, revision, trust_remote_code)
    if stored_quantization(config.to_dict()) is not None:
        raise ModelError(f"The base {base} is stored quantised, so nothing merges into it exactly. Name the original with --base")
    weights = StoredWeights(base_folder(path, revision))
    own_class = model_class(path, config, revision=revision, trust_remote_code=trust_remote_code)
    check_files(weights.folder, config, own_class)
    config = copy.deepcopy(config)
    stretch(config, saved_rope(adapter_folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        num_rows = num_rows_with(adapter_folder / ADAPTER_WEIGHTS, peft_config, model)
        if num_rows > config.get_text_config().vocab_size:
            config.get_text_config().vocab_size = num_rows
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    quantization = _quantization(adapter_folder) if dequantise else None
    merger = _Merger(model, num_rows, adapter_folder, peft_config, quantization, weights, row)

    to = None if dtype is None else DTYPES[dtype]
    require_room(output_folder, weights.bytes_in(to), "The merged model")
    with written_whole(output_folder) as unfinished:
        merged_config = copy.deepcopy(config)
        merged_config.tie_word_embeddings = merger.stays_tied
        merged_config.architectures = [type(merger.model).__name__]
        save_own_code(merger.model, merged_config, unfinished)
        write_weights(merged_config, in_dtype(merger.merged(), to), unfinished, max_shard_bytes)
        has_tokenizer = (adapter_folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(str(adapter_folder if has_tokenizer else weights.folder), trust_remote_code=trust_remote_code)
        tokenizer.save_pretrained(unfinished)
        stops = saved_config(adapter_folder) or _stops(base_config(weights.folder, config), tokenizer)
        save_generation_config(stops, unfinished)
        save_merged_card(adapter_folder, unfinished)
        if (adapter_folder / COMBINATION).is_file():
            shutil.copyfile(adapter_folder / COMBINATION, unfinished / COMBINATION)
        check_files(unfinished, merged_config, own_class)


def refuse_other_base(adapter_folder: Path, path: str, base: str, revision: str | None) -> None:
    """Refuse a base whose files are not those that the adapter was trained on, as far as its folder tells which they were.

    Args:
        path: of the base, a folder or a hub id.
        base: as the user named it.

    Raises:
        ModelError: with the files that differ.
    """
    if changes := changes_of_base(adapter_folder, path, revision):
        raise ModelError(
            f"The adapter in {adapter_folder} was trained on another base than {base} holds now:\n{changes}\n"
            f"Merged, it would compute something else than was trained and measured. Name the base that it was trained on with "
            f"--base, or, if you mean this one, add --any-base."
        )


def _stops(base: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Where a model of an adapter stops that does not say it itself: by its tokenizer's template, if that can be read."""
    template = tokenizer.chat_template
    try:
        return stopping_config(base, tokenizer, template if isinstance(template, str) else "")
    except DataError:  # a template that raytune could not train on: another tool did
        return stopping_config(base, tokenizer, "")


def _quantization(folder: Path) -> dict[str, Any] | None:
    path = folder / BASE_QUANTIZATION
    return json.loads(path.read_text()) if path.is_file() else None


def base_folder(path: str, revision: str | None) -> Path:
    """Where the files of a base are, which are downloaded if they have to be.

    Args:
        path: of a folder, or a hub id.
    """
    if Path(path).is_dir():
        return Path(path)
    return download_base(path, revision, report=in_lines(_log.warning))


class _Merger:
    """The base's layers without weights, wrapped by PEFT, and what the adapter does to each tensor of the base."""

    def __init__(
        self,
        model: PreTrainedModel,
        num_rows: int,
        folder: Path,
        peft_config: PeftConfig,
        quantization: dict[str, Any] | None,
        weights: StoredWeights,
        row: Adapting,
    ) -> None:
        """
        Args:
            model: on the meta device.
            num_rows: of its embedding.
            row: of the adapter's method.
        """
        self.model = model
        self._names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self._embedding = _name_of(self.model, self.model.get_input_embeddings())
        self._head = _name_of(self.model, self.model.get_output_embeddings())
        self._is_tied = bool(model.config.get_text_config().tie_word_embeddings) and self._head is not None
        around = [f"{name}.weight" for name in (self._embedding, self._head)]
        self._renamed = {
            part: name
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if name in around
            for part in revert_weight_conversion(self.model, {name: parameter.detach()})
        }
        """Embedding and head by the names of the base's files, where these are others."""
        self._quantization, self._weights = quantization, weights
        self._merged_bias = row.merged_bias
        self._experts = PackedExperts(self.model, quantization, weights.read) if quantization else None
        # The start is overwritten by what was trained; some starts of LoRA would need the base's weights.
        if hasattr(peft_config, "init_lora_weights"):
            peft_config.init_lora_weights = False  # pyright: ignore[reportAttributeAccessIssue]
        try:
            held = load_peft_weights(str(folder), device="cpu")
            self._held_of_base = {_in_base(key): held.pop(key) for key in [*held] if key.endswith(_OF_BASE)}
            """Tensors of the base that PEFT saves with an update of theirs, as it does of embeddings."""
            saved = row.of_equal_shapes(held, peft_config)
            with as_asked():
                peft_model: Any = get_peft_model(self.model, peft_config, low_cpu_mem_usage=True)
            self._mark = f".{peft_model.base_model.prefix}"
            """What the names of an adapter's own parameters have in them."""
            tuned: dict[str, Any] = {
                name: module for name, module in self.model.named_modules() if isinstance(module, BaseTunerLayer)
            }
            replaced = LNTuningLayer | TrainableTokensLayer
            updated = {name: layer for name, layer in tuned.items() if not isinstance(layer, replaced)}
            self._layers = {name: layer for name, layer in updated.items() if not isinstance(layer, ParamWrapper)}
            bare = {name: layer for name, layer in updated.items() if isinstance(layer, ParamWrapper)}
            self._updates = ParameterUpdates(self.model, bare)
            for layer in tuned.values():
                # PEFT sends an update to where its base is, and would drop it if that were nowhere.
                name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
                setattr(layer.get_base_layer(), name, nn.Parameter(torch.empty(0), requires_grad=False))
                if isinstance(layer, TrainableTokensLayer):
                    layer.trainable_tokens_original[ADAPTER] = torch.empty(0)  # which it sends there too
            loaded = set_peft_model_state_dict(peft_model, saved, low_cpu_mem_usage=True)
            row.restore_constants(peft_model)
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"The adapter in {folder} cannot be put on this base: {in_a_line(error)}. Its file is damaged, or it was trained "
                f"on another base."
            ) from error
        self._rows = TrainedRows(self.model, ADAPTER, num_rows)
        foreign = [*loaded.unexpected_keys, *self._rows.missing, *(name for name in loaded.missing_keys if self._mark in name)]
        if foreign:
            raise ModelError(
                f"The adapter in {folder} does not fit this base: {len(foreign)} of its tensors are missing or have no layer, "
                f"first {foreign[0]}. Name the base that it was trained on with --base."
            )
        self._replaced = self._replacements()
        self._parts = {
            part: (name, tensor)
            for name, replacement in self._replaced.items()
            for part, tensor in revert_weight_conversion(self.model, {name: replacement}).items()
        }
        """Of replacements, by the names of the base's files, where experts lie apart and routers have other names."""

    @property
    def stays_tied(self) -> bool:
        """Whether embedding and head are one tensor after merging, if they were before."""
        touched = {name.rpartition(".")[0] for name in self._replaced} | set(self._layers)
        return self._is_tied and not touched & {self._embedding, self._head}

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the merged model, in the order of the base's files."""
        merged, written, embedding = set(), set(), None
        left = set(self._parts)
        for published_name, tensor in self._weights:
            name = self._own_name(published_name)
            written.add(name)
            tensor = self._as_held(name, tensor)
            if name == f"{self._embedding}.weight":
                embedding = tensor
            part = published_name if published_name in self._parts else name
            if part in self._parts:
                left.discard(part)
                yield published_name, self._parts[part][1].to(tensor.dtype)
                continue
            module_name = name.rpartition(".")[0]
            if module_name in self._layers and name.endswith(".weight"):
                merged.add(module_name)
            if self._experts:
                tensor = self._experts.seen(published_name, name, tensor)
            yield published_name, self._updates.added(published_name, name, self._merged(name, tensor))
        head = f"{self._head}.weight"
        if self._is_tied and not self.stays_tied and head not in written:
            assert embedding is not None, "a tied head comes from the embedding"
            merged.add(self._head)
            left.discard(head)
            yield head, self._merged(head, embedding)
        unused = {self._parts[part][0] for part in left}
        packed = self._experts.missing if self._experts else set()
        rows = self._rows.not_laid - ({head} if self.stays_tied else set())
        missing = sorted({*self._layers} - merged | self._updates.missing | packed | unused | rows)
        if missing:
            raise ModelError(
                f"{len(missing)} layers or parameters that the adapter changes, or that were packed while it was trained, are "
                f"not in {self._weights.folder} under their names, first {missing[0]}. It cannot be merged; load it with PEFT "
                f"instead."
            )

    def _as_held(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the base's files, or what the adapter holds in its place, as PEFT loads it."""
        held = self._held_of_base.get(name, tensor)
        if held.shape != tensor.shape:
            raise ModelError(
                f"The adapter was trained over a {name} of {[*held.shape]}, and the base has {[*tensor.shape]}. Name the base "
                f"that it was trained on with --base."
            )
        return held.to(tensor.dtype)

    def _merged(self, name: str, tensor: Tensor) -> Tensor:
        if name in self._replaced:
            return self._replaced[name].to(tensor.dtype)
        module_name, _, part = name.rpartition(".")
        if part == "bias" and module_name in self._layers:
            return self._merged_bias(self._layers[module_name], tensor)
        if part != "weight":
            return tensor
        if module_name in (self._embedding, self._head):
            tensor = self._rows.laid_over(name, tensor)
        weight = self._as_trained_on(module_name, tensor)
        if module_name not in self._layers:
            return weight
        return _merged_weight(self._layers[module_name], weight)

    def _as_trained_on(self, module_name: str, weight: Tensor) -> Tensor:
        if self._quantization is None or module_name not in self._quantization["modules"]:
            return weight
        loaded = weight.to(getattr(torch, self._quantization["dtype"]))
        layer = self._layers.get(module_name) or self.model.get_submodule(module_name)
        # bitsandbytes holds GPT-2's layers the other way round.
        is_turned = isinstance(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer, Conv1D)
        seen = as_seen_in_training(loaded.T if is_turned else loaded, self._quantization["config"])
        return (seen.T if is_turned else seen).to(weight.dtype)

    def _own_name(self, published: str) -> str:
        """The name of a tensor of the files in the model; bases are published with or without their outermost name."""
        prefix = f"{self.model.base_model_prefix}."
        for name in (published, prefix + published, published.removeprefix(prefix)):
            if name in self._names:
                return name
        return self._renamed.get(published, published)

    def _replacements(self) -> dict[str, Tensor]:
        """Tensors that the adapter holds in full: biases, norms, and modules that were trained whole."""
        replaced = {
            name.replace(".base_layer.", "."): parameter.detach()
            for name, parameter in self.model.named_parameters()
            if not parameter.is_meta and parameter.numel() and name.replace(".base_layer.", ".") in self._names
        }
        for name, module in self.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper | LNTuningLayer):
                copies = module.modules_to_save if isinstance(module, ModulesToSaveWrapper) else module.ln_tuning_layers
                trained: nn.Module = copies[ADAPTER]
                replaced |= {f"{name}.{part}": tensor for part, tensor in trained.state_dict().items()}
        return replaced


def _in_base(key: str) -> str:
    """The name in the model of a tensor of the base in an adapter's file."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


@torch.no_grad()
def _merged_weight(layer: Any, weight: Tensor) -> Tensor:
    """The weight of one layer of PEFT's with its update, computed in fp32 by PEFT."""
    base = layer.get_base_layer()
    base.weight = nn.Parameter(weight.float(), requires_grad=False)
    if getattr(base, "bias", None) is not None:
        base.bias = None  # it has no numbers here, and is merged apart
    try:
        layer.merge(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"The adapter makes a weight that is not finite: {error}") from error
    merged = base.weight.detach().to(weight.dtype)
    base.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    return merged
