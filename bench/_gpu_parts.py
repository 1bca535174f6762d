"""The measurements of bench/gpu.py, one function each. Sizes are bytes, times what the keys say."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from _daemon import Daemon, Spread, serving, write_checkpoint
from load import load_seconds

import weightd
from weightd._mapping import cuda_driver

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import workloads

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
DEVICE = "cuda:0"
GB = 10**9
MIB = 1 << 20
PROCESSES = (1, 2, 4, 8)
SEGMENTS = tuple(size * MIB for size in (64, 256, 1024, 2048))
TENSORS = 300
NAME = "checkpoint-of-bench-gpu"
WORKLOAD = "deepfloyd_if_I_II_f32"
"""Two pipelines of three components each, of which they share the text encoder: tests/data has its manifest."""
NO_TORCH = "torch.cuda does not run here"
_SECONDS = 300.0


class Setting(NamedTuple):
    """How large and how often."""

    folder: Path
    scale: float
    rounds: int
    torch: bool
    """Whether torch.cuda runs here; what needs it is left out where it does not."""

    def bytes(self, gigabytes: float) -> int:
        """A size, scaled."""
        return int(gigabytes * GB * self.scale)

    def checkpoint(self, gigabytes: float) -> Path:
        """A file of about that size, written when first asked for."""
        path = self.folder / f"{gigabytes:g}.safetensors"
        if not path.exists():
            write_checkpoint(path, self.bytes(gigabytes), TENSORS, int(gigabytes))
        return path


def used_bytes() -> int | None:
    """Device memory in use, by NVML; None where it does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(cuda_driver.uuid_of(0))
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except Exception:  # noqa: BLE001  # whatever the reason, it is not known
        return None


def worker(*arguments: object) -> Any:
    """Run a worker to its end; its answer."""
    command = [sys.executable, str(HERE / "_gpu_worker.py"), *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=_SECONDS)
    return json.loads(done.stdout)


