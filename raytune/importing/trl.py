"""TRL's own keys (`trl sft --config`): adapters by `use_peft`, data sets and mixtures of them, and which tokens carry loss."""

import os

from raytune.importing import arguments
from raytune.importing.draft import Draft
from raytune.importing.facts import facts
from raytune.importing.sources import Source, located, split, subset, write_sources

_ADAPTERS = ("lora_", "use_rslora", "use_dora")


def convert(draft: Draft, file: str) -> None:
    has_adapter = draft.truth("use_peft")
    _method(draft, has_adapter)
    arguments.training_arguments(draft, file, "lora" if has_adapter else "full")
    if not draft.says("router_aux_loss_coef"):
        words = "of a base with experts, TRL adds router_aux_loss_coef 0.001 x how unevenly they are used; here the loss does not"
        draft.add_note(draft.project.names["base"], words)
    arguments.schedule(draft)
    fp16 = draft.truth("fp16")
    bf16 = draft.truth("bf16") if draft.says("bf16") else not fp16
    arguments.precision(draft, bf16=bf16, fp16=fp16, used=tuple(key for key in ("bf16", "fp16") if draft.says(key)))
    for key in ("dtype", "torch_dtype"):
        if draft.text(key) in ("bfloat16", "float16"):
            draft.leave(key, "weights that are trained are kept in fp32 here, and computed with as training.precision says")
        else:
            draft.same(key, "weights that are trained are kept in fp32")
    has_rows = _data(draft)
    _rows_of_documents(draft)
    _targets(draft)
    epochs = None if draft.asks_for("max_steps") else draft.number("num_train_epochs")
    arguments.evaluation(draft, has_rows=has_rows, every_step_share_of=epochs)
    if draft.says("env"):
        for key in draft.open("env"):
            draft.idle(key, "a variable of the environment: set it where the command is typed")


def _method(draft: Draft, has_adapter: bool) -> None:
    draft.write("adapter.method", "lora" if has_adapter else "full", "use_peft")
    quantized = [(key, bits) for key, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)) if draft.truth(key)]
    if not has_adapter:
        for key in [key for key in draft.nodes if key.startswith(_ADAPTERS)]:
            draft.idle(key, "all weights are trained without use_peft")
        for key, _ in quantized:
            draft.leave(key, "weights that are all trained cannot be held in 4 or 8 bits; with use_peft they can")
        quantized = []
    else:
        draft.same("lora_task_type", "causal language models are what is trained")
        if draft.asks_for("lora_target_modules"):
            modules = draft.texts("lora_target_modules")
            draft.write("adapter.target_modules", modules[0] if modules == ["all-linear"] else modules, "lora_target_modules")
        elif not draft.says("lora_target_parameters"):
            draft.write("adapter.target_modules", facts()["usual_targets"])
            draft.origins["adapter.target_modules"] = "what PEFT takes in most families, if no modules are named"
    if not quantized:
        for key in [key for key in draft.nodes if key.startswith("bnb_4bit_") or key == "use_bnb_nested_quant"]:
            draft.idle(key, "the base is not quantised")
        return
    key, bits = quantized[0]
    if bits == 4:
        draft.write("model.quantization", draft.text("bnb_4bit_quant_type"), key, "bnb_4bit_quant_type")
        draft.write("model.double_quantization", draft.truth("use_bnb_nested_quant"), "use_bnb_nested_quant")
    else:
        draft.write("model.quantization", facts()["quantizations"][str(bits)], key)


def _data(draft: Draft) -> bool:
    """Sources. Whether any rows are held out."""
    held_out = draft.text("dataset_test_split")
    evaluates = str(draft.raw("eval_strategy") or "no").lower() not in ("no", "false")
    share = draft.number("test_split_size")
    if draft.asks_for("datasets"):
        draft.idle("dataset_name", "`datasets` names the rows")
        _mixture(draft)
    elif draft.asks_for("dataset_name"):
        source = Source()
        source.set("path", draft.text("dataset_name"), "dataset_name")
        subset(draft, "dataset_config", source)
        split(draft, "dataset_train_split", source)
        write_sources(draft, "data.train", [source])
        if evaluates:
            rows = Source()
            rows.set("path", source.values["path"], "dataset_name")
            rows.set("split", held_out, "dataset_test_split")
            write_sources(draft, "data.validation", [rows])
    else:
        draft.open_questions.append("which rows are trained on: name them as data.train")
    draft.same("dataset_train_split", "the split that is read anyway")
    draft.idle("dataset_test_split", "no rows are held out")
    if "data.validation" in draft.values:
        return True
    if share and 0 < share < 1 and evaluates:
        draft.write("data.validation_fraction", share, "test_split_size")
        return True
    if share:
        draft.leave("test_split_size", "these rows are left out of training there, and nothing is measured on them")
    return False


