"""Two real pairs of checkpoints, a 64th of their size: what sharing saves, in the books and in the kernel's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support import memory, workloads
from support.backends import Backend
from support.daemon import Daemon
from support.worker import Worker

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]

ATTACH_AND_HASH = """
import json, mmap, struct
from pathlib import Path
import weightd, xxhash
from support.content import content

def source_digests(path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (length,) = struct.unpack("<Q", data[:8])
        for name, tensor in json.loads(data[8 : 8 + length]).items():
            start, end = (8 + length + offset for offset in tensor["data_offsets"])
            with memoryview(data)[start:end] as view:
                yield name, tensor["dtype"], tuple(tensor["shape"]), xxhash.xxh3_128_digest(view)

client = weightd.connect(timeout=60)
attachments = {checkpoint: client.attach(Path(checkpoint)) for checkpoint in checkpoints}

def hash_all():
    wrong, count = [], 0
    for checkpoint, attachment in attachments.items():
        files = sorted(Path(checkpoint).rglob("*.safetensors"))
        seen = set()
        for file in files:
            component = "" if file.parent == Path(checkpoint) else file.parent.name
            for name, dtype, shape, digest in source_digests(file):
                info = attachment.tensors[component, name]
                found = xxhash.xxh3_128_digest(content(attachment, name, component))
                if (info.dtype, info.shape, info.digest, found) != (dtype, shape, digest, digest):
                    wrong.append((checkpoint, component, name))
                seen.add((component, name))
        count += len(seen)
        assert seen == set(attachment.tensors), checkpoint
    return [wrong, count]

result = hash_all()
"""


@pytest.mark.backends("host", "cuda_vmm", swept="cuda_vmm")
@pytest.mark.parametrize(
    ("name", "saved_ratio"),
    [("deepfloyd_if_I_II_f32__s64", 0.324), ("llama31_8b_base_plus_qv_lora_merged_bf16__s64", 0.458)],
)
def test_pairs_save_what_they_share(
    name: str, saved_ratio: float, start_daemon: StartDaemon, backend: Backend, spawn: Spawn, tmp_path: Path
) -> None:
    files = workloads.write(tmp_path, name)
    try:
        rows = [row for rows in files.values() for row in rows]
        total = sum(map(workloads.nbytes, rows))
        unique = sum({(r["content"], r["dtype"], tuple(r["shape"])): workloads.nbytes(r) for r in rows}.values())
        pipelines = sorted({str(tmp_path / file.split("/")[0]) for file in files})
        assert len(pipelines) == 2

        daemon = start_daemon()
        client = daemon.connect()
        reports = [client.load_report(pipeline) for pipeline in pipelines]
        assert sum(report.total_bytes for report in reports if report) == total
        stats = client.stats()
        assert stats.saved_ratio == pytest.approx(saved_ratio, abs=0.001)
        assert (stats.logical_bytes, stats.saved_bytes) == (total, total - stats.resident_bytes)
        # Tensors that occur twice in one checkpoint and are small are held twice: a little over the unique bytes.
        assert unique <= stats.resident_bytes <= unique * 1.001
        plan = json.loads(daemon.command("plan", *pipelines, "--state-dir", tmp_path, "--format", "json").stdout)
        assert (plan["total_bytes"], plan["unique_bytes"]) == (stats.logical_bytes, stats.resident_bytes)

        holders = [spawn(daemon), spawn(daemon)]
        for holder in holders:
            holder.start(ATTACH_AND_HASH, checkpoints=pipelines)
        for holder in holders:
            assert holder.finish() == [[], len(rows)]
        assert len(client.leases()) >= 4
        pages = stats.devices[0].segments * backend.page  # each file ends somewhere in a page
        assert daemon.allocates(0, unique * 1.02 + (0 if backend.is_host else pages))
        # The memory is theirs, too: each maps both checkpoints whole, and nothing of it is its own.
        for holder in holders:
            assert holder.run("result = hash_all()[0]") == []
            if backend.is_host:
                assert memory.written(holder.pid) == 0
    finally:
        for folder in os.scandir(tmp_path):
            shutil.rmtree(folder)
