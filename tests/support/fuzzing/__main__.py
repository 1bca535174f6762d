"""`python -m support.fuzzing [--seconds N] [TARGET ...]`: fuzz targets with Atheris, which is guided by coverage.

Each target has a process of its own, which ends at its first fault. Inputs that reach new code are kept in
.fuzz/TARGET, and go on from there the next time; an input with a fault is .fuzz/TARGET-crash-…, -timeout-… or -oom-….
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from . import corpus

_FOUND = Path(".fuzz")
_LIMITS = ("-timeout=5", "-rss_limit_mb=2048", "-max_len=16384", "-print_final_stats=1")


def main() -> int:
    """Fuzz one target after the other. Returns how many have a fault."""
    parser = argparse.ArgumentParser(prog="support.fuzzing", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(sorted(corpus.IDEAS))}")
    options = parser.parse_args()
    if unknown := set(options.targets) - corpus.IDEAS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: no such target; there are {', '.join(sorted(corpus.IDEAS))}")
    faulty = []
    for name in options.targets or sorted(corpus.IDEAS):
        print(f"fuzz: {name}", flush=True)
        found = _FOUND / name
        found.mkdir(parents=True, exist_ok=True)
        argv = [
            sys.executable, "-m", "support.fuzzing.guided", name, *_LIMITS, f"-max_total_time={options.seconds}",
            f"-artifact_prefix={_FOUND / name}-", str(found), str(corpus.FOLDER / name),
        ]  # fmt: skip
        if subprocess.run(argv, check=False).returncode:
            faulty.append(name)
    print(f"fuzz: faults in {', '.join(faulty)}; see {_FOUND}" if faulty else "fuzz: no faults")
    return len(faulty)


if __name__ == "__main__":
    sys.exit(main())
