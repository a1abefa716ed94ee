"""LLaMA-Factory's own keys, and its data sets: names that `dataset_info.json` in `dataset_dir` explains."""

import json
import os
from collections.abc import Mapping
from typing import Any

from raytune.config.yaml_nodes import scalar
from raytune.errors import UserError
from raytune.importing import arguments
from raytune.importing.draft import Draft
from raytune.importing.facts import RowFormat, facts
from raytune.importing.sources import Source, columns_of, held_out, template, write_sources

_INFO = "dataset_info.json"
_TURNS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
"""Tags of chats as OpenAI writes them."""
_OF_ADAPTERS = {
    "full": ("lora_", "loraplus_", "pissa_", "oft_", "additional_target"),
    "oft": ("lora_", "loraplus_", "pissa_"),
    "lora": ("oft_",),
}
"""By method, beginnings of keys that it does not look at."""
_MEDIA = ("images", "videos", "audios")


def convert(draft: Draft, file: str) -> None:
    if not draft.truth("do_train"):
        raise UserError(
            f"{file}: do_train is not true, so that nothing is trained with it (it answers, exports or measures). "
            "Nothing was converted."
        )
    draft.same("do_train", "training is what `raytune train` does")
    method = _method(draft)
    arguments.training_arguments(draft, file, method)
    arguments.schedule(draft)
    pure = draft.truth("pure_bf16")
    used = tuple(key for key in ("bf16", "fp16", "pure_bf16") if draft.says(key))
    bf16, fp16 = draft.truth("bf16") or pure, draft.truth("fp16")
    if method != "full" and not fp16:  # a frozen base is held and computed in what the machine has: bf16 before the others
        bf16 = bf16 or None
    arguments.precision(draft, bf16=bf16, fp16=fp16, used=used)
    if pure:
        draft.add_note("pure_bf16", "weights that are trained are kept in fp32 here")
    if draft.says("disable_gradient_checkpointing"):
        off = draft.truth("disable_gradient_checkpointing")
        draft.write("training.gradient_checkpointing", not off, "disable_gradient_checkpointing")
    has_rows = _data(draft, os.path.dirname(file))
    epochs = None if draft.asks_for("max_steps") else draft.number("num_train_epochs")
    arguments.evaluation(draft, has_rows=has_rows, every_step_share_of=epochs)
    if draft.truth("resize_vocab") and method == "lora" and not draft.asks_for("additional_target"):
        whole = "embedding and head are trained as wholes there, as by adapter.modules_to_save: [embed_tokens, lm_head]"
        draft.leave("resize_vocab", f"{whole}; as written here, rows of new tokens are")
    if draft.asks_for("add_tokens"):
        draft.write("model.new_tokens", draft.texts("add_tokens"), "add_tokens")
        draft.same("resize_vocab", "new tokens get rows in any case")
    if draft.says("stage"):
        draft.same("stage", "supervised fine-tuning is what raytune does")


def _method(draft: Draft) -> str:
    method = draft.text("finetuning_type")
    if method == "freeze":
        raise UserError(
            "finetuning_type: freeze trains the last layers without the head, which no setting of raytune does: "
            "strategy.unfreeze with last_layers trains them with the head and its norm. Nothing was converted; change it to "
            "full or lora, import that, and set strategy.unfreeze."
        )
    draft.write("adapter.method", method, "finetuning_type")
    for key in [key for key in draft.nodes if key.startswith(_OF_ADAPTERS.get(method, ()))]:
        draft.idle(key, f"finetuning_type is {method}")
    if method == "full":
        return method
    if draft.asks_for("additional_target"):
        draft.write("adapter.modules_to_save", draft.texts("additional_target"), "additional_target")
    _quantization(draft)
    if method != "lora":
        _rotations(draft)
        return method
    if not draft.says("lora_alpha"):
        draft.write("adapter.alpha", 2 * (draft.count("lora_rank") or 0))
        draft.origins["adapter.alpha"] = "LLaMA-Factory's default: twice lora_rank"
    else:
        draft.write("adapter.alpha", draft.number("lora_alpha"), "lora_alpha")
    targets = draft.texts("lora_target")
    draft.write("adapter.target_modules", "all-linear" if "all" in targets else targets, "lora_target")
    if draft.asks_for("pissa_init"):
        draft.write("adapter.init", "pissa", "pissa_init")
        draft.idle("pissa_iter", "its factors are exact here")
    return method


