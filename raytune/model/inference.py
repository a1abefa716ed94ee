"""Saved models: what plain transformers and PEFT make of the files of a run, for writing answers and for an engine."""

import copy
import gc
import shutil
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from raytune.config.sections.adapter import Adapter
from raytune.data.templates.tokenizers import load_tokenizer
from raytune.model.adapters import adapting
from raytune.model.adapters.adapting import as_asked, whole_targets
from raytune.model.files.pretrained import load_config, without_bars
from raytune.model.files.saved_adapter import leaves_base
from raytune.model.load import Shares, load_base, load_model
from raytune.model.packed_experts import expand_packed_experts, packing_experts
from raytune.model.parts.adapter_switch import AdapterSwitch
from raytune.model.parts.dtypes import DTYPES
from raytune.model.parts.new_tokens import add_new_tokens
from raytune.model.parts.quantize import quantization_config
from raytune.model.parts.rope import stretch
from raytune.plan.model.base_model import model_files
from raytune.plan.run_plan import ModelPlan, RunPlan
from raytune.plan.saved.asked_model import AskedModel, files_alone, plain_model
from raytune.storage import download_folder, is_local, local_path

MOST_ADAPTERS = 8
"""That are kept over one base. The one that was asked longest ago makes room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in memory, and what its answers take."""

    model: Any
    """Of transformers, or PEFT's around one."""
    tokenizer: PreTrainedTokenizerBase
    kept_tokens: tuple[str, ...] = ()
    """As `AskedModel` says."""
    can_pad: bool = True


