"""Device files of GPUs, in a folder that stands for /dev, and what the driver says of them in /proc."""

from __future__ import annotations

import os
from pathlib import Path


def make_node(folder: Path, uuid: str, minor: int = 0) -> Path:
    """Make the device file of a GPU: a FIFO, of which can be told who has it open. `folder` has "gpus", too."""
    node = folder / f"nvidia{minor}"
    about = folder / "gpus" / f"0000:0{minor}:00.0"
    about.mkdir(parents=True)
    (about / "information").write_text(
        f"Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 34\nGPU UUID: \t {uuid}\n"
        f"Bus Type: \t PCIe\nDevice Minor: \t {minor}\nGPU Excluded:\t No\n"
    )
    os.mkfifo(node)
    return node
