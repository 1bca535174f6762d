"""`weightd plan`: what it says, and that it is what a daemon would say after loading. Only some tests have a daemon."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from support import checkpoints, gguf_files, workloads
from support.command import run as run_weightd
from support.daemon import Daemon, environment, eventually
from weightd.errors import FormatError
from weightd.plan_report import PlanReport
from weightd_daemon import planning
from weightd_daemon.loader.source import LoaderSource
from weightd_daemon.persistence.digest_index import FILE_NAME

KIB = 1 << 10
MIB = 1 << 20
COMMAND = [sys.executable, "-m", "weightd", "plan"]
KEYS = [field.name for field in fields(PlanReport)]
README = Path(__file__).resolve().parents[2] / "README.md"
DEEPFLOYD = workloads.DATA / "deepfloyd_if_I_II_f32.json.gz"


def run(*arguments: str | Path, state: Path = Path("/nonexistent"), **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command where no daemon is, and no index but the one in `state`."""
    variables = environment() | {"WEIGHTD_STATE_DIR": str(state)}
    if not options:
        return run_weightd(["plan", *map(str, arguments)], variables, environment())
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=variables, text=True, timeout=60, check=False,
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
    )  # fmt: skip


def planned(*arguments: str | Path, state: Path = Path("/nonexistent")) -> dict[str, Any]:
    finished = run(*arguments, "--format", "json", state=state)
    assert (finished.returncode, finished.stderr) == (0, "")
    found: dict[str, Any] = json.loads(finished.stdout)
    assert list(found) == KEYS
    return found


