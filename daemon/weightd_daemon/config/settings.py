"""Settings: a TOML file, then WEIGHTD_* in the environment, then flags; later sources override earlier ones.

Every setting is one field of `Settings`; the field's name determines the key, the variable and the flag.
"""

from __future__ import annotations

import os
import pwd
import re
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd._settings import SETTINGS
from weightd._transport.address import check_path, handles_path, serving_socket
from weightd.errors import InvalidReferenceError
from weightd_daemon.core.limits import UserLimits

from .notation import means, parse_budget, parse_device, parse_size, refuse_twice
from .preload_entry import PreloadConfig, preloads_from
from .toml_file import ConfigError, ConfigFile, TemporaryConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    _Find = Callable[[str, int, str], str]

__all__ = [
    "DEFAULT",
    "ConfigError",
    "LoadedSettings",
    "Settings",
    "SettingsInForce",
    "TemporaryConfigError",
    "load",
    "plain",
]

DEFAULT = "default"
"""Origin of a value that nobody has set."""

_SOCKET_PATH_BYTES = 107
_MOST_NUMBER = (1 << 31) - 1
_BOUNDS = {"reader_threads": (0, 256), "max_loads": (1, 1024), "max_connections": (1, 1 << 20)}
"""Least and most of what costs a thread, a process or a descriptor each; other numbers are from 0 to `_MOST_NUMBER`."""
_LAST_PORT = 65535
_LOOPBACK = ("127.0.0.1", "::1")


def _default_socket() -> str:
    return os.environ.get("WEIGHTD_SOCKET") or str(serving_socket())


def _default_state_dir() -> str:
    if os.environ.get("STATE_DIRECTORY"):
        return os.environ["STATE_DIRECTORY"].split(":")[0]
    if os.environ.get("XDG_STATE_HOME"):
        return str(Path(os.environ["XDG_STATE_HOME"]) / "weightd")
    return "/var/lib/weightd" if os.geteuid() == 0 else str(Path.home() / ".local/state/weightd")


def _setting(name: str, default: Any) -> Any:
    metadata = SETTINGS[name]._asdict()
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """All settings of the daemon, as text, numbers or tuples; `load` has checked them."""

    socket: str = _setting("socket", _default_socket)
    socket_mode: str = _setting("socket_mode", "0600")
    device: str = _setting("device", "auto")
    transport: str = _setting("transport", "auto")
    budget: str = _setting("budget", "")
    pool: str = _setting("pool", "")
    books: str = _setting("books", "")
    state_dir: str = _setting("state_dir", _default_state_dir)
    model_roots: tuple[str, ...] = _setting("model_roots", ())
    preload: tuple[PreloadConfig, ...] = _setting("preload", ())
    isolation: str = _setting("isolation", "shared")
    admins: str = _setting("admins", "")
    reader_threads: int = _setting("reader_threads", 0)
    max_loads: int = _setting("max_loads", 4)
    max_connections: int = _setting("max_connections", 1024)
    max_user_leases: int = _setting("max_user_leases", 4096)
    max_user_bytes: str = _setting("max_user_bytes", "0")
    max_user_loads: int = _setting("max_user_loads", 0)
    max_user_offers: int = _setting("max_user_offers", 64)
    max_user_names: int = _setting("max_user_names", 0)
    metrics: str = _setting("metrics", "")
    metrics_access: str = _setting("metrics_access", "local")
    log_level: str = _setting("log_level", "info")
    log_format: str = _setting("log_format", "text")

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices to serve, by the names in the setting: ("auto",), or "host", "cuda", "cuda:N", "GPU-…", each once.

        A UUID is in lower case and may be a prefix; `means` compares names.
        """
        items = [item.strip() for item in self.device.split(",")]
        if "auto" in items and len(items) > 1:
            raise ValueError("auto is every device; do not combine it with others")
        if items == ["auto"]:
            return ("auto",)
        names = tuple(parse_device(item) for item in items)
        refuse_twice(names)
        if "cuda" in names and set(names) - {"cuda", "host"}:
            raise ValueError("cuda is every GPU; do not name other GPUs as well")
        return names

    @property
    def budget_devices(self) -> frozenset[str]:
        """Devices with a separate budget, spelled as in `devices`; "cuda" means every GPU."""
        return frozenset(self._budgets) - {""}

    def budget_for(self, names: Sequence[str]) -> float | int | None:
        """Return the budget of one device: bytes (int), a share of the device (float), or None if it is not set.

        `names` are the device's names, most specific first: ("GPU-…", "cuda:0", "cuda") or ("host",).
        """
        budgets = self._budgets
        said = (budgets[key] for name in names for key in budgets if means(key, name))
        return next(said, budgets.get(""))

    def budget_is_for(self, names: Sequence[str]) -> bool:
        """Return whether a budget names this device, rather than all devices or every GPU."""
        return any(means(said, name) for said in self.budget_devices - {"cuda"} for name in names)

    @property
    def _budgets(self) -> dict[str, float | int]:
        """Budgets by device; "" has the budget of all devices without an entry."""
        pairs: list[tuple[str, float | int]] = []
        for item in self.budget.split(",") if self.budget.strip() else ():
            device, named, amount = item.rpartition("=")
            pairs.append((parse_device(device) if named else "", parse_budget(amount)))
        names = [name for name, _ in pairs]
        if names.count("") > 1:
            raise ValueError("more than one value for the devices that are not named")
        refuse_twice([name for name in names if name])
        return dict(pairs)

    @property
    def metrics_address(self) -> tuple[str, int] | Path | None:
        """Address of the monitoring pages: host and port, or a path; None if they are off."""
        if not self.metrics:
            return None
        if self.metrics.startswith("/"):
            if not Path(self.metrics).name:
                raise ValueError("names no file; give the path of a socket")
            if len(os.fsencode(self.metrics)) > _SOCKET_PATH_BYTES:
                raise ValueError(f"the path is over {_SOCKET_PATH_BYTES} bytes; choose a shorter one")
            return Path(self.metrics)
        host, port = _host_and_port(self.metrics)
        if self.metrics_access != "remote" and host not in _LOOPBACK:
            raise ValueError(
                "must be 127.0.0.1:PORT, [::1]:PORT or /the/path/of/a.sock: only this machine may read the pages, "
                "unless metrics_access is remote"
            )
        return host, port

    @property
    def admin_uids(self) -> frozenset[int]:
        """The admins' uids."""
        return frozenset(_uid(name) for name in re.split(r"[,\s]+", self.admins) if name)

    @property
    def limits(self) -> UserLimits:
        """Limits of one user."""
        most = parse_size(self.max_user_bytes or "0")
        return UserLimits(self.max_user_leases, most, self.max_user_offers, self.max_user_names)

    @property
    def threads(self) -> int:
        """Reader threads of a load."""
        return self.reader_threads or min(4, os.cpu_count() or 1)

    @property
    def loads_of_one(self) -> int:
        """Concurrent loads of one user; by default one turn stays free for other users."""
        return self.max_user_loads or max(1, self.max_loads - 1)


