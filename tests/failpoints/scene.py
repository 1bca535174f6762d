"""What failures are tried on: a daemon whose descriptors are kept, a witness who holds a checkpoint, and deeds.

A deed leads through all points of one kind; each is done by processes that can be armed. A witness cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import weightd
from failpoints.injection import FOLDER, VARIABLE, Trigger
from support import checkpoints
from support.agents import Agent, published
from support.backends import Backend
from support.daemon import Daemon, environment, eventually
from support.manager import Manager
from support.worker import Worker

MIB = 1 << 20
_SIZE, _TENSORS = MIB, 3
_ROOM = 4 * MIB
"""Of each tensor of files that have to make room for others: few of them fit into the budget."""
_BUDGET = 32 * MIB
_LARGER = 3 * MIB
"""Of files that an agent serves: more than one piece."""

_CLIENT = """
import weightd, xxhash
from support.content import content

def differ(attachment, expected):
    return [t for t, digest in expected.items() if xxhash.xxh3_128_hexdigest(content(attachment, t)) != digest]
"""
_WITNESS = "client = weightd.connect(timeout=60)\nattachment = client.attach('base')"
_DEED = """
client = weightd.connect(timeout=20)
try:
    %s
    result = "ok"
except weightd.WeightdError as error:
    result = type(error).__name__
except OSError as error:
    result = f"{type(error).__name__} of the client's own"
finally:
    client.close()
"""
_LOAD = """
    client.load(path, name=name)
    with client.attach(name) as attachment:
        assert not differ(attachment, expected), "WRONG BYTES"
"""
_PAIR = """
    for file, called in ((path, name), (other, "other")):
        client.load(file, name=called)
        client.attach(called).close()  # or it waits for that, and is in use
"""
_REMOVE = """
    client.remove(name)
    client.remove("other")
"""
_EVICT = """
    loaded = client.load_report(path, name=name)
    with client.attach(name) as attachment:
        assert not differ(attachment, expected), "WRONG BYTES"
    assert victim in loaded.evicted, f"for this load went {loaded.evicted}"
"""
_COMPOSE = """
    from weightd.composing import ComposedTensor, TensorSource
    with client.attach("base") as base:
        rows = [
            ComposedTensor(0, one.name, one.dtype, one.shape, TensorSource(base.content_digest, *key))
            for key, one in list(base.tensors.items())[1:]
        ]
        client.compose(base.files, rows, name=name)
    with client.attach(name) as attachment:
        assert not differ(attachment, expected), "WRONG BYTES"