def failure(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    finished = run(*arguments)
    assert finished.stdout == ""
    assert finished.stderr.startswith("weightd: ")
    assert finished.stderr.count("\n") == 1
    return finished.returncode, finished.stderr


def u8(seed: object, size: int) -> tuple[str, tuple[int, ...], bytes]:
    return "U8", (size,), checkpoints.random_bytes(seed, size)


def sparse(path: Path, size: int) -> Path:
    """A checkpoint of one tensor that takes long to read, and no room."""
    header = json.dumps({"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)
    return path


# -- figures ---------------------------------------------------------------------------------------------------------


def test_the_founding_figure() -> None:
    found = planned("--manifest", DEEPFLOYD)
    assert (found["total_bytes"], found["saved_bytes"], found["read_bytes"]) == (62_499_470_688, 20_265_128_984, 0)
    (pair,) = found["pairs"]
    assert pair["checkpoints"] == ["IF-I-XL-v1.0", "IF-II-L-v1.0"]
    assert [part["components"] for part in pair["parts"]] == [
        ["text_encoder", "text_encoder"],
        ["safety_checker", "safety_checker"],
        ["watermarker", "watermarker"],
    ]
    printed = run("--manifest", DEEPFLOYD).stdout
    assert printed in README.read_text()
    last = printed.splitlines()[-1]
    assert last == "2 checkpoints, total 58.2 GiB, unique 39.3 GiB, saved 18.9 GiB (32.4 %)"
    assert run("--manifest", DEEPFLOYD, "-q").stdout == f"{last}\n"


def test_one_changed_value_among_300_tensors_is_found(tmp_path: Path) -> None:
    tensors = {f"t{i}": u8(i, 1000 + i % 3) for i in range(300)}
    base = checkpoints.write(tmp_path / "base.safetensors", tensors)
    dtype, shape, data = tensors["t123"]
    tensors["t123"] = dtype, shape, data[:-1] + bytes([data[-1] ^ 1])
    tuned = checkpoints.write(tmp_path / "tuned.safetensors", tensors)
    found = planned(base, tuned)
    assert [checkpoint["name"] for checkpoint in found["checkpoints"]] == [str(base), str(tuned)]
    assert [checkpoint["exclusive_bytes"] for checkpoint in found["checkpoints"]] == [len(data)] * 2
    assert found["unique_bytes"] == found["total_bytes"] // 2 + len(data)
    assert found["pairs"] == [
        {
            "checkpoints": [str(base), str(tuned)],
            "shared_bytes": found["saved_bytes"],
            "parts": [{"components": ["", ""], "shared_bytes": found["saved_bytes"]}],
        }
    ]
    assert found["read_bytes"] == found["total_bytes"]


def test_what_can_equal_nothing_is_not_read(tmp_path: Path) -> None:
    a = checkpoints.write(tmp_path / "a.safetensors", {"x": u8(1, 1000), "y": u8(2, 3000), "z": u8(3, 0)})
    b = checkpoints.write(tmp_path / "b.safetensors", {"x": u8(1, 1000), "y": u8(2, 2000), "z": u8(3, 0)})
    found = planned(a, b)
    assert (found["total_bytes"], found["saved_bytes"], found["read_bytes"]) == (7000, 1000, 2000)
    assert planned(a)["read_bytes"] == 0


def test_a_reference_counts_once_and_a_copy_counts_twice(tmp_path: Path) -> None:
    a = checkpoints.write_random(tmp_path / "a.safetensors", 2, MIB)
    b = checkpoints.write_random(tmp_path / "b.safetensors", 2, MIB)
    assert len(planned(a, a, a.parent / "." / a.name)["checkpoints"]) == 1
    assert planned(a, b)["saved_ratio"] == 0.5


def test_a_file_that_two_checkpoints_have_is_shared_without_being_read(tmp_path: Path) -> None:
    file = checkpoints.write(tmp_path / "file.safetensors", {"x": u8(1, MIB), "y": u8(2, 3000)})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").symlink_to(file)
    found = planned(tmp_path / "a", tmp_path / "b")
    assert (found["total_bytes"], found["unique_bytes"], found["read_bytes"]) == (2 * (MIB + 3000), MIB + 3000, 0)
    (difference,) = found["differences"]
    assert (difference["equal_tensors"], difference["differing_tensors"]) == (2, 0)


def test_manifests_and_files_together(tmp_path: Path) -> None:
    row = {"name": "w", "dtype": "F16", "shape": [512], "content": "x"}
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    first.write_text(json.dumps({"one/model.safetensors": [row]}))
    second.write_text(json.dumps({"two/unet/m.safetensors": [row, row | {"name": "v", "shape": [2, 256]}]}))
    file = checkpoints.write_random(tmp_path / "a.safetensors", 1, KIB)
    found = planned(file, "--manifest", first, "--manifest", second)
    assert [checkpoint["name"] for checkpoint in found["checkpoints"]] == [str(file), "one", "two"]
    assert (found["total_bytes"], found["saved_bytes"], found["read_bytes"]) == (4 * KIB, KIB, 0)
    assert found["pairs"][0]["parts"] == [{"components": ["", "unet"], "shared_bytes": KIB}]


def pipelines(folder: Path) -> list[Path]:
    """Three pipelines that share between them and within, in big and small, under equal and other names."""
    ones = "U8", (1000,), b"\1" * 1000  # small: held once for each name
    large = u8("large", 100 * KIB)
    contents: dict[str, dict[str, dict[str, Any]]] = {
        "a": {
            "encoder": {"w": u8("w", MIB), "norm": ones, "other.norm": ones, "none": u8(0, 0)},
            "unet": {"w": large, "again": large, "x": u8("x", 5000)},
        },
        "b": {
            "encoder": {"w": u8("w", MIB), "norm": ones, "q": u8("q", 5000)},
            "unet": {"w": large, "again": large, "norm": ones, "norm.2": ones, "norm.3": ones},
            "vae": {"w": u8("vae", 70 * KIB), "scalar": ("F32", (), b"\0\0\0\0")},
        },
        "c": {"text": {"v": u8("w", MIB), "y": u8("y", 5000)}, "unet": {"w": u8("other", 100 * KIB), "z": large}},
    }
    for name, components in contents.items():
        for component, tensors in components.items():
            checkpoints.write(folder / name / component / "model.safetensors", tensors)
        checkpoints.describe_pipeline(folder / name)
    return [folder / name for name in contents]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_daemon_says_the_same_after_loading(daemon: Daemon, tmp_path: Path, backwards: bool) -> None:
    paths = pipelines(tmp_path)[:: -1 if backwards else 1]
    found = planned(*paths)
    client = daemon.connect()
    for path in paths:
        client.load(path)
    stats = client.stats()
    assert stats.digest_collisions == 0
    expected = (stats.logical_bytes, stats.resident_bytes, stats.saved_bytes, stats.saved_ratio)
    assert tuple(found[key] for key in KEYS[:4]) == expected
    assert found["saved_bytes"] > 0
    for checkpoint in found["checkpoints"]:
        details = client.inspect(checkpoint["name"])
        info = details.checkpoint
        assert {key: checkpoint[key] for key in ("tensors", "total_bytes", "exclusive_bytes", "shared_bytes")} == {
            "tensors": info.tensors,
            "total_bytes": info.total_bytes,
            "exclusive_bytes": info.exclusive_bytes,
            "shared_bytes": info.shared_bytes,
        }
        assert [(part["name"], part["tensors"], part["total_bytes"]) for part in checkpoint["components"]] == [
            (part.name, part.tensors, part.total_bytes) for part in details.components
        ]
        # Of equal small tensors in several components, which ones are the shared ones is the daemon's to choose.
        shared = sum(part.shared_bytes for part in details.components)
        assert sum(part["shared_bytes"] for part in checkpoint["components"]) == shared


def test_gguf_files_are_read_as_a_load_reads_them(daemon: Daemon, tmp_path: Path) -> None:
    """Two quantisations of one model have some tensors in common; a split one is one checkpoint."""
    norm, blocks = bytes(range(256)) * 4 * 72, bytes(range(18)) * 4096
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(gguf_files.whole({"norm": (0, (73728,), norm * 4), "q": (2, (32, 4096), blocks)}))
    parts = [{"norm": (0, (73728,), norm * 4)}, {"q": (2, (32, 4096), blocks[::-1])}]
    first, _ = gguf_files.split(tmp_path, "split", parts)
    found = planned(whole, first)
    client = daemon.connect()
    for path in (whole, first):
        client.load(path)
    stats = client.stats()
    assert tuple(found[key] for key in KEYS[:3]) == (stats.logical_bytes, stats.resident_bytes, stats.saved_bytes)
    assert found["saved_bytes"] == len(norm) * 4
    assert len(found["checkpoints"]) == 2


def test_tables(tmp_path: Path) -> None:
    a, b, c = pipelines(tmp_path)
    lines = run(a, b, c).stdout.splitlines()
    tables = [[line.split() for line in table.splitlines()] for table in "\n".join(lines).split("\n\n")]
    assert len(tables) == 8
    assert tables[0][0] == ["CHECKPOINT", "TENSORS", "SIZE", "SHARED", "WITH"]
    assert tables[0][1] == [str(a), "7", "1.20", "MiB", "1.20", "MiB", "2", "others"]
    assert tables[1][0] == ["COMPONENT", "OF", "TENSORS", "SIZE", "SHARED"]
    assert [row[:2] for row in tables[1][1:4]] == [["encoder", str(a)], ["unet", str(a)], ["encoder", str(b)]]
    assert tables[2][0] == ["#", "HAS", "IN", "COMMON", "WITH", "1", "2", "3"]
    assert [row[1:] for row in tables[2][1:]] == [
        [str(a), "-", "91%", "91%"], [str(b), "86%", "-", "86%"], [str(c), "91%", "91%", "-"],
    ]  # fmt: skip
    assert [row[2:4] for row in tables[3][1:]] == [[str(a), str(b)], [str(a), str(c)], [str(b), str(c)]]
    assert any("encoder = text 1.00 MiB, unet 100 KiB" in line for line in lines)
    assert [row[:3] for row, *_ in tables[4:7]] == [
        [str(a), "and", f"{b}:"], [str(a), "and", f"{c}:"], [str(b), "and", f"{c}:"],
    ]  # fmt: skip
    assert tables[7][0][:2] == ["3", "checkpoints,"]
    plain = run(checkpoints.write_random(tmp_path / "m.safetensors", 1, KIB)).stdout
    assert plain.splitlines()[2:] == ["", "1 checkpoint, total 1.00 KiB, unique 1.00 KiB, saved 0 B (0.0 %)"]


# -- the digest index ------------------------------------------------------------------------------------------------


@pytest.fixture
def rested(tmp_path: Path) -> list[Path]:
    """Two rested checkpoints of 4 MiB that share 3; skips where files are never trusted."""
    shared = {i: ("common", i) for i in range(3)}
    paths = [checkpoints.write_random(tmp_path / f"{n}.safetensors", 4, MIB, seed=n, shared=shared) for n in "ab"]
    checkpoints.rest(*paths)
    with paths[0].open("rb") as file:
        if not LoaderSource("probe", file.fileno()).trusted:
            pytest.skip(f"{tmp_path} is on a filesystem that is never trusted; set --basetemp to one that is")
    return paths


def test_what_the_index_knows_is_not_read(daemon: Daemon, rested: list[Path]) -> None:
    state = daemon.folder / "state"
    a, b = rested
    unread = planned(a, b)
    assert unread["read_bytes"] == 8 * MIB
    client = daemon.connect()
    client.load(a)
    found = planned(a, b, state=state)
    assert found == unread | {"read_bytes": 4 * MIB}
    client.load(b)
    assert planned(a, b, state=state) == unread | {"read_bytes": 0}  # while the daemon has it open
    daemon.stop()
    listed = sorted(os.listdir(state))
    assert planned(a, b, state=state)["read_bytes"] == 0
    assert planned(a, b, "--state-dir", state)["read_bytes"] == 0
    assert sorted(os.listdir(state)) == listed
    os.utime(b, (1, 1))  # no longer the file that it knows
    assert planned(a, b, state=state)["read_bytes"] == 4 * MIB
    (state / FILE_NAME).write_bytes(b"this is not a database " * 1000)
    assert planned(a, b, state=state) == unread
    assert sorted(os.listdir(state)) == listed  # left as it is
    daemon.start()


def test_settings_that_cannot_be_cost_only_reading(tmp_path: Path) -> None:
    (tmp_path / "weightd").mkdir()
    (tmp_path / "weightd" / "weightd.toml").write_text("no such setting")
    file = checkpoints.write_random(tmp_path / "m.safetensors", 2, KIB)
    finished = subprocess.run(
        [*COMMAND, file], env=environment() | {"XDG_CONFIG_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (finished.returncode, finished.stderr) == (0, "")


# -- errors ----------------------------------------------------------------------------------------------------------


def test_exit_codes(tmp_path: Path) -> None:
    good = checkpoints.write_random(tmp_path / "good.safetensors", 2, KIB)
    assert failure()[0] == 2
    assert failure(good, tmp_path / "missing.safetensors")[0] == 3
    code, line = failure("--manifest", tmp_path / "missing.json")
    assert (code, "missing.json" in line) == (3, True)
    (tmp_path / "m.pt").write_bytes(b"pickle")
    assert failure(good, tmp_path / "m.pt")[0] == 2
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(good.read_bytes()[:-1])
    code, line = failure(good, bad)
    assert (code, str(bad) in line) == (1, True)
    code, line = failure("--manifest", good)
    assert (code, "workload manifest" in line) == (1, True)
    code, line = failure("--manifest", tmp_path)
    assert (code, "workload manifest" in line) == (2, True)
    code, line = failure("--manifest", DEEPFLOYD, "--manifest", DEEPFLOYD)
    assert (code, "'IF-I-XL-v1.0' is planned already" in line) == (2, True)


def test_a_name_in_two_files_of_a_component_is_refused_as_by_a_load(tmp_path: Path) -> None:
    for name in ("m-1-of-2", "m-2-of-2"):
        checkpoints.write_random(tmp_path / "pipe" / "unet" / f"{name}.safetensors", 1, KIB)
    checkpoints.describe_pipeline(tmp_path / "pipe")
    code, line = failure(tmp_path / "pipe")
    path = tmp_path / "pipe" / "unet" / "m-2-of-2.safetensors"
    assert code == 1
    assert line.startswith(f"weightd: {path}: tensor 't0' is in another file of component 'unet' too")
    assert failure(path.parent)[1].startswith(f"weightd: {path}: tensor 't0' is in another file too")


def test_an_index_decides_as_in_a_load(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    checkpoints.write(folder / "overlay.safetensors", {"t": u8("new", MIB)})
    checkpoints.write(folder / "shard.safetensors", {"t": u8("stale", MIB), "own": u8("own", KIB)})
    checkpoints.index(folder, {"t": "overlay.safetensors", "own": "shard.safetensors"})
    other = checkpoints.write(tmp_path / "other.safetensors", {"x": u8("stale", MIB), "y": u8("new", MIB)})
    found = planned(folder, other)
    assert (found["total_bytes"], found["saved_bytes"], found["read_bytes"]) == (3 * MIB + KIB, MIB, 3 * MIB)
    assert [checkpoint["tensors"] for checkpoint in found["checkpoints"]] == [2, 2]
    checkpoints.index(folder, {"own": "shard.safetensors", "else": "overlay.safetensors"})
    code, line = failure(folder)
    assert (code, "tensor 't' is in another file too, and the index does not say whose counts" in line) == (1, True)


def test_variants_are_planned_and_said(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "m/model.fp16.safetensors", {"t": u8("half", KIB)})
    taken = f"weightd: {tmp_path}/m: has weights of the variant fp16 only, which are taken\n"
    assert run(tmp_path / "m").stderr == taken
    checkpoints.write(tmp_path / "m/model.safetensors", {"t": u8("whole", 2 * KIB)})
    (checkpoint,) = planned(tmp_path / "m", "--variant", "fp16")["checkpoints"]
    assert (checkpoint["name"], checkpoint["total_bytes"]) == (f"fp16:{tmp_path}/m", KIB)
    assert planned(tmp_path / "m")["total_bytes"] == 2 * KIB


def test_a_folder_of_models_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        checkpoints.write(tmp_path / "models" / name / "model.safetensors", {"t": u8(name, KIB)})
    code, line = failure(tmp_path / "models")
    assert code == 2
    advice = f"as {tmp_path}/models/a {tmp_path}/models/b; --scan plans every checkpoint below a folder"
    assert f"2 checkpoints lie below it; give those that you mean, {advice}" in line


def test_too_many_checkpoints_are_refused(tmp_path: Path) -> None:
    manifest = tmp_path / "many.json"
    manifest.write_text(json.dumps({f"c{i}": [] for i in range(planning.MOST_CHECKPOINTS)}))
    assert len(planned("--manifest", manifest)["checkpoints"]) == planning.MOST_CHECKPOINTS
    code, line = failure("--manifest", manifest, checkpoints.write_random(tmp_path / "m.safetensors", 1, KIB))
    assert (code, "plan fewer at a time" in line) == (2, True)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(("change", "fault"), [(overwrite, "changed while"), (shrink, "shrank while|changed while")])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, change: Any, fault: str) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 4, 2 * MIB)
    os.utime(path, (1, 1))
    told: list[tuple[int, int]] = []

    def advance(_: str, done: int, total: int) -> None:
        if not told:
            change(path)
        told.append((done, total))

    with pytest.raises(FormatError, match=fault):
        planning.plan(planning.Question([str(path)], threads=2), advance=advance)
    assert told[0] == (MIB, 8 * MIB)


def test_without_the_daemon_installed(tmp_path: Path) -> None:
    hidden = "import importlib.util as u, sys; u.find_spec = lambda name: None; from weightd.cli import main; "
    finished = subprocess.run(
        [sys.executable, "-c", f"{hidden} sys.exit(main(['plan', 'x']))"],
        env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    expected = "weightd: plan needs the daemon, which is not installed: pip install '.[daemon]' in weightd's checkout\n"
    assert (finished.returncode, finished.stderr) == (1, expected)


# -- the process that reads ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(tmp_path: Path, **options: Any) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command in the middle of reading far too much, and the process that reads for it."""
    paths = [sparse(tmp_path / f"{name}.safetensors", 1 << 40) for name in "ab"]
    command = subprocess.Popen(
        [*COMMAND, *map(str, paths)], env=environment(), text=True, start_new_session=True,
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
    )  # fmt: skip
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
    child = 0
    try:
        eventually(lambda: children.read_text(), what="a process that reads")
        child = int(children.read_text())
        eventually(lambda: bytes_read(child) > 20 * MIB, what="it to be reading")
        yield command, child
        eventually(lambda: not Path(f"/proc/{child}").exists(), what="the end of the process that reads")
    finally:
        command.kill()
        command.communicate(timeout=60)
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def bytes_read(pid: int) -> int:
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def test_ctrl_c_ends_both(tmp_path: Path) -> None:
    with reading(tmp_path) as (command, child):
        assert os.getpgid(child) != command.pid  # so a terminal does not interrupt it too, and it has nothing to say
        os.killpg(command.pid, signal.SIGINT)
        output, error = command.communicate(timeout=60)
        assert (command.returncode, output, error) == (130, "", "weightd: interrupted\n")


def test_the_process_that_reads_does_not_outlive_the_command(tmp_path: Path) -> None:
    with reading(tmp_path) as (command, child):
        os.kill(child, signal.SIGSTOP)  # else it would notice that nobody reads what it says
        command.kill()


def test_the_end_of_the_process_that_reads_is_an_error(tmp_path: Path) -> None:
    with reading(tmp_path) as (command, child):
        os.kill(child, signal.SIGKILL)
        output, error = command.communicate(timeout=60)
        assert (command.returncode, output, error.count("\n")) == (1, "", 1)
        assert "ended without an answer" in error


def test_progress_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    seen = b""
    with contextlib.closing(os.fdopen(ours, "rb", buffering=0)) as terminal:
        with reading(tmp_path, stderr=theirs) as (command, _):
            os.close(theirs)
            while b"hashing" not in seen:
                seen += terminal.read(4096)
            command.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
                while more := terminal.read(4096):
                    seen += more
        assert b"weightd: interrupted" in seen
        assert b"Traceback" not in seen


def test_output_that_nobody_reads(tmp_path: Path) -> None:
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    try:
        finished = run("--manifest", DEEPFLOYD, "--format", "json", stdout=writing_end)
    finally:
        os.close(writing_end)
    assert (finished.returncode, finished.stderr) == (141, "")