def _rotations(draft: Draft) -> None:
    """OFT, the only other method: its blocks, by their size or by their number."""
    if draft.count("oft_rank"):
        draft.leave("oft_rank", "blocks are given by their size, adapter.block_size: a layer's inputs divided by the blocks")
    else:
        draft.write("adapter.block_size", draft.count("oft_block_size"), "oft_block_size")
    targets = draft.texts("oft_target")
    draft.write("adapter.target_modules", "all-linear" if "all" in targets else targets, "oft_target")


def _quantization(draft: Draft) -> None:
    if not draft.asks_for("quantization_bit"):
        draft.idle("quantization_type", "the base is not quantised")
        draft.idle("double_quantization", "the base is not quantised")
        return
    bits, kind = draft.count("quantization_bit"), draft.text("quantization_method") or "bnb"
    if bits is None:
        return
    format = facts()["quantizations"].get(str(bits))
    if format is None or kind not in ("bnb", "bitsandbytes"):
        raise UserError(
            f"quantization_bit: {bits} by {kind}: raytune holds a base in 4 or 8 bits by bitsandbytes only. "
            "Nothing was converted; change it to 4 or 8 and import that."
        )
    draft.write("model.quantization", draft.text("quantization_type") or format if bits == 4 else format, "quantization_bit")
    for key, ours in (("quantization_type", "model.quantization"), ("quantization_method", "model.quantization")):
        if draft.says(key):
            draft.write(ours, draft.values[ours], key)
    if draft.says("double_quantization"):
        draft.write("model.double_quantization", draft.truth("double_quantization"), "double_quantization")


def _data(draft: Draft, folder: str) -> bool:
    is_plain = draft.text("stage") == "pt"
    info = _dataset_info(draft, folder)
    sources = [_source(draft, name, "dataset", info, is_plain) for name in draft.texts("dataset")]
    validation = [_source(draft, name, "eval_dataset", info, is_plain) for name in draft.texts("eval_dataset")]
    if sources:
        _shares(draft, sources)
        write_sources(draft, "data.train", sources)
    else:
        draft.open_questions.append("which rows are trained on: name them as data.train")
    if validation:
        write_sources(draft, "data.validation", validation)
    draft.idle("dataset_dir", "the paths of the sources have it")
    _template(draft, is_plain)
    _targets(draft, is_plain)
    packs = draft.truth("packing") if draft.says("packing") else draft.truth("neat_packing") or is_plain
    draft.write("data.packing", "best_fit" if packs else "none", "packing", "neat_packing")
    if packs and not draft.truth("neat_packing"):
        draft.add_note("packing", "documents do not see each other here, as with neat_packing there")
    draft.write("data.too_long", "split" if is_plain else "drop" if packs else "truncate")
    words = "plain text is split" if is_plain else "packing drops rows that are too long" if packs else "long rows are cut"
    draft.origins["data.too_long"] = f"LLaMA-Factory: {words}" + ("" if packs else ", the prompt there, too; here the end")
    return held_out(draft, "val_size", named_by="eval_dataset" if validation else None)


def _dataset_info(draft: Draft, folder: str) -> Mapping[str, Any]:
    """What `dataset_info.json` says, and below `""` the folder that it lies in."""
    if draft.says("dataset_dir") and isinstance(draft.nodes["dataset_dir"].value, dict):
        draft.open_questions.append(
            "what dataset_dir says about data sets: it is written into the file, and only a folder is read"
        )
        return {}
    named = draft.text("dataset_dir") or "data"
    for place in (os.path.join(folder, named), named, folder or "."):
        path = os.path.join(place, _INFO)
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8") as stream:
                    found = json.load(stream)
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read: {error}. It says what LLaMA-Factory's data sets are.") from error
            return {**(found if isinstance(found, Mapping) else {}), "": os.path.normpath(place)}
    if draft.says("dataset") and named != "ONLINE":
        draft.open_questions.append(
            f"what the data sets are: {_INFO} is neither in {named} nor beside the file; the names stand where paths belong"
        )
    return {}


