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
from weightd_daemon.log_line import Line


def record(
    message: str | Line, *arguments: object, level: int = logging.INFO, error: bool = False
) -> logging.LogRecord:
    info = None
    if error:
        try:
            raise ZeroDivisionError("by zero")
        except ZeroDivisionError:
            info = sys.exc_info()
    made = logging.LogRecord("weightd_daemon.x", level, "x.py", 1, message, arguments, info)  # type: ignore[arg-type]  # a Line
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


def test_json_has_the_fields_of_a_line() -> None:
    shown = {"content": "sha256:ab", "total_bytes": 5, "seconds": 1.25, "uid": None}
    line = as_json(Line("loaded 100% of x", shown, "at last", more={"names": ["a"]}, because="it was asked for"))
    text = "loaded 100% of x content=sha256:ab total_bytes=5 seconds=1.250 uid=unknown at last: it was asked for"
    assert line["message"] == text
    assert {key: line[key] for key in line if key not in as_json("x")} == shown | {"names": ["a"]}


def test_nothing_is_read_back_from_the_text_of_a_line() -> None:
    assert as_json("a name=b of %s", "c=d").keys() == as_json("x").keys()


def test_json_fields_do_not_take_the_place_of_what_every_line_has() -> None:
    line = as_json(Line({"level": "x", "message": "y", "socket": os}))
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
    assert logs.JournalLines().format(record(Line({"a": 1}), level=level)) == f"<{priority}>weightd_daemon.x a=1"
    lines = logs.JournalLines().format(record("failed", level=level, error=True)).splitlines()
    assert len(lines) > 3
    assert all(line.startswith(f"<{priority}>") for line in lines)


def test_people_read_that_something_is_unknown() -> None:
    assert str(Line("attached", "", {"pid": None, "uid": 5}, "100%")) == "attached pid=unknown uid=5 100%"
    assert logs.JournalLines().format(record(Line({"pid": None}))) == "<6>weightd_daemon.x pid=unknown"
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
