"""Axolotl's data sets, each with a `type`: rows, columns, templates, which tokens are trained, and packing."""

from raytune.importing.draft import Draft
from raytune.importing.facts import RowFormat
from raytune.importing.sources import Source, columns_of, held_out, located, split, subset, template, write_sources

_KEYS = (("data.train", "datasets"), ("data.validation", "test_datasets"), ("data.train", "pretraining_dataset"))
_TURNS = {"role": "role", "content": "content"}
"""What a message's parts are called, where nothing says otherwise."""


def convert(draft: Draft) -> bool:
    """Sources, template, targets and packing. Whether any rows are held out."""
    wanted: dict[str, str] = {}
    for ours, key in _KEYS:
        if not draft.asks_for(key):
            continue
        if ours in draft.values:
            draft.leave(key, "the rows of `datasets` are trained on")
            continue
        write_sources(draft, ours, _sources(draft, key, wanted))
    if "data.train" not in draft.values:
        draft.open_questions.append("which rows are trained on: name them as data.train")
    _plain_text(draft)
    template(draft, wanted)
    for key in ("chat_template", "chat_template_jinja"):
        draft.idle(key, "no rows are written in it")
    _targets(draft)
    _packing(draft)
    return held_out(draft, "val_set_size", named_by="test_datasets" if "data.validation" in draft.values else None)


def _plain_text(draft: Draft) -> None:
    """Documents that are longer than a row are cut into several there, whatever happens to chats."""
    text = draft.project.formats["completion"].format
    formats = [source.get("format") for source in draft.values.get("data.train", [])]
    if text not in formats:
        return
    if set(formats) == {text}:
        draft.values["data.too_long"] = "split"
        draft.origins["data.too_long"] = f"{draft.project.title} cuts plain text into rows"
    else:
        draft.open_questions.append(
            "what becomes of long documents: plain text is cut into several there, chats are not; data.too_long is one for all"
        )


def _sources(draft: Draft, key: str, wanted: dict[str, str]) -> list[Source]:
    value, is_plain = draft.nodes[key].value, key == "pretraining_dataset"
    if isinstance(value, str) and is_plain:
        source = Source()
        source.set("path", value, key)
        source.set("format", draft.project.formats["pretrain"].format)
        return [source]
    if not isinstance(value, list) and not is_plain:
        draft.wrong(key, "a list of data sets")
    holders = [key] if isinstance(value, dict) else draft.open(key)
    for holder in holders:
        if not isinstance(draft.nodes[holder].value, dict):
            draft.wrong(holder, "a data set (path, type, ...)")
    return [_source(draft, holder, wanted, is_plain=is_plain) for holder in holders if draft.open(holder)]


def _source(draft: Draft, holder: str, wanted: dict[str, str], *, is_plain: bool) -> Source:
    source = Source()
    located(draft, holder, source)
    split(draft, f"{holder}.split", source)
    subset(draft, f"{holder}.name", source)
    _format(draft, holder, source, wanted, is_plain=is_plain)
    draft.idle(f"{holder}.ds_type", "how a file is read follows from its name")
    for key in ("preprocess_shards", "trust_remote_code"):
        draft.idle(f"{holder}.{key}", "it changes nothing of what is trained")
    for key in ("shards", "shards_idx"):
        draft.leave(f"{holder}.{key}", "all rows of a source are read here; max_rows reads the first ones")
    draft.leave(f"{holder}.revision", "of a hub data set the newest revision is read")
    return source


def _format(draft: Draft, holder: str, source: Source, wanted: dict[str, str], *, is_plain: bool) -> None:
    key = f"{holder}.type"
    if key in draft.nodes and isinstance(draft.nodes[key].value, dict):
        kind, at = draft.project.formats["fields"], key
        fields = [path for path in _user_defined(draft, key) if ".field_" in path]
        first = fields[0] if fields else f"{holder}.path"
        wanted[first] = kind.template or ""
        if not draft.says(f"{key}.no_input_format"):
            source.notes[first] = "a space stands between prompt and answer there"
    else:
        kind, at = _kind(draft, holder, "pretrain" if is_plain else draft.text(key)), holder
        if kind is None:
            draft.leave(key, "raytune has no format of this name: write such rows as `messages`, or name format and columns")
            return
        if kind.chats:
            _chats(draft, holder, wanted)
        elif kind.template:
            wanted[key] = kind.template
        source.set("format", kind.format, key)
        source.notes[key] = kind.note
    source.set("format", kind.format)
    columns = {theirs: f"{at}.{theirs}" for theirs, _ in kind.columns.values()}
    named = columns_of(kind, {theirs: draft.text(path) for theirs, path in columns.items() if draft.says(path)})
    if named:
        source.set("columns", named, *(path for path in columns.values() if draft.says(path)))
    else:
        for path in columns.values():
            draft.same(path, "the column that is read anyway")


