"""Progress bars on stderr, if stderr is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from weightd._sizes import size
from weightd.cli.output import printable

Advance = Callable[[str, int, int], None]
"""Called with the current phase, bytes done and total bytes."""


class _Bytes(ProgressColumn):
    """`12.0 MiB of 2.25 GiB, 520 MiB/s`, in the units of every other size."""

    def render(self, task: Task) -> Text:
        whole = "" if task.total is None else f" of {size(int(task.total))}"
        speed = task.finished_speed or task.speed
        rate = "" if speed is None else f", {size(int(speed))}/s"
        return Text(f"{size(int(task.completed))}{whole}{rate}", style="progress.download")


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
        _Bytes(),
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
