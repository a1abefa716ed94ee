"""`RunPlan`: everything that a worker needs to know, resolved. Frozen, JSON in and out."""

from typing import Any, Literal, get_args

from pydantic import TypeAdapter, model_validator

from raytune.config.sections.adapter import Adapter, own_quantization, without_preset
from raytune.config.sections.divergence import DivergenceSection
from raytune.config.sections.evaluation import GENERATION, BertScoreSection, SuiteKind
from raytune.config.sections.model import Attention, NewToken, Quantization
from raytune.config.sections.stopping import EarlyStoppingSection, OverfittingSection
from raytune.config.sections.training import Offload, Optimizer, Precision, Schedule
from raytune.plan.calendar import Period
from raytune.plan.data.data_report import DataReport
from raytune.plan.data.streaming import StreamPlan
from raytune.plan.value import Plan
from raytune.user_code import UserCode

ZeroStage = Literal[0, 1, 2, 3]
Place = Literal["device", "host", "nvme"]
Moment = Literal["forward", "loss", "last layer", "first layer", "update", "teacher"]
"""When in a step memory may be fullest: in the forward pass of a teacher, which comes before all else; at the end of the forward
pass; in the backward pass of the loss, of the last layer (all activations, no gradients yet) or of the first (the reverse); in
the update."""
MOMENTS: tuple[Moment, ...] = get_args(Moment)
MeasuredWhere = Literal["spare", "between_steps"]
Bound = Literal["compute", "memory bandwidth", "communication", "offload"]


class RopePlan(Plan):
    """Rotary positions in place of the base's own, but for its theta and how much of a head they rotate."""

    parameters: dict[str, str | bool | int | float]
    """By transformers' names (`rope_parameters`)."""
    original_positions: int
    """That the base was first trained with."""
    max_position_embeddings: int
    """Of the config: how far positions reach, or with `dynamic` the original length, which it reckons from."""


class ModelPlan(Plan):
    path: str
    """Local folder or hub id that transformers can load."""
    revision: str | None
    """Commit of a hub model, so that every worker of every attempt loads the same one."""
    content: dict[str, str] | None = None
    """What the base is, wherever it lies: hashes of a folder's files, the commit of a hub model (model.base_content). None in a
    plan of a model that need not be here."""
    trust_remote_code: bool
    attention: Attention
    packs: bool = True
    """Whether documents share rows. Else each forward pass has one, and `attention` is transformers' own."""
    dtype: Precision
    """Dtype of the loaded weights: fp32 where PlainEngine trains them itself, else the run's precision (frozen, or with
    DeepSpeed's fp32 masters beside them)."""
    compute_dtype: Precision
    """Dtype of products in forward and backward."""
    quantization: Quantization | None = None
    """How bitsandbytes holds the frozen base; None: not at all."""
    gradient_checkpointing: bool
    compile: bool
    liger: bool
    neftune_noise_alpha: float
    frozen: list[str] = []
    """Modules of a base that is trained itself which stay as they are, with all that they hold (plan.freezing.folded)."""
    lowest_layer: int = 0
    """The lowest layer that a backward pass has to reach; the number of layers where only what follows them is trained."""
    new_tokens: list[NewToken] = []
    """Added to the base's tokenizer."""
    num_embeddings: int | None = None
    """Rows of embedding and head once they have room for these; None: as many as the base has."""
    rope: RopePlan | None = None
    """None: the base's own positions, if it has rotary ones."""
    dropout: dict[str, float] = {}
    """Values of the base's config that are set anew, in training only."""


class StorePlan(Plan):
    """One tokenised store (data.store), in a folder that every node can read."""

    name: str
    """Name of the data set in metrics."""
    path: str
    num_rows: int
    """Packed rows."""
    num_tokens: int
    num_targets: int
    weight: float = 1.0
    """Of a validation set: how much each of its targets counts in what is measured over all sets."""
    known_as: tuple[str, ...] = ()
    """Names of other stores with the same rows: made of a file with another name, or by the code of another raytune."""


