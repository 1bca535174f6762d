"""`weightd web` on a real daemon, asked by hand: who is refused, and what the answers are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest

from support.checkpoints import write_random
from support.daemon import Daemon, environment, eventually
from support.leash import leashed

MIB = 1 << 20


class Web(NamedTuple):
    """A command that serves, its port and its token."""

    daemon: Daemon
    process: subprocess.Popen[str]
    port: int
    token: str

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, headers={key.replace("_", "-"): value for key, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def data(self, path: str, **query: str) -> Any:
        status, _, body = self.ask(f"{path}?{urlencode(query)}", Authorization=f"Bearer {self.token}")
        assert status == 200, body
        return json.loads(body)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("web")
    write_random(folder / "base.safetensors", 4, MIB, "base")
    write_random(folder / "tuned.safetensors", 4, MIB, "tuned", {0: ("base", 0), 1: ("base", 1)})
    daemon = Daemon()
    try:
        for name in ("base", "tuned"):
            daemon.command("load", folder / f"{name}.safetensors", "--name", name)
        with started(daemon) as process:
            assert process.stdout is not None
            address = process.stdout.readline().split()[1]
            place, _, token = address.partition("#token=")
            yield Web(daemon, process, int(place.rsplit(":", 1)[1].strip("/")), token)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
    finally:
        daemon.close(check=True)


def started(daemon: Daemon, *arguments: str) -> subprocess.Popen[str]:
    command = leashed([sys.executable, "-m", "weightd", "web", "--no-open", *arguments])
    return subprocess.Popen(
        command, env=environment(daemon.socket), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_the_page_is_open_and_its_data_is_not(web: Web) -> None:
    status, headers, body = web.ask("/")
    assert status == 200
    assert b"<main></main>" in body
    assert web.token.encode() not in body
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert web.ask("/assets/live.js")[0] == 200
    for path in ("/api/state", "/api/checkpoint", "/api/tensors", "/api/none"):
        for headers_given in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": f"token={web.token}"}):
            status, _, body = web.ask(path, **headers_given)
            assert status == 401, path
            assert b"open the address" in body


@pytest.mark.parametrize(
    "path", ["/assets/../document.py", "/assets/%2e%2e%2fdocument.py", "/assets/web.html", "/etc/passwd"]
)
def test_there_is_nothing_else(web: Web, path: str) -> None:
    assert web.ask(path)[0] == 404


def test_foreign_pages_and_changes_are_refused(web: Web) -> None:
    known = {"Authorization": f"Bearer {web.token}"}
    assert web.ask("/api/state", Host="evil.example", **known)[0] == 403
    assert web.ask("/", Host="evil.example")[0] == 403
    assert web.ask("/api/state", Origin="http://evil.example", **known)[0] == 403
    assert web.ask("/api/state", Sec_Fetch_Site="cross-site", **known)[0] == 403
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert web.ask("/api/state", method, **known)[0] == 405
    assert web.ask("/api/state", **known)[0] == 200


def test_only_this_machine_is_served(web: Web) -> None:
    listening = "0A"
    bound = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = [place for place, _, state in bound if state == listening and int(place.split(":")[1], 16) == web.port]
    assert ours == [f"0100007F:{web.port:04X}"]


def test_the_answers_are_those_of_the_commands(web: Web) -> None:
    sections = web.data("/api/state")
    values = {name: section["value"] for name, section in sections.items()}
    assert {"daemon", "stats", "checkpoints", "leases", "loads", "events", "pairs", "map host"} == set(values)
    stats = json.loads(web.daemon.command("stats", "--format", "json").stdout)
    assert {key: values["stats"][key] for key in ("logical_bytes", "resident_bytes", "blobs")} == {
        key: stats[key] for key in ("logical_bytes", "resident_bytes", "blobs")
    }
    listed = json.loads(web.daemon.command("ls", "--format", "json").stdout)
    assert [{key: row[key] for key in listed[0] if key != "name"} for row in values["checkpoints"]] == [
        {key: value for key, value in row.items() if key != "name"} for row in listed
    ]
    assert values["pairs"]["pairs"][0]["shared_bytes"] == 2 * MIB
    base = next(row for row in listed if row["name"] == "base")
    meant = {"digest": base["content_digest"], "device": "host"}
    tensors = web.data("/api/tensors", **meant)
    assert [(row[1], row[4], row[7]) for row in tensors] == [
        ("t0", MIB, 2),
        ("t1", MIB, 2),
        ("t2", MIB, 1),
        ("t3", MIB, 1),
    ]
    details = web.data("/api/checkpoint", **meant)
    assert details["partners"][0]["other_name"] == "tuned"
    assert details["checkpoint"]["exclusive_bytes"] == 2 * MIB


def test_errors_keep_their_words(web: Web) -> None:
    known = {"Authorization": f"Bearer {web.token}"}
    status, _, body = web.ask("/api/tensors?digest=none&device=host", **known)
    assert status == 404
    assert b"none" in body
    assert web.ask("/api/tensors?digest=none", **known)[0] == 400


def test_a_change_is_answered_when_it_comes(web: Web) -> None:
    def versions() -> dict[str, str]:
        return {name: str(section["version"]) for name, section in web.data("/api/state").items()}

    known = versions()
    web.daemon.command("pin", "base")
    changed = web.data("/api/state", **known)  # waits for it
    while "checkpoints" not in changed:
        known |= {name: str(section["version"]) for name, section in changed.items()}
        changed = web.data("/api/state", **known)
    assert next(row["pinned"] for row in changed["checkpoints"]["value"] if row["names"] == ["base"])
    web.daemon.command("unpin", "base")


def test_a_page_takes_no_lease_and_is_no_use(web: Web) -> None:
    before = web.daemon.command("ls", "--format", "json").stdout
    (row, *_) = json.loads(before)
    web.data("/api/tensors", digest=row["content_digest"], device="host")
    web.data("/api/checkpoint", digest=row["content_digest"], device="host")
    assert web.daemon.command("ls", "--format", "json").stdout == before
    assert json.loads(web.daemon.command("ps", "--format", "json").stdout) == []


def test_a_port_that_is_taken_and_a_daemon_that_is_not_there(web: Web, tmp_path: Path) -> None:
    taken = web.daemon.command("web", "--no-open", "--port", str(web.port), check=False)
    assert taken.returncode == 2
    assert taken.stderr == f"weightd: port {web.port} cannot be served: Address already in use\n"
    missing = web.daemon.command("web", "--no-open", "--socket", tmp_path / "none.sock", check=False)
    assert missing.returncode == 69


def test_sigterm_ends_it(web: Web) -> None:
    with started(web.daemon) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Open http://127.0.0.1:")
        os.kill(process.pid, signal.SIGTERM)
        eventually(lambda: process.poll() is not None)
