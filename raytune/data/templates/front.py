"""What a config puts in front of a chat template's own text: the date that it writes (`template_date`), variables of the template
(`data.template_options`) and the system prompt of chats that have none (`data.system`).

As text of the template, so that whoever renders it asks as was trained: evaluation, `generate`, `chat` and `serve`, and plain
transformers or vLLM, which read the template that a model is saved with. A caller who passes a variable of his own, or a system
turn, has his way.
"""

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateSyntaxError, meta, nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from raytune.config.sections.data import DataSection
from raytune.data.templates.date import date_front, without_date
from raytune.data.templates.text import resolve_template
from raytune.errors import DataError

_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
"""Variables that rows, or those who ask, decide."""
_HAS_SYSTEM = "messages and messages[0]['role'] in ['system', 'developer']"
_AS_ASKED = (
    "if not messages or messages[0]['content'] is not defined or messages[0]['content'] is string or not messages[0]['content']"
)


def template_of(data: DataSection, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text that conversations are written with: `data.template` behind the variables and the system prompt of `data`.

    Raises:
        DataError: if there is no such template, it does not read a variable, or its date cannot be told.
    """
    resolved = resolve_template(data.template, tokenizer)
    date, text = date_front(resolved, data.template_date), without_date(resolved)
    front = _system(data.system) if data.system is not None else ""
    if data.template_options:
        _refuse_unread(data.template_options, text)
        front += "".join(_variable(name, value) for name, value in data.template_options.items())
    return date + (text if text.startswith(front) else front + text)  # a saved template has it


def variables_of(text: str) -> list[str]:
    """Names of the variables that a template reads and neither rows nor a tokenizer decide, sorted.

    Raises:
        jinja2.TemplateSyntaxError: if the text is no Jinja.
    """
    environment = chat_template_utils._compile_jinja_template(text).environment  # pyright: ignore[reportPrivateUsage]
    tree = environment.parse(text)
    # What is set in a branch counts as undeclared beside it; it is a template's own unless that asks whether it is there.
    names: dict[str, set[str]] = {"store": set(), "param": set(), "load": set()}
    for name in tree.find_all(nodes.Name):
        names[name.ctx].add(name.name)
    own = names["param"] | (names["store"] - _asked_for(tree))
    read = meta.find_undeclared_variables(tree) - _GIVEN - own - environment.globals.keys()
    return sorted(name for name in read if not name.endswith("_token"))


def _asked_for(tree: nodes.Template) -> set[str]:
    """Names that a template asks whether they are there, or gives a value if they are not."""
    tests = (test.node for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined"))
    filters = (filtered.node for filtered in tree.find_all(nodes.Filter) if filtered.name in ("default", "d"))
    return {node.name for node in (*tests, *filters) if isinstance(node, nodes.Name)}


def _refuse_unread(options: Mapping[str, Any], text: str) -> None:
    """Refuse variables that a template does not read.

    Raises:
        DataError: with those that it reads.
    """
    try:
        known = variables_of(text)
    except TemplateSyntaxError:  # who renders it says so, and where
        return
    for name in options:
        if name not in known:
            reads = f"It reads {', '.join(known)}." if known else "It reads none."
            raise DataError(
                f"data.template_options.{name}: the chat template does not read a variable {name!r}. {reads}",
                keys=(f"data.template_options.{name}",),
            )


def _variable(name: str, value: Any) -> str:
    return _line(f"set {name} = {name} if {name} is defined else {_literal(value)}")


def _system(text: str) -> str:
    words = _literal(text)
    content = f"({words} {_AS_ASKED} else [{{'type': 'text', 'text': {words}}}])"
    added = f"[{{'role': 'system', 'content': {content}}}] + messages"
    return _line(f"set messages = messages if {_HAS_SYSTEM} else {added}")


def _line(statement: str) -> str:
    """Of a template. Its end of line is eaten by the block, as templates of chats are read, so that nothing else changes."""
    return f"{{% {statement} %}}\n"


def _literal(value: Any) -> str:
    """A value as Jinja writes it, which reads escapes in texts as JSON does."""
    match value:
        case None:
            return "none"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case dict():
            return f"{{{', '.join(f'{_literal(key)}: {_literal(inner)}' for key, inner in value.items())}}}"
        case _:
            return json.dumps(value)
