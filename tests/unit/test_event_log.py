"""What the log says of events, to people and in JSON."""

from __future__ import annotations

import json
import logging

import pytest

from weightd._proto.v1 import daemon_pb2
from weightd_daemon.core.events import DrainChanged, Event
from weightd_daemon.logs import JsonLines
from weightd_daemon.monitoring import event_log
from weightd_daemon.monitoring.event_log import EventLog
from weightd_daemon.monitoring.listeners import EventListeners

DIGEST = "sha256:" + "ab" * 32
WHO = {"pid": 7, "uid": 1000, "user": "alice"}


@pytest.mark.parametrize(
    ("event", "line", "level"),
    [
        (
            daemon_pb2.Event(
                kind="EVENT_KIND_LOAD_ENDED", reason="OK", content_digest=DIGEST, device="host", names=["base"],
                total_bytes=30, unique_bytes=20, read_bytes=10, seconds=0.4, evicted=["tuned", DIGEST],
                evicted_others=1, **WHO,
            ),
            "loaded base by alice (pid 7), evicted tuned, sha256:abababababab, 1 of other users "
            "content=sha256:abababababab device=host total_bytes=30 unique_bytes=20 read_bytes=10 seconds=0.400",
            "info",
        ),
        (
            daemon_pb2.Event(
                kind="EVENT_KIND_LOAD_ENDED", reason="FORMAT", device="host", message="a: is no checkpoint",
                evicted=["tuned"], **WHO,
            ),
            "load of files without a name by alice (pid 7) failed, evicted tuned reason=FORMAT device=host: "
            "a: is no checkpoint",
            "warning",
        ),
        (
            daemon_pb2.Event(kind="EVENT_KIND_EVICTED", content_digest=DIGEST, device="host", reason="capacity",
                             load=3, user="alice", uid=1000),
            "evicted sha256:abababababab for load 3 by alice (pid unknown) "
            "content=sha256:abababababab device=host reason=capacity",
            "info",
        ),
        (
            daemon_pb2.Event(kind="EVENT_KIND_EVICTED", content_digest=DIGEST, names=["a", "b"], device="host",
                             reason="drained"),
            "evicted a, b content=sha256:abababababab device=host reason=drained",
            "info",
        ),
        (
            daemon_pb2.Event(kind="EVENT_KIND_ATTACHED", content_digest=DIGEST, names=["a"], device="host", lease=9,
                             **WHO),
            "attached a by alice (pid 7) lease=9 content=sha256:abababababab device=host",
            "info",
        ),
    ],
)  # fmt: skip
def test_a_line_names_what_and_who(
    event: daemon_pb2.Event, line: str, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        event_log.write(event)
    (record,) = caplog.records
    assert record.getMessage() == line
    found = json.loads(JsonLines().format(record))
    assert (found["message"], found["level"], found["names"]) == (line, level, list(event.names))
    if event.user:
        pid = event.pid if event.HasField("pid") else None
        assert (found["user"], found["uid"], found["pid"]) == (event.user, event.uid, pid)
    assert found.get("evicted", []) == list(event.evicted)
    assert found["device"] == "host"


@pytest.mark.parametrize("kind", ["LOAD_BEGUN", "SEALED", "DETACHED", "DEVICE_LOST", "DRAINING"])
def test_what_has_a_line_elsewhere_has_no_second(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        event_log.write(daemon_pb2.Event(kind=f"EVENT_KIND_{kind}"))
    assert caplog.records == []


def test_an_event_that_cannot_be_a_line_costs_this_line_only(caplog: pytest.LogCaptureFixture) -> None:
    def encode(event: Event) -> tuple[str | None, daemon_pb2.Event]:
        if event == DrainChanged("draining"):
            raise ValueError("Value out of range: -1294967296")
        return None, daemon_pb2.Event(kind="EVENT_KIND_NAMED", names=["a"], content_digest=DIGEST)

    listeners = EventListeners()
    listeners.add(EventLog(encode))
    with caplog.at_level(logging.INFO):
        for state in ("draining", "drained"):
            listeners.publish(DrainChanged(state))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "no line for DrainChanged, by a bug"),
        ("INFO", "gave name a content=sha256:abababababab"),
    ]
    assert caplog.records[0].exc_info is not None
