"""Several LoRA adapters of one base made into one adapter, by PEFT's own arithmetic. No weight of the base is read.

PEFT's layers combine them, on a model whose weights do not exist, and what comes out is an adapter as any other: it is kept, or
laid into the base shard by shard.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from raytune.config.sections.training import Precision
from raytune.data.templates.tokenizers import load_tokenizer
from raytune.errors import ModelError
from raytune.model.adapters.adapting import as_asked
from raytune.model.adapters.targets import shortest_suffixes
from raytune.model.files.base_content import (
    CONTENT_FILE,
    SAVED_WITH_IT,
    changes_text,
    computing_part,
    content_changes,
    saved_content,
)
from raytune.model.files.export import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_QUANTIZATION, COMBINATION, MAX_SHARD_BYTES
from raytune.model.files.files import resolve_model_path
from raytune.model.files.pretrained import load_config
from raytune.model.files.saved_adapter import adapter_config, refuse_changed_base
from raytune.model.files.whole_folder import refuse_taken, scratch_beside, written_whole
from raytune.model.merging.merge import merge_adapter, refuse_other_base
from raytune.model.parts.rope import ROPE_FILE, saved_rope, stretch
from raytune.plan.model.base_model import is_on_hub, model_files
from raytune.plan.saved.combination import Combination
from raytune.printable import in_a_line

_log = logging.getLogger(__name__)
_COMBINED = "combined"
_OF_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def merge_adapters(
    adapters: Sequence[Path],
    output_folder: Path,
    combination: Combination | None,
    *,
    as_adapter: bool = False,
    base: str | None = None,
    dtype: Precision | None = None,
    dequantise: bool = True,
    any_base: bool = False,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Combine adapters, and write the result as an adapter, or as the model that the base makes with it.

    Args:
        adapters: their folders.
        combination: how; None: there is one adapter, which is taken as it is.
        as_adapter: write an adapter that plain PEFT loads.
        base, dtype, dequantise, any_base, trust_remote_code, max_shard_bytes: as for `merge_adapter`.

    Raises:
        ModelError: if one of them is missing, damaged or of a kind that is not combined, if they do not belong together, or the
            output exists.
        ClusterError: if the base is to be downloaded and the hub does not answer.
    """
    refuse_taken(output_folder, "the adapter" if as_adapter else "the merged model")
    if combination is None:
        if as_adapter:
            raise ModelError(f"{adapters[0]} is an adapter already. Name several, or --weights that it is to be multiplied by.")
        merge_adapter(
            adapters[0],
            output_folder,
            base=base,
            dtype=dtype,
            dequantise=dequantise,
            any_base=any_base,
            trust_remote_code=trust_remote_code,
            max_shard_bytes=max_shard_bytes,
        )
        return
    configs = [_lora_config(folder) for folder in adapters]
    named = _common_base(adapters, configs, base, any_base)
    _refuse_differences(adapters, dequantise)
    path, revision = resolve_model_path(named, None), configs[0].revision
    if not any_base:
        for folder in adapters:
            refuse_other_base(folder, path if is_on_hub(path) else model_files(path), named, revision)
    model = _without_weights(path, revision, adapters[0], trust_remote_code)
    if as_adapter:
        if dtype is not None:
            raise ModelError(f"--dtype is {dtype}, but an adapter is written in fp32. Leave it out.")
        with written_whole(output_folder) as unfinished:
            _save_combined(model, adapters, configs, combination, named, unfinished)
        return
    with scratch_beside(output_folder, "adapter") as combined:
        _save_combined(model, adapters, configs, combination, named, combined)
        merge_adapter(
            combined,
            output_folder,
            base=named,
            dtype=dtype,
            dequantise=dequantise,
            any_base=any_base,
            trust_remote_code=trust_remote_code,
            max_shard_bytes=max_shard_bytes,
        )


def _lora_config(folder: Path) -> LoraConfig:
    """Of an adapter of a kind that PEFT combines."""
    config = adapter_config(folder)
    alone = f"Merge {folder} alone, or leave it out."
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        kind = str(config.peft_type).rpartition(".")[2]
        raise ModelError(f"{folder} is an adapter of the kind {kind}, and only those of LoRA are combined with others. {alone}")
    refuse_changed_base(folder, config)
    trained_beside = {
        "DoRA, whose lengths of columns do not add up": config.use_dora,
        "biases (bias)": config.bias != "none",
        "biases of its own (lora_bias)": config.lora_bias,
        f"whole modules ({', '.join(config.modules_to_save or [])}), of which there can be one only": config.modules_to_save,
        "rows of tokens (trainable_token_indices), of which there can be one each": config.trainable_token_indices,
        "parameters outside of layers (target_parameters), which PEFT does not combine": config.target_parameters,
        "layers that it repeats (layer_replication)": config.layer_replication,
    }
    if words := [what for what, is_there in trained_beside.items() if is_there]:
        raise ModelError(f"{folder} has {words[0]}: it is not combined with others. {alone}")
    config.init_lora_weights = True  # some starts look at the base, which has no weights here; what was trained overwrites them
    return config


