"""Metrics for Prometheus. The only module that imports prometheus_client.

What is counted is counted by listening to events and calls; what is there is read from the books when the page is made,
on the loop. Labels have few values: devices, kinds and reasons, never digests, names, paths, processes or users.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from weightd._proto.v1 import checkpoint_pb2, daemon_pb2, lease_pb2
from weightd.errors import GRPC_CODES, REASONS
from weightd_daemon import __version__
from weightd_daemon.core.events import CheckpointEvicted, DeviceBack, DeviceLost, Event, LoadAnswered, LoadEnded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from .statistics import Statistics

CONTENT_TYPE = CONTENT_TYPE_LATEST
_ATTACH_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_LOAD_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_EVICTIONS = ("capacity", "removed", "lost", "drained")
_DEVICE = ("device", "kind")
_DEVICE_FIGURES = {
    "pinned_bytes": "Bytes of blobs of pinned checkpoints.",
    "leased_bytes": "Bytes of blobs of leased checkpoints; what is pinned, too, counts in both.",
    "evictable_bytes": "Bytes of blobs that an eviction of all that is neither pinned nor leased would free.",
    "hole_bytes": "Reusable bytes in segments that hold something; the other reusable bytes are the pool.",
}
_METHODS = [
    f"{service.name}/{method.name}"
    for file in (checkpoint_pb2, lease_pb2, daemon_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


class Metrics:
    """Counts what happens, and makes the Prometheus page."""

    def __init__(self, statistics: Statistics) -> None:
        # Or each counter would have a second series, which says when it began.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the package types its public classes only
        registry = CollectorRegistry(auto_describe=False)
        self._registry = registry
        self.is_cut_off = False
        """Whether it hears nothing more, so that its figures are out of date."""
        self._devices = statistics.devices
        self._loads = Counter("weightd_loads", "Loads that have ended, by outcome.", ["outcome"], registry=registry)
        self._answered = Counter(
            "weightd_loads_from_memory", "Loads that were answered with what was resident.", _DEVICE, registry=registry
        )
        self._load_bytes = Counter(
            "weightd_load_bytes", "Bytes of tensors that loads have made resident.", _DEVICE, registry=registry
        )
        self._load_read_bytes = Counter(
            "weightd_load_read_bytes", "Bytes of tensors that loads had to read.", _DEVICE, registry=registry
        )
        self._load_unique_bytes = Counter(
            "weightd_load_unique_bytes", "Bytes that loads have added to a device.", _DEVICE, registry=registry
        )
        self._load_seconds = Histogram(
            "weightd_load_duration_seconds", "How long loads took that went well, with their wait for a turn.",
            _DEVICE, registry=registry, buckets=_LOAD_BUCKETS,
        )  # fmt: skip
        self._attach_seconds = Histogram(
            "weightd_attach_duration_seconds", "How long the daemon took to answer an attach, by code of the answer.",
            ["code"], registry=registry, buckets=_ATTACH_BUCKETS,
        )  # fmt: skip
        self._evictions = Counter(
            "weightd_evictions", "Checkpoints that are no longer resident, by reason.", ["reason"], registry=registry
        )
        self._losses = Counter("weightd_device_losses", "Times a device lost its memory.", _DEVICE, registry=registry)
        self._rpcs = Counter(
            "weightd_rpcs", "gRPC calls that have ended, by method and code.", ["method", "code"], registry=registry
        )
        # Series that are there from the start: a rate of what has never happened is 0, not missing.
        for outcome in ("OK", "CANCELLED", *REASONS):
            self._loads.labels(outcome)
        for code in ("OK", "CANCELLED", *GRPC_CODES):
            self._attach_seconds.labels(code)
            for method in _METHODS:
                self._rpcs.labels(method, code)
        for reason in _EVICTIONS:
            self._evictions.labels(reason)
        for uuid in self._devices:
            self._begin(self._place(uuid))
        ProcessCollector(registry=registry)
        registry.register(_Books(statistics))

    def on_event(self, event: Event) -> None:
        """Something has happened."""
        match event:
            case LoadEnded(begun, reason):
                place = self._place(begun.device)
                self._loads.labels(reason).inc()
                if reason == "OK":
                    self._load_bytes.labels(*place).inc(event.total_bytes)
                    self._load_read_bytes.labels(*place).inc(event.read_bytes)
                    self._load_unique_bytes.labels(*place).inc(event.unique_bytes)
                    self._load_seconds.labels(*place).observe(event.seconds)
            case LoadAnswered(checkpoint):
                self._answered.labels(*self._place(checkpoint.key.device)).inc()
            case CheckpointEvicted(_, reason):
                self._evictions.labels(reason).inc()
            case DeviceLost(device):
                self._losses.labels(*self._place(device)).inc()
            case DeviceBack(device):  # whose kind may have been unknown
                self._begin(self._place(device))

    def cut_off(self) -> None:
        """It hears nothing more."""
        self.is_cut_off = True

    def called(self, method: str, code: str) -> None:
        """A gRPC call has ended."""
        self._rpcs.labels(method, code).inc()

    def attached(self, code: str, seconds: float) -> None:
        """An attach was answered, well or with an error."""
        self._attach_seconds.labels(code).observe(seconds)

    def _place(self, uuid: str) -> tuple[str, str]:
        """The labels of a device."""
        return uuid, self._devices[uuid].kind

    def _begin(self, place: tuple[str, str]) -> None:
        """Have the series of a device."""
        for metric in (self._load_bytes, self._load_read_bytes, self._load_unique_bytes):
            metric.labels(*place)
        self._answered.labels(*place)
        self._losses.labels(*place)
        self._load_seconds.labels(*place)

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Books(Collector):
    """What is there at the moment of asking."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """Read the books, once for all figures."""
        statistics = self._statistics
        books = statistics.read()
        build = {"version": __version__, "python": platform.python_version()}
        yield InfoMetricFamily("weightd_build", "What runs.", value=build)

        memory = GaugeMetricFamily(
            "weightd_device_bytes", "Bytes of the budget, by state; they add up to it.", labels=[*_DEVICE, "state"]
        )
        budget = GaugeMetricFamily("weightd_device_budget_bytes", "Bytes that may be used.", labels=_DEVICE)
        used = GaugeMetricFamily(
            "weightd_device_used_bytes", "Bytes that are used: live, reusable and in flight.", labels=_DEVICE
        )
        system = GaugeMetricFamily(
            "weightd_device_system_free_bytes", "Bytes that the device itself has free, whoever uses the rest.",
            labels=_DEVICE,
        )  # fmt: skip
        segments = GaugeMetricFamily("weightd_device_segments", "Segments.", labels=_DEVICE)
        figures = {
            field: GaugeMetricFamily(f"weightd_device_{field}", text, labels=_DEVICE)
            for field, text in _DEVICE_FIGURES.items()
        }
        absent = GaugeMetricFamily(
            "weightd_device_absent", "1 while the device cannot be served; its budget is what it uses then.",
            labels=_DEVICE,
        )  # fmt: skip
        for device in books.devices:
            place = [device.uuid, device.kind]
            states = {
                "live": device.live_bytes,
                "reusable": device.reusable_bytes,
                "in_flight": device.in_flight_bytes,
                "free": device.free_bytes,
            }
            for state, count in states.items():
                memory.add_metric([*place, state], count)
            budget.add_metric(place, device.budget_bytes)
            used.add_metric(place, device.used_bytes)
            segments.add_metric(place, device.segments)
            for field, family in figures.items():
                family.add_metric(place, getattr(device, field))
            absent.add_metric(place, bool(device.absence))
            if device.HasField("device_free_bytes"):
                system.add_metric(place, device.device_free_bytes)
        yield from (memory, budget, used, *figures.values(), system, segments, absent)

        yield _gauge("weightd_logical_bytes", "What all checkpoints would take if none shared.", books.logical_bytes)
        yield _gauge("weightd_resident_bytes", "Bytes of blobs, each counted once.", books.resident_bytes)
        yield _gauge("weightd_saved_bytes", "Bytes that sharing saves.", books.saved_bytes)
        checkpoints = GaugeMetricFamily("weightd_checkpoints", "Checkpoints, by state.", labels=["state"])
        away = sum(map(statistics.store.is_absent, statistics.store.checkpoints.values()))
        checkpoints.add_metric(["resident"], books.checkpoints - away)
        checkpoints.add_metric(["absent"], away)
        checkpoints.add_metric(["loading"], len(statistics.loads.under_way))
        checkpoints.add_metric(["lost"], len(statistics.store.lost))
        yield checkpoints
        waiting = statistics.store.leases.waiting
        leases = GaugeMetricFamily("weightd_leases", "Leases, by state.", labels=["state"])
        leases.add_metric(["held"], books.leases - waiting)
        leases.add_metric(["waiting"], waiting)
        yield leases
        yield _gauge("weightd_blobs", "Blobs.", books.blobs)
        own = books.books
        yield _gauge("weightd_books_bytes", "The daemon's own memory for its lists of tensors.", own.used_bytes)
        yield _gauge("weightd_books_limit_bytes", "Bytes that may be used for them; 0 is no limit.", own.limit_bytes)
        yield _gauge("weightd_connections", "Connections on the handle socket.", len(statistics.connections))
        yield _gauge("weightd_draining", "1 while nothing new is lent or loaded.", statistics.drain.state != "serving")
        yield CounterMetricFamily(
            "weightd_digest_variants", "Digest matches whose bytes turned out to differ.", value=books.digest_collisions
        )


def _gauge(name: str, text: str, value: int) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
