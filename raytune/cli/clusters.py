"""Verbs that describe, start and end a cluster: cluster render, cluster up, cluster down."""

import json
from pathlib import Path
from typing import Any

import click

from raytune.cli.group import as_json_option, debug_option, examples, files_and_overrides, run_arguments
from raytune.cli.say import say


@click.group()
def cluster() -> None:
    """Describe a cluster in files that Ray, KubeRay and clouds read, and start or end it with Ray's own commands."""


@cluster.command(
    "render",
    epilog=examples(
        "cluster render run.yaml aws-p5.yaml --output cluster.yaml",
        "cluster render run.yaml aws-p5.yaml --target kuberay",
    ),
)
@run_arguments
@click.option(
    "--target",
    type=click.Choice(["ray-up", "network", "kuberay", "kuberay-cluster"]),
    default="ray-up",
    show_default=True,
    help="A file for `ray up`; the network and roles it stands on; a KubeRay RayJob; a RayCluster.",
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write. Default: standard output.")
@as_json_option
@debug_option
def cluster_render(arguments: tuple[str, ...], target: Any, output: Path | None, as_json: bool) -> None:
    """Write the cluster of a run (its sections cluster and provider) as a commented file. Calls no cloud."""
    from raytune.clusters.kuberay import kuberay_yaml
    from raytune.clusters.provider import KUBERAY, cluster_spec
    from raytune.clusters.ray_up import ray_up_text
    from raytune.config.load import load_config
    from raytune.plan.costs.hardware import load_catalogue
    from raytune.storage import write_bytes

    spec = cluster_spec(load_config(*files_and_overrides(arguments)), load_catalogue(), target)
    text = kuberay_yaml(spec, target) if target in KUBERAY else ray_up_text(spec, target)
    if output is not None:
        write_bytes(output, text.encode())
    if as_json:
        say(json.dumps({"ok": True, "target": target, "output": output and str(output), "text": text}))
    else:
        say(f"{target} file of {spec.name}: {output}" if output else text, nl=bool(output))


@cluster.command(
    "up",
    epilog=examples(
        "cluster up cluster.yaml",
    ),
)
@click.argument("cluster_file", type=click.Path(path_type=Path))
@debug_option
def cluster_up(cluster_file: Path) -> None:
    """Start or update the cluster of a rendered file: `ray up`, with a token made before if there is none."""
    from raytune.clusters.ray_up import up

    up(cluster_file)


@cluster.command(
    "down",
    epilog=examples(
        "cluster down cluster.yaml",
    ),
)
@click.argument("cluster_file", type=click.Path(path_type=Path))
@debug_option
def cluster_down(cluster_file: Path) -> None:
    """End the cluster of a rendered file: `ray down`."""
    from raytune.clusters.ray_up import down

    down(cluster_file)
