"""`python -m soak`: one soak; exits with 1 where anything was found that must not happen."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from soak.report import Report
from soak.soak import Options, Soak
from support import fakecuda
from support.backends import HOST, Backend


def main() -> int:
    """Run a soak, print what came of it, and keep its folder where something was found."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--memory", choices=("host", "cuda_vmm"), default="host", help="cuda_vmm: of the double")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--folder", type=Path, help="an empty folder of the soak's own, with a short path")
    for option in fields(Options):
        if isinstance(option.default, int | float):
            flag = f"--{option.name.replace('_', '-')}"
            parser.add_argument(flag, type=type(option.default), default=option.default)
    given = vars(parser.parse_args())
    folder = given.pop("folder") or Path(tempfile.mkdtemp(prefix="weightd-soak-"))
    memory, figures = given.pop("memory"), given.pop("json")
    backend = HOST
    if memory != "host":
        (folder / "driver").mkdir()
        fakecuda.build(folder / "driver")
        fakecuda.preload(folder / "driver")
        backend = Backend(memory, memory, folder / "driver")
        given["budgets_mib"] = (48, 80)  # a page is 2 MiB there
    soak = Soak(Options(backend, **given), folder)
    try:
        report = Report(soak.options, soak.plan, soak.run())
    finally:
        soak.close()
    print(report.as_text())
    if figures is not None:
        figures.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if report.findings:
        print(f"the folder is kept: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
