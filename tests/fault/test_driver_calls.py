"""Every call of the CUDA driver fails once: in the daemon, the holder, the loader and the client, on the double.

A run without failures tells which calls there are. Then, for each of them: a typed error, or none where the call gives
something up; balanced books; no descriptor and no byte left; and the next attempt works. Of a function that is called
many times in a row, the first, second and last call stand for all.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import weightd
from support import checkpoints, fakecuda
from support.backends import CUDA, Backend
from support.content import content
from support.daemon import WATCHED, Daemon, environment, eventually, forked
from support.worker import Worker

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
MANY = 4
CODES = {"cuMemCreate": 2, "cuMemAlloc": 2, "cuMemHostAlloc": 2}
"""CUDA_ERROR_OUT_OF_MEMORY, which these return when all is well; of the others CUDA_ERROR_UNKNOWN."""
UNKNOWN = 999
TYPED = (weightd.DeviceError, weightd.CapacityError, weightd.DeviceMismatchError)
GIVING_UP = {
    "cuMemUnmap", "cuMemAddressFree", "cuMemRelease", "cuMemFree", "cuMemFreeHost", "cuIpcCloseMemHandle",
    "cuEventDestroy", "cuStreamDestroy", "cuCtxPushCurrent", "cuCtxPopCurrent", "cuCtxSetCurrent", "cuCtxSynchronize",
    "cuStreamSynchronize",
}  # fmt: skip
"""Functions that are called to give something up: where that fails, the work itself may be done."""
RELEASING = {"cuEventCreate", "cuEventRecord", "cuEventQuery", "cuThreadExchangeStreamCaptureMode"}
"""Functions that a client calls for that as well, to wait for those who read the memory."""

DATA = {
    "large": checkpoints.random_bytes("large", 8 * MIB + 5),  # more pieces than a thread has buffers
    "known": checkpoints.random_bytes("known", MIB),  # `base` has it: it is compared with that
    "small": checkpoints.random_bytes("small", 100),
    "other": checkpoints.random_bytes("other", 3000),
    "twice": checkpoints.random_bytes("twice", 128 << 10),
    "again": checkpoints.random_bytes("twice", 128 << 10),  # one place and two names, for which a client has to do more
}

pytestmark = [pytest.mark.backends(*CUDA, double_only=True), pytest.mark.slow, pytest.mark.timeout(1200)]


class Faults:
    """Failures in those processes on `on` whose command line contains `where`."""

    def __init__(self, backend: Backend, folder: Path, where: str) -> None:
        self._log, self._rules, self._seen = folder / "calls", folder / "rules", folder / "seen"
        self._set("")
        self._log.write_text("")
        self.on = backend.with_knobs(log=self._log, rules=self._rules, fail_in=where, fail_once=self._seen)

    @contextmanager
    def failing(self, rule: str) -> Iterator[None]:
        """Let a call fail, which must happen here."""
        self._seen.unlink(missing_ok=True)
        self._set(rule)
        yield
        eventually(self._seen.exists, what=f"{rule} has failed")
        self._set("")

    def calls(self, process: str) -> Counter[str]:
        """How often processes of that module have called each function since this was asked last."""
        seen = Counter(call.function for call in fakecuda.calls(self._log) if call.process.endswith(process))
        self._log.write_text("")
        assert seen
        return seen

    def _set(self, rules: str) -> None:
        new = self._rules.with_suffix(".new")
        new.write_text(rules)
        new.replace(self._rules)


def each(calls: Counter[str], codes: Mapping[str, int] = CODES) -> list[str]:
    """Rules for what was called."""
    return [
        f"{function}:{codes.get(function, UNKNOWN)}:{nth}"
        for function, times in sorted(calls.items())
        for nth in (range(1, times + 1) if times <= MANY else (1, 2, times))
    ]


def function_of(rule: str) -> str:
    return rule.partition(":")[0]


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return checkpoints.write(
        tmp_path / "tuned.safetensors", {name: ("U8", (len(data),), data) for name, data in DATA.items()}
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "base.safetensors", {"known": ("U8", (MIB,), DATA["known"])})


def failure(daemon: Daemon, path: Path) -> str:
    """Load, without attaching; why that fails, or nothing."""
    with weightd.connect(daemon.socket, timeout=20.0) as client:
        return refusal(lambda: client.load(path, name=path.stem, verify=True))


def refusal(act: Callable[[], object]) -> str:
    """What the typed error says that this raises; empty where it raises none."""
    try:
        act()
    except TYPED as error:
        return str(error)
    return ""


def check(rule: str, why: str) -> None:
    """The error names the call; there is none only where something was given up."""
    assert function_of(rule) in (why or GIVING_UP), (rule, why)


def gone(pids: list[int], what: str) -> None:
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what=f"the end of {what}")


def works(daemon: Daemon, path: Path) -> None:
    """Load, compare every byte, and remove again."""
    assert failure(daemon, path) == ""
    client = daemon.connect()
    with client.attach(path.stem) as attachment:
        for name in attachment.tensors:
            assert content(attachment, name.name) == DATA[name.name]
    remove(daemon, path)
    client.close()


def remove(daemon: Daemon, path: Path) -> None:
    with weightd.connect(daemon.socket, timeout=60) as client:
        eventually(lambda: not client.leases())
        client.remove(path.stem)


def books(daemon: Daemon) -> tuple[int, int]:
    """Used bytes as the daemon counts them, and those in which nothing lies or is in flight."""
    with weightd.connect(daemon.socket, timeout=60) as client:
        (device,) = client.stats().devices
    return device.used_bytes, device.in_flight_bytes


def balanced(daemon: Daemon, used: int, what: str) -> None:
    eventually(lambda: books(daemon) == (used, 0) and daemon.allocated() == used, what=f"balanced books after {what}")


def descriptors(daemon: Daemon) -> tuple[list[str], int]:
    """The memory and manifests that the daemon has open, and processes that have ended without its noticing.

    Files of leases are not among them: one stays for a second or two after its last lease, until the sweep finds it.
    """
    names: list[str] = []
    for entry in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            names += re.findall("memfd:(?!weightd-lease).*|pidfd", os.readlink(entry))
    return sorted(name for name in names if name != "pidfd"), names.count("pidfd") - len(daemon.loaders())


def closed(daemon: Daemon, held: tuple[list[str], int], rule: str) -> None:
    """Wait until the daemon has open what it had before."""
    seen: list[tuple[list[str], int]] = []

    def are_closed() -> bool:
        seen[:] = [descriptors(daemon)]
        return seen == [held]

    try:
        eventually(are_closed)
    except AssertionError:
        raise AssertionError(f"after {rule} the daemon has {seen[0]} open, and had {held}") from None


def settled_descriptors(daemon: Daemon) -> tuple[list[str], int]:
    """As `descriptors`, when what was under way has ended: memory goes back on a thread of the daemon's."""
    seen = [descriptors(daemon)]

    def settled() -> bool:
        time.sleep(0.2)
        seen.append(descriptors(daemon))
        return seen[-5:] == [seen[-1]] * 5

    eventually(settled, what="descriptors that stay as they are")
    return seen[-1]


