#!/usr/bin/env python3
"""See whether weightd works on this GPU at all: a daemon, one load, three attaches, and what the daemon then holds.

    python tools/gpu_smoke.py [--size 500MiB] [--folder DIR]

Prints how long each step took, and compares every tensor with the file. Where torch.cuda does not run, on the test
double, it says so and compares bytes that the driver copied. Exit code 1 where anything failed or differs.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("client", "daemon", "bench", "tests")]

import torch  # noqa: E402  # after the path is set
from _daemon import parse_size, scratch, serving, write_checkpoint  # noqa: E402  # likewise
from safetensors.torch import load_file  # noqa: E402  # likewise

import weightd  # noqa: E402  # likewise
from support.content import content  # noqa: E402  # likewise

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "cuda:0"
NAME = "smoke"


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Of a tensor on the host."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def by_torch(attachment: weightd.Attachment) -> dict[str, bytes]:
    """Every tensor, copied to the host by torch."""
    return {name: bytes_of(tensor.cpu()) for name, tensor in attachment.state_dict().items()}


def by_driver(attachment: weightd.Attachment) -> dict[str, bytes]:
    """Every tensor, copied to the host by the driver."""
    return {name: content(attachment, name) for _, name in attachment.tensors}


def attach(client: weightd.Client, copied: Callable[[weightd.Attachment], dict[str, bytes]]) -> dict[str, bytes]:
    """Attach, copy everything, detach; says how long each took."""
    start = time.perf_counter()
    with client.attach(NAME, device=DEVICE) as attachment:
        attached = time.perf_counter()
        found = copied(attachment)
        read = time.perf_counter()
    print(f"attach {attached - start:.3f} s, copy to the host {read - attached:.3f} s")
    return found


def descriptors(pid: int) -> str:
    """What a process has open, how often. Numbers are left out."""
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[re.sub(r"\d{2,}", "N", os.readlink(entry))] += 1
        except OSError:  # closed meanwhile
            continue
    return ", ".join(f"{count} × {name}" for name, count in sorted(found.items()))


def main() -> str | int:
    """Run what the command line says. Returns an exit code or a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=500 << 20, help="of the checkpoint")
    parser.add_argument("--folder", type=Path, help="where to put it for the time (default: the system's)")
    options = parser.parse_args()
    has_torch = torch.cuda.is_available()
    if not has_torch:
        print("torch.cuda does not run here: tensors are not made, and the driver copies their bytes")
    copied = by_torch if has_torch else by_driver
    with scratch(options.folder) as folder:
        path = folder / "smoke.safetensors"
        write_checkpoint(path, options.size, 60, 1)
        expected = {name: bytes_of(tensor) for name, tensor in load_file(path).items()}
        start = time.perf_counter()
        with serving(folder, "smoke", "--device", DEVICE, "--budget", "4GiB") as daemon:
            print(f"the daemon is ready after {time.perf_counter() - start:.3f} s")
            with weightd.connect(daemon.socket) as client:
                start = time.perf_counter()
                report = client.load_report(path, name=NAME, device=DEVICE)
                print(f"load {time.perf_counter() - start:.3f} s, of which the daemon says {report and report.seconds}")
                print(f"shared by {client.inspect(NAME).kind}")
                for _ in range(3):
                    if attach(client, copied) != expected:
                        return "gpu_smoke: attached tensors differ from the file"
                print(f"the daemon's descriptors: {descriptors(daemon.pid)}")
                for device in client.stats().devices:
                    print(device)
    print("all bytes are those of the file")
    return 0


if __name__ == "__main__":
    sys.exit(main())
