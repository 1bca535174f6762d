"""Progress bars on stderr, if stderr is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from weightd.cli.output import printable

Advance = Callable[[str, int, int], None]
"""Called with the current phase, bytes done and total bytes."""


@contextmanager
def byte_bar(*, quiet: bool) -> Iterator[Advance | None]:
    """Show a bar while the block runs, and remove it afterwards; None if stderr is not a terminal, or with `quiet`."""
    console = Console(stderr=True, highlight=False)
    if quiet or not console.is_terminal:
        yield None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)
        current = ""

        def advance(what: str, done: int, total: int) -> None:
            nonlocal current
            if what != current:  # each phase counts its bytes, and so its speed, from nothing
                current = what
                bar.reset(task, description=escape(printable(what)))
            bar.update(task, completed=done, total=total or None)

        yield advance