def _source(draft: Draft, name: str, key: str, info: Mapping[str, Any], is_plain: bool) -> Source:
    source, said = Source(), info.get(name)
    if not isinstance(said, Mapping):
        source.set("path", name, key)
        if info:
            draft.open_questions.append(f"what {name!r} is: {_INFO} in {info['']} does not have it")
    else:
        file_name = said.get("file_name") or said.get("script_url")
        path = said.get("hf_hub_url") or said.get("ms_hub_url") or said.get("om_hub_url") or said.get("cloud_file_name")
        source.set("path", str(path) if path else os.path.join(info[""], str(file_name)), key)
        source.set("name", name)
        if said.get("split", "train") != "train":
            source.set("split", said["split"])
        _format(draft, name, key, said, source, is_plain)
        if said.get("subset") and path:
            source.set("path", f"{path}:{said['subset']}", key)
        for part in ("folder", "num_samples"):
            if said.get(part):
                draft.open_questions.append(f"{name}: `{part}: {said[part]}` of {_INFO} has no counterpart: all rows are read")
    if draft.asks_for("max_samples"):
        source.set("max_rows", draft.count("max_samples"), "max_samples")
    return source


def _format(draft: Draft, name: str, key: str, said: Mapping[str, Any], source: Source, is_plain: bool) -> None:
    columns = {str(theirs): str(column) for theirs, column in (said.get("columns") or {}).items()}
    if said.get("ranking"):
        raise UserError(
            f"{name} in {_INFO} has `ranking: true`: pairs to learn preferences from. raytune does not learn from these."
        )
    if any(medium in columns for medium in _MEDIA):
        raise UserError(f"{name} in {_INFO} has images, videos or sound. raytune trains on text only; nothing was converted.")
    kind = _kind(draft, said, is_plain)
    if kind is None:
        draft.open_questions.append(f"how {name} is read: roles or parts of its messages have names that no format here has")
        return
    source.set("format", kind.format)
    source.notes[key] = kind.note
    if found := columns_of(kind, columns if columns else {}):
        source.set("columns", found)
    if unread := [theirs for theirs in columns if theirs not in {named for named, _ in kind.columns.values()}]:
        draft.open_questions.append(f"{name}: the columns {', '.join(unread)} of {_INFO} are not read as {kind.format}")


def _kind(draft: Draft, said: Mapping[str, Any], is_plain: bool) -> RowFormat | None:
    formats, tags = draft.project.formats, said.get("tags") or {}
    if is_plain:
        return formats["text"]
    kind = formats.get(said.get("formatting", next(iter(formats))))
    if kind is None or not kind.chats or not tags:
        return kind
    known = {**_TURNS, **tags}
    return formats["openai"] if all(known[tag] == word for tag, word in _TURNS.items()) else None


def _shares(draft: Draft, sources: list[Source]) -> None:
    """`interleave_probs`: how likely the next row is one of a source."""
    if draft.text("mix_strategy") in ("", "concat", "interleave_once"):
        draft.same("mix_strategy", "each row of each source once, in an order of its own")
        draft.idle("interleave_probs", "each row is seen once")
        return
    key = "interleave_probs" if draft.says("interleave_probs") else "mix_strategy"
    shares = [scalar(word) for word in draft.texts(key)] if key == "interleave_probs" else [1.0] * len(sources)
    if len(shares) != len(sources) or not all(isinstance(share, float) for share in shares):
        draft.wrong(key, f"{len(sources)} shares such as 0.7, one for each data set")
        return
    for source, share in zip(sources, shares, strict=True):
        source.set("proportion", share, key)
        source.notes[key] = "shares of rows there, of trained tokens here"
    first = draft.text("mix_strategy") == "interleave_under"
    draft.write("data.mixing.until", "first_exhausted" if first else "all_exhausted", "mix_strategy")


def _template(draft: Draft, is_plain: bool) -> None:
    word = draft.text("template")
    if not word:
        return
    if is_plain:
        draft.idle("template", "plain text is written in none")
    elif name := draft.project.templates.get(word):
        template(draft, {"template": name})
    else:
        words = f"raytune ships no {word!r}: the tokenizer's own template is taken, which may write other tokens"
        draft.leave("template", words)
    for key in ("enable_thinking", "preserve_thinking"):
        if draft.says(key):
            draft.leave(key, "data.template_options hands it to a template that reads it; shipped is qwen-3")


def _targets(draft: Draft, is_plain: bool) -> None:
    if draft.asks_for("train_on_prompt") and draft.truth("train_on_prompt"):
        draft.write("data.targets", "all", "train_on_prompt")
    elif draft.asks_for("mask_history") and draft.truth("mask_history"):
        draft.write("data.targets", "last", "mask_history")
    if is_plain and draft.says("stage"):
        draft.idle("stage", "plain text: all of it is trained, as the format of each source says")
