"""Thousands of leases of a process: nobody else waits, whatever is asked, and those that ended are found."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.background import background
from support.daemon import Daemon, eventually
from support.worker import Worker

pytestmark = pytest.mark.slow

# As support/watched_weightd_daemon.py, but a step may take less: the daemon's log says which took more.
WATCHED = """
import sys
from support import loop_watch
from weightd_daemon.__main__ import main
loop_watch.MOST_SECONDS = 0.02
# Locking and unlocking wait while anybody on the machine reads /proc/locks, as tests on the double do all the time.
for pattern in (r"kernel_locks\\.py.* in lock_byte", r"lease_locks\\.py.* in close"):
    loop_watch.ALLOWED[pattern] = "somebody reads /proc/locks"
loop_watch.install()
sys.exit(main())
"""


@pytest.mark.parametrize("many", [8_000, pytest.param(20_000, marks=pytest.mark.sweep)])
def test_no_step_of_the_loop_takes_long_whatever_is_asked(
    many: int, start_daemon: Callable[..., Daemon], spawn: Callable[[Daemon], Worker], tmp_path: Path
) -> None:
    daemon = start_daemon(argv=[sys.executable, "-c", WATCHED], log_level="warning", max_user_leases=0)
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "a.safetensors", 4, 4096), name="a")
    workers, other = [spawn(daemon), spawn(daemon)], spawn(daemon)
    ended = threading.Event()

    def ask() -> int:
        asked = 0
        with daemon.connect() as asker:
            while not ended.is_set():
                asker.stats()
                asker.checkpoints()
                asked += 1
        return asked

    asking = background(ask)
    try:
        for worker in workers:
            worker.run("import weightd\nclient = weightd.connect(timeout=60)")
            worker.run(f"held = [client.attach('a') for _ in range({many // 2})]")
        other.run("import weightd\nattachment = weightd.connect(timeout=60).attach('a')")
        for worker in workers:  # all of it twice: a step is found when it is the second of its kind
            assert client.stats().leases >= many
            assert sum(lease.pid == worker.pid for lease in client.leases()) == many // 2
            with pytest.raises(weightd.InUseError, match="in use by"):
                client.remove("a")
        for worker, left in zip(workers, (many // 2, 0), strict=True):
            worker.kill()
            eventually(lambda left=left: client.stats().leases <= left + 2, what="the sweep finds that they have ended")
    finally:
        ended.set()
    assert asking.result(60)
    other.run("attachment.close()")