def _common_base(adapters: Sequence[Path], configs: Sequence[LoraConfig], base: str | None, any_base: bool) -> str:
    """What all of them lie over: the user's word, or theirs if they agree by content or by name."""
    contents = [saved_content(folder) for folder in adapters]
    parts = [None if content is None else computing_part(content) for content in contents]
    first = next((index for index, part in enumerate(parts) if part is not None), 0)
    for folder, part in zip(adapters, parts, strict=True):
        if not any_base and part is not None and (changes := content_changes(parts[first] or {}, part)):
            raise ModelError(
                f"{adapters[first]} and {folder} were trained on different bases:\n{changes_text(changes)}\nTogether they would "
                f"compute what nobody trained. If you mean it, name one base with --base and add --any-base."
            )
    names = [config.base_model_name_or_path for config in configs]
    shown = [f"{config.base_model_name_or_path} at {config.revision}" if config.revision else str(name)
             for name, config in zip(names, configs, strict=True)]  # fmt: skip
    if base is None and len({*shown}) > 1 and (None in parts or any_base):
        raise ModelError(
            f"{adapters[0]} and the others name different bases ({', '.join(dict.fromkeys(shown))}). If these are one model, "
            f"name it with --base."
        )
    if not (named := base or names[first]):
        raise ModelError(f"{adapters[0] / ADAPTER_CONFIG} does not name its base model. Name it with --base.")
    return named


def _refuse_differences(adapters: Sequence[Path], dequantise: bool) -> None:
    """Refuse adapters whose base computed something else while each was trained, or that read texts as other tokens."""
    first, *others = adapters
    for other in others:
        if _json(first / ROPE_FILE) != _json(other / ROPE_FILE):
            raise ModelError(f"{first} and {other} were trained at different rotary positions ({ROPE_FILE}): one base has one.")
        if dequantise and _packing(first) != _packing(other):
            raise ModelError(
                f"{first} and {other} were trained over bases that were quantised differently ({BASE_QUANTIZATION}), and no "
                f"weight is what both saw. To lay them into the original weights, add --original-base."
            )
    tokenized = [folder for folder in adapters if (folder / "tokenizer_config.json").is_file()]
    for other in tokenized[1:]:
        if all(_bytes(tokenized[0] / name) == _bytes(other / name) for name in _OF_TOKENIZERS):
            continue
        one, another = load_tokenizer(str(tokenized[0])), load_tokenizer(str(other))
        if one.get_vocab() != another.get_vocab():
            raise ModelError(f"{tokenized[0]} and {other} have different tokens, so that one of them would read other texts.")
        if one.chat_template != another.chat_template:
            _log.warning("%s has another chat template than %s, whose is kept.", other, tokenized[0])


def _packing(folder: Path) -> Any:
    record = _json(folder / BASE_QUANTIZATION)
    return record and record | {name: sorted(record.get(name, [])) for name in ("modules", "parameters")}


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _without_weights(path: str, revision: str | None, adapter: Path, trust_remote_code: bool) -> nn.Module:
    """The base on the meta device."""
    config = load_config(path, revision, trust_remote_code)
    stretch(config, saved_rope(adapter))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _save_combined(
    model: Any, adapters: Sequence[Path], configs: Sequence[LoraConfig], asked: Combination, base: str, folder: Path
) -> None:
    """Write the adapter that some make together, with what belongs to it."""
    tensors, config = _combined(model, adapters, configs, asked)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    for name in (*SAVED_WITH_IT, CONTENT_FILE, ROPE_FILE, BASE_QUANTIZATION):
        if owner := next((one for one in adapters if (one / name).is_file()), None):
            shutil.copyfile(owner / name, folder / name)
    record = {"adapters": [str(one.resolve()) for one in adapters], **asdict(asked)}
    (folder / COMBINATION).write_text(json.dumps(record, indent=2) + "\n")


