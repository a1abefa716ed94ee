"""Verbs that read a config, or say what can be in one: check, explain, schema. They start nothing."""

import json

import click

from raytune.cli.group import as_json_option, debug_option, examples, files_and_overrides, run_arguments


@click.command(
    epilog=examples(
        "check run.yaml",
        "check run.yaml training.learning_rate=1e-4 adapter.rank=32",
        "check model.yaml cluster.yaml --json",
    )
)
@run_arguments
@as_json_option
@debug_option
def check(arguments: tuple[str, ...], as_json: bool) -> None:
    """Validate files and overrides, and list every problem at once. Starts nothing."""
    from raytune.config.load import dump_yaml, load_with_places, overridden
    from raytune.config.problems import shown
    from raytune.sweeps.space import check_space

    files, overrides = files_and_overrides(arguments)
    config, places = load_with_places(files, overrides, check_files=True)
    if config.sweep is not None:
        check_space(config, places)
    changes = overridden(files, config)
    if as_json:
        named = [{"key": key, "before": before, "after": after} for key, before, after in changes]
        click.echo(json.dumps({"ok": True, "config": config.model_dump(mode="json"), "overridden": named}))
        return
    written = dump_yaml(config)
    what, how = "sweep" if config.sweep else "run", "as written here, the rest by default:" if written else "all by default"
    click.echo(f'OK: {what} "{config.name}", {how}')
    click.echo("".join(f"  {line}\n" for line in written.splitlines()), nl=False)
    if changes:
        click.echo("Changed on the command line:")
        click.echo("".join(f"  {key}: {shown(before)} -> {shown(after)}\n" for key, before, after in changes), nl=False)


@click.command(
    epilog=examples(
        "explain training.learning_rate",
        "explain adapter",
        "explain E101",
    )
)
@click.argument("subject", default="", metavar="[KEY | ERROR]")
@as_json_option
@debug_option
def explain(subject: str, as_json: bool) -> None:
    """Say what a key (`training.learning_rate`), a section (`training`) or an error (`E101`) means."""
    from raytune.config.document import explain, explanation_facts

    click.echo(json.dumps(explanation_facts(subject)) if as_json else explain(subject))


@click.command(
    epilog=examples(
        "schema > run.schema.json",
    )
)
@as_json_option
@debug_option
def schema(as_json: bool) -> None:
    """Print the JSON Schema of a run config, for editors."""
    from raytune.config.document import json_schema

    click.echo(json.dumps(json_schema(), indent=None if as_json else 2))
