"""Settings: a TOML file, then WEIGHTD_* in the environment, then flags; the last word counts.

Every setting is one field of `Settings`; its key in the file, its variable and its flag follow from its name.
"""

from __future__ import annotations

import os
import pwd
import re
import tomllib
from dataclasses import dataclass, field, fields
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd._address import candidates, handles_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

EXIT_CONFIG = 78
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SOCKET_PATH_BYTES = 107
_LAST_PORT = 65535
_UUID_SHAPE = "00000000-0000-0000-0000-000000000000"
_UUID_PREFIX = "GPU-"
_UUID_LEAST = 8


class ConfigError(Exception):
    """A setting that cannot be; the message says where it stands."""


def _default_socket() -> str:
    return str(candidates()[0])


def _default_state_dir() -> str:
    if os.environ.get("STATE_DIRECTORY"):
        return os.environ["STATE_DIRECTORY"].split(":")[0]
    if os.environ.get("XDG_STATE_HOME"):
        return str(Path(os.environ["XDG_STATE_HOME"]) / "weightd")
    return "/var/lib/weightd" if os.geteuid() == 0 else str(Path.home() / ".local/state/weightd")


def _setting(default: Any, help_text: str, *, repeatable: bool = False) -> Any:
    metadata = {"help": help_text, "repeatable": repeatable}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """All settings, as text or numbers; `Settings.check` has been over them."""

    socket: str = _setting(_default_socket, "control socket; the handle socket lies beside it")
    socket_mode: str = _setting("0600", "mode of both sockets, octal; 0660 lets the group in")
    device: str = _setting(
        "auto",
        "what to serve: host, cuda (every GPU), cuda:N or GPU-UUID, separated by commas or the flag repeated; "
        "auto: host memory and every GPU",
        repeatable=True,
    )
    transport: str = _setting("auto", "how GPU memory is shared: cuda_vmm or cuda_ipc; auto tries")
    budget: str = _setting(
        "",
        "memory each device may use, as 12GiB or 80%, or DEVICE=12GiB for one, separated by commas or the flag "
        "repeated; empty: 80% of a GPU, half of host memory",
        repeatable=True,
    )
    pool: str = _setting(
        "",
        "freed host memory kept populated for the next load (GPU memory is given back); "
        "empty: an eighth of its budget, 2GiB at most",
    )
    state_dir: str = _setting(_default_state_dir, "directory of the digest index")
    isolation: str = _setting("shared", "shared: all users share; uid: each user apart")
    admins: str = _setting("", "users, by name or uid, who may do what owners may, separated by commas")
    reader_threads: int = _setting(0, "threads a load reads with; 0: one per core, 4 at most")
    max_loads: int = _setting(4, "loads at a time; others wait their turn")
    max_connections: int = _setting(1024, "connections on the handle socket")
    metrics: str = _setting(
        "",
        "where monitors read /metrics, /healthz and /readyz: 127.0.0.1:PORT, [::1]:PORT or the path of a Unix socket; "
        "empty: nowhere",
    )
    log_level: str = _setting("info", "debug, info, warning or error")

    @property
    def devices(self) -> tuple[str, ...]:
        """What to serve, as it was named: ("auto",), or "host", "cuda", "cuda:N", "GPU-…", each once.

        A UUID is in lower case, and may be only the beginning of one; `means` compares.
        """
        items = [item.strip() for item in self.device.split(",")]
        if "auto" in items and len(items) > 1:
            raise ValueError("auto is every device; it stands alone")
        if items == ["auto"]:
            return ("auto",)
        names = tuple(_device(item) for item in items)
        _refuse_twice(names)
        if "cuda" in names and set(names) - {"cuda", "host"}:
            raise ValueError("cuda is every GPU; name no other GPU beside it")
        return names

    @property
    def budget_devices(self) -> frozenset[str]:
        """The devices that have a budget of their own, spelled as in `devices`; "cuda" is every GPU."""
        return frozenset(self._budgets) - {""}

    def budget_for(self, names: Sequence[str]) -> float | int | None:
        """The budget of one device: an int is bytes, a float a share of the device, None that nothing is said.

        `names` is what the device is called, most telling first: ("GPU-…", "cuda:0", "cuda") or ("host",).
        """
        budgets = self._budgets
        said = (budgets[key] for name in names for key in budgets if means(key, name))
        return next(said, budgets.get(""))

    def budget_is_for(self, names: Sequence[str]) -> bool:
        """Whether a budget is said for this very device, not for all or for every GPU."""
        return any(means(said, name) for said in self.budget_devices - {"cuda"} for name in names)

    @property
    def _budgets(self) -> dict[str, float | int]:
        """Budgets by device; under "" that of the devices that are not named."""
        pairs: list[tuple[str, float | int]] = []
        for item in self.budget.split(",") if self.budget.strip() else ():
            device, named, amount = item.rpartition("=")
            pairs.append((_device(device) if named else "", _budget(amount)))
        names = [name for name, _ in pairs]
        if names.count("") > 1:
            raise ValueError("more than one value for the devices that are not named")
        _refuse_twice([name for name in names if name])
        return dict(pairs)

    @property
    def metrics_address(self) -> tuple[str, int] | Path | None:
        """Where monitors read: host and port, or a path; None for nowhere."""
        if not self.metrics:
            return None
        if self.metrics.startswith("/"):
            if len(os.fsencode(self.metrics)) > _SOCKET_PATH_BYTES:
                raise ValueError(f"the path is over {_SOCKET_PATH_BYTES} bytes; choose a shorter one")
            return Path(self.metrics)
        found = re.fullmatch(r"(127\.0\.0\.1|\[::1\]):([1-9][0-9]{0,4})", self.metrics)
        if not found or int(found[2]) > _LAST_PORT:
            raise ValueError("must be 127.0.0.1:PORT, [::1]:PORT or /the/path/of/a.sock: only this machine may read it")
        return found[1].strip("[]"), int(found[2])

    @property
    def admin_uids(self) -> frozenset[int]:
        """The admins' uids."""
        return frozenset(_uid(name) for name in re.split(r"[,\s]+", self.admins) if name)


