"""A program that a test writes, on the fake GPU: a process forked from one that has imported what it needs."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Mapping

from support import template

PROGRAM = "support.gpu_program"
IMPORTS = ("cuda.core", "support.gpu_segments")  # and numpy, with cuda.core
"""None of them calls the driver when it is imported."""


def run(source: str, variables: Mapping[str, str], usual: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `source` with the names of support/gpu_segments.py. For `usual` see `template.start`."""
    imports = ["torch"] if "import torch\n" in source else []  # others run where there is none
    argv = [sys.executable, "-W", "error", "-m", PROGRAM, source]
    return template.run(PROGRAM, [source], variables, usual, argv, words=imports)


def main() -> None:
    """Run the source that is the last argument."""
    warnings.simplefilter("error")
    program = compile(f"from support.gpu_segments import *\n{sys.argv[-1]}", "<the test's program>", "exec")
    exec(program, globals())  # what it made goes when the interpreter ends


if __name__ == "__main__":
    if (line := template.line_of(sys.argv[1:])) is None:
        main()
    else:
        template.serve(line, main, [*IMPORTS, *sys.argv[1:-1]])
