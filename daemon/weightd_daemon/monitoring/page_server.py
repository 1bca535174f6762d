"""Serves the pages for monitors if the settings enable them. Otherwise prometheus-client need not be installed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from weightd_daemon.config.toml_file import ConfigError, TemporaryConfigError
from weightd_daemon.operations.serving_lock import AlreadyRunningError
from weightd_daemon.operations.sockets import identity, remove_own

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AsyncExitStack

    from weightd_daemon.config.settings import Settings

    from .metrics import Metrics
    from .statistics import Statistics

log = logging.getLogger(__name__)


async def serve_pages(
    stack: AsyncExitStack, settings: Settings, statistics: Statistics, is_up: Callable[[], bool]
) -> Metrics | None:
    """Serve the pages until `stack` ends. Returns what counts for them; None where they are not wanted.

    `is_up` says whether the daemon has started and does not stop. Errors: ConfigError, TemporaryConfigError,
    AlreadyRunningError.
    """
    address = settings.metrics_address
    if address is None:
        return None
    try:
        from .endpoints import listen, pages
        from .metrics import Metrics
    except ModuleNotFoundError as error:
        if error.name != "prometheus_client":
            raise
        raise ConfigError(
            f"metrics = {settings.metrics!r}: needs prometheus-client, which is not installed: "
            "pip install '.[metrics]' in weightd's checkout"
        ) from error
    metrics = Metrics(statistics)
    server = pages(metrics, statistics, is_up)
    try:
        listener = listen(address, int(settings.socket_mode, 8))
    except OSError as error:
        raise TemporaryConfigError.of(error, f"metrics {settings.metrics}") or AlreadyRunningError(
            f"metrics {settings.metrics}: cannot be served there: {error.strerror}; choose another with --metrics"
        ) from error
    if isinstance(address, Path):
        stack.callback(remove_own, address, identity(address))
    stack.push_async_callback(server.stop)
    await server.start(listener)
    log.info("monitors read at %s", settings.metrics)
    return metrics