class Loaded(NamedTuple):
    """Settings, and where each value came from."""

    settings: Settings
    origins: dict[str, str]


def default_config_path() -> Path | None:
    """The configuration file that is read when none is named; None where there is none."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    for path in (Path(home) / "weightd" / "weightd.toml", Path("/etc/weightd/weightd.toml")):
        if path.exists():
            return path
    return None


def load(config: Path | None, flags: Mapping[str, str | list[str] | None], environment: Mapping[str, str]) -> Loaded:
    """Put the settings together; a flag that was repeated is a list. Errors: ConfigError."""
    kinds: dict[str, type] = {f.name: int if f.type == "int" else str for f in fields(Settings)}
    values: dict[str, Any] = {}
    origins = dict.fromkeys(kinds, "default")
    path = config or default_config_path()
    if path is not None:
        for key, value in _read(path).items():
            where = f"{path}: {_line_of(path, key)}{key}"
            if key not in kinds:
                raise ConfigError(f"{where}: no such setting; there are {', '.join(kinds)}")
            values[key] = _convert(value, kinds[key], where)
            origins[key] = str(path)
    for key, kind in kinds.items():
        variable = f"WEIGHTD_{key.upper()}"
        if environment.get(variable):
            values[key], origins[key] = _convert(environment[variable], kind, variable), variable
        flag = flags.get(key)
        if flag is not None:
            name = f"--{key.replace('_', '-')}"
            values[key], origins[key] = _convert(flag, kind, name), name
    settings = Settings(**values)
    _check(settings, origins)
    return Loaded(settings, origins)


def parse_size(text: str) -> int:
    """Bytes from "12GiB", "500M" or "1073741824"; units are powers of 1024. Errors: ValueError."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size such as 12GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def means(said: str, name: str) -> bool:
    """Whether a device that is called `name` is what a setting says; of a UUID the beginning will do."""
    return name.startswith(said) if said.startswith(_UUID_PREFIX) else name == said