class DataPlan(Plan):
    train: StorePlan
    validation: list[StorePlan]
    """One store per validation source, so that each gets its own loss."""
    row_length: int
    """Tokens that a packed row holds at most."""
    test: list[StorePlan] = []
    """What the model of the end is measured on. No part of what a run is: nothing that is trained or chosen depends on it."""
    ewc: StorePlan | None = None
    """What the importance of weights is estimated from, a document per row; None without EWC."""
    stream: StreamPlan | None = None
    """How training rows are streamed, which have no store: `train` is what the first window of them came to."""


class BatchPlan(Plan):
    workers: int
    micro_batch_size: int
    """Rows per forward pass of one worker."""
    accumulation: int
    """Forward passes per optimizer step."""
    sequence_parallel: int = 1
    """Workers that share each row."""

    @property
    def data_parallel(self) -> int:
        """Groups of workers that have rows of their own."""
        return self.workers // self.sequence_parallel

    @property
    def global_batch_size(self) -> int:
        """Rows per optimizer step over all workers."""
        return self.data_parallel * self.micro_batch_size * self.accumulation

    @property
    def equation(self) -> str:
        return self.in_words("packed row")

    def in_words(self, row: str) -> str:
        """The equation, with what a row is: a packed row, or a document where each has one of its own."""
        workers = f"{self.workers} worker{'s' * (self.workers != 1)}"
        if self.sequence_parallel > 1:
            workers = f"{self.data_parallel} group{'s' * (self.data_parallel != 1)} of {self.sequence_parallel} workers"
        rows = f"{self.micro_batch_size} {row}{'s' * (self.micro_batch_size != 1)}"
        return f"{workers} x {rows} x {self.accumulation} accumulation = {self.global_batch_size} {row}s per step"


class UpdateGroup(Plan):
    """Modules, with all that they hold, whose trained weights are updated in another way than the run's settings say."""

    modules: list[str]
    rate_scale: float = 1.0
    """What the learning rate is multiplied by."""
    weight_decay: float | None = None
    """None: the run's."""


class PhasePlan(Plan):
    """A part of a run that trains more of the base than the one before it."""

    first_step: int
    """Steps made before it."""
    frozen: list[str]
    """As `ModelPlan.frozen`; each phase trains all that those before it do."""
    learning_rate: float
    """Peak of the schedule, in this phase."""
    warmup_steps: int
    """Of the phase, over which its rate rises from 0."""


class AveragingPlan(Plan):
    """A running average of the trained weights (plan.averaging)."""

    decay: float
    """What weights count for, as a share of those that are averaged after them; 1: all count alike."""
    first_step: int
    """After which weights are averaged for the first time, counted from 1."""
    every_steps: int


class CodePlan(Plan):
    """Something of the user's, with its code."""

    module: str
    """The file, as it was named, or an installed module."""
    name: str
    """Of the function or class in it."""
    text: str
    """Of the module."""

    @property
    def code(self) -> UserCode:
        return UserCode(module=self.module, name=self.name, text=self.text)


class ObjectivePlan(CodePlan):
    """A loss of the user's (training.user_objective)."""

    sha256: str
    """Of the text."""
    options: dict[str, Any]
    bytes_per_logit: float
    """That it and its gradient take, at the fullest moment, beside logits in fp32."""
    is_tried: bool = False
    """Whether these were measured; else they are assumed."""


