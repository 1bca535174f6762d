"""The daemon's settings as the command lists them: names, values and help. `config/settings.py` has their defaults."""

from __future__ import annotations

from typing import NamedTuple


class SettingInfo(NamedTuple):
    """One setting: what stands for its value in help, its help, and whether its flag may be repeated."""

    metavar: str
    help: str
    repeatable: bool = False


SETTINGS: dict[str, SettingInfo] = {
    "socket": SettingInfo("PATH", "path of the control socket; the handle socket is in the same directory"),
    "socket_mode": SettingInfo("MODE", "mode of both sockets, octal; 0660 gives the group access"),
    "device": SettingInfo(
        "DEVICE",
        "devices to serve: host, cuda (every GPU), cuda:N or GPU-UUID; separate several with commas or repeat "
        "the flag; auto: host memory and every GPU",
        repeatable=True,
    ),
    "transport": SettingInfo("KIND", "how GPU memory is shared: cuda_vmm or cuda_ipc; auto: tries cuda_vmm first"),
    "budget": SettingInfo(
        "SIZE",
        "memory that each device may use, such as 12GiB or 80%, or DEVICE=12GiB for one device; separate "
        "several with commas or repeat the flag; empty: 80% of a GPU, half of host memory",
        repeatable=True,
    ),
    "pool": SettingInfo(
        "SIZE",
        "freed host memory to keep populated for the next load (freed GPU memory is returned); empty: an "
        "eighth of the host budget, at most 2GiB",
    ),
    "books": SettingInfo(
        "SIZE",
        "memory for the daemon's own books, its lists of tensors; 0: no limit; empty: a tenth of the host "
        "budget, at least 256MiB",
    ),
    "state_dir": SettingInfo("DIR", "directory of the digest index"),
    "model_roots": SettingInfo(
        "DIR",
        "directories in which the daemon itself may open files; separate several with commas or repeat the flag",
        repeatable=True,
    ),
    "preload": SettingInfo(
        "REF",
        "files, directories or org/name[@revision] below model_roots to load at the start; separate several "
        "with commas or repeat the flag; the file also accepts tables",
        repeatable=True,
    ),
    "isolation": SettingInfo("shared|uid", "shared: all users share memory; uid: only processes of the same user do"),
    "admins": SettingInfo(
        "USER", "users, by name or uid, with the rights of every owner; separate several with commas"
    ),
    "reader_threads": SettingInfo("N", "reader threads of a load, 256 at most; 0: one per core, at most 4"),
    "max_loads": SettingInfo("N", "concurrent loads; further loads wait their turn"),
    "max_connections": SettingInfo("N", "connections on the handle socket"),
    "max_user_leases": SettingInfo("N", "leases that one user may hold; 0: no limit"),
    "max_user_bytes": SettingInfo(
        "SIZE", "total size of the checkpoints that one user was first to load or has pinned; 0: no limit"
    ),
    "max_user_loads": SettingInfo("N", "concurrent loads of one user; further loads wait; 0: one less than max_loads"),
    "max_user_offers": SettingInfo("N", "announced loads of one user that no loader has started; 0: no limit"),
    "max_user_names": SettingInfo("N", "names that one user may own; 0: no limit"),
    "metrics": SettingInfo(
        "ADDRESS",
        "address of /metrics, /healthz and /readyz: 127.0.0.1:PORT, [::1]:PORT or the path of a Unix socket; "
        "empty: off",
    ),
    "metrics_access": SettingInfo(
        "local|remote", "local: metrics is an address that only this machine reaches; remote: any address of it"
    ),
    "log_level": SettingInfo("LEVEL", "debug, info, warning or error"),
    "log_format": SettingInfo("text|json", "text, or json: one object a line"),
}
"""In the order in which they are listed."""
