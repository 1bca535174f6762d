"""What a test has started dies with it, also when the test is killed and nothing of it can tidy up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import checkpoints
from support.backends import Backend
from support.background import background
from support.daemon import Daemon, environment, eventually
from support.leash import leashed
from support.loader import state
from support.worker import Worker

TEST = """
import os, sys, time
from pathlib import Path
from support.backends import Backend
from support.daemon import Daemon
from support.users import ALICE, user_of
from support.worker import Worker

name, kind, library, path = sys.argv[1:]
daemon = Daemon(Backend(name, kind, Path(library) if library else None), socket_mode="0666")
daemon.folder.chmod(0o755)
daemon.connect().load(path, name="m")
loaders = daemon.loaders()  # before the workers are there: in that time one may have been idle for long enough
worker = Worker(daemon.socket, daemon.backend.environment)
worker.run("import time, weightd; held = weightd.connect(timeout=60).attach('m')")
workers = [worker]
if os.geteuid() == 0:
    workers.append(user_of(Worker(daemon.socket, daemon.backend.environment), ALICE))
for busy in workers:
    busy.start("import time; time.sleep(600)")
print(*loaders, *daemon.holders(), daemon.pid, *(busy.pid for busy in workers), flush=True)
time.sleep(600)
"""


@pytest.mark.backends("host", "cuda_ipc", double_only=True)
def test_daemon_loader_holder_and_clients_die_with_a_test_that_is_killed(
    backend: Backend, short_path: Path, tmp_path: Path
) -> None:
    short_path.chmod(0o755)
    path = checkpoints.write_random(tmp_path / "m.safetensors", 2, 1 << 16)
    library = str(backend.library or "")
    with subprocess.Popen(
        leashed([sys.executable, "-c", TEST, backend.name, backend.kind, library, str(path)]),
        env=environment() | {"TMPDIR": str(short_path)} | backend.environment, stdout=subprocess.PIPE, text=True,
    ) as test:  # fmt: skip
        try:
            assert test.stdout is not None
            pids = [int(pid) for pid in test.stdout.readline().split()]
        finally:
            test.kill()
    assert len(pids) == 3 + (backend.kind == "cuda_ipc") + (os.geteuid() == 0)
    eventually(lambda: not any(state(pid) not in ("", "Z") for pid in pids), what=f"{pids} are gone")


def test_the_end_of_a_worker_that_still_works_is_seen(daemon: Daemon, spawn: Callable[[Daemon], Worker]) -> None:
    """Nobody but the worker has the other end of what it answers on."""
    with pytest.raises(AssertionError, match="the worker ended with 3"):
        spawn(daemon).run("import os; os._exit(3)")


def test_who_comes_too_late_does_not_begin() -> None:
    """The test has ended before its process could hold on to it."""
    command = leashed([sys.executable, "-c", "print('begun')"])
    command[command.index(str(os.getpid()))] = str(1 << 22)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "has ended already" in done.stderr


def test_only_the_main_thread_may_start_processes() -> None:
    """The kernel takes the thread that started a process for its parent."""
    with pytest.raises(AssertionError):
        background(leashed, ["true"]).result(60)
