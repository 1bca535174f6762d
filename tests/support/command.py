"""The `weightd` command, run by tests: a process of its own, forked from one that has imported what commands need.

`python -m support.command` is `python -m weightd`, or with `--forks` a template of it (support/template.py).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.util import find_spec

from support import template

PROGRAM = "support.command"
_OF_TYPER = ["pydantic.types"] if find_spec("pydantic") else []
"""What newer ones import when they convert the first argument."""
IMPORTS = ("weightd.cli.app", "weightd.client", "weightd._transport.rpc", *_OF_TYPER)
_SECONDS = 100.0


def run(
    arguments: Iterable[str], variables: Mapping[str, str], usual: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `weightd ARGUMENTS` with nothing to read. For `usual` see `template.start`."""
    argv = [sys.executable, "-m", "weightd", *arguments]
    with tempfile.TemporaryFile("w+") as errors:
        process = None
        if template.in_a_test():
            process = template.start(PROGRAM, variables, usual, argv[3:], errors.fileno())
        if process is None:
            return subprocess.run(
                argv, env=dict(variables), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS,
                check=False,
            )  # fmt: skip
        process.stdin.close()
        with process.stdout:
            printed = process.stdout.read()
        code = process.wait(_SECONDS)
        errors.seek(0)
        return subprocess.CompletedProcess(argv, code, printed, errors.read())


def main() -> None:
    """Be the command, to its end."""
    from weightd.cli import main as command

    sys.exit(command())


if __name__ == "__main__":
    if (line := template.line_of(sys.argv[1:])) is None:
        main()
    else:
        template.serve(line, main, IMPORTS)
