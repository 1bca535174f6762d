"""The command `plan` computes savings from files alone. It needs neither a running daemon nor a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from weightd.cli.context import (
    CommandOptions,
    FormatOption,
    HtmlOption,
    IndexOption,
    OutputFormat,
    VariantOption,
    WideOption,
    WorkloadOption,
    say,
)
from weightd.cli.daemon import require_daemon
from weightd.cli.output import emit_json
from weightd.cli.plan_page import require_writable, write_report
from weightd.cli.plan_tables import PlanTables, print_total
from weightd.cli.programs import ask
from weightd.cli.progress import byte_bar
from weightd.cli.tables import terminal_width
from weightd.errors import InvalidReferenceError
from weightd.plan_report import read_report


def plan(
    context: typer.Context,
    references: Annotated[
        list[str] | None,
        typer.Argument(metavar="REF", help="Files, directories or org/name[@revision]; folders with --scan."),
    ] = None,
    manifest: WorkloadOption = None,
    scan: Annotated[
        bool,
        typer.Option(
            "--scan", help="Find the checkpoints below folders [default: the Hugging Face cache], each its own."
        ),
    ] = False,
    headers: Annotated[
        bool,
        typer.Option(
            "--headers", help="Read only headers; figures are then upper bounds, since no bytes are compared."
        ),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="SIZE", help="Report what fits this much memory, such as 24GiB, in which order."
        ),
    ] = None,
    html: HtmlOption = None,
    variant: VariantOption = None,
    state_dir: IndexOption = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir",
            metavar="DIR",
            help="Where --scan keeps what it hashed [default: $XDG_CACHE_HOME/weightd/plan].",
        ),
    ] = None,
    output: FormatOption = OutputFormat.TABLE,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the total.")] = False,
    wide: WideOption = False,
) -> None:
    """Report what sharing would save, without a daemon.

    REF is a safetensors or GGUF file, a directory with the weights of one model or pipeline, or org/name[@revision] in
    the local Hugging Face cache. A directory that contains several models is refused without --scan.

    With --scan, checkpoints that cannot be read are skipped and listed. After Ctrl-C, run it again: what it has hashed
    is not read again.

    \b
    Examples:
      weightd plan base.safetensors tuned.safetensors
      weightd plan org/base org/tuned --format json
      weightd plan --manifest workload.json
      weightd plan --scan ~/models --budget 24GiB --html report.html
      weightd plan --scan --headers
    """
    if not (references or manifest or scan):
        raise typer.BadParameter("give at least one reference, --manifest or --scan", param_hint="REF")
    if scan and variant is not None:
        raise typer.BadParameter("name the references of a variant instead of scanning", param_hint="--variant")
    require_daemon("plan")
    if html is not None:
        require_writable(html)
    settings: CommandOptions = context.obj
    arguments = [f"--manifest={file}" for file in manifest or ()]
    arguments += [] if state_dir is None else [f"--state-dir={state_dir}"]
    arguments += [] if variant is None else [f"--variant={variant}"]
    arguments += [] if budget is None else [f"--budget={budget}"]
    arguments += ["--headers"] if headers else []
    arguments += ["--scan"] if scan else []
    if scan and (kept := cache_dir or _cache_dir()):
        arguments.append(f"--kept={kept}")
    arguments += ["--debug"] if settings.debug else []
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    with byte_bar(quiet=quiet) as advance:

        def show(what: str, done: int, total: int) -> None:
            if advance is not None:
                advance(what, done, total)

        command = [*arguments, "--", *(references or ())]
        try:
            found: dict[str, Any] = ask("weightd_daemon.planning", command, show, note)["plan"]
        except InvalidReferenceError as error:
            if scan or not any(map(os.path.isdir, references or ())):
                raise
            raise InvalidReferenceError(f"{error}; --scan plans every checkpoint below a folder") from error
    if html is not None:
        write_report(html, found, notes)
    if output is OutputFormat.JSON:
        emit_json(found)
        return
    report = read_report(found)
    width = terminal_width(wide=wide)
    if not quiet:
        PlanTables(report, width).print()
    print_total(report, width)


def _cache_dir() -> Path | None:
    """Where digests are kept: `$XDG_CACHE_HOME/weightd/plan`, by default below `~/.cache`; None without a home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folder = cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")
    return Path(folder, "weightd", "plan") if os.path.isabs(folder) else None
