"""What weightd saves, on real weights: `make demo`, or `python examples/demo.py [--format json]`.

Starts a daemon, loads MiniLM (91 MB) and a fine-tune of it that is made here, and has four processes, two for each,
work on the weights the daemon holds. Then the same four processes work with private copies. Exit code 0 means that
every byte and every embedding came out equal, and that nothing was left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from _minilm import SENTENCES, TUNED_LAYERS, package_folder
from rich.console import Console
from rich.table import Table

import weightd

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
PATIENCE = 90.0
END_SECONDS = 30.0
MB = 1_000_000


class DemoError(Exception):
    """Something did not work; the message says what."""


class Processes:
    """Every process that the demo starts; all of them are gone when the `with` block ends, however it ends."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._running: list[subprocess.Popen[str]] = []
        self.seen: set[int] = set()
        """Every process that was started, and what those had started when they were told to end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the cleaning up short
        self.stop(list(self._running))

    def start(self, *arguments: object, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start Python with `arguments`, afresh, with pipes to talk through."""
        with self._log.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends the others in order
            )  # fmt: skip
        self._running.append(process)
        self.seen.add(process.pid)
        return process

    def read_line(self, process: subprocess.Popen[str]) -> str:
        """The process's next line. Errors: DemoError (it ended, or takes too long)."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
        line = process.stdout.readline() if ready else ""
        if not line:
            why = "does not answer" if not ready else "ended early"
            said = self._log.read_text().strip().splitlines()[-15:]
            raise DemoError(f"process {process.args[1]} (pid {process.pid}) {why}; it said:\n" + "\n".join(said))
        return line

    def ask(self, process: subprocess.Popen[str], question: str = "") -> dict[str, Any]:
        """Ask a worker, and return its answer; without a question, return what it says by itself."""
        assert process.stdin is not None
        if question:
            process.stdin.write(question + "\n")
        answer: dict[str, Any] = json.loads(self.read_line(process))
        return answer

    def stop(self, processes: list[subprocess.Popen[str]]) -> None:
        """End processes and wait until they are gone."""
        for process in processes:
            if process.poll() is None:
                self.seen.update(descendants(process.pid))
                process.terminate()
        for process in processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            self._running.remove(process)

    def left_running(self) -> list[int]:
        """Those of all processes seen that still run; those that the kernel ends have some seconds for it."""
        end = time.monotonic() + END_SECONDS
        while (left := [pid for pid in self.seen if _runs(pid)]) and time.monotonic() < end:
            time.sleep(0.05)
        return left


@contextmanager
def stage() -> Iterator[Path]:
    """A temporary folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="weightd-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have started."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [each for child in children for each in descendants(child)]


