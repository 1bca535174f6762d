"""Code that all commands share: settings of this run, common options, the connection, one-line errors."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightd.cli.output import printable
from weightd.errors import DaemonUnreachableError, NotFoundError, WeightdError
from weightd.resolve import Resolved, reference_name, resolve

if TYPE_CHECKING:
    from weightd.client import Client

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class CommandInterruptedError(Exception):
    """Ctrl-C while the command waited for the daemon; the message states what the daemon does next."""


class OutputFormat(StrEnum):
    """Output format of a command's listing: table or JSON."""

    TABLE = "table"
    JSON = "json"


_ANSWER_SECONDS = 2.0
"""How long a shell waits for the daemon's part of a completion."""


def _answer(context: typer.Context, question: Callable[[Client], Iterable[str]], begin: str) -> list[str]:
    """Ask the daemon what may complete a word that begins with `begin`; nothing if it does not answer in time."""
    outer = None if context.parent is None else context.parent.params.get("socket")
    answer: list[str] = []

    def ask() -> None:
        with contextlib.suppress(Exception), connect(context.params.get("socket") or outer) as client:
            answer.extend(question(client))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS)
    return sorted({word for word in answer if word.startswith(begin) and word.isprintable()})


def checkpoint_names(context: typer.Context, incomplete: str) -> list[str]:
    """Complete a name of a checkpoint."""
    return _answer(context, lambda client: [name.name for name in client.names()], incomplete)


def device_names(context: typer.Context, incomplete: str) -> list[str]:
    """Complete a device that the daemon serves."""
    return _answer(context, lambda client: [device.uuid for device in client.stats().devices], incomplete)


SocketOption = Annotated[
    str | None,
    typer.Option(
        "--socket", metavar="PATH", help="Socket of the daemon [default: $WEIGHTD_SOCKET, else the standard paths]."
    ),
]
FormatOption = Annotated[
    OutputFormat, typer.Option("--format", metavar="table|json", help="Output format; JSON sizes are in bytes.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the identifier of each row.")]
SilentOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")]
WideOption = Annotated[
    bool,
    typer.Option(
        "--wide", "-w", "--no-trunc", help="Print everything in full: all columns, names, paths, digests and devices."
    ),
]
_DEVICES = "host, cuda, cuda:N, or a GPU's UUID or a prefix of it"
LoadDeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        "-d",
        metavar="DEVICE",
        autocompletion=device_names,
        help=f"{_DEVICES} [default: the daemon's only GPU, or host].",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        "-d",
        metavar="DEVICE",
        autocompletion=device_names,
        help=f"{_DEVICES} [default: the device that has the checkpoint].",
    ),
]
VariantOption = Annotated[
    str | None,
    typer.Option(
        "--variant", metavar="NAME", help="Select a variant's weights in a directory or repository, such as fp16."
    ),
]
WorkloadOption = Annotated[
    list[str] | None,
    typer.Option("--manifest", metavar="FILE", help="Plan the checkpoints of a workload manifest; repeatable."),
]
HtmlOption = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML file, too.")
]
IndexOption = Annotated[
    str | None,
    typer.Option("--state-dir", metavar="DIR", help="Directory of the digest index [default: as for `serve`]."),
]
ReferenceArgument = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        autocompletion=checkpoint_names,
        help="Name, content digest, file, directory or org/name[@revision].",
    ),
]
ReferencesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="REF",
        autocompletion=checkpoint_names,
        help="Names, content digests, files, directories or org/name[@revision].",
    ),
]


def say(message: str) -> None:
    """Write `message` to stderr as one line, with control characters escaped."""
    sys.stderr.write(f"weightd: {printable(message)}\n")


class _Saying(logging.Handler):
    """Writes records as lines to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def require(command: str, packages: Iterable[str], extra: str) -> None:
    """Exit with an error that names the extra if a package is not installed that the command needs."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        needed = ", ".join(missing)
        say(f"{command} needs {needed}, which is not installed: pip install '.[{extra}]' in weightd's checkout")
        raise typer.Exit(1)


@contextlib.contextmanager
def saying_what_is_chosen(*, quiet: bool) -> Iterator[None]:
    """Report on stderr which files are selected that the user did not name, and which remembered groups are ignored.

    With `quiet`, report nothing.
    """
    handler = logging.NullHandler() if quiet else _Saying()
    logs = [logging.getLogger(name) for name in ("weightd.resolve", "weightd.remembered")]
    before = [(log.level, log.propagate) for log in logs]
    for log in logs:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    try:
        yield
    finally:
        for log, (level, propagate) in zip(logs, before, strict=True):
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate


@dataclass(slots=True)
class CommandOptions:
    """Global options of this run of the command; `report` and `trace` follow them."""

    socket: str | None = None
    debug: bool = False

    def trace(self, error: BaseException) -> None:
        """With --debug, write the traceback of `error` to stderr."""
        if self.debug:
            sys.stderr.write("".join(traceback.format_exception(error)))

    def report(self, error: WeightdError) -> None:
        """Write `error` as one line to stderr, after its traceback with --debug."""
        self.trace(error)
        say(str(error))


def connect(socket: str | None, *, read_only: bool = False) -> Client:
    """Connect to the daemon at `socket` or at the standard paths; raises DaemonUnreachableError."""
    # Imported here, so that `weightd serve` and `--help` do not pay for the client.
    from weightd import connect as connect_client

    return connect_client(socket, read_only=read_only)


def open_client(context: typer.Context, socket: str | None, *, read_only: bool = False) -> Client:
    """Connect to the daemon; a `--socket` after the command's name wins over one before it."""
    settings: CommandOptions = context.obj
    return connect(socket or settings.socket, read_only=read_only)


def meant(reference: str, variant: str | None) -> str | Resolved:
    """Return the reference to look up: `reference` itself, or the files of a variant of it.

    If the files do not exist (any more), return the name that the variant would have. Errors: as weightd.resolve.
    """
    if variant is None:
        return reference
    try:
        return resolve(reference, variant)
    except NotFoundError:
        return reference_name(reference, variant)


def for_each(context: typer.Context, references: Iterable[str], action: Callable[[str], None]) -> int:
    """Call `action` for every reference, report each error at once, and return the first error's exit code, or 0.

    Stops at once if the daemon is unreachable: the remaining references would fail in the same way.
    """
    settings: CommandOptions = context.obj
    code = 0
    for reference in references:
        try:
            action(reference)
        except WeightdError as error:
            settings.report(error)
            code = code or error.exit_code
            if isinstance(error, DaemonUnreachableError):
                break
    return code
