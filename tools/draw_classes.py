"""Draw ten public classes by a seed: can somebody who does not know the code say in which folder each lies?

    python tools/draw_classes.py SEED          the classes, and the folders to choose from
    python tools/draw_classes.py SEED --places where they lie

How it went is written down in docs/decisions/0032-rooms.md.
"""

from __future__ import annotations

import ast
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT / "client" / "weightd", ROOT / "daemon" / "weightd_daemon")


def classes() -> list[tuple[str, str]]:
    """Every public class that lies in a folder of the client or the daemon: its name and that folder."""
    found = []
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            room = path.relative_to(package).parts[0]
            if room != path.name and room != "_proto" and "_proto" not in path.parts:
                names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
                found += [(name, f"{package.name}/{room}") for name in names if not name.startswith("_")]
    return found


def main() -> None:
    every = classes()
    drawn = random.Random(int(sys.argv[1])).sample(every, 10)  # a game, no secret
    for name, folder in drawn:
        print(f"{name}: {folder}" if "--places" in sys.argv else name)
    if "--places" not in sys.argv:
        print("\nfolders:", *sorted({folder for _, folder in every}), sep="\n  ")


if __name__ == "__main__":
    main()
