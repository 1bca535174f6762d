"""Faults of the system, and a user who tries another's numbers. For bench/faults.py."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from support import checkpoints
from support.content import content
from support.daemon import Daemon, environment, eventually
from support.manager import Manager
from support.users import ALICE, BOB, user_of
from support.worker import Worker
from weightd.errors import WeightdError
from weightd_daemon.persistence.digest_index import FILE_NAME

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weightd.client import Client

MIB = 1 << 20
_PROGRAM = [sys.executable, "-m", "weightd_daemon"]


class Desk:
    """A folder, the daemons of one fault, and what came of the calls that `attempt` made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: Counter[str] = Counter()
        self.wrong = 0
        """How often bytes were not those of the file."""
        self._daemons: list[Daemon] = []
        self._managers: list[Manager] = []

    def daemon(self, *, kept: bool = False, argv: list[str] | None = None, **settings: object) -> Daemon:
        """A daemon, under a service manager where it is to be `kept`."""
        manager = None
        if kept:
            manager = Manager(self.folder / f"manager{len(self._managers)}")
            self._managers.append(manager)
        daemon = Daemon(argv=argv or _PROGRAM, manager=manager, socket_mode="0666", **settings)  # type: ignore[arg-type]  # keywords are passed through
        daemon.folder.chmod(0o755)
        self._daemons.append(daemon)
        return daemon

    def file(self, name: str, tensors: int = 3, size: int = 300_000) -> Path:
        """A checkpoint of random bytes, which `name` decides."""
        return checkpoints.write_random(self.folder / f"{name}.safetensors", tensors, size, seed=name)

    def attempt(self, call: Callable[[], object]) -> bool:
        """Make a call, and count what comes of it."""
        try:
            call()
        except (WeightdError, OSError) as error:
            words = re.sub(r"/\S+|'[^']*'|\d+", "…", str(error))  # without what differs from call to call
            self.outcomes[f"{type(error).__name__}: {words[:70]}"] += 1
            return False
        self.outcomes["right"] += 1
        return True

    def compare(self, client: Client, path: Path, tensors: int = 3, size: int = 300_000) -> None:
        """Attach a file's checkpoint, and compare all its bytes."""
        with client.attach(path) as attachment:
            for number in range(tensors):
                expected = checkpoints.random_bytes((path.stem, number), size)
                self.wrong += content(attachment, f"t{number}") != expected

    def empty(self, daemon: Daemon) -> None:
        """Remove every checkpoint, when nobody has one any more."""
        with daemon.connect() as client:
            eventually(lambda: not client.leases(), what=f"leases are held: {client.leases()}")
            for checkpoint in client.checkpoints():
                client.remove(checkpoint.content_digest)

    def is_alive(self) -> bool:
        return all(daemon.process is not None and daemon.process.poll() is None for daemon in self._daemons)

    def tracebacks(self) -> int:
        return sum(daemon.logged().count("Traceback") for daemon in self._daemons)

    def close(self) -> None:
        for daemon in self._daemons:
            daemon.close(check=False)
        for manager in self._managers:
            manager.close()


def few_descriptors(desk: Desk) -> dict[str, object]:
    """Loads of a daemon that may open 40 descriptors; when all have been removed, it loads again."""
    daemon = desk.daemon(budget="64MiB")
    client = daemon.connect()
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (40, 40))
    held = []
    for number in range(30):
        path = desk.file(f"n{number}")
        desk.attempt(lambda path=path: held.append(client.attach(path)))  # type: ignore[misc]  # mypy infers no lambda with a default
    for attachment in held:
        attachment.close()
    client.close()
    desk.empty(daemon)
    desk.compare(daemon.connect(), desk.file("n0"))
    return {"afterwards": "right"}


def full_state(desk: Desk) -> dict[str, object]:
    """The file system of the state folder is full."""
    state = desk.folder / "full"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(state)], check=True)
    try:
        with contextlib.suppress(OSError), (state / "fill").open("wb") as file:
            file.write(bytes(64 << 10))
        return _without_index(desk, desk.daemon(state_dir=str(state / "state")))
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)


def removed_state(desk: Desk) -> dict[str, object]:
    """The state folder is removed while the daemon serves."""
    daemon = desk.daemon()
    desk.compare(daemon.connect(), desk.file("before"))
    shutil.rmtree(daemon.folder / "state")
    return _without_index(desk, daemon)


