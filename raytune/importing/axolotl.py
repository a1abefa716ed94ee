"""Axolotl's own keys: adapters, warm-up, precision, plugins, tokens. Its data sets are converted in `axolotl_data`."""

from raytune.config.words.foreign_names import answer_for_name
from raytune.config.yaml_nodes import scalar
from raytune.importing import arguments, axolotl_data
from raytune.importing.draft import Draft
from raytune.importing.facts import facts

_BITS = ("load_in_4bit", "load_in_8bit")
_OF_ADAPTERS = ("lora_", "loraplus_", "peft")
"""Beginnings of keys that are not looked at without an adapter."""
_OUTSIDE = {"lm_head", "embed_tokens"}
"""Modules that are not among all linear layers."""
_KERNELS = ("flash_attention", "sdp_attention", "flex_attention", "eager_attention", "xformers_attention", "sage_attention")


def convert(draft: Draft, file: str) -> None:
    method = _method(draft)
    if draft.asks_for("sequence_parallel_degree"):
        draft.assumed["context_parallel_size"] = draft.count("sequence_parallel_degree")
    rows, total = draft.count("micro_batch_size"), draft.count("batch_size")
    if rows and total and total % rows == 0 and not draft.says("gradient_accumulation_steps"):
        draft.assumed["gradient_accumulation_steps"] = total // rows
    arguments.training_arguments(draft, file, method)
    for ours in ("training.global_batch_size", "training.gradient_accumulation_steps"):
        if "gradient_accumulation_steps" in draft.assumed and ours in draft.values:
            draft.write(ours, draft.values[ours], "batch_size", note="rows per GPU and step there")
    arguments.schedule(draft, fewest_steps=0)
    _warm_up(draft)
    _floor_of_rate(draft)
    _precision(draft)
    has_rows = axolotl_data.convert(draft)
    epochs = None if draft.asks_for("max_steps") else draft.number("num_epochs")
    arguments.evaluation(draft, has_rows=has_rows, every_step_share_of=epochs)
    _plugins(draft)
    for key in [key for key in _KERNELS if draft.asks_for(key)]:
        answer = answer_for_name("", key, draft.raw(key))
        ours, _, value = (answer.ours if answer else "").partition(": ")
        if value:
            draft.write(ours, value, key)
        else:
            draft.idle(key, "attention is one of model.attention; auto takes the fastest that is installed")
    for key in ("model_type", "tokenizer_type"):
        if draft.text(key).startswith("Auto") or draft.text(key).endswith(("ForCausalLM", "Tokenizer", "TokenizerFast")):
            draft.idle(key, "the class follows from the files of the base")
        else:
            draft.leave(key, "the class follows from the files of the base, as a model that predicts the next token")
    if shared := draft.count("context_parallel_size"):
        draft.write("training.sequence_parallel_size", shared, "context_parallel_size", "sequence_parallel_degree")
    _tokens(draft)


def _method(draft: Draft) -> str:
    """`adapter`, with which bits the base is held in; without, all is trained."""
    method = draft.text("adapter")
    answer = answer_for_name("", "adapter", method) if method else None
    if not method:
        draft.write("adapter.method", "full", "adapter")
        draft.origins["adapter.method"] = "there is no adapter"
        for key in _BITS:
            if draft.asks_for(key):
                draft.leave(key, "weights that are all trained cannot be held in 4 or 8 bits; with an adapter they can")
        if any(name.endswith("]") for name in draft.texts("unfrozen_parameters")):
            draft.leave("unfrozen_parameters", "ranges of rows of a weight cannot be frozen here: all weights are trained")
        elif draft.asks_for("unfrozen_parameters"):
            names = [_module(name) for name in draft.texts("unfrozen_parameters")]
            words = "modules by their whole names, without .weight"
            draft.write("strategy.freeze.train_only", names, "unfrozen_parameters", note=words)
        for key in [key for key in draft.nodes if key.startswith(_OF_ADAPTERS) and key != "lora_model_dir"]:
            draft.idle(key, "there is no adapter")
        return "full"
    bits = 4 if method.startswith("q") or draft.truth("load_in_4bit") else 8 if draft.truth("load_in_8bit") else 0
    ours = answer.ours.partition(": ")[2] if answer else method
    draft.write("adapter.method", "lora" if bits and ours.endswith("lora") else ours, "adapter")
    if bits:
        format = facts()["quantizations"][str(bits)]
        draft.write("model.quantization", format, "load_in_4bit" if bits == 4 else "load_in_8bit", "adapter")
    for key in _BITS:
        if draft.truth(key):
            draft.idle(key, "the other says how the base is held")
        else:
            draft.same(key, "asks for nothing")
    if ours.endswith("lora"):
        _targets(draft)
    if draft.asks_for("quantize_moe_experts"):
        draft.same("quantize_moe_experts", "fused experts are held in 4 bits where the base is")
    return ours.replace("qlora", "lora")


def _module(name: str) -> str:
    return name.strip("^$").removesuffix(".weight").removesuffix(r"\.weight").removesuffix(".*")


