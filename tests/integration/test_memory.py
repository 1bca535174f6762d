"""What attached processes cost, as the kernel counts it: one copy for all, and a page for each page written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support import checkpoints, memory
from support.daemon import Daemon
from support.worker import Worker

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
GIB = 1 << 30
PAGE = 4096
PROCESSES = 3
DAEMON_RSS = 150_000_000

WARM_UP = """
import weightd, xxhash
from pathlib import Path
xxhash.xxh3_128_digest(b"")

client = weightd.connect(timeout=60)
"""

ATTACH_STATE = f"{WARM_UP}\nstate = client.attach(Path(path)).state_dict()"

ATTACH_AND_READ = """
attachment = client.attach(Path(path))
result = {key.name: xxhash.xxh3_128_hexdigest(attachment.buffer(key.name)) for key in attachment.tensors}
"""


@pytest.mark.slow
def test_processes_that_read_everything_take_one_copy(start_daemon: StartDaemon, spawn: Spawn, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 64, 16 * MIB)
    try:
        daemon = start_daemon(budget="1200MiB")
        client = daemon.connect()
        report = client.load_report(path)
        assert report is not None
        assert report.unique_bytes == GIB
        processes = [spawn(daemon) for _ in range(PROCESSES)]
        for process in processes:
            process.run(WARM_UP)
        before = [memory.pss(process.pid) for process in processes]

        for process in processes:
            process.start(ATTACH_AND_READ, path=str(path))
        digests = [process.finish() for process in processes]

        assert digests == [digests[0]] * PROCESSES
        assert len(set(digests[0].values())) == 64
        after = [memory.pss(process.pid) for process in processes]
        assert sum(after) - sum(before) == pytest.approx(GIB, rel=0.05), (before, after)
        assert [memory.written(process.pid) for process in processes] == [0] * PROCESSES
        assert daemon.allocates(0, GIB * 1.02)
        assert daemon.rss() < DAEMON_RSS
    finally:
        path.unlink()


def test_a_write_in_place_takes_its_page_and_is_seen_by_nobody(daemon: Daemon, spawn: Spawn, tmp_path: Path) -> None:
    norms = [f"norm{i}" for i in range(4)]
    tables = [f"table{i}" for i in range(3)]
    tensors = {name: np.ones(1024, np.float32) for name in norms}
    tensors |= {name: np.ones(100_000, np.float32) for name in tables}
    path = checkpoints.write(tmp_path / "m.safetensors", tensors)
    writer, reader = spawn(daemon), spawn(daemon)
    for process in (writer, reader):
        process.run(ATTACH_STATE, path=str(path))

    def pages_written() -> int:
        return memory.written(writer.pid) // PAGE

    written = "result = {name: tensor[tensor != 1].tolist() for name, tensor in state.items() if (tensor != 1).any()}"
    assert (writer.run(written), reader.run(written), pages_written()) == ({}, {}, 0)
    expected = {}
    for number, name in enumerate([*norms, *tables]):
        writer.run("state[name][0] = value", name=name, value=number + 2)
        expected[name] = [number + 2]
        assert writer.run(written) == expected
        assert reader.run(written) == {}
    # Each name is written at one place; names may lie in one page, but never two pages for one.
    assert 1 <= pages_written() <= len(expected)
    before = pages_written()
    writer.run("state['table0'].fill_(7)")
    size = tensors["table0"].nbytes
    assert pages_written() - before <= size // PAGE + 1
    assert memory.written(reader.pid) == 0
    assert reader.run(written) == {}
    assert spawn(daemon).run(f"{ATTACH_STATE}\n{written}", path=str(path)) == {}
