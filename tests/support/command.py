"""The `weightd` command, run by tests: a process of its own, forked from one that has imported what commands need.

`python -m support.command` is `python -m weightd`, or with `--forks` a template of it (support/template.py).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec

from support import template

PROGRAM = "support.command"
_OF_TYPER = ["pydantic.types"] if find_spec("pydantic") else []
"""What newer ones import when they convert the first argument."""
IMPORTS = ("weightd.cli.app", "weightd.client", "weightd._transport.rpc", *_OF_TYPER)


def run(
    arguments: Iterable[str], variables: Mapping[str, str], usual: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `weightd ARGUMENTS` with nothing to read. For `usual` see `template.start`."""
    arguments = [*arguments]
    return template.run(PROGRAM, arguments, variables, usual, [sys.executable, "-m", "weightd", *arguments])


def main() -> None:
    """Be the command, to its end."""
    from weightd.cli import main as command

    sys.exit(command())


if __name__ == "__main__":
    if (line := template.line_of(sys.argv[1:])) is None:
        main()
    else:
        template.serve(line, main, IMPORTS)