def _targets(draft: Draft) -> None:
    if draft.truth("lora_target_linear"):
        draft.write("adapter.target_modules", "all-linear", "lora_target_linear")
        if draft.says("lora_target_modules"):
            more = draft.raw("lora_target_modules")
            if isinstance(more, str) or _OUTSIDE & set(more):
                draft.leave("lora_target_modules", "lora_target_linear is read, which takes all linear layers but the head")
            draft.idle("lora_target_modules", "lora_target_linear takes all linear layers already")
    elif draft.says("lora_target_modules"):
        value = draft.raw("lora_target_modules")
        if isinstance(value, str):  # a regular expression, as PEFT reads it, or its word for all
            value = "all-linear" if value in ("all-linear", "all_linear") else value
        draft.write("adapter.target_modules", value, "lora_target_modules")
    elif not draft.says("lora_target_parameters"):
        draft.write("adapter.target_modules", facts()["usual_targets"])
        draft.origins["adapter.target_modules"] = "what PEFT takes in most families, if no modules are named"
    draft.same("lora_target_linear", "asks for nothing")


def _warm_up(draft: Draft) -> None:
    """Without a word it warms up over 3 % of the steps, 100 at most; and a warm-up of one step is one of two."""
    if draft.says("warmup_steps"):
        if draft.values.get("training.warmup_steps") == 1:
            draft.write("training.warmup_steps", 2, "warmup_steps", note="a warm-up of one step is one of two there")
    elif not draft.says("warmup_ratio") and "training.warmup_steps" not in draft.values:
        steps = draft.count("max_steps")
        if steps and steps > 0:
            draft.write("training.warmup_steps", min(int(0.03 * steps), 100))
            draft.origins["training.warmup_steps"] = "Axolotl's default: 3 % of the steps, at most 100"
        else:
            draft.write("training.warmup_ratio", 0.03)
            draft.origins["training.warmup_ratio"] = (
                "Axolotl's default: 3 % of the steps, but at most 100: of a longer run set that"
            )


def _floor_of_rate(draft: Draft) -> None:
    if not draft.asks_for("cosine_min_lr_ratio"):
        return
    if draft.text("lr_scheduler") not in facts()["with_a_floor"]:
        for key in ("cosine_min_lr_ratio", "cosine_constant_lr_ratio"):
            draft.idle(key, f"a {draft.text('lr_scheduler')} schedule there does not look at it")
        return
    draft.write("training.min_lr_ratio", draft.number("cosine_min_lr_ratio"), "cosine_min_lr_ratio")
    if draft.asks_for("cosine_constant_lr_ratio"):
        draft.leave("cosine_constant_lr_ratio", "no cosine here stays at its floor before the run ends")


def _precision(draft: Draft) -> None:
    used = tuple(key for key in ("bf16", "bfloat16", "fp16", "float16", "float32") if draft.says(key))
    word = str(draft.raw("bf16") if draft.says("bf16") else "auto").lower()
    fp16 = any(draft.says(key) and draft.truth(key) for key in ("fp16", "float16"))
    if draft.says("bfloat16") and draft.truth("bfloat16"):
        word = "true"
    bf16 = None if word == "auto" and not fp16 else word in ("full", "true", "yes", "on", "1")
    arguments.precision(draft, bf16=bf16, fp16=fp16, used=used)
    if word == "full":
        draft.add_note("bf16", "weights that are trained are kept in fp32 here")


def _plugins(draft: Draft) -> None:
    """Plugins that make training faster have keys here; others may change what is trained."""
    if draft.says("plugins"):
        for plugin in draft.open("plugins"):
            name = draft.text(plugin).rpartition(".")[2]
            ours, _, value = facts()["plugins"].get(name, "").partition(": ")
            if ours:
                draft.write(ours, scalar(value), plugin)
            elif name in facts()["plugins"]:
                draft.idle(plugin, "kernels; training.liger and training.compile are there")
            else:
                draft.leave(plugin, "raytune does not load it")
    for key in [key for key in draft.nodes if key.startswith("liger_") and draft.asks_for(key)]:
        draft.idle(key, "Liger's kernels are on or off (training.liger)")
    for key in ("cut_cross_entropy", "chunked_cross_entropy", "liger_fused_linear_cross_entropy"):
        if draft.asks_for(key):
            draft.accounts.pop(key, None)
            draft.write("training.loss", "chunked", key)


def _tokens(draft: Draft) -> None:
    if draft.asks_for("tokens"):
        if isinstance(draft.raw("tokens"), dict):
            draft.leave("tokens", "the tokenizer beside the base says which tokens are special")
        else:
            draft.write("model.new_tokens", draft.texts("tokens"), "tokens")
    if not draft.says("special_tokens"):
        return
    for key in draft.open("special_tokens"):
        if key.endswith((".pad_token", ".unk_token")):
            draft.idle(key, "rows are never padded, and no token is unknown")
        else:
            draft.leave(
                key, "the tokenizer beside the base says which tokens are special; where they differ, answers end otherwise"
            )