@torch.no_grad()
def _combined(
    model: Any, adapters: Sequence[Path], configs: Sequence[LoraConfig], asked: Combination
) -> tuple[dict[str, Tensor], LoraConfig]:
    """What PEFT makes of them: the tensors that it saves, and its configuration."""
    everything = [name for name, _ in model.named_modules()]
    names = [f"adapter_{number}" for number in range(1, len(adapters) + 1)]
    peft_model: Any = None
    beside: dict[str, Tensor] = {}
    with as_asked():
        for name, folder, config in zip(names, adapters, configs, strict=True):
            try:
                held = load_peft_weights(str(folder), device="cpu")
                saved = {key: value.float() for key, value in held.items() if "lora_" in key}
                if peft_model is None:
                    peft_model = get_peft_model(model, config, name, low_cpu_mem_usage=True)
                else:
                    peft_model.add_adapter(name, config, low_cpu_mem_usage=True)
                for layer in _lora_layers(model).values():
                    # PEFT sends factors to where their base is, and would drop them if that were nowhere.
                    layer.get_base_layer().weight = nn.Parameter(torch.empty(0), requires_grad=False)
                loaded = set_peft_model_state_dict(peft_model, saved, name, low_cpu_mem_usage=True)
            except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
                raise ModelError(
                    f"The adapter in {folder} cannot be put on this base: {in_a_line(error)}. Its file is damaged, or it was "
                    f"trained on another base."
                ) from error
            _gather_of_base(beside, {key: value for key, value in held.items() if key not in saved}, folder)
            if unread := [*loaded.unexpected_keys, *(key for key in loaded.missing_keys if f".{name}" in key)]:
                raise ModelError(f"The adapter in {folder} does not fit this base: {unread[0]} has no layer, or is missing.")
        layers = _lora_layers(model)
        _refuse_unequal_ranks(layers, names, adapters, asked)
        # As names of all layers, so that none is left out where adapters reach different ones in different words.
        targets = {*shortest_suffixes([*layers], everything)}
        for name in names:
            config = peft_model.peft_config[name]
            config.r = max(rank for layer in layers.values() if (rank := layer.r.get(name)))
            config.target_modules, config.rank_pattern = targets, {}
            config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
            # PEFT 0.21 gives what it makes the scale of the first one's rsLoRA, and has multiplied by it already.
            config.use_rslora = False
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The density .* is greater than or equal to 1")
            torch.manual_seed(asked.seed or 0)
            try:
                peft_model.base_model.add_weighted_adapter(
                    names,
                    [*asked.weights],
                    _COMBINED,
                    combination_type=asked.kind,
                    svd_rank=asked.rank,
                    svd_full_matrices=False,
                    density=asked.density,
                    majority_sign_method=asked.majority_sign,
                )
            except ValueError as error:
                raise ModelError(f"PEFT does not combine these adapters: {in_a_line(error)}.") from error
    config = peft_model.peft_config[_COMBINED]
    tensors = get_peft_model_state_dict(peft_model, adapter_name=_COMBINED, save_embedding_layers=False)
    if broken := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise ModelError(f"Together, the adapters make numbers that are not finite, first in {broken}.")
    return beside | {name: _padded(name, tensor, config.r) for name, tensor in tensors.items()}, config


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def _gather_of_base(gathered: dict[str, Tensor], tensors: dict[str, Tensor], folder: Path) -> None:
    """Add tensors of the base that PEFT saved with an adapter, as it does of embeddings that have an update."""
    for name, tensor in tensors.items():
        if name in gathered and not gathered[name].equal(tensor):
            raise ModelError(f"{folder} holds another {name} than one of the others: they were trained on different bases.")
        gathered[name] = tensor


def _refuse_unequal_ranks(layers: dict[str, Any], names: Sequence[str], adapters: Sequence[Path], asked: Combination) -> None:
    if not asked.needs_equal_ranks:
        return
    for layer_name, layer in layers.items():
        ranks = {folder: layer.r[name] for name, folder in zip(names, adapters, strict=True) if name in layer.r}
        if len({*ranks.values()}) > 1:
            shown = ", ".join(f"{rank} in {folder}" for folder, rank in ranks.items())
            raise ModelError(
                f"--combination {asked.kind} adds factors to each other, which have to be of one rank; that of {layer_name} is "
                f"{shown}. Take cat, which is the exact sum of the updates, or {_of_updates(asked.kind)}, which combines updates."
            )


def _of_updates(kind: str) -> str:
    return "svd" if kind == "linear" else f"{kind}_svd"


def _padded(name: str, tensor: Tensor, rank: int) -> Tensor:
    """A factor in the shape that PEFT makes of its configuration: where a layer has a smaller rank, with zeros."""
    dim = 0 if name.endswith(("lora_A.weight", "lora_embedding_A")) else 1
    lacking = rank - tensor.shape[dim]
    if not lacking:
        return tensor
    shape = [*tensor.shape]
    shape[dim] = lacking
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