@contextmanager
def workers() -> Iterator[list[subprocess.Popen[str]]]:
    """A list of workers to be filled; they are gone at the end of the block."""
    running: list[subprocess.Popen[str]] = []
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def start_worker(*arguments: object) -> subprocess.Popen[str]:
    """Start a worker that talks; `say` waits for it."""
    command = [sys.executable, str(HERE / "_gpu_worker.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def say(process: subprocess.Popen[str], line: str = "") -> str:
    """What a worker answers to a line, or says by itself. Errors: SystemExit (it ended)."""
    assert process.stdin is not None
    assert process.stdout is not None
    if line:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    answer = process.stdout.readline().strip()
    if not answer:
        raise SystemExit(f"a worker ended: {' '.join(map(str, process.args))}")
    return answer


@contextmanager
def daemon_on_gpu(setting: Setting, name: str, budget: int, *arguments: str, script: str = "") -> Iterator[Daemon]:
    """A daemon that serves the first GPU only; `script` stands for another program, with `arguments` before `serve`."""
    options = ("--device", DEVICE, "--budget", str(budget * 9 // 8 + 64 * MIB))
    path = HERE / script if script else None
    with serving(setting.folder, name, *options, script=path, before=arguments) as daemon:
        yield daemon


# -- parts -------------------------------------------------------------------------------------------------------------


def memory(setting: Setting) -> dict[str, Any]:
    """Device memory of 1 to 8 processes: contexts alone, attached to one checkpoint, and with private copies."""
    if not setting.torch:
        return {"skipped": NO_TORCH}
    path = setting.checkpoint(8)
    return _memory(setting, "memory", [path], path.stat().st_size)


def workload(setting: Setting) -> dict[str, Any]:
    """The same for two pipelines that share tensors, which processes serve in turns."""
    if not setting.torch:
        return {"skipped": NO_TORCH}
    folder = setting.folder / "workload"
    files = workloads.scaled(workloads.manifest(WORKLOAD), setting.scale)
    workloads.write_files(folder, files)
    sizes = {(row["content"], row["dtype"], tuple(row["shape"])): workloads.nbytes(row) for row in _rows(files)}
    found = _memory(setting, "workload", sorted(folder.iterdir()), sum(sizes.values()))
    return found | {"workload": WORKLOAD, "total": sum(map(workloads.nbytes, _rows(files)))}


def _rows(files: dict[str, list[workloads.Row]]) -> list[workloads.Row]:
    return [row for rows in files.values() for row in rows]


def _memory(setting: Setting, name: str, paths: list[Path], unique: int) -> dict[str, Any]:
    """Of 1 to 8 processes, the n-th with the n-th of `paths` and so on in turns. `unique` bytes are loaded of them."""
    before = used_bytes()
    if before is None:
        return {"skipped": "NVML does not answer"}
    total = cuda_driver.total_memory(0)
    checkpoints = [(f"{NAME}-{number}", _files(path)) for number, path in enumerate(paths)]
    sizes = [sum(file.stat().st_size for file in files) for _, files in checkpoints]
    found: dict[str, Any] = {"size": unique, "context": {}, "attached": {}, "private": {}}
    for kind in ("context", "private", "attached"):
        with ExitStack() as stack:
            socket = Path()
            if kind == "attached":
                socket, _ = stack.enter_context(daemon_on_gpu(setting, name, sum(sizes)))
                with weightd.connect(socket) as client:
                    start = time.perf_counter()
                    for path, (checkpoint, _) in zip(paths, checkpoints, strict=True):
                        client.load(path, name=checkpoint, device=DEVICE, pin=True)
                    found["load_seconds"] = time.perf_counter() - start
                found["loaded"] = (used_bytes() or 0) - before
            running = stack.enter_context(workers())
            for number in PROCESSES:
                needed = [sizes[n % len(sizes)] if kind == "private" else 0 for n in range(number)]
                if before + sum(needed) + number * GB > total:
                    found[kind][number] = None  # does not fit
                    continue
                served = [checkpoints[n % len(checkpoints)] for n in range(len(running), number)]
                fresh = [start_worker("hold", kind, socket, checkpoint, *files) for checkpoint, files in served]
                running.extend(fresh)
                for process in fresh:
                    say(process)
                found[kind][number] = (used_bytes() or 0) - before
    return found


def _files(path: Path) -> list[Path]:
    """A checkpoint's files."""
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


def attach(setting: Setting) -> dict[str, Any]:
    """How long attaching takes by the size of segments, and where the time goes; torch and its context are up."""
    if not setting.torch:
        return {"skipped": NO_TORCH}
    path = setting.checkpoint(16)
    found: dict[str, Any] = {"size": path.stat().st_size, "tensors": TENSORS, "segments": {}, "by_segment_size": {}}
    for size in SEGMENTS:
        daemon = daemon_on_gpu(setting, f"attach{size}", path.stat().st_size, str(size), script="_segments.py")
        with daemon as (socket, _):
            with weightd.connect(socket) as client:
                client.load(path, name=NAME, device=DEVICE, pin=True)
                found["segments"][size] = client.inspect(NAME).segments
            rounds = worker("attach", socket, NAME, setting.rounds * 4)
        steps = {step: [row[step] for row in rounds] for step in rounds[0]}
        found["by_segment_size"][size] = {step: Spread.of(times)._asdict() for step, times in steps.items()}
    return found


def load(setting: Setting) -> dict[str, Any]:
    """Loads from a warm page cache, beside safetensors and a copy from pinned memory, in turns."""
    path = setting.checkpoint(16)
    size = path.stat().st_size
    seconds: dict[str, list[float]] = {"load": [], "load_unhashed": []}
    with ExitStack() as stack:
        hashing = stack.enter_context(daemon_on_gpu(setting, "hashing", size))
        plain = stack.enter_context(daemon_on_gpu(setting, "plain", size, script="_unhashed.py"))
        steps = {
            "load": lambda: load_seconds(hashing, path),
            "load_unhashed": lambda: load_seconds(plain, path),
        }
        if setting.torch:
            running = stack.enter_context(workers())
            peer = start_worker("rates", path)
            running.append(peer)
            say(peer)
            steps |= {name: lambda name=name: float(say(peer, name)) for name in ("copy", "load_file")}
            seconds |= {"copy": [], "load_file": []}
        order = random.Random(0)
        for number in range(setting.rounds + 1):
            for name in order.sample(list(steps), len(steps)):
                value = steps[name]()
                if number:  # the first round warms up
                    seconds[name].append(value)
    return {
        "size": size,
        "gb_per_s": {name: Spread.of([size / GB / value for value in row])._asdict() for name, row in seconds.items()},
        "load_to_unhashed": _ratio(seconds["load"], seconds["load_unhashed"]),
        "seconds": seconds,
    } | ({"ratio_to_load_file": _ratio(seconds["load_file"], seconds["load"])} if setting.torch else {})


def compute(setting: Setting) -> dict[str, Any]:
    """A matrix product and a small model, on attached and on private weights."""
    if not setting.torch:
        return {"skipped": NO_TORCH}
    side = max(256, int(8192 * setting.scale**0.5) // 64 * 64)
    width = max(256, int(2048 * setting.scale**0.5) // 256 * 256)
    found: dict[str, Any] = {"side": side, "width": width}
    with daemon_on_gpu(setting, "compute", 8 * GB) as (socket, _):
        for name, extent in (("compute", side), ("model", width)):
            answer = worker(name, socket, setting.folder / f"{name}.safetensors", setting.rounds * 4, extent)
            if "ms" in answer:
                answer["ratio"] = _ratio(answer["ms"]["attached"], answer["ms"]["private"])
                answer["ms"] = {key: Spread.of(values)._asdict() for key, values in answer["ms"].items()}
            found["product" if name == "compute" else name] = answer
    return found


def _ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """Ratios of neighbours."""
    return Spread.of([a / b for a, b in zip(one, other, strict=True)])._asdict()


PARTS = {"memory": memory, "attach": attach, "load": load, "compute": compute, "workload": workload}
