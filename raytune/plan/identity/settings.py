"""Which key of a config decides which value of a plan's identity: how a changed run is told in the words of its user. Pure."""

from collections.abc import Iterator
from typing import Any

from raytune.config.load import config_diff
from raytune.config.sections.run import RunConfig
from raytune.plan.identity.identity import STORES, differences, identity_of, leaves
from raytune.plan.rates.optimizers import schedule_of
from raytune.plan.run_plan import RunPlan

Change = tuple[str, object, object]
"""(dotted key, old value, new value)."""

KEY_OF = {
    "seed": "training.seed",
    "precision": "training.precision",
    "rows_per_step": "training.global_batch_size",
    "template": "data.template",
    "data.train": "data.train",
    "data.validation": "data.validation",
    "data.row_length": "data.max_length",
    "data.ewc": "strategy.ewc.data",
    "model.path": "model.base",
    "model.content": "model.base",
    "model.packs": "model.base",
    "model.revision": "model.revision",
    "model.trust_remote_code": "model.trust_remote_code",
    "model.compute_dtype": "training.precision",
    "model.quantization.format": "model.quantization",
    "model.quantization.double_quantization": "model.double_quantization",
    "model.quantization.compute_dtype": "model.quant_compute_dtype",
    "model.quantization": "model.quantization",
    "model.neftune_noise_alpha": "training.neftune_noise_alpha",
    "model.frozen": "strategy.freeze",
    "model.new_tokens": "model.new_tokens",
    "model.num_embeddings": "model.vocabulary_multiple",
    "model.rope": "model.rope_scaling",
    "model.dropout": "model.dropout",
    "optimization.num_steps": "training.max_steps",
    "optimization.num_rows": "training.num_train_epochs",
    "optimization.optimizer": "training.optimizer",
    "optimization.learning_rate": "training.learning_rate",
    "optimization.lora_plus_ratio": "adapter.lora_plus_ratio",
    "optimization.lora_plus_embedding_rate": "adapter.lora_plus_embedding_rate",
    "optimization.update_groups": "strategy",
    "optimization.phases": "strategy.unfreeze",
    "optimization.schedule": "training.lr_scheduler_type",
    "optimization.warmup_steps": "training.warmup_steps",
    "optimization.min_lr_ratio": "training.min_lr_ratio",
    "optimization.decay_ratio": "training.decay_ratio",
    "optimization.polynomial_power": "training.polynomial_power",
    "optimization.num_cycles": "training.num_cycles",
    "optimization.weight_decay": "training.weight_decay",
    "optimization.beta1": "training.adam_beta1",
    "optimization.beta2": "training.adam_beta2",
    "optimization.epsilon": "training.adam_epsilon",
    "optimization.max_grad_norm": "training.max_grad_norm",
    "optimization.objective.name": "strategy.objective.function",
    "optimization.objective.sha256": "strategy.objective",
    "optimization.objective.options": "strategy.objective.options",
    "optimization.objective": "strategy.objective",
    "optimization.l2_sp_strength": "strategy.l2_sp.strength",
    "optimization.ewc_strength": "strategy.ewc.strength",
    "optimization.ewc_documents": "strategy.ewc.max_documents",
    "distillation.weight": "strategy.distillation.weight",
    "distillation.temperature": "strategy.distillation.temperature",
    "distillation.top_k": "strategy.distillation.top_k",
    "distillation.teacher.revision": "strategy.distillation.revision",
    "distillation.teacher": "strategy.distillation.teacher",
    "distillation": "strategy.distillation",
    "optimization.averaging": "training.averaging",
    "adapter": "adapter",
    "overrides": "training.zero.overrides",
}
"""Value of a run's identity, with what is below it -> the key that decides it. Those of the adapter have one name in both."""

