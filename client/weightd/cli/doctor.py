"""The command `doctor` checks what weightd needs of this machine and of this user. It only looks."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

import weightd
from weightd.cli.context import CommandOptions, FormatOption, OutputFormat, SocketOption
from weightd.cli.health import asking, extras, gpus, kernel, reach, rlimits, service, storage
from weightd.cli.health.asking import Answer, Look
from weightd.cli.health.finding import AREAS, CHECKS, Finding, Status
from weightd.cli.output import emit, emit_json, printable
from weightd.cli.unit import OLDEST_SYSTEMD, systemd_version

_DIAGNOSIS = "weightd_daemon.diagnosis"
_DAEMON_LOOK = "weightd.cli.health.daemon_look"
_SYSTEMD = Path("/run/systemd/system")
_MOST_WIDTH = 120
_PIPED_WIDTH = 80
_LEAST_WIDTH = 60
_REMEDY = 14
_NOT_ASKED = Answer({}, "not asked: systemd does not run here")
_SYMBOLS = {Status.GOOD: "✔", Status.DOUBTFUL: "!", Status.BAD: "✘", Status.UNKNOWN: "?"}
_ASCII = {**_SYMBOLS, Status.GOOD: "+", Status.BAD: "x"}
_COLOURS = {Status.GOOD: "green", Status.DOUBTFUL: "yellow", Status.BAD: "bold red", Status.UNKNOWN: "cyan"}
_WORST = (Status.BAD, Status.DOUBTFUL, Status.UNKNOWN, Status.GOOD)


def doctor(
    context: typer.Context,
    output: FormatOption = OutputFormat.TABLE,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Leave out the checks that are good.")] = False,
    socket: SocketOption = None,
) -> None:
    """Check this machine and this user, and say what to do.

    Each check is good, doubtful, bad or unknown. A check that does not answer in 5 s is doubtful. Nothing is started,
    changed or written. The table of checks is in docs/operations.md.

    \b
    Exit codes: 0 if no check is bad; 1 if one is.

    \b
    Examples:
      weightd doctor                    every check
      weightd doctor -q                 only what is not good
      weightd doctor --socket PATH      the daemon at that socket
      weightd doctor --format json | jq '.checks[] | select(.status == "bad")'
    """
    settings: CommandOptions = context.obj
    found = examine(socket or settings.socket)
    if output is OutputFormat.JSON:
        emit_json(as_json(found))
    else:
        for line in report(found, quiet=quiet):
            emit(line)
    if any(finding.status is Status.BAD for finding in found):
        raise typer.Exit(1)


def examine(socket: str | None) -> list[Finding]:
    """Look at everything, and judge it; findings come in the order of AREAS."""
    named = [] if socket is None else [f"--socket={socket}"]
    booted = _SYSTEMD.is_dir()
    with contextlib.ExitStack() as stack:
        looks = [stack.enter_context(asking.python(_DAEMON_LOOK, look, *named)) for look in ("socket", "daemon")]
        managers = [stack.enter_context(Look(service.show(user=user))) for user in (False, True)] if booted else []
        reached, answered = (look.answer() for look in looks)
        daemon = answered.facts if answered.facts and not answered.facts["error"] else {}
        host, state = (
            stack.enter_context(asking.python(_DIAGNOSIS, look, *_about(daemon))) for look in ("host", "state")
        )
        there = gpus.presence()
        in_memory = host.answer()
        driver, nvml = _ask_driver(stack, in_memory) if there.module else (None, None)
        system, user = [manager.text() for manager in managers] or (_NOT_ASKED, _NOT_ASKED)
        systemd = service.Systemd(booted, systemd_version() if booted else None, system, user)
        stored = state.answer()
    has_gpu = True if there.module else None if there.cards is None else bool(there.cards)
    needed = extras.requirements()
    found = [
        *reach.judge_socket(reached),
        *reach.judge_daemon(answered, weightd.__version__),
        *rlimits.judge_limits(rlimits.own(), _daemon_limits(answered), gpu=has_gpu),
        *kernel.judge_memory(in_memory, daemon, kernel.read()),
        *service.judge_service(systemd, OLDEST_SYSTEMD, daemon),
        *storage.judge_state(stored, daemon),
        *gpus.judge_presence(there),
        *extras.judge_packages(needed, extras.installed({each.package for each in needed}), gpu=has_gpu),
    ]
    if there.module:
        units = service.units(system.facts.get("text", ""))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        found += gpus.judge_gpus(gpus.Looks(in_memory, driver, nvml, units, visible))
    order = list(CHECKS)
    return sorted(found, key=lambda finding: order.index(finding.check))


def _about(daemon: Mapping[str, Any]) -> list[str]:
    """What the looks of the daemon's rules are to be told of a daemon that answers."""
    if not daemon:
        return []
    known = [f"--pid={daemon['pid']}"]
    known += [f"--uid={daemon['uid']}"] if daemon["uid"] >= 0 else []
    if not daemon["index"]:
        return known
    folder = Path()
    with contextlib.suppress(OSError):  # it is another user's, or of another PID namespace
        folder = Path(f"/proc/{daemon['pid']}/cwd").readlink()
    return [*known, f"--state-dir={folder / Path(daemon['index']).parent}"]


