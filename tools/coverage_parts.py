"""Say of each part how many of its branches were reached, and which were not; fail where a part is below the aim.

`make coverage` pipes into it what `coverage json` writes. Branches alone are counted: statements beside them would hide
one that is missing. A branch that was not reached is FROM->TO, by lines, or FROM->exit where it leaves the function.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

AIM = 95
"""Per cent of the branches of each part."""

AGENT = "fleet/weightd_fleet/agent"
CLIENT = "client/weightd"
DAEMON = "daemon/weightd_daemon"
# Patterns of paths, as in `fnmatch`. CONTRIBUTING.md, "Coverage", says what they are.
PARTS: dict[str, tuple[str, ...]] = {
    "core": (f"{DAEMON}/core/*",),
    "formats": (f"{DAEMON}/formats/*",),
    "handles": (f"{DAEMON}/handles/*",),
    "loads": (f"{DAEMON}/loads/*",),
    "loader": (f"{DAEMON}/loader/*",),
    "segment access": (f"{DAEMON}/devices/*_io.py",),
    "persistence": (f"{DAEMON}/persistence/*",),
    "client": (
        f"{CLIENT}/_manifest.py",
        f"{CLIENT}/_fused.py",
        f"{CLIENT}/attachment.py",
        f"{CLIENT}/_mapping/*",
        f"{CLIENT}/_transport/handle_socket.py",
        f"{CLIENT}/_transport/protocol.py",
    ),
    "fleet": (
        f"{AGENT}/blobs.py",
        f"{AGENT}/fetching.py",
        f"{AGENT}/hub_layout.py",
        f"{AGENT}/local_blobs.py",
        f"{AGENT}/peer.py",
        f"{AGENT}/peer_errors.py",
        f"{AGENT}/peer_service.py",
        f"{AGENT}/resident.py",
        f"{AGENT}/serving.py",
        f"{AGENT}/sink_*.py",
        f"{AGENT}/sources.py",
        f"{AGENT}/staging.py",
        "fleet/weightd_fleet/core/digests.py",
        "fleet/weightd_fleet/core/encoding.py",
        "fleet/weightd_fleet/core/manifest*.py",
    ),
}


class ReportError(Exception):
    """The report does not say what is asked; the message says why."""


class Figure(NamedTuple):
    """Branches of a part; `unreached` has a line for each file that lacks some."""

    part: str
    branches: int
    reached: int
    unreached: list[str]

    @property
    def enough(self) -> bool:
        """Whether the part meets the aim."""
        return self.reached * 100 >= AIM * self.branches

    def __str__(self) -> str:
        # Cut, not rounded: what is below the aim must not read as the aim.
        per_cent = self.reached * 1000 // self.branches / 10
        below = "" if self.enough else f", below {AIM} %"
        return f"{self.part}: {per_cent} % of {self.branches} branches{below}"


def figures(report: Mapping[str, Any], parts: Mapping[str, Sequence[str]]) -> Iterator[Figure]:
    """The figures of all parts, from the report that `coverage json` writes.

    Errors: ReportError (branches were not measured; a pattern fits no file, or a part has no branch).
    """
    if not report["meta"]["branch_coverage"]:
        raise ReportError("branches were not measured")
    files = report["files"]
    for part, patterns in parts.items():
        # A file that was moved would else leave its part without a word.
        idle = [pattern for pattern in patterns if not any(fnmatchcase(path, pattern) for path in files)]
        if idle:
            raise ReportError(f"{part}: no file fits {', '.join(idle)}")
        mine = {path: files[path] for path in files if any(fnmatchcase(path, pattern) for pattern in patterns)}
        branches = sum(file["summary"]["num_branches"] for file in mine.values())
        if not branches:
            raise ReportError(f"{part} has no branch")
        reached = sum(file["summary"]["covered_branches"] for file in mine.values())
        missing = {path: file["missing_branches"] for path, file in mine.items() if file["missing_branches"]}
        yield Figure(part, branches, reached, [f"{path}: {named(missing[path])}" for path in missing])


def named(branches: list[list[int]]) -> str:
    """Branches by the lines where they begin and end; coverage writes a negative line for the end of a function."""
    return ", ".join(f"{begin}->{end if end > 0 else 'exit'}" for begin, end in branches)


def main() -> int:
    """Print the figures of the report on standard input. Returns 1 if a part is below the aim, or nothing is said."""
    try:
        found = list(figures(json.load(sys.stdin), PARTS))
    except json.JSONDecodeError:
        print("coverage: there is no report", file=sys.stderr)
        return 1
    except ReportError as error:
        print(f"coverage: {error}", file=sys.stderr)
        return 1
    for figure in found:
        print(figure, *(f"  {line}" for line in figure.unreached), sep="\n")
    low = [figure.part for figure in found if not figure.enough]
    print(f"coverage: {', '.join(low)} below {AIM} %" if low else f"coverage: each part has {AIM} % or more")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
