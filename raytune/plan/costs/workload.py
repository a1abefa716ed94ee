"""All that decides the bytes and the seconds of a rank's step: what is trained of which model, how it is divided, and how much of
what passes through it at a time."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from raytune.config.sections.model import Attention, Quantization
from raytune.config.sections.training import Offload, Optimizer, Precision
from raytune.plan.model.quantization import num_quantised, packed_bytes
from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import Trained
from raytune.plan.run_plan import BucketPlan, ZeroStage

BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """All that decides the bytes of a rank."""

    shape: ModelShape
    trained: Trained
    quantization: Quantization | None = None
    """How a frozen base is held; None: as it is."""
    engine: str
    """"plain" or "zero"."""
    zero_stage: ZeroStage
    shards_base: bool = False
    """Whether the workers divide the layers of a frozen base without ZeRO (model.sharded_base)."""
    workers: int
    offload_optimizer: Offload
    offload_parameters: Offload
    precision: Precision
    optimizer: Optimizer
    attention: Attention
    has_checkpointing: bool
    accumulation: int
    num_tokens: int
    """Tokens of a micro-batch, with virtual ones that pass through the layers."""
    num_targets: int
    """Target tokens of a micro-batch, at most."""
    chunk_tokens: int | None
    is_on_gpu: bool
    drops: frozenset[str] = frozenset()
    """Kinds of `model.dropout` that the config asks for."""
    num_virtual_keys: int = 0
    """Virtual tokens of a micro-batch that only keys and values have."""
    sequence_parallel: int = 1
    """Workers that share each row, each with the tokens above."""
    holds_weights: bool = False
    """Whether a penalty holds what is trained near the base (training.penalty)."""
    weighs_importance: bool = False
    """Whether it does so by the importance of each weight."""
    teacher: ModelShape | None = None
    """Whom the model learns from (training.teacher)."""
    teacher_is_beside: bool = False
    """Whether that is a model of its own, and not the base beneath what is trained."""
    averages_every: int | None = None
    """Steps between two of which the trained weights are averaged (training.averaging); None: they are not."""
    objective_bytes: float | None = None
    """Per logit, of a loss of the user's and its gradient beside logits in fp32; None: cross-entropy."""
    copy_over: int = 1
    """Workers of a node that have a second copy of sharded weights among them; 1: there is none."""
    buckets: BucketPlan = field(default_factory=BucketPlan)
    """How much collectives carry at once."""
    streamed_tokens: int = 0
    """Of a window of streamed rows; 0: rows have a store."""
    streamed_ahead_bytes: int = 0
    """Of pieces of files that are fetched ahead of what is read of them."""

    @property
    def weight_dtype(self) -> Precision:
        """Of weights as they are loaded (`ModelPlan.dtype`)."""
        return "fp32" if self.trained.is_base and self.engine == "plain" else self.precision

    @property
    def trained_dtype(self) -> Precision:
        """Of trained weights: PlainEngine keeps them in fp32, DeepSpeed has fp32 masters beside them."""
        return "fp32" if self.engine == "plain" else self.precision

    @property
    def all_weight_bytes(self) -> float:
        """Weights that ZeRO-3 would share out, each counted once."""
        dtype, trained = BYTES[self.weight_dtype], BYTES[self.trained_dtype] * self.trained.num_trainable
        if self.trained.is_base:
            return dtype * self.shape.num_parameters
        if self.quantization is None:
            return dtype * self.shape.num_parameters + trained
        whole = self.shape.num_parameters - num_quantised(self.shape, self.trained)
        return packed_bytes(self.quantization, self.shape, self.trained) + dtype * whole + trained

    @property
    def sharded_layer_bytes(self) -> float:
        """Frozen weights of all layers, where workers divide these without ZeRO."""
        return self._layer_bytes(self.shape.counted_layers()) if self.shards_base else 0.0

    @property
    def largest_sharded_layer_bytes(self) -> float:
        """Of these, the weights of the largest layer."""
        alone = ((layer, 1) for layer, _ in self.shape.counted_layers())
        return max(self._layer_bytes([one]) for one in alone) if self.shards_base else 0.0

    def _layer_bytes(self, layers: Iterable[tuple[tuple[Module, ...], int]]) -> float:
        """Frozen weights of layers of each kind, so many of each, as they are held."""
        num_whole = num_packed = 0
        for layer, count in layers:
            packed = sum(module.inputs * module.outputs for module in layer if module.is_linear) if self.quantization else 0
            packed += self.trained.num_packed_per_layer * any(module.kind == "experts" for module in layer)
            num_packed += count * packed
            num_whole += count * (sum(module.num_parameters for module in layer) - packed)
        per_packed = 0.5 if self.quantization and self.quantization.is_4_bit else 1.0
        return BYTES[self.weight_dtype] * num_whole + per_packed * num_packed

    @property
    def num_reached(self) -> int:
        """Layers that a backward pass runs through."""
        return self.shape.num_layers - self.trained.lowest_layer

    def share(self, from_stage: int) -> int:
        """Ranks that divide what ZeRO shards from this stage on."""
        return self.workers if self.zero_stage >= from_stage else 1
