"""GGUF files against a real daemon: real weights in two processes, checkpoints that share, split ones, GPU memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import weightd
import weightd.torch
from support import checkpoints, fake_torch
from support.backends import EVERY, Backend
from support.content import content
from support.daemon import Daemon, eventually
from support.gguf_files import BF16, F16, F32, Q4_0, Q8_0, STRING, Tensors, key, smollm2, split, whole
from support.shared import SharedDaemons
from support.worker import Worker

Spawn = Callable[[Daemon], Worker]

COMPARE = """
import gguf, numpy as np, weightd
theirs = gguf.GGUFReader(path).tensors
with weightd.connect(timeout=60).attach(path) as attachment:
    assert [key.name for key in attachment.tensors] == [tensor.name for tensor in theirs]
    for tensor in theirs:
        ours = attachment.gguf_tensor(tensor.name)
        assert (ours.type, ours.shape) == (tensor.tensor_type.name, tuple(tensor.shape.tolist()[::-1])), tensor.name
        values = ours.dequantize()
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert (values.dtype, values.shape) == (np.float32, ours.shape), tensor.name
        assert np.array_equal(values, expected), tensor.name
    kept = ours
result = len(theirs)
"""


@pytest.fixture
def client(
    shared_daemons: SharedDaemons, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> Iterator[weightd.Client]:
    """A client of a daemon that holds nothing."""
    if backend.library is not None:
        monkeypatch.setattr("weightd._tensors._raw", fake_torch._raw)
    with shared_daemons.on(backend) as daemon, weightd.connect(daemon.socket, timeout=20.0) as client:
        yield client


def blocks(seed: object, kind: int, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...], bytes]:
    """A tensor whose values are random numbers."""
    count = int(np.prod(shape))
    values = np.frombuffer(checkpoints.random_bytes(seed, count), np.int8).astype(np.float32).reshape(shape) / 64
    return kind, shape, gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind)).tobytes()


def small(seed: object = 0) -> Tensors:
    """Blocks and plain numbers, some of them not as long as the alignment."""
    return {
        "blk.0.attn_q.weight": blocks((seed, 1), Q4_0, (6, 64)),
        "blk.0.attn_norm.weight": blocks((seed, 2), F32, (5,)),
        "token_embd.weight": blocks((seed, 3), Q8_0, (2, 3, 32)),
        "half": blocks((seed, 4), F16, (3, 7)),
        "brain": blocks((seed, 5), BF16, (9,)),
        "empty": (Q4_0, (0, 32), b""),
    }


def check(attachment: weightd.Attachment, tensors: Tensors) -> None:
    """What is attached is what was written: bytes, values and torch tensors."""
    assert [key.name for key in attachment.tensors] == list(tensors)
    state = attachment.state_dict()
    for name, (kind, shape, data) in tensors.items():
        ours = attachment.gguf_tensor(name)
        number = gguf.GGMLQuantizationType(kind)
        assert (ours.type, ours.shape) == (number.name, shape)
        assert content(attachment, name) == data
        values = ours.dequantize()
        assert values.shape == shape
        if data:
            rows = np.frombuffer(data, np.uint8).reshape(-1, len(data) * shape[-1] // int(np.prod(shape)))
            assert values.tobytes() == gguf.quants.dequantize(rows, number).tobytes()
        if number.name.startswith("Q"):
            elements, size = gguf.GGML_QUANT_SIZES[number]
            assert state[name].dtype is torch.uint8
            assert state[name].shape == (*shape[:-1], shape[-1] // elements * size if data else 0)
            assert state[name].numpy().tobytes() == data
        else:
            assert state[name].shape == shape
            assert np.array_equal(state[name].float().numpy(), values)


@pytest.mark.slow
def test_real_weights_in_two_processes(daemon: Daemon, spawn: Spawn) -> None:
    path = smollm2()
    client = daemon.connect()
    report = client.load_report(path)
    assert report is not None
    assert report.tensors == 272
    assert report.total_bytes > 90_000_000
    workers = [spawn(daemon), spawn(daemon)]
    for worker in workers:
        worker.start(COMPARE, path=str(path))
    assert [worker.finish() for worker in workers] == [272, 272]
    # Each has kept a tensor.
    assert {lease.pid for lease in client.leases() if not lease.waiting} == {worker.pid for worker in workers}
    (device,) = client.stats().devices
    assert device.live_bytes <= report.total_bytes
    with client.attach(path) as attachment:
        metadata = attachment.metadata()
    assert metadata is not None
    assert metadata["general.basename"] == "smollm2"
    assert metadata["tokenizer.ggml.merges"].startswith("[48900 string] xxh3_128:")


def test_checkpoints_share_the_tensors_that_they_have_in_common(daemon: Daemon, tmp_path: Path) -> None:
    path, tuned = smollm2(), tmp_path / "tuned.gguf"
    shutil.copyfile(path, tuned)
    changed = 0
    with tuned.open("r+b") as file:
        for tensor in gguf.GGUFReader(path).tensors:
            if ".attn_q." in tensor.name or ".attn_v." in tensor.name:
                changed += tensor.n_bytes
                file.seek(tensor.data_offset + tensor.n_bytes // 2)
                file.write(b"tuned")
    client = daemon.connect()
    base = client.load_report(path, name="base")
    report = client.load_report(tuned, name="tuned")
    assert base is not None
    assert report is not None
    assert 5_000_000 < changed < 20_000_000
    assert (report.unique_bytes, report.shared_bytes) == (changed, report.total_bytes - changed)
    assert client.stats().resident_bytes == base.unique_bytes + changed
    with client.attach("base") as old, client.attach("tuned") as new:
        differing = [key.name for key in old.tensors if old.buffer(key.name) != new.buffer(key.name)]
    assert len(differing) == 60


def test_a_truncated_file_leaves_nothing_behind(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    with smollm2().open("rb") as file:
        path.write_bytes(file.read(40_000_000))
    client = daemon.connect()
    with pytest.raises(
        weightd.FormatError, match=r"cut\.gguf: tensor '.*, past the file's end at 40000000 bytes; trunc"
    ):
        client.load(path)
    (device,) = client.stats().devices
    eventually(lambda: not client.stats().devices[0].in_flight_bytes, what="no byte is in flight")
    assert (device.used_bytes, client.checkpoints()) == (0, [])


@pytest.mark.backends(*EVERY)
def test_every_kind_of_memory(client: weightd.Client, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole(small(), [key("general.name", STRING, "small")]))
    info = client.load(path)
    assert info.total_bytes == sum(len(data) for _, _, data in small().values())
    with client.attach(path) as attachment:
        check(attachment, small())
        assert attachment.metadata() == {"general.name": "small"}
        kept = attachment.gguf_tensor("blk.0.attn_q.weight")
    assert kept.dequantize().any()  # it outlives its attachment


def test_the_format_goes_by_the_first_bytes(client: weightd.Client, tmp_path: Path) -> None:
    for name in ("blob", "m.safetensors"):
        (tmp_path / name).write_bytes(whole(small(name)))
        with client.attach(tmp_path / name) as attachment:
            check(attachment, small(name))
    checkpoints.write_random(tmp_path / "n.gguf", 1, 100)
    with client.attach(tmp_path / "n.gguf") as attachment:
        assert attachment.buffer("t0") == checkpoints.random_bytes((0, 0), 100)


def test_a_directory_with_one_file(client: weightd.Client, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(whole(small()))
    assert client.load(tmp_path).names == (str(tmp_path),)
    with client.attach(tmp_path) as attachment:
        check(attachment, small())
    (tmp_path / "n.gguf").write_bytes(whole(small(1)))
    with pytest.raises(weightd.InvalidReferenceError, match=r"several GGUF files \(m\.gguf, n\.gguf\)"):
        client.load(tmp_path)


def halves() -> list[Tensors]:
    items = list(small().items())
    return [{}, dict(items[:2]), dict(items[2:])]


def test_a_split_file_by_any_of_its_parts(client: weightd.Client, tmp_path: Path) -> None:
    paths = split(tmp_path / "m", "small", halves())
    info = client.load(paths[1])
    assert info.names == (str(paths[0]),)
    for reference in (*paths, tmp_path / "m"):
        with client.attach(reference) as attachment:
            check(attachment, small())
            metadata = attachment.metadata(file=paths[2].name)
        assert metadata is not None
        assert metadata["split.no"] == "2"
    assert len(client.checkpoints()) == 1
    assert [source.file for source in client.inspect(paths[2]).sources] == [path.name for path in paths]
    client.remove(paths[2])
    (checkpoint,) = client.checkpoints()
    assert checkpoint.names == (str(tmp_path / "m"),)
    paths[1].unlink()
    with pytest.raises(weightd.NotFoundError, match=r"small-00002-of-00003\.gguf: part 2 of 3 is missing"):
        client.load(paths[0])


def test_parts_that_do_not_belong_together(client: weightd.Client, tmp_path: Path) -> None:
    paths = split(tmp_path / "m", "small", halves())
    others = split(tmp_path / "n", "small", [*halves(), {"more": blocks(1, F32, (3,))}])
    shutil.copyfile(others[1], paths[1])
    with pytest.raises(weightd.FormatError, match=r"small-00002-of-00003\.gguf: is one of 4 parts with 7 tensors, but"):
        client.load(paths[0])
    shutil.copyfile(paths[2], paths[1])
    with pytest.raises(weightd.FormatError, match=r"small-00003-of-00003\.gguf: tensor .* is in another file too"):
        client.load(paths[0])
    alone = tmp_path / "alone.gguf"
    shutil.copyfile(paths[2], alone)
    with pytest.raises(weightd.FormatError, match=r"alone\.gguf: is one of 3 parts, but those given are 3; give all"):
        client.load(alone)
    assert client.checkpoints() == []


def test_commands(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole(small()))
    assert "6 tensors" in daemon.command("load", path).stdout
    assert daemon.command("ls", "-q").stdout == f"{path}\n"
    shown = daemon.command("inspect", path, "--tensors").stdout
    row = next(line.split() for line in shown.splitlines() if "attn_q" in line)
    assert row[:5] == ["blk.0.attn_q.weight", "-", "GGML_Q4_0", "6x64", "216"]
    assert daemon.command("verify", path).returncode == 0


@pytest.mark.parametrize("name", ["m.gguf", "M.GGUF"])
def test_functions_for_safetensors_files_refuse_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(whole(small()))
    for fallback in ("error", "local"):
        with pytest.raises(weightd.InvalidReferenceError, match="a GGUF file, and this function is for safetensors"):
            weightd.torch.load_file(tmp_path / name, fallback=fallback)
