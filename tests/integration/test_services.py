"""The control plane as any gRPC tool sees it, and what the processes behind it are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import weightd
from support import checkpoints
from support.background import background
from support.daemon import Daemon
from support.launch import launcher
from support.wire import Peer
from weightd._proto.v1 import checkpoint_pb2, checkpoint_pb2_grpc, daemon_pb2, daemon_pb2_grpc, errors_pb2

StartDaemon = Callable[..., Daemon]
SERVICES = [
    "weightd.v1.CheckpointService",
    "weightd.v1.CompositionService",
    "weightd.v1.DaemonService",
    "weightd.v1.InspectionService",
    "weightd.v1.LeaseService",
]
MIB = 1 << 20


@pytest.fixture
def channel(daemon: Daemon) -> Iterator[grpc.Channel]:
    """A channel without a token."""
    with grpc.insecure_channel(f"unix:{daemon.socket}") as opened:
        yield opened


def test_health(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", *SERVICES):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, service
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="weightd.v1.Nothing"), timeout=60)
    assert failed(caught.value).code() is grpc.StatusCode.NOT_FOUND


def test_reflection(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="weightd.v1.CheckpointService"),
    ]
    services, file = stub.ServerReflectionInfo(iter(questions), timeout=60)
    listed = sorted(service.name for service in services.list_services_response.service)
    assert [name for name in listed if name.startswith("weightd")] == SERVICES
    assert "grpc.health.v1.Health" in listed
    assert b"RemoveCheckpointRequest" in file.file_descriptor_response.file_descriptor_proto[0]


def failed(error: grpc.RpcError) -> Any:
    """A failed call is a call, too."""
    return error


def test_error_details_are_those_of_google_rpc(daemon: Daemon, channel: grpc.Channel) -> None:
    request = checkpoint_pb2.GetCheckpointRequest(reference="nope")
    stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
    with Peer(daemon.socket) as peer, pytest.raises(grpc.RpcError) as caught:
        stub.Get(request, metadata=(("weightd-token", peer.token),), timeout=60)
    call = failed(caught.value)
    assert call.code() is grpc.StatusCode.NOT_FOUND
    trailer = dict(call.trailing_metadata())
    # Field by field, as somebody without our protos would read them: google.rpc.Status and google.rpc.ErrorInfo.
    status = errors_pb2.Status.FromString(trailer["grpc-status-details-bin"])
    assert (status.code, status.message) == (5, call.details())
    (packed,) = status.details
    assert isinstance(packed, any_pb2.Any)
    assert packed.type_url == "type.googleapis.com/google.rpc.ErrorInfo"
    info = errors_pb2.ErrorInfo.FromString(packed.value)
    assert (info.reason, info.domain) == ("NOT_FOUND", "weightd")
    numbers = {field.name: field.number for field in errors_pb2.ErrorInfo.DESCRIPTOR.fields}
    assert numbers == {"reason": 1, "domain": 2, "metadata": 3}


def test_error_after_the_first_streamed_message(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(budget="1MiB")
    path = checkpoints.write_random(tmp_path / "m.safetensors", 2, MIB)
    with pytest.raises(weightd.CapacityError) as caught:
        daemon.connect().load(path)
    assert caught.value.requested_bytes == int(caught.value.metadata["requested_bytes"]) > 0


def test_a_bug_has_an_id_and_shows_nothing(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(argv=launcher(bug=True))
    client = daemon.connect()
    with pytest.raises(weightd.ServerError) as caught:
        client.version()
    message = str(caught.value)
    number = message.split()[-1]
    assert len(number) == 8
    assert f"bug id={number} method=/weightd.v1.DaemonService/GetVersion" in daemon.logged()
    assert "a secret of the daemon" in daemon.logged()
    assert "secret" not in message
    assert "Traceback" not in message
    daemon.log.write_text("")  # this bug was ours
    assert client.stats().checkpoints == 0


def mapped(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_neither_daemon_nor_loader_has_torch(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "m.safetensors", 3, MIB))
    (loader,) = daemon.loaders()
    for pid in (daemon.pid, loader):
        assert "python" in mapped(pid)
        for package in ("torch", "numpy", "libcuda"):
            assert f"/{package}" not in mapped(pid), (pid, package)
    assert "/grpc/" in mapped(daemon.pid)
    assert "/grpc/" not in mapped(loader)


def test_memory_of_the_daemon_itself(daemon: Daemon, tmp_path: Path) -> None:
    """A hundred checkpoints of a hundred tensors, and one of 200 MiB: what it holds is not in its own memory."""
    client = daemon.connect()
    for n in range(100):
        client.load(checkpoints.write_random(tmp_path / f"{n}.safetensors", 100, 600, seed=n), name=f"c{n}")
    whole = ("U8", (200 * MIB,), bytes(200 * MIB))
    client.load(checkpoints.write(tmp_path / "large.safetensors", {"t": whole}), name="large")
    stats = client.stats()
    assert (stats.checkpoints, stats.blobs) == (101, 10_001)
    assert daemon.rss() < 150 * MIB
    with client.attach("c99") as attachment:
        assert attachment.buffer("t99") == checkpoints.random_bytes((99, 99), 600)


def test_answers_while_it_loads(daemon: Daemon, tmp_path: Path) -> None:
    paths = [checkpoints.write_random(tmp_path / f"{n}.safetensors", 20, 4 * MIB, seed=n) for n in range(3)]
    client = daemon.connect()
    loads = [background(daemon.connect().load_report, path) for path in paths]
    answers = 0
    while not all(load.done() for load in loads):
        assert client.ping() < 5
        assert client.stats().devices[0].uuid == "host"
        answers += 1
    assert answers > 2
    for load in loads:
        load.result()


def test_version_needs_no_token(daemon: Daemon, channel: grpc.Channel) -> None:
    answer = daemon_pb2_grpc.DaemonServiceStub(channel).GetVersion(daemon_pb2.GetVersionRequest(), timeout=60)
    assert (answer.version, answer.pid) == (weightd.__version__, daemon.pid)
    assert 0 <= answer.uptime_seconds < 60


@pytest.mark.parametrize("reference", ["x" * 20_000, "ä" * 20_000])
def test_an_error_about_a_very_long_reference_is_that_error(daemon: Daemon, reference: str) -> None:
    client = daemon.connect()
    for call in (client.inspect, client.pin, client.attach):
        with pytest.raises(weightd.InvalidReferenceError, match=rf"^reference '{reference[:80]}…': has \d+ bytes"):
            call(reference)


@pytest.mark.parametrize("reference", ["x" * 1024, "ä" * 512])
def test_an_error_about_the_longest_reference_fits_into_grpcs_trailers(daemon: Daemon, reference: str) -> None:
    client = daemon.connect()
    for call in (client.inspect, client.pin, client.attach):
        with pytest.raises(weightd.NotFoundError, match=rf"^checkpoint '{reference}' is not resident"):
            call(reference)