class LoadedSettings(NamedTuple):
    """The settings, the origin of each value, and the file that was read (None where there is none)."""

    settings: Settings
    origins: dict[str, str]
    file: Path | None = None


class SettingsInForce:
    """The settings that the daemon goes by: those of its start, and what it has read again since."""

    def __init__(self, loaded: LoadedSettings) -> None:
        self.loaded = loaded

    def take(self, read: LoadedSettings, left: Iterable[str]) -> None:
        """Go by other settings from now on, but for those `left` that need a restart."""
        now = self.loaded
        values = {key: getattr(now.settings, key) for key in left}
        origins = read.origins | {key: now.origins[key] for key in left}
        self.loaded = LoadedSettings(replace(read.settings, **values), origins, read.file)


def plain(value: Any) -> Any:
    """Convert the value of a setting to text, numbers, lists and tables, as JSON and TOML have them."""
    if isinstance(value, PreloadConfig):
        return {key: said for key, said in asdict(value).items() if key != "where"}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def default_config_path() -> Path | None:
    """Return the default configuration file, or None if it does not exist."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    for path in (Path(home) / "weightd" / "weightd.toml", Path("/etc/weightd/weightd.toml")):
        if path.exists():
            return path
    return None


def load(
    config: Path | None, flags: Mapping[str, str | list[str] | None], environment: Mapping[str, str]
) -> LoadedSettings:
    """Combine the settings of all sources; a repeated flag is a list. Errors: ConfigError."""
    kinds = {f.name: str(f.type) for f in fields(Settings)}
    values: dict[str, Any] = {}
    origins = dict.fromkeys(kinds, DEFAULT)
    path = config or default_config_path()
    if path is not None:
        file = ConfigFile(path)
        for key, value in file.values.items():
            if key not in kinds:
                near = get_close_matches(key, kinds, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ConfigError(
                    f"{file.where(key)}: {_shown(key)}: no such setting{hint}; there are {', '.join(kinds)}"
                )
            origins[key] = file.where(key)
            values[key] = _convert(key, value, kinds[key], f"{origins[key]}: {key}", file.where)
    for key, kind in kinds.items():
        variable, flag = f"WEIGHTD_{key.upper()}", f"--{key.replace('_', '-')}"
        for origin, said in ((variable, environment.get(variable) or None), (flag, flags.get(key))):
            if said is not None:
                said = said if isinstance(said, str) else ",".join(said)
                origins[key] = origin
                values[key] = _convert(key, said, kind, origin, lambda key, *_: origins[key])
    settings = Settings(**values)
    _check(settings, origins)
    return LoadedSettings(settings, origins, path)


def _convert(key: str, value: object, kind: str, where: str, find: _Find) -> object:
    """Convert a value to the type of its setting; `find` locates an element in the file. Errors: ConfigError."""
    if kind.startswith("tuple"):
        return _convert_list(key, value, kind, where, find)
    if isinstance(value, list) and kind == "str" and all(isinstance(part, str | int) for part in value):
        value = ",".join(map(str, value))
    if kind == "str" and isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    try:
        if isinstance(value, str | int) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise ConfigError(f"{where}: {value!r:.200} is not {'a number' if kind == 'int' else 'text'}")


def _convert_list(key: str, value: object, kind: str, where: str, find: _Find) -> tuple[object, ...]:
    """Convert a list, or text with commas; empty text is an empty list. Errors: ConfigError."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list):
        raise ConfigError(f"{where}: {value!r:.200} is not a list")
    items = [item.strip() if isinstance(item, str) else item for item in items]
    if items == [""]:
        return ()
    if "Preload" in kind:
        return preloads_from(items, lambda number, inner: find(key, number, inner))
    if not all(isinstance(item, str) for item in items):
        raise ConfigError(f"{where}: {value!r:.200} is not a list of text")
    return tuple(items)


