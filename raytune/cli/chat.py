"""The verb that talks with a model."""

from collections.abc import Sequence
from typing import Any

import click

from raytune.cli.group import debug_option, examples
from raytune.cli.models import adapters_by_name, drawing_options, model_argument, model_options


@click.command(
    epilog=examples(
        "chat runs/support-bot",
        "chat ./Qwen3-8B --adapter terse=runs/terse/model --adapter kind=runs/kind/model",
        "chat runs/support-bot --temperature 0.7 --system 'You answer in one sentence.'",
        "chat http://127.0.0.1:8000/v1 --model terse",
        "chat runs/support-bot > answers.txt < questions.txt",
    )
)
@model_argument
@click.option("--model", "first", metavar="NAME", help="Which of the models answers at first. Default: the tuned one.")
@click.option("--system", metavar="TEXT", help="System message.")
@model_options
@drawing_options
@debug_option
def chat(
    model: str,
    first: str | None,
    system: str | None,
    adapters: Sequence[str],
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    **named: Any,
) -> None:
    """Talk with a model in this terminal, in this process.

    MODEL_OR_RUN is what `raytune evaluate` takes, or the address of an endpoint that speaks OpenAI's protocol. Base, tuned model
    and adapters can be asked in turn: /model NAME. /help lists all commands. Ctrl-C ends an answer, Ctrl-D the conversation.
    Without a terminal, each line of standard input is a turn.
    """
    from raytune.api.models import chat as open_chat
    from raytune.cli.terminal import converse

    opened = open_chat(
        model,
        adapters=adapters_by_name(adapters),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        **named,
    )
    with opened:
        if first is not None:
            opened.use(first)
        converse(opened)
