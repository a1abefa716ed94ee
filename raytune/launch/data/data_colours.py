"""Rows as they are trained, in the colours of a terminal."""

from rich.table import Table
from rich.text import Text

from raytune.launch.data.data_preview import WEIGHT_WORDS, DataPreview, heading, written
from raytune.launch.data.live import PlainConsole


def show_in_colours(shown: DataPreview) -> bool:
    """Print rows on standard output, if that is a terminal with colours (NO_COLOR asks for none); whether it is one."""
    console = PlainConsole()
    if not console.is_terminal or console.no_color or console.color_system is None:
        return False
    console.print(Text.assemble(("What is trained is green", "bold green"), ", special tokens are underlined; ", WEIGHT_WORDS))
    for document in shown.documents:
        console.print(Text(f"\n{heading(document)}", "bold"))
        table = Table.grid(padding=(0, 1))
        table.add_column(justify="right", style="cyan", no_wrap=True, min_width=9)
        table.add_column(overflow="fold")
        for role, pieces in document.turns:
            text = Text()
            for piece in written(pieces):
                style = "green" if piece.is_target else "bright_black"
                text.append(f"{piece.weight} " if piece.weight else "", "yellow")
                text.append(piece.text, f"{style} underline" if piece.is_special else style)
            text.rstrip_end(len(text.plain.removesuffix("\n")))
            table.add_row(role, text)
        console.print(table)
        if document.num_hidden:
            console.print(f"… {document.num_hidden} more tokens")
    for line in (*shown.lost, *shown.notes):
        console.print(line)
    return True
