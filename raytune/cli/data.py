"""Verbs that look at rows or make some: data check, data preview, data rank, data reword. They train nothing."""

import json
from typing import TYPE_CHECKING, Any, get_args

import click

from raytune.cli.group import as_json_option, debug_option, examples, files_and_overrides, load_run, run_arguments
from raytune.cli.models import drawing_options, one_model_options
from raytune.cli.say import say
from raytune.cli.supervise import begin_on
from raytune.config.sections.augment import Part
from raytune.errors import EXIT_REFUSED

if TYPE_CHECKING:
    from raytune.config.sections.run import RunConfig


@click.group()
def data() -> None:
    """Look at rows: what becomes of all of a run's, how single ones are trained, which to annotate; and word them anew."""


@data.command(
    "check",
    epilog=examples(
        "data check run.yaml",
        "data check run.yaml --rows 10000 data.max_length=4096",
        "data check model.base=./base data.train=rows.jsonl --json",
    ),
)
@run_arguments
@click.option("--rows", "max_rows", type=click.IntRange(1), metavar="N", help="Look at the first rows of each source only.")
@as_json_option
@debug_option
def data_check(arguments: tuple[str, ...], max_rows: int | None, as_json: bool) -> None:
    """Tokenise the rows of a run and report on them: counts, tokens per source, lengths, and the verdict of each limit.

    Trains nothing and plans nothing. What is tokenised stays in the folder of the stores, where `train` finds it; not with
    --rows. Exit code 2: a limit of data.limits is exceeded, so that a run would stop.
    """
    from raytune.launch.cluster.address import named_address
    from raytune.launch.data.data_check import check_data

    config = _named_run(arguments)
    begin_on(named_address(config.cluster))
    found = check_data(config, max_rows)
    say(json.dumps(found.to_json()) if as_json else str(found))
    if found.is_refused:
        click.get_current_context().exit(EXIT_REFUSED)


@data.command(
    "preview",
    epilog=examples(
        "data preview run.yaml",
        "data preview run.yaml --rows 10 --source chats --page rows.html",
        "data preview run.yaml --row rows.jsonl:17",
    ),
)
@run_arguments
@click.option("--rows", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="The first rows of each source.")
@click.option("--source", metavar="NAME", help="Of this source only, also one that is held out. Default: all that are trained.")
@click.option("--row", metavar="FILE:LINE", help="This row only, named as messages about rows name it.")
@click.option("--page", metavar="FILE.html", help="Write a page instead: one file, without anything from elsewhere.")
@as_json_option
@debug_option
def data_preview(
    arguments: tuple[str, ...], rows: int, source: str | None, row: str | None, page: str | None, as_json: bool
) -> None:
    """Show rows as they are trained: their tokens as text, which of them are targets and what they count, and whose turn it is.

    In a terminal targets are green, in a pipe or with NO_COLOR they stand in brackets. Trains nothing, leaves nothing.
    """
    from raytune.launch.data.data_preview import preview_data

    config = _named_run(arguments)
    shown = preview_data(config, rows=rows, source=source, row=row)
    if page is not None:
        from raytune.report.preview_page import write_preview_page

        page = write_preview_page(page, config.name, shown)
    if as_json:
        say(json.dumps(shown.to_json() | {"page": page}))
    elif page is not None:
        say(f"page       {page}")
    else:
        from raytune.launch.data.data_colours import show_in_colours

        if not show_in_colours(shown):
            say(str(shown))