_OF_DATA = (
    *("data.targets", "data.too_long", "data.packing", "data.validation_fraction", "data.test_fraction", "data.max_turns"),
    *("data.fold.index", "data.fold.of", "data.split.group", "data.split.strata", "data.split.time", "data.template_options"),
    *("data.system", "data.system_when", "data.reasoning", "data.train_empty_thought"),
)
"""Keys that decide which tokens a store holds, whatever the rows are; `auto` may be what another word says."""
_OF_LENGTH = ("training.num_train_epochs", "training.max_steps")
"""Keys from which the rows of a run follow, together with those that there are."""
_SAID_IN_TWO_WAYS = {"adapter.method": {"lora", "qlora"}, "model.quantization": {"auto", "none"}}
"""Values of keys that may mean the same, together with those of other keys: the preset `qlora` speaks of the base too."""
_BY_CONTENT = (
    *("model.base", "data.template", "data.train", "data.validation"),
    *("strategy.unfreeze", "strategy.ewc.data", "strategy.ewc.max_documents", "strategy.distillation.teacher"),
)
"""Keys that name what may be the same under another name."""
_ROWS = ("training.global_batch_size", "training.per_device_train_batch_size", "training.gradient_accumulation_steps")
"""Keys that make the rows of a step, together with the number of workers."""
_SHARE_ROWS = ("cluster.workers", "training.sequence_parallel_size")
"""Keys that make the number of workers, or of groups of them, that have rows of their own."""
_KEPT = ("training.precision", "training.global_batch_size")
"""Keys that keep what a run began with where they are automatic (plan.division)."""
_SCHEDULE = "optimization.schedule"
_NOWHERE = object()
DIVIDING = (
    *("cluster.", "provider.", "model.attention", "model.quant_storage", "adapter.quant_storage", "training.zero."),
    *(
        "training.loss",
        "training.compile",
        "training.sequence_parallel_size",
        "training.liger",
        "training.tf32",
        "training.gradient_checkpointing",
        "training.shard_base",
        *_ROWS[1:],
    ),
)
"""Beginnings of keys that decide how a run is divided, and nothing of what it computes while its rows per step stay."""
_BESIDE = {
    "optimization.num_steps": ("training.max_steps", "training.num_train_epochs", "training.global_batch_size"),
    "optimization.num_rows": ("training.num_train_epochs", "training.max_steps", "training.global_batch_size"),
    "optimization.warmup_steps": ("training.warmup_steps", "training.warmup_ratio", "training.max_steps"),
    "adapter.target_modules": ("strategy.freeze",),
    "adapter.target_parameters": ("strategy.freeze",),
    "adapter.exclude_modules": ("strategy.freeze",),
    "optimization.weight_decay": ("strategy.l2_sp", "strategy.ewc"),
    "optimization.ewc_documents": ("strategy.ewc.data", "strategy.ewc.strength"),
    "rows_per_step": (*_ROWS, *_SHARE_ROWS),
}
"""Values that follow from several keys."""


def certain_changes(was: RunPlan, before: RunConfig, now: RunConfig) -> list[Change]:
    """Settings that were written anew and make another run, whatever machines and rows there are. Those that may, are not among
    them: `changes_in_keys` tells them once there is a plan.

    Args:
        was: the plan of the run that is there.
        before: the config that it was made of.
        now: the config that is to continue it.
    """
    identity = leaves(identity_of(was))
    leaf_of = _leaves_by_key(identity)
    changes = (_certain(key, old, new, now, identity, leaf_of) for key, old, new in config_diff(before, now))
    return [change for change in changes if change is not None]


def _certain(key: str, old: Any, new: Any, now: RunConfig, identity: dict[str, object], leaf_of: dict[str, str]) -> Change | None:
    """What a key that was written anew changes for certain: the value that the run has is the old one, resolved where it was not
    written."""
    if key in _SAID_IN_TWO_WAYS and {old, new} <= _SAID_IN_TWO_WAYS[key]:
        return None
    if key in _OF_DATA or key == "adapter.method":
        return None if "auto" in (old, new) else (key, old, new)
    if key == "training.num_train_epochs":
        return (key, old, new) if now.training.max_steps is None and "auto" not in (old, new) else None
    leaf = key if key.startswith("adapter.") else leaf_of.get(key, "")
    if key in _BY_CONTENT or new in (None, "auto") or identity.get(leaf, new) == new:
        return None
    return key, identity[leaf] if old in (None, "auto") else old, new


