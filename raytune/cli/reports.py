"""Verbs that show what runs came to: report, compare."""

import json

import click

from raytune.cli.group import as_json_option, debug_option, examples
from raytune.cli.say import say


@click.command(epilog=examples("report runs/quickstart", "report s3://bucket/runs/support-bot --json"))
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@as_json_option
@debug_option
def report(runs: tuple[str, ...], as_json: bool) -> None:
    """Write the page of a run, report.html in its folder: finished, failed, or still at work. Says what looks wrong with it.

    RUN is a run folder. A run writes its page at its end by itself; a sweep writes its own, and those of its trials. The page is
    one file that needs neither network nor server. Of a finished run the card of its model, model/README.md, is written too,
    unless somebody has edited it.
    """
    from dataclasses import asdict

    from raytune.report.at_end import leave_card
    from raytune.report.run_page import write_run_page
    from raytune.report.run_seen import RunSeen

    for path in runs:
        seen = RunSeen.read(path)
        page, card, symptoms = write_run_page(path), leave_card(seen.folder), seen.symptoms
        if as_json:
            facts = {"run": seen.folder.path, "state": seen.record.state, "step": seen.last_step, "report": page}
            facts |= {"model_card": card}
            say(json.dumps(facts | {"words": seen.words, "symptoms": [asdict(symptom) for symptom in symptoms]}))
            continue
        for sentence in seen.words:
            say(sentence)
        for symptom in symptoms:
            say(symptom.sentence)
        say(f"report   {page}")
        if card:
            say(f"card     {card}")


@click.command(epilog=examples("compare runs/a runs/b", "compare runs/* --output compared.html"))
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--output", metavar="FILE", help="Write a page as well, with the curves of all of them.")
@as_json_option
@debug_option
def compare(runs: tuple[str, ...], output: str | None, as_json: bool) -> None:
    """Put runs side by side: what was asked otherwise first, then losses, scores, time, dollars, memory and speed.

    RUN is a run folder, finished or not; runs/* names all runs of a storage. A star marks the best of a row.
    """
    from raytune.report.compare_page import write_compare_page
    from raytune.report.comparison import RunComparison

    compared = RunComparison.read(runs)
    page = write_compare_page(compared, output) if output else None
    if as_json:
        say(json.dumps(compared.to_json() | {"page": page}))
        return
    say(compared.text)
    if page:
        say(f"page     {page}")
