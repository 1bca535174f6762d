"""Write the report of `weightd plan` or `weightd fleet plan` as one HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from weightd._references.files import show
from weightd.cli.output import timestamp
from weightd.errors import InvalidReferenceError
from weightd.page.document import report_html


def require_writable(file: Path) -> None:
    """Check, before files are read for minutes, that a report can be written. Errors: InvalidReferenceError."""
    folder = file.parent
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise InvalidReferenceError(f"{show(file)}: cannot be written; give a file in a folder that you may write to")


def write_report(file: Path, report: Mapping[str, Any], notes: Sequence[str], title: str = "weightd plan") -> None:
    """Write a PlanReport, as JSON has it, as a page; `notes` are sentences for its foot.

    Errors: InvalidReferenceError (it cannot be written).
    """
    page = report_html({**report, "title": title, "made_at": timestamp(datetime.now(UTC)), "notes": [*notes]})
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InvalidReferenceError(f"{show(file)}: cannot be written: {error.strerror}") from error
