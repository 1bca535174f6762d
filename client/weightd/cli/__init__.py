"""The `weightd` command. Only this package imports typer and rich, which may be missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_NEEDED = frozenset({"typer", "rich"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process) and return its exit code."""
    try:
        from weightd.cli.app import run
    except KeyboardInterrupt:  # while typer is imported, which takes a tenth of a second
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _NEEDED:
            raise
        sys.stderr.write("weightd's command needs typer and rich: pip install '.[cli]' in weightd's checkout\n")
        return 1
    return run(sys.argv[1:] if arguments is None else arguments)
