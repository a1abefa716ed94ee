"""Which key of a config decides which value of a plan's identity: how a changed run is told in the words of its user. Pure."""

from collections.abc import Iterator
from typing import Any

from raytune.config.load import config_diff
from raytune.config.run import RunConfig
from raytune.plan.run_plan import RunPlan

Change = tuple[str, object, object]
"""(dotted key, old value, new value)."""

KEY_OF = {
    "seed": "training.seed",
    "precision": "training.precision",
    "global_batch_size": "training.global_batch_size",
    "template": "data.template",
    "data.train": "data.train",
    "data.validation": "data.validation",
    "data.row_length": "data.max_length",
    "model.path": "model.base",
    "model.content": "model.base",
    "model.packs": "model.base",
    "model.revision": "model.revision",
    "model.trust_remote_code": "model.trust_remote_code",
    "model.attention": "model.attention",
    "model.dtype": "training.precision",
    "model.compute_dtype": "training.precision",
    "model.quantization.format": "model.quantization",
    "model.quantization.double_quantization": "model.double_quantization",
    "model.quantization.compute_dtype": "model.quant_compute_dtype",
    "model.quantization.quant_storage": "model.quant_storage",
    "model.quantization": "model.quantization",
    "model.gradient_checkpointing": "training.gradient_checkpointing",
    "model.compile": "training.compile",
    "model.liger": "training.liger",
    "model.neftune_noise_alpha": "training.neftune_noise_alpha",
    "optimization.num_steps": "training.max_steps",
    "optimization.num_rows": "training.num_train_epochs",
    "optimization.optimizer": "training.optimizer",
    "optimization.learning_rate": "training.learning_rate",
    "optimization.lora_plus_ratio": "adapter.lora_plus_ratio",
    "optimization.lora_plus_embedding_rate": "adapter.lora_plus_embedding_rate",
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
    "adapter": "adapter",
}
"""Value of `RunPlan.identity`, with what is below it -> the key that decides it. Those of the adapter have one name in both."""

_OF_DATA = ("data.targets", "data.too_long", "data.packing", "data.on_bad_row", "data.validation_fraction")
"""Keys that decide which tokens a store holds, whatever the rows are."""
_SAID_IN_TWO_WAYS = {
    *(("adapter.method", method) for method in ("lora", "qlora")),
    *(("model.quantization", held) for held in ("auto", "none")),
}
"""Values of keys that may mean the same, together with those of other keys: the preset `qlora` speaks of the base too."""
_BY_CONTENT = ("model.base", "data.template")
"""Keys that name what may be the same under another name."""
_BESIDE = {
    "optimization.num_steps": ("training.max_steps", "training.num_train_epochs", "training.global_batch_size"),
    "optimization.num_rows": ("training.num_train_epochs", "training.max_steps", "training.global_batch_size"),
    "optimization.warmup_steps": ("training.warmup_steps", "training.warmup_ratio", "training.max_steps"),
    "global_batch_size": (
        "training.global_batch_size",
        "training.per_device_train_batch_size",
        "training.gradient_accumulation_steps",
        "cluster.workers",
    ),
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
    identity = _leaves(was.identity)
    leaf_of = {key: leaf for leaf, key in reversed(KEY_OF.items()) if leaf in identity}
    changes = (_certain(key, old, new, now, identity, leaf_of) for key, old, new in config_diff(before, now))
    return [change for change in changes if change is not None]


def _certain(key: str, old: Any, new: Any, now: RunConfig, identity: dict[str, object], leaf_of: dict[str, str]) -> Change | None:
    """What a key that was written anew changes for certain: the value that the run has is the old one, resolved where it was not
    written."""
    if (key, new) in _SAID_IN_TWO_WAYS and (key, old) in _SAID_IN_TWO_WAYS:
        return None
    if key in _OF_DATA or key == "adapter.method":
        return key, old, new
    if key == "training.num_train_epochs":
        return (key, old, new) if now.training.max_steps is None and "auto" not in (old, new) else None
    leaf = key if key.startswith("adapter.") else leaf_of.get(key, "")
    if key in _BY_CONTENT or new in (None, "auto") or identity.get(leaf, new) == new:
        return None
    return key, identity[leaf] if old in (None, "auto") else old, new


def changes_in_keys(was: RunPlan, plan: RunPlan, before: RunConfig, now: RunConfig) -> list[Change]:
    """What makes a plan another run than the one that is there, by the keys that decide it, each once.

    Args:
        was, plan: the plan of the run that is there, and the one that is to continue it.
        before, now: the configs that they were made of.
    """
    written = {key: (old, new) for key, old, new in config_diff(before, now)}
    old_leaves, new_leaves = _leaves(was.identity), _leaves(plan.identity)
    found: dict[str, Change] = {}
    for leaf in [*old_leaves, *(leaf for leaf in new_leaves if leaf not in old_leaves)]:
        old, new = old_leaves.get(leaf), new_leaves.get(leaf)
        if old != new:
            for key, before_value, after_value in _named(leaf, was, plan, written):
                found.setdefault(key, (key, before_value, after_value))
    return list(found.values())


def _named(leaf: str, was: RunPlan, plan: RunPlan, written: dict[str, tuple[Any, Any]]) -> Iterator[Change]:
    """A difference between two plans in the words of the configs: keys that were written anew, else what the plan resolved."""
    key, old, new = key_of(leaf), _leaves(was.identity).get(leaf), _leaves(plan.identity).get(leaf)
    if leaf.startswith(("data.train", "data.validation", "template")):
        decided = [each for each in written if each.startswith(("data.", "model.base")) and each != "data.store"]
    else:
        decided = [each for each in (key, *_BESIDE.get(leaf, ())) if each in written]
    if decided:
        yield from ((each, *written[each]) for each in decided)
    elif leaf.startswith(("data.train", "data.validation")):
        yield f"{key} (the same names, other rows)", _rows_of(was, key), _rows_of(plan, key)
    elif leaf == "template":
        yield "data.template (the same name, another text)", _start(old), _start(new)
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
    stores = [plan.data.train] if key == "data.train" else plan.data.validation
    row = "packed row" if plan.model.packs else "document"
    return ", ".join(f"{store.num_rows} {row}s of {store.num_tokens} tokens" for store in stores) or "none"


def _start(value: object) -> object:
    return f"{value[:16]}..." if isinstance(value, str) and len(value) > 16 else value


def _leaves(tree: object, prefix: str = "") -> dict[str, object]:
    if isinstance(tree, dict):
        branches = ((f"{prefix}.{name}" if prefix else name, branch) for name, branch in tree.items())
        return {key: leaf for name, branch in branches for key, leaf in _leaves(branch, name).items()}
    return {prefix: tree}
