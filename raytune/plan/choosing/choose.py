"""From a config, a model's shape, the machines and the data to a `RunPlan`, in which no "auto" is left, but for what a method's
own section leaves to the shape of the base. Pure.

A launcher calls, in this order: `base_model.read_model_shape`, `setting.settle`; then it builds the stores, with rows of as many
tokens as that says, and then calls `choose_plan`.
"""

import math

from raytune.config.checks.readers import unread
from raytune.config.reading.presets import preset_reasons
from raytune.config.sections.adapter import without_preset
from raytune.config.sections.run import RunConfig
from raytune.config.words.metric_names import METRICS
from raytune.errors import DataError, PlanError, UserError
from raytune.plan.calendar import Epoch, in_steps, saves_miss, steps_of_epochs
from raytune.plan.choosing.batch import default_rows_per_step
from raytune.plan.choosing.fitting import Fit, choose_fit
from raytune.plan.choosing.optimization import optimization_plan, rows_in_epochs
from raytune.plan.choosing.reasons import Reasons, reasons_for_fit, reasons_of_cluster
from raytune.plan.choosing.requirements import Device
from raytune.plan.choosing.setting import Setting
from raytune.plan.choosing.sharded_base import base_reasons
from raytune.plan.choosing.snapshot import snapshot_plan, with_copy
from raytune.plan.choosing.suites import check_room, suites_plan
from raytune.plan.choosing.while_training import ranks_checkpoints, while_training_notes, while_training_plan
from raytune.plan.costs.cost import cost_of
from raytune.plan.costs.fabric import fabric_notes
from raytune.plan.data.mixing import mixture_notes
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.facts.machine import Machine
from raytune.plan.identity.deepspeed_keys import unread_overrides
from raytune.plan.methods import expert_notes, method_of
from raytune.plan.methods.in_front import virtual_notes
from raytune.plan.model.lone_documents import lone_notes
from raytune.plan.model.rope import resolve_rope, rope_notes
from raytune.plan.model.stored_quantization import quantization_note
from raytune.plan.rates.optimizers import optimizer_notes
from raytune.plan.run_plan import (
    CheckpointPlan,
    ClusterPlan,
    CostPlan,
    DataPlan,
    EnginePlan,
    EvaluationPlan,
    LossPlan,
    ModelPlan,
    PhaseNeeds,
    PhasePlan,
    RunPlan,
    SnapshotPlan,
)
from raytune.plan.strategies.averaging import averaging_notes
from raytune.plan.strategies.distillation import TeacherFiles, distillation_notes, distillation_plan, teacher_section
from raytune.plan.strategies.divergence import guard_notes, guard_of
from raytune.plan.strategies.freezing import freezing_notes, frozen_names
from raytune.plan.strategies.new_tokens import new_token_notes
from raytune.plan.strategies.objective import objective_notes
from raytune.plan.strategies.penalty import penalty_notes
from raytune.plan.strategies.phases import phase_notes, words_of
from raytune.plan.strategies.sequence import sequence_notes
from raytune.plan.strategies.stopping import stopping_notes, stopping_of
from raytune.plan.strategies.update_groups import rate_notes
from raytune.units import format_bytes

EVALUATIONS_PER_RUN = 10


