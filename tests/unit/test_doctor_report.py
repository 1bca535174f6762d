"""How `weightd doctor` asks what may hang, and how it prints what it has found."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

from rich.console import Console

import weightd
from weightd.cli import doctor, main
from weightd.cli.health import asking
from weightd.cli.health.asking import Answer, Look
from weightd.cli.health.finding import CHECKS, Finding, Status

FOUND = [
    Finding("socket", Status.GOOD, "/run/weightd/weightd.sock"),
    Finding(
        "daemon", Status.BAD, "nobody listens there, " + "and so on, " * 20, "start one with `weightd serve`, " * 9
    ),
    Finding("devices", Status.UNKNOWN, "no daemon answers"),
    Finding("huge-pages", Status.DOUBTFUL, "shmem_enabled is [never] \x1b[31m", "`echo advise`"),
]
HANGS = "import time\ntime.sleep(1000)"


def python(program: str, *, begins: bool = True, limit: float = 60.0) -> Look:
    return Look([sys.executable, "-c", program], begins=begins, limit=limit)


# -- asking ------------------------------------------------------------------------------------------------------------


def test_a_look_answers() -> None:
    with python('print("begun", flush=True); print("{\\"a\\": 1}")') as look:
        assert look.answer() == Answer({"a": 1})
    with python('print("a=1")\nexit(3)', begins=False) as look:
        assert look.text() == Answer({"text": "a=1\n"})


def test_a_look_that_hangs_is_left_alone_and_killed() -> None:
    with python(f'print("begun", flush=True)\n{HANGS}', limit=0.01) as look:
        assert look.answer() == Answer({}, "did not answer in 0.01 s", late=True)
        assert look._process is not None
    assert look._process.returncode == -signal.SIGKILL


def test_the_start_of_an_interpreter_is_not_the_look_s_time(monkeypatch: pytest.MonkeyPatch) -> None:
    late = 'import time; time.sleep(0.5); print("begun", flush=True); print("{}")'
    with python(late, limit=0.4) as look:
        assert not look.answer().late
    monkeypatch.setattr(asking, "START_SECONDS", 0.01)
    with python(HANGS) as look:
        assert look.answer().late


@pytest.mark.parametrize("program", ["exit(1)", 'print("begun")', 'print("begun"); print("no JSON")'])
def test_a_look_that_fails_is_unknown(program: str) -> None:
    with python(program) as look:
        answer = look.answer()
    assert answer == Answer({}, "the look ended without an answer")
    assert answer.failed("memfd") == [Finding("memfd", Status.UNKNOWN, "the look ended without an answer")]


def test_a_program_that_is_not_there_is_unknown() -> None:
    with Look(["/nonexistent/systemctl", "show"]) as look:
        answer = look.text()
    assert answer == Answer({}, "/nonexistent/systemctl cannot be run: No such file or directory")


def test_a_look_that_hangs_costs_the_other_checks_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = asking.python

    def hanging(module: str, *arguments: str) -> Look:
        return (
            python(f'print("begun", flush=True)\n{HANGS}', limit=0.01)
            if "state" in arguments
            else begun(module, *arguments)
        )

    monkeypatch.setattr(doctor.asking, "python", hanging)
    main(["doctor", "--socket", str(tmp_path / "w.sock"), "--format", "json"])
    checks = {each["check"]: each for each in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["state-dir"]["status"] == "doubtful"
    assert checks["state-dir"]["found"] == "did not answer in 0.01 s"
    assert checks["budget"]["status"] != "unknown"


def test_the_driver_is_not_asked_where_that_would_make_device_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.asking, "python", None)  # not to be called
    for host in (Answer({}, "late", late=True), Answer({"nodes": {"missing": ["nvidia-uvm"]}})):
        assert doctor._ask_driver(None, host) == (None, None)  # type: ignore[arg-type]  # nor used


# -- printing ----------------------------------------------------------------------------------------------------------


def printed(*, quiet: bool = False, encoding: str = "utf-8", **settings: Any) -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    return list(doctor.report(FOUND, quiet=quiet, console=Console(file=file, **settings)))


def test_the_report_has_80_columns_and_no_colour_where_it_is_piped() -> None:
    lines = printed()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines)
    assert lines[0] == "daemon"
    assert lines[1] == "  ✔ good      socket              /run/weightd/weightd.sock"
    assert lines[2].startswith("  ✘ bad       daemon              nobody listens there, and so on,")
    assert "              -> start one with `weightd serve`, start one with `weightd serve`," in lines
    assert "  ! doubtful  huge-pages          shmem_enabled is [never] \\x1b[31m" in lines
    assert lines[-2:] == ["", "1 good, 1 doubtful, 1 bad, 1 unknown"]


def test_symbols_fall_back_to_ascii() -> None:
    lines = printed(encoding="ascii")
    assert "\n".join(lines).isascii()
    assert [line[2] for line in lines if line[4:8] in ("good", "bad ", "doub", "unkn")] == ["+", "x", "?", "!"]


def test_quiet_leaves_out_what_is_good() -> None:
    assert not any(" good " in line for line in printed(quiet=True)[:-1])
    assert any(" bad " in line for line in printed(quiet=True))


def test_a_terminal_gets_colours_and_its_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = printed(force_terminal=True, width=100, color_system="standard")
    assert lines[2].startswith("\x1b[1;31m  ✘ bad       daemon              \x1b[0m")
    assert 80 < max(map(len, printed(force_terminal=True, width=100, no_color=True))) <= 100
    assert "\x1b" not in "".join(printed(force_terminal=True, width=100, no_color=True))


def test_json_has_these_keys() -> None:
    found = doctor.as_json(FOUND)
    assert list(found) == ["version", "status", "counts", "checks"]
    assert found["version"] == weightd.__version__
    assert found["status"] == "bad"
    assert found["counts"] == {"good": 1, "doubtful": 1, "bad": 1, "unknown": 1}
    assert found["checks"][0] == {
        "area": "daemon", "check": "socket", "status": "good", "found": "/run/weightd/weightd.sock", "remedy": "",
    }  # fmt: skip
    assert doctor.as_json(FOUND[2:])["status"] == "doubtful"
    assert doctor.as_json(FOUND[:1])["status"] == "good"


@pytest.mark.parametrize(("found", "code"), [(FOUND, 1), (FOUND[2:], 0)])
def test_the_exit_code_says_whether_something_is_bad(
    found: list[Finding], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda _: found)
    assert main(["doctor"]) == code
    assert main(["doctor", "--format", "json"]) == code
    assert capsys.readouterr().out


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "\n    weightd doctor -q  " in shown
    assert "--format json | jq" in shown


def test_areas_come_in_their_order(tmp_path: Path) -> None:
    order = [each.check for each in doctor.examine(str(tmp_path / "w.sock"))]
    assert order == [check for check in CHECKS if check in order]
    assert os.listdir(tmp_path) == []