def pss(pid: int) -> int:
    """PSS of a process, in bytes: a page that n processes share counts as one n-th of it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended; whoever adopted it has not looked yet


def run_workers(
    processes: Processes, kind: str, checkpoints: dict[str, Path], environment: dict[str, str]
) -> list[dict[str, Any]]:
    """Two fresh processes for each checkpoint. All live until all have said how much memory they take."""
    jobs = [(name, folder) for name, folder in checkpoints.items() for _ in range(2)]
    workers = [
        processes.start(HERE / "_worker.py", kind, folder, name, environment=environment) for name, folder in jobs
    ]
    reports = [{"checkpoint": name, **processes.ask(worker)} for (name, _), worker in zip(jobs, workers, strict=True)]
    for question in ("memory", "check"):
        for report, worker in zip(reports, workers, strict=True):
            report.update(processes.ask(worker, question))
    processes.stop(workers)
    return reports


def perform(folder: Path, processes: Processes, say: Console) -> dict[str, Any]:
    """The demo itself. Returns its figures, in bytes."""
    original = package_folder()
    tuned = folder / "fine-tune"
    checkpoints = {"minilm": original, "minilm-fine-tune": tuned}
    environment = {
        "WEIGHTD_SOCKET": str(folder / "weightd.sock"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1", "TMPDIR": str(folder),  # torch leaves a cache there
    }  # fmt: skip

    layers = " and ".join(str(number + 1) for number in TUNED_LAYERS)
    say.print(f"1. Fine-tuning MiniLM for a few steps (layers {layers} of 6) ...")
    trainer = processes.start(HERE / "_minilm.py", original, tuned, environment=environment)
    changed = json.loads(processes.read_line(trainer))
    processes.stop([trainer])
    say.print(f"   {len(changed)} tensors changed; the result is a second checkpoint of the same size")

    say.print("2. Starting the daemon and loading both ...")
    daemon = processes.start(
        "-m", "weightd_daemon", "serve", "--socket", environment["WEIGHTD_SOCKET"], "--state-dir", folder / "state",
        "--budget", "1GiB",
    )  # fmt: skip
    processes.read_line(daemon)
    with weightd.connect(environment["WEIGHTD_SOCKET"]) as client:
        loads = {name: client.load_report(path, name=name, pin=True) for name, path in checkpoints.items()}
        for name, load in loads.items():
            assert load is not None
            say.print(
                f"   {name}: {load.tensors} tensors, {load.total_bytes / MB:.1f} MB, of which "
                f"{load.shared_bytes / MB:.1f} MB were there already or occur twice"
            )

        say.print("3. Four processes attach, compute embeddings, and compare with a private load ...")
        attached = run_workers(processes, "attached", checkpoints, environment)
        stats = client.stats()
        daemon_pss = sum(pss(pid) for pid in (daemon.pid, *descendants(daemon.pid)))
    processes.stop([daemon])
    say.print("4. The same four processes, each with a private copy ...")
    private = run_workers(processes, "private", checkpoints, environment)
    return {
        "attached": attached, "private": private, "daemon_pss": daemon_pss, "changed_tensors": len(changed),
        "attached_pss": sum(worker["pss"] for worker in attached) + daemon_pss,
        "attached_weights_pss": sum(worker["daemon_memory_pss"] for worker in attached),
        "private_pss": sum(worker["pss"] for worker in private),
        "copies_bytes": sum(worker["bytes"] for worker in private),
        "logical_bytes": stats.logical_bytes, "resident_bytes": stats.resident_bytes,
        "saved_bytes": stats.saved_bytes, "saved_ratio": stats.saved_ratio,
        "equal": all(w["weights_equal"] and w["embeddings_equal"] for w in attached + private),
        "zero_copy": all(worker["zero_copy"] for worker in attached),
        "embeddings_agree": all(a["similarity"] == b["similarity"] for a, b in zip(attached, private, strict=True)),
    }  # fmt: skip


def show(figures: dict[str, Any], say: Console) -> None:
    """Print the figures for people."""

    def mb(size: int) -> str:
        return f"{size / MB:,.0f}"

    table = Table(title="Memory of each process in MB, by the kernel's count (PSS: shared pages are split evenly)")
    table.add_column("process")
    for column in ("attached: PSS", "of which weights", "private copies: PSS", "of which weights"):
        table.add_column(column, justify="right")
    for number, (a, b) in enumerate(zip(figures["attached"], figures["private"], strict=True), start=1):
        memory = [a["pss"], a["daemon_memory_pss"], b["pss"], b["bytes"]]
        table.add_row(f"{number}: {a['checkpoint']}", *map(mb, memory))
    table.add_row("daemon and loader", mb(figures["daemon_pss"]), "", "–", "", end_section=True)
    totals = [figures[key] for key in ("attached_pss", "attached_weights_pss", "private_pss", "copies_bytes")]
    table.add_row("total", *map(mb, totals))
    say.print(table)

    held = Table(title="The weights alone, in MB")
    held.add_column("what")
    held.add_column("MB", justify="right")
    held.add_row("four private copies take", mb(figures["copies_bytes"]))
    held.add_row("each checkpoint once would take (logical)", mb(figures["logical_bytes"]))
    held.add_row("the daemon holds (resident)", mb(figures["resident_bytes"]))
    held.add_row(f"saved between the two checkpoints ({figures['saved_ratio']:.1%})", mb(figures["saved_bytes"]))
    say.print(held)

    alike = Table(title=f"How close to {SENTENCES[0]!r} (1 is the same), computed from attached weights")
    alike.add_column("sentence")
    workers = {worker["checkpoint"]: worker for worker in figures["attached"]}
    for name in workers:
        alike.add_column(name, justify="right")
    for number, sentence in enumerate(SENTENCES[1:], start=1):
        alike.add_row(sentence, *(f"{worker['similarity'][number]:.4f}" for worker in workers.values()))
    say.print(alike)

    verdict = {True: "yes", False: "NO"}
    say.print(
        f"Attached weights equal a private load, bit by bit, and so do the embeddings: {verdict[figures['equal']]}"
    )
    say.print(f"The models compute on the shared memory itself, no tensor was copied: {verdict[figures['zero_copy']]}")
    say.print(
        "To be fair: on a CPU, processes that map one safetensors file share its pages without any daemon. What "
        "weightd adds here is sharing between different files, found by content and compared byte by byte, in memory "
        "under a budget that stays although the files change or are gone. The totals count everything in these "
        "processes, Python and torch included, and the daemon."
    )


def main() -> int:
    """Run the demo. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    as_json = parser.parse_args().format == "json"
    say = Console(stderr=as_json, highlight=False, width=None if sys.stdout.isatty() else 110)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            folder = stack.enter_context(stage())
            processes = stack.enter_context(Processes(folder / "log"))
            figures = perform(folder, processes, say)
    except KeyboardInterrupt:
        say.print("demo: stopped; nothing is left running")
        return 130
    except (DemoError, FileNotFoundError, weightd.WeightdError) as error:
        say.print(f"demo: {error}", markup=False)
        return 1
    left = processes.left_running()
    figures |= {"seconds": round(time.monotonic() - started, 1), "left_running": left, "left_files": folder.exists()}
    if as_json:
        print(json.dumps(figures))
    else:
        show(figures, say)
        say.print(f"{figures['seconds']} s; {len(processes.seen)} processes ran, {len(left)} are left running")
    good = figures["equal"] and figures["zero_copy"] and figures["embeddings_agree"]
    return 0 if good and not left and not folder.exists() else 1


if __name__ == "__main__":
    sys.exit(main())