def _kind(draft: Draft, holder: str, word: str) -> RowFormat | None:
    """What rows of a type are, looking at what the parts of a message are called."""
    base = word.partition(".")[0] if word.startswith("chat_template") else word
    key = f"{holder}.message_property_mappings"
    turns = dict(_TURNS)
    if draft.says(key):
        turns |= {path.rpartition(".")[2]: draft.text(path) for path in draft.open(key)}
    for part in _TURNS:
        if draft.says(f"{holder}.message_field_{part}"):
            turns[part] = draft.text(f"{holder}.message_field_{part}")
    names = f"{base} of {turns['role']} and {turns['content']}"
    kind = draft.project.formats.get(names) or (draft.project.formats.get(base) if turns.items() >= _TURNS.items() else None)
    for path in [*(f"{key}.{part}" for part in turns), *(f"{holder}.message_field_{part}" for part in _TURNS)]:
        if path in draft.nodes and kind is None:
            draft.leave(path, "a message has `role` and `content`, or `from` and `value`")
        elif path in draft.nodes:
            part = path.rpartition(".")[2].removeprefix("message_field_")
            is_read = part in _TURNS
            words = f"format {kind.format if kind else ''} reads messages with it"
            if is_read:
                draft.same(path, words)
            else:
                draft.leave(path, "of a message, other parts are read by their own names only")
    return kind


def _chats(draft: Draft, holder: str, wanted: dict[str, str]) -> None:
    """The template of rows that are chats: the source's own, the file's, or the tokenizer's."""
    for key in (f"{holder}.chat_template", "chat_template"):
        if not draft.says(key):
            continue
        word, jinja = draft.text(key), f"{key}_jinja"
        if word == "jinja" and draft.says(jinja):
            draft.leave(jinja, "write it into a file, and name that as data.template")
            draft.idle(key, "the template is in chat_template_jinja")
        elif (name := draft.project.templates.get(word)) == "auto":
            draft.same(key, "the tokenizer's own template is taken anyway")
        elif name:
            wanted[key] = name
        elif word.startswith("tokenizer_default"):
            draft.same(key, "the tokenizer's own template is taken anyway, and a tokenizer without one is refused")
        else:
            draft.leave(key, f"raytune ships no {word!r}: the tokenizer's own template is taken, which may write other tokens")
        break
    roles = f"{holder}.roles"
    if draft.says(roles):
        draft.leave(roles, "roles have fixed spellings here (human and gpt among them); a row with another one is refused")
    for key in (f"{holder}.train_on_eos", f"{holder}.train_on_eot"):
        if draft.text(key) == "turn":
            draft.same(key, "the end of a trained turn is trained")


def _user_defined(draft: Draft, key: str) -> list[str]:
    """A type with fields and texts of its own; the paths of these."""
    paths = draft.open(key)
    for path in paths:
        name = path.rpartition(".")[2]
        if name in ("format", "no_input_format") and draft.text(path) == "{instruction}":
            draft.same(path, "nothing is written around a prompt")
        elif not name.startswith("field_"):
            draft.leave(path, "the text around prompts is that of data.template: a Jinja file can write it")
        elif name == "field_input":
            draft.leave(path, "a prompt is one column: join the two before")
    return paths


def _targets(draft: Draft) -> None:
    """`train_on_inputs`, and by source the roles that are trained; one choice holds for all sources of a run."""
    if draft.asks_for("train_on_inputs") and draft.truth("train_on_inputs"):
        draft.write("data.targets", "all", "train_on_inputs")
    elif draft.says("train_on_inputs"):
        draft.same("train_on_inputs", "answers are trained, prompts are not")
    for key in [key for key in draft.nodes if key.endswith(".roles_to_train")]:
        if draft.truth("train_on_inputs"):
            draft.idle(key, "train_on_inputs has all of them trained")
            continue
        roles = draft.texts(key)
        ours = "all" if roles == ["all"] else [{"gpt": "assistant", "human": "user"}.get(role, role) for role in roles]
        if ours == ["assistant"] and "data.targets" not in draft.values:
            draft.same(key, "answers are trained, prompts are not")
        elif draft.values.get("data.targets", ours) == ours:
            draft.write("data.targets", ours, key)
        else:
            draft.leave(key, "data.targets holds for all sources of a run")


def _packing(draft: Draft) -> None:
    packs = draft.truth("sample_packing") or draft.asks_for("pretraining_dataset")
    if not packs and draft.asks_for("group_by_length"):
        draft.leave("group_by_length", "rows alike in length make a batch there; here each row is a document, in any order")
    draft.write("data.packing", "best_fit" if packs else "none", "sample_packing")
    draft.idle("eval_sample_packing", "a document's loss does not depend on the rows beside it")