def _without_index(desk: Desk, daemon: Daemon) -> dict[str, object]:
    path = desk.file("a")
    checkpoints.rest(path)
    for _ in range(3):
        with daemon.connect() as client:
            desk.attempt(lambda client=client: desk.compare(client, path))  # type: ignore[misc]  # mypy infers no lambda with a default
        desk.empty(daemon)
    return {"warnings": daemon.logged().count("WARNING")}


def removed_sockets(desk: Desk) -> dict[str, object]:
    """Both sockets are removed: how long nobody new can connect, and whether a second daemon starts meanwhile."""
    daemon = desk.daemon()
    old = daemon.connect()
    path = desk.file("a")
    old.load(path, name="a")
    handles = daemon.socket.with_name(f"{daemon.socket.name}.handles")
    daemon.socket.unlink()
    handles.unlink()
    began = time.monotonic()
    command = [*_PROGRAM, "serve", f"--socket={daemon.socket}", f"--state-dir={desk.folder / 'second'}"]
    second = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    desk.attempt(lambda: desk.compare(old, path))
    while not (daemon.socket.exists() and handles.exists()) and time.monotonic() < began + 60:
        time.sleep(0.05)
    back = time.monotonic() - began
    desk.attempt(lambda: desk.compare(daemon.connect(), path))
    return {"back_after_s": round(back, 1), "second_daemon": [second.returncode, second.stderr.strip()[-120:]]}


def damaged_index(desk: Desk) -> dict[str, object]:
    """The digest index is overwritten and cut at random while the same files are loaded again and again."""
    daemon, chance = desk.daemon(budget="256MiB"), random.Random(3)
    client, paths = daemon.connect(), [desk.file(f"q{number}", 6, 200_000) for number in range(4)]
    checkpoints.rest(*paths)
    damages, end = 0, time.monotonic() + 15
    while time.monotonic() < end:
        with contextlib.suppress(OSError), (daemon.folder / "state" / FILE_NAME).open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            for _ in range(chance.choice([1, 1, 20, 400]) if size else 0):
                file.seek(chance.randrange(size))
                file.write(chance.randbytes(chance.choice([1, 4, 32])))
            if size and chance.random() < 0.05:
                file.truncate(chance.randrange(size))
            damages += 1
        path = chance.choice(paths)
        desk.attempt(lambda path=path: desk.compare(client, path, 6, 200_000))  # type: ignore[misc]  # mypy infers no lambda with a default
        client.remove(str(path))
    return {"damages": damages}


def killed_loaders(desk: Desk) -> dict[str, object]:
    """Loaders are killed at moments from 0 to 590 ms after a load of 80 MB has begun."""
    daemon = desk.daemon(budget="200MiB", pool="0")
    path, kills = desk.file("big", 40, 2_000_000), 0

    def load() -> None:
        with daemon.connect() as client:
            desk.compare(client, path, 40, 2_000_000)

    for millis in range(0, 600, 20):
        loading = threading.Thread(target=desk.attempt, args=(load,))
        loading.start()
        time.sleep(millis / 1000)
        for pid in daemon.loaders():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills += 1
        loading.join()
        desk.empty(daemon)
    time.sleep(12)  # so long an idle loader stays
    device = daemon.connect().stats().devices[0]
    return {"kills": kills, "left_bytes": [device.live_bytes, device.in_flight_bytes, device.used_bytes]}


