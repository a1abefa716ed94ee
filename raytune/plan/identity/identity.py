"""What a run is: the part of a plan that decides which numbers its steps compute. A run is continued only under an equal one.

How that is divided over machines (`division`), where things lie, are logged and saved, is none of it: data count by the
fingerprints of their stores, a base by its content. Pure.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ValidationError

from raytune.plan.identity.deepspeed_keys import computing_overrides
from raytune.plan.run_plan import DistillationPlan, ModelPlan, OptimizationPlan, RunPlan, StorePlan, todays_form

_DIVIDES_MODEL = {"attention", "gradient_checkpointing", "lowest_layer", "compile", "liger", "dtype"}
"""Of `ModelPlan`: which kernels compute the same products, what is computed again, and how weights are stored."""
_DIVIDES_QUANTIZATION = "quant_storage"
"""Of how a quantised base is held: the dtype that packed 4-bit weights are kept in."""
_NOT_OF_OBJECTIVE = {"module", "text", "bytes_per_logit", "is_tried"}
"""Of `ObjectivePlan`: where its code lies. What it is, its hash says."""
STORES = ("data.train", "data.validation", "data.ewc")
"""Beginnings of values that are fingerprints of rows."""


def identity_of(plan: RunPlan) -> dict[str, Any]:
    """The identity of a run, as JSON values; what a value is called in a config says `settings.KEY_OF`."""
    model = _undivided(plan.model.model_dump(mode="json", exclude=_DIVIDES_MODEL))
    if plan.model.content is not None:
        del model["path"], model["revision"]
    return {
        "seed": plan.seed,
        "precision": plan.precision,
        "template": plan.template,
        "model": model,
        "data": {
            "train": fingerprints(plan.data.train),
            "validation": {store.name: fingerprints(store) for store in plan.data.validation},
            "row_length": plan.data.row_length,
            **({"ewc": fingerprints(plan.data.ewc)} if plan.data.ewc else {}),
        },
        "adapter": plan.adapter.model_dump(mode="json"),
        "optimization": plan.optimization.model_dump(mode="json", exclude={"objective": _NOT_OF_OBJECTIVE}),
        "distillation": _of_distillation(plan.distillation),
        "rows_per_step": plan.batch.global_batch_size,
        "overrides": computing_overrides(plan.engine.deepspeed_overrides),
    }


def _of_distillation(plan: DistillationPlan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    teacher = plan.teacher
    if teacher is None:
        who: object = "the base beneath the adapter"
    else:
        who = teacher.content or {"path": teacher.path, "revision": teacher.revision}
    return plan.model_dump(mode="json", exclude={"teacher"}) | {"teacher": who}


def fingerprints(store: StorePlan) -> list[str]:
    """Hashes of what a store was made of (data.build); any of them stands for the same rows."""
    return [PurePosixPath(store.path).name, *store.known_as]


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[object, object]]:
    """Old and new value by dotted name, of all in which two identities differ.

    Args:
        was, now: as `identity_of` gives them, or as an earlier raytune did.
    """
    before, after = _read(was), _read(now)
    if not ("overrides" in before and "overrides" in after):  # until November 2026 no identity had them
        before, after = ({name: value for name, value in one.items() if name != "overrides"} for one in (before, after))
    old, new = leaves(before), leaves(after)
    names = dict.fromkeys([*old, *new])
    return {name: (old.get(name), new.get(name)) for name in names if not _equal(name, old.get(name), new.get(name))}


def _equal(name: str, old: object, new: object) -> bool:
    if name.startswith(STORES) and isinstance(old, list) and isinstance(new, list):
        return not set(old).isdisjoint(new)
    return old == new


def leaves(tree: object, prefix: str = "") -> dict[str, object]:
    """Values of nested dictionaries by dotted name."""
    if isinstance(tree, Mapping):
        branches = ((f"{prefix}.{name}" if prefix else str(name), branch) for name, branch in tree.items())
        return {key: leaf for name, branch in branches for key, leaf in leaves(branch, name).items()}
    return {prefix: tree}


def _read(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as this raytune writes it: what came later has its default."""
    found = dict(identity)
    with suppress(ValidationError):  # of a method that this raytune does not have: then they differ
        found = todays_form(found)
    if "global_batch_size" in found:  # until November 2026 it held what now is the division's, and paths of stores
        found["rows_per_step"] = found.pop("global_batch_size")
        found["model"] = {name: value for name, value in found["model"].items() if name not in _DIVIDES_MODEL}
        found["data"] = {
            "train": [PurePosixPath(found["data"]["train"]["path"]).name],
            "validation": {store["name"]: [PurePosixPath(store["path"]).name] for store in found["data"]["validation"]},
            "row_length": found["data"]["row_length"],
        }
    for name, kind in (("model", ModelPlan), ("optimization", OptimizationPlan)):
        if name in found:
            found[name] = _defaults(kind, _DIVIDES_MODEL) | found[name]
    if "model" in found:
        found["model"] = _undivided(found["model"])
    return found


def _undivided(model: dict[str, Any]) -> dict[str, Any]:
    """A model's part of an identity without what divides its quantised weights."""
    held = model.get("quantization")
    if not isinstance(held, dict):
        return model
    return model | {"quantization": {name: value for name, value in held.items() if name != _DIVIDES_QUANTIZATION}}


def _defaults(kind: type[BaseModel], without: set[str]) -> dict[str, Any]:
    fields = kind.model_fields.items()
    return {
        name: field.default for name, field in fields if name not in without and not field.is_required() and name != "content"
    }
