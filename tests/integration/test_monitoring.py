"""What monitors see: the metrics of a daemon that is in use, its health, and whether it is ready."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.backends import EVERY, Backend
from support.daemon import Daemon, environment, eventually
from support.http import ask, get, samples
from support.limits import room_for
from support.wire import Peer
from weightd._proto.v1 import handles_pb2

StartDaemon = Callable[..., Daemon]
KIB = 1 << 10
SECRET = "a-name-that-is-nobodys-business"


def monitored(start_daemon: StartDaemon, folder: Path, **settings: object) -> tuple[Daemon, Path]:
    """A daemon, and where its pages are."""
    page = folder / "m.sock"
    return start_daemon(metrics=page, **settings), page


def figures(page: Path) -> dict[str, float]:
    status, text = get(page, "/metrics")
    assert status == 200
    return samples(text)


@pytest.mark.backends(*EVERY)
def test_the_figures_are_those_of_the_books(
    start_daemon: StartDaemon, short_path: Path, tmp_path: Path, backend: Backend
) -> None:
    daemon, page = monitored(start_daemon, short_path)
    client = daemon.connect()
    place = f'device="{backend.uuid}",kind="{backend.kind}"'
    before = figures(page)
    # Series that are there from the start: an increase from nothing to 1 is none to Prometheus.
    errors = [kind for kind in vars(weightd.errors).values() if hasattr(kind, "grpc_code")]
    for outcome in ("OK", "CANCELLED", *(error.reason for error in errors)):
        assert before[f'weightd_loads_total{{outcome="{outcome}"}}'] == 0
    for code in ("OK", *(error.grpc_code for error in errors)):
        assert before[f'weightd_attach_duration_seconds_count{{code="{code}"}}'] == 0
        assert before[f'weightd_rpcs_total{{code="{code}",method="CheckpointService/Load"}}'] == 0
    assert before[f"weightd_loads_from_memory_total{{{place}}}"] == 0
    first = checkpoints.write_random(tmp_path / f"{SECRET}.safetensors", 3, 100 * KIB)
    second = checkpoints.write_random(tmp_path / "b.safetensors", 3, 100 * KIB, seed=1, shared={0: (0, 0)})
    for name, path in (("a", first), ("b", second)):
        client.load(path, name=name, device=backend.device)
    with client.attach("a", manifest_only=True), pytest.raises(weightd.NotFoundError):
        client.attach("nothing", manifest_only=True)
    with client.attach("a"):
        now, stats = figures(page), client.stats()
    (device,) = stats.devices
    for state in ("live", "reusable", "in_flight", "free"):
        shown = now[f'weightd_device_bytes{{{place},state="{state}"}}']
        assert shown == getattr(device, f"{state}_bytes"), state
    assert now[f"weightd_device_budget_bytes{{{place}}}"] == device.budget_bytes
    assert now[f"weightd_device_used_bytes{{{place}}}"] == device.used_bytes
    assert now[f"weightd_device_segments{{{place}}}"] == device.segments
    for figure in ("pinned_bytes", "leased_bytes", "evictable_bytes", "hole_bytes"):
        assert now[f"weightd_device_{figure}{{{place}}}"] == getattr(device, figure)
    whole = ("logical_bytes", "resident_bytes", "saved_bytes", "blobs")
    assert {key: now[f"weightd_{key}"] for key in whole} == {key: getattr(stats, key) for key in whole}
    assert now["weightd_saved_bytes"] == 100 * KIB
    assert now['weightd_checkpoints{state="resident"}'] == 2
    assert now['weightd_leases{state="held"}'] == 1
    assert now['weightd_loads_total{outcome="OK"}'] == 2
    assert now[f"weightd_load_bytes_total{{{place}}}"] == 600 * KIB
    assert now[f"weightd_load_unique_bytes_total{{{place}}}"] == 500 * KIB
    assert now[f"weightd_load_duration_seconds_count{{{place}}}"] == 2
    assert now['weightd_attach_duration_seconds_count{code="OK"}'] == 2
    assert now['weightd_attach_duration_seconds_count{code="NOT_FOUND"}'] == 1
    assert now['weightd_rpcs_total{code="OK",method="CheckpointService/Load"}'] == 2
    assert now["weightd_connections"] == 1
    assert now["weightd_draining"] == 0
    assert now["process_open_fds"] > 10
    assert [name for name in now if name.startswith("weightd_build_info")]
    assert {name.partition("{")[0] for name in now} == {name.partition("{")[0] for name in before}


def test_what_fails_and_what_goes_is_counted(start_daemon: StartDaemon, short_path: Path, tmp_path: Path) -> None:
    daemon, page = monitored(start_daemon, short_path, budget="1MiB", pool="0")
    client = daemon.connect()
    for number in range(3):
        client.load(checkpoints.write_random(tmp_path / f"{number}", 1, 400 * KIB, seed=number), name=f"n{number}")
        client.close()  # or what was loaded is kept for us
        client = daemon.connect()
    with pytest.raises(weightd.CapacityError):
        client.load(checkpoints.write_random(tmp_path / "large", 1, 2 << 20))
    with pytest.raises(weightd.NotFoundError):
        client.inspect("nothing")
    client.remove("n2")
    now = figures(page)
    assert now['weightd_loads_total{outcome="OK"}'] == 3
    assert now['weightd_loads_total{outcome="CAPACITY"}'] == 1
    assert now['weightd_evictions_total{reason="capacity"}'] == 1
    assert now['weightd_evictions_total{reason="removed"}'] == 1
    assert now['weightd_evictions_total{reason="lost"}'] == 0
    assert now['weightd_rpcs_total{code="RESOURCE_EXHAUSTED",method="CheckpointService/Load"}'] == 1
    assert now['weightd_rpcs_total{code="NOT_FOUND",method="CheckpointService/Get"}'] == 1


def test_an_attach_without_descriptors_is_no_bug(start_daemon: StartDaemon, short_path: Path, tmp_path: Path) -> None:
    daemon, page = monitored(start_daemon, short_path)
    daemon.connect().load(checkpoints.write_random(tmp_path / "model", 1, KIB), name="model")
    with Peer(daemon.socket) as peer, room_for(daemon.pid, 0):
        assert peer.ask(attach=handles_pb2.AttachRequest(reference="model")).error.reason == "RESOURCE_LIMIT"
    now = figures(page)
    assert now['weightd_attach_duration_seconds_count{code="RESOURCE_EXHAUSTED"}'] == 1
    assert now['weightd_attach_duration_seconds_count{code="INTERNAL"}'] == 0


def test_labels_tell_nothing_of_users_and_their_files(
    start_daemon: StartDaemon, short_path: Path, tmp_path: Path
) -> None:
    daemon, page = monitored(start_daemon, short_path)
    client = daemon.connect()
    found = client.load(checkpoints.write_random(tmp_path / f"{SECRET}.safetensors", 2, KIB), name=SECRET)
    with client.attach(SECRET):
        _, text = get(page, "/metrics")
    for secret in (SECRET, found.content_digest[7:19], str(tmp_path), "python -m"):
        assert secret not in text
    labels = set(re.findall(r'(\w+)="', text))
    assert labels == {"device", "kind", "state", "outcome", "reason", "method", "code", "le", "version", "python"}


def test_health_and_readiness(start_daemon: StartDaemon, short_path: Path) -> None:
    daemon, page = monitored(start_daemon, short_path)
    assert get(page, "/healthz") == (200, "ok\n")
    eventually(lambda: get(page, "/readyz") == (200, "ready\n"))
    daemon.connect().drain()
    assert get(page, "/readyz") == (503, "drained, leases held: 0\n")
    assert get(page, "/healthz") == (200, "ok\n")
    assert figures(page)["weightd_draining"] == 1
    daemon.connect().undrain()
    assert get(page, "/readyz") == (200, "ready\n")
    assert page.stat().st_mode & 0o777 == 0o600
    assert daemon.stop() == 0
    assert not page.exists()


def test_on_a_port(start_daemon: StartDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    daemon = start_daemon(metrics=f"127.0.0.1:{address[1]}")
    assert len(tcp_sockets(daemon)) == 1
    status, headers, text = ask(address, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (status, headers["connection"]) == (200, "close")
    assert headers["content-type"].startswith("text/plain; version=")
    assert text.endswith("\n")


def test_there_is_no_page_unless_it_is_asked_for(daemon: Daemon) -> None:
    assert not tcp_sockets(daemon)


@pytest.mark.parametrize("there", ["a daemon", "a file", "a stale socket"])
def test_the_place_of_the_page(start_daemon: StartDaemon, short_path: Path, there: str) -> None:
    page = short_path / "m.sock"
    if there == "a daemon":
        start_daemon(metrics=page)
    elif there == "a file":
        page.write_text("precious")
    else:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
            left.bind(str(page))
    if there == "a stale socket":
        start_daemon(metrics=page)
        assert get(page, "/healthz") == (200, "ok\n")
        return
    done = serve(short_path, f"--metrics={page}")
    assert done.returncode == 1
    assert re.fullmatch(
        rf"weightd: metrics {page}: cannot be served there: .+; choose another with --metrics\n", done.stderr
    )
    assert get(page, "/healthz")[0] == 200 if there == "a daemon" else page.read_text() == "precious"


def test_without_the_package(short_path: Path) -> None:
    absent = short_path / "prometheus_client.py"
    absent.write_text("raise ModuleNotFoundError(\"No module named 'prometheus_client'\", name='prometheus_client')\n")
    done = serve(short_path, "--metrics=127.0.0.1:9464", path=short_path)
    assert done.returncode == 78
    assert "metrics = '127.0.0.1:9464': needs prometheus-client" in done.stderr
    assert "pip install '.[metrics]' in weightd's checkout" in done.stderr
    assert done.stderr.count("\n") - done.stderr.count(" INFO ") == 1


def tcp_sockets(daemon: Daemon) -> set[str]:
    """The TCP sockets of a daemon, as /proc/PID/fd names them."""
    process = Path(f"/proc/{daemon.pid}")
    tables = [line for name in ("tcp", "tcp6") for line in (process / "net" / name).read_text().splitlines()[1:]]
    return {f"socket:[{line.split()[9]}]" for line in tables} & {
        os.readlink(link) for link in (process / "fd").iterdir()
    }


def serve(folder: Path, *flags: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A daemon that is to end at once."""
    more = environment()
    if path is not None:
        more["PYTHONPATH"] = f"{path}:{more['PYTHONPATH']}"
    return subprocess.run(
        [sys.executable, "-m", "weightd_daemon", "serve", f"--socket={folder}/x.sock", f"--state-dir={folder}/state",
         "--device=host", "--log-level=warning", *flags],
        env=more, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
