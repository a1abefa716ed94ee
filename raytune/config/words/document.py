"""The schema's fields -> `explain`, tables and the JSON Schema. Options are documented nowhere else.

`python -m raytune.config.words.document` prints the tables as Markdown; with `--write` it writes `config/run.schema.json`.
"""

import json
import re
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raytune.config.reading.keys import REQUIRED, Key, example_of, in_words, is_in_list, keys, keys_in
from raytune.config.sections.run import RunConfig
from raytune.config.words.error_pages import ERROR_PAGES, ErrorPage
from raytune.config.words.guides import GUIDES, Guide, guides, guides_text
from raytune.config.words.hints import nearest_keys, why_there_is_none
from raytune.config.yaml_nodes import write_yaml
from raytune.errors import UserError

SCHEMA_FILE = Path(__file__).parents[1] / "run.schema.json"

_WIDTH = 100


def explain(subject: str = "") -> str:
    """What a key, a section or an error id means, or a guide; without a subject, the sections, the errors and the guides.

    Raises:
        UserError: if there is no such key; the message names near ones.
    """
    if not subject:
        errors = "\n".join(f"  {id}  {page.title}" for id, page in ERROR_PAGES.items())
        return (
            f"{table(keys_in(''))}\n\nErrors:\n{errors}\n\nGuides:\n{guides_text()}\n\n"
            f"`raytune explain training.learning_rate` says all about a key."
        )
    if subject.lower() == GUIDES:
        return guides_text()
    found = _find(subject)
    if isinstance(found, Guide):
        return found.text.rstrip()
    if isinstance(found, ErrorPage):
        blocks = [f"{subject.upper()}: {found.title}", _wrapped(found.cause), _wrapped(found.fix)]
        return "\n\n".join([*blocks, f"Refused:\n{_indented(found.wrong)}", f"Accepted:\n{_indented(found.right)}"])
    below = keys_in(found.path)
    blocks = [found.path, _wrapped(found.sentence), _indented(_properties(found)), table(below) if below else ""]
    return "\n\n".join(block for block in blocks if block)


def explanation_facts(subject: str = "") -> dict[str, Any]:
    """What `explain` says, as data.

    Raises:
        UserError: if there is no such key.
    """
    if not subject:
        facts = {"keys": [_key_facts(key) for key in keys().values()], "errors": sorted(ERROR_PAGES), "guides": sorted(guides())}
        return {"ok": True, **facts}
    if subject.lower() == GUIDES:
        return {"ok": True, "guides": [_guide_facts(guide) for guide in guides().values()]}
    found = _find(subject)
    if isinstance(found, Guide):
        return {"ok": True, **_guide_facts(found), "text": found.text}
    if isinstance(found, ErrorPage):
        return {"ok": True, "error": subject.upper(), **asdict(found)}
    return {"ok": True, **_key_facts(found), "keys": [_key_facts(key) for key in keys_in(found.path)]}


def table(rows: list[Key]) -> str:
    """Keys with their defaults and the first sentence about each, in aligned columns."""
    cells = [(key.path, _default_text(key), key.sentence.partition(". ")[0].rstrip(".:")) for key in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(2)]
    room = max(_WIDTH - sum(widths) - 6, 40)
    return "\n".join(
        f"  {path:{widths[0]}}  {default:{widths[1]}}  {textwrap.shorten(text, room)}" for path, default, text in cells
    )


def markdown_tables() -> str:
    """All keys, a table per section, for documentation pages."""
    sections = [key for key in keys().values() if keys_in(key.path)]
    return "\n".join(
        [_markdown_table("Top level", keys_in("")), *(_markdown_table(f"`{key.path}`", keys_in(key.path)) for key in sections)]
    )


