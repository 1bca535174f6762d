"""Start a program that belongs to the daemon or the fleet, which the client may not import, and read its answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from weightd.errors import WeightdError, from_wire

Show = Callable[[str, int, int], None]
"""Called with what the program does, bytes done and total bytes."""


def ask(module: str, arguments: Sequence[str], show: Show, note: Callable[[str], None]) -> dict[str, Any]:
    """Run `python -m module` and return the JSON that it ends with. The process ends with this call in any case.

    `note` is called with each choice of the program's that nobody asked for. Raises the error that it answers with.
    """
    # -P: a package of that name in the current directory must not be what starts. The group is the process's own, so
    # that Ctrl-C reaches this one only, which then says so.
    command = [sys.executable, "-P", "-m", module, f"--parent={os.getpid()}", *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                message: dict[str, Any] = json.loads(line)
                if "note" in message:
                    note(message["note"])
                elif "error" in message:
                    raise from_wire(message["error"], message["message"])
                elif "done" in message:
                    show(message["what"], message["done"], message["total"])
                else:
                    return message
            process.wait()
        finally:
            process.kill()
    raise WeightdError(f"the process that reads the files ended without an answer (exit code {process.returncode})")
