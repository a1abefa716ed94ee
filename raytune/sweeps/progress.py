"""A sweep as a person sees it in a terminal."""

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from raytune.sweeps.results import SweepResult, result_table, summary

MOST_ROWS = 30


def show_sweep_result(result: SweepResult, console: Console | None = None) -> None:
    """Print the ranked table, why trials failed, and the sweep in three sentences."""
    console = console or Console()
    headings, rows = result_table(result)
    words = {"trial", "state"}
    columns = [Column(heading, justify="left" if heading in words else "right", overflow="fold") for heading in headings]
    table = Table(*columns, title=f"{result.name}: {len(result.trials)} trials", title_justify="left")
    for row, trial in list(zip(rows, result.trials))[:MOST_ROWS]:
        style = "bold" if trial is result.best else "dim" if trial.state == "failed" else None
        table.add_row(*(Text(cell) for cell in row), style=style)  # Text: a value such as "[red]" is no markup
    console.print(table)
    if len(rows) > MOST_ROWS:
        console.print(f"{len(rows) - MOST_ROWS} more in {result.folder}/trials.csv", highlight=False, soft_wrap=True)
    for trial in result.trials:
        if trial.state == "failed":
            cause = (trial.cause or "no cause was recorded").strip().splitlines()[0]
            console.print(Text(f"{trial.trial.name} failed: {cause}"), soft_wrap=True)
    for sentence in summary(result):
        console.print(Text(sentence), soft_wrap=True)
