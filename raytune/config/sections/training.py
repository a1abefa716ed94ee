"""`training`: optimisation, precision, memory and sharding."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytune.config.sections.averaging import AveragingSection
from raytune.config.sections.divergence import DivergenceSection
from raytune.config.sections.section import (
    Auto,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
)
from raytune.config.sections.stopping import EarlyStoppingSection, OverfittingSection

Precision = Literal["bf16", "fp16", "fp32"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion", "muon", "schedule_free_adamw"]
SCHEDULE_FREE: tuple[Optimizer, ...] = ("schedule_free_adamw",)
"""Which average weights as they go, at a constant rate; of the package schedulefree."""
Schedule = Literal["linear", "cosine", "constant", "wsd", "polynomial", "cosine_with_restarts"]
USUAL_SCHEDULE: Schedule = "cosine"
Offload = Literal["none", "cpu", "nvme"]


class ZeroSection(Section):
    """DeepSpeed ZeRO: what is sharded over the workers."""

    stage: Literal[0, 1, 2, 3] | Auto = "auto"
    """0: nothing is sharded, 1: optimizer state, 2: and gradients, 3: and weights. `auto`: the lowest stage that fits."""
    offload_optimizer: Offload = "none"
    """Where the optimizer state lives: on the device, in host memory or on NVMe."""
    offload_parameters: Offload = "none"
    """Where sharded weights live (stage 3)."""
    copy_per_node: bool | Auto = "auto"
    """A second copy of sharded weights, divided among the workers of each node, so that passes gather them inside it (stage 3 on
    several nodes; ZeRO++ hpZ). Equal results, for memory. `auto`: where the plan's arithmetic has it fit and save time."""
    nvme_path: Annotated[Text, Field(pattern="^/", title="an absolute path such as /nvme", examples=["/nvme"])] | None = None
    """Folder on a local NVMe disk, for `nvme` offload: an absolute path, since workers have working directories of their own."""
    overrides: dict[str, Any] = {}
    """Raw DeepSpeed JSON laid over the config that raytune makes; for keys that raytune has no word for."""

    @model_validator(mode="after")
    def _offload_is_possible(self) -> "ZeroSection":
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and self.nvme_path is None:
            raise ValueError("nvme offload needs training.zero.nvme_path, a folder on a local disk")
        if self.offload_parameters != "none" and self.stage not in (3, "auto"):
            raise ValueError(f"offload_parameters needs ZeRO stage 3, got stage {self.stage}")
        if self.copy_per_node is True and self.stage not in (3, "auto"):
            raise ValueError(f"copy_per_node needs ZeRO stage 3, got stage {self.stage}")
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError("offload_optimizer needs ZeRO stage 1, 2 or 3, got stage 0")
        return self


