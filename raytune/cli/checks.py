"""Verbs that examine the nodes of a cluster, or this machine: preflight, doctor."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from raytune.cli.group import as_json_option, debug_option, examples, files_and_overrides
from raytune.cli.say import say
from raytune.cli.supervise import begin_on
from raytune.errors import EXIT_FAILED, UserError

if TYPE_CHECKING:
    from raytune.clusters.checks.finding import Finding


@click.command(
    epilog=examples(
        "preflight run.yaml",
        "preflight cluster.address=HEAD:6379 storage=/shared/runs --expect 50GB",
    )
)
@click.argument("arguments", nargs=-1, metavar="[FILE]... [KEY=VALUE]...")
@click.option(
    "--expect",
    metavar="RATE",
    help="Bus bandwidth that nodes should reach together, such as 50GB (per second). Default: of cluster.instance, or of the "
    "type that the nodes say they are.",
)
@as_json_option
@debug_option
def preflight(arguments: tuple[str, ...], expect: str | None, as_json: bool) -> None:
    """Check every node of the cluster: versions, GPUs, disks, clocks, shared storage, and a real all-reduce.

    Exit code 0: nothing failed. 1: something did; each line says what to do. 10: the cluster could not be reached.
    """
    from raytune.config.load import config_from, load_config

    files, overrides = files_and_overrides(arguments)
    config = load_config(files, overrides) if files else config_from({}, overrides)
    expected = expected_rate(expect)

    from raytune.plan.costs.hardware import load_catalogue

    if config.cluster.instance is not None:
        load_catalogue().instance(config.cluster.instance)  # a name that it does not know is said before anything is joined
    from raytune.clusters.preflight import examine_cluster
    from raytune.launch.cluster.address import named_address
    from raytune.storage import absolute

    begin_on(named_address(config.cluster))

    storage = absolute(config.storage) if "storage" in config.model_fields_set else None
    _show_findings(examine_cluster(config.cluster, storage, expected_bytes_per_s=expected), as_json)


@click.command(
    epilog=examples(
        "doctor",
        "doctor --storage /shared/runs --json",
    )
)
@click.option("--storage", help="Where runs will go, to look at its disk too.")
@as_json_option
@debug_option
def doctor(storage: str | None, as_json: bool) -> None:
    """Check this machine in a second: packages, GPUs, memory, disks, ports, tokens. Starts nothing.

    Exit code 0: nothing failed. 1: something did; each line says what to do.
    """
    from raytune.clusters.doctor import examine_this_machine

    _show_findings(examine_this_machine(storage), as_json)


def expected_rate(text: str | None) -> float | None:
    """Bytes per second that a node's network should give, as written; None: nothing is."""
    from raytune.units import parse_size

    if text is None:
        return None
    try:
        return parse_size(text.removesuffix("/s"))
    except ValueError as error:
        raise UserError(f"--expect: {error}") from error


def _show_findings(findings: "Sequence[Finding]", as_json: bool) -> None:
    from raytune.clusters.checks.finding import findings_json, findings_text, worst

    say(json.dumps(findings_json(findings)) if as_json else findings_text(findings))
    if worst(findings) == "fail":
        click.get_current_context().exit(EXIT_FAILED)
