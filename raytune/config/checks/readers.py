"""Who reads each key of a run config, and where nobody does. Pure.

A key that is written and that nothing reads is a wish that nobody would hear: `load` refuses it, or, where nothing is lost by
that, the plan says so. `READERS` has a row for every key (a test holds it against the schema): the modules
that read it, and what must hold for that. What depends on the model or the machines is the plan's matter (`plan.methods`,
`plan.choosing.requirements`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from raytune.config.checks.needs import (
    ADAMW,
    BENCHMARKS,
    BESIDE_WORKERS,
    CHAT,
    FAR_ROWS,
    HELD_OUT,
    HUB_MODEL,
    HUB_TEACHER,
    KEEPS_MODELS,
    KEEPS_RUNS,
    LOOKED_FOR_NEAR,
    MANY_SPLITS,
    MIXED,
    NO_PASSES,
    NO_PROPORTIONS,
    NO_SWEEP,
    NO_TRIALS_MEASURED,
    NVME,
    ONE_RUN,
    REPEATS,
    SEVERAL_SOURCES,
    SUITE_BERTSCORE,
    SUITE_DRAWS,
    SUITE_EXAMPLES,
    SUITE_NO_BEAMS,
    TEACHER_BESIDE,
    TO_BE_MIXED,
    TRACKED,
    VALIDATION,
    VALIDATION_OR_SUITES,
    Need,
    agrees,
    average,
    choice,
    four_bits,
    guard,
    instead_of,
    is_given,
    is_ranked_by,
    not_beside,
    suite,
)
from raytune.config.problems import dotted, shown
from raytune.config.reading.keys import schema_path
from raytune.config.sections.run import RunConfig
from raytune.config.sections.section import Section
from raytune.config.sections.training import SCHEDULE_FREE, Optimizer, Schedule

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Who reads a key."""

    modules: tuple[str, ...]
    """Below `raytune`, with dots; or a folder of templates."""
    needs: tuple[Need, ...] = ()
    idle: tuple[Any, ...] = ()
    """Values, besides none and "auto", that ask for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """A key that is written and that nothing reads."""

    path: KeyPath
    value: Any
    need: Need
    """That does not hold."""
    reason: str
    is_default: bool
    """Whether its value is the one that holds without it: then nothing is lost, and it is said only."""

    @property
    def key(self) -> str:
        return dotted(self.path)

    @property
    def is_refused(self) -> bool:
        return not self.need.is_said and not self.is_default

    @property
    def message(self) -> str:
        """What is wrong with the key, and what to do."""
        return f"is {shown(self.value)}, but {self.reason}; leave it out, or {self.need.remedy}"

    @property
    def sentence(self) -> str:
        """The same as a fact about the plan."""
        return f"{self.key} is {shown(self.value)}, but {self.reason}."


def unread(config: RunConfig, open_keys: tuple[str, ...] = ()) -> list[Unread]:
    """Keys that somebody wrote and that nothing reads, in the order of the schema.

    Args:
        open_keys: keys that are still to be chosen, so that what depends on them is not known yet.
    """
    found = []
    for path, section in _written(config, ()):
        name, reader = str(path[-1]), READERS[schema_path(path)]
        value, default = getattr(section, name), type(section).model_fields[name].default
        if value is None or value == "auto" or value in reader.idle:
            continue
        needs = [need for need in reader.needs if not any(_touches(key, dotted(path), need.keys) for key in open_keys)]
        failing = next((need for need in needs if not need.holds(config, section)), None)
        if failing:
            reason = failing.otherwise(config)
            plain = {} if isinstance(value, Section) else value
            found.append(Unread(path=path, value=plain, need=failing, reason=reason, is_default=value == default))
    return found


def without(config: RunConfig, keys: list[Unread]) -> RunConfig:
    """The same config as if these keys had not been written."""
    for key in keys:
        config = _reset(config, key.path)
    return config


def _touches(open_key: str, key: str, deciding: tuple[str, ...]) -> bool:
    """Whether a key that is still to be chosen is a key itself or decides about it."""
    return any(f"{other}.".startswith(f"{open_key}.") or f"{open_key}.".startswith(f"{other}.") for other in (key, *deciding))


def _written(section: Section, path: KeyPath) -> Iterator[tuple[KeyPath, Section]]:
    """Every key that somebody wrote, with the section that it lies in. A section with all of its keys was dumped by a program:
    those of them that are at their defaults are nobody's wish."""
    is_dumped = section.model_fields_set == set(type(section).model_fields)
    for name, field in type(section).model_fields.items():
        if name not in section.model_fields_set:
            continue
        value = getattr(section, name)
        if isinstance(value, Section) and type(value).model_fields:
            yield from _written(value, (*path, name))
        elif isinstance(value, list) and any(isinstance(item, Section) for item in value):
            for position, item in enumerate(value):
                yield from _written(item, (*path, name, position))
        elif not (is_dumped and value == field.default):
            yield (*path, name), section


