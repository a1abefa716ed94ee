"""Verbs that read a config, say what can be in one, or make one: check, explain, schema, import. They start nothing."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raytune.cli.group import as_json_option, debug_option, examples, files_and_overrides, load_run, run_arguments
from raytune.cli.say import say

if TYPE_CHECKING:
    from raytune.importing.imported import ProjectName


@click.command(
    epilog=examples(
        "check run.yaml",
        "check run.yaml training.learning_rate=1e-4 adapter.rank=32",
        "check model.yaml cluster.yaml --json",
    )
)
@run_arguments
@click.option("--fast", is_flag=True, help="Names and values only, in a third of a second: opens no model, tokenizer or rows.")
@as_json_option
@debug_option
def check(arguments: tuple[str, ...], fast: bool, as_json: bool) -> None:
    """Find what is wrong with a run without its cluster, and list every problem at once. Starts nothing, leaves nothing.

    Looks at files and overrides, model, adapter, tokenizer, template, the first rows of each source, machines by name, storage
    and packages; of a sweep at its first trial, and at the names and values of all.
    """
    from raytune.config.checks.asked import NEITHER, is_settings_alone
    from raytune.config.load import dump_yaml, overridden
    from raytune.config.problems import shown

    files, overrides = files_and_overrides(arguments)
    config, places = load_run(files, overrides, check_files=True)
    if fast or is_settings_alone(config):
        from raytune.sweeps.check import check_names

        check_names(config, places)
        seen = None
    else:
        from raytune.sweeps.check import check_config

        seen = check_config(config, places)
    changes = overridden(files, config)
    if as_json:
        named = [{"key": key, "before": before, "after": after} for key, before, after in changes]
        facts = {"ok": True, "config": config.model_dump(mode="json"), "overridden": named, "seen": seen and seen.to_json()}
        say(json.dumps(facts))
        return
    written = dump_yaml(config)
    what, how = "sweep" if config.sweep else "run", "as written here, the rest by default:" if written else "all by default"
    say(f'OK: {what} "{config.name}", {how}')
    say("".join(f"  {line}\n" for line in written.splitlines()), nl=False)
    if changes:
        say("Changed on the command line:")
        say("".join(f"  {key}: {shown(before)} -> {shown(after)}\n" for key, before, after in changes), nl=False)
    if seen:
        say(str(seen))
    if is_settings_alone(config):
        say(NEITHER, err=True)


@click.command(
    epilog=examples(
        "explain training.learning_rate",
        "explain adapter",
        "explain E101",
        "explain guides",
    )
)
@click.argument("subject", default="", metavar="[KEY | ERROR | GUIDE]")
@as_json_option
@debug_option
def explain(subject: str, as_json: bool) -> None:
    """Say what a key (`training.learning_rate`), a section (`training`) or an error (`E101`) means, or show a guide.

    `explain guides` lists those: methods, strategies, facts about the libraries, faults, performance, changes.
    """
    from raytune.config.words.document import explain, explanation_facts

    say(json.dumps(explanation_facts(subject)) if as_json else explain(subject))


@click.command(
    epilog=examples(
        "schema > run.schema.json",
    )
)
@as_json_option
@debug_option
def schema(as_json: bool) -> None:
    """Print the JSON Schema of a run config, for editors."""
    from raytune.config.words.document import json_schema

    say(json.dumps(json_schema(), indent=None if as_json else 2))


@click.command(
    "import",
    epilog=examples(
        "import axolotl.yml --gpus 8 --output run.yaml",
        "import llamafactory.yaml > run.yaml",
        "import sft.yaml --of trl --json",
    ),
)
@click.argument("file", metavar="FILE")
@click.option("--of", type=click.Choice(["axolotl", "llamafactory", "trl"]), help="Whose file it is. Default: its keys say it.")
@click.option(
    "--gpus", type=click.IntRange(1), metavar="N", help="On how many it was trained there: the rows per step are written."
)
@click.option("--output", metavar="FILE", help="Write the config there. Default: print it.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@as_json_option
@debug_option
def import_(file: str, of: "ProjectName | None", gpus: int | None, output: str | None, force: bool, as_json: bool) -> None:
    """Make a config out of one of Axolotl, LLaMA-Factory or TRL (`trl sft --config`), and account for each of its keys.

    Each value says where it comes from; what the other project does without a word is written, where raytune does otherwise. What
    has no counterpart is listed at the end and, with why, on standard error. `raytune explain importing` has more words.
    """
    from raytune.importing.imported import imported, save_config

    found = imported(file, of=of, gpus=gpus)
    if output:
        save_config(found, Path(output), force=force)
    if as_json:
        say(json.dumps(found.to_json() | {"output": output}))
        return
    say(found.summary, err=True)
    say(f"{output} is written; `raytune check {output}` looks at it." if output else found.yaml, nl=bool(output))