def _mixture(draft: Draft) -> None:
    sources = []
    if not isinstance(draft.nodes["datasets"].value, list):
        draft.wrong("datasets", "a list of data sets")
    for holder in draft.open("datasets"):
        if not draft.open(holder):
            draft.wrong(holder, "a data set (path, split, ...)")
            continue
        source = Source()
        located(draft, holder, source)
        split(draft, f"{holder}.split", source)
        subset(draft, f"{holder}.name", source)
        if fraction := draft.number(f"{holder}.fraction"):
            source.set("proportion", fraction, f"{holder}.fraction")
            source.notes[f"{holder}.fraction"] = "shares of rows there, of trained tokens here"
            draft.write("data.mixing.until", "first_exhausted", f"{holder}.fraction")
        draft.leave(f"{holder}.data_dir", "a folder of a hub data set has no key here: its default is read")
        draft.idle(f"{holder}.columns", "a format reads its own columns; others are counted and said")
        sources.append(source)
    write_sources(draft, "data.train", sources)


def _rows_of_documents(draft: Draft) -> None:
    """Packing, and what happens to a document that is longer than a row."""
    packs, strategy = draft.truth("packing"), draft.text("packing_strategy")
    draft.write("data.packing", "best_fit" if packs else "none", "packing")
    draft.idle("padding_free", "rows are never padded")
    if packs and strategy in ("bfd_split", "bfd-requeue"):
        draft.write("data.too_long", "split", "packing_strategy")
        draft.idle("truncation_mode", "nothing is cut")
    elif draft.text("truncation_mode") == "keep_end":
        draft.leave("truncation_mode", "data.too_long: truncate_left keeps the end, of a chat in whole answers")
    else:
        draft.write("data.too_long", "truncate", "truncation_mode")
    if packs and strategy == "wrapped":
        draft.leave("packing_strategy", "documents are never cut where a row ends: they are packed whole")
    elif packs:
        draft.same("packing_strategy", "best fit decreasing")
    else:
        draft.idle("packing_strategy", "nothing is packed")
    length = next((key for key in ("max_length", "max_seq_length") if draft.says(key)), "max_length")
    if "max_length" in draft.nodes and draft.nodes["max_length"].value is None and not draft.says(length):
        draft.open_questions.append("how long a document may be: max_length is null there, so no limit; set data.max_length")
    elif value := draft.count(length):
        draft.write("data.max_length", value, length)
    if draft.says("dataset_text_field") and draft.text("dataset_text_field") != "text":
        _text_column(draft)
    else:
        draft.same("dataset_text_field", "the column that is read anyway")
    path = draft.text("chat_template_path")
    if path.endswith((".jinja", ".j2", ".jinja2")):
        draft.write("data.template", os.path.normpath(path), "chat_template_path")
    elif path:
        draft.leave("chat_template_path", "a template is a file here: the tokenizer's own is taken, which may write other tokens")
    if draft.text("loss_type") in ("nll", "chunked_nll"):
        draft.same("loss_type", "the mean over all targets of a step")


def _text_column(draft: Draft) -> None:
    """Only looked at there where rows are plain text, which the file does not say."""
    column = draft.text("dataset_text_field")
    draft.leave("dataset_text_field", f"for rows of plain text, set columns: {{text: {column}}} of their source")


def _targets(draft: Draft) -> None:
    """Without a word: completions where rows have prompts, else all."""
    if draft.asks_for("assistant_only_loss") and draft.truth("assistant_only_loss"):
        draft.write("data.targets", "assistant", "assistant_only_loss")
        draft.same("completion_only_loss", "only answers are trained")
        return
    draft.same("assistant_only_loss", "asks for nothing")
    if draft.says("completion_only_loss"):
        only = draft.truth("completion_only_loss")
        draft.write("data.targets", "completion" if only else "all", "completion_only_loss")
        return
    draft.write("data.targets", "all")
    draft.origins["data.targets"] = (
        "TRL's default for messages and text; rows of prompt and completion train completions: completion"
    )
    draft.open_questions.append(
        "what the rows are, which TRL looks at: of messages it trains every token (data.targets: all, as written), of prompts "
        "and completions the completions (then set data.targets: completion and, if they are texts, data.template: plain)"
    )