def _reset(section: Any, path: KeyPath) -> Any:
    head, *rest = path
    if isinstance(section, list):
        return [_reset(item, tuple(rest)) if position == head else item for position, item in enumerate(section)]
    name = str(head)
    if rest:
        return section.model_copy(update={name: _reset(getattr(section, name), tuple(rest))})
    copy = section.model_copy(update={name: type(section).model_fields[name].default})
    copy.model_fields_set.discard(name)
    return copy


# --- the table


def _read(section: str, names: str, *modules: str, needs: tuple[Need, ...] = (), idle: tuple[Any, ...] = ()) -> dict[str, Reader]:
    """Rows of some keys of a section that the same modules read."""
    return {f"{section}.{name}".lstrip("."): Reader(modules=modules, needs=needs, idle=idle) for name in names.split()}


def _rows_of_sources(section: str) -> dict[str, Reader]:
    return {
        **_read(section, "path max_rows", "data.store.build"),
        **_read(section, "format columns constants labels", "data.formats.recognising"),
        **_read(section, "name", "config.sections.data"),
        **_read(section, "split", "data.files.sources", needs=(MANY_SPLITS,), idle=("train",)),
    }


READERS: dict[str, Reader] = {
    **_read("", "version", "config.sections.run"),
    **_read("", "name storage", "launch.run"),
    **_read("", "preset", "config.reading.presets"),
    **_read("", "model data adapter strategy training evaluation checkpoint cluster sweep provider", "config.sections.run"),
    **_read("", "callbacks", "launch.state.callbacks", needs=(NO_SWEEP,)),
    **_read("", "tracking", "launch.run"),
    **_read("tracking", "tensorboard mlflow wandb trackio", "tracking.trackers"),
    **_read("tracking", "prometheus", "launch.run", needs=(NO_SWEEP,)),
    **_read("tracking", "run_name group", "tracking.follow", "launch.state.gauges", needs=(TRACKED,)),
    **_read("tracking", "tags", "tracking.follow", needs=(KEEPS_RUNS,)),
    **_read("tracking", "log_model", "tracking.follow", needs=(KEEPS_MODELS,)),
    **_read("tracking.tensorboard", "folder", "tracking.tensorboard"),
    **_read("tracking.mlflow", "uri experiment", "tracking.mlflow"),
    **_read("tracking.wandb", "project entity mode folder", "tracking.wandb"),
    **_read("tracking.trackio", "project folder", "tracking.trackio"),
    # model
    **_read("model", "base trust_remote_code", "launch.data.prepare"),
    **_read("model", "revision", "launch.data.prepare", needs=(HUB_MODEL,)),
    **_read("model", "attention", "plan.choosing.requirements"),
    **_read("model", "quantization", "config.sections.quantization", needs=(agrees("format"),)),
    **_read(
        "model", "double_quantization", "config.sections.quantization", needs=(agrees("double_quantization"), four_bits("model"))
    ),
    **_read("model", "quant_compute_dtype", "config.sections.quantization", needs=(agrees("compute_dtype"), four_bits("model"))),
    **_read("model", "quant_storage", "config.sections.quantization", needs=(agrees("quant_storage"), four_bits("model"))),
    **_read("model", "new_tokens vocabulary_multiple", "plan.strategies.new_tokens"),
    **_read("model.new_tokens", "token special", "data.templates.tokenizers"),
    **_read("model.new_tokens", "description", "model.parts.new_tokens"),
    **_read("model", "rope_scaling", "plan.model.rope"),
    **_read("model.rope_scaling", "type factor original_max_position_embeddings", "plan.model.rope"),
    **_read(
        "model.rope_scaling",
        "attention_factor beta_fast beta_slow mscale mscale_all_dim truncate",
        "plan.model.rope",
        needs=(choice("model.rope_scaling.type", ("yarn",)),),
    ),
    **_read(
        "model.rope_scaling",
        "low_freq_factor high_freq_factor",
        "plan.model.rope",
        needs=(choice("model.rope_scaling.type", ("llama3",)),),
    ),
    **_read("model", "dropout", "plan.model.dropouts"),
    **_read("model.dropout", "attention hidden embedding", "config.sections.model"),
    # data
    **_read("data", "train validation", "launch.data.stores"),
    **_rows_of_sources("data.train"),
    **_read("data.train", "loss_weight", "plan.data.mixing", needs=(SEVERAL_SOURCES,)),
    **_read("data.train", "proportion", "plan.data.mixing", needs=(TO_BE_MIXED,)),
    **_read("data.train", "passes", "plan.data.mixing", needs=(SEVERAL_SOURCES,)),
    **_read("data.train", "max_passes", "plan.data.mixing", needs=(TO_BE_MIXED, MIXED, REPEATS)),
    **_read("data", "mixing", "plan.data.mixing"),
    **_read("data.mixing", "temperature", "plan.data.mixing", needs=(TO_BE_MIXED, NO_PROPORTIONS, NO_PASSES)),
    **_read("data.mixing", "until", "plan.data.mixing", needs=(TO_BE_MIXED, MIXED)),
    **_read("data", "augment", "launch.data.stores"),
    **_read("data.augment", "copies noise wordings function seed", "data.formats.augmenting"),
    **_rows_of_sources("data.validation"),
    **_read("data", "quality", "launch.data.stores"),
    **_read("data.quality", "exact_duplicates near_duplicates damaged_text contradictions", "data.quality.row_findings"),
    **_read("data.quality", "leaks", "data.quality.quality", needs=(VALIDATION,), idle=("ignore",)),
    **_read("data.quality", "near_similarity", "data.quality.quality", needs=(LOOKED_FOR_NEAR,)),
    **_read("data.quality", "benchmark_overlaps", "data.quality.quality", needs=(BENCHMARKS,), idle=("ignore",)),
    **_read("data.quality", "ngram_words", "data.quality.quality", needs=(BENCHMARKS,)),
    **_read("data.quality", "benchmarks", "data.quality.quality"),
    **_rows_of_sources("data.quality.benchmarks"),
    **_rows_of_sources("data.test"),
    **_read("data", "test", "config.sections.row_sources"),
    **_read("data", "validation_fraction test_fraction fold split", "plan.data.split"),
    **_read("data.fold", "index of", "plan.data.split"),
    **_read("data.split", "group strata time", "data.rows.split", needs=(HELD_OUT,)),
    **_read("data", "too_long packing on_bad_row store", "launch.data.stores"),
    **_read("data", "on_prompt_mismatch", "plan.data.data_limits", needs=(CHAT,), idle=("error",)),
    **_read("data", "limits", "plan.data.data_limits"),
    **_read("data.limits", "lost no_target cut unending double_bos prompt_trained blank_answers", "plan.data.data_limits"),
    **_read("data", "max_length", "plan.choosing.requirements"),
    **_read("data", "template", "data.templates.front", needs=(CHAT,)),
    **_read("data", "template_options", "data.templates.front", needs=(CHAT,), idle=({},)),
    **_read("data", "template_date", "data.templates.front", needs=(CHAT,)),
    **_read("data", "system", "data.templates.front", "data.conversations.shaping", needs=(CHAT,)),
    **_read(
        "data",
        "system_when",
        "data.conversations.shaping",
        needs=(CHAT, is_given("data.system", "no system prompt is given", example="a text")),
    ),
    **_read("data", "max_turns", "data.conversations.shaping", needs=(CHAT,)),
    **_read("data", "reasoning", "data.conversations.shaping", needs=(CHAT,), idle=("keep",)),
    **_read("data", "train_empty_thought", "launch.data.stores", needs=(CHAT,), idle=(True,)),
    **_read("data", "targets", "launch.data.stores", needs=(CHAT,), idle=("all",)),
    **_read("data", "token_weights", "launch.data.stores"),
    **_read("data", "streaming", "plan.data.streaming"),
    **_read("data.streaming", "window", "data.stream.recipe"),
    **_read("data.streaming", "read_ahead_mib", "data.stream.recipe", needs=(FAR_ROWS,)),
    **_read("data.token_weights", "numbers code_syntax patterns", "data.conversations.token_classes"),
    # adapter
    **_read("adapter", "method", "plan.choosing.optimization"),
    **_read("adapter", "rank alpha dropout target_modules target_parameters exclude_modules", "model.adapters.lora"),
    **_read("adapter", "modules_to_save bias", "model.adapters.lora"),
    **_read("adapter", "init use_rslora use_dora rank_pattern alpha_pattern", "model.adapters.lora"),
    **_read("adapter", "trainable_tokens", "plan.methods.token_rows"),
    **_read("adapter", "feedforward_modules", "plan.methods.ia3"),
    **_read("adapter", "decompose_factor decompose_both", "plan.methods.lokr"),
    **_read("adapter", "rank_dropout", "model.adapters.lokr", "model.adapters.loha"),
    **_read("adapter", "d_initial projection_prng_key save_projection", "model.adapters.vera"),
    **_read("adapter", "block_size", "plan.methods.oft", "plan.methods.boft"),
    **_read("adapter", "block_share num_cayley_neumann_terms", "plan.methods.oft"),
    **_read("adapter", "num_butterfly_factors", "plan.methods.boft"),
    **_read("adapter", "reduction", "plan.methods.bottleneck", needs=(not_beside("adapter.width"),)),
    **_read("adapter", "width activation", "plan.methods.bottleneck"),
    **_read("adapter", "initial_rank tinit_fraction tfinal_fraction", "plan.methods.adalora"),
    **_read("adapter", "delta_t beta1 beta2 orthogonal_weight", "model.adapters.adalora"),
    **_read("adapter", "num_virtual_tokens", "config.sections.adapter"),
    **_read("adapter", "prompt_init", "model.adapters.prompt_tuning", needs=(not_beside("adapter.prompt_init_text"),)),
    **_read("adapter", "prompt_init_text", "model.adapters.prompt_tuning"),
    **_read("adapter", "prefix_init", "model.adapters.prefix_tuning"),
    **_read("adapter", "projection", "plan.methods.prefix_tuning"),
    **_read("adapter", "encoder_hidden_size", "plan.methods.prefix_tuning", "plan.methods.p_tuning"),
    **_read("adapter", "lora_plus_ratio", "plan.methods.lora"),
    **_read(
        "adapter",
        "lora_plus_embedding_rate",
        "plan.methods.lora",
        needs=(is_given("adapter.lora_plus_ratio", "there is no LoRA+", example="16"),),
    ),
    **_read("adapter", "quantization", "config.sections.adapter"),
    **_read(
        "adapter", "double_quantization compute_dtype quant_storage", "config.sections.adapter", needs=(four_bits("adapter"),)
    ),
    # strategy
    **_read("strategy", "freeze", "plan.choosing.setting"),
    **_read("strategy.freeze", "embeddings first_layers modules train_only", "plan.strategies.freezing"),
    **_read("strategy", "unfreeze", "plan.strategies.phases"),
    **_read(
        "strategy.unfreeze", "from_epoch from_step from_fraction last_layers learning_rate warmup_steps", "plan.strategies.phases"
    ),
    **_read("strategy", "layer_rate_decay rate_scales weight_decay_of", "plan.strategies.update_groups"),
    **_read("strategy", "objective", "plan.strategies.objective"),
    **_read("strategy.objective", "function options", "plan.strategies.objective"),
    **_read("strategy", "l2_sp", "plan.strategies.penalty"),
    **_read("strategy.l2_sp", "strength", "plan.strategies.penalty"),
    **_read("strategy", "ewc", "plan.strategies.penalty"),
    **_read("strategy.ewc", "strength data max_documents", "plan.strategies.penalty"),
    **_rows_of_sources("strategy.ewc.data"),
    **_read("strategy", "replay", "plan.data.mixing"),
    **_read("strategy.replay", "data", "config.sections.row_sources"),
    **_read("strategy.replay", "share", "plan.data.mixing"),
    **_rows_of_sources("strategy.replay.data"),
    **_read("strategy", "distillation", "plan.strategies.distillation"),
    **_read("strategy.distillation", "teacher weight temperature top_k", "plan.strategies.distillation"),
    **_read("strategy.distillation", "revision", "plan.strategies.distillation", needs=(HUB_TEACHER,)),
    **_read("strategy.distillation", "trust_remote_code", "plan.strategies.distillation", needs=(TEACHER_BESIDE,)),
    # training
    **_read("training", "num_train_epochs", "plan.choosing.optimization", needs=(not_beside("training.max_steps"),)),
    **_read(
        "training", "max_steps learning_rate warmup_steps optimizer weight_decay max_grad_norm", "plan.choosing.optimization"
    ),
    **_read("training", "lr_scheduler_type", "plan.rates.optimizers"),
    **_read("training", "warmup_ratio", "plan.choosing.optimization", needs=(not_beside("training.warmup_steps"),)),
    **_read("training", "global_batch_size per_device_train_batch_size gradient_accumulation_steps", "plan.choosing.batch"),
    **_read(
        "training",
        "min_lr_ratio",
        "plan.choosing.optimization",
        needs=(
            choice("training.lr_scheduler_type", ("auto", *(name for name in get_args(Schedule) if name != "constant"))),
            choice("training.optimizer", tuple(name for name in get_args(Optimizer) if name not in SCHEDULE_FREE)),
        ),
    ),
    **_read("training", "decay_ratio", "plan.choosing.optimization", needs=(choice("training.lr_scheduler_type", ("wsd",)),)),
    **_read(
        "training",
        "polynomial_power",
        "plan.choosing.optimization",
        needs=(choice("training.lr_scheduler_type", ("polynomial",)),),
    ),
    **_read(
        "training",
        "num_cycles",
        "plan.choosing.optimization",
        needs=(choice("training.lr_scheduler_type", ("cosine_with_restarts",)),),
    ),
    **_read(
        "training", "adam_beta1 adam_beta2", "plan.choosing.optimization", needs=(choice("training.optimizer", (*ADAMW, "lion")),)
    ),
    **_read("training", "adam_epsilon", "plan.choosing.optimization", needs=(choice("training.optimizer", ADAMW),)),
    **_read("training", "tf32 neftune_noise_alpha compile logging_steps seed", "plan.choosing.choose"),
    **_read("training", "liger", "plan.choosing.fused_kernels"),
    **_read("training", "early_stopping", "plan.strategies.stopping", needs=(VALIDATION_OR_SUITES,)),
    **_read("training", "overfitting", "plan.strategies.stopping", needs=(VALIDATION,)),
    **_read(
        "training.early_stopping", "patience min_delta metric mode", "training.steps.stopping", needs=(VALIDATION_OR_SUITES,)
    ),
    **_read("training.overfitting", "policy patience", "training.steps.stopping", needs=(VALIDATION,)),
    **_read("training.overfitting", "max_gap", "training.steps.stopping", "plan.strategies.stopping", needs=(VALIDATION,)),
    **_read("training", "divergence", "plan.strategies.divergence"),
    **_read("training.divergence", "policy window", "training.steps.divergence"),
    **_read("training.divergence", "threshold", "training.steps.spikes"),
    **_read("training.divergence", "patience", "training.steps.divergence", needs=(guard("warn", "stop", "roll_back"),)),
    **_read("training.divergence", "watch", "training.steps.spikes", needs=(guard("warn", "stop", "roll_back"),)),
    **_read("training.divergence", "rate_factor max_roll_backs", "training.steps.divergence", needs=(guard("roll_back"),)),
    **_read("training", "sequence_parallel_size", "plan.strategies.sequence"),
    **_read("training", "averaging", "plan.strategies.averaging"),
    **_read("training.averaging", "kind every_steps", "plan.strategies.averaging"),
    **_read("training.averaging", "decay", "plan.strategies.averaging", needs=(average("ema"),)),
    **_read("training.averaging", "last_steps", "plan.strategies.averaging", needs=(average("last"),)),
    **_read("training", "precision", "plan.choosing.requirements"),
    **_read("training", "gradient_checkpointing loss", "plan.choosing.fitting"),
    **_read("training", "shard_base", "plan.choosing.sharded_base"),
    **_read("training", "zero", "plan.choosing.stages"),
    **_read("training.zero", "stage offload_optimizer offload_parameters overrides", "plan.choosing.stages"),
    **_read("training.zero", "copy_per_node", "plan.choosing.node_copies"),
    **_read("training.zero", "nvme_path", "plan.choosing.choose", needs=(NVME,)),
    # evaluation
    **_read("evaluation", "every_steps", "plan.choosing.choose", needs=(VALIDATION, instead_of("evaluation.every_epochs"))),
    **_read("evaluation", "every_epochs max_rows", "plan.choosing.choose", needs=(VALIDATION,)),
    **_read("evaluation", "at_start", "plan.choosing.choose", needs=(VALIDATION,), idle=(False,)),
    **_read("evaluation", "generation suites while_training", "config.sections.evaluation"),
    **_read(
        "evaluation.while_training",
        "every_steps",
        "plan.choosing.while_training",
        needs=(instead_of("evaluation.while_training.every_epochs"),),
    ),
    **_read("evaluation.while_training", "every_epochs at_start", "plan.choosing.while_training"),
    **_read("evaluation.while_training", "suites", "config.sections.evaluation"),
    **_read(
        "evaluation.while_training",
        "where",
        "plan.choosing.while_training",
        needs=(NO_TRIALS_MEASURED,),
        idle=("auto", "between_steps"),
    ),
    **_read(
        "evaluation.while_training",
        "num_cpus num_gpus wait_at_end",
        "plan.choosing.while_training",
        needs=(NO_TRIALS_MEASURED, BESIDE_WORKERS),
    ),
    **_read("evaluation.generation", "rows max_rows max_new_tokens batch_size metrics", "config.sections.evaluation"),
    **_rows_of_sources("evaluation.generation.rows"),
    **_read("evaluation.suites", "name metrics", "config.sections.evaluation"),
    **_read("evaluation.suites", "kind batch_size", "plan.choosing.suites"),
    **_read("evaluation.suites", "rows max_rows", "evaluation.questions"),
    **_read("evaluation.suites", "task task_folder num_fewshot", "plan.choosing.suites", needs=(suite("lm_eval"),)),
    **_rows_of_sources("evaluation.suites.rows"),
    **_read("evaluation.suites", "system examples", "evaluation.questions", needs=(suite("answers", "choices", "labels"),)),
    **_rows_of_sources("evaluation.suites.examples"),
    **_read("evaluation.suites", "num_examples", "evaluation.questions", needs=(SUITE_EXAMPLES,)),
    **_read("evaluation.suites", "max_new_tokens", "plan.choosing.suites", needs=(suite("answers"),)),
    **_read("evaluation.suites", "num_beams", "plan.choosing.suites", needs=(suite("answers"),), idle=(1,)),
    **_read("evaluation.suites", "temperature", "plan.choosing.suites", needs=(suite("answers"), SUITE_NO_BEAMS)),
    **_read("evaluation.suites", "top_k top_p seed", "plan.choosing.suites", needs=(SUITE_DRAWS,)),
    **_read("evaluation.suites", "bertscore", "plan.choosing.suites", needs=(suite("answers"), SUITE_BERTSCORE)),
    **_read("evaluation.suites.bertscore", "model layer", "evaluation.suite_metrics"),
    # checkpoint
    **_read("checkpoint", "every_steps", "plan.choosing.choose", needs=(instead_of("checkpoint.every_epochs"),)),
    **_read("checkpoint", "every_epochs every keep_last", "plan.choosing.choose"),
    **_read("checkpoint", "in_background", "plan.choosing.snapshot"),
    **_read("checkpoint", "keep_best", "plan.choosing.choose", needs=(VALIDATION_OR_SUITES,), idle=(0,)),
    **_read("checkpoint", "metric", "plan.choosing.choose", needs=(VALIDATION_OR_SUITES, is_ranked_by("metric"))),
    **_read("checkpoint", "mode", "plan.choosing.choose", needs=(VALIDATION_OR_SUITES, is_ranked_by("mode"))),
    **_read("checkpoint", "resume", "launch.run", needs=(ONE_RUN,), idle=(True,)),
    # cluster
    **_read("cluster", "address", "launch.cluster.cluster"),
    **_read("cluster", "instance", "launch.data.prepare", "clusters.provider"),
    **_read("cluster", "nodes", "plan.ahead", "clusters.provider"),
    **_read("cluster", "spot", "plan.choosing.choose", "clusters.provider"),
    **_read("cluster", "workers gpus_per_worker cpus_per_worker", "plan.choosing.requirements"),
    **_read("cluster", "threads_per_worker placement max_failures", "plan.choosing.choose"),
    **_read("cluster", "keep_warm", "launch.cluster.warm"),
    **_read("cluster", "start_timeout collective_timeout", "launch.cluster.cluster"),
    # sweep
    **_read("sweep", "run", "config.reading.files"),
    **_read("sweep", "space", "sweeps.space"),
    **_read("sweep.space", "choice grid uniform log_uniform integer log_integer expression", "config.sections.sweep"),
    **_read("sweep.space", "step when", "sweeps.space", "config.checks.space"),
    **_read("sweep", "first trials seed", "sweeps.space"),
    **_read("sweep", "search", "sweeps.planner"),
    **_read("sweep", "max_concurrent stopping metric mode", "sweeps.sweep_plan"),
    **_read("sweep.stopping", "method unit grace reduction_factor", "sweeps.sweep_plan"),
    # provider: what only the user knows of several clouds; each kind of file takes its own
    **_read("provider", "client_cidr zone account resource_group network subnet security_group", "cluster"),
    **_read("provider", "machine_image reservation capacity_block key_name ssh_user ssh_key ssh_public_key", "cluster"),
    **_read("provider", "jump_host container environment mount_point shared_export shared_kind", "cluster"),
    **_read("provider", "token_file hub_token_file kubernetes", "cluster"),
    **_read("provider", "region head_instance hosts", "clusters.provider"),
    **_read("provider", "nccl_profile", "clusters.ray_up"),
    **_read("provider.kubernetes", "namespace queue storage_claim token_secret hub_secret user_id rdma_resource", "cluster"),
}
"""By the key's path in the schema."""
