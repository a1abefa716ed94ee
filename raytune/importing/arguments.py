"""What all three projects have, since all of them train by transformers: its arguments for batches, rates, precision, saving,
DeepSpeed and trackers. A rule reads keys from a draft and writes what they are here."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from raytune.config.problems import shown
from raytune.config.reading.keys import choices, is_open, keys
from raytune.config.sections.run import RUN_NAME
from raytune.config.sections.tracking import TRACKERS
from raytune.config.words.foreign_names import answer_for_value
from raytune.config.yaml_nodes import scalar
from raytune.importing.draft import Draft
from raytune.importing.facts import counterpart, facts

_ZERO_JSON_SETTINGS = ("optimizer", "scheduler")
"""Sections of DeepSpeed's JSON that take the place of what the file says, even where all in them is `auto`: `WarmupLR` stays at
its peak, whatever schedule the file names."""
_OTHER_RECOMPUTATIONS = ("offload", "offload_disk", "unsloth")
_CHANGES_NOTHING = ("model.attention", "training.compile", "training.liger")
"""Ways to compute the same."""


def base_model(draft: Draft) -> None:
    key = draft.project.names["base"]
    if base := draft.text(key):
        draft.write("model.base", base, key)
    else:
        draft.open_questions.append(f"which model is trained: the file has no {key}; name it as model.base")
    if draft.says("model_revision"):
        revision = draft.text("model_revision")
        if revision == "main":
            draft.same("model_revision", "the branch that is taken anyway")
        else:
            draft.write("model.revision", revision, "model_revision")
    if draft.truth("trust_remote_code"):
        draft.leave(
            "trust_remote_code",
            "code that comes with a model runs here only at a pinned commit: set model.revision and model.trust_remote_code, "
            "if transformers does not know the architecture itself",
        )


def carried(draft: Draft, method: str) -> None:
    """Keys whose values are what ours are, and those of the project's defaults that are not ours."""
    for key in draft.project.carried:
        if not draft.says(key) and key not in draft.project.defaults:
            continue
        ours = counterpart(key)
        if ours.startswith("adapter.") and method not in keys()[ours].methods:
            draft.idle(key, f"method {method} has no such setting")
        else:
            carry(draft, key, ours)


def carry(draft: Draft, key: str, ours: str) -> None:
    """A value under its counterpart, in the word that raytune has for it."""
    raw, annotation = draft.raw(key), keys()[ours].annotation
    answer = answer_for_value(ours, raw)
    value = scalar(answer.ours) if answer else scalar(raw) if isinstance(raw, str) else raw
    known = [choice for choice in choices(annotation) if isinstance(choice, str)]
    if (answer is None or answer.ours) and (value in known or not known or is_open(annotation) or not isinstance(value, str)):
        draft.write(ours, value, key, note=answer.note if answer else "")
        return
    why = answer.note if answer else f"{ours} knows {', '.join(known)}"
    if ours in _CHANGES_NOTHING:
        draft.idle(key, why)
    else:
        draft.leave(key, f"{why}; without it, {ours} is {shown(keys()[ours].default)}")


def rate(draft: Draft) -> None:
    if "training.learning_rate" not in draft.values:
        draft.open_questions.append("the learning rate: the file has none, and raytune would take the usual one of the method")


def batch(draft: Draft) -> None:
    """Rows per step: rows per GPU x accumulation x GPUs, where the file says two of them and the machines the third."""
    names = draft.project.names
    rows, accumulation = draft.count(names["rows"]), draft.count(names["accumulation"])
    if not rows or not accumulation:
        return
    sharing = {key: count for key in draft.project.row_sharing if (count := draft.count(key) or 1) > 1}
    group = math.prod(sharing.values())
    if draft.gpus is None or draft.gpus % group:
        draft.write("training.per_device_train_batch_size", rows, names["rows"])
        draft.write("training.gradient_accumulation_steps", accumulation, names["accumulation"])
        among = f", where {' x '.join(f'{key} {count}' for key, count in sharing.items())} GPUs share each row" if sharing else ""
        draft.open_questions.append(
            f"how many GPUs it was trained on: a step has {rows * accumulation} rows per GPU, as there{among}; `--gpus N` writes "
            "the rows per step, which then hold on any number"
            + (f" ({draft.gpus} are no multiple of {group})" if draft.gpus else "")
        )
        return
    groups = draft.gpus // group
    draft.write("training.global_batch_size", rows * accumulation * groups, names["rows"], names["accumulation"])
    draft.origins["training.global_batch_size"] = (
        f"{names['rows']} {rows} x {names['accumulation']} {accumulation} x {groups} GPUs"
    )


