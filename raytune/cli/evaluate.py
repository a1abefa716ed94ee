"""The verb that measures models on suites."""

import json
from collections.abc import Sequence
from typing import Any

import click

from raytune.cli.group import as_json_option, debug_option, examples
from raytune.cli.models import adapters_by_name, model_argument, model_options
from raytune.cli.say import say
from raytune.cli.supervise import begin_on
from raytune.launch.cluster.address import named_address


@click.command(
    epilog=examples(
        "evaluate runs/support-bot",
        "evaluate runs/support-bot --suite suites.yaml --compare runs/support-bot-2",
        "evaluate ./merged --suite suites.yaml --base ./Qwen3-8B",
        "evaluate ./Qwen3-8B --suite suites.yaml --adapter a=runs/a/model --adapter b=runs/b/model",
    )
)
@model_argument
@click.option("--suite", metavar="FILE", help="YAML with `suites`, as evaluation.suites. Default: the suites of the run.")
@model_options
@click.option("--compare", metavar="MODEL_OR_RUN", help="Another one beside it on the same rows.")
@click.option("--output", metavar="FOLDER", help="Default: evaluations/NAME in the run folder, or here without a run.")
@click.option("--workers", type=click.IntRange(min=1), help="That answer at once. Default: the run's, or one per GPU or node.")
@click.option("--address", help="Ray cluster instead of the run's, as cluster.address; here: one inside this machine.")
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
    from raytune.launch.asking.evaluate import evaluate, prepare_evaluation
    from raytune.launch.asking.models_to_ask import Named

    asked = Named(adapters=adapters_by_name(adapters), **named)
    prepared = prepare_evaluation(asked, suite=suite, address=address, workers=workers)
    begin_on(named_address(prepared.cluster))
    found = evaluate(prepared, output)
    say(json.dumps(found.to_json()) if as_json else "\n".join(found.lines))