class OptimizationPlan(Plan):
    num_steps: int
    num_rows: int
    """Packed rows in the whole run, epochs times rows; the batch of the last step may end before it is full."""
    optimizer: Optimizer
    learning_rate: float
    lora_plus_ratio: float | None
    lora_plus_embedding_rate: float | None
    """Peak rate of low-rank updates of embeddings under LoRA+; None without it."""
    update_groups: list[UpdateGroup] = []
    """The lowest in the model first. What is in none learns by the settings below alone."""
    phases: list[PhasePlan] = []
    """In order, the first from step 0 on; empty where the same is trained in all steps."""
    schedule: Schedule
    warmup_steps: int
    min_lr_ratio: float
    decay_ratio: float
    polynomial_power: float
    num_cycles: int
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    max_grad_norm: float
    objective: ObjectivePlan | None = None
    """None: cross-entropy."""
    l2_sp_strength: float = 0.0
    """Of the penalty on the way from the base (training.penalty); 0: there is none."""
    ewc_strength: float = 0.0
    """Of the same by the importance of each weight; 0: there is none."""
    ewc_documents: int = 0
    """Of `DataPlan.ewc`, that importance is estimated from."""
    averaging: AveragingPlan | None = None
    """None: the model is the weights as they are."""


class DistillationPlan(Plan):
    """What a teacher adds to the loss (training.objectives.Distillation)."""

    weight: float
    """Of the teacher against the targets; more than 0."""
    temperature: float
    top_k: int | None
    teacher: ModelPlan | None
    """A model beside the one that is trained; None: the frozen base beneath the adapter."""


class BucketPlan(Plan):
    """How much collectives carry at once, in numbers (plan.buckets)."""

    reduce_elements: int = 200_000_000
    """Gradients that are summed by one collective, at most."""
    prefetch_elements: int = 50_000_000
    """Weights that stage 3 gathers ahead of those that are computed with."""
    persistent_elements: int = 100_000
    """Of the largest parameter that stage 3 leaves whole on every rank."""


class EnginePlan(Plan):
    kind: Literal["plain", "zero"]
    zero_stage: ZeroStage
    shards_base: bool = False
    """Whether several workers divide the layers of a frozen base (model.sharded_base); with kind "plain" only."""
    offload_optimizer: Offload
    offload_parameters: Offload
    nvme_path: str | None
    deepspeed_overrides: dict
    """Raw DeepSpeed JSON laid over what training/engines/deepspeed_json.py makes."""
    buckets: BucketPlan = BucketPlan()
    copy_over: int = 1
    """Workers of a node that have a copy of the weights among them, beside that which all workers have (stage 3); 1: none."""


class LossPlan(Plan):
    chunk_tokens: int | None
    """Target positions projected at once; None: all of them."""


class SamplingPlan(Plan):
    """How tokens are drawn."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int


class TaskPlan(Plan):
    """A task of lm_eval, with all that says how it is asked and judged."""

    name: str
    files: dict[str, str]
    """Text of the YAML and Python files of its folder, by their paths in there."""
    num_fewshot: int | None = None
    """None: as many as the files say."""


class SuitePlan(Plan):
    """How the questions of a suite are asked and judged; which rows they come from is the launcher's matter."""

    name: str
    kind: SuiteKind = "answers"
    metrics: tuple[str, ...]
    code: dict[str, CodePlan] = {}
    """By the name of the metric."""
    bertscore: BertScoreSection | None = None
    task: TaskPlan | None = None
    """Of kind lm_eval."""
    batch_size: int
    max_new_tokens: int
    num_beams: int = 1
    sampling: SamplingPlan | None = None
    """None: the likeliest token each time."""


class WhileTrainingPlan(Plan):
    """Suites that are measured while training goes on (plan.while_training)."""

    every_steps: Period
    at_saves: bool
    """Also wherever a checkpoint is due by its step, since a suite ranks them."""
    at_start: bool
    suites: tuple[SuitePlan, ...]
    where: MeasuredWhere
    num_cpus: int
    """Of the actor that measures, where one does."""
    num_gpus: int
    wait_s: float
    """How long the end of the run waits for it, at most."""
    export_bytes: int
    """Expected size of an export."""

    @property
    def metrics(self) -> frozenset[str]:
        """Names of what is measured."""
        return frozenset(f"{suite.name}/{metric}" for suite in self.suites for metric in suite.metrics)


