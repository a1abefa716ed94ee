"""The verb that gives a model away."""

import json
from typing import Any

import click

from raytune.cli.group import as_json_option, debug_option, examples
from raytune.cli.say import say


@click.command(
    epilog=examples(
        "push runs/support-bot my-team/support-bot",
        "push runs/support-bot my-team/support-bot --revision candidate --message 'rank 32'",
        "push ./merged s3://models/support-bot",
        "push runs/support-bot/model my-team/support-bot-lora --base Qwen/Qwen3-8B",
    )
)
@click.argument("model", metavar="MODEL_OR_RUN")
@click.argument("target")
@click.option("--private/--public", default=True, help="Who may see a model that is new on the hub. Default: --private.")
@click.option("--revision", metavar="BRANCH", help="Of a model on the hub. Default: main.")
@click.option("--message", metavar="TEXT", help="Of the commit on the hub.")
@click.option("--replace", is_flag=True, help="Write over files that raytune has not pushed there, and a card that was edited.")
@click.option("--base", metavar="NAME", help="What an adapter calls its base there, such as its id on a hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that comes with a model in a folder, to check it.")
@as_json_option
@debug_option
def push(model: str, target: str, as_json: bool, **options: Any) -> None:
    """Push a model to the Hugging Face hub, to a bucket or to a folder: checked before, sent whole, read back.

    MODEL_OR_RUN is the folder of a finished run, or of a model or an adapter that plain transformers or PEFT loads. TARGET is
    owner/name on the hub, a URL such as s3://bucket/folder, or a folder that is written as a path (./there). Only what belongs to
    the model is sent. The same command goes on with what is lacking.
    """
    from raytune.launch.export.push import PushOptions, push
    from raytune.report.at_end import leave_card

    pushed = push(model, target, PushOptions(**options), leave_card)
    say(json.dumps(pushed.to_json()) if as_json else "\n".join(pushed.lines))
