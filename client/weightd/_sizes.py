"""Format numbers of bytes for people, in the client and in the daemon. `config/notation.py` parses them."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_FOUR_DIGITS = 999.5
"""What rounds to 1,000 is written in the next unit."""


def size(count: int) -> str:
    """Write bytes with three digits: `0 B`, `24.0 KiB`, `199 MiB`, `18.9 GiB`."""
    if count < _FOUR_DIGITS:
        return f"{count} B"
    value, unit = float(count), 0
    while value >= _FOUR_DIGITS and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 3 if value < 0.9995 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {_UNITS[unit]}"
