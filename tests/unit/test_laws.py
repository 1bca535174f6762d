"""The laws of memory are numbered beside the core, and the code that upholds them cites them."""

from __future__ import annotations

import re
from pathlib import Path

DAEMON = Path(__file__).resolve().parents[2] / "daemon" / "weightd_daemon"
_CITED = re.compile(r"\blaws? (\d+)\b", re.IGNORECASE)


def laws() -> list[int]:
    return [int(number) for number in re.findall(r"^(\d+)\. ", (DAEMON / "core" / "LAWS.md").read_text(), re.MULTILINE)]


def test_laws_are_numbered_from_one_on() -> None:
    assert len(laws()) > 5
    assert laws() == list(range(1, len(laws()) + 1))


def test_each_law_is_cited_where_it_is_upheld_and_no_other() -> None:
    cited: dict[int, list[str]] = {}
    for path in DAEMON.rglob("*.py"):
        for number in _CITED.findall(path.read_text()):
            cited.setdefault(int(number), []).append(path.name)
    assert set(laws()) - cited.keys() == set(), "a law that nothing upholds"
    assert cited.keys() - set(laws()) == set(), {number: cited[number] for number in cited.keys() - set(laws())}
