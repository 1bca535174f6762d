"""The form in which benchmarks write what they measured: JSON files below bench/results, one a part and a day.

A part, such as `attach`, has comparisons. A comparison has samples of each side, taken in turns: the first of each side
are of one round, and so on. Its first side is weightd's, to which the others are compared by ratios of one round, since
a machine that changes its speed changes it for all sides of a round. Absolute figures are true of one machine on one
day; ratios are what `make bench-check` looks at.

A script uses it so:

    parser = argparse.ArgumentParser(...)
    add_options(parser)                       # --results FOLDER, --rounds N, --seconds S
    report = Report("attach", {"size": options.size}, packages=("torch", "safetensors"))
    samples = turns({"weightd": attach, "safetensors mmap": load_file}, options.rounds, options.seconds)
    aims = {"safetensors mmap": 0.5}
    report.add(Comparison("300", "attach to 300 tensors", "ms", samples, "half of safetensors' time", aims=aims))
    report.write(options.results)             # does nothing without --results
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from _daemon import Spread, machine

FOLDER = Path(__file__).resolve().parent / "results"
FORM = 1
LEAST_ROUNDS = 3
_DIGITS = 6
_EXACTNESS = 0.01
"""A prediction is not missed by less than this, in proportion: `1.0` is met by a ratio of 1.005."""
_MADE = ("bench/results", "docs", "README.md")
"""What a run writes, and the pages that are made of it: no source of what is measured."""


@dataclass(frozen=True)
class Comparison:
    """Samples of the sides that did one thing in turns, or of one side alone."""

    name: str
    """Unique in its part: `warm`."""
    what: str
    """What each side did, as a line for readers; the unit is not in it."""
    unit: str
    """Of the samples, such as `s`, `ms`, `MiB`, `GB/s`. Empty: the samples are ratios or exponents themselves."""
    samples: Mapping[str, Sequence[float]]
    """The values by side. The first side is weightd's."""
    predicted: str = ""
    """What was expected before the run: a figure and its reason, in words."""
    better: Literal["less", "more"] = "less"
    aims: Mapping[str, float] = field(default_factory=dict)
    """By side of which there are `ratios()`: what the ratio was expected to be at most, or at least if more is better.
    None for what `predicted` says in words only.
    """

    def __post_init__(self) -> None:
        if not self.samples or min(map(len, self.samples.values())) < 2:
            raise ValueError(f"{self.name}: each side needs two samples at least")
        if len({len(values) for values in self.samples.values()}) > 1:
            raise ValueError(f"{self.name}: the sides have different numbers of samples, so they were not in turns")
        if unknown := self.aims.keys() - self.ratios().keys():
            raise ValueError(f"{self.name}: no ratio to {', '.join(sorted(unknown))}, of which something is predicted")

    @property
    def subject(self) -> str:
        """The side to which the others are compared."""
        return next(iter(self.samples))

    def spread(self, side: str) -> Spread:
        """Median and quartiles of a side."""
        return Spread.of(self.samples[side])

    def ratio(self, other: str) -> Spread:
        """The subject's value by another side's, of each round. Below 1 is less."""
        pairs = zip(self.samples[self.subject], self.samples[other], strict=True)
        return Spread.of([ours / theirs for ours, theirs in pairs])

    def ratios(self) -> dict[str, Spread]:
        """By side, without the subject; of the subject itself, where it is alone and its samples are ratios."""
        others = [side for side in self.samples if side != self.subject]
        if not others and not self.unit:
            return {self.subject: self.spread(self.subject)}
        return {other: self.ratio(other) for other in others}

    def missed(self) -> list[str]:
        """Sides whose ratio is worse than predicted, by more than the spread and a hundredth."""
        ratios = self.ratios()
        if self.better == "less":
            return [side for side, aim in self.aims.items() if ratios[side].low > aim * (1 + _EXACTNESS)]
        return [side for side, aim in self.aims.items() if ratios[side].high < aim * (1 - _EXACTNESS)]


