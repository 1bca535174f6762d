"""A daemon in a memory control group of its own, where this machine lets the test make one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import checkpoints
from support.daemon import WATCHED, Daemon, eventually

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
LIMIT = 240 * MIB


@pytest.fixture
def group() -> Iterator[Path]:
    """A group inside ours that may use LIMIT bytes, of whichever version may be made here. Empty at the end."""
    version_1 = {
        path for _, kinds, path in (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
        if "memory" in kinds.split(",")
    }  # fmt: skip
    ours = [(Path(f"/sys/fs/cgroup/memory{path}"), "memory.limit_in_bytes") for path in version_1]
    for outer, limit in (*ours, (Path("/sys/fs/cgroup"), "memory.max")):
        made = outer / f"weightd-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            (made / limit).write_text(str(LIMIT))
        except OSError:  # the controller is not for us
            made.rmdir()
            continue
        yield made
        processes = made / "cgroup.procs"
        eventually(lambda processes=processes: not processes.read_text(), what="its processes end")
        made.rmdir()
        return
    pytest.skip("no control group of memory can be made here")


def test_the_default_budget_is_half_of_the_groups_limit(group: Path, start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Else the kernel kills the daemon over a load that it has let in."""
    enter = f'echo $$ >{group}/cgroup.procs && exec "$0" "$@"'
    daemon = start_daemon(argv=["/bin/sh", "-c", enter, *WATCHED], unset=("budget",))
    assert str(daemon.pid) in (group / "cgroup.procs").read_text().split()
    stats = daemon.connect().stats()
    assert [(device.uuid, device.budget_bytes) for device in stats.devices] == [("host", LIMIT // 2)]
    refused = daemon.command("load", checkpoints.write_random(tmp_path / "big.safetensors", 5, 50 * MIB), check=False)
    assert refused.returncode == 5, refused.stderr
    daemon.command("load", checkpoints.write_random(tmp_path / "small.safetensors", 2, 50 * MIB))
    daemon.command("load", checkpoints.write_random(tmp_path / "other.safetensors", 2, 50 * MIB, seed="other"))
