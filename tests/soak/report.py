"""What a soak brought: counts, findings, and a page of figures."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soak.plan import Plan
from soak.soak import Happened, Options

MOST_GROWTH = 12 << 20
"""Bytes that the last daemon's resident size may grow from the second fifth of its life to the last one."""


class Report:
    """`findings` is what must not have happened; empty after a soak that went well."""

    def __init__(self, options: Options, plan: Plan, happened: Happened) -> None:
        self.options, self.happened = options, happened
        self.operations: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.compared = 0
        self._millis: defaultdict[str, list[float]] = defaultdict(list)
        for entry in _lines(plan.operations):
            self.operations[entry["op"]] += 1
            self.compared += entry["bytes"]
            if entry["refusal"]:
                self.refusals[f"{entry['op']}: {entry['refusal']}"] += 1
            else:
                self._millis[entry["op"]].append(entry["ms"])
        self.findings = list(_lines(plan.findings))
        self._judge()

    def _judge(self) -> None:
        """Add what only the end tells."""
        happened = self.happened
        if happened.at_end != happened.at_start:
            start, end = (asdict(one) if one is not None else {} for one in (happened.at_start, happened.at_end))
            different = {key: (start.get(key), value) for key, value in end.items() if start.get(key) != value}
            self._find("something is left at the end", at_start_and_end=different)
        before, after = self.rss()
        if after - before > MOST_GROWTH:
            self._find(f"the daemon grew from {before} to {after} bytes while nothing was to grow")
        for word in ("Traceback", " bug ", "bug:"):
            if word in happened.log:
                self._find(f"the daemon's log has {word!r}", log=happened.log[happened.log.index(word) - 500 :][:2500])
        if not self.compared:
            self._find("no byte was compared")

    def _find(self, what: str, **more: object) -> None:
        self.findings.append({"what": what, "seed": self.options.seed, **more})

    def rss(self) -> tuple[int, int]:
        """Resident bytes of the last daemon: medians of the second and of the last fifth of its life."""
        sizes = [size for _, pid, size in self.happened.rss if pid == self.happened.rss[-1][1]]
        fifth = max(1, len(sizes) // 5)
        return int(statistics.median(sizes[fifth : 2 * fifth] or sizes)), int(statistics.median(sizes[-fifth:]))

    def warnings(self) -> Counter[str]:
        """Lines of the daemon's log by what they say, without what differs from one to the next."""
        lines = re.findall(r"\b(?:WARNING|ERROR)\b.*", self.happened.log)
        return Counter(re.sub(r"[0-9a-f]{6,}|\d+|'[^']*'|/\S+", "…", line)[:110] for line in lines)

    def as_json(self) -> dict[str, Any]:
        happened = self.happened
        before, after = self.rss()
        done = {name: [percentile(times, 0.5), percentile(times, 0.99)] for name, times in self._millis.items()}
        return {
            "seed": self.options.seed, "seconds": self.options.seconds, "memory": self.options.backend.name,
            "clients_at_once": self.options.clients, "operations": sum(self.operations.values()),
            "compared_bytes": self.compared, "findings": self.findings, "happened": dict(happened.counts),
            "starts": len(happened.starts), "start_s_median_most":
            [round(statistics.median(happened.starts), 2), round(max(happened.starts), 2)] if happened.starts else [],
            "rss_bytes_second_and_last_fifth": [before, after], "at_end": asdict(happened.at_end or happened.at_start),  # type: ignore[arg-type]  # one of the two is there
            "by_operation": dict(self.operations), "refusals": dict(self.refusals.most_common()),
            "ms_p50_p99": done, "warnings": dict(self.warnings().most_common(30)),
            "rss_mb_by_second": [[at, round(size / 1e6, 1)] for at, _, size in happened.rss],
            "machine": f"{os.cpu_count()} cores, {platform.release()}, Python {platform.python_version()}",
            "load_average": [round(one, 1) for one in os.getloadavg()],
        }  # fmt: skip

    def as_text(self) -> str:
        """A few lines for people."""
        found = self.as_json()
        happened = ", ".join(f"{name} {count}" for name, count in sorted(self.happened.counts.items()))
        before, after = found["rss_bytes_second_and_last_fifth"]
        lines = [
            f"soak of {found['memory']} memory, seed {found['seed']}, {found['seconds']:.0f} s: "
            f"{found['operations']} operations, {self.compared / 1e9:.1f} GB compared, {len(self.findings)} findings",
            f"{happened}; {found['starts']} restarts",
            f"the last daemon's resident size: {before / 1e6:.1f} MB early, {after / 1e6:.1f} MB late",
            *(f"FINDING {json.dumps(finding)[:3000]}" for finding in self.findings[:20]),
        ]
        return "\n".join(lines)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open() as file:
            yield from map(json.loads, file)
