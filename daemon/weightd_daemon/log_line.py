"""A log line, made of words for people and fields for programs.

`log.info(Line("attached", {"lease": 9, "device": "host"}))` reads "attached lease=9 device=host"; in JSON the line has
the keys `lease` and `device`, too.
"""

from __future__ import annotations

from collections.abc import Mapping

Fields = Mapping[str, object]


class Line:
    """What a line says: words and fields in their order, and after a colon the reason, if there is `because`.

    `more` are fields that only programs read.
    """

    def __init__(self, *parts: str | Fields, because: object = None, more: Fields | None = None) -> None:
        self._parts = parts
        self._because = because
        self._more = more or {}

    @property
    def fields(self) -> dict[str, object]:
        """All fields, by their keys; what JSON has no value for is text."""
        shown = [part for part in self._parts if not isinstance(part, str)]
        return {key: _plain(value) for fields in (*shown, self._more) for key, value in fields.items()}

    def __str__(self) -> str:
        words = (part if isinstance(part, str) else _written(part) for part in self._parts)
        line = " ".join(word for word in words if word)
        return line if self._because is None else f"{line}: {self._because}"


def _written(fields: Fields) -> str:
    return " ".join(f"{key}={_value(value)}" for key, value in fields.items())


def _value(value: object) -> str:
    if value is None:
        return "unknown"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | list | None) else str(value)
