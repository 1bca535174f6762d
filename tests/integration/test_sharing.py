"""The main job, with real processes: one copy of equal tensors, whoever loads them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import weightd
from support import checkpoints
from support.backends import EVERY, Backend
from support.content import content
from support.daemon import Daemon, environment
from support.worker import Worker

Spawn = Callable[[Daemon], Worker]
MIB = 1 << 20

ATTACHES = """
import sys, weightd
from support.content import content
with weightd.connect(timeout=60).attach("m") as attachment:
    assert len(content(attachment, "t1")) == 1000
print("loaded:", *[name for name in sys.argv[1:] if name in sys.modules])
"""

everywhere = pytest.mark.backends(*EVERY, swept="cuda_ipc")


@everywhere
def test_two_checkpoints_hold_equal_tensors_once(daemon: Daemon, backend: Backend, tmp_path: Path) -> None:
    base = checkpoints.write_random(tmp_path / "base.safetensors", 20, MIB, seed="base")
    tuned = checkpoints.write_random(
        tmp_path / "tuned.safetensors", 20, MIB, seed="tuned", shared={i: ("base", i) for i in range(15)}
    )
    client = daemon.connect()
    first = client.load_report(base)
    second = client.load_report(tuned)
    assert (first.total_bytes, first.unique_bytes, first.shared_bytes) == (20 * MIB, 20 * MIB, 0)
    assert (second.total_bytes, second.unique_bytes, second.shared_bytes) == (20 * MIB, 5 * MIB, 15 * MIB)
    stats = client.stats()
    assert stats.resident_bytes == 25 * MIB
    assert stats.saved_bytes == 15 * MIB
    assert stats.saved_ratio == 15 / 40
    assert daemon.allocates(0, 25 * MIB * 1.02 + 2 * backend.page)  # each file ends somewhere in a page
    for path, seed in ((base, "base"), (tuned, "tuned")):
        with client.attach(path) as attachment:
            for i in range(20):
                expected = checkpoints.random_bytes(("base" if i < 15 else seed, i), MIB)
                assert content(attachment, f"t{i}") == expected


def test_names_of_one_attachment_share_no_address(daemon: Daemon, tmp_path: Path) -> None:
    ones = {f"norm{i}": np.ones(64, np.float32) for i in range(4)}
    large = {f"table{i}": np.full(50_000, 7.0, np.float32) for i in range(3)}
    path = checkpoints.write(tmp_path / "m.safetensors", {**ones, **large})
    client = daemon.connect()
    report = client.load_report(path)
    assert report.shared_bytes == 2 * 200_000  # the large ones are held once, the small ones apart
    with client.attach(path) as attachment, client.attach(path) as other:
        for name in (*ones, *large):
            attachment.buffer(name)[:4] = b"\xff\xff\xff\xff"
            for also in (*ones, *large):
                changed = attachment.buffer(also)[:4] == b"\xff\xff\xff\xff"
                assert changed == (also == name), (name, also)
            assert other.buffer(name)[:4] != b"\xff\xff\xff\xff"
            attachment.buffer(name)[:4] = other.buffer(name)[:4]


@everywhere
def test_python_import_costs_neither_torch_nor_grpc(daemon: Daemon, backend: Backend, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 3, 1000)
    daemon.connect().load(path, name="m")
    heavy = ["grpc", "torch", *(["numpy"] if backend.is_host else [])]  # cuda.core imports numpy
    client = subprocess.run(  # a worker may come from a template, which has torch
        [sys.executable, "-c", ATTACHES, *heavy],
        env=environment(daemon.socket) | backend.environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (client.stdout, client.returncode) == ("loaded:\n", 0), client.stderr


def test_attach_by_digest_and_unknown_names(daemon: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 3, 1000)
    client = daemon.connect()
    digest = client.load(path, name="m").content_digest
    with client.attach(digest[7:15]) as attachment:
        assert attachment.content_digest == digest
    for reference in ("nope", "sha256:" + "0" * 64):
        with pytest.raises(weightd.NotFoundError, match=reference):
            client.attach(reference)