class HeldModels:
    """Models that are asked in turn. One base is in memory at a time; adapters lie over it, and are off where it is asked itself.

    Several LoRA adapters share a base. Before another kind of adapter, and before a base that an adapter has changed, the base is
    loaded anew. A folder is taken for the same as long as it is held: what changes has to come under another name.
    """

    def __init__(self, device: torch.device, *, most_adapters: int = MOST_ADAPTERS) -> None:
        self._device, self._stack, self._most_adapters = device, ExitStack(), most_adapters
        self._base: PreTrainedModel | None = None
        self._files: tuple[Any, ...] = ()
        self._settings: Any = None
        """Of generation, that came with the base."""
        self._adapted: PeftModel | None = None
        self._adapters: dict[str, str] = {}
        """PEFT's names of those that lie over the base, by their folders; last the one that was asked last."""
        self._num_laid_over = 0
        self._switch: AdapterSwitch | None = None
        """Of adapters that may share a base."""
        self._brought: dict[str, Path] = {}
        self._ends: dict[Path, GenerationConfig] = {}
        """Settings of generation of saved folders."""
        self._tokenizers: dict[tuple[str, str | None], PreTrainedTokenizerBase] = {}
        self.num_loaded = 0
        """Bases that were loaded so far."""

    def __enter__(self) -> "HeldModels":
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()
        self._stack.close()

    @contextmanager
    def asked(self, one: AskedModel) -> Iterator[Loaded]:
        """A model for the duration of the block, in evaluation mode. Nobody keeps it longer."""
        stops = self._here(one.stops) if one.stops else None
        decoder = self._tokenizer_of(one)
        with self._with_adapter(one, stops) if one.adapter else self._without_adapters(one, stops) as model:
            yield Loaded(model=model, tokenizer=decoder, kept_tokens=one.kept_tokens, can_pad=one.can_pad)

    def why_apart(self, one: AskedModel, others: Iterable[AskedModel]) -> str:
        """Why a model cannot be asked in turn with others without a base being loaded anew each time; empty: it can."""
        both = [one, *others]
        if any((other.model, other.held_for) != (one.model, one.held_for) for other in both):
            return "it is made of another base, or of the same one in another form, and one base is in memory"
        folders = {str(self._here(other.adapter)) for other in both if other.adapter}
        configs = [PeftConfig.from_pretrained(folder) for folder in sorted(folders)]
        if len(configs) > 1 and not _share_base(configs):
            return "of adapters, only LoRA in layers share a base, without biases, whole modules, rows of tokens and parameters"
        if any(other.adapter is None for other in both) and not all(map(_leaves_base, configs)):
            return "its adapter changes the base itself, which is asked, too"
        return ""

    def release(self, one: AskedModel) -> None:
        """Take the adapter of a model off its base, and keep nothing of its folder: what lies there is read anew when asked."""
        assert one.adapter is not None
        folder = str(self._here(one.adapter))
        if self._adapted is not None and folder in self._adapters:
            self._take_off(self._adapted, folder)
        self._tokenizers.pop((folder, None), None)
        self._ends.pop(Path(folder), None)
        self.forget(one.adapter)

    def _take_off(self, adapted: PeftModel, folder: str) -> None:
        name = self._adapters.pop(folder)
        if self._switch is not None:
            self._switch.turn_on(next(iter(self._adapters.values()), name))
            if self._adapters:
                adapted.delete_adapter(name)
            else:
                self._adapted = self._switch = None
                adapted.unload()  # pyright: ignore[reportCallIssue]
        elif adapted.active_peft_config.is_prompt_learning:
            self._adapted = None
        else:
            self._let_go()

    def forget(self, folder: str) -> None:
        """Remove what was brought here of a saved folder that is not asked again."""
        if (brought := self._brought.pop(folder, None)) is not None:
            shutil.rmtree(brought, ignore_errors=True)

    @contextmanager
    def _without_adapters(self, one: AskedModel, stops: Path | None) -> Iterator[PreTrainedModel]:
        if self._adapted is not None and not all(map(_leaves_base, self._adapted.peft_config.values())):
            self._let_go()
        base = self._base_of(one)
        base.generation_config = copy.copy(self._settings)
        if stops:
            base.generation_config.eos_token_id = self._ends_in(stops).eos_token_id
        # PEFT wraps a base that it only lays something in front of, and puts others into its layers.
        adapted, in_layers = self._adapted, self._adapted is not None and not self._adapted.active_peft_config.is_prompt_learning
        if self._switch is not None:
            self._switch.turn_off()
        with adapted.disable_adapter() if adapted is not None and in_layers and self._switch is None else nullcontext():
            yield base

    @contextmanager
    def _with_adapter(self, one: AskedModel, stops: Path | None) -> Iterator[PeftModel]:
        assert one.adapter is not None
        folder = str(self._here(one.adapter))
        if self._adapted is not None and folder not in self._adapters:
            config = PeftConfig.from_pretrained(folder)
            if not _share_base([*self._adapted.peft_config.values(), config]):
                self._let_go()
        base = self._base_of(one)
        # PEFT keeps those of the base.
        base.generation_config = copy.copy(self._ends_in(stops) if stops else self._settings)
        if self._adapted is None or folder not in self._adapters:
            try:
                self._lay_over(base, folder)
            except BaseException:
                self._let_go()  # which layers have a part of it by now is not known
                raise
        assert self._adapted is not None
        self._adapters[folder] = self._adapters.pop(folder)
        if self._switch is not None:
            self._switch.turn_on(self._adapters[folder])
        if len(self._adapters) > self._most_adapters:
            self._adapted.delete_adapter(self._adapters.pop(next(iter(self._adapters))))
        yield self._adapted

    def _lay_over(self, base: PreTrainedModel, folder: str) -> None:
        with as_asked():
            if self._adapted is None:
                self._adapters = {folder: "default"}
                self._adapted = PeftModel.from_pretrained(base, folder).eval()
            else:
                if self._switch is not None:
                    self._switch.turn_on(next(iter(self._adapters.values())))
                self._num_laid_over += 1
                self._adapters[folder] = f"adapter-{self._num_laid_over}"
                self._adapted.load_adapter(folder, self._adapters[folder])
        # Of one that shares its base with no other, PEFT knows how to turn it off.
        self._switch = AdapterSwitch(self._adapted) if _share_base([*self._adapted.peft_config.values()]) else None

    def _ends_in(self, folder: Path) -> GenerationConfig:
        if folder not in self._ends:
            self._ends[folder] = GenerationConfig.from_pretrained(folder)
        return self._ends[folder]

    def _tokenizer_of(self, one: AskedModel) -> PreTrainedTokenizerBase:
        path, revision = (one.tokenizer, None) if one.tokenizer else (one.model.path, one.model.revision)
        path = path if is_local(path) else str(self._here(path))
        if (path, revision) not in self._tokenizers:
            self._tokenizers[path, revision] = load_tokenizer(path, revision, one.model.trust_remote_code)
        return self._tokenizers[path, revision]

    def _base_of(self, one: AskedModel) -> PreTrainedModel:
        files = (one.model, one.held_for)
        if self._base is None or self._files != files:
            self._let_go()
            path = one.model.path if is_local(one.model.path) else str(self._here(one.model.path))
            self._base, self._files = _load(one.model.model_copy(update={"path": path}), one.held_for, self._device), files
            self._settings = self._base.generation_config
            self.num_loaded += 1
        return self._base

    def _let_go(self) -> None:
        if self._base is not None:
            weights = [weakref.ref(weight) for weight in self._base.parameters()]
            self._base = self._adapted = self._switch = self._settings = None
            self._files, self._adapters = (), {}
            if any(weight() is not None for weight in weights):  # of layers that refer to each other
                gc.collect()  # before the next one is loaded; it goes through all objects of the process
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _here(self, folder: str) -> Path:
        """A saved folder on this machine."""
        if is_local(folder):
            return local_path(folder)
        if folder not in self._brought:
            scratch = Path(self._stack.enter_context(TemporaryDirectory()))
            download_folder(folder, scratch)
            self._brought[folder] = scratch
        return self._brought[folder]


