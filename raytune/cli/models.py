"""Options by which verbs name models that are asked."""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import click

from raytune.config.sections.training import Precision
from raytune.errors import UserError

model_argument = click.argument("model", metavar="MODEL_OR_RUN")
_BASE = click.option("--base", metavar="MODEL", help="Base of MODEL: that an adapter is laid over, or a whole model was made of.")
_ADAPTERS = click.option(
    "--adapter", "adapters", multiple=True, metavar="NAME=FOLDER", help="An adapter more over the same base."
)
_LOADING = (
    click.option(
        "--template", default="auto", metavar="NAME", help="Chat template, as data.template, for a tokenizer without one."
    ),
    click.option(
        "--dtype", type=click.Choice(get_args(Precision)), help="That a model is loaded in. Default: that of its files."
    ),
    click.option("--trust-remote-code", is_flag=True, help="Run the Python code that comes with a model in a folder."),
)
_DRAWING = (
    click.option(
        "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer, in tokens."
    ),
    click.option("--temperature", type=click.FloatRange(min=0), help="Draw answers. Default: the likeliest token each time."),
    click.option(
        "--top-p", type=click.FloatRange(min=0, min_open=True, max=1), help="Draw among the likeliest that have this much."
    ),
    click.option("--top-k", type=click.IntRange(min=1), help="Draw among the k likeliest tokens only."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of what is drawn."),
)


def _with(options: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def add(verb: Any) -> Any:
        for option in reversed(options):
            verb = option(verb)
        return verb

    return add


model_options = _with((_BASE, _ADAPTERS, *_LOADING))
"""Fields of `launch.models_to_ask.Named`; adapters by `adapters_by_name`."""
one_model_options = _with((_BASE, *_LOADING))
"""The same, where one model is asked."""
drawing_options = _with(_DRAWING)
"""How an answer is written."""


def adapters_by_name(adapters: Sequence[str]) -> dict[str, str]:
    """Folders of adapters by the names that they are given.

    Raises:
        UserError: if one has no name, or two have the same.
    """
    found: dict[str, str] = {}
    for text in adapters:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UserError(f"--adapter is {text!r}, expected a name and a folder, as in terse=runs/terse/model.")
        if name in found:
            raise UserError(f"--adapter names two adapters {name!r}.")
        found[name] = folder
    return found