# -- the loader --------------------------------------------------------------------------------------------------------


@pytest.mark.backends("cuda_vmm", "cuda_ipc", double_only=True, swept="cuda_ipc")
def test_in_the_loader(start_daemon: StartDaemon, backend: Backend, tmp_path: Path, base: Path, tuned: Path) -> None:
    faults = Faults(backend, tmp_path, "weightd_daemon.loader")
    daemon = start_daemon(faults.on, budget="64MiB", reader_threads=1)  # with one thread the calls are always the same
    with weightd.connect(daemon.socket, timeout=60) as client:
        client.load(base, name="base", pin=True)
    used, _ = books(daemon)
    end_loaders(daemon)
    faults.calls("")
    works(daemon, tuned)
    first = faults.calls("weightd_daemon.loader")
    works(daemon, tuned)
    later = faults.calls("weightd_daemon.loader")
    held = settled_descriptors(daemon)
    only_first = Counter({function: times for function, times in first.items() if times > later[function]})
    for rule, fresh in [*((rule, True) for rule in each(only_first)), *((rule, False) for rule in each(later))]:
        if fresh:
            end_loaders(daemon)
        before = daemon.loaders()
        with faults.failing(rule):
            why = failure(daemon, tuned)
        check(rule, why)
        if not why:
            remove(daemon, tuned)
        gone(before, f"the loader after {rule}")
        balanced(daemon, used, rule)
        works(daemon, tuned)
        balanced(daemon, used, f"{rule} and another load")
        closed(daemon, held, rule)