def _device(text: str) -> str:
    """A device as people name it, a UUID in lower case as drivers write it. Errors: ValueError."""
    text = text.strip()
    if re.fullmatch(r"host|cuda(:(0|[1-9][0-9]{0,3}))?", text):
        return text
    prefix, digits = text[:4], text[4:].lower()
    shape = re.sub(r"[0-9a-f]", "0", digits)
    if prefix == _UUID_PREFIX and len(digits) >= _UUID_LEAST and _UUID_SHAPE.startswith(shape):
        return prefix + digits
    raise ValueError(
        f"{text!r} is no device; use host, cuda, cuda:N, or GPU- and a UUID or its first {_UUID_LEAST} digits or more"
    )


def _refuse_twice(names: Sequence[str]) -> None:
    for one, other in permutations(names, 2):
        if means(one, other):
            raise ValueError(f"{one} and {other} do not name two devices")


def _budget(text: str) -> float | int:
    """Bytes as an int, or a share as a float. Errors: ValueError."""
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    try:
        amount = float(percent[1]) / 100 if percent else parse_size(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a size such as 12GiB, nor a share such as 80%") from None
    if amount <= 0 or (isinstance(amount, float) and amount > 1):
        raise ValueError(f"{text!r}: must be more than nothing and at most 100%")
    return amount


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error


def _line_of(path: Path, key: str) -> str:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if re.match(rf"\s*\[?\[?[\"']?{re.escape(key)}\b", line):
            return f"line {number}: "
    return ""


def _convert(value: object, kind: type, where: str) -> str | int:
    if isinstance(value, list) and kind is str and all(isinstance(part, str | int) for part in value):
        value = ",".join(map(str, value))
    if kind is str and isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    try:
        if isinstance(value, str | int) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise ConfigError(f"{where}: {value!r} is not {'a number' if kind is int else 'text'}")


def _check(settings: Settings, origins: dict[str, str]) -> None:
    """Refuse values that cannot be. Errors: ConfigError naming the origin."""

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{origins[key]}: {key} = {getattr(settings, key)!r}: {why}")

    for key, least in (("reader_threads", 0), ("max_loads", 1), ("max_connections", 1)):
        if getattr(settings, key) < least:
            refuse(key, f"must be at least {least}")
    choices = {
        "transport": ("auto", "cuda_vmm", "cuda_ipc"),
        "isolation": ("shared", "uid"),
        "log_level": ("debug", "info", "warning", "error"),
    }
    for key, allowed in choices.items():
        if getattr(settings, key) not in allowed:
            refuse(key, f"must be one of {', '.join(allowed)}")
    if not re.fullmatch(r"0?[0-7]{3}", settings.socket_mode):
        refuse("socket_mode", "must be an octal mode such as 0660")
    if len(os.fsencode(handles_path(Path(settings.socket)))) > _SOCKET_PATH_BYTES:
        refuse("socket", f"its handle socket's path would be over {_SOCKET_PATH_BYTES} bytes; choose a shorter one")
    parsers: dict[str, Callable[[], object]] = {
        "device": lambda: settings.devices,
        "budget": lambda: settings.budget_devices,
        "pool": lambda: parse_size(settings.pool or "0"),
        "metrics": lambda: settings.metrics_address,
    }
    for key, parse in parsers.items():
        try:
            parse()
        except ValueError as error:
            refuse(key, str(error))
    try:
        _ = settings.admin_uids
    except KeyError as error:
        refuse("admins", f"no user {error.args[0]}")


def _uid(name: str) -> int:
    if name.isdigit():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise KeyError(name) from None
