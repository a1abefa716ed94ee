"""A row of the table of methods: all that a model is asked of one way to train, and what those that use PEFT share."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.boft.layer import BOFTLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune.data.batches.batches import Batch
from raytune.errors import ModelError
from raytune.model.adapters.beside_updates import BesideUpdates
from raytune.model.adapters.token_rows import rows_of_shards
from raytune.model.parts.quantize import quantized_modules
from raytune.model.parts.sharded_base import whole
from raytune.plan.methods.targets import NamesTargets
from raytune.plan.model.module_names import has_name


def as_it_is(model: PeftModel, state: dict[str, Tensor], config: Any) -> tuple[dict[str, Tensor], Any]:
    """For adapters whose start leaves the base's weights as they were."""
    return state, config


def nothing_to_mend(model: PeftModel) -> None:
    """For adapters that compute as they are."""


def same_bias(layer: Any, bias: Tensor) -> Tensor:
    """For adapters that change what a layer multiplies by only."""
    return bias


def nothing_in_front(adapter: Any, batch: Batch) -> Batch:
    """For methods under which a model sees documents as they are."""
    return batch


def no_start_from_text(model: PeftModel, adapter: Any, tokens_of: Callable[[str], list[int]]) -> None:
    """For adapters that start without a text."""


def loaded_for_training(base: PreTrainedModel, folder: Path) -> PeftModel:
    """For adapters that plain PEFT loads as something that can be trained.

    Biases of the base, which LoRA may have trained and saved, are whole meanwhile: PEFT copies what it reads over them, and
    ZeRO-3 has divided them by then. Every rank reads the same files.
    """
    biases = [parameter for name, parameter in base.named_parameters() if name.endswith("bias")]
    with gather_params_ctx(biases, modifier_rank=0):
        return PeftModel.from_pretrained(base, str(folder), is_trainable=True)


def peft_tensors(model: PeftModel, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """For adapters of which PEFT saves what is trained."""
    return get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)


def unloaded(model: PeftModel) -> PreTrainedModel:
    """For adapters that PEFT takes off again."""
    return model.unload()  # pyright: ignore[reportCallIssue]


def shaped_as_made(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """For adapters that are saved in the shapes in which they were made."""
    return state


def nothing_beside(model: PeftModel, adapter: Any, num_steps: int) -> None:
    """For methods that train by the optimizer's updates alone."""


def no_start_from_data(model: PeftModel, inputs: Iterable[dict[str, Any]]) -> None:
    """For adapters that start without data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapting:
    """What is asked of a method; `adapter` is its section."""

    add: Callable[[PreTrainedModel, Any, str | None, int], PreTrainedModel | PeftModel]
    """Add what is trained to a base (its revision, a seed) and freeze the rest. Raises ModelError if a name matches nothing."""
    frozen_experts: Callable[[PreTrainedModel, Any], list[str]]
    """Names of the parameters of fused experts that nothing changes."""
    leaves_base_alone: Callable[[Any, bool], bool]
    """Whether the base, which may be quantised, is as it was once the adapter is taken off again."""
    peft_type: str = ""
    """PEFT's name of the kind of adapter; empty: it makes none."""
    is_whole: bool = False
    """Whether the base itself is trained, and saved as a whole model; else what is saved is an adapter of the original base."""
    mend: Callable[[PeftModel], None] = nothing_to_mend
    """Have a model that PEFT made, or loaded, compute in the run's precision."""
    for_original_base: Callable[[PeftModel, dict[str, Tensor], Any], tuple[dict[str, Tensor], Any]] = as_it_is
    """Trained parameters and PEFT's configuration, as they are of the base that its author published."""
    beside_updates: Callable[[Any, Any, int], BesideUpdates | None] = nothing_beside
    """What is done in each step beside the optimizer's update, of the adapted model, the section and the steps of the run."""
    of_equal_shapes: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] = shaped_as_made
    """What was saved, in the shapes that PEFT makes of its configuration, which may be changed to that end."""
    restore_constants: Callable[[PeftModel], None] = nothing_to_mend
    """Give what is in no file its value, in a model that PEFT made without values."""
    saved_tensors: Callable[[PeftModel, dict[str, Tensor], Any], dict[str, Tensor]] = peft_tensors
    """What is saved of these, by PEFT's names."""
    load: Callable[[PreTrainedModel, Path], PeftModel] = loaded_for_training
    """A saved adapter on its base, for an engine; what is trained may be less than before it was saved."""
    taken_off: Callable[[PeftModel], PreTrainedModel] = unloaded
    """The base without the adapter, if that left it alone."""
    in_front: Callable[[Any, Batch], Batch] = nothing_in_front
    """A batch as a model sees it, with what the method lays in front of documents."""
    start_from_text: Callable[[PeftModel, Any, Callable[[str], list[int]]], None] = no_start_from_text
    """Start from a text of the section, given what the run's tokenizer makes of texts; weights may be sharded."""
    can_pad: bool = True
    """Whether what plain PEFT makes of its files answers prompts of different lengths in one batch."""
    merges: bool = False
    """Whether `raytune merge` lays its adapters into their base."""
    why_unmerged: str = ""
    """Why it cannot, and what to do, in sentences; empty: it is only not done, and PEFT loads the adapter beside its base."""
    merged_bias: Callable[[Any, Tensor], Tensor] = same_bias
    """The bias of a layer once the adapter lies in it: of PEFT's layer and the base's bias."""
    needs_whole_targets: Callable[[Any], bool] = lambda adapter: False
    """Whether PEFT looks at the weights of a layer when it adds something to it, which the ranks may have divided."""
    starts_from_data: Callable[[Any], bool] = lambda adapter: False
    """Whether the start looks at the first batches."""
    start_from_data: Callable[[PeftModel, Iterable[dict[str, Any]]], None] = no_start_from_data
    """Start from the inputs of the first batches, before an engine shards the model."""


