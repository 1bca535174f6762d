"""The parts that the gRPC services use, and the caller of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from weightd_daemon.config.settings import SettingsInForce
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.store import ContentStore
from weightd_daemon.devices.device import Device
from weightd_daemon.handles.connections import HandleSocketConnection, HandleSocketConnections
from weightd_daemon.handles.lease_locks import HandleLeaseLocks
from weightd_daemon.handles.manifests import ManifestHandles
from weightd_daemon.inspection.sharing_upkeep import SharingUpkeep
from weightd_daemon.loads.loads import Loads
from weightd_daemon.monitoring.event_stream import MonitoringEventStream
from weightd_daemon.monitoring.statistics import Statistics
from weightd_daemon.operations.absence import AbsentDevices
from weightd_daemon.operations.drain import DrainOperation
from weightd_daemon.operations.forget import DeviceForgetting

from .admission import TOKEN
from .error_mapping import Context


class GrpcServiceContext(NamedTuple):
    """The parts of the daemon that gRPC services reach."""

    store: ContentStore
    catalog: Catalog
    loads: Loads
    connections: HandleSocketConnections
    devices: dict[str, Device]
    default_device: str
    now: Callable[[], float]
    event_stream: MonitoringEventStream
    drain: DrainOperation
    statistics: Statistics
    absences: AbsentDevices
    forgetting: DeviceForgetting
    sharing: SharingUpkeep
    manifests: ManifestHandles
    locks: HandleLeaseLocks
    in_force: SettingsInForce

    def caller(self, context: Context) -> tuple[HandleSocketConnection, Principal]:
        """Whose call it is. Errors: PermissionDeniedError."""
        metadata = dict(context.invocation_metadata() or ())
        connection = self.connections.by_token(str(metadata.get(TOKEN, "")))
        return connection, self.connections.who(connection)
