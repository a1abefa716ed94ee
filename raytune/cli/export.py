"""Verbs that make files for others of what was trained: merge, export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from raytune.cli.group import as_json_option, debug_option, examples
from raytune.cli.say import say
from raytune.config.sections.training import Precision
from raytune.plan.saved.combination import CombinationKind, MajoritySign, asked_combination
from raytune.plan.saved.rewriting import ExportDtype, ExportFormat
from raytune.units import parse_size


def _size(_context: click.Context, _option: click.Parameter, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _numbers(_context: click.Context, _option: click.Parameter, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"expected numbers with commas between them, such as 0.7,0.3, got {text!r}") from error


_OF_BASES = (
    click.option("--base", help="Base model, if not the one that the adapter names: a folder, a hub id, or demo."),
    click.option(
        "--original-base",
        is_flag=True,
        help="QLoRA: merge into the original weights, not into the quantised ones that training saw.",
    ),
    click.option("--any-base", is_flag=True, help="Merge though the base's files are not those that the adapter was trained on."),
    click.option("--trust-remote-code", is_flag=True, help="Run the Python code that comes with the base."),
    click.option(
        "--max-shard",
        callback=_size,
        default="5GiB",
        show_default=True,
        help="Size of a file of weights at most; memory holds one.",
    ),
    click.option("--dry-run", is_flag=True, help="Say what it takes of memory and disk; write nothing."),
)


def _of_bases(verb: Callable) -> Callable:
    """The options of bases, in their order."""
    for option in reversed(_OF_BASES):
        verb = option(verb)
    return verb


@click.command(
    epilog=examples(
        "merge runs/support-bot/model --output runs/support-bot/merged",
        "merge runs/support-bot/model --output merged --dtype bf16 --base /models/Qwen3-8B",
        "merge runs/a/model runs/b/model --weights 0.7,0.3 --output both",
        "merge runs/a/model runs/b/model --combination ties --density 0.5 --as-adapter --output both",
    )
)
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the result; new or empty.")
@click.option("--weights", callback=_numbers, help="Of several adapters, such as 0.7,0.3. Default: equal shares of 1.")
@click.option(
    "--combination",
    type=click.Choice(get_args(CombinationKind)),
    help="How several become one, in PEFT's words. Default: cat, the exact weighted sum of what they add.",
)
@click.option("--density", type=float, help="TIES, DARE, pruning: share of the numbers that is kept.")
@click.option("--seed", type=int, help="DARE: of the numbers that are dropped by chance.")
@click.option("--rank", type=int, help="Kinds that end in svd: rank of the result. Default: the largest of the adapters.")
@click.option("--majority-sign", type=click.Choice(get_args(MajoritySign)), help="TIES: whose sign counts. Default: total.")
@click.option("--as-adapter", is_flag=True, help="Write an adapter that plain PEFT loads, not a whole model.")
@click.option("--dtype", type=click.Choice(get_args(Precision)), help="Dtype of the result. Default: that of the base.")
@_of_bases
@as_json_option
@debug_option
def merge(
    adapters: tuple[Path, ...],
    output: Path,
    weights: list[float] | None,
    combination: str | None,
    density: float | None,
    seed: int | None,
    rank: int | None,
    majority_sign: str | None,
    as_adapter: bool,
    dtype: Any,
    base: str | None,
    original_base: bool,
    any_base: bool,
    trust_remote_code: bool,
    max_shard: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Merge adapters into their base, shard by shard, as a stand-alone model with tokenizer and chat template.

    Several LoRA adapters of one base are combined first, by PEFT's arithmetic; with --as-adapter that is the result. `raytune
    explain exporting` says what the kinds of combination are, and what is refused.
    """
    asked = asked_combination(len(adapters), combination, weights, density, seed, rank, majority_sign)
    if dry_run:
        from raytune.model.files.rewriting import merging_of
        from raytune.model.parts.dtypes import DTYPES

        need = merging_of(adapters, base, DTYPES.get(dtype), max_shard)
        say(json.dumps(need.to_json()) if as_json else need.sentence)
        return
    from raytune.model.merging.combine import merge_adapters

    merge_adapters(
        adapters,
        output,
        asked,
        as_adapter=as_adapter,
        base=base,
        dtype=dtype,
        dequantise=not original_base,
        any_base=any_base,
        trust_remote_code=trust_remote_code,
        max_shard_bytes=max_shard,
    )
    if as_json:
        say(json.dumps({"adapter_path" if as_adapter else "model_path": str(output.resolve())}))
    else:
        say(f"{'combined adapter' if as_adapter else 'merged model'}: {output}")


@click.command(
    epilog=examples(
        "export runs/support-bot --output shipped",
        "export runs/support-bot --format gguf --dtype q8_0 --output support-bot-gguf",
        "export ./Qwen3-8B --format awq-ready --calibration rows.jsonl --output Qwen3-8B-awq-ready",
    )
)
@click.argument("model")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the files; new or empty.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(get_args(ExportFormat)),
    default="safetensors",
    show_default=True,
    help="Of the files.",
)
@click.option(
    "--dtype",
    type=click.Choice(get_args(ExportDtype)),
    help="Of the weights; q8_0 for gguf. Default: as they are stored, for awq-ready in 16 bits.",
)
@click.option("--converter", metavar="FILE", help="gguf: convert_hf_to_gguf.py of your llama.cpp, to write it instead.")
@click.option("--calibration", metavar="ROWS", help="awq-ready: rows, as in data.train. Default: the training rows of the run.")
@click.option("--rows", "num_rows", type=click.IntRange(min=1), help="awq-ready: how many of them at most. Default: 512.")
@_of_bases
@as_json_option
@debug_option
def export(
    model: str,
    output: Path,
    file_format: Any,
    dtype: Any,
    converter: str | None,
    calibration: str | None,
    num_rows: int | None,
    base: str | None,
    original_base: bool,
    any_base: bool,
    trust_remote_code: bool,
    max_shard: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a model as files that others load, read back before they get their name.

    MODEL is the folder of a finished run, of a whole model, or of an adapter, which is merged into its base first. `raytune
    explain exporting` says what each format holds, and of which models.
    """
    from raytune.launch.export.export import ExportOptions, export_need
    from raytune.launch.export.export import export as export_model

    options = ExportOptions(
        format=file_format,
        dtype=dtype,
        max_shard_bytes=max_shard,
        base=base,
        dequantise=not original_base,
        any_base=any_base,
        trust_remote_code=trust_remote_code,
        converter=converter,
        calibration=calibration,
        num_rows=num_rows,
    )
    if dry_run:
        need = export_need(model, options)
        say(json.dumps(need.to_json()) if as_json else need.sentence)
        return
    exported = export_model(model, output, options)
    say(json.dumps(exported.to_json()) if as_json else "\n".join(exported.lines))
