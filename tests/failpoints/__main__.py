"""`python -m failpoints`: tries every failure at every point, prints what came of each, and writes docs/faults.md."""

from __future__ import annotations

import argparse
import os
import platform
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


def page(cases: Mapping[str, Sequence[Case]]) -> str:
    """The document, of the cases on each kind of memory."""
    when = time.strftime("%Y-%m-%d", time.gmtime())
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    lines = [HEAD, f"Measured on {when}: {machine}; load average {load} at the end."]
    for memory, some in cases.items():
        lost, bad = sum(case.lost for case in some), sum(bool(case.problem) for case in some)
        tried = f"{len(some)} failures at {len({case.point.name for case in some})} points"
        lines += [
            "",
            f"## {TITLES[memory]}",
            "",
            f"{tried}; lost: {lost}; calls that did not succeed afterwards: {bad}.",
        ]
        lines += ["", *table(some)]
    return "\n".join([*lines, ""])


def table(cases: Sequence[Case]) -> list[str]:
    """A row for each point, with all actions."""
    heads = " | ".join(f"{action} | s" for action in ACTIONS)
    lines = [f"| point | process | what is about to happen | {heads} | lost |", f"|---|---|---|{'---|---:|' * 3}---:|"]
    for point in dict.fromkeys(case.point for case in cases):
        own = {case.action: case for case in cases if case.point == point}
        cells = [f"{_shown(own[one])} | {own[one].seconds:.1f}" if one in own else " | " for one in ACTIONS]
        lost = sum(case.lost for case in own.values())
        lines.append(f"| `{point.name}` | {point.process} | {point.what} | {' | '.join(cells)} | {lost} |")
    return lines


def _shown(case: Case) -> str:
    return case.outcome if not case.problem else f"{case.outcome}; **{case.problem}**"


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
                        f"{point.name} {action}: {case.outcome}, lost {case.lost}, {case.seconds:.1f} s {case.problem}",
                        flush=True,
                    )
        finally:
            scene.close()
    return cases


def main() -> int:
    """Exits with 1 where anything was lost, or a call did not succeed after a failure."""
    parser = argparse.ArgumentParser(prog="python -m failpoints", description=__doc__)
    parser.add_argument("points", nargs="*", help="beginnings of points' names; all by default")
    parser.add_argument("--actions", default=",".join(ACTIONS))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the document")
    options = parser.parse_args()
    actions = options.actions.split(",")
    cases = {}
    with tempfile.TemporaryDirectory(prefix="weightd-driver-") as driver:
        fakecuda.build(Path(driver))
        fakecuda.preload(Path(driver))
        for memory in TITLES:
            if points := points_of(memory, options.points):
                backend = HOST if memory == "host" else Backend(memory, memory, Path(driver))
                cases[memory] = try_all(backend, points, actions)
    if options.write is not None:
        options.write.write_text(page(cases))
    return int(any(case.problem for some in cases.values() for case in some))


if __name__ == "__main__":
    sys.exit(main())