@data.command(
    "rank",
    epilog=examples(
        "data rank runs/support-bot unlabelled.jsonl --top 200 --output to-annotate.jsonl",
        "data rank runs/support-bot 'logs/*.jsonl' --columns prompt=question --top 50 --output next.jsonl --address here",
    ),
)
@click.argument("run")
@click.argument("rows", nargs=-1, required=True)
@click.option("--top", type=click.IntRange(min=1), default=100, show_default=True, help="Rows that are written.")
@click.option("--output", metavar="FILE", required=True, help="A line of JSON per row. It must not be there yet.")
@click.option("--format", "row_format", help="How rows are read, as data.train.format. Default: recognised by their columns.")
@click.option("--columns", metavar="NAME=COLUMN,...", help="As data.train.columns: prompt=question.")
@click.option("--max-rows", type=click.IntRange(min=1), help="Rank the first rows only, of each of ROWS.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option("--address", help="Ray cluster instead of the run's, as cluster.address; here: one inside this machine.")
@as_json_option
@debug_option
def data_rank(
    run: str,
    rows: tuple[str, ...],
    top: int,
    output: str,
    row_format: str | None,
    columns: str | None,
    max_rows: int | None,
    max_new_tokens: int,
    address: str | None,
    as_json: bool,
) -> None:
    """Rank rows without answers by how unsure the model of a run is of them, and write the first: those to annotate next.

    RUN is a finished run folder. ROWS are files, globs, folders or data sets, as in data.train. The model answers each row, and
    its uncertainty is the mean negative log-likelihood of its own answer's tokens.
    """
    from raytune.launch.asking.rank import rank
    from raytune.launch.asking.score import run_to_score
    from raytune.launch.cluster.address import named_address
    from raytune.launch.data.rows_to_score import columns_of, sources_of

    sources = sources_of(rows, row_format or "auto", max_rows, columns_of(columns))
    ranked = run_to_score(run, address)
    begin_on(named_address(ranked.cluster))
    ranking = rank(ranked, sources, top=top, output=output, max_new_tokens=max_new_tokens, address=address)
    say(json.dumps(ranking.to_json()) if as_json else "\n".join(ranking.lines))


@data.command(
    "reword",
    epilog=examples(
        "data reword run.yaml --model ./Qwen3-8B --ask 'Ask in other words: {content}' --output reworded.jsonl",
        "data reword run.yaml --model ./Qwen3-8B --ask 'Ask: {content}' --per-row 3 --temperature 0.8 --output more.jsonl",
        "data reword run.yaml --model runs/german --ask 'German: {content}' --part user --part assistant --output de.jsonl",
    ),
)
@run_arguments
@click.option("--model", metavar="MODEL_OR_RUN", required=True, help="Who is asked: what `raytune generate` takes.")
@click.option("--ask", metavar="TEXT", required=True, help="What it is asked: {content} stands for a text of the row.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(get_args(Part)),
    default=("user",),
    show_default=True,
    help="Which texts of a row get other words: turns of a role (also several), or text for plain documents.",
)
@click.option("--per-row", type=click.IntRange(min=1), default=1, show_default=True, help="Versions of each row.")
@click.option("--output", metavar="FILE.jsonl", required=True, help="A row per line, for data.train. It must not be there yet.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="So many rows only, drawn by --seed.")
@click.option("--system", metavar="TEXT", help="System message of the model that is asked.")
@one_model_options
@drawing_options
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Answers written at once.")
@click.option("--workers", type=click.IntRange(min=1), help="That answer at once. Default: the config's, or one per GPU or node.")
@click.option("--address", help="Ray cluster instead of the config's, as cluster.address; here: one inside this machine.")
@as_json_option
@debug_option
def data_reword(
    arguments: tuple[str, ...],
    ask: str,
    parts: tuple[Part, ...],
    per_row: int,
    output: str,
    limit: int | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    batch_size: int,
    workers: int | None,
    address: str | None,
    as_json: bool,
    **named: Any,
) -> None:
    """Have a model put training rows into other words, and write them as further rows.

    What is held out for validation, a fold or the test is not asked about. Each new row holds the row that it was made of, and
    is trained exactly where that is, in every split. Answers that are empty, cut, unchanged, repeated or have control tokens
    are left out, and counted. Finished chunks are kept beside the output, and the same command goes on with the rest.
    """
    from raytune.evaluation.sampling import sampling_plan
    from raytune.launch.asking.generate import HowToAnswer
    from raytune.launch.asking.models_to_ask import Named, models_to_ask
    from raytune.launch.asking.reword import HowToReword, prepare_rewording, reword
    from raytune.launch.cluster.address import named_address

    sampling = sampling_plan(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    answering = HowToAnswer(max_new_tokens=max_new_tokens, sampling=sampling, batch_size=batch_size, system=system)
    how = HowToReword(ask=ask, parts=parts, per_row=per_row, limit=limit, seed=seed, answering=answering)
    to_ask = models_to_ask(Named(**named))  # before the config is read, which has a base of its own, and another fault
    prepared = prepare_rewording(_named_run(arguments), to_ask, how, address=address, workers=workers)
    begin_on(named_address(prepared.to_answer.cluster))
    rewording = reword(prepared, output)
    say(json.dumps(rewording.to_json()) if as_json else "\n".join(rewording.lines))


def _named_run(arguments: tuple[str, ...]) -> "RunConfig":
    from raytune.config.checks.asked import require_named
    from raytune.config.load import as_one_run

    config, places = load_run(*files_and_overrides(arguments), check_files=True)
    return require_named(as_one_run(config), places=places)
