"""The verb that serves models."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from raytune.cli.group import as_json_option, debug_option, examples
from raytune.cli.models import adapters_by_name, model_argument, model_options
from raytune.cli.say import say
from raytune.cli.supervise import begin_on
from raytune.config.sections.training import Precision
from raytune.errors import UserError
from raytune.launch.cluster.address import named_address

_VLLM = (
    "raytune does not start vLLM. It writes the file by which Ray Serve does, on machines with GPUs where ray[llm] is "
    "installed: raytune serve MODEL --engine vllm --instance TYPE --dry-run > vllm.yaml, and there serve run vllm.yaml. It asks "
    "for no token, and listens on 127.0.0.1."
)


@click.command(
    epilog=examples(
        "serve runs/support-bot",
        "serve ./Qwen3-8B --adapter terse=runs/a/model --adapter polite=runs/b/model --replicas 2",
        "serve runs/support-bot --adapters-in /shared/runs --token-file ~/.raytune-token --host 0.0.0.0",
    )
)
@model_argument
@model_options
@click.option("--host", default="127.0.0.1", help="Where to listen. Default: 127.0.0.1, which only this machine reaches.")
@click.option("--port", type=click.IntRange(min=0, max=65535), default=8000, help="Default: 8000; 0: any that is free.")
@click.option("--replicas", type=click.IntRange(min=1), default=1, help="Processes that hold the models. Default: 1.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the token. Default: RAYTUNE_API_KEY, else new.",
)
@click.option("--max-batch", type=click.IntRange(min=1), default=32, help="Answers that a replica writes at once. Default: 32.")
@click.option(
    "--max-waiting", type=click.IntRange(min=1), default=256, help="That wait in each replica; more get 429. Default: 256."
)
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=600.0, help="Seconds per answer. Default: 600.")
@click.option("--adapters-in", multiple=True, metavar="FOLDER", help="Folder that adapters may be loaded from at run time.")
@click.option("--address", help="Ray cluster instead of the run's, as cluster.address; here: one inside this machine.")
@click.option("--engine", type=click.Choice(["embedded", "vllm"]), default="embedded", help="Default: embedded, in raytune.")
@click.option("--instance", metavar="TYPE", help="Type of the nodes that vLLM is planned for, as cluster.instance.")
@click.option("--dry-run", is_flag=True, help="Start nothing: print what would be served; for vLLM, the file that starts it.")
@as_json_option
@debug_option
def serve(
    model: str,
    adapters: Sequence[str],
    base: str | None,
    template: str,
    dtype: Precision | None,
    trust_remote_code: bool,
    token_file: Path | None,
    adapters_in: Sequence[str],
    engine: str,
    instance: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve models to clients of OpenAI's API, until Ctrl-C: base, tuned model and adapters, each by its name.

    MODEL_OR_RUN is the folder of a finished run, or any folder that plain transformers or PEFT loads. Whoever asks needs the
    token that is printed, or the one in RAYTUNE_API_KEY or --token-file; off this machine one of these is needed. Answers that
    are being written when Ctrl-C comes are written to their end, for up to half a minute.

    vLLM is planned and not started: with --engine vllm --dry-run, a file is printed by which Ray Serve starts it on GPUs
    (`serve run FILE`, where ray[llm] is installed).
    """
    from raytune.launch.asking.models_to_ask import Named
    from raytune.serving.access import TOKEN_VARIABLE, token_in
    from raytune.serving.endpoint import ServeOptions, prepare_serving, start_serving, would_serve
    from raytune.serving.vllm import vllm_yaml

    named = Named(
        model=model,
        base=base,
        adapters=adapters_by_name(adapters),
        template=template,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if engine == "vllm":
        if not dry_run:
            raise UserError(_VLLM)
        how_many = {name: options[name] for name in ("replicas", "max_batch", "max_waiting")}
        say(vllm_yaml(named, instance=instance, **how_many), nl=False)
        return
    if instance is not None:
        raise UserError("--instance says what vLLM is planned for; the embedded engine looks at the machines that it has.")
    token = token_in(token_file) if token_file else os.environ.get(TOKEN_VARIABLE)
    prepared = prepare_serving(named, ServeOptions(adapters_in=tuple(adapters_in), **options), token)
    if dry_run:
        found = would_serve(prepared)
        say(json.dumps(found.to_json()) if as_json else "\n".join(found.lines))
        return
    begin_on(named_address(prepared.cluster))
    with start_serving(prepared) as endpoint:
        facts = {"url": endpoint.url, "models": list(endpoint.models)} | ({} if token else {"token": endpoint.token})
        say(json.dumps(facts) if as_json else "\n".join(_lines(facts)))
        sys.stdout.flush()
        try:
            endpoint.wait()
        except KeyboardInterrupt:
            say("No more requests are taken; answers that are being written end.", err=True)
            raise


def _lines(facts: dict[str, Any]) -> list[str]:
    return [
        f"models   {', '.join(facts['models'])}",
        f"export OPENAI_BASE_URL={facts['url']}",
        *([f"export OPENAI_API_KEY={facts['token']}"] if "token" in facts else []),
        "Ctrl-C ends it.",
    ]
