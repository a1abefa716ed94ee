"""The verb that looks for a learning rate."""

import json
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, get_args

import click

from raytune.cli.group import as_json_option, debug_option, examples, files_and_overrides, load_run, run_arguments
from raytune.cli.say import say
from raytune.cli.supervise import begin_on
from raytune.launch.cluster.address import named_address
from raytune.plan.rates.rate_range import RangeOptions, Shape

if TYPE_CHECKING:
    from raytune.plan.run_plan import RunPlan

_USUAL = RangeOptions()


@click.command(
    "find-rate",
    epilog=examples(
        "find-rate run.yaml",
        "find-rate run.yaml --apply",
        "find-rate run.yaml --low 1e-6 --high 1e-2 --steps 200 --json",
    ),
)
@run_arguments
@click.option("--low", type=float, metavar="RATE", help="Of the first step. Default: a thousandth of the method's usual rate.")
@click.option("--high", type=float, metavar="RATE", help="Of the last step. Default: a hundred times the usual rate.")
@click.option("--steps", "num_steps", type=int, default=_USUAL.num_steps, show_default=True, help="Optimizer steps between them.")
@click.option(
    "--shape",
    type=click.Choice(get_args(Shape)),
    default=_USUAL.shape,
    show_default=True,
    help="Equal factors from step to step, or equal differences.",
)
@click.option(
    "--smoothing",
    type=float,
    default=_USUAL.smoothing,
    show_default=True,
    help="Share of the average loss so far in the next one.",
)
@click.option(
    "--stop-factor",
    type=float,
    default=_USUAL.stop_factor,
    show_default=True,
    help="End where the smoothed loss is more than so many times its lowest value (a loss below 0: has risen by as much).",
)
@click.option("--apply", "applies", is_flag=True, help="Write the suggestion into FILE as training.learning_rate.")
@as_json_option
@debug_option
def find_rate(arguments: tuple[str, ...], applies: bool, as_json: bool, **options: Any) -> None:
    """Find a learning rate: try a range of rates, one per step, on a copy of a run, and say what the losses show.

    Workers, engine and rows are those of the run, which is left as it is. The curve goes to rates/NAME in the storage, with a
    page and a picture. Where it names no rate, the words say why, `suggestion` is null in JSON, and the exit code is 0. `raytune
    explain strategies` says what a suggestion is worth.
    """
    from raytune.config.checks.asked import require_named
    from raytune.config.load import as_one_run
    from raytune.config.reading.rate_in_file import file_for_rate, write_rate
    from raytune.launch.rates.find_rate import find_rate
    from raytune.launch.state.progress import show_progress
    from raytune.report.rate_page import write_rate_page

    files, overrides = files_and_overrides(arguments)
    config, places = load_run(files, overrides, check_files=True)
    require_named(as_one_run(config), places=places)
    target = file_for_rate(files, places, config) if applies else None
    begin_on(named_address(config.cluster))

    def watched(plan: "RunPlan", heading: str) -> AbstractContextManager:
        return show_progress(plan, heading=heading, at_end="reading the curve")

    found = find_rate(config, RangeOptions(**options), watched)
    page = write_rate_page(found)
    applied = write_rate(target, found.suggestion) if target is not None and found.suggestion is not None else None
    if as_json:
        say(json.dumps(found.to_json() | {"report": page, "applied": applied.to_json() if applied else None}))
        return
    say("\n".join([*found.lines, f"report     {page}"]))
    if applied:
        say(applied.sentence)
    elif applies:
        say(f"{target} is left as it is: the curve names no rate.")
