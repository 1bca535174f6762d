"""`weightd plan --scan`: checkpoints below folders, by their bytes; what is skipped, kept, and said of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from safetensors import safe_open

from support import checkpoints
from support.command import run as run_weightd
from support.daemon import environment, eventually
from weightd.plan_report import PlanReport
from weightd.types import FileIdentity
from weightd_daemon import planning
from weightd_daemon.persistence.digest_index import FILE_NAME
from weightd_daemon.plans import near_duplicates, tensor_digests

MIB, TIB = 1 << 20, 1 << 40
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str | Path, cache: Path = Path("/nonexistent")) -> subprocess.CompletedProcess[str]:
    """Run `weightd plan` where nothing is kept but in `cache`."""
    variables = environment() | {"WEIGHTD_STATE_DIR": "/nonexistent", "XDG_CACHE_HOME": str(cache)}
    return run_weightd(["plan", *map(str, arguments)], variables, environment())


def scanned(*arguments: str | Path, cache: Path) -> dict[str, Any]:
    finished = run("--scan", *arguments, "--format", "json", cache=cache)
    assert (finished.returncode, finished.stderr) == (0, "")
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def u8(seed: object, size: int) -> tuple[str, tuple[int, ...], bytes]:
    return "U8", (size,), checkpoints.random_bytes(seed, size)


def holes(path: Path, count: int, size: int) -> Path:
    """A checkpoint of many equal tensors that takes long to read, and no room."""
    each = {f"t{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]} for i in range(count)}
    header = json.dumps(each).encode()
    path.parent.mkdir(parents=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + count * size)
    return path


def by_name(found: dict[str, Any]) -> dict[str, Any]:
    return {Path(one["name"]).name: one for one in found["checkpoints"]}


# -- what is found ---------------------------------------------------------------------------------------------------


def test_bytes_decide_and_what_cannot_be_read_is_skipped(tmp_path: Path) -> None:
    """Equal bytes under other names, dtypes and shapes are shared; equal names and shapes of other bytes are not."""
    models = tmp_path / "models"
    checkpoints.write(models / "a" / "model.safetensors", {"x": u8(1, MIB), "y": u8(2, MIB), "z": u8(3, 100)})
    checkpoints.write(
        models / "b" / "model.safetensors", {"other": ("F32", (MIB // 4,), u8(1, MIB)[2]), "y": u8(9, MIB)}
    )
    broken = checkpoints.write(models / "c" / "model.safetensors", {"x": u8(1, MIB)})
    os.truncate(broken, MIB)
    (models / "d").mkdir()
    (models / "d" / "model.safetensors").symlink_to(tmp_path / "gone")
    (models / "e").mkdir()
    (models / "e" / "pytorch_model.bin").write_bytes(b"pickle")
    (models / "a" / "loop").symlink_to(models)
    found = scanned(models, cache=tmp_path)
    assert list(by_name(found)) == ["a", "b"]
    assert (found["total_bytes"], found["saved_bytes"], found["at_most"]) == (4 * MIB + 100, MIB, False)
    assert found["read_bytes"] == 4 * MIB, "not what is alone in its length"
    reasons = {skip["path"].removeprefix(f"{models}/"): skip["reason"] for skip in found["skipped"]}
    assert list(reasons) == ["e/pytorch_model.bin", "a/loop", "c", "d"]
    assert "a pickle" in reasons["e/pytorch_model.bin"]
    assert reasons["a/loop"] == f"is the same folder as {models}"
    assert str(broken) in reasons["c"]
    assert "no such file" in reasons["d"]
    (difference,) = found["differences"]
    assert (difference["equal_tensors"], difference["differing_tensors"]) == (1, 1)
    assert [row["name"] for row in difference["differing"]] == ["y"]
    lines = run("--scan", models).stdout.splitlines()
    assert lines[-1] == "2 checkpoints, total 4.00 MiB, unique 3.00 MiB, saved 1.00 MiB (25.0 %)"
    assert any(line.startswith(f"skipped {models}/e/pytorch_model.bin: a pickle") for line in lines)


def test_a_file_that_two_checkpoints_have_is_read_once(tmp_path: Path) -> None:
    """As two revisions in the Hugging Face cache have it."""
    first = checkpoints.write_random(tmp_path / "m" / "a" / "model.safetensors", 2, MIB)
    (tmp_path / "m" / "b").mkdir()
    (tmp_path / "m" / "b" / "model.safetensors").symlink_to(first)
    (tmp_path / "m" / "c").mkdir()
    os.link(first, tmp_path / "m" / "c" / "model.safetensors")
    checkpoints.write_random(tmp_path / "m" / "d" / "model.safetensors", 2, MIB, seed=1)
    found = scanned(tmp_path / "m", cache=tmp_path)
    assert (len(found["checkpoints"]), found["saved_bytes"], found["read_bytes"]) == (4, 4 * MIB, 4 * MIB)


def test_headers_alone_are_said_to_be_at_most(tmp_path: Path) -> None:
    """And nothing else is read: of these files it would take hours."""
    models = tmp_path / "models"
    for name in "ab":
        holes(models / name / "model.safetensors", 4, TIB)
    found = scanned(models, "--headers", "--budget=6TiB", cache=tmp_path)
    assert (found["at_most"], found["saved_bytes"], found["read_bytes"]) == (True, 4 * TIB, 0)
    assert (found["differences"], found["near_duplicates"]) == ([], None)
    assert [step["fits"] for step in found["budget"]["order"]] == [True, True]
    printed = run("--scan", models, "--headers", "--budget=6TiB").stdout
    assert "SHARED AT MOST" in printed
    assert "unique at least 4.00 TiB, saved at most 4.00 TiB (50.0 %)" in printed
    assert "at most 2 of 2 checkpoints fit 6.00 TiB" in printed


def test_wrong_usage(tmp_path: Path) -> None:
    for arguments, code, message in (
        (["--scan", tmp_path / "missing"], 3, "no such file or directory"),
        (["--scan", tmp_path, "--budget", "much"], 2, "'much' is not a size such as 12GiB"),
        (["--scan", tmp_path, "--variant", "fp16"], 2, "name the references of a variant"),
        (["--scan", tmp_path, "--html", tmp_path], 2, "cannot be written"),
        (["--scan", tmp_path, "--html", tmp_path / "no" / "r.html"], 2, "cannot be written"),
    ):
        finished = run(*arguments)
        assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (code, "", 1), finished.stderr
        assert message in finished.stderr
    assert run("--scan", tmp_path).stdout.endswith("0 checkpoints, total 0 B, unique 0 B, saved 0 B (0.0 %)\n")


def test_the_page_is_one_file(tmp_path: Path) -> None:
    for name in "ab":
        checkpoints.write_random(tmp_path / "m" / name / "model.safetensors", 2, MIB, shared={0: "common"}, seed=name)
    finished = run("--scan", tmp_path / "m", "--html", tmp_path / "r.html", "--budget", "3MiB", "--quiet")
    assert finished.returncode == 0
    page = (tmp_path / "r.html").read_text()
    assert str(tmp_path / "m" / "a") in page
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'> ]+)|url\(([^)]*)\)|@import""", page)
    assert [link for link in loaded if not link[0].startswith(("#", "data:"))] == []