class EvaluationPlan(Plan):
    every_steps: Period
    at_saves: bool
    """Also wherever a checkpoint is due by its step, so that its metric is known when the best one is sought."""
    at_start: bool
    max_rows: int | None
    suites: tuple[SuitePlan, ...] = ()
    """What base and tuned model are measured on at the end."""
    while_training: WhileTrainingPlan | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        """Until 2026-11-29 a plan had one suite, which was called `generation`."""
        if not isinstance(values, dict) or "generation" not in values:
            return values
        generation = values["generation"]
        suites = [{"name": GENERATION, **generation}] if generation else []
        return {key: value for key, value in values.items() if key != "generation"} | {"suites": suites}


class SnapshotPlan(Plan):
    """Bytes of the host's memory that a rank copies its part of a checkpoint into; a thread writes its files out of there."""

    first_rank: int
    other_ranks: int

    def bytes_of(self, rank: int) -> int:
        return self.other_ranks if rank else self.first_rank


class CheckpointPlan(Plan):
    every_steps: Period
    every_s: float | None
    keep_last: int
    keep_best: int
    metric: str
    mode: Literal["min", "max"]
    snapshot: SnapshotPlan | None = None
    """None: training waits until the files of a checkpoint are written."""


class StoppingPlan(Plan):
    """Rules that may end the run before its last step, or that warn (training.stopping)."""

    early_stopping: EarlyStoppingSection | None = None
    overfitting: OverfittingSection | None = None

    @property
    def are_given(self) -> bool:
        return bool(self.early_stopping or self.overfitting)

    @property
    def may_end(self) -> bool:
        """Whether one of them may end the run."""
        return bool(self.early_stopping or (self.overfitting and self.overfitting.policy == "stop"))


class ClusterPlan(Plan):
    device: Literal["cpu", "cuda"]
    cpus_per_worker: float
    gpus_per_worker: int
    threads_per_worker: int
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"]
    max_failures: int
    collective_timeout_s: float


class MemoryPart(Plan):
    """Bytes per rank of one part of the run."""

    name: str
    num_bytes: int
    place: Place = "device"
    """Where they lie. On a CPU the device is the host's memory."""
    moments: tuple[Moment, ...] = MOMENTS
    """When they are there."""


class StepTimePlan(Plan):
    """Seconds of an optimizer step, by arithmetic (plan.throughput). Products and memory traffic follow each other on the GPU;
    the rest overlaps with them."""

    compute_s: float
    memory_s: float
    communication_s: float
    offload_s: float
    exchange_s: float = 0.0
    """Of heads between workers that share rows, for which these wait."""
    seconds: float
    binds: Bound
    """What a faster one of would make the step shorter."""
    tokens_per_s: float
    """Of the data, without virtual ones, over all workers."""


class CostPlan(Plan):
    """What the training steps cost on rented nodes (plan.cost), list prices of a day."""

    instance: str
    num_nodes: int
    is_spot: bool
    hours: float
    usd: float
    """On demand; 0 for machines that are not rented."""
    spot_usd: float | None
    """None: no spot price is known."""
    save_s: float
    """Of one checkpoint."""
    between_interruptions_s: float
    """Assumed mean time, of all nodes together."""
    save_every_s: float
    """Seconds between saves that lose least; at most the whole run."""
    lost_s_per_interruption: float
    """Expected, with saves that often."""
    lost_usd_per_interruption: float
    price_date: str


class PhaseNeeds(Plan):
    """What a phase takes."""

    trains: str
    """In words."""
    num_trainable: int
    lowest_layer: int
    """As `ModelPlan.lowest_layer`."""
    memory: list[MemoryPart]
    checkpoint_bytes: int
    step_time: StepTimePlan | None


_ADAPTER: TypeAdapter[Adapter] = TypeAdapter(Adapter)


