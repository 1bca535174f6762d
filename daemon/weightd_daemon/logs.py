"""The log: text or JSON lines on standard error, with priorities if standard error is the journal."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import TYPE_CHECKING

from .log_line import Line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .config.settings import Settings

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG_PRIORITY = 7
_CHATTY = ("grpc", "asyncio")
"""Their debug messages are about themselves."""


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, the fields of a `Line`, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{stamp}.{int(record.created % 1 * 1000):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        fields = record.msg.fields if isinstance(record.msg, Line) else {}
        return json.dumps(line | {key: value for key, value in fields.items() if key not in line})


class JournalLines(logging.Formatter):
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
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")


def _is_journal(stream: str) -> bool:
    """Whether standard error is the journal: $JOURNAL_STREAM is inherited by those who have another one, too."""
    status = os.fstat(2)
    return stream == f"{status.st_dev}:{status.st_ino}"
