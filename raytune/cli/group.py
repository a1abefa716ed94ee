"""The group that verbs belong to: how errors are answered, and the arguments and options that verbs share."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

import raytune
from raytune.cli.say import say
from raytune.credentials import redacted
from raytune.errors import RaytuneError, UserError
from raytune.missing import is_ours, missing_package
from raytune.printable import PrintableFormatter

if TYPE_CHECKING:
    from raytune.config.problems import Place
    from raytune.config.sections.run import RunConfig

EXIT_INTERRUPTED = 130

_WRITTEN = "raytune.written"

_OVERRIDE = re.compile(r"\w[\w.-]*=", re.ASCII)


class Verbs(click.Group):
    """Answers an error that raytune knows with its message and exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        if logging.lastResort is not None:  # where warnings go that nobody else handles
            logging.lastResort.setFormatter(PrintableFormatter())
        try:
            return super().invoke(ctx)
        except RaytuneError as error:
            if isinstance(error, UserError) and _WRITTEN in ctx.meta:
                from raytune.config.words.places import locate

                locate(error, *ctx.meta[_WRITTEN])
            if ctx.meta.get("debug"):
                raise
            if ctx.meta.get("as_json"):
                say(json.dumps(_error_facts(error)))
            else:
                say(redacted(str(error)), err=True)
            ctx.exit(error.exit_code)
        except ModuleNotFoundError as error:
            if ctx.meta.get("debug") or is_ours(error):
                raise
            missing = UserError(missing_package(error))
            if ctx.meta.get("as_json"):
                say(json.dumps(_error_facts(missing)))
            else:
                say(str(missing), err=True)
            ctx.exit(missing.exit_code)
        except KeyboardInterrupt as interrupt:
            say(str(interrupt) or "interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)


def examples(*commands: str) -> str:
    """The end of a verb's help: commands as one would type them, behind `raytune`."""
    return "\n".join(["\b", "Examples:", *(f"  raytune {command}" for command in commands)])


def files_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell `key.sub=value` from file names; a file whose name looks like an override is written `./a=b.yaml`."""
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    return [argument for argument in arguments if not _OVERRIDE.match(argument)], overrides


def load_run(
    files: Sequence[str], overrides: Sequence[str], *, check_files: bool = False
) -> "tuple[RunConfig, Mapping[str, Place]]":
    """The config that a verb is given, and where its keys were written: errors that end the verb will say so."""
    from raytune.config.load import load_with_places

    config, places = load_with_places(files, overrides, check_files=check_files)
    click.get_current_context().meta[_WRITTEN] = config, places
    return config, places


def _remember(ctx: click.Context, option: click.Parameter, value: bool) -> bool:
    ctx.meta[str(option.name)] = value
    return value


def _print_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        say(f"raytune {raytune.__version__}")
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

    facts = {"ok": False, "error": type(error).__name__, "message": redacted(str(error)), "exit_code": error.exit_code}
    if isinstance(error, UserError) and error.place:
        facts["place"], _, facts["key"] = error.place.partition("  ")
    if isinstance(error, ConfigError):
        facts["problems"] = [
            {"id": problem.id, "file": problem.place.file, "line": problem.place.line, "column": problem.place.column}
            | {"key": problem.key, "message": problem.message}
            for problem in error.problems
        ]
    return facts
