"""Draw ten public classes by a seed: can somebody who does not know the code say in which folder each lies?

    python tools/draw_classes.py SEED          names and first lines of docstrings, and the folders to choose from
    python tools/draw_classes.py SEED --names  the names alone, and the folders
    python tools/draw_classes.py SEED --places the names, and where the classes lie

How it went is written down in docs/decisions/0032-rooms.md.
"""

from __future__ import annotations

import ast
import random
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT / "client" / "weightd", ROOT / "daemon" / "weightd_daemon", ROOT / "fleet" / "weightd_fleet")


class Drawn(NamedTuple):
    """A public class: its name, the folder in which it lies, and the first line of its docstring."""

    name: str
    folder: str
    docstring: str


def classes() -> list[Drawn]:
    """Every public class that lies in a folder of the client, the daemon or the fleet."""
    found = []
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            room = path.relative_to(package).parts[0]
            if room != path.name and "_proto" not in path.parts:
                nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
                found += [
                    Drawn(node.name, f"{package.name}/{room}", (ast.get_docstring(node) or "").partition("\n")[0])
                    for node in nodes
                    if not node.name.startswith("_")
                ]
    return found


def main() -> None:
    every = classes()
    for drawn in random.Random(int(sys.argv[1])).sample(every, 10):  # a game, no secret
        if "--places" in sys.argv:
            print(f"{drawn.name}: {drawn.folder}")
        else:
            print(drawn.name if "--names" in sys.argv else f"{drawn.name}: {drawn.docstring}")
    if "--places" not in sys.argv:
        print("\nfolders:", *sorted({drawn.folder for drawn in every}), sep="\n  ")


if __name__ == "__main__":
    main()
