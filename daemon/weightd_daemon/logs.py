"""The log: text or JSON lines on standard error, and lines with priorities where that is the journal."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .config.settings import Settings

_PLACE = re.compile(r"(?:(\w+)=)?%[-#0-9.]*([a-z%])")
"""A place for an argument in the format of a message, with its key where it is written as KEY=%s."""
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG_PRIORITY = 7
_CHATTY = ("grpc", "asyncio")
"""Their debug messages are about themselves."""


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, each `key=value` of the message, exception.

    A record may have more of them in `fields` (logging's `extra`).
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{stamp}.{int(record.created % 1 * 1000):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        more: dict[str, object] = getattr(record, "fields", {})
        return json.dumps(line | _fields(record, line) | more)


class TextLines(logging.Formatter):
    """Lines for people: what is not known is "unknown"."""

    def format(self, record: logging.LogRecord) -> str:
        """The lines, without the last one's end."""
        shown = copy.copy(record)
        shown.msg, shown.args = _message(record), None
        return super().format(shown)


class JournalLines(TextLines):
    """Each line with its priority, as sd-daemon(3) says; the journal has the date itself."""

    def __init__(self) -> None:
        super().__init__("%(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The lines, without the last one's end."""
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), _DEBUG_PRIORITY)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def begin(settings: Settings, environment: Mapping[str, str] = os.environ) -> None:
    """Log to standard error as the settings say."""
    logging.getLogger().addHandler(logging.StreamHandler(sys.stderr))
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.INFO)
    change(settings, environment)


def change(settings: Settings, environment: Mapping[str, str] = os.environ) -> None:
    """Go on with another level or format."""
    root = logging.getLogger()
    root.setLevel(settings.log_level.upper())
    for handler in root.handlers:
        handler.setFormatter(_formatter(settings, environment))


def _formatter(settings: Settings, environment: Mapping[str, str]) -> logging.Formatter:
    if settings.log_format == "json":
        return JsonLines()
    if _is_journal(environment.get("JOURNAL_STREAM", "")):
        return JournalLines()
    return TextLines("%(asctime)s %(levelname)s %(name)s %(message)s")


def _is_journal(stream: str) -> bool:
    """Whether standard error is the journal: $JOURNAL_STREAM is inherited by those who have another one, too."""
    status = os.fstat(2)
    return stream == f"{status.st_dev}:{status.st_ino}"


def _message(record: logging.LogRecord) -> str:
    if not isinstance(record.args, tuple) or None not in record.args:
        return record.getMessage()
    return str(record.msg) % tuple("unknown" if value is None else value for value in record.args)


def _fields(record: logging.LogRecord, taken: Mapping[str, object]) -> dict[str, object]:
    """The arguments that have a key in the message; what JSON has no number or text for becomes text."""
    if not isinstance(record.args, tuple):
        return {}
    keys = [match[1] for match in _PLACE.finditer(str(record.msg)) if match[2] != "%"]
    return {
        key: value if isinstance(value, str | int | float | None) else str(value)
        for key, value in zip(keys, record.args, strict=False)
        if key and key not in taken
    }
