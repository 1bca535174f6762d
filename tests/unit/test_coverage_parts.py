"""What `make coverage` says of a report, on one that is made up; and that its parts are those of CONTRIBUTING."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from support.daemon import ROOT

coverage_parts = pytest.importorskip("tools.coverage_parts")

PARTS = {"core": ("core/*",), "moving": ("moving/read.py", "moving/w*.py")}


def report(branch: bool = True, **files: tuple[int, list[list[int]]]) -> dict[str, Any]:
    """A report as `coverage json` writes it; of each file, `_` for `/`, its branches and the missing ones."""
    return {
        "meta": {"format": 3, "branch_coverage": branch},
        "files": {
            f"{name.replace('_', '/')}.py": {
                "summary": {"num_branches": branches, "covered_branches": branches - len(missing)},
                "missing_branches": missing,
            }
            for name, (branches, missing) in files.items()
        },
    }


def lines(count: int) -> list[list[int]]:
    """That many missing branches."""
    return [[line, line + 2] for line in range(count)]


def test_branches_of_a_part_are_those_of_all_its_files() -> None:
    seen = report(
        core_a=(60, [[7, 9]]), core_b=(40, lines(3)), moving_read=(2, []), moving_write=(18, [[4, 6], [8, -3]]),
        other=(50, lines(50)),
    )  # fmt: skip
    core, moving = coverage_parts.figures(seen, PARTS)
    assert (core.branches, core.reached, core.enough) == (100, 96, True)
    assert core.unreached == ["core/a.py: 7->9", "core/b.py: 0->2, 1->3, 2->4"]
    assert str(core) == "core: 96.0 % of 100 branches"
    assert (moving.branches, moving.reached, moving.enough) == (20, 18, False)
    assert moving.unreached == ["moving/write.py: 4->6, 8->exit"]
    assert str(moving) == "moving: 90.0 % of 20 branches, below 95 %"


@pytest.mark.parametrize(
    ("missing", "enough", "share"), [(0, True, "100.0"), (500, True, "95.0"), (501, False, "94.9")]
)
def test_the_aim_is_enough_and_a_share_just_below_it_does_not_read_like_it(
    missing: int, enough: bool, share: str
) -> None:
    (core,) = coverage_parts.figures(report(core_a=(10000, lines(missing))), {"core": ("core/*",)})
    assert core.enough is enough
    assert str(core).startswith(f"core: {share} %")


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (report(core_a=(4, []), moving_write=(4, [])), "moving: no file fits moving/read.py"),
        (report(core_a=(0, []), moving_read=(1, []), moving_write=(1, [])), "core has no branch"),
        (report(branch=False, core_a=(4, []), moving_read=(1, []), moving_write=(1, [])), "not measured"),
    ],
)
def test_a_report_that_cannot_say_is_refused(seen: dict[str, Any], message: str) -> None:
    with pytest.raises(coverage_parts.ReportError, match=message):
        list(coverage_parts.figures(seen, PARTS))


def run(monkeypatch: pytest.MonkeyPatch, text: str) -> int:
    monkeypatch.setattr(coverage_parts, "PARTS", PARTS)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code: int = coverage_parts.main()
    return code


def test_all_parts_are_printed_and_one_that_is_low_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = report(core_a=(100, [[7, 9]]), moving_read=(10, [[1, 2]]), moving_write=(2, []))
    assert run(monkeypatch, json.dumps(seen)) == 1
    assert capsys.readouterr().out.splitlines() == [
        "core: 99.0 % of 100 branches",
        "  core/a.py: 7->9",
        "moving: 91.6 % of 12 branches, below 95 %",
        "  moving/read.py: 1->2",
        "coverage: moving below 95 %",
    ]


def test_parts_that_have_enough_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, json.dumps(report(core_a=(100, [[7, 9]]), moving_read=(9, []), moving_write=(2, [])))) == 0
    assert capsys.readouterr().out.endswith("coverage: each part has 95 % or more\n")


@pytest.mark.parametrize("text", ["", json.dumps(report(core_a=(4, [])))])
def test_no_report_or_one_that_lacks_a_file_fails(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, text) == 1
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.startswith("coverage: ")


SOURCE = """
def read(limit):
    while limit:
        limit -= 1
        if limit > 5:
            return limit

read(9)
"""


def test_what_coverage_writes_is_understood(tmp_path: Path) -> None:
    pytest.importorskip("coverage")
    (tmp_path / "source.py").write_text(SOURCE)
    # Where this test is itself measured, its children are not: they would write into this folder.
    apart = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}

    def coverage(*command: str) -> str:
        argv = [sys.executable, "-m", "coverage", *command]
        return subprocess.run(argv, cwd=tmp_path, env=apart, capture_output=True, text=True, check=True).stdout

    coverage("run", "--branch", "source.py")
    (seen,) = coverage_parts.figures(json.loads(coverage("json", "-q", "-o", "-")), {"all": ("*.py",)})
    assert seen.unreached == ["source.py: 3->exit, 5->3"]
    assert str(seen) == "all: 50.0 % of 4 branches, below 95 %"


def test_each_pattern_fits_a_file_and_no_file_is_in_two_parts() -> None:
    roots = [ROOT / name for name in ("client", "daemon", "fleet")]
    sources = [str(path.relative_to(ROOT)) for root in roots for path in root.rglob("*.py")]
    patterns = [pattern for patterns in coverage_parts.PARTS.values() for pattern in patterns]
    assert [pattern for pattern in patterns if not any(fnmatchcase(path, pattern) for path in sources)] == []
    assert [path for path in sources if sum(fnmatchcase(path, pattern) for pattern in patterns) > 1] == []


def test_contributing_has_a_row_for_each_part() -> None:
    section = re.split(r"^## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)
    (text,) = [part for part in section if part.startswith("Coverage\n")]
    rows = re.findall(r"^\| ([a-z ]+) \|", text, re.M)
    assert rows == ["part", *coverage_parts.PARTS]
