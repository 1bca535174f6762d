"""The setting `preload`: the checkpoints to load when the daemon starts, given as references or tables."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING

from .notation import parse_device
from .toml_file import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(frozen=True, slots=True)
class PreloadConfig:
    """Entry of the setting `preload`: a checkpoint's reference, and the options that `weightd load` has for it.

    With `wait` the daemon is not ready before it is resident. `where` says where this was set.
    """

    ref: str
    name: str = ""
    device: str = ""
    pin: bool = False
    wait: bool = False
    where: str = field(default="", compare=False)


_KEYS = {key.name: bool if key.type == "bool" else str for key in fields(PreloadConfig) if key.name != "where"}


def preloads_from(values: Iterable[object], where: Callable[[int, str], str]) -> tuple[PreloadConfig, ...]:
    """What the elements of the setting say; `where(number, key)` says where one stands. Errors: ConfigError."""
    return tuple(_preload(value, number, where) for number, value in enumerate(values))


def _preload(value: object, number: int, where: Callable[[int, str], str]) -> PreloadConfig:
    table = {"ref": value} if isinstance(value, str) else value

    def refuse(key: str, why: str) -> ConfigError:
        return ConfigError(f"{where(number, key)}: preload {number + 1}: {why}")

    if not isinstance(table, dict):
        raise refuse("", f"{value!r} is neither a reference nor a table")
    for key, said in table.items():
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise refuse(key, f"{key}: no such key{hint}; there are {', '.join(_KEYS)}")
        if not isinstance(said, _KEYS[key]):
            raise refuse(key, f"{key} = {said!r}: is not {'true or false' if _KEYS[key] is bool else 'text'}")
    if not table.get("ref") or "\0" in table["ref"]:
        raise refuse("ref", "has no ref; give a path or org/name[@revision]")
    if table["ref"].startswith("."):
        raise refuse("ref", f"ref = {table['ref']!r}: is relative; give an absolute path or org/name[@revision]")
    if device := table.get("device"):
        try:
            table = {**table, "device": parse_device(device)}
        except ValueError as error:
            raise refuse("device", f"device = {device!r}: {error}") from None
    return PreloadConfig(**table, where=where(number, ""))