def length(draft: Draft) -> None:
    """How long a run is. A number of steps wins over one of epochs, there as here."""
    epochs, steps = draft.project.names["epochs"], draft.count("max_steps")
    if steps is not None and steps > 0:
        draft.write("training.max_steps", steps, "max_steps")
        draft.idle(epochs, "max_steps says how long the run is")
    else:
        draft.same("max_steps", "asks for nothing")
        if value := draft.number(epochs):
            draft.write("training.num_train_epochs", value, epochs)


def schedule(draft: Draft, *, fewest_steps: int = 1) -> None:
    """The schedule and its warm-up.

    Args:
        fewest_steps: of a warm-up that win over a share of all steps; fewer are as if nothing were said.
    """
    key = draft.project.names["schedule"]
    word, ours = draft.text(key), "training.lr_scheduler_type"
    answer = answer_for_value(ours, word)
    name = answer.ours if answer else word
    if name not in choices(keys()[ours].annotation):
        why = answer.note if answer else "raytune has no such schedule"
        draft.leave(key, f"{why}; a cosine is taken, and the rate of each step is another one")
        name = ""
    else:
        draft.write(ours, name, key)
    _schedule_settings(draft, name)
    if word in facts()["without_warmup"]:
        draft.write("training.warmup_steps", 0)
        draft.origins["training.warmup_steps"] = f"a {word} schedule has no warm-up there"
        for unread in ("warmup_ratio", "warmup_steps"):
            draft.idle(unread, f"a {word} schedule has no warm-up")
    elif (
        draft.says("warmup_steps")
        and (steps := draft.number("warmup_steps")) is not None
        and (steps >= 1 or steps == fewest_steps)
    ):
        draft.write("training.warmup_steps", int(steps), "warmup_steps")
        draft.idle("warmup_ratio", "warmup_steps wins over it")
    elif draft.says("warmup_ratio") and (ratio := draft.number("warmup_ratio")) is not None:
        draft.write("training.warmup_ratio", ratio, "warmup_ratio")
        draft.idle("warmup_steps", "warmup_ratio says it")
    elif (steps := draft.number("warmup_steps")) is not None:
        if 0 < steps < 1:
            draft.write("training.warmup_ratio", steps, "warmup_steps", note="a share of the steps there, too")
        else:
            draft.write("training.warmup_steps", int(steps), "warmup_steps")


def _schedule_settings(draft: Draft, name: str) -> None:
    """`lr_scheduler_kwargs`, or what transformers takes without them."""
    holder = "lr_scheduler_kwargs"
    below = {path.rpartition(".")[2]: path for path in (draft.open(holder) if draft.says(holder) else [])}
    for setting, rule in facts()["schedule_settings"].items():
        path = below.get(setting, "")
        usual = facts()["schedule_defaults"].get(name, {}).get(setting)
        if rule["of"] != name or (not path and usual is None):
            continue
        value = draft.number(path) if path else usual
        divisor = {"rate": draft.number("learning_rate"), "steps": draft.count("max_steps")}.get(rule.get("per"), 1)
        if value is None:
            continue
        if not divisor or divisor < 0:
            draft.leave(path, f"it is a number of steps, and {rule['ours']} a share of all steps: divide it by them")
        else:
            draft.write(rule["ours"], value / divisor if rule.get("per") else value, *([path] if path else []))
    if shape := facts()["schedule_shapes"].get(name):
        path = below.get(shape["unless"], "")
        if draft.text(path) == shape["is"]:
            draft.same(path, "the shape that it has anyway")
        else:
            draft.add_note(draft.project.names["schedule"], shape["say"])
    for path in below.values():
        draft.leave(path, "the schedule here has no such setting")


def optimizer(draft: Draft) -> None:
    key, ours = draft.project.names["optimizer"], "training.optimizer"
    word = draft.text(key)
    answer = answer_for_value(ours, word)
    name = answer.ours if answer else word
    if name in choices(keys()[ours].annotation):
        draft.write(ours, name, key, note=answer.note if answer else "")
    else:
        draft.leave(key, f"{answer.note if answer else 'raytune has no such optimizer'}; AdamW is taken, whose updates differ")


def precision(draft: Draft, *, bf16: bool | None, fp16: bool, used: tuple[str, ...]) -> None:
    """bf16 None: where the machine has it."""
    name = "auto" if bf16 is None else "bf16" if bf16 else "fp16" if fp16 else "fp32"
    draft.write("training.precision", name, *used)
    if name == "fp32":
        draft.write("training.tf32", draft.truth("tf32"), "tf32")
    elif draft.says("tf32"):
        draft.idle("tf32", f"products are computed in {'bf16' if name == 'auto' else name}")