def signals(desk: Desk) -> dict[str, object]:
    """A client under a timer of 0.7 ms, and a daemon and loaders that get a signal each millisecond."""
    daemon = desk.daemon()
    path = desk.file("a")
    worker = Worker(daemon.socket)
    source = """
import collections, signal, time, weightd
signals, out = [0], collections.Counter()
def count(*_):
    signals[0] += 1
signal.signal(signal.SIGALRM, count)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
end = time.monotonic() + 8
while time.monotonic() < end:
    try:
        with weightd.connect(timeout=20.0) as client:
            client.load(path, name="a")
            client.attach("a").close()
            client.verify()
            list(client.events())
            client.remove("a")
        out["right"] += 1
    except weightd.WeightdError as error:
        out[f"{type(error).__name__}: {error}"[:70]] += 1
signal.setitimer(signal.ITIMER_REAL, 0)
result = [signals[0], dict(out)]
"""
    try:
        to_client, found = worker.run(source, path=str(path))
    finally:
        worker.close()
    desk.outcomes.update(found)
    sent, end = 0, time.monotonic() + 6

    def storm() -> None:
        nonlocal sent
        while time.monotonic() < end:
            for pid in (daemon.pid, *daemon.loaders()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCHLD if pid == daemon.pid else signal.SIGCONT)
                    sent += 1
            time.sleep(0.001)

    storming = threading.Thread(target=storm)
    storming.start()
    client = daemon.connect()
    while time.monotonic() < end:
        if desk.attempt(lambda: desk.compare(client, path)):
            client.remove(str(path))
    storming.join()
    return {"signals_to_client": to_client, "signals_to_daemon": sent}


def restarts(desk: Desk) -> dict[str, object]:
    """The daemon is killed every second and started again by its manager, beside eight threads of calls."""
    daemon = desk.daemon(kept=True)
    path = desk.file("a")
    with daemon.connect() as client:
        client.load(path, name="a", pin=True)
    end, number = time.monotonic() + 20, 0

    def call() -> None:
        with daemon.connect(20.0) as client:
            while time.monotonic() < end:
                steps: list[Callable[[], object]] = [
                    client.stats, client.checkpoints, lambda: client.pin("a"), lambda: desk.compare(client, path),
                    client.version, lambda: client.load(path, name="a"),
                ]  # fmt: skip
                for step in steps:
                    desk.attempt(step)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        time.sleep(1.0)
        daemon.kill()
        daemon.start()
        number += 1
    for thread in threads:
        thread.join()
    return {"restarts": number}


