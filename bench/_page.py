"""The tables of docs/performance.md, made of the results of benchmarks.

The page's prose is written by hand, and has no figures. Between `<!-- made: NAME -->` and `<!-- end -->` stands what is
made: for the name of a part its picture and table; `losses`, what other sides do better; `runs` and `versions`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _daemon import Spread
    from _results import Comparison, Part

BESIDE_PEERS = ("peers", "attach", "cold", "memory", "forward")
"""Parts whose other sides are what one would use instead of weightd."""
BLOCK = re.compile(r"(<!-- made: (\S+) -->\n)(.*?)(<!-- end -->\n)", re.S)
NOT_MEASURED = "*Not measured yet.*"


def figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.7f}".rstrip("0") if "e" in text else text


def spread(values: Spread) -> str:
    """`median (low–high)`."""
    return f"{figure(values.median)} ({figure(values.low)}–{figure(values.high)})"


def digest(part: Part) -> str:
    """Of the file, by which a picture names what it was made of."""
    return hashlib.sha256(part.path.read_bytes()).hexdigest()[:16]


def picture(name: str) -> str:
    """The file's name, below docs/images."""
    return f"performance-{name}.svg"


def renewed(text: str, parts: Mapping[str, Part]) -> str:
    """The page with what is made of these results; ValueError if it has no place for a part."""
    places = [name for _, name, *_ in BLOCK.findall(text)]
    homeless = sorted(parts.keys() - set(places))
    if homeless:
        raise ValueError(f"docs/performance.md has no place for {', '.join(homeless)}: write <!-- made: NAME -->")
    order = [parts[name] for name in places if name in parts]
    whole: dict[str, Callable[[list[Part]], list[str]]] = {"losses": losses, "runs": runs, "versions": versions}

    def made(match: re.Match[str]) -> str:
        name = match[2]
        if name in whole:
            lines = whole[name](order)
        elif name in parts:
            lines = section(parts[name])
        else:
            lines = [NOT_MEASURED]
        return "\n".join([match[1].rstrip(), *lines, match[4]])

    return BLOCK.sub(made, text)


def losses(parts: list[Part]) -> list[str]:
    """What another side does better by more than the spread, the worst first."""
    found: list[tuple[float, list[str]]] = []
    for part in parts:
        for one in part.comparisons.values() if part.head["part"] in BESIDE_PEERS else ():
            for other in list(one.samples)[1:]:
                ratio = one.ratio(other)
                if ratio.low > 1 if one.better == "less" else ratio.high < 1:
                    worse = ratio.median if one.better == "less" else 1 / ratio.median
                    found.append((worse, [
                        one.what, f"{figure(one.spread(one.subject).median)} {one.unit}", other,
                        f"{figure(one.spread(other).median)} {one.unit}", f"{spread(ratio)} ×",
                    ]))  # fmt: skip
    rows = [row for _, row in sorted(found, key=lambda pair: -pair[0])]
    return table(["what", "weightd", "beside", "", "weightd takes"], rows) or ["Nothing, by more than the spread."]


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
    for side in one.samples:
        first = side == one.subject
        yield [
            one.what if first else "", side, f"{spread(one.spread(side))} {one.unit}".rstrip(),
            "" if first else f"{spread(one.ratio(side))} ×", one.predicted if first else "",
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
