"""What an unknown key or value was probably meant to be, spellings of other tools included."""

from difflib import get_close_matches
from typing import Any

from raytune.config.keys import choices, keys, keys_in, unions

_SPELLINGS = {
    "model.base": "base_model model_name_or_path model_name model_id pretrained_model_name_or_path model_path",
    "model.revision": "model_revision",
    "model.attention": "attn_implementation flash_attn flash_attention sdp_attention",
    "data.train": "dataset datasets dataset_name dataset_path train_file train_data train_dataset training_data",
    "data.validation": "eval_dataset val_data validation_file test_datasets eval_data validation_data",
    "data.validation_fraction": "val_size val_set_size test_size validation_split_percentage",
    "data.template": "chat_template prompt_template",
    "data.targets": "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss roles_to_train mask_prompt",
    "data.max_length": "cutoff_len sequence_len max_seq_length max_seq_len seq_length model_max_length max_tokens row_length",
    "data.packing": "sample_packing pad_to_sequence_len group_by_length",
    "data.train.columns": "dataset_text_field field_messages prompt_column response_column",
    "data.train.max_rows": "max_samples max_train_samples",
    "evaluation.max_rows": "max_eval_samples",
    "adapter": "lora peft peft_config lora_config",
    "adapter.method": "finetuning_type finetune_type peft_method",
    "adapter.method: lora": "use_peft use_lora",
    "adapter.method: qlora": "load_in_4bit load_in_8bit quantization_bit qlora",
    "adapter.rank": "r lora_r lora_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.target_modules": "lora_target lora_target_modules lora_target_linear lora_modules",
    "adapter.target_parameters": "lora_target_parameters",
    "adapter.exclude_modules": "lora_exclude_modules",
    "adapter.modules_to_save": "lora_modules_to_save additional_target",
    "adapter.init": "init_lora_weights peft_init_lora_weights pissa_init",
    "adapter.use_rslora": "peft_use_rslora",
    "adapter.use_dora": "peft_use_dora",
    "adapter.lora_plus_ratio": "loraplus_lr_ratio",
    "adapter.lora_plus_embedding_rate": "loraplus_lr_embedding",
    "adapter.quantization": "bnb_4bit_quant_type",
    "adapter.double_quantization": "bnb_4bit_use_double_quant double_quant",
    "adapter.compute_dtype": "bnb_4bit_compute_dtype",
    "adapter.quant_storage": "bnb_4bit_quant_storage",
    "training": "train trainer training_args optimization",
    "training.num_train_epochs": "num_epochs epochs n_epochs max_epochs",
    "training.max_steps": "num_steps train_steps max_train_steps max_t max_iter max_resource sweep.budget",
    "training.global_batch_size": "batch_size train_batch_size effective_batch_size total_batch_size",
    "training.per_device_train_batch_size": "micro_batch_size train_micro_batch_size_per_gpu per_device_batch_size",
    "training.gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps grad_acc_steps",
    "training.learning_rate": "lr",
    "training.lr_scheduler_type": "lr_scheduler scheduler schedule lr_schedule",
    "training.warmup_ratio": "warmup",
    "training.optimizer": "optim optimizer_name",
    "training.weight_decay": "wd",
    "training.adam_beta1": "beta1",
    "training.adam_beta2": "beta2",
    "training.adam_epsilon": "adam_eps eps",
    "training.max_grad_norm": "grad_clip gradient_clipping clip_grad_norm max_norm",
    "training.precision": "mixed_precision torch_dtype dtype",
    "training.precision: bf16": "bf16 pure_bf16",
    "training.precision: fp16": "fp16",
    "training.precision: fp32": "fp32",
    "training.gradient_checkpointing": "activation_checkpointing use_gradient_checkpointing enable_gradient_checkpointing",
    "training.neftune_noise_alpha": "neftune_alpha noisy_embedding_alpha",
    "training.liger": "use_liger_kernel use_liger liger_kernel enable_liger_kernel",
    "training.compile": "torch_compile",
    "training.logging_steps": "log_every log_every_n_steps",
    "training.seed": "random_seed",
    "training.zero": "strategy fsdp fsdp_config",
    "training.zero.overrides": "deepspeed deepspeed_config ds_config",
    "training.zero.stage": "zero_stage deepspeed_stage",
    "evaluation": "eval evaluate",
    "evaluation.every_steps": "eval_steps eval_interval evals_per_epoch eval_strategy evaluation_strategy val_check_interval",
    "evaluation.generation": "predict_with_generate eval_table_size do_bench_eval",
    "checkpoint.every_steps": "save_steps save_interval saves_per_epoch save_strategy checkpoint_every",
    "checkpoint.keep_last": "save_total_limit",
    "checkpoint.keep_best": "load_best_model_at_end save_top_k",
    "checkpoint.metric": "metric_for_best_model monitor",
    "checkpoint.mode": "greater_is_better",
    "checkpoint.resume": "resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir",
    "cluster.workers": "num_workers num_gpus gpus nproc_per_node world_size gpus_per_node num_processes",
    "cluster.nodes": "num_nodes nnodes",
    "cluster.instance": "instance_type machine_type instance_types accelerators",
    "cluster.spot": "use_spot preemptible",
    "cluster.address": "ray_address",
    "name": "run_name experiment_name",
    "storage": "output_dir save_dir output_path storage_path",
    "sweep": "tune tune_config hyperparameter_search hpo sweeps",
    "sweep.run": "base_config config_file sweep.program sweep.recipe",
    "sweep.space": "param_space search_space sweep.config sweep.params sweep.parameters sweep.hyperparameters",
    "sweep.first": "points_to_evaluate enqueue_trials",
    "sweep.trials": "num_samples n_trials num_trials max_trials sweep.count sweep.runs",
    "sweep.search": "search_alg searcher sampler sweep.method",
    "sweep.mode": "sweep.goal sweep.direction",
    "sweep.stopping": "early_stopping pruner early_terminate",
    "sweep.stopping.method": "sweep.scheduler",
    "sweep.stopping.unit": "time_attr",
    "sweep.stopping.grace": "grace_period min_resource min_iter min_t",
    "sweep.stopping.reduction_factor": "eta sweep.rf",
    "sweep.max_concurrent": "max_concurrent_trials n_jobs max_parallel_trials",
    "sweep.space.choice": "sweep.values categorical",
    "sweep.space.grid": "grid_search",
    "sweep.space.uniform": "quniform",
    "sweep.space.log_uniform": "loguniform qloguniform log_uniform_values",
    "sweep.space.integer": "randint qrandint int_uniform",
    "sweep.space.log_integer": "lograndint qlograndint",
    "sweep.space.expression": "sample_from",
    "sweep.space.step": "sweep.q",
    "sweep.space.when": "sweep.condition sweep.if",
}
"""Our key (with a value where the spelling implies one) -> what Hugging Face, TRL, Axolotl, LLaMA-Factory, Ray Tune, Optuna and
others call it. `sweep.scheduler`: only within the section."""

