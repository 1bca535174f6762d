"""The command `unit` prints a systemd unit for the current interpreter and the installed version of systemd."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from weightd.cli.context import say
from weightd.cli.daemon import require_daemon
from weightd.cli.output import emit
from weightd.errors import WeightdError

# The files as they are in a wheel, or beside the sources of a checkout. pyproject.toml puts the one where the other is.
_FOLDERS = (Path(__file__).with_name("systemd"), Path(__file__).parents[3] / "systemd")
_START = "ExecStart=weightd serve"
_PRESERVE = "#FileDescriptorStorePreserve=yes"
_PRESERVE_SINCE = 254
OLDEST_SYSTEMD = 252
"""The oldest version that the units were checked with."""
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - compared with, not written to


def unit(
    user: Annotated[
        bool, typer.Option("--user", help="Print the unit of a user's own daemon instead of the system unit.")
    ] = False,
) -> None:
    """Print a systemd unit for this installation of weightd.

    Exit codes: 0; 1 if the daemon is not installed, or systemd cannot start it from its path; 2 wrong usage.

    \b
    Examples:
      weightd unit >weightd.service
      weightd unit --user >weightd.service
    """
    require_daemon("unit")
    version = systemd_version()
    if version is None:
        say(f"no systemd is installed here; this unit is for systemd {OLDEST_SYSTEMD} and later")
    elif version < OLDEST_SYSTEMD:
        say(f"systemd {version} is installed here; this unit was not checked with versions before {OLDEST_SYSTEMD}")
    hidden = None if user else hidden_path(sys.executable, sys.prefix, sys.base_prefix)
    if hidden is not None:
        say(f"{hidden} is hidden from the service by its unit; install weightd elsewhere, for example in /opt/weightd")
    text = shipped("weightd-user.service" if user else "weightd.service")
    emit(render(text, [sys.executable, "-P", "-m", "weightd_daemon", "serve"], version).removesuffix("\n"))


def shipped(name: str) -> str:
    """Return the text of a file in the folder `systemd`."""
    folder = next(folder for folder in _FOLDERS if folder.is_dir())
    return (folder / name).read_text()


def render(text: str, command: list[str], version: int | None) -> str:
    """Return a shipped unit that starts `command`, for a version of systemd; None means the oldest.

    Errors: WeightdError (systemd cannot start a program from this path).
    """
    text = _exchange(text, _START, f"ExecStart={' '.join(map(_quoted, command))}")
    if version is not None and version >= _PRESERVE_SINCE:
        text = _exchange(text, _PRESERVE, _PRESERVE.removeprefix("#"))
    return text


def systemd_version() -> int | None:
    """Return the version of the installed systemd, or None without one."""
    for program in ("systemctl", "systemd-analyze"):
        try:
            command = [program, "--version"]  # from PATH: where it lies differs
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if match := re.match(r"systemd (\d+)", done.stdout):
            return int(match[1])
    return None


def hidden_path(*paths: str) -> str | None:
    """Return the first path, or target of a symlink, that the system unit hides from the daemon."""
    for path in paths:
        for form in (Path(path), Path(path).resolve()):
            if any(form.is_relative_to(folder) for folder in _HIDDEN):
                return str(form)
    return None


def _exchange(text: str, line: str, by: str) -> str:
    """Return `text` with `line`, which occurs once, replaced by `by`."""
    lines = text.split("\n")
    assert lines.count(line) == 1, f"the unit has {lines.count(line)} lines {line!r}"
    lines[lines.index(line)] = by
    return "\n".join(lines)


def _quoted(word: str) -> str:
    """Return a word of a command line in systemd's syntax: quoted if necessary, with specifiers escaped."""
    if re.search(r"[\x00-\x1f\x7f\"'\\]", word):
        raise WeightdError(
            f"systemd cannot start {word}: the path contains a quote, a backslash or a control character"
        )
    word = word.replace("%", "%%")
    return word if re.fullmatch(r"[\w%+=:,./-]+", word) else f'"{word}"'
