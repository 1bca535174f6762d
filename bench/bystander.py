"""What a bystander notices of hostile peers: `python bench/bystander.py [--rounds 3]`. Needs root, to be another user.

Each round starts a daemon and measures the bystander's pings and attaches with nobody else, then beside peers with huge
command lines, then beside peers that read no answer of `Verify`. Prints a line of JSON for each: the p99 in ms, the
medians of the rounds, how often the idle daemon's they are, and what the daemon's memory grew by. Issue 11 asks for a
factor of 5 at most, and 20 MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("client", "daemon", "tests", ".")]

from support import checkpoints  # noqa: E402  # after the path
from support.command_lines import CONNECT, HUGE, HUGE_LINE  # noqa: E402  # as above
from support.daemon import Daemon, environment  # noqa: E402  # as above
from support.users import ALICE, user_of  # noqa: E402  # as above
from support.worker import Worker  # noqa: E402  # as above
from weightd._proto.v1.checkpoint_pb2 import VerifyCheckpointRequest  # noqa: E402  # as above

SECONDS = 4.0
_BYSTANDER = """
import json, sys, time
import weightd
pings, attaches = [], []
with weightd.connect(sys.argv[1], timeout=60.0) as client:
    client.attach("victim").close()
    end = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        begun = time.perf_counter()
        client.ping()
        between = time.perf_counter()
        client.attach("victim").close()
        attaches.append(time.perf_counter() - between)
        pings.append(between - begun)
        time.sleep(0.01)
p99 = lambda values: 1e3 * sorted(values)[int(len(values) * 0.99)]
print(json.dumps([p99(pings), p99(attaches)]))
"""
_CONNECT_ON = """
import threading, time
def go():
    while True:
        exec(connect, {"path": path, "times": 1})
        time.sleep(0.05)
threading.Thread(target=go, daemon=True).start()
"""
_UNREAD = """
from support.http2 import Unreading
from support.wire import Peer
peer, unreading = Peer(path), Unreading(path)
for _ in range(6):
    unreading.call("/weightd.v1.CheckpointService/Verify", message.encode(), peer.token)
"""


def watch(daemon: Daemon) -> list[float]:
    """The p99 of a bystander's pings and attaches, in ms."""
    argv = [sys.executable, "-c", _BYSTANDER, str(daemon.socket), str(SECONDS)]
    run = subprocess.run(argv, env=environment(), stdout=subprocess.PIPE, check=True, timeout=120)
    found: list[float] = json.loads(run.stdout)
    return found


@contextlib.contextmanager
def alice(daemon: Daemon) -> Iterator[Worker]:
    """A process of another user."""
    worker = Worker(daemon.socket)
    try:
        yield user_of(worker, ALICE)
    finally:
        worker.close()


def command_lines(worker: Worker, daemon: Daemon) -> None:
    """Twenty connections a second of a process with a command line of 256 MiB."""
    refused = worker.run(HUGE_LINE, size=HUGE)
    assert not refused, refused
    worker.run(_CONNECT_ON, path=str(daemon.socket), connect=CONNECT)


def unread(worker: Worker, daemon: Daemon) -> None:
    """Six verifications, of which no byte is read."""
    message = VerifyCheckpointRequest(reference="victim").SerializeToString()
    worker.run(_UNREAD, path=str(daemon.socket), message=message.decode())


ATTACKS: dict[str, Callable[[Worker, Daemon], None]] = {"huge command lines": command_lines, "unread answers": unread}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    found: dict[str, list[list[float]]] = {name: [] for name in ("idle", *ATTACKS)}
    for _ in range(rounds):
        daemon = Daemon(socket_mode="0666")
        daemon.folder.chmod(0o755)
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = checkpoints.write_random(Path(folder) / "victim.safetensors", 4, 1 << 20)
                daemon.command("load", path, "--name=victim")
            watch(daemon)  # warms it up
            found["idle"].append([*watch(daemon), 0.0])
            for name, attack in ATTACKS.items():
                before = daemon.rss()
                with alice(daemon) as worker:
                    attack(worker, daemon)
                    seen = watch(daemon)
                time.sleep(1.0)
                found[name].append([*seen, (daemon.rss() - before) / (1 << 20)])
        finally:
            daemon.close(check=False)
    ping, attach = (statistics.median(row[place] for row in found["idle"]) for place in (0, 1))
    for name, rows in found.items():
        medians = [statistics.median(row[place] for row in rows) for place in range(3)]
        line = {
            "beside": name,
            "ping_p99_ms": round(medians[0], 2),
            "attach_p99_ms": round(medians[1], 2),
            "grown_mib": round(medians[2], 2),
            "ping_factor": round(medians[0] / ping, 2),
            "attach_factor": round(medians[1] / attach, 2),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