"""


class LostError(AssertionError):
    """Something that was resident, or attached, is no more, or is not what it was."""


class Scene:
    """A daemon on some memory, in a folder of its own. Close it."""

    def __init__(self, backend: Backend, folder: Path) -> None:
        self.trigger = Trigger(folder / "armed")
        self._folder = folder
        self._variables = {
            **self.trigger.variables, "PYTHONPATH": os.pathsep.join([environment()["PYTHONPATH"], str(FOLDER)]),
        }  # fmt: skip
        self.manager = Manager(folder / "notify")
        armed = _Armed(backend, self._variables)
        program = [sys.executable, "-m", "weightd_daemon"]
        self.daemon = Daemon(armed, program, manager=self.manager, pool="0", budget=_BUDGET)  # type: ignore[arg-type]  # as a Backend
        self.kind = backend.kind
        self._base = self._file("base")
        self._backend = backend
        self._load_base()
        self._witness()
        self._worker: Worker | None = None
        self._agent: Agent | None = None
        self._deeds = 0
        self._prepared = ""

    def close(self) -> None:
        for worker in (self.witness, self._worker):
            if worker is not None:
                worker.kill()
        if self._agent is not None:
            self._agent.kill()
        self.daemon.close(check=False)
        self.manager.close()

    # -- deeds: each returns "ok", or how it failed ------------------------------------------------------------------

    def prepare(self, deed: str) -> None:
        """Do what has to come before a deed: what it is to remove, or evict, has to be there."""
        self._deeds += 1
        self._prepared = name = f"d{self._deeds}"
        if deed in ("evict", "remove"):  # two with a tensor in common: when one goes, its segment stays in part
            size = _ROOM if deed == "evict" else _SIZE
            other = self._file(f"{name}-other", size=size, shared={0: (name, 0)})
            done = self._client(_PAIR, path=str(self._file(name, size=size)), other=str(other), name=name)
            assert done == "ok", f"before the deed: {done}"

    def do(self, deed: str) -> str:
        """Do it once, with content that was never there before; `prepare` comes first, here or before."""
        if not self._prepared:
            self.prepare(deed)
        name, self._prepared = self._prepared, ""
        return str(getattr(self, f"_{deed}")(name))

    def _load(self, name: str) -> str:
        path = self._file(name)
        return self._client(_LOAD, path=str(path), name=name, expected=_digests(name))

    def _remove(self, name: str) -> str:
        return self._client(_REMOVE, name=name)

    def _evict(self, name: str) -> str:
        """A load that fits only when both of the pair are gone."""
        file, count = f"{name}-instead", 5
        path = self._file(file, count=count, size=_ROOM)
        return self._client(_EVICT, path=str(path), name=file, victim=name, expected=_digests(file, count, _ROOM))

    def _compose(self, name: str) -> str:
        expected = {key: digest for key, digest in _digests("base").items() if key != "t0"}
        return self._client(_COMPOSE, name=name, expected=expected)

    def _restart(self, name: str) -> str:
        """A client holds something; the daemon is killed and the next one started, as often as it takes."""
        outcome = self._load(name)
        self._run_worker("held = weightd.connect(timeout=20); attachment = held.attach('base'); result = 'ok'")
        self.daemon.kill()
        try:
            self.daemon.start()
        except AssertionError:
            return "the start failed"
        return outcome

    def _fetch(self, name: str) -> str:
        return self._fetch_into(name, "memory")

    def _fetch_files(self, name: str) -> str:
        return self._fetch_into(name, "files")

    # -- after a failure ---------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Have a daemon serve again, if it was killed, as a service manager would."""
        assert self.daemon.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.daemon.process.wait(0.2)
        if self.daemon.process.poll() is not None:
            self.daemon.kill()  # the rest of its process group's pipe
            self.daemon.start()

    def check(self) -> str:
        """Whether all that was there before is there, and what it was; then everything else is removed.

        Returns what people must know of that. Errors: LostError.
        """
        for path in self._folder.glob("d*.safetensors"):  # of deeds that are done
            path.unlink()
        with weightd.connect(self.daemon.socket, timeout=60.0) as client:
            states = {name: one.state for one in client.checkpoints() for name in one.names}
            if states.get("base") != "resident":
                raise LostError(f"the checkpoint base is not resident any more; these are there: {states}")
            if self.witness.run("result = differ(attachment, expected)", expected=_digests("base")):
                raise LostError("the witness reads other bytes")
            found = client.load_report(self._base, name="base")
            if found is None or found.read_bytes:
                raise LostError("base was read again")
            client.verify()
            _remove_others(client)
            if self._agree(client):
                return ""
            self.daemon.kill()
            self.daemon.start()
            assert self._agree(client), f"the next daemon has other books: {client.check_books()}"
            return "its memory comes back with the next daemon"

    def went_with_holder(self, holders: list[int]) -> bool:
        """Whether base is lost because its holder died: one of these processes, while its daemon lives and says so."""
        if self.kind != "cuda_ipc" or not holders or set(holders) & set(self.daemon.holders()):
            return False
        with weightd.connect(self.daemon.socket, timeout=60.0) as client:
            return [one.state for one in client.checkpoints() if "base" in one.names] == ["lost"]

    def reload(self) -> None:
        """Have the same daemon load what was lost, and a witness hold it. Else goes before, or they share segments."""
        self.witness.kill()
        with weightd.connect(self.daemon.socket, timeout=60.0) as client:
            _remove_others(client)
        self._load_base()
        self._witness()

    def renew(self) -> None:
        """Begin anew with another daemon, where what was there before is not to be had any more."""
        self.witness.kill()
        self.daemon.kill()
        self.daemon.start()
        self._load_base()
        self._witness()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _witness(self) -> None:
        self.witness = Worker(self.daemon.socket, {**self._backend.environment, VARIABLE: ""})
        self.witness.run(_CLIENT + _WITNESS)

    def _agree(self, client: weightd.Client) -> bool:
        """Whether all memory is in the books, soon, and none of it is a load's."""

        def agree() -> bool:
            devices = client.stats().devices
            used = sum(device.used_bytes for device in devices)
            there = self.daemon.allocated() if self.daemon.backend.is_host else self.daemon.backend.bytes_on_double()
            in_flight = any(device.in_flight_bytes for device in devices)
            return not in_flight and used == there and all(figure.agrees for figure in client.check_books())

        with contextlib.suppress(AssertionError):
            eventually(agree, 10.0)
            return True
        return False

    def _load_base(self) -> None:
        checkpoints.rest(self._base)
        with weightd.connect(self.daemon.socket, timeout=60.0) as client:
            client.load(self._base, name="base")
            client.attach("base").close()

    def _file(
        self, name: str, *, count: int = _TENSORS, size: int = _SIZE, shared: dict[int, object] | None = None
    ) -> Path:
        return checkpoints.write_random(self._folder / f"{name}.safetensors", count, size, name, shared)

    def _client(self, deed: str, **names: object) -> str:
        return self._run_worker(_DEED % deed.strip(), **names)

    def _run_worker(self, source: str, **names: object) -> str:
        """Have a client process do it; a new one where the last was killed."""
        if self._worker is not None and self._worker.process.poll() is not None:
            self._worker.close()
            self._worker = None
        if self._worker is None:
            self._worker = Worker(self.daemon.socket, {**self._backend.environment, **self._variables})
            self._worker.run(_CLIENT)
        try:
            return str(self._worker.run(source, **names))
        except AssertionError as error:
            if "WRONG BYTES" in str(error):
                raise LostError("a client reads other bytes") from error
            if "the worker ended" not in str(error):
                raise
            self._worker.close()
            self._worker = None
            return "the client was killed"

    def _fetch_into(self, name: str, sink: str) -> str:
        """Publish a checkpoint on another node, whose agent serves it, and fetch it from there."""
        state = self._folder / "agent"
        with _environment(self._variables):
            if self._agent is not None and self._agent.process.poll() is not None:
                self._agent.kill()
                self._agent = None
            if self._agent is None:
                self._agent = Agent(state)
        path = checkpoints.write_random(self._folder / f"{name}.safetensors", 2, _LARGER, name)
        digest = published(state, path)
        done = subprocess.run(
            [sys.executable, "-m", "weightd_fleet.agent.asking", f"--parent={os.getpid()}",
             f"--from={self._agent.address}", f"--sink={sink}", f"--state-dir={self._folder / 'receiver'}",
             f"--socket={self.daemon.socket}", f"--name={name}", f"--folder={self._folder / f'{name}.fetched'}",
             "fetch", digest],
            env=environment() | self._variables, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        if done.returncode < 0:
            return "the fetch was killed"
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if "fetched" not in answer:
            return str(answer.get("error") or answer)[:80]
        if sink == "files":
            got = (self._folder / f"{name}.fetched" / path.name).read_bytes()
            if got != path.read_bytes():
                raise LostError("a fetch wrote other bytes")
        else:
            with weightd.connect(self.daemon.socket, timeout=60.0) as client, client.attach(name) as attachment:
                for number in range(2):
                    if bytes(attachment.buffer(f"t{number}")) != checkpoints.random_bytes((name, number), _LARGER):
                        raise LostError("a fetched checkpoint has other bytes")
        return "ok"


class _Armed:
    """A backend whose processes can be armed."""

    def __init__(self, backend: Backend, variables: dict[str, str]) -> None:
        self._backend, self._variables = backend, variables

    @property
    def environment(self) -> dict[str, str]:
        return self._backend.environment | self._variables

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def _remove_others(client: weightd.Client) -> None:
    """Remove everything but base, as soon as no load is under way."""
    eventually(lambda: not client.loads(), what="loads end")
    for checkpoint in client.checkpoints():
        if "base" not in checkpoint.names:
            eventually(lambda one=checkpoint: _removed(client, one.content_digest), what="all let go")  # type: ignore[misc]  # mypy infers no lambda with a default


def _removed(client: weightd.Client, digest: str) -> bool:
    """Remove a checkpoint, unless somebody still holds it."""
    try:
        client.remove(digest)
    except weightd.NotFoundError:
        return True
    except weightd.InUseError:
        return False
    return True


def _digests(seed: str, count: int = _TENSORS, size: int = _SIZE) -> dict[str, str]:
    """What the tensors of a file are."""
    import xxhash

    return {f"t{n}": xxhash.xxh3_128_hexdigest(checkpoints.random_bytes((seed, n), size)) for n in range(count)}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Any:
    """Have processes that are started here inherit variables."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
