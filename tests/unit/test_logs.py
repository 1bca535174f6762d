"""The log's formats: text, JSON lines, and lines for the journal."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from typing import Any

import pytest

from weightd_daemon import logs
from weightd_daemon.config.settings import Settings


def record(message: str, *arguments: object, level: int = logging.INFO, error: bool = False) -> logging.LogRecord:
    info = None
    if error:
        try:
            raise ZeroDivisionError("by zero")
        except ZeroDivisionError:
            info = sys.exc_info()
    made = logging.LogRecord("weightd_daemon.x", level, "x.py", 1, message, arguments, info)
    made.created = 1_700_000_000.25
    return made


def as_json(*arguments: Any, **options: Any) -> dict[str, Any]:
    line = logs.JsonLines().format(record(*arguments, **options))
    assert "\n" not in line
    parsed: dict[str, Any] = json.loads(line)
    return parsed


def test_json_has_what_every_line_has() -> None:
    assert as_json("stopping", level=logging.WARNING) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "weightd_daemon.x",
        "message": "stopping",
    }


def test_json_has_the_fields_of_a_message() -> None:
    line = as_json("loaded 100%% content=%s total_bytes=%d of %s seconds=%.3f uid=%s", "sha256:ab", 5, "x", 1.25, None)
    assert line["message"] == "loaded 100% content=sha256:ab total_bytes=5 of x seconds=1.250 uid=unknown"
    assert {key: line[key] for key in list(line)[4:]} == {
        "content": "sha256:ab", "total_bytes": 5, "seconds": 1.25, "uid": None,
    }  # fmt: skip


def test_json_fields_do_not_take_the_place_of_what_every_line_has() -> None:
    line = as_json("level=%s message=%s socket=%s", "x", "y", os)
    assert (line["level"], line["message"]) == ("info", f"level=x message=y socket={os}")
    assert line["socket"] == str(os)


def test_json_has_a_traceback_in_one_line() -> None:
    line = as_json("a %s", "b\nc", level=logging.ERROR, error=True)
    assert line["message"] == "a b\nc"
    assert "ZeroDivisionError: by zero" in line["exception"]


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3), (logging.CRITICAL, 3)],
)
def test_the_journal_gets_a_priority_on_every_line_and_no_date(level: int, priority: int) -> None:
    assert logs.JournalLines().format(record("a=%d", 1, level=level)) == f"<{priority}>weightd_daemon.x a=1"
    lines = logs.JournalLines().format(record("failed", level=level, error=True)).splitlines()
    assert len(lines) > 3
    assert all(line.startswith(f"<{priority}>") for line in lines)


def test_people_read_that_something_is_unknown() -> None:
    line = logs.TextLines("%(message)s").format(record("attached pid=%s uid=%s 100%%", None, 5))
    assert line == "attached pid=unknown uid=5 100%"
    assert logs.JournalLines().format(record("pid=%s", None)) == "<6>weightd_daemon.x pid=unknown"
    assert logs.JournalLines().format(record("100%")) == "<6>weightd_daemon.x 100%"


def test_the_format_follows_the_setting_and_where_standard_error_goes() -> None:
    status = os.fstat(2)
    journal = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    another = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"}
    assert isinstance(logs._formatter(Settings(log_format="json"), journal), logs.JsonLines)
    assert isinstance(logs._formatter(Settings(), journal), logs.JournalLines)
    for environment in ({}, another):
        text = logs._formatter(Settings(), environment).format(record("x"))
        assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:,]+ INFO weightd_daemon\.x x", text)
