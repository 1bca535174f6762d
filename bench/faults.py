"""What faults of the system and other users' numbers do: `python bench/faults.py [NAME ...]`. Needs root.

Each fault gets a daemon of its own on host memory, once. Prints a line of JSON for each: how often each outcome came
(a refusal by its class and the beginning of its message), whether bytes were wrong, whether the daemon lives, how many
tracebacks its log has, and what else the fault has to tell. The aim: no wrong byte, no dead daemon, no traceback, and
errors that name their reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("client", "daemon", "tests", ".")]

from _faults import FAULTS, Desk  # noqa: E402  # after the path


def main() -> None:
    """Try each fault, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"faults; all by default: {', '.join(FAULTS)}")
    for name in parser.parse_args().names or FAULTS:
        folder = Path(tempfile.mkdtemp(prefix="weightd-faults-"))
        folder.chmod(0o755)
        desk, began = Desk(folder), time.monotonic()
        try:
            found = FAULTS[name](desk)
            line = {
                "fault": name, "outcomes": dict(desk.outcomes), "wrong": desk.wrong, **(found or {}),
                "alive": desk.is_alive(), "tracebacks": desk.tracebacks(), "seconds": round(time.monotonic() - began),
                "load_average": round(os.getloadavg()[0], 1),
            }  # fmt: skip
        finally:
            desk.close()
            shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