def test_in_the_loader_that_verifies(start_daemon: StartDaemon, backend: Backend, tmp_path: Path, base: Path) -> None:
    faults = Faults(backend, tmp_path, "weightd_daemon.loader")
    daemon = start_daemon(faults.on)
    client = daemon.connect()
    client.load(base, name="base", pin=True)
    eventually(lambda: "cuMemAddressFree" in (seen := faults.calls("")) or "cuIpcCloseMemHandle" in seen)
    assert client.verify("base").done_blobs == 1
    used, _ = books(daemon)
    for rule in each(Counter(set(faults.calls("weightd_daemon.loader")))):
        with faults.failing(rule):
            check(rule, refusal(lambda: client.verify("base")))
        balanced(daemon, used, rule)
        assert client.verify("base").done_blobs == 1, rule


def end_loaders(daemon: Daemon) -> None:
    for pid in daemon.loaders():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not daemon.loaders())


# -- the client --------------------------------------------------------------------------------------------------------

ATTACH = """
import gc, os, weightd
from weightd._transport import connection
from support.content import content
from support.descriptors import counted
def look():
    gc.collect()
    maps = open("/proc/self/maps").read()
    of_line = 0 if connection._watcher is None else 1  # its thread has it, from the first attach on; no eventfd counts
    return [counted() - of_line, maps.count("memfd:fakecuda"), maps.count("weightd-manifest")]
def attach(client):
    with client.attach("tuned", device="cuda:0") as attachment:
        return [content(attachment, name.name).hex() for name in attachment.tensors]
def attempt(rule):
    before, problem = look(), ""
    os.environ["FAKECUDA_FAIL"] = rule
    try:
        attach(client)
    except weightd.WeightdError as error:
        problem = type(error).__name__, str(error)
    os.environ["FAKECUDA_FAIL"] = ""
    left = [now - then for now, then in zip(look(), before)]
    return left, problem, attach(client) == expected, look()[2]
client = weightd.connect(timeout=60)
"""


def test_in_the_client(
    start_daemon: StartDaemon, backend: Backend, workers: list[Worker], tmp_path: Path, tuned: Path
) -> None:
    log, seen = tmp_path / "calls", tmp_path / "seen"
    daemon = start_daemon()
    assert failure(daemon, tuned) == ""
    expected = [data.hex() for data in DATA.values()]

    def worker() -> Worker:
        workers.append(Worker(daemon.socket, backend.with_knobs(log=log, fail_once=seen).environment))
        workers[-1].run(ATTACH, expected=expected)
        return workers[-1]

    def calls() -> Counter[str]:
        found = Counter(call.function for call in fakecuda.calls(log) if call.process == "support.worker")
        log.write_text("")
        return found

    def attempt(worker: Worker, rule: str) -> None:
        seen.unlink(missing_ok=True)
        left, problem, right, kept = worker.run("result = attempt(rule)", rule=rule)
        assert seen.exists(), f"{rule} did not happen"
        assert right, rule
        assert (left[2], kept) == (0, 0), f"{rule}: the lease stays"
        if function_of(rule) in GIVING_UP | RELEASING:
            assert left[0] <= 1, (rule, left)  # what could not be given up
        else:
            assert left == [0, 0, 0], (rule, left)
            assert problem, rule
            assert problem[0] in ("DeviceError", "DeviceMismatchError"), (rule, problem)
        assert not problem or function_of(rule) in problem[1], (rule, problem)

    old = worker()
    log.write_text("")
    old.run("attach(client)")
    first = calls()
    old.run("attach(client)")
    later = calls()
    for rule in each(later):
        attempt(old, rule)
    for rule in each(Counter({function: times for function, times in first.items() if times > later[function]})):
        attempt(worker(), rule)
    client = daemon.connect()
    eventually(lambda: not client.leases())


