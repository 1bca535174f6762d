"""Compare ratios of one run with those of another: what has moved by more than the spread?

    python bench/check.py COMMITTED NEW [--parts peers,attach,...]

Both are folders of results; the newest of each part counts. `--parts` are those that were to be measured anew, by
default all of bench/suite.py; of others only those that were are compared. A ratio has moved if the quartiles of both
runs do not meet, and the medians are a tenth apart at least: repeated samples of memory have no spread at all. An
exponent has moved if its quartiles do not meet, and the medians are 0.3 apart, for the spread of a few slopes near zero
says little. So what becomes slower by less than a tenth is not named, nor what a wide spread hides. Seconds are not
compared, which are another machine's or another day's. Ends with 1 if a ratio is worse, or a comparison is gone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import suite
from _results import Comparison, Part, figure, latest

if TYPE_CHECKING:
    from _daemon import Spread

LEAST = 0.1
"""Medians that are nearer to each other, in proportion to the larger, have not moved."""


class Finding(NamedTuple):
    """A line of the report."""

    bad: bool
    line: str


LEAST_OF_EXPONENTS = 0.3


def moved(before: Spread, after: Spread, least: float) -> bool:
    """Whether two spreads are apart, and their medians by so much."""
    apart = after.low > before.high or after.high < before.low
    return apart and abs(after.median - before.median) > least


def compare_one(what: str, before: Comparison, after: Comparison) -> Iterator[Finding]:
    """What has moved in one comparison."""
    for side, old in before.ratios().items():
        new = after.ratios().get(side)
        if new is None:
            yield Finding(True, f"gone: {what}: {side}, which was {figure(old.median)} ×")
            continue
        least = LEAST * max(old.median, new.median) if before.unit else LEAST_OF_EXPONENTS
        if moved(old, new, least):
            worse = (new.median > old.median) == (before.better == "less")
            was, now = (f"{figure(r.median)} × ({figure(r.low)}–{figure(r.high)})" for r in (old, new))
            yield Finding(worse, f"{'worse' if worse else 'better'}: {what}: {side}: {was}, now {now}")


def compare(before: Mapping[str, Part], after: Mapping[str, Part], asked: Collection[str]) -> Iterator[Finding]:
    """What has moved in all parts that were measured or `asked` for, and what cannot be compared."""
    for name, old in before.items():
        if name not in after and name not in asked:
            continue
        if name not in after:
            yield Finding(True, f"gone: {name}, which {old.path.name} has")
        elif (new := after[name]).head["parameters"] != old.head["parameters"]:
            yield Finding(True, f"not compared: {name}: {old.head['parameters']} before, {new.head['parameters']} now")
        else:
            for one in old.comparisons.values():
                if one.name in new.comparisons:
                    yield from compare_one(f"{name}/{one.name}", one, new.comparisons[one.name])
                else:
                    yield Finding(True, f"gone: {name}/{one.name}")


def main() -> int:
    """Report; 1 if something is worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("committed", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--parts", default=",".join(suite.PARTS), help="which were measured (default: %(default)s)")
    options = parser.parse_args()
    before, after = latest(options.committed), latest(options.new)
    if not before or not after:
        parser.error(f"{options.new if before else options.committed} has no results: `make bench` writes them")
    asked = options.parts.split(",")
    findings = list(compare(before, after, asked))
    for finding in findings:
        print(finding.line)
    looked_at = [part for name, part in before.items() if name in after or name in asked]
    ratios = sum(len(one.ratios()) for part in looked_at for one in part.comparisons.values())
    print(f"{ratios} ratios, of which {len(findings)} have moved by more than the spread, or are gone")
    return any(finding.bad for finding in findings)


if __name__ == "__main__":
    sys.exit(main())