class TrainingSection(Section):
    num_train_epochs: Annotated[PositiveFloat | Auto, Field(examples=[3])] = "auto"
    """Passes over the training rows. `auto` depends on the method. `max_steps` wins over it."""
    max_steps: PositiveInt | None = None
    """Optimizer steps in total."""
    global_batch_size: PositiveInt | Auto = "auto"
    """Rows per optimizer step over all workers. The loss curve depends on this number, never on how it is divided."""
    per_device_train_batch_size: PositiveInt | Auto = "auto"
    """Rows per forward pass of one worker (the micro-batch)."""
    gradient_accumulation_steps: PositiveInt | Auto = "auto"
    """Forward passes of one worker per optimizer step."""
    sequence_parallel_size: Annotated[PositiveInt, Field(examples=[4])] = 1
    """Workers that share each row: each holds a part of its tokens, and they exchange heads in attention (Ulysses). For rows
    whose activations no GPU holds; equal results, for time. `cluster.workers` and heads must be divisible by it."""
    learning_rate: Annotated[PositiveFloat | Auto, Field(examples=[2e-4])] = "auto"
    """Peak learning rate. `auto` depends on the method."""
    lr_scheduler_type: Annotated[Schedule | Auto, Field(examples=["cosine"])] = "auto"
    """Shape after the warm-up. `wsd`: constant, then a linear decay over the last `decay_ratio` of the steps. `auto`: cosine;
    `constant` with `optimizer: schedule_free_adamw`, which goes with no other."""
    min_lr_ratio: Fraction = 0.0
    """Where the schedule ends, as a share of the peak. Refused with `constant`, which stays at the peak."""
    decay_ratio: Fraction = 0.2
    """Share of the steps that decays. For `wsd` only."""
    polynomial_power: PositiveFloat = 2.0
    """Exponent of the remaining share. For `polynomial` only."""
    num_cycles: PositiveInt = 1
    """Number of cycles. For `cosine_with_restarts` only."""
    warmup_ratio: Annotated[Fraction | Auto, Field(examples=[0.03])] = "auto"
    """Share of the steps over which the rate rises linearly from 0. `auto` depends on the length of the run, and leaves out a
    warm-up of one step, whose rate would be 0."""
    warmup_steps: NonNegativeInt | None = None
    """Warm-up in steps; wins over `warmup_ratio`."""
    optimizer: Optimizer = "adamw"
    """AdamW is fused where PyTorch has it; `adamw_8bit` and `paged_*` come from bitsandbytes; `adafactor`, `lion`. `muon`
    (PyTorch's, momentum 0.95) orthogonalises the updates of matrices of hidden layers, or of both factors of their low-rank
    updates, at AdamW's rates; AdamW updates all else (embeddings, head, norms, biases, experts). `schedule_free_adamw`
    (of the package schedulefree): AdamW without a schedule, whose model is an average that it makes as it goes. The last two
    without DeepSpeed only."""
    weight_decay: Annotated[NonNegativeFloat | Auto, Field(examples=[0.01])] = "auto"
    """Decoupled weight decay of matrices; biases and norms have none. `auto` depends on the method."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """First-moment decay. For AdamW and Lion; with `muon`, for what AdamW updates."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Second-moment decay. For AdamW and Lion; with `muon`, for what AdamW updates."""
    adam_epsilon: PositiveFloat = 1e-8
    """Denominator offset. For AdamW only; with `muon`, for what AdamW updates."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down. 0: no clipping."""
    precision: Precision | Auto = "auto"
    """Arithmetic of forward and backward. bf16 and fp16 keep fp32 master weights; fp16 scales the loss. `auto`: bf16 on GPUs
    that have it, fp32 on CPU."""
    tf32: bool = True
    """Allow TF32 products on Ampere and newer GPUs where fp32 is used."""
    gradient_checkpointing: bool | Auto = "auto"
    """Recompute activations in the backward pass: less memory, about a third more compute. `auto`: only if it does not fit
    without."""
    loss: Literal["full", "chunked"] | Auto = "auto"
    """`full` projects all target positions at once, `chunked` a few thousand at a time and never holds all logits. Equal results.
    `auto`: chunked when the logits would exceed 256 MiB."""
    neftune_noise_alpha: NonNegativeFloat = 0.0
    """NEFTune: noise on the embeddings in training, scaled by alpha / sqrt(tokens * width). 0: none."""
    liger: bool | Auto = "auto"
    """Liger's fused kernels for norms, rotary embeddings and gated MLPs, on GPUs (raytune's extra `gpu`). `auto`: where the
    package is installed, for families whose results with it were those of transformers."""
    compile: bool = False
    """Compile each layer of the model with torch.compile, once for rows of any length. Refused with ZeRO-3, whose hooks break the
    graph."""
    logging_steps: PositiveInt = 1
    """Steps between two lines of metrics.jsonl."""
    early_stopping: EarlyStoppingSection | None = None
    """End the run where its metric gets no better; `{}` turns it on as its keys are by default."""
    overfitting: OverfittingSection | None = None
    """Look out for overfitting: warn, or end the run; `{}` turns it on as its keys are by default."""
    divergence: DivergenceSection | None = None
    """Look out for spikes of loss and gradient norm: warn, skip the step, end the run, or roll back at a lower rate; `{}` turns
    it on as its keys are by default."""
    averaging: AveragingSection | None = None
    """Average the trained weights over steps; the average is then the model that is validated and saved. `{}` turns it on as its
    keys are by default."""
    seed: NonNegativeInt = 42
    """Seed of the data order, dropout and adapter initialisation."""
    shard_base: bool | Auto = "auto"
    """Divide the layers of a frozen base among the workers, which bring one after the other together as they compute; what is
    trained lies whole on each, without DeepSpeed. For adapters: equal results as with a whole base, in less time than at ZeRO
    stage 3. `auto`: on CPUs, where the base does not fit whole."""
    zero: ZeroSection = ZeroSection()
    """Sharding by DeepSpeed ZeRO."""

    @model_validator(mode="after")
    def _batch_sizes_agree(self) -> "TrainingSection":
        total, micro, accumulation = (
            self.global_batch_size,
            self.per_device_train_batch_size,
            self.gradient_accumulation_steps,
        )
        if total != "auto" and micro != "auto" and accumulation != "auto" and total % (micro * accumulation):
            raise ValueError(
                f"global_batch_size {total} is not workers x per_device_train_batch_size {micro} x "
                f"gradient_accumulation_steps {accumulation} for any number of workers; leave one of them out"
            )
        if self.warmup_steps is not None and self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than max_steps {self.max_steps}")
        return self