def recomputation(draft: Draft) -> None:
    key = "gradient_checkpointing"
    if draft.says(key):
        value = draft.raw(key)
        if value in _OTHER_RECOMPUTATIONS:
            draft.write("training.gradient_checkpointing", True, key, note="activations stay on the device; the same is trained")
        else:
            draft.write("training.gradient_checkpointing", draft.truth(key), key)


def evaluation(draft: Draft, *, has_rows: bool, every_step_share_of: float | None = None) -> None:
    """When rows that are held out are looked at, when is saved, and which model is the result.

    Args:
        has_rows: whether any are held out.
        every_step_share_of: epochs of the run, where a number of steps below 1 is a share of it.
    """
    if not has_rows:
        for key in ("eval_strategy", "evaluation_strategy", "eval_steps", "evals_per_epoch", "load_best_model_at_end",
                    "metric_for_best_model", "greater_is_better", "eval_on_start", "eval_delay"):  # fmt: skip
            draft.idle(key, "no rows are held out")
        if draft.asks_for(draft.project.names.get("patience", "")):
            draft.leave(draft.project.names["patience"], "no rows are held out, so nothing gets worse")
    else:
        _times(draft, "eval", "evaluation", every_step_share_of)
        best = draft.truth("load_best_model_at_end") or draft.asks_for(draft.project.names.get("patience", ""))
        draft.write("checkpoint.keep_best", int(bool(best)), "load_best_model_at_end")
        if not best:
            draft.origins["checkpoint.keep_best"] = f"{draft.project.title} ends with the last model, not with the best one"
            for key in ("metric_for_best_model", "greater_is_better"):
                draft.idle(key, "the last model is the result")
        elif draft.says("metric_for_best_model"):
            carry(draft, "metric_for_best_model", "checkpoint.metric")
            if draft.says("greater_is_better"):
                draft.write("checkpoint.mode", "max" if draft.truth("greater_is_better") else "min", "greater_is_better")
        patience = draft.project.names.get("patience", "")
        if draft.asks_for(patience):
            draft.write("training.early_stopping.patience", draft.count(patience), patience)
    _times(draft, "save", "checkpoint", every_step_share_of)
    if draft.asks_for("save_total_limit"):
        draft.write("checkpoint.keep_last", draft.count("save_total_limit"), "save_total_limit")
    for key in ("resume_from_checkpoint", "auto_resume_from_checkpoints"):
        draft.idle(key, "the same command continues a run from its newest checkpoint")


def _times(draft: Draft, verb: str, section: str, epochs: float | None) -> None:
    """`eval_*` or `save_*`: every so many steps, so often in an epoch, or by a strategy."""
    per_epoch, steps = f"{verb}s_per_epoch", f"{verb}_steps"
    strategies = [key for key in (f"{verb}_strategy", f"{verb}uation_strategy") if draft.says(key)]
    strategy = str(draft.raw(strategies[0])).lower() if strategies else ""
    if draft.asks_for(per_epoch) and (often := draft.number(per_epoch)):
        draft.write(f"{section}.every_epochs", round(1 / often, 6), per_epoch)
    elif draft.asks_for(steps) and strategy not in ("epoch", "no", "false") and (each := draft.number(steps)):
        if each >= 1:
            draft.write(f"{section}.every_steps", int(each), steps)
        elif epochs:
            draft.write(f"{section}.every_epochs", round(each * epochs, 6), steps, note="a share of the run there")
        else:
            draft.idle(steps, f"a share of the run there: set {section}.every_steps")
    elif strategy == "epoch":
        draft.write(f"{section}.every_epochs", 1, *strategies)
    for key in (*strategies, steps, per_epoch):
        draft.idle(key, f"{section}.every_steps and every_epochs say when; it changes nothing of what is trained")


def sharding(draft: Draft, folder: str) -> None:
    """DeepSpeed's JSON, looked at if it is there, and FSDP. Both say where numbers lie, not what they are."""
    key = "deepspeed"
    said = draft.nodes[key].plain if draft.asks_for(key) else None
    if isinstance(said, Mapping):
        _zero(draft, said, f"written in {key}")
    elif isinstance(said, str):
        path = next((path for path in (os.path.join(folder, said), said) if os.path.isfile(path)), None)
        found = _json(path) if path else None
        stage = re.search(r"z(?:ero)?[_-]?([0-3])", PurePath(said).name)
        if found is not None:
            _zero(draft, found, f"{said} says it")
        elif stage:
            draft.write("training.zero.stage", int(stage[1]), key, note=f"by its name: {said} is not here")
        else:
            draft.idle(key, f"{said} is not here; training.zero.stage: auto takes the lowest stage that fits")
    for name in [
        name for name in draft.nodes if re.match(r"fsdp|dp_shard_size|dp_replicate_size", name) and draft.asks_for(name)
    ]:
        draft.idle(name, "ZeRO shards here, as training.zero.stage says; by default the lowest stage that fits")


