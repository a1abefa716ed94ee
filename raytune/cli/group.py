"""The group that verbs belong to: how errors are answered, and the arguments and options that verbs share."""

import json
import re
from collections.abc import Sequence
from typing import Any

import click

import raytune
from raytune.errors import RaytuneError

EXIT_INTERRUPTED = 130

_OVERRIDE = re.compile(r"\w[\w.-]*=", re.ASCII)


class Verbs(click.Group):
    """Answers an error that raytune knows with its message and exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RaytuneError as error:
            if ctx.meta.get("debug"):
                raise
            if ctx.meta.get("as_json"):
                click.echo(json.dumps(_error_facts(error)))
            else:
                click.echo(str(error), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command continues from the newest checkpoint, if the run has one", err=True)
            ctx.exit(EXIT_INTERRUPTED)


def examples(*commands: str) -> str:
    """The end of a verb's help: commands as one would type them, behind `raytune`."""
    return "\n".join(["\b", "Examples:", *(f"  raytune {command}" for command in commands)])


def files_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell `key.sub=value` from file names; a file whose name looks like an override is written `./a=b.yaml`."""
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    return [argument for argument in arguments if not _OVERRIDE.match(argument)], overrides


def _remember(ctx: click.Context, option: click.Parameter, value: bool) -> bool:
    ctx.meta[str(option.name)] = value
    return value


def _print_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"raytune {raytune.__version__}")
        ctx.exit()


run_arguments = click.argument("arguments", nargs=-1, required=True, metavar="FILE... [KEY=VALUE]...")
as_json_option = click.option("--json", "as_json", is_flag=True, callback=_remember, help="Print one JSON object.")
debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember, help="Show the traceback of an error."
)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Print the version.")
def cli() -> None:
    """Fine-tune language models on a Ray cluster: one YAML in, weights and metrics out."""


def _error_facts(error: RaytuneError) -> dict[str, Any]:
    from raytune.config.problems import ConfigError

    facts = {"ok": False, "error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
    if isinstance(error, ConfigError):
        facts["problems"] = [
            {"id": problem.id, "file": problem.place.file, "line": problem.place.line, "column": problem.place.column}
            | {"key": problem.key, "message": problem.message}
            for problem in error.problems
        ]
    return facts
