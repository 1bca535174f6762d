"""Clients that the daemon cannot know: in another PID namespace, or without a user here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.daemon import Daemon, environment, eventually
from support.users import needs_root, open_to_all
from support.worker import Worker

pytestmark = needs_root

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
OVERFLOW = int(Path("/proc/sys/kernel/overflowuid").read_text())


@pytest.fixture
def contained(short_path: Path) -> Iterator[Path]:
    """The log of a daemon in a PID namespace of its own; its socket lies beside that."""
    log = short_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-m", "weightd_daemon",
             "serve", f"--socket={short_path / 'w.sock'}", f"--state-dir={short_path / 'state'}", "--device=host",
             "--budget=256MiB", "--log-level=debug"],
            stdout=subprocess.PIPE, stderr=file, text=True, env=environment(),
        )  # fmt: skip
    assert process.stdout is not None
    try:
        if not process.stdout.readline().startswith("weightd is ready"):
            pytest.skip(f"no PID namespace can be made here: {log.read_text()}")
        yield log
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def weightd_json(socket: Path, *arguments: str) -> list[dict[str, object]]:
    """What a command prints as JSON, a value a line or one list."""
    done = subprocess.run(
        [sys.executable, "-m", "weightd", *arguments],
        env=environment(socket), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    if arguments[0] == "events":
        return [json.loads(line) for line in done.stdout.splitlines()]
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


def test_a_process_outside_of_the_daemons_pid_namespace_is_unknown(contained: Path, tmp_path: Path) -> None:
    socket = contained.with_name("w.sock")
    path = checkpoints.write_random(tmp_path / "a.safetensors", 2, MIB)
    with weightd.connect(socket, timeout=20.0) as client:
        client.load(path, name="a")
        with client.attach("a"):
            (row,) = weightd_json(socket, "ps", "--format", "json")
            assert (row["pid"], row["uid"], row["command"]) == (None, 0, "")
            with pytest.raises(weightd.InUseError, match=r"is in use by pid unknown \(uid 0\); stop them first"):
                client.remove("a")
        eventually(lambda: not client.leases(), what="it is let go")
    happened = weightd_json(socket, "events")
    assert {event["event"] for event in happened if event.get("pid", "") is None} >= {"attached", "detached"}
    assert not [event for event in happened if event.get("pid") == 0]
    assert re.search(r"attached a by root \(pid unknown\) lease=\d+ ", contained.read_text())
    assert "pid=0" not in contained.read_text()


def test_a_peer_without_an_identity_is_not_root(
    start_daemon: StartDaemon, user: Callable[[Daemon, int], Worker], tmp_path: Path
) -> None:
    daemon = open_to_all(start_daemon)
    daemon.folder.chmod(0o755)
    path = daemon.folder / "a.safetensors"
    checkpoints.write_random(path, 2, MIB).chmod(0o644)
    nobody = user(daemon, OVERFLOW)
    assert nobody.run("result = load(path)", path=str(path)) == []  # it cannot own a name
    nobody.run("held = client.attach(client.checkpoints()[0].content_digest)")
    (lease,) = weightd_json(daemon.socket, "ps", "--format", "json")
    assert (lease["pid"], lease["uid"]) == (nobody.pid, None)
    found = daemon.connect().checkpoints()
    assert [(info.owner_uid, info.owner) for info in found] == [(None, "?")]
    events = [event for event in weightd_json(daemon.socket, "events") if "uid" in event]
    assert {event["event"] for event in events} >= {"load_begun", "load_ended", "attached"}
    assert {event["uid"] for event in events} == {None}
    details = daemon.command("inspect", found[0].content_digest, "--format", "json").stdout
    assert json.loads(details)["checkpoint"]["owner_uid"] is None
    assert nobody.run("result = attempt(client.pin, client.checkpoints()[0].content_digest)") == [
        "PermissionDeniedError",
        f"checkpoint {found[0].content_digest} belongs to a user without an identity; only it and admins may pin it",
    ]