# -- what is kept ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two checkpoints of 4 MiB that share 3, whose files have rested."""
    folder = tmp_path_factory.mktemp("rested")
    shared = {i: ("common", i) for i in range(3)}
    files = [checkpoints.write_random(folder / f"{n}.safetensors", 4, MIB, seed=n, shared=shared) for n in "ab"]
    checkpoints.rest(*files)
    return folder


def test_what_was_hashed_is_not_read_again(rested: Path, tmp_path: Path) -> None:
    first = scanned(rested, cache=tmp_path)
    assert (first["saved_bytes"], first["read_bytes"]) == (3 * MIB, 8 * MIB)
    assert FILE_NAME in os.listdir(tmp_path / "weightd" / "plan")
    assert scanned(rested, cache=tmp_path) == first | {"read_bytes": 0}
    assert scanned(rested, "--cache-dir", tmp_path / "other", cache=tmp_path)["read_bytes"] == 8 * MIB
    (tmp_path / "weightd" / "plan" / FILE_NAME).write_bytes(b"this is not a database" * 1000)
    assert scanned(rested, cache=tmp_path) == first


def test_what_is_not_kept_is_said(rested: Path, tmp_path: Path) -> None:
    (tmp_path / "weightd").write_text("no folder")
    finished = run("--scan", rested, cache=tmp_path)
    assert finished.returncode == 0
    assert re.fullmatch(r"weightd: .*/plan/digests-v1.sqlite3: .*; what was hashed is not kept\n", finished.stderr)


class StoppedError(Exception):
    """In place of a process that is killed."""


def test_a_plan_that_was_stopped_goes_on(rested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_digests, "_KEEP_SECONDS", 0)
    question = planning.Question([str(rested)], scan=True, kept=tmp_path)

    def stop(what: str, done: int, total: int) -> None:
        if done > 6 * MIB:
            raise StoppedError

    with pytest.raises(StoppedError):
        planning.plan(question, advance=stop)
    found = planning.plan(question)
    assert (found.saved_bytes, found.read_bytes) == (3 * MIB, 2 * MIB)


def test_ctrl_c_keeps_what_was_hashed(tmp_path: Path) -> None:
    models, kept = tmp_path / "models", tmp_path / "kept"
    checkpoints.rest(holes(models / "a" / "model.safetensors", 4096, 256 * MIB))
    command = subprocess.Popen(
        [sys.executable, "-m", "weightd", "plan", "--scan", models, "--cache-dir", kept],
        env=environment(), stderr=subprocess.PIPE, start_new_session=True, text=True,
    )  # fmt: skip
    with stopping(command):
        eventually(lambda: kept_digests(kept), what="digests that are kept")
        os.killpg(command.pid, signal.SIGINT)
        assert command.communicate(timeout=60)[1] == "weightd: interrupted\n"
        assert command.returncode == 130
    before = kept_digests(kept)

    def stop(what: str, done: int, total: int) -> None:
        assert total == 4096 * 256 * MIB - before
        raise StoppedError

    with pytest.raises(StoppedError):
        planning.plan(planning.Question([str(models)], scan=True, kept=kept), advance=stop)


