"""What the daemon's own rules say of this machine, for `weightd doctor`: a process for each look.

It prints a line when it begins, and then one line of JSON. A look may hang in a driver or in a filesystem; whoever asks
goes on without it. Nothing here starts a daemon or makes a file. Only the standard library and the package that a look
is about are needed: `weightd doctor` runs without the extra `daemon`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config.settings import ConfigError, load
from .devices.cuda_facts import driver_facts, nodes, nvml_facts
from .devices.cuda_modes import mps_told, stay_outside_mps
from .devices.host_facts import host_budget, host_facts
from .libc import die_with

if TYPE_CHECKING:
    from collections.abc import Callable

BEGUN = "begun"
_ACCESS = os.W_OK | os.X_OK


def host(options: argparse.Namespace) -> dict[str, Any]:
    """Host memory, the budget that a daemon of this user would have, MPS, and the GPUs' device files.

    `budget` is None if it cannot be had, for the reason in `budget_error` or `settings_error`.
    """
    facts = {**host_facts(options.pid), "budget": None, "budget_error": "", "settings_error": ""}
    facts |= {"nodes": nodes(), "mps": mps_told()}
    try:
        settings = load(None, {}, os.environ).settings
    except ConfigError as error:
        return facts | {"settings_error": str(error)}
    try:
        facts["budget"] = host_budget(settings)
    except ConfigError as error:
        facts["budget_error"] = str(error)
    return facts


def state(options: argparse.Namespace) -> dict[str, Any]:
    """The folder of the digest index: `uid`, `mode`, bytes `free`, and whether the daemon's user may write to it.

    `writable` is None where nobody but that user knows. A folder that is missing is judged by the nearest above it.
    """
    try:
        folder = Path(options.state_dir or load(None, {}, os.environ).settings.state_dir)
    except ConfigError as error:
        return {"folder": "", "error": str(error)}
    nearest = folder
    try:
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        status, space = nearest.stat(), os.statvfs(nearest)
    except OSError as error:
        return {"folder": str(folder), "error": f"{nearest}: {error.strerror}"}
    return {
        "folder": str(folder),
        "error": "",
        "exists": nearest == folder,
        "is_folder": nearest.is_dir(),
        "uid": status.st_uid,
        "mode": status.st_mode & 0o7777,
        "free": space.f_bavail * space.f_frsize,
        "writable": _writable(nearest, status, space, options.uid),
    }


def driver(_: argparse.Namespace) -> dict[str, Any]:
    """What libcuda says."""
    return driver_facts()


def nvml(_: argparse.Namespace) -> dict[str, Any]:
    """What NVML says."""
    return nvml_facts()


LOOKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    look.__name__: look for look in (host, state, driver, nvml)
}


def main(arguments: list[str] | None = None) -> int:
    """Make one look. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="weightd_daemon.diagnosis", allow_abbrev=False)
    parser.add_argument("look", choices=LOOKS)
    parser.add_argument("--parent", type=int, required=True, help="process that asks; this one dies with it")
    parser.add_argument("--pid", type=int, default=0, help="the daemon's process; 0: none runs, or it cannot be seen")
    parser.add_argument("--uid", type=int, default=os.geteuid(), help="the daemon's user")
    parser.add_argument("--state-dir")
    options = parser.parse_args(arguments)
    if not die_with(options.parent):  # also by kill -9
        return 1
    stay_outside_mps(os.environ)  # before anybody calls the driver
    _say(BEGUN)
    _say(json.dumps(LOOKS[options.look](options)))
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _writable(folder: Path, status: os.stat_result, space: os.statvfs_result, uid: int) -> bool | None:
    if space.f_flag & os.ST_RDONLY:
        return False
    if uid in (os.geteuid(), 0):
        return uid == 0 or os.access(folder, _ACCESS)
    return bool(status.st_mode & _ACCESS << 6 == _ACCESS << 6) if uid == status.st_uid else None


if __name__ == "__main__":
    sys.exit(main())