def control_group(desk: Desk) -> dict[str, object]:
    """A memory control group of 300 MiB, a budget of 80 %, and a load of 440 MiB."""
    for group, limit in (
        (f"/sys/fs/cgroup/memory/weightd-faults-{os.getpid()}", "memory.limit_in_bytes"),
        (f"/sys/fs/cgroup/weightd-faults-{os.getpid()}", "memory.max"),
    ):
        try:
            os.mkdir(group)
            with open(f"{group}/{limit}", "w") as file:
                file.write(str(300 * MIB))
        except OSError:
            with contextlib.suppress(OSError):
                os.rmdir(group)
            continue
        break
    else:
        return {"not_tried": "no control group of memory can be made here"}
    enter = f'echo $$ >{group}/cgroup.procs && exec "$0" "$@"'
    daemon = desk.daemon(argv=["/bin/sh", "-c", enter, *_PROGRAM], budget="80%")
    client = daemon.connect()
    budget = client.stats().devices[0].budget_bytes
    desk.attempt(lambda: client.load(desk.file("large", 55, 8 * MIB)))
    client.ping()
    return {"budget_mib": budget // MIB}


def shrinking_file(desk: Desk) -> dict[str, object]:
    """A file is cut and written again every 24 ms while it is loaded: refused, or right."""
    daemon = desk.daemon()
    client, path, end = daemon.connect(), desk.file("sh", 30, 1_000_000), time.monotonic() + 12
    data = path.read_bytes()

    def cut() -> None:
        while time.monotonic() < end:
            os.truncate(path, random.randrange(len(data)))
            time.sleep(0.004)
            with path.open("r+b") as file:
                file.write(data)
            time.sleep(0.02)

    cutting = threading.Thread(target=cut)
    cutting.start()
    while time.monotonic() < end:
        desk.attempt(lambda: desk.compare(client, path, 30, 1_000_000))
    cutting.join()
    desk.attempt(lambda: desk.compare(client, path, 30, 1_000_000))
    return {}


_HERS = """
from support.wire import Peer
from weightd._proto.v1 import handles_pb2
client.load(path, name="alice", pin=True)
attachment = client.attach("alice")
peer = Peer(socket)
token = peer.token
lease = peer.ask(attach=handles_pb2.AttachRequest(reference="alice")).attach.lease
offer = peer.ask(offer=handles_pb2.OfferRequest()).offer.offer_id
result = [token, lease, offer, attachment.content_digest]
"""
_HIS = """
import grpc
from support.wire import Peer
from weightd._proto.v1 import checkpoint_pb2, checkpoint_pb2_grpc, handles_pb2
peer = Peer(socket)
calls = checkpoint_pb2_grpc.CheckpointServiceStub(grpc.insecure_channel(f"unix:{socket}"))
out = {}
def attempt(what, call):
    try:
        out[what] = str(call()).replace("\\n", " ")[:80]
    except Exception as error:  # refused, in whatever way
        details = getattr(error, "details", lambda: str(error))()
        out[what] = f"{type(error).__name__}: {details}"[:110]
def listed(*tokens):
    metadata = [("weightd-token", one) for one in tokens]
    return len(calls.List(checkpoint_pb2.ListCheckpointsRequest(), metadata=metadata).checkpoints)
for name in ("pin", "unpin", "remove"):
    attempt(name, lambda: getattr(client, name)("alice"))
attempt("remove by digest", lambda: client.remove(digest))
attempt("move the name", lambda: client.load(mine, name="alice"))
attempt("detach", lambda: peer.ask(detach=handles_pb2.DetachRequest(lease=lease)))
claim = handles_pb2.ReclaimRequest(lease=lease, content_digest=digest, device="host")
attempt("reclaim", lambda: peer.ask(reclaim=claim))
for name, tokens in {"cut": [token[:-1]], "in capitals": [token.upper()], "empty": [""], "none": []}.items():
    attempt(f"token, {name}", lambda: listed(*tokens))
attempt("two tokens", lambda: listed(peer.token, token))
load = checkpoint_pb2.LoadRequest(offer_id=offer, sources=[checkpoint_pb2.SourceFile(file="x")])
attempt("her offer", lambda: list(calls.Load(load, metadata=[("weightd-token", peer.token)])))
result = out
"""


def another_users_numbers(desk: Desk) -> dict[str, object]:
    """A user tries another's name, digest, lease, token and offer, where users share and where they do not."""
    found: dict[str, object] = {}
    for isolation in ("shared", "uid"):
        daemon = desk.daemon(isolation=isolation)
        paths = {name: desk.file(f"{name}-{isolation}") for name in ("hers", "his")}
        alice, bob = Worker(daemon.socket), Worker(daemon.socket)
        try:
            for worker, uid in ((alice, ALICE), (bob, BOB)):
                user_of(worker, uid)
            socket = str(daemon.socket)
            token, lease, offer, digest = alice.run(_HERS, path=str(paths["hers"]), socket=socket)
            given = {"token": token, "lease": lease, "offer": offer, "digest": digest, "mine": str(paths["his"])}
            tried: dict[str, Any] = bob.run(_HIS, socket=socket, **given)
            hers = alice.run(
                "found = client.inspect('alice').checkpoint\n"
                "result = [found.pinned, found.content_digest == attachment.content_digest, len(client.leases())]"
            )
        finally:
            alice.kill()
            bob.kill()
        found[isolation] = {"tried": tried, "pinned_same_leases": hers}
    return found


def stopped_loader(desk: Desk) -> dict[str, object]:
    """A loader is stopped some moments after its start, and its daemon killed: when the next one is up."""
    seconds = []
    for millis in (5, 20, 50, 100, 150, 200, 300):
        daemon = desk.daemon(kept=True)
        path = desk.file("l", 2, 5_000_000)
        loading = subprocess.Popen(
            [sys.executable, "-m", "weightd", "load", str(path)],
            env=environment(daemon.socket), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            while not (loaders := daemon.loaders()) and loading.poll() is None:
                pass
            time.sleep(millis / 1000)
            for pid in loaders:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            daemon.kill()
            began = time.monotonic()
            daemon.start()
            seconds.append(round(time.monotonic() - began, 1))
        finally:
            loading.kill()
            loading.wait()
    return {"next_up_after_s": seconds}


FAULTS: dict[str, Callable[[Desk], dict[str, object]]] = {
    "40 descriptors": few_descriptors,
    "a full state folder": full_state,
    "a removed state folder": removed_state,
    "removed sockets": removed_sockets,
    "a damaged digest index": damaged_index,
    "killed loaders": killed_loaders,
    "signals": signals,
    "restarts": restarts,
    "a control group": control_group,
    "a file that shrinks": shrinking_file,
    "another user's numbers": another_users_numbers,
    "a stopped loader": stopped_loader,
}
