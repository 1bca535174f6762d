"""Make the tables of docs/performance.md and README, and the page's pictures, of the newest results of each part.

    .venv-peers/bin/python bench/page.py

The pictures need matplotlib, which the environment of the peers has. The same results make the same files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from _page import PAGES, digest, homeless, picture, renewed
from _results import FOLDER, Part, latest
from matplotlib import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
OURS, OTHER = "#1f6f8b", "#b8b8b8"
COLUMNS = 3
EXPONENT = "exponent"


def bars(axes: Axes, rows: list[tuple[str, float, float, float]], title: str, unit: str) -> None:
    """A bar for each row of label, median and quartiles; the first is weightd's."""
    labels = [label for label, *_ in rows]
    medians = [median for _, median, *_ in rows]
    errors = [[median - low for _, median, low, _ in rows], [high - median for _, median, _, high in rows]]
    colours = [OURS if label.startswith("weightd") or unit == EXPONENT else OTHER for label in labels]
    axes.barh(labels, medians, xerr=errors, color=colours, ecolor="#444444", capsize=2, height=0.7)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=8, loc="left")
    axes.set_xlabel(unit, fontsize=7)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def draw(part: Part, path: Path) -> None:
    """A panel for each comparison; what has one side only shares a panel."""
    panels = [
        ([(side, *one.spread(side)[:3]) for side in one.samples], one.name, one.unit)
        for one in part.comparisons.values()
        if len(one.samples) > 1
    ]
    alone = [one for one in part.comparisons.values() if len(one.samples) == 1]
    if alone:
        rows = [(one.name, *one.spread(one.subject)[:3]) for one in alone]
        panels.append((rows, "", alone[0].unit or EXPONENT))
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(len(rows) for rows, *_ in panels)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(3.4 * columns, (0.6 + 0.22 * tallest) * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (rows, title, unit) in zip(grid.flat, panels, strict=False):
        bars(axes, rows, title, unit)
    of = f"{part.path.name} {digest(part)}"
    figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": of})
    pyplot.close(figure)


def main() -> None:
    """Write all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "weightd", "svg.fonttype": "none", "font.family": "sans-serif"}
    parts = latest(FOLDER)
    if missing := homeless((ROOT / PAGES[0]).read_text(), parts):
        parser.error(f"{PAGES[0]} has no place for {', '.join(missing)}: write <!-- made: NAME --> and <!-- end -->")
    for name in PAGES:
        page = ROOT / name
        page.write_text(renewed(page.read_text(), parts))
    for name, part in parts.items():
        draw(part, ROOT / "docs/images" / picture(name))
    print(f"{' and '.join(PAGES)}: {', '.join(parts)}")


if __name__ == "__main__":
    main()
