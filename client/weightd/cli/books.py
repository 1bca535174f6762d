"""`weightd verify --books`: the daemon's books beside what the kernel and the devices say."""

from __future__ import annotations

import typer

from weightd._sizes import size
from weightd.cli.context import OutputFormat, open_client
from weightd.cli.output import device as short_device
from weightd.cli.output import emit, emit_json, plural
from weightd.cli.tables import Column, emit_table, terminal_width
from weightd.inspection import BooksFigure

_COLUMNS = (
    Column("DEVICE"),
    Column("WHAT"),
    Column("BOOKS", right=True),
    Column("FOUND", right=True),
    Column("AGREES", colours={"NO": "red"}),
    Column("FOUND BY", spare=1),
)


def check_books(context: typer.Context, output: OutputFormat, socket: str | None, *, quiet: bool) -> None:
    """Print every figure, and exit with 1 where any two do not agree."""
    with open_client(context, socket) as client:
        figures = client.check_books()
    wrong = [figure for figure in figures if not figure.agrees]
    if output is OutputFormat.JSON:
        emit_json([figure._asdict() for figure in figures])
    elif not quiet:
        emit_table(_COLUMNS, [_row(figure) for figure in figures], terminal_width(wide=False))
        emit("")
        emit(
            f"{len(wrong)} of {plural(len(figures), 'figure')} do not agree: restart the daemon, and report this"
            if wrong
            else f"{plural(len(figures), 'figure')} agree"
        )
    if wrong:
        raise typer.Exit(1)


def _row(figure: BooksFigure) -> list[str]:
    show = size if figure.in_bytes else str
    found = "unknown" if figure.found is None else show(figure.found)
    agrees = "unknown" if figure.found is None else "yes" if figure.agrees else "NO"
    return [short_device(figure.device) if figure.device else "daemon", figure.what, show(figure.books), found, agrees,
            figure.source]  # fmt: skip