def todays_form(stored: dict[str, Any]) -> dict[str, Any]:
    """A plan, or the identity of one, in today's form, as it may have been stored in another.

    Before 2026-11-28 the quantisation of the base lay in the adapter (`method: qlora`) and not in the model.
    """
    if not isinstance(stored.get("adapter"), dict) or not isinstance(stored.get("model"), dict):
        return stored
    adapter = _ADAPTER.validate_python(stored["adapter"])
    preset = own_quantization(adapter)
    held = stored["model"].get("quantization") if preset is None else preset.model_dump()
    return stored | {"adapter": without_preset(adapter).model_dump(), "model": stored["model"] | {"quantization": held}}


class RunPlan(Plan):
    name: str
    storage: str
    """Absolute folder or URL that holds the run folder."""
    seed: int
    precision: Precision
    tf32: bool
    logging_steps: int
    template: str
    """Text of the chat template; empty where only plain text is trained."""
    model: ModelPlan
    data: DataPlan
    adapter: Adapter
    batch: BatchPlan
    optimization: OptimizationPlan
    distillation: DistillationPlan | None = None
    engine: EnginePlan
    loss: LossPlan
    evaluation: EvaluationPlan
    checkpoint: CheckpointPlan
    stopping: StoppingPlan = StoppingPlan()
    divergence: DivergenceSection | None = None
    cluster: ClusterPlan
    rungs: tuple[int, ...] = ()
    """Steps after which a sweep judges this trial: it is evaluated and saved there. None outside of sweeps."""
    memory: list[MemoryPart]
    """Expected bytes per rank, by part; of the fullest phase."""
    checkpoint_bytes: int
    """Expected size of one checkpoint, over all ranks; of the largest."""
    step_time: StepTimePlan | None
    """Expected, of the last phase; None where the speed of the machines is not known (no cluster.instance)."""
    importance_s: float | None = None
    """Seconds of estimating the importance of weights, expected; None without EWC, or where `step_time` is None."""
    cost: CostPlan | None
    """Expected; None without cluster.instance."""
    num_parameters: int
    """Of the base model."""
    num_trainable: int
    """Parameters that are trained, by the end of the run; an adapter's come on top of the base."""
    phase_needs: list[PhaseNeeds] = []
    """Of each of `optimization.phases`."""
    notes: list[str] = []
    """What a reader may not expect of what is trained, quantised or estimated, a sentence or two each."""
    reasons: list[str]
    """Why each automatic choice was made, a sentence each."""
    data_report: DataReport | None = None
    """What became of the rows; None where they were not read (plans with cluster.instance)."""

    @model_validator(mode="before")
    @classmethod
    def _base_apart_from_preset(cls, values: Any) -> Any:
        return todays_form(values) if isinstance(values, dict) else values

    @property
    def models(self) -> list[ModelPlan]:
        """Models whose files the run reads: the base, and a teacher beside it."""
        teacher = self.distillation and self.distillation.teacher
        return [self.model, teacher] if teacher else [self.model]

    @property
    def measures_beside(self) -> bool:
        """Whether suites are measured beside the workers while these train."""
        return self.evaluation.while_training is not None and self.evaluation.while_training.where == "spare"

    @property
    def skips_spikes(self) -> bool:
        """Whether updates may be skipped whose gradient is a spike."""
        return self.divergence is not None and self.divergence.policy == "skip"

    @property
    def bytes_on_nvme(self) -> dict[str, int]:
        """What a rank writes to its node's disk while it trains, by part.

        Besides the parts of `memory` that lie there, DeepSpeed's optimizer puts the gradients of a step into files before it
        updates, in fp32.
        """
        parts = {part.name: part.num_bytes for part in self.memory if part.place == "nvme"}
        if self.engine.offload_optimizer == "nvme":
            parts["gradients"] = 4 * self.num_trainable // self.batch.workers
        return parts
