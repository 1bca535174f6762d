"""`python -m failpoints`: tries every failure at every point, prints what came of each, and writes docs/faults.md."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from failpoints.injection import ACTIONS
from failpoints.matrix import Case, tried
from failpoints.points import POINTS, Point
from failpoints.scene import Scene
from support import fakecuda
from support.backends import HOST, Backend

HEAD = (Path(__file__).parent / "head.md").read_text()


TITLES = {
    "host": "Host memory",
    "cuda_vmm": "CUDA VMM, on the double",
    "cuda_ipc": "CUDA IPC, on the double",
}


def page(cases: Mapping[str, Sequence[Case]], commit: str) -> str:
    """The document, of the cases on each kind of memory, which were measured at a commit."""
    when = time.strftime("%Y-%m-%d", time.gmtime())
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    lines = [HEAD, f"Measured on {when} at commit `{commit}`: {machine}; load average {load} at the end."]
    for memory, some in cases.items():
        lines += ["", f"## {TITLES[memory]}", "", summary(some), "", *table(some, memory)]
    return "\n".join([*lines, ""])


def summary(cases: Sequence[Case]) -> str:
    """What came of all cases on a kind of memory, in one line."""
    lost, bad = sum(case.lost for case in cases), sum(bool(case.problem) and not case.lost for case in cases)
    went = [f"`{case.point.name}` {case.action} ({case.point.deed})" for case in cases if case.with_holder]
    named = f"{len(went)} of them ({', '.join(went)})"
    beyond = f", beyond what lay on a GPU whose holder died: {named}" if went else ""
    tried = f"{len(cases)} failures at {len({case.point.name for case in cases})} points"
    return f"{tried}; lost: {lost}{beyond}; other failures of what came afterwards: {bad}."


def table(cases: Sequence[Case], memory: str) -> list[str]:
    """A row for each point and deed, with all actions."""
    heads = " | ".join(f"{action} | s" for action in ACTIONS)
    lines = [
        f"| point | process | what is about to happen | raises | {heads} | lost |",
        f"|---|---|---|---|{'---|---:|' * 3}---:|",
    ]
    for point in dict.fromkeys(case.point for case in cases):
        own = {case.action: case for case in cases if case.point == point}
        cells = [f"{_shown(own[one])} | {own[one].seconds:.1f}" if one in own else " | " for one in ACTIONS]
        went = sum(case.with_holder for case in own.values())
        lost = f"{sum(case.lost for case in own.values())}" + f" (and {went} with the holder)" * bool(went)
        row = f"`{point.name}`", point.process, point.what, point.error_on(memory), *cells, lost
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _shown(case: Case) -> str:
    return case.outcome if not case.problem else f"{case.outcome}; **{case.problem}**"


def commit() -> str:
    """Which sources are tried; `+` stands for changes that were not committed."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def status(cases: Mapping[str, Sequence[Case]]) -> int:
    """The exit code: 1 where anything was lost that no point names (`Point.loses`), or anything else went wrong."""
    return int(any(case.failed for some in cases.values() for case in some))


def points_of(memory: str, chosen: Sequence[str]) -> list[Point]:
    """The points that are tried on a kind of memory."""
    return [
        point
        for point in POINTS
        if memory in point.memories and (not chosen or any(point.name.startswith(one) for one in chosen))
    ]


def try_all(backend: Backend, points: Sequence[Point], actions: Sequence[str]) -> list[Case]:
    """Try them on one scene."""
    cases = []
    with tempfile.TemporaryDirectory(prefix="weightd-faults-") as folder:
        scene = Scene(backend, Path(folder))
        try:
            for point in points:
                for action in actions:
                    cases.append(case := tried(scene, point, action))
                    print(
                        f"{point.name} ({point.deed}) {action}: {case.outcome}, lost {case.lost}, with the holder "
                        f"{case.with_holder}, {case.seconds:.1f} s {case.problem}",
                        flush=True,
                    )
        finally:
            scene.close()
    return cases


def main() -> int:
    """Exits with 1 where anything was lost but what a point names, or a call did not succeed after a failure."""
    parser = argparse.ArgumentParser(prog="python -m failpoints", description=__doc__)
    parser.add_argument("points", nargs="*", help="beginnings of points' names; all by default")
    parser.add_argument("--actions", default=",".join(ACTIONS))
    parser.add_argument("--memory", choices=TITLES, action="append", help="a kind of memory; all by default")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the document")
    options = parser.parse_args()
    actions = options.actions.split(",")
    cases, at = {}, commit()  # before the page itself is changed
    with tempfile.TemporaryDirectory(prefix="weightd-driver-") as driver:
        fakecuda.build(Path(driver))
        fakecuda.preload(Path(driver))
        for memory in options.memory or TITLES:
            if points := points_of(memory, options.points):
                backend = HOST if memory == "host" else Backend(memory, memory, Path(driver))
                cases[memory] = try_all(backend, points, actions)
    if options.write is not None:
        options.write.write_text(page(cases, at))
    return status(cases)


if __name__ == "__main__":
    sys.exit(main())