# -- the daemon and its holder -----------------------------------------------------------------------------------------

OURS = {"weightd_daemon": " serve ", "cuda_holder": "cuda_holder"}
"""Process by module, and what only its command line contains."""


def processes(backend: Backend) -> list[str]:
    return list(OURS) if backend.kind == "cuda_ipc" else ["weightd_daemon"]


@pytest.mark.backends("cuda_vmm", "cuda_ipc", double_only=True, swept="cuda_ipc")
def test_while_the_daemon_starts(backend: Backend, tmp_path: Path) -> None:
    for process in processes(backend):
        faults = Faults(backend, tmp_path, OURS[process])
        assert start(faults.on, tmp_path) == ""
        calls = faults.calls(process)
        for rule in each(calls, codes={}):  # a GPU that is full when the daemon starts is served
            with faults.failing(rule):
                assert start(faults.on, tmp_path) == "", rule
            assert backend.device_bytes() == 0, rule
        for function in calls if process == "weightd_daemon" else ():
            always = backend.with_knobs(fail=f"{function}:{UNKNOWN}", fail_in=OURS[process])
            # Where a holder makes the segments, the daemon asks only for the compute mode, which it just tells.
            told = backend.kind == "cuda_ipc" and function == "cuDeviceGetAttribute"
            assert (function in start(always, tmp_path)) != told, function
            assert backend.device_bytes() == 0, function


def start(backend: Backend, tmp_path: Path) -> str:
    """Why a daemon does not start; empty when it does."""
    flags = [f"--{key}={value}" for key, value in backend.settings.items()]
    argv = [*WATCHED, "serve", f"--socket={tmp_path}/s", f"--state-dir={tmp_path}", "--budget=64MiB", *flags]
    with (tmp_path / "log").open("w+") as log:
        process = forked(argv, environment() | backend.environment, log.fileno())
        assert process is not None
        try:
            with process.stdout as answers:
                ready = answers.readline()
            process.terminate()
            process.wait(60)
        finally:
            process.kill()
        log.seek(0)
        errors = log.read()
    if ready:
        assert process.returncode == 0, errors
        return ""
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


def test_while_the_daemon_serves(start_daemon: StartDaemon, backend: Backend, tmp_path: Path, base: Path) -> None:
    process = processes(backend)[-1]  # who has a holder calls nothing while it serves
    faults = Faults(backend, tmp_path, OURS[process])
    daemon = start_daemon(faults.on)
    for _ in range(2):
        faults.calls("")
        works(daemon, base)
        balanced(daemon, 0, "a load")
    held = settled_descriptors(daemon)
    for rule in sorted(each(faults.calls(process)), key=lambda rule: function_of(rule) == "cuMemRelease"):
        before = daemon.holders()
        with faults.failing(rule):
            why = failure(daemon, base)
            if not why:
                remove(daemon, base)
        check(rule, why)
        if process == "cuda_holder":  # its end, and that of all that it has not freed, unless the device was full
            if function_of(rule) not in CODES:
                gone(before, f"the holder after {rule}")
            eventually(lambda: "is being started" not in failure(daemon, base), what=f"a holder after {rule}")
            remove(daemon, base)
        if function_of(rule) != "cuMemRelease":  # the last rule; what could not be given up stays
            balanced(daemon, 0, rule)
            works(daemon, base)
            balanced(daemon, 0, f"{rule} and another load")
            closed(daemon, held, rule)
    works(daemon, base)
    assert daemon.stop() == 0
    assert backend.device_bytes() == 0


@pytest.mark.backends("cuda_vmm", double_only=True)  # with a holder, the daemon calls nothing at its end
def test_while_the_daemon_stops(start_daemon: StartDaemon, backend: Backend, tmp_path: Path, base: Path) -> None:
    faults = Faults(backend, tmp_path, OURS["weightd_daemon"])
    daemon = start_daemon(faults.on)
    assert failure(daemon, base) == ""
    with faults.failing("cuMemRelease:999:1"):
        assert daemon.stop() == 0
    assert "Traceback" not in daemon.logged()
    assert backend.device_bytes() == 0