def choose_plan(
    setting: Setting,
    data: DataFacts,
    *,
    model_path: str,
    storage: str,
    content: dict[str, str] | None = None,
    teacher: TeacherFiles | None = None,
    advises: bool = True,
) -> RunPlan:
    """Resolve everything.

    Args:
        setting: what `settle` decided of a config, for a model and a cluster.
        data: the stores, built with rows of `setting.row_length` tokens.
        model_path: the base model as workers load it: a local folder or a hub id.
        storage: absolute folder or URL of the run folders.
        content: of the base, as `ModelPlan.content`; None: it need not be here.
        teacher: what `distillation.teacher_section` names, where it is; None: it need not be here.
        advises: as `choose_fit` takes it.

    Raises:
        UserError: (or PlanError) if it cannot be done as asked; the message says what could.
        DataError: if the data has nothing to learn from.
    """
    if not data.train.num_targets:
        raise DataError(f"The training store {data.train.path} has no target tokens, so nothing can be learned from it.")
    config, shape, machine = setting.config, setting.shape, setting.machine
    reasons = Reasons([*preset_reasons(config), *setting.reasons])
    training, device = config.training, setting.device
    precision, adapter, quantization = setting.precision, setting.adapter, setting.quantization
    method = method_of(adapter)
    in_epochs = rows_in_epochs(config, data, reasons)
    wanted_rows = default_rows_per_step(data.train.num_rows, in_epochs)
    fit = choose_fit(setting, wanted_rows, data, advises=advises)
    snapshot = snapshot_plan(setting, fit)
    fit = with_copy(fit, snapshot.value, setting)
    reasons += reasons_for_fit(fit, setting, wanted_rows, data)
    reasons += base_reasons(config, is_sharded=fit.shards_base, workers=fit.batch.workers)
    reasons += [data.assumption] if data.assumption else []
    reasons += [key.sentence for key in unread(config) if not key.is_refused]
    reasons += method.unread(without_preset(config.adapter), shape)
    reasons += unread_overrides(training.zero, fit.zero_stage, precision)
    reasons += reasons_of_cluster(config, machine)
    check_room(config.evaluation, shape, machine, device)

    rows_per_step = fit.batch.global_batch_size
    num_rows = (training.max_steps or 0) * rows_per_step if in_epochs is None else in_epochs
    num_steps = math.ceil(num_rows / rows_per_step)
    optimization = optimization_plan(setting, data, num_steps, num_rows, data.train.num_rows / rows_per_step, reasons)
    epoch = Epoch(data.train.num_rows, rows_per_step, num_steps)
    cluster = _cluster(config, device, machine, fit.batch.workers)
    evaluation = _evaluation(config, data, epoch, reasons)
    while_training = while_training_plan(setting, fit, cluster, evaluation, epoch)
    reasons += while_training.reasons
    evaluation = evaluation.model_copy(update={"while_training": while_training.plan})
    checkpoint = _checkpoint(config, data, evaluation, epoch, reasons, reasons.taken(snapshot))
    stopping = stopping_of(config, _measured(data, evaluation))
    rope = resolve_rope(config.model, shape)
    plan = RunPlan(
        name=config.name,
        storage=storage,
        seed=training.seed,
        precision=precision,
        tf32=training.tf32,
        logging_steps=training.logging_steps,
        template=data.template,
        model=ModelPlan(
            path=model_path,
            revision=config.model.revision,
            content=content,
            trust_remote_code=config.model.trust_remote_code,
            attention=setting.attention,
            packs=not shape.why_lone,
            dtype="fp32" if fit.zero_stage == 0 and setting.trained.is_base else precision,
            compute_dtype=precision,
            quantization=quantization,
            gradient_checkpointing=fit.has_checkpointing,
            compile=training.compile,
            liger=setting.liger,
            neftune_noise_alpha=training.neftune_noise_alpha,
            frozen=frozen_names(setting.trained, shape),
            lowest_layer=setting.trained.lowest_layer,
            new_tokens=config.model.new_tokens,
            num_embeddings=shape.vocab if shape.new_tokens else None,
            rope=rope,
            dropout=setting.dropout,
        ),
        data=DataPlan(
            train=data.train,
            validation=list(data.validation),
            test=list(data.test),
            row_length=setting.row_length,
            ewc=data.ewc,
            stream=data.stream,
        ),
        adapter=adapter,
        batch=fit.batch,
        optimization=optimization,
        distillation=distillation_plan(config, _teacher(setting, teacher)),
        engine=_engine(config, fit),
        loss=LossPlan(chunk_tokens=fit.chunk_tokens),
        evaluation=evaluation,
        checkpoint=checkpoint,
        stopping=stopping,
        divergence=guard_of(config, checkpoint),
        cluster=cluster,
        memory=fit.memory,
        step_time=fit.step_time,
        importance_s=fit.importance_s,
        cost=_cost(config, fit, machine, num_steps, optimization.phases),
        checkpoint_bytes=fit.checkpoint_bytes,
        num_parameters=shape.num_parameters,
        num_trainable=setting.trained.num_trainable,
        phase_needs=_phase_needs(setting, fit),
        notes=[
            *phase_notes(config, shape),
            *freezing_notes(setting.trained, shape, config.strategy.freeze),
            *rate_notes(setting.trained, config.strategy, shape),
            *optimizer_notes(config, setting.trained),
            *objective_notes(setting.objective),
            *penalty_notes(config, data, weight_decay=optimization.weight_decay),
            *mixture_notes(config, data.report, num_rows / data.train.num_rows),
            *distillation_notes(config, shape, setting.teacher),
            *virtual_notes(setting.trained, setting.row_length, is_packed=config.data.packing != "none"),
            *expert_notes(adapter, shape, setting.trained, quantization),
            *new_token_notes(shape, setting.trained, config.model),
            *rope_notes(rope, config.model, shape, setting.trained, setting.row_length),
            *sequence_notes(fit.batch, machine.num_gpus // machine.num_nodes if device == "cuda" else None),
            *lone_notes(shape),
            *quantization_note(shape.stored_quantization),
            *fabric_notes(machine.instance, machine.num_nodes, config.provider),
            *stopping_notes(stopping, evaluation, checkpoint, optimization),
            *(method.if_ended_early(adapter, num_steps) if stopping.may_end else ()),
        ],
        reasons=list(reasons),
        data_report=data.report,
    )
    _check_nvme(plan, machine)
    later = (*averaging_notes(plan), *guard_notes(plan), *while_training_notes(config, plan, machine))
    return plan.model_copy(update={"notes": [*plan.notes, *later]})


def _teacher(setting: Setting, files: TeacherFiles | None) -> ModelPlan | None:
    """How the model is loaded that is beside the one in training."""
    section = teacher_section(setting.config)
    if section is None:
        return None
    return ModelPlan(
        path=files.path if files else section.base,
        revision=section.revision if files is None else files.revision,
        content=files.content if files else None,
        trust_remote_code=section.trust_remote_code,
        attention=setting.attention,
        packs=not setting.shape.why_lone,
        dtype=setting.precision,
        compute_dtype=setting.precision,
        gradient_checkpointing=False,
        compile=False,
        liger=False,
        neftune_noise_alpha=0.0,
    )


def _check_nvme(plan: RunPlan, machine: Machine) -> None:
    """Refuse to offload more to the disks that come with an instance than they hold. Other disks are measured before training."""
    num_ranks = machine.workers_on_a_node(plan.batch.workers, per_gpu=plan.cluster.device == "cuda")
    needed = num_ranks * sum(plan.bytes_on_nvme.values())
    if machine.instance and 0 < machine.instance.nvme_bytes < needed:
        raise PlanError(
            f"training.zero offloads {num_ranks} x {format_bytes(needed // num_ranks)} = {format_bytes(needed)} to a node's own "
            f"disks, but {machine.instance.name} has {format_bytes(machine.instance.nvme_bytes)} of them. Raise cluster.nodes or "
            f"set training.zero.offload_optimizer and offload_parameters to cpu."
        )


def _phase_needs(setting: Setting, fit: Fit) -> list[PhaseNeeds]:
    return [
        PhaseNeeds(
            trains=words_of(phase, needs.trained, setting.shape),
            num_trainable=needs.trained.num_trainable,
            lowest_layer=needs.trained.lowest_layer,
            memory=needs.memory,
            checkpoint_bytes=needs.checkpoint_bytes,
            step_time=needs.step_time,
        )
        for phase, needs in zip(setting.config.strategy.unfreeze, fit.phases)
    ]


def _mean_step_s(fit: Fit, num_steps: int, phases: list[PhasePlan]) -> float | None:
    """Seconds of a step, over all phases; None where the machines' speed is not known."""
    firsts = [phase.first_step for phase in phases] or [0]
    ends = [*firsts[1:], num_steps]
    parts = [(end - first, one.step_time) for one, first, end in zip(fit.phases, firsts, ends)]
    seconds = [number * time.seconds for number, time in parts if time]
    return sum(seconds) / num_steps if len(seconds) == len(parts) else None


def _cost(config: RunConfig, fit: Fit, machine: Machine, num_steps: int, phases: list[PhasePlan]) -> CostPlan | None:
    step_s = _mean_step_s(fit, num_steps, phases)
    if machine.instance is None or step_s is None:
        return None
    return cost_of(
        machine.instance,
        num_nodes=machine.num_nodes,
        is_spot=config.cluster.spot,
        num_steps=num_steps,
        step_s=step_s,
        importance_s=fit.importance_s or 0.0,
        checkpoint_bytes=fit.checkpoint_bytes,
        num_writers=1 if fit.zero_stage == 0 else machine.num_nodes,  # PlainEngine saves from rank 0 alone
    )


def _engine(config: RunConfig, fit: Fit) -> EnginePlan:
    zero = config.training.zero
    return EnginePlan(
        kind="plain" if fit.zero_stage == 0 else "zero",
        zero_stage=fit.zero_stage,
        shards_base=fit.shards_base,
        offload_optimizer=zero.offload_optimizer,
        offload_parameters=zero.offload_parameters,
        nvme_path=zero.nvme_path,
        deepspeed_overrides=zero.overrides,
        buckets=fit.buckets,
        copy_over=fit.copy_over,
    )


def _evaluation(config: RunConfig, data: DataFacts, epoch: Epoch, reasons: Reasons) -> EvaluationPlan:
    section = config.evaluation
    every_steps = section.every_steps
    if section.every_epochs is not None:
        every_steps = reasons.taken(steps_of_epochs("evaluation", section.every_epochs, epoch))
    elif every_steps == "auto":
        every_steps = max(1, epoch.num_steps // EVALUATIONS_PER_RUN)
        if data.validation:
            reasons.append(
                f"evaluation.every_steps is {every_steps}: about {EVALUATIONS_PER_RUN} times in {epoch.num_steps} steps."
            )
    at_saves = bool(data.validation) and saves_miss(config.checkpoint, every_steps, epoch)
    if at_saves:
        name = "every_steps" if config.checkpoint.every_epochs is None else "every_epochs"
        saves = f"checkpoint.{name} {getattr(config.checkpoint, name)}"
        reasons.append(
            f"evaluation.every_steps is {in_steps(every_steps)}, but what {saves} saves is evaluated as well: only so can the "
            f"best be kept."
        )
    return EvaluationPlan(
        every_steps=every_steps,
        at_saves=at_saves,
        at_start=section.at_start,
        max_rows=section.max_rows,
        suites=suites_plan(section),
    )


def _checkpoint(
    config: RunConfig,
    data: DataFacts,
    evaluation: EvaluationPlan,
    epoch: Epoch,
    reasons: Reasons,
    snapshot: SnapshotPlan | None,
) -> CheckpointPlan:
    section = config.checkpoint
    every_steps = section.every_steps
    if section.every_epochs is not None:
        every_steps = reasons.taken(steps_of_epochs("checkpoint", section.every_epochs, epoch))
    elif every_steps == "auto":
        every_steps = evaluation.every_steps
        by_suite = evaluation.while_training if ranks_checkpoints(config) else None
        if by_suite:
            every_steps = by_suite.every_steps
        why = "with every evaluation" if data.validation else f"about {EVALUATIONS_PER_RUN} times in the run"
        why = "whenever suites are measured, one of which ranks checkpoints" if by_suite else why
        reasons.append(f"checkpoint.every_steps is {in_steps(every_steps)}: {why}.")
    keep_best, measured = section.keep_best, _measured(data, evaluation)
    if not data.validation and keep_best and section.metric not in measured:
        keep_best = 0
        reasons.append("checkpoint.keep_best is 0: without validation rows the last checkpoint counts as the best.")
    elif data.validation and section.metric not in measured:
        raise UserError(
            f"checkpoint.metric is {section.metric!r}, which this run does not measure. Set it to one of: {', '.join(measured)}."
        )
    return CheckpointPlan(
        every_steps=every_steps,
        every_s=section.every,
        keep_last=section.keep_last,
        keep_best=keep_best,
        metric=section.metric,
        mode=section.mode,
        snapshot=snapshot,
    )


def _measured(data: DataFacts, evaluation: EvaluationPlan) -> list[str]:
    """Metrics that are measured while training goes on: of validation rows, if there are any, and of suites."""
    several = data.validation if len(data.validation) > 1 else ()
    prefixes = ["validation", *(f"validation/{store.name}" for store in several)] if data.validation else []
    of_suites = evaluation.while_training.metrics if evaluation.while_training else ()
    return [*(f"{prefix}/{name}" for prefix in prefixes for name in METRICS), *sorted(of_suites)]


def _cluster(config: RunConfig, device: Device, machine: Machine, workers: int) -> ClusterPlan:
    section = config.cluster
    threads = section.threads_per_worker
    reserved = max(1, int(section.cpus_per_worker))
    share = machine.num_cpus // workers if device == "cpu" else reserved
    return ClusterPlan(
        device=device,
        cpus_per_worker=section.cpus_per_worker,
        gpus_per_worker=1 if device == "cuda" else 0,
        threads_per_worker=max(reserved, share) if threads == "auto" else threads,
        placement=section.placement,
        max_failures=section.max_failures,
        collective_timeout_s=section.collective_timeout,
    )
