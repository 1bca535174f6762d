"""What `weightd top` costs: its CPU time at one update a second, as a share of a core.

    python bench/top.py [--checkpoints 20] [--clients 16] [--mib 64] [--seconds 60] [--columns 120] [--lines 40]
                        [--busy] [--folder DIR] [--format human|json]

The command runs in a terminal of its own, whose output is read and dropped. Every checkpoint has half of its bytes in
common with the one before. Each client holds two checkpoints, has read all of them, so that every page is in its page
tables, and has written to a megabyte. With `--busy` something is attached and dropped once a second besides, so that
every update has something new. Counted is what the kernel charges the process from the third second on. Aim: under 3 %.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from _daemon import Daemon, machine, scratch, serving

import weightd

_HALVES = 32  # tensors of a checkpoint
_WARM_SECONDS = 3.0
_TICKS = os.sysconf("SC_CLK_TCK")
_HOLDER = """
import sys, ctypes, weightd
client = weightd.connect()
held = [client.attach(name) for name in sys.argv[2:]]
left = int(sys.argv[1])
for attachment in held:
    for key in attachment.tensors:
        memory = attachment.buffer(key.name, key.component)
        sum(memory[::4096])
        if left > 0 and not memory.readonly:
            for at in range(0, min(left, memory.nbytes), 4096):
                memory[at] = memory[at] ^ 1
            left -= memory.nbytes
print("ready", flush=True)
sys.stdin.read()
"""


def write_half_shared(path: Path, number: int, size: int) -> None:
    """A safetensors file of which one half is that of the file before, and the other that of the file after."""
    length = size // _HALVES
    names = [f"half{at % 2}.part{at // 2}" for at in range(_HALVES)]
    header = {
        name: {"dtype": "U8", "shape": [length], "data_offsets": [at * length, (at + 1) * length]}
        for at, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for at in range(_HALVES):
            file.write(np.random.default_rng([number // 2 + at % 2 * (number % 2), at, at % 2]).bytes(length))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def drain(descriptor: int, read: list[int]) -> None:
    """Be the terminal: count bytes and drop them."""
    while True:
        try:
            data = os.read(descriptor, 1 << 16)
        except OSError:  # the process has gone
            return
        if not data:
            return
        read[0] += len(data)


def measure(daemon: Daemon, folder: Path, options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Fill the daemon, start the clients, watch."""
    client = stack.enter_context(weightd.connect(daemon.socket, timeout=60.0))
    for number in range(options.checkpoints):
        path = folder / f"{number}.safetensors"
        write_half_shared(path, number, options.mib << 20)
        client.load(path, name=f"org/checkpoint-{number}", pin=number % 4 == 0)
        path.unlink()
    variables = os.environ | {"WEIGHTD_SOCKET": str(daemon.socket)}
    for number in range(options.clients):
        names = [f"org/checkpoint-{(number + step) % options.checkpoints}" for step in (0, 1)]
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, str(1 << 20), *names],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables,
        )  # fmt: skip
        stack.callback(holder.wait)
        stack.callback(holder.terminate)
        assert holder.stdout is not None
        holder.stdout.readline()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", options.lines, options.columns, 0, 0))
    watch = subprocess.Popen(
        [sys.executable, "-m", "weightd", "top"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=variables | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "COLUMNS": "", "LINES": ""},
    )  # fmt: skip
    stack.callback(watch.wait)
    stack.callback(watch.terminate)
    os.close(theirs)
    read = [0]
    threading.Thread(target=drain, args=(ours, read), daemon=True).start()
    time.sleep(_WARM_SECONDS)
    before, bytes_before, begun = cpu_seconds(watch.pid), read[0], time.monotonic()
    while time.monotonic() < begun + options.seconds:
        time.sleep(1)
        if options.busy:
            client.attach("org/checkpoint-0").close()
    if watch.poll() is not None:
        raise SystemExit("top has ended early")
    wall = time.monotonic() - begun
    used = cpu_seconds(watch.pid) - before
    return {"cpu_seconds": used, "wall_seconds": wall, "share": used / wall, "written_bytes": read[0] - bytes_before}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--mib", type=int, default=64, help="size of a checkpoint")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--columns", type=int, default=120)
    parser.add_argument("--lines", type=int, default=40)
    parser.add_argument("--busy", action="store_true", help="attach and drop something once a second")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(scratch(options.folder))
        budget = f"{options.checkpoints * options.mib + 512}MiB"
        daemon = stack.enter_context(serving(folder, "top", "--budget", budget))
        found = machine() | measure(daemon, folder, options, stack)
    if options.format == "json":
        print(json.dumps(found))
    else:
        print(
            f"weightd top: {found['share'] * 100:.2f} % of a core: {found['cpu_seconds']:.2f} s of CPU time in "
            f"{found['wall_seconds']:.0f} s; {found['written_bytes'] / found['wall_seconds']:.0f} B/s to the terminal"
        )


if __name__ == "__main__":
    main()
