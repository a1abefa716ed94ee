"""The verb that measures models on suites."""

import json
from collections.abc import Sequence
from typing import Any, get_args

import click

from raytune.cli.group import as_json_option, debug_option, examples
from raytune.cli.say import say
from raytune.cli.supervise import begin_on
from raytune.config.training import Precision
from raytune.errors import UserError
from raytune.launch.address import named_address


@click.command(
    epilog=examples(
        "evaluate runs/support-bot",
        "evaluate runs/support-bot --suite suites.yaml --compare runs/support-bot-2",
        "evaluate ./merged --suite suites.yaml --base ./Qwen3-8B",
        "evaluate ./Qwen3-8B --suite suites.yaml --adapter a=runs/a/model --adapter b=runs/b/model",
    )
)
@click.argument("model", metavar="MODEL_OR_RUN")
@click.option("--suite", metavar="FILE", help="YAML with `suites`, as evaluation.suites. Default: the suites of the run.")
@click.option("--base", metavar="MODEL", help="Base that MODEL is compared with, or that an adapter is laid over.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=FOLDER", help="An adapter more over the same base.")
@click.option("--compare", metavar="MODEL_OR_RUN", help="Another one beside it on the same rows.")
@click.option("--output", metavar="FOLDER", help="Default: evaluations/NAME in the run folder, or here without a run.")
@click.option("--template", default="auto", metavar="NAME", help="Chat template, as data.template, for a tokenizer without one.")
@click.option("--dtype", type=click.Choice(get_args(Precision)), help="That a model is loaded in. Default: that of its files.")
@click.option("--workers", type=click.IntRange(min=1), help="That answer at once. Default: the run's, or one per GPU or node.")
@click.option("--address", help="Ray cluster instead of the run's, as cluster.address; here: one inside this machine.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that comes with a model in a folder.")
@as_json_option
@debug_option
def evaluate(
    suite: str | None,
    adapters: Sequence[str],
    output: str | None,
    workers: int | None,
    address: str | None,
    as_json: bool,
    **named: Any,
) -> None:
    """Measure a model on suites: base against tuned, with intervals, on the workers of a cluster.

    MODEL_OR_RUN is the folder of a finished run, or any folder that plain transformers or PEFT loads. Rows are answered in
    chunks; finished ones lie in the output folder, and the same command goes on with the rest. A run's own suites give the
    numbers that stand in its result.
    """
    from raytune.launch.evaluate import evaluate, prepare_evaluation
    from raytune.launch.models_to_ask import Named

    asked = Named(adapters=by_name(adapters), **named)
    prepared = prepare_evaluation(asked, suite=suite, address=address, workers=workers)
    begin_on(named_address(prepared.cluster))
    found = evaluate(prepared, output)
    say(json.dumps(found.to_json()) if as_json else "\n".join(found.lines))


def by_name(adapters: Sequence[str]) -> dict[str, str]:
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
