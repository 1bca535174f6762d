#!/usr/bin/env python3
"""Ask a GPU what no document states, and write down what it answered.

    gpu_probe.py [--only NAME] [--list]         print the answers, or the questions
    gpu_probe.py --write docs/gpu-facts.md      ask everything, and write the page

Needs cuda-bindings, and nvidia-ml-py and torch for some questions; asks the first visible GPU, which should be idle.
Each question has a process and a time limit of its own, because some of them end the context they are asked in. Where
there is no GPU, --write writes the page with every answer "not yet measured"; it never overwrites answers with that.
Exit codes: 0, or 1 where there is no GPU to print answers of, or a question failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _gpu_asking import MIB, ORDINAL, QUESTIONS, NoAnswerError, Question, is_double, nvml_device

from weightd._mapping import cuda_driver as driver
from weightd.errors import WeightdError

if TYPE_CHECKING:
    from collections.abc import Callable

for _subject in ("_gpu_keeping", "_gpu_behaviour", "_gpu_serving", "_gpu_costs"):
    importlib.import_module(_subject)  # registers questions: they are asked in this order, most telling first

UNKNOWN = "not yet measured"
NO_GPU = "No GPU was at hand: nothing on this page has been measured yet."
PACKAGES = ("cuda-bindings", "cuda-core", "nvidia-ml-py", "torch")
COMPUTE_MODES = {0: "default", 2: "prohibited", 3: "exclusive process"}
_DESCRIBING_SECONDS = 60.0


def in_own_process(arguments: list[str], seconds: float) -> dict[str, Any]:
    """What a run of this program with `arguments` prints last; or what became of it, as "failed"."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            printed, errors = process.communicate(timeout=seconds)
        except BaseException as error:  # also Ctrl-C, which does not reach another session
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it forked
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"failed": f"no answer within {seconds:.0f} s"}
    try:
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError):
        last = (errors.strip().splitlines() or ["nothing was printed"])[-1]
        return {"failed": f"exit code {process.returncode}: {last}"}
    return found


def describe() -> dict[str, Any]:
    """The GPU and what drives it; {"absent": why} where there is none. What cannot be found out says why."""
    try:
        driver.initialise()
    except WeightdError as error:
        return {"absent": str(error)}
    version = driver.call("cuDriverGetVersion")
    found = {
        "GPU": driver.name_of(ORDINAL),
        "memory": f"{driver.total_memory(ORDINAL) / (1 << 30):.0f} GiB",
        "CUDA of the driver": f"{version // 1000}.{version % 1000 // 10}",
        "double": is_double(),
    }
    try:
        nvml, handle = nvml_device()
    except NoAnswerError as why:
        return found | {"driver": f"unknown: {why}"}
    facts: dict[str, Callable[[], str]] = {
        "driver": nvml.nvmlSystemGetDriverVersion,
        "used beforehand": lambda: f"{nvml.nvmlDeviceGetMemoryInfo(handle).used / MIB:,.0f} MiB",
        "persistence mode": lambda: _on_or_off(nvml.nvmlDeviceGetPersistenceMode(handle)),
        "MIG mode": lambda: _on_or_off(nvml.nvmlDeviceGetMigMode(handle)[0]),
        "compute mode": lambda: COMPUTE_MODES.get(nvml.nvmlDeviceGetComputeMode(handle), "unknown"),
    }
    for label, fact in facts.items():
        try:
            found[label] = fact()
        except nvml.NVMLError as error:  # a GPU need not support each of them
            found[label] = f"unknown: {str(error).lower()}"
    return found


def _on_or_off(state: int) -> str:
    return "on" if state else "off"


def answer(name: str) -> dict[str, str]:
    """Run one probe, here. {"answer"}, {"skipped"} or {"failed"}."""
    try:
        return {"answer": QUESTIONS[name].answer()}
    except NoAnswerError as why:
        return {"skipped": str(why)}
    except Exception as error:  # noqa: BLE001  # the boundary of the process: whatever broke is this question's answer
        return {"failed": f"{type(error).__name__}: {error}"}


def ask(name: str) -> str:
    """The answer in words."""
    found = in_own_process(["--answer", name], QUESTIONS[name].seconds)
    if "answer" in found:
        return str(found["answer"])
    if "skipped" in found:
        return f"not measured: {found['skipped']}"
    return f"failed: {found['failed']}"


def page(machine: list[str], answers: dict[str, str]) -> str:
    """The page in Markdown."""
    rows = [(q.name, q.text, answers.get(q.name, UNKNOWN), q.decides, q.how) for q in QUESTIONS.values()]
    head = ("name", "question", "answer", "what it decides", "how it is measured")
    table = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in (head, ("---",) * 5, *rows)]
    return "\n".join(
        [
            "# What the GPU says",
            "",
            "Facts about CUDA that weightd's design relies on and that no document states. `make gpu-probe`",
            "(`tools/gpu_probe.py`) writes this page; do not edit it. MPS, MIG instances and pairs of containers",
            "need a setup of their own; no question covers them.",
            "",
            *machine,
            "",
            *(f"| {row} |" for row in table),
            "",
        ]
    )


def machine_lines(found: dict[str, Any]) -> list[str]:
    """What was measured, on what and when."""
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = "not installed"
    lines = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **{key: value for key, value in found.items() if key != "double"},
        "Linux": platform.release().split("-")[0],
        "Python": platform.python_version(),
        **packages,
    }
    return [f"- {key}: {value}" for key, value in lines.items()]


def write_unknown(path: Path) -> str | int:
    """Write the page without answers; returns 0, or why not."""
    if path.exists() and NO_GPU not in path.read_text():
        return f"gpu_probe: {path} holds answers of a GPU; they are not overwritten where there is none"
    path.write_text(page([NO_GPU], {}))
    return 0


def show(asked: list[Question], each: Callable[[dict[str, str]], None]) -> dict[str, str]:
    """Ask, and print answers as they come; `each` is called with the answers so far."""
    answers: dict[str, str] = {}
    for one in asked:
        answers[one.name] = ask(one.name)
        print(f"{one.name}: {one.text}\n    {answers[one.name]}", flush=True)
        each(answers)
    return answers


def main() -> str | int:
    """Run what the command line says. Returns an exit code or a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", choices=QUESTIONS, help="ask one question")
    parser.add_argument("--list", action="store_true", help="print the questions, and ask nothing")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write all answers as a page")
    parser.add_argument("--answer", choices=QUESTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer or options.describe:
        print(json.dumps(answer(options.answer) if options.answer else describe()))
        return 0
    if options.list:
        for each in QUESTIONS.values():
            print(f"{each.name}: {each.text}")
        return 0
    if options.write and options.only:
        parser.error("--write asks every question; leave --only out")
    found = in_own_process(["--describe"], _DESCRIBING_SECONDS)
    if "failed" in found:
        return f"gpu_probe: the GPU does not answer: {found['failed']}"
    if "absent" in found:
        print(f"no GPU: {found['absent']}")
        return write_unknown(options.write) if options.write else 1
    if options.write and found["double"]:
        return f"gpu_probe: {found['GPU']} is a test double; what it answers is no fact about CUDA and is not written"
    machine = machine_lines(found)

    def save(answers: dict[str, str]) -> None:
        if options.write:  # after each answer: a GPU that hangs takes none of them back
            options.write.write_text(page(machine, answers))

    answers = show([QUESTIONS[options.only]] if options.only else list(QUESTIONS.values()), save)
    if options.write:
        print(f"written: {options.write}")
    return int(any(each.startswith("failed") for each in answers.values()))


if __name__ == "__main__":
    sys.exit(main())
