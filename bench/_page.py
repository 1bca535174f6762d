"""The tables of docs/performance.md and of README, made of the results of benchmarks.

Prose is written by hand, and has no figures. Between `<!-- made: NAME -->` and `<!-- end -->` stands what is made: for
the name of a part its picture and table; `losses`, what other sides do better; `missed`, predictions that failed;
`summary`, some of all; `runs` and `versions`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from _results import figure

if TYPE_CHECKING:
    from _daemon import Spread
    from _results import Comparison, Part

PAGES = ("docs/performance.md", "README.md")
BESIDE_PEERS = ("peers", "attach", "cold", "memory", "forward", "engines-vllm", "engines-sglang")
"""Parts whose other sides are what one would use instead of weightd."""
BLOCK = re.compile(r"(<!-- made: (\S+) -->\n)(.*?)(<!-- end -->\n)", re.S)
NOT_MEASURED = "*Not measured yet.*"
APART = ("attacks",)
"""Parts that no target of `make` measures: without a result nothing is made of them."""
QUOTED = (
    ("peers", "warm", "safetensors mmap"),
    ("peers", "warm", "safetensors pread"),
    ("peers", "warm", "fastsafetensors"),
    ("peers", "warm", "Run:ai streamer"),
    ("peers", "first", "safetensors mmap"),
    ("peers", "cold", "safetensors mmap"),
    ("memory", "4 × 4", "safetensors mmap"),
    ("memory", "4 × 4", "safetensors pread"),
    ("forward", "token", "private"),
)
"""What the summary has: part, comparison, and the side that weightd is beside."""


def spread(values: Spread) -> str:
    """`median (low–high)`."""
    return f"{figure(values.median)} ({figure(values.low)}–{figure(values.high)})"


def digest(part: Part) -> str:
    """Of the file, by which a picture names what it was made of."""
    return hashlib.sha256(part.path.read_bytes()).hexdigest()[:16]


def picture(name: str) -> str:
    """The file's name, below docs/images."""
    return f"performance-{name}.svg"


def homeless(text: str, parts: Mapping[str, object]) -> list[str]:
    """Parts for which a page has no place."""
    return sorted(parts.keys() - {name for _, name, *_ in BLOCK.findall(text)})


def renewed(text: str, parts: Mapping[str, Part]) -> str:
    """The page with what is made of these results."""
    order = list(parts.values())
    whole: dict[str, Callable[[list[Part]], list[str]]] = {
        "losses": losses, "missed": missed, "summary": summary, "runs": runs, "versions": versions,
    }  # fmt: skip

    def made(match: re.Match[str]) -> str:
        name = match[2]
        if name in whole:
            lines = whole[name](order)
        elif name in parts:
            lines = section(parts[name])
        else:
            lines = [] if name in APART else [NOT_MEASURED]
        return "\n".join([match[1].rstrip(), *lines, match[4]])

    return BLOCK.sub(made, text)


class Standing(NamedTuple):
    """How weightd stands beside one side in one comparison."""

    comparison: Comparison
    other: str

    @property
    def ratio(self) -> Spread:
        return self.comparison.ratio(self.other)

    @property
    def times_worse(self) -> float:
        """By which factor weightd is worse; below 1 it is better."""
        return self.ratio.median if self.comparison.better == "less" else 1 / self.ratio.median

    @property
    def lost(self) -> bool:
        """Whether weightd is worse by more than the spread."""
        return self.ratio.low > 1 if self.comparison.better == "less" else self.ratio.high < 1


def _standings(found: Iterable[Standing]) -> list[str]:
    """A table, the worst first."""
    rows = [
        [
            one.what, f"{figure(one.spread(one.subject).median)} {one.unit}", standing.other,
            f"{figure(one.spread(standing.other).median)} {one.unit}", f"{spread(standing.ratio)} ×",
        ]
        for standing in sorted(found, key=lambda standing: -standing.times_worse)
        for one in [standing.comparison]
    ]  # fmt: skip
    return table(["what", "weightd", "beside", "", "weightd takes"], rows)


