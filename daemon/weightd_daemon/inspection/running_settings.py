"""The settings in force, as monitors see them: with what defaults have come to on this machine.

Every user may read them, users that are kept apart as well: they contain no secrets, and without them nobody could tell
why a load is refused. See docs/decisions/0046-looks-change-nothing.md.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from weightd._proto.v1 import inspection_pb2
from weightd_daemon.config.settings import DEFAULT, Settings, plain
from weightd_daemon.config.toml_file import toml_value
from weightd_daemon.devices.budgets import pool_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightd_daemon.config.settings import SettingsInForce
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.devices.device import Device


def list_settings(
    in_force: SettingsInForce, store: ContentStore, devices: Mapping[str, Device]
) -> inspection_pb2.GetSettingsResponse:
    """Every setting, in the order of the documentation."""
    settings, origins, file = in_force.loaded
    response = inspection_pb2.GetSettingsResponse(file=str(file or ""))
    found = _defaults(settings, store, devices)
    for key in (setting.name for setting in fields(Settings)):
        value = found[key] if origins[key] == DEFAULT and key in found else plain(getattr(settings, key))
        response.settings.add(key=key, value=toml_value(value), origin=origins[key])
    return response


def _defaults(settings: Settings, store: ContentStore, devices: Mapping[str, Device]) -> dict[str, str | int]:
    """What the defaults that depend on the machine have come to; an absent device has no budget."""
    budgets = {uuid: memory.budget for uuid, memory in store.memories.items() if uuid not in store.absent}
    found: dict[str, str | int] = {
        "device": ",".join(store.memories),
        "budget": ",".join(f"{uuid}={budget}" for uuid, budget in budgets.items()),
        "books": str(store.books.limit),
        "reader_threads": settings.threads,
    }
    for uuid, budget in budgets.items():
        if devices[uuid].sparse:  # host memory, the only one that is pooled
            found["pool"] = str(pool_of(settings, devices[uuid], budget))
    return found