def _ask_driver(stack: contextlib.ExitStack, host: Answer) -> tuple[Answer | None, Answer | None]:
    """Ask libcuda and NVML at the same time, unless that would make device files."""
    if host.problem or host.facts["nodes"]["missing"]:
        return None, None
    driver, nvml = (stack.enter_context(asking.python(_DIAGNOSIS, look)) for look in ("driver", "nvml"))
    return driver.answer(), nvml.answer()


def _daemon_limits(answered: Answer) -> rlimits.Limits | None:
    """The limits of the daemon that answers, or that this user would start; None if one is there and hides its own."""
    facts = answered.facts
    if not facts or facts["error"]:
        return rlimits.own() if facts.get("error") == "DaemonUnreachableError" else None
    try:
        return rlimits.read(Path(f"/proc/{facts['pid']}/limits").read_text()) if facts["pid"] else None
    except OSError:
        return None


def as_json(found: Sequence[Finding]) -> dict[str, Any]:
    """The report for programs; its keys are a contract. `status` is the worst of all checks."""
    counts = Counter(finding.status for finding in found)
    return {
        "version": weightd.__version__,
        "status": next(status for status in _WORST if counts[status]).value,
        "counts": {status.value: counts[status] for status in Status},
        "checks": [{"area": CHECKS[finding.check], **asdict(finding)} for finding in found],
    }


def report(found: Sequence[Finding], *, quiet: bool = False, console: Console | None = None) -> Iterator[str]:
    """The report for people, line by line: coloured and as wide as the terminal, or without colour at 80 columns."""
    console = console or Console(file=sys.stdout, highlight=False, emoji=False, markup=False)
    width = max(_LEAST_WIDTH, min(console.width, _MOST_WIDTH)) if console.is_terminal else _PIPED_WIDTH
    symbols = _SYMBOLS if "utf" in (console.encoding or "").lower() else _ASCII
    for area, checks in AREAS.items():
        shown = [each for each in found if each.check in checks and not (quiet and each.status is Status.GOOD)]
        if shown:
            yield _coloured(console, Text(area, style="bold"))
        for each in shown:
            yield from _lines(console, each, symbols[each.status], width)
    counts = Counter(finding.status for finding in found)
    if not quiet or any(counts[status] for status in _WORST[:-1]):
        yield ""
    yield ", ".join(f"{counts[status]} {status.value}" for status in Status)


def _lines(console: Console, finding: Finding, symbol: str, width: int) -> Iterator[str]:
    head = f"  {symbol} {finding.status.value:<8}  {finding.check:<18}  "
    first, *rest = textwrap.wrap(printable(finding.found), width - len(head), break_on_hyphens=False) or [""]
    yield _coloured(console, Text(head, style=_COLOURS[finding.status])) + first
    yield from (" " * len(head) + line for line in rest)
    # The remedy begins further left: it holds commands and paths, which a line should not break.
    for number, line in enumerate(
        textwrap.wrap(printable(finding.remedy), width - _REMEDY - 3, break_on_hyphens=False)
    ):
        yield f"{' ' * _REMEDY}{'   ' if number else '-> '}{line}"


def _coloured(console: Console, text: Text) -> str:
    """A line for the terminal; without one, its plain text."""
    if not console.is_terminal or console.no_color:
        return text.plain
    with console.capture() as capture:
        console.print(text, end="", soft_wrap=True)
    return capture.get()