def losses(parts: list[Part]) -> list[str]:
    """What others do better by more than the spread."""
    standings = [
        Standing(one, other)
        for part in parts
        if part.head["part"] in BESIDE_PEERS
        for one in part.comparisons.values()
        for other in list(one.samples)[1:]
        if not other.startswith("weightd")  # another way to use it
    ]
    return _standings(filter(lambda standing: standing.lost, standings)) or ["Nothing, by more than the spread."]


def missed(parts: list[Part]) -> list[str]:
    """Predictions that have a figure and came out worse, by more than the spread, the worst first."""
    rows = []
    for name, one in ((part.head["part"], one) for part in parts for one in part.comparisons.values()):
        bound, least = ("at most", 1) if one.better == "less" else ("at least", -1)
        for side in one.missed():
            aim, found = one.aims[side], one.ratios()[side]
            times, beside = ("", "") if side == one.subject else (" ×", side)
            row = [name, one.what, beside, f"{bound} {figure(aim)}{times}", f"{spread(found)}{times}"]
            rows.append(((found.median / aim) ** least, row))
    rows.sort(key=lambda row: -row[0])
    return table(["part", "what", "beside", "predicted", "measured"], [row for _, row in rows]) or ["None."]


def summary(parts: list[Part]) -> list[str]:
    """Some comparisons of those that were measured."""
    found = {part.head["part"]: part.comparisons for part in parts}
    return _standings(
        Standing(found[part][name], other)
        for part, name, other in QUOTED
        if part in found and name in found[part] and other in found[part][name].samples
    ) or [NOT_MEASURED]


def section(part: Part) -> list[str]:
    """Picture, conditions and table of a part."""
    name = part.head["part"]
    counts = sorted({len(one.samples[one.subject]) for one in part.comparisons.values()})
    said = [f"{what} {_shown(value)}" for what, value in part.head["parameters"].items()]
    conditions = ", ".join([f"rounds {' to '.join(map(str, {counts[0]: 0, counts[-1]: 0}))}", *said])
    rows = [row for one in part.comparisons.values() for row in _rows(one)]
    return [
        f"![The figures of the table below, as bars](images/{picture(name)})",
        "",
        f"Of {part.head['date']}; {conditions}.",
        "",
        *table(["what", "side", "median (quartiles)", "weightd takes", "predicted"], rows),
    ]


def _rows(one: Comparison) -> Iterator[list[str]]:
    failed = one.missed()
    for side in one.samples:
        first = side == one.subject
        predicted = [*([one.predicted] if first and one.predicted else []), *(["**missed**"] if side in failed else [])]
        yield [
            one.what if first else "", side, f"{spread(one.spread(side))} {one.unit}".rstrip(),
            "" if first else f"{spread(one.ratio(side))} ×", ": ".join(predicted),
        ]  # fmt: skip


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def runs(parts: list[Part]) -> list[str]:
    """How and when each part was measured."""
    rows = [
        [
            part.head["part"], part.head["date"], f"`{part.head['commit']}`", str(part.head["seconds"]),
            " and ".join(map(str, part.head["load_average"])), f"`{part.head['command']}`",
        ]
        for part in parts
    ]  # fmt: skip
    return table(["part", "date", "commit", "seconds", "load average, before and after", "command"], rows)


def versions(parts: list[Part]) -> list[str]:
    """Each version, and the parts that had it."""
    had: dict[tuple[str, str], list[str]] = {}
    for part in parts:
        for name, version in {**part.head["machine"], **part.head["versions"]}.items():
            had.setdefault((name, str(version)), []).append(part.head["part"])
    rows = [[*what, "all" if len(names) == len(parts) else ", ".join(names)] for what, names in had.items()]
    return table(["machine, or package", "", "in"], rows)


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of a table; none without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines] if lines else []