def _check(settings: Settings, origins: dict[str, str]) -> None:
    """Refuse invalid values. Errors: ConfigError naming the origin; TemporaryConfigError if nothing else is wrong."""

    def refuse(key: str, why: str, kind: type[ConfigError] = ConfigError) -> None:
        raise kind(f"{origins[key]}: {key} = {getattr(settings, key)!r:.200}: {why}")

    for key in (each.name for each in fields(Settings) if each.type == "int"):
        least, most = _BOUNDS.get(key, (0, _MOST_NUMBER))
        if getattr(settings, key) < least:
            refuse(key, f"must be at least {least}")
        if getattr(settings, key) > most:
            refuse(key, f"must be at most {most}")
    for key in (each.name for each in fields(Settings) if each.type == "str"):
        if "\0" in getattr(settings, key):
            refuse(key, "must not have a zero byte")
    choices = {
        "transport": ("auto", "cuda_vmm", "cuda_ipc"),
        "isolation": ("shared", "uid"),
        "metrics_access": ("local", "remote"),
        "log_level": ("debug", "info", "warning", "error"),
        "log_format": ("text", "json"),
    }
    for key, allowed in choices.items():
        if getattr(settings, key) not in allowed:
            refuse(key, f"must be one of {', '.join(allowed)}")
    if not re.fullmatch(r"0?[0-7]{3}", settings.socket_mode):
        refuse("socket_mode", "must be an octal mode such as 0660")
    try:
        check_path(Path(settings.socket))
    except InvalidReferenceError as error:
        refuse("socket", error.message)
    if len(os.fsencode(handles_path(Path(settings.socket)))) > _SOCKET_PATH_BYTES:
        refuse("socket", f"the handle socket's path would be over {_SOCKET_PATH_BYTES} bytes; choose a shorter one")
    parsers: dict[str, Callable[[], object]] = {
        "device": lambda: settings.devices,
        "budget": lambda: settings.budget_devices,
        "pool": lambda: parse_size(settings.pool or "0"),
        "books": lambda: parse_size(settings.books or "0"),
        "max_user_bytes": lambda: settings.limits,
        "metrics": lambda: settings.metrics_address,
    }
    for key, parse in parsers.items():
        try:
            parse()
        except ValueError as error:
            refuse(key, str(error))
    for root in settings.model_roots:
        if not root.startswith(("/", "~")) or "\0" in root:
            refuse("model_roots", f"{root!r:.200} is not an absolute path")
    if settings.preload and not settings.model_roots:
        raise ConfigError(
            f"{origins['preload']}: preload: may not open any file; list the directories of its files in model_roots"
        )
    try:  # last: this error may resolve itself, and must not hide permanent errors
        _ = settings.admin_uids
    except KeyError as error:
        refuse("admins", f"no user {error.args[0]}", TemporaryConfigError)


def _host_and_port(text: str) -> tuple[str, int]:
    """Address and port of text such as 127.0.0.1:9464 or [::1]:9464. Errors: ValueError."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[0-9.]+):([1-9][0-9]{0,4})", text)
    try:
        if found and int(found[2]) <= _LAST_PORT:
            return str(ip_address(found[1].strip("[]"))), int(found[2])
    except ValueError:
        pass
    raise ValueError("must be an IP address and a port, as in 127.0.0.1:9464 or [::1]:9464, or /the/path/of/a.sock")


def _shown(word: str) -> str:
    """A word as an error shows it: quoted where it is long, or would not print as it is."""
    return word if word.isprintable() and len(word) <= 100 else f"{word!r:.100}"


def _uid(name: str) -> int:
    if re.fullmatch("[0-9]{1,10}", name) and int(name) < (1 << 32) - 1:  # the highest uid_t is nobody's
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise KeyError(_shown(name)) from None