def asks_for(was: RunPlan, before: RunConfig, now: RunConfig, *, may_change: tuple[str, ...] = ()) -> bool:
    """Whether a config certainly asks for the run that is there, whatever machines and rows there are; else the plan has to say.

    Args:
        was, before, now: as for `certain_changes`.
        may_change: beginnings of further keys that change nothing of a run.
    """
    identity = leaves(identity_of(was))
    changes = config_diff(before, now)
    leaf_of = _leaves_by_key(identity)
    divides_rows = any(key in (*_ROWS, *_SHARE_ROWS) for key, _, _ in changes)
    rows_stay = not divides_rows or _rows_asked(now, was.batch.global_batch_size)
    return rows_stay and all(
        (key.startswith((*DIVIDING, *may_change)) and not key.startswith(("training.zero.overrides", *_OF_DATA)))
        or (key in _KEPT and new == "auto")
        or (key == KEY_OF[_SCHEDULE] and schedule_of(now.training).value == identity[_SCHEDULE])
        or (key not in _OF_LENGTH and new not in (None, "auto") and identity.get(leaf_of.get(key, key), _NOWHERE) == new)
        for key, _, new in changes
    )


def _leaves_by_key(identity: dict[str, object]) -> dict[str, str]:
    """The value of an identity that each key decides; of several the first in the table."""
    return {key: leaf for leaf, key in reversed(KEY_OF.items()) if leaf in identity}


def _rows_asked(config: RunConfig, rows: int) -> bool:
    """Whether a config asks for as many rows per step, or leaves it to the run that is there."""
    training = config.training
    if training.global_batch_size != "auto":
        return training.global_batch_size == rows
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if micro == "auto" or accumulation == "auto":
        return True
    return (
        config.cluster.workers != "auto"
        and micro * accumulation * config.cluster.workers == rows * training.sequence_parallel_size
    )


def changes_in_keys(was: RunPlan, plan: RunPlan, before: RunConfig, now: RunConfig) -> list[Change]:
    """What makes a plan another run than the one that is there, by the keys that decide it, each once.

    Args:
        was, plan: the plan of the run that is there, and the one that is to continue it.
        before, now: the configs that they were made of.
    """
    written = {key: (old, new) for key, old, new in config_diff(before, now)}
    found: dict[str, Change] = {}
    for leaf, (old, new) in differences(identity_of(was), identity_of(plan)).items():
        for key, before_value, after_value in _named(leaf, old, new, was, plan, written):
            found.setdefault(key, (key, before_value, after_value))
    return list(found.values())


def _named(
    leaf: str, old: object, new: object, was: RunPlan, plan: RunPlan, written: dict[str, tuple[Any, Any]]
) -> Iterator[Change]:
    """A difference between two plans in the words of the configs: keys that were written anew, else what the plan resolved."""
    key = key_of(leaf)
    if leaf.startswith((*STORES, "template")):
        deciding = ("data.", "model.base", "strategy.replay", *(["strategy.ewc."] if leaf == "data.ewc" else []))
        decided = [each for each in written if each.startswith(deciding) and each != "data.store"]
    else:
        deciding = (key, *_BESIDE.get(leaf, ()))
        decided = [each for each in written if any(f"{each}.".startswith(f"{one}.") for one in deciding)]
        decided = [each for each in decided if not any(other.startswith(f"{each}.") for other in decided)]  # an empty mapping
    if decided:
        yield from ((each, *written[each]) for each in decided)
    elif leaf.startswith(STORES):
        yield f"{key} (the same names, other rows)", _rows_of(was, key), _rows_of(plan, key)
    elif leaf == "template":
        yield "data.template (the same name, another text)", _start(old), _start(new)
    elif leaf == "optimization.objective.sha256" and old and new:
        yield f"{key} (the same name, another code)", _start(old), _start(new)
    elif leaf.startswith("model.content"):
        file = leaf.removeprefix("model.content.")
        yield f"{key} (its {file if file == 'commit' else f'file {file}'})", old, new
    else:
        yield key, old, new


def key_of(leaf: str) -> str:
    """The key that decides a value of an identity."""
    if leaf.startswith("adapter."):
        return leaf
    return next(key for prefix, key in KEY_OF.items() if f"{leaf}.".startswith(f"{prefix}."))


def _rows_of(plan: RunPlan, key: str) -> str:
    ewc = [plan.data.ewc] if plan.data.ewc else []
    stores = {"data.train": [plan.data.train], "data.validation": plan.data.validation, "strategy.ewc.data": ewc}[key]
    row = "packed row" if plan.model.packs and key != "strategy.ewc.data" else "document"
    return ", ".join(f"{store.num_rows} {row}s of {store.num_tokens} tokens" for store in stores) or "none"


def _start(value: object) -> object:
    return f"{value[:16]}..." if isinstance(value, str) and len(value) > 16 else value