def _leaves_base(config: PeftConfig) -> bool:
    """Whether the base's weights are as they were while an adapter lies over it."""
    return (
        getattr(config, "bias", "none") == "none" and getattr(config, "layer_replication", None) is None and leaves_base(config)
    )


def _share_base(configs: list[PeftConfig]) -> bool:
    """Whether one base can have these adapters at once, of which one is on: LoRA in layers, and nothing else."""
    return all(
        _leaves_base(config)
        and config.peft_type == "LORA"
        and not any(getattr(config, name, None) for name in ("modules_to_save", "trainable_token_indices", "target_parameters"))
        for config in configs
    )


def asked_of_run(plan: RunPlan, folder: str, *, base: str = "base", tuned: str = "tuned") -> tuple[AskedModel, AskedModel]:
    """The base of a run, and the model that it saved; both stop where the saved folder says.

    Args:
        folder: with the files of `RunFolder.model`; or those of another state of the run, in the same form.
        base, tuned: what to call them.
    """
    row = adapting(plan.adapter)
    model, held_for = files_alone(plan.model, plan.adapter)
    asked = AskedModel(
        name=base,
        model=model,
        held_for=held_for,
        stops=folder,
        tokenizer=folder,
        kept_tokens=tuple(one.token for one in model.new_tokens),
        can_pad=row.can_pad,
    )
    if not row.is_whole:
        return asked, asked.model_copy(update={"name": tuned, "adapter": folder})
    whole = plain_model(folder, model.compute_dtype, trust_remote_code=model.trust_remote_code)
    return asked, asked.model_copy(update={"name": tuned, "model": whole, "stops": None})


def load_saved(plan: RunPlan, folder: Path, *, device: torch.device, shares: Shares | None = None) -> PreTrainedModel | PeftModel:
    """The model that a run saved, as `load_model` gives an engine the untrained one: documents kept apart, base as planned.

    Args:
        folder: local, with the files of `RunFolder.model`.
        device, shares: as for `load_model`.
    """
    if adapting(plan.adapter).is_whole:
        saved = plan.model.model_copy(update={"path": str(folder), "revision": None, "new_tokens": []})
        return load_model(saved, plan.adapter, device=device, seed=plan.seed, shares=shares)
    base = load_base(plan.model, plan.adapter, device, shares)  # as published, which is what the saved adapter fits
    row = adapting(plan.adapter)
    with as_asked(), whole_targets(row.peft_type) if row.needs_whole_targets(plan.adapter) else nullcontext():
        loaded = row.load(base, folder).train()
    row.mend(loaded)
    return loaded


def _load(model: ModelPlan, held_for: Adapter, device: torch.device) -> PreTrainedModel:
    config = load_config(model.path, model.revision, model.trust_remote_code)
    stretch(config, model.rope)
    quantization = quantization_config(model)
    with packing_experts(held_for, quantization), without_bars():
        loaded = AutoModelForCausalLM.from_pretrained(
            model_files(model.path, model.revision, with_code=model.trust_remote_code),
            revision=model.revision,
            config=config,
            trust_remote_code=model.trust_remote_code,
            dtype=DTYPES[model.compute_dtype],
            # No word on attention: sdpa, or eager where a model has no other. Kernels for packed rows know neither padding on the
            # left nor a cache of keys.
            use_safetensors=True,
            device_map={"": device},
            **({"quantization_config": quantization} if quantization else {}),
        )
    add_new_tokens(loaded, model)
    expand_packed_experts(loaded, keeps_nothing=False)
    return loaded.eval()