def kept_digests(folder: Path) -> int:
    """Bytes whose digests are kept of the one file below `models`."""
    file = folder.parent / "models" / "a" / "model.safetensors"
    status = file.stat()
    kept = tensor_digests.KeptDigests(folder)
    identity = FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    try:
        return sum(length for _, length in kept.get([identity])[identity])
    finally:
        kept.close()


@contextlib.contextmanager
def stopping(command: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        command.kill()
        command.communicate(timeout=60)


def test_a_file_that_changes_while_it_is_hashed_is_skipped(tmp_path: Path) -> None:
    for name in "abc":
        checkpoints.write_random(tmp_path / f"{name}.safetensors", 2, MIB)

    def change(what: str, done: int, total: int) -> None:
        if done == MIB:
            os.truncate(tmp_path / "a.safetensors", MIB)

    found: PlanReport = planning.plan(planning.Question([str(tmp_path)], scan=True), advance=change)
    assert [Path(one.name).name for one in found.checkpoints] == ["b.safetensors", "c.safetensors"]
    assert found.saved_bytes == 2 * MIB
    (skipped,) = found.skipped
    assert (skipped.path, "while it was read" in skipped.reason) == (str(tmp_path / "a.safetensors"), True)


# -- near duplicates -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Really trained: a base, its merged adapter, its full fine-tune, and a pipeline with it."""
    folder = tmp_path_factory.mktemp("family")
    script = ROOT / "examples" / "model_family.py"
    subprocess.run([sys.executable, script, folder, "--steps", "2"], check=True, timeout=300, stdout=subprocess.DEVNULL)
    return folder


def bits(path: Path) -> np.ndarray:
    """All elements of a checkpoint in bfloat16, as numbers of 16 bits."""
    with safe_open(path / "model.safetensors", "pt") as file:
        return np.concatenate(
            [file.get_tensor(name).flatten().view(torch.int16).numpy() for name in sorted(file.keys())]
        )


def whole(first: Path, second: Path) -> tuple[float, float]:
    """Equal elements, and the size of a lossless difference of all bytes: XOR, byte planes, zstd-1, by the MiB."""
    a, b = bits(first), bits(second)
    difference = (a ^ b).view(np.uint8)
    frames = [difference[at : at + MIB].reshape(-1, 2).T.tobytes() for at in range(0, len(difference), MIB)]
    return float((a == b).mean()), sum(map(len, map(zstandard.ZstdCompressor(level=1).compress, frames))) / a.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [near_duplicates.SAMPLED_BYTES, 4 * MIB])
def test_a_real_fine_tune_is_a_near_duplicate(family: Path, monkeypatch: pytest.MonkeyPatch, sampled: int) -> None:
    estimate = near_duplicates.estimate
    monkeypatch.setattr(near_duplicates, "estimate", lambda *arguments: estimate(*arguments, sampled))
    found = planning.plan(planning.Question([str(family)], scan=True))
    near = {(Path(one.a).name, Path(one.b).name): one for one in found.near_duplicates or ()}
    assert list(near) == [("adapter-merged", "base"), ("adapter-merged", "fine-tune"), ("base", "fine-tune")]
    for (first, second), one in near.items():
        equal, ratio = whole(family / first, family / second)
        assert 0 < one.sampled_bytes <= sampled
        assert one.equal_elements == pytest.approx(equal, abs=0.02)
        assert one.delta_ratio == pytest.approx(ratio, abs=0.02)
    shared = {pair.checkpoints: pair.shared_bytes for pair in found.pairs}
    sizes = {Path(one.name).name: one for one in found.checkpoints}
    assert sizes["fine-tune"].shared_bytes < 0.01 * sizes["fine-tune"].total_bytes, "and shares next to nothing"
    assert shared[str(family / "base"), str(family / "pipeline")] == sizes["base"].total_bytes
    (merged,) = (
        one for one in found.differences if one.checkpoints == (str(family / "adapter-merged"), str(family / "base"))
    )
    assert [(row.name, row.count) for row in merged.differing] == [
        ("layers.*.q_proj.weight", 4), ("layers.*.v_proj.weight", 4),
    ]  # fmt: skip


@pytest.mark.slow
def test_tables_say_that_it_is_not_saved(family: Path, tmp_path: Path) -> None:
    printed = run("--scan", family, "--budget", "20MiB", cache=tmp_path).stdout
    assert "EQUAL ELEMENTS" in printed
    assert "weightd does not save this today." in printed
    assert re.search(r"^ +4 +\S+/fine-tune .* no +\S+/pipeline, \S+/adapter-merged$", printed, re.MULTILINE)
