"""The configuration file: its values, and the line of each value, which tomllib does not report."""

from __future__ import annotations

import errno
import json
import re
import tomllib
from typing import TYPE_CHECKING, Any, ClassVar, Self

from weightd._limits import DAEMON, limit_error
from weightd.errors import ResourceLimitError

if TYPE_CHECKING:
    from pathlib import Path

MOST_BYTES = 1 << 20
"""Largest file that is read."""


class ConfigError(Exception):
    """A setting is invalid; the message says where it stands.

    `key` is the setting where the message does not say: where only the daemon could find out, as it began to serve.
    """

    exit_code: ClassVar[int] = 78
    """With which the daemon ends. A service manager does not start it again: waiting would not help."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class TemporaryConfigError(ConfigError):
    """A setting names a driver, mount, file or memory that is not available now; the next start may find it."""

    exit_code = 75

    @classmethod
    def of(cls, error: OSError, what: str) -> Self | None:
        """The error, where the system lacks something that `what` needs; None where it is another failure."""
        limit = error if isinstance(error, ResourceLimitError) else limit_error(error, what, DAEMON)
        if limit:
            return cls(limit.message)
        return cls(f"{what}: {error.strerror}") if error.errno in (errno.ENOSPC, errno.EDQUOT) else None


class ConfigFile:
    """A TOML file of settings, as it was when it was read.

    Errors: ConfigError; TemporaryConfigError (it cannot be read).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                raw = file.read(MOST_BYTES + 1)
            if len(raw) > MOST_BYTES:
                raise ConfigError(f"{path}: over {MOST_BYTES} bytes; not a configuration")
            text = raw.decode()
            self.values: dict[str, Any] = tomllib.loads(text)
            repr(self.values)  # else an error that is to show one fails
        except OSError as error:
            raise TemporaryConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: is not TOML: {error}") from error
        except ValueError as error:  # of Python's longest number; TOML's is shorter
            raise ConfigError(f"{path}: is not TOML: a number has more than 64 bits") from error
        self._lines = text.splitlines()

    def where(self, key: str, number: int = 0, inner: str = "") -> str:
        """File and line of a key; of element `number` of its array, or of the key `inner` in that table."""
        line = self._line(key, number, inner)
        return f"{self._path}: line {line}" if line else str(self._path)

    def _line(self, key: str, number: int, inner: str) -> int:
        """The line's number, from 1, or that of the nearest line above that can be told; 0 where none can."""
        name = _spelled(key)
        heads = [at for at, line in enumerate(self._lines) if re.match(rf"\s*\[\[\s*{name}\s*\]\]", line)]
        if heads:  # [[key]], and a table each
            start = heads[min(number, len(heads) - 1)]
            for at in range(start + 1, len(self._lines)):
                if re.match(r"\s*\[", self._lines[at]):
                    break
                if inner and re.match(rf"\s*{_spelled(inner)}\s*[=.]", self._lines[at]):
                    return at + 1
            return start + 1
        for start, line in enumerate(self._lines):
            if re.match(rf"\s*\[?\s*{name}\s*[=.\]]", line):
                if not re.search(r"=\s*\[\s*(#.*)?$", line):
                    return start + 1
                # key = [ and an element a line
                elements = [at for at in range(start, len(self._lines)) if re.match(r"\s*[{\"']", self._lines[at])]
                return (elements[number] if number < len(elements) else start) + 1
        return 0


def _spelled(key: str) -> str:
    return rf"[\"']?{re.escape(key)}[\"']?"


def toml_value(value: object) -> str:
    """Write text, a number, a truth value, or lists and tables of those, on one line of TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml_value(inner)}' for key, inner in value.items())} }}"
    if isinstance(value, str):
        # JSON's escapes are TOML's; what is beyond ASCII stands for itself, and DEL must not. TOML has no other bytes.
        value = value.encode(errors="replace").decode()
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)