_REFUSED_WORDS = {
    ("sweep.stopping.method", word): reason
    for words, reason in {
        "pbt pb2 population_based_training PopulationBasedTraining": "; population based training copies checkpoints from "
        "one trial to another while they run, and trials do not share theirs here (trials packed into one model will)",
        "bohb": "; BOHB ties a search to Hyperband; the nearest here is search: optuna with method: asha",
        "median_stopping median_stopping_rule MedianStoppingRule MedianPruner": '. Did you mean "median"?',
        "async_hyperband asynchyperband ASHAScheduler successive_halving SuccessiveHalvingPruner": '. Did you mean "asha"?',
        "fifo FIFOScheduler NopPruner": '. Did you mean "none"?',
    }.items()
    for word in words.split()
}
"""Words of other tools that are no value of a key here, and why not or what to write."""

OURS = {spelling: ours for ours, spellings in _SPELLINGS.items() for spelling in spellings.split()}


def hint_for_key(section: str, name: str, method: str) -> str:
    """A sentence that follows "unknown key", or nothing if no key is near.

    Args:
        section: dotted path of the section that holds the key, `""` for the top level.
        name: the key as written.
        method: the method of the union, such as `adapter`, that the section is or lies in.
    """
    path = f"{section}.{name}".lstrip(".")
    if path in keys():
        return f" for method {method}; it belongs to method {' or '.join(keys()[path].methods)}"
    plain = name.lower().replace("-", "_")
    here = [key.path.rpartition(".")[2] for key in keys_in(section) if not key.methods or method in key.methods]
    near = get_close_matches(plain, here, 1, cutoff=0.75)
    elsewhere = [known for known in keys() if known.rpartition(".")[2] == plain and not known.startswith(f"{path}.")]
    ours = OURS.get(f"{section.partition('.')[0]}.{plain}") or OURS.get(plain)
    if near or ours:
        return f'. Did you mean "{near[0] if near else ours}"?'
    if elsewhere:
        return f" here; it belongs to {_this_or_that(elsewhere)}"
    near = get_close_matches(plain, here, 1) or get_close_matches(path.lower(), keys(), 1, cutoff=0.75)
    near = near or _near_leaves(plain)
    if near:
        return f'. Did you mean "{near[0]}"?'
    return f". Known here: {', '.join(here)}" if here and len(here) <= 12 else f". `raytune explain {section}` lists the keys"


def hint_for_value(path: str, annotation: Any, value: object) -> str:
    """A sentence that names the allowed value next to the one that was written, or nothing."""
    if not isinstance(value, str):
        return ""
    if (path, value) in _REFUSED_WORDS:
        return _REFUSED_WORDS[path, value]
    if path in unions():
        near = [f"method: {method}" for method in choices(keys()[f"{path}.method"].annotation) if method == value]
        return f'. Did you mean "{near[0]}"?' if near else _REFUSED_WORDS.get((f"{path}.method", value), "")
    near = get_close_matches(value.lower(), [str(choice) for choice in choices(annotation)], 1)
    return f'. Did you mean "{near[0]}"?' if near else ""


def nearest_keys(path: str) -> list[str]:
    """Paths of keys that a mistyped path could mean: the spelling of another tool, the same leaf elsewhere, or near letters."""
    plain = path.lower().replace("-", "_")
    leaf = plain.rpartition(".")[2]
    known = [OURS[leaf].partition(":")[0]] if leaf in OURS else []
    same = [key for key in keys() if key.rpartition(".")[2] == leaf]
    return list(dict.fromkeys([*known, *same, *get_close_matches(plain, keys(), 3), *_near_leaves(leaf)]))[:5]


def _near_leaves(name: str) -> list[str]:
    """Keys anywhere whose last part is near a name."""
    by_leaf: dict[str, str] = {}
    for path in keys():
        by_leaf.setdefault(path.rpartition(".")[2], path)
    return [by_leaf[leaf] for leaf in get_close_matches(name, by_leaf, 2, cutoff=0.75)]


def _this_or_that(paths: list[str]) -> str:
    return " or ".join(paths[:3])