def _json(path: str) -> Mapping[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, Mapping) else None


def _zero(draft: Draft, said: Mapping[str, Any], how: str) -> None:
    zero = said.get("zero_optimization") or {}
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    draft.write("training.zero.stage", stage, "deepspeed", note=how)
    for theirs, ours in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        offload = zero.get(theirs) if isinstance(zero, Mapping) else None
        if isinstance(offload, Mapping) and offload.get("device", "none") != "none":
            draft.write(f"training.zero.{ours}", offload["device"], "deepspeed")
            if offload["device"] == "nvme" and offload.get("nvme_path"):
                draft.write("training.zero.nvme_path", offload["nvme_path"], "deepspeed")
    for section in _ZERO_JSON_SETTINGS:
        settings = said.get(section)
        if isinstance(settings, Mapping) and settings and not (section == "optimizer" and _is_plain_adamw(draft, settings)):
            draft.add_note("deepspeed", f"its `{section}` is not read: raytune's is that of the training section")
            draft.open_questions.append(
                f"whether the {section} in DeepSpeed's JSON, which is what counts there, is the one of this file: {settings}"
            )


def _is_plain_adamw(draft: Draft, settings: Mapping[str, Any]) -> bool:
    """Whether an optimizer of DeepSpeed is AdamW with the numbers of the file, which has AdamW, too."""
    params = settings.get("params")
    is_auto = not isinstance(params, Mapping) or all(value == "auto" for value in params.values())
    return is_auto and settings.get("type") == "AdamW" and draft.values.get("training.optimizer", "adamw") == "adamw"


def trackers(draft: Draft) -> None:
    named = [name for name in draft.texts("report_to") if name not in ("none", "all")]
    known = [name for name in named if name in TRACKERS]
    named += [
        key.removeprefix("use_") for key in draft.nodes if key.startswith("use_") and key[4:] in TRACKERS and draft.truth(key)
    ]
    named += [key.removesuffix("_project") for key in draft.nodes if key == "wandb_project" and draft.asks_for(key)]
    for name in dict.fromkeys(named):
        if name in TRACKERS:
            key = "report_to" if name in known else f"use_{name}" if draft.says(f"use_{name}") else f"{name}_project"
            draft.write(f"tracking.{name}", {}, key)
    if draft.says("report_to") and not known:
        draft.idle("report_to", "metrics are in metrics.jsonl in any case; trackers are named in tracking")
    for key in [key for key in draft.nodes if counterpart(key).startswith("tracking.")]:
        tracker = ".".join(counterpart(key).split(".")[:2])
        if tracker in draft.values and draft.asks_for(key) and counterpart(key) != tracker:
            draft.write(counterpart(key), draft.text(key), key)
        elif draft.asks_for(key) and tracker not in draft.values:
            draft.idle(key, "no run is sent there")
    run = draft.project.names["run"]
    if draft.asks_for(run):
        if any(key.startswith("tracking.") for key in draft.values):
            draft.write("tracking.run_name", draft.text(run), run)
        else:
            draft.idle(run, "what a run is called changes nothing of what is trained")


def folders(draft: Draft, file: str) -> None:
    """Where a run lies: the last part of the output folder is its name."""
    written = draft.text("output_dir")
    path = PurePath(written or PurePath(file).stem)
    name = re.sub(r"[^a-z0-9._-]+", "-", path.name.lower()).strip("-._")[:63]
    name = name if re.match(RUN_NAME, name) else "run"
    draft.write("name", name, *(["output_dir"] if written else []))
    if not written:
        draft.origins["name"] = "the name of the file"
    if written and str(path.parent) not in (".", ""):
        draft.write("storage", str(path.parent), "output_dir")


def training_arguments(draft: Draft, file: str, method: str) -> None:
    """All rules that the three projects share and that depend on nothing of their own."""
    base_model(draft)
    carried(draft, method)
    rate(draft)
    batch(draft)
    length(draft)
    optimizer(draft)
    recomputation(draft)
    sharding(draft, os.path.dirname(file))
    trackers(draft)
    folders(draft, file)