def json_schema() -> dict[str, Any]:
    """The schema of a run config for editors, in the part of JSON Schema draft 7 that yaml-language-server understands."""
    generated = RunConfig.model_json_schema(ref_template="#/definitions/{model}")
    definitions = {name: _as_draft_7(definition) for name, definition in generated.pop("$defs").items()}
    head = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "urn:raytune:run.schema.json",
        "title": "raytune run config",
    }
    return {**head, **_as_draft_7(generated), "definitions": definitions}


def schema_text() -> str:
    """The content of the shipped schema file."""
    return json.dumps(json_schema(), indent=1) + "\n"


def _guide_facts(guide: Guide) -> dict[str, Any]:
    return {"guide": guide.name, "title": guide.title, "summary": guide.summary}


def _find(subject: str) -> Key | ErrorPage | Guide:
    page = ERROR_PAGES.get(subject.upper())
    path = re.sub(r"\.\d+(?=\.|$)", "", subject.strip("."))
    same_leaf = [key for key in keys().values() if key.path.rpartition(".")[2] == path]
    same_leaf = [key for key in same_leaf if not is_in_list(key)] or same_leaf  # a position has to be named for the others
    found = page or keys().get(path) or guides().get(path.lower()) or (same_leaf[0] if len(same_leaf) == 1 else None)
    if found is None:
        near = nearest_keys(path)
        hint = f"Did you mean {' or '.join(near)}?" if near else "`raytune explain` lists sections, errors and guides."
        hint = why_there_is_none(path) or hint
        raise UserError(f'There is no key, error or guide "{subject}". {hint}')
    return found


def _properties(key: Key) -> str:
    rows = {"type": in_words(key.annotation)}
    if not keys_in(key.path):
        rows |= {"default": _default_text(key), "example": f"{_written(key)}={_flow(example_of(key))}"}
    if key.methods and not key.path.endswith(".method"):
        rows |= {"only with": f"{key.union}.method {' or '.join(key.methods)}"}
    return "\n".join(f"{name:9}  {text}" for name, text in rows.items())


def _written(key: Key) -> str:
    """The path of a key as it is written on the command line."""
    section, _, leaf = key.path.rpartition(".")
    return f"{section}.0.{leaf}" if is_in_list(key) else key.path


def _key_facts(key: Key) -> dict[str, Any]:
    facts = {"key": key.path, "type": in_words(key.annotation), "sentence": key.sentence, "required": key.default is REQUIRED}
    return facts | {"default": _plain_default(key), "example": _plain(example_of(key)), "methods": list(key.methods)}


def _plain_default(key: Key) -> Any:
    return None if key.default is REQUIRED or key.is_section else _plain(key.default)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else value


def _default_text(key: Key) -> str:
    if key.default is REQUIRED:
        return "required"
    if key.is_section and key.default is not None:
        return ""
    return "; ".join([_flow(key.default), *(f"{method}: {_flow(default)}" for method, default in key.other_defaults)])


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = write_yaml([_plain(value)], flow=True).strip()
    return text[1:-1]


def _markdown_table(title: str, rows: list[Key]) -> str:
    lines = [f"### {title}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
    for key in rows:
        cells = [f"`{key.path}`", in_words(key.annotation), f"`{_default_text(key)}`" if _default_text(key) else "", key.sentence]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _as_draft_7(schema: Any) -> Any:
    """Without generated titles and defaults of sections; what stands beside a `$ref`, which draft 7 ignores, moves around it."""
    if isinstance(schema, list):
        return [_as_draft_7(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _as_draft_7(value) for key, value in schema.items() if key not in ("title", "discriminator")}
    if isinstance(schema.get("properties"), dict):
        kept["properties"] = {name: _as_draft_7(value) for name, value in schema["properties"].items()}
    if isinstance(kept.get("default"), dict):
        del kept["default"]
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].split())
    if "$ref" in kept and len(kept) > 1:
        kept["allOf"] = [{"$ref": kept.pop("$ref")}]
    return kept


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH)


def _indented(text: str) -> str:
    return textwrap.indent(text, "  ")


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
    else:
        sys.stdout.write(markdown_tables())