class Report:
    """One run of a part."""

    def __init__(
        self,
        part: str,
        parameters: Mapping[str, Any],
        packages: Sequence[str] = (),
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Note the load average, the machine, and versions: of packages, and those given."""
        self.part = part
        self.comparisons: list[Comparison] = []
        self._begun = time.monotonic()
        self._head = {
            "form": FORM,
            "part": part,
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *_shown(sys.argv[1:])]),
            "commit": _commit(),
            "machine": machine(),
            "versions": {name: importlib.metadata.version(name) for name in packages} | dict(versions or {}),
            "parameters": dict(parameters),
        }
        self._load = [os.getloadavg()[0]]

    def add(self, comparison: Comparison) -> None:
        """Take a comparison in, and print its ratios to the standard error."""
        if any(comparison.name == other.name for other in self.comparisons):
            raise ValueError(f"{self.part} has two comparisons with the name {comparison.name}")
        self.comparisons.append(comparison)
        print(show(self.part, comparison), file=sys.stderr, flush=True)

    def write(self, folder: Path | None) -> Path | None:
        """Write DATE-PART.json into the folder, in place of an older one of that day; nothing without a folder."""
        if folder is None:
            return None
        body = self._head | {
            "load_average": [round(value, 2) for value in (*self._load, os.getloadavg()[0])],
            "seconds": round(time.monotonic() - self._begun, 1),
            "comparisons": [to_json(comparison) for comparison in self.comparisons],
        }
        path = folder / f"{body['date']}-{self.part}.json"
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n")
        unfinished.replace(path)
        return path


@dataclass(frozen=True)
class Part:
    """A part as it was read."""

    path: Path
    head: Mapping[str, Any]
    """All but the comparisons: date, commit, machine, versions, parameters, load_average, seconds, command."""
    comparisons: Mapping[str, Comparison]


def read(path: Path) -> Part:
    """Read a part; ValueError names the file that is not of this form."""
    try:
        body = json.loads(path.read_text())
        if body.pop("form") != FORM:
            raise ValueError(f"its form is not {FORM}")
        fields = {one.name for one in dataclasses.fields(Comparison)}
        found = [Comparison(**{key: row[key] for key in row.keys() & fields}) for row in body.pop("comparisons")]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no result of a benchmark: {error}") from None
    return Part(path, body, {comparison.name: comparison for comparison in found})


def latest(folder: Path) -> dict[str, Part]:
    """The youngest result of each part in a folder, by name of the part."""
    return {part.head["part"]: part for part in map(read, sorted(folder.glob("*.json")))}


def turns(
    sides: Mapping[str, Callable[[], float]], rounds: int, seconds: float = 120.0, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Call the sides in turns, forwards and backwards, and return what they return.

    One round before the first, the warm-up, is not counted. It ends after so many rounds, or after so many seconds if
    there have been three by then.
    """
    found: dict[str, list[float]] = {side: [] for side in sides}
    end = time.monotonic() + seconds
    for number in range(-warm_up, rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > end:
            break
        for side in sides if number % 2 else reversed(sides):
            value = sides[side]()
            if number >= 0:
                found[side].append(value)
    return found


def add_options(parser: argparse.ArgumentParser, rounds: int = 9, seconds: float = 120.0) -> None:
    """Options of each benchmark that writes results; the defaults are those of the script."""
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write DATE-PART.json into it as well")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds of each comparison (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=seconds,
        help="start no further round of a comparison after so many, if there were three (default: %(default)s)",
    )  # fmt: skip


def show(part: str, comparison: Comparison) -> str:
    """A line for people: what weightd took, and its ratio to each other side."""
    first = comparison.spread(comparison.subject)
    line = f"{part}/{comparison.name}: {comparison.subject} {first.median:.4g} {comparison.unit}".rstrip()
    line += f" ({first.low:.4g}–{first.high:.4g}, n = {first.count})"
    for other in list(comparison.samples)[1:]:
        ratio = comparison.ratio(other)
        line += f"; {figure(ratio.median)} × {other} ({figure(ratio.low)}–{figure(ratio.high)})"
    return line


def figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.7f}".rstrip("0") if "e" in text else text


def to_json(comparison: Comparison) -> dict[str, Any]:
    """A row of `comparisons`, with medians and ratios, which are computed from the samples and never read.

    `aims` only where there are any.
    """
    samples = {side: [_round(value) for value in values] for side, values in comparison.samples.items()}
    rounded = dataclasses.replace(comparison, samples=samples)
    row = dataclasses.asdict(rounded)
    if not comparison.aims:
        del row["aims"]
    return row | {
        "medians": {side: _quartiles(rounded.spread(side)) for side in samples},
        "ratios": {other: _quartiles(spread) for other, spread in rounded.ratios().items()},
    }


def _quartiles(spread: Spread) -> dict[str, float]:
    return {"median": _round(spread.median), "low": _round(spread.low), "high": _round(spread.high)}


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _shown(arguments: Sequence[str]) -> Iterator[str]:
    """Arguments without folders, which name a machine."""
    for argument, before in zip(arguments, ["", *arguments], strict=False):
        if not {"--results", "--folder"} & {argument, before} and "/" not in argument:
            yield argument


def _commit() -> str:
    """Which sources were measured; `+` stands for changes that were not committed, other than of what a run writes."""
    but = [f":(top,exclude){path}" for path in _MADE]
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *but)
        return _git("describe", "--always", "--exclude=*") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    return run.stdout.strip()