def added(model: PreTrainedModel, config: PeftConfig, adapter: NamesTargets, *, seed: int) -> PeftModel:
    """A frozen model with one of PEFT's adapters, as plain PEFT makes it after `torch.manual_seed(seed)`.

    The adapter has the dtype of the base; an engine that keeps fp32 masters casts what is trained itself.

    Raises:
        ModelError: if a quantised layer is to be trained in full.
    """
    quantized = [name for name in quantized_modules(model) if has_name(name, adapter.modules_to_save)]
    if quantized:
        raise ModelError(
            f"adapter.modules_to_save names quantised layers ({', '.join(quantized[:3])}), which cannot be trained in full. Over "
            f"a quantised base, only embeddings, norms and the output head can."
        )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), as_asked():
        torch.manual_seed(seed)
        # ZeRO-3 needs trained and frozen weights in one dtype (https://github.com/huggingface/trl/issues/6089).
        return get_peft_model(model, config, autocast_adapter_dtype=False, revision=config.revision)  # pyright: ignore[reportReturnType]


def constant_matrices(model: nn.Module) -> Iterator[Tensor]:
    """Matrices of an adapter that are not trained: those that all layers share, and permutations of each."""
    for module in model.modules():
        if isinstance(module, BufferDict | BOFTLayer):
            yield from module.buffers(recurse=False)


@contextmanager
def as_asked() -> Iterator[None]:
    """Context in which PEFT makes an adapter without warning of what the plan has looked up."""
    with warnings.catch_warnings():
        # PEFT 0.21 looks among layers only, and says so of patterns of parameters, which it obeys.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", "Unsupported layer type '.*' encountered")  # norms, which have no inputs and outputs
        # Where the base lies is ours to know: the adapter's folder was made elsewhere, or before the base moved.
        warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed")
        with rows_of_shards():
            yield


@contextmanager
def whole_targets(peft_type: str) -> Iterator[None]:
    """Context in which PEFT finds each layer whole that it adds something to, one after the other, though the ranks divide them.

    In the words of PEFT 0.21, whose LoHa reads the shape of a layer's weight, whose DoRA takes its norm, and whose norms copy it.
    DoRA gathers shards of ZeRO-3 itself, which DeepSpeed refuses to gather twice.
    """
    gathered = nullcontext if peft_type == "LORA" else partial(gather_params_ctx, modifier_rank=None)
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(peft_type)]
    create = tuner._create_and_replace

    def create_on_whole(self: Any, config: PeftConfig, name: str, target: nn.Module, *rest: Any, **others: Any) -> None:
        weights = list(target.parameters())
        with gathered(weights), whole(weights):
            create(self, config, name, target, *rest, **others)

    tuner._create_and_replace = create_on_whole
    try:
        yield
    finally:
        tuner._create_and_replace = create
