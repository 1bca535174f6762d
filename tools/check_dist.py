"""Try a wheel with each of its extras in fresh environments, as those who install it have them.

Each environment gets the wheel with one extra, imports the modules that the extra is for, and runs `weightd --version`
(without the command's extra, it asks the library); with `daemon`, a daemon is pinged. A table says how each ended, and
the exit code is 1 if one failed. The Pythons are those that are named, else all from 3.11 on that PATH or pyenv has.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

OLDEST = (3, 11)
NEWEST = (3, 15)
SECONDS = 900
"""Seconds that one step may take: an installation downloads hundreds of megabytes."""

HAS_COMMAND = "import importlib.util; print(importlib.util.find_spec('typer') is not None)"
VERSION = "import weightd; print('weightd', weightd.__version__)"


class Trial(NamedTuple):
    """Extras that are installed together, the modules that they are for, and whether these need torch."""

    extras: str
    modules: str
    torch: bool = False


# An extra that adds to the daemon is tried with it.
TRIALS: dict[str, Trial] = {
    "": Trial("", "weightd weightd.client weightd.attachment weightd._transport.rpc"),
    "cli": Trial("cli", "weightd.cli.app"),
    "daemon": Trial("daemon", "weightd_daemon.app weightd_daemon.loader.job weightd.cli.app"),
    "metrics": Trial("metrics,daemon", "weightd_daemon.monitoring.metrics"),
    "cuda": Trial("cuda,daemon", "weightd._mapping.cuda_driver weightd_daemon.devices.cuda_io pynvml cuda.core"),
    "gguf": Trial("gguf,daemon", "weightd.gguf weightd_daemon.formats.gguf gguf"),
    "top": Trial("top", "weightd.top.application"),
    "web": Trial("web", "weightd.web.server"),
    "plan": Trial("plan,daemon", "weightd_daemon.plans.near_duplicates weightd_daemon.planning"),
    "fleet": Trial("fleet", "weightd_fleet.planning weightd_fleet.publishing.publish weightd_fleet.agent.agent"),
    "fleet-ray": Trial("fleet-ray", "weightd_fleet.agent.agent ray"),
    "fleet-k8s": Trial("fleet-k8s", "weightd_fleet.engines.kubernetes_node"),
    "torch": Trial("torch", "weightd.torch", torch=True),
    "transformers": Trial("transformers", "weightd.integrations.transformers transformers", torch=True),
    "diffusers": Trial("diffusers", "weightd.integrations.diffusers diffusers", torch=True),
    "demo": Trial("demo", "weightd.torch safetensors.torch transformers", torch=True),
    "examples": Trial("examples", "fastapi gunicorn onnx onnxruntime safetensors uvicorn uvicorn_worker"),
    "dev": Trial("dev", "hypothesis mypy pytest ruff scipy trustme yaml weightd.torch", torch=True),
}


class TrialError(Exception):
    """A step failed; the last lines of its output are the message."""


def extras_of(wheel: Path) -> list[str]:
    """The extras that a wheel provides."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return re.findall(r"^Provides-Extra: (\S+)$", archive.read(name).decode(), re.MULTILINE)


def pythons() -> list[str]:
    """Interpreters of all versions from the oldest on that PATH and pyenv have, one of each."""
    names = [f"python3.{minor}" for minor in range(OLDEST[1], NEWEST[1])]
    found = {version: path for name in names if (path := shutil.which(name)) and (version := version_of(path))}
    root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    for path in sorted(root.glob("versions/3.*/bin/python3")):
        if version := version_of(str(path)):
            found.setdefault(version, str(path))
    return [path for version, path in sorted(found.items()) if version >= OLDEST]


def version_of(python: str) -> tuple[int, int] | None:
    """Version of an interpreter; None if it does not start, as a shim of pyenv for a version that is not chosen."""
    code = "import sys; print(*sys.version_info[:2])"
    with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        major, minor = map(int, done.stdout.split())
        return major, minor
    return None


def step(command: Sequence[str | Path], **more: str) -> str:
    """Run a command and return its output. Errors: TrialError."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WEIGHTD_", "PYTHON"))}
    try:
        done = subprocess.run(
            list(map(str, command)), env=clean | more, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TrialError(f"{command[0]}: took more than {SECONDS} s") from error
    if done.returncode:
        raise TrialError("\n".join(done.stdout.strip().splitlines()[-12:]) or f"exit code {done.returncode}")
    return done.stdout


class Environment:
    """A virtual environment without pip, which the pip of this program installs into."""

    def __init__(self, python: str, folder: Path) -> None:
        self._bin = folder / "bin"
        step([python, "-m", "venv", "--without-pip", folder])

    def install(self, *requirements: str) -> None:
        """Install packages. Errors: TrialError."""
        pip = [sys.executable, "-m", "pip", "--python", self._bin / "python", "install", "--quiet", "--no-input"]
        step([*pip, *requirements])

    def run(self, *command: str, **more: str) -> str:
        """Run a program of the environment. Errors: TrialError."""
        return step([self._bin / command[0], *command[1:]], **more)

    @contextlib.contextmanager
    def daemon(self, socket: Path) -> Iterator[None]:
        """A daemon on a socket. Errors: TrialError."""
        command = [self._bin / "weightd", "serve", "--device=host", "--budget=64MiB", f"--socket={socket}"]
        process = subprocess.Popen([*command, f"--state-dir={socket.parent}"], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            if not process.stdout.readline().startswith("weightd is ready"):
                raise TrialError("the daemon did not start; its log is above")
            yield
        finally:
            process.terminate()
            process.communicate()


def try_extra(python: str, wheel: Path, trial: Trial, torch: Sequence[str]) -> str:
    """Try an extra. Returns "" or why it was left out. Errors: TrialError."""
    with tempfile.TemporaryDirectory(prefix="weightd-dist-") as folder:
        environment = Environment(python, Path(folder) / "venv")
        if trial.torch:
            try:
                environment.install(*torch)
            except TrialError:
                return f"no {torch[0]} for it here"
        environment.install(f"{wheel}[{trial.extras}]" if trial.extras else str(wheel))
        environment.run("python", "-c", f"import {', '.join(trial.modules.split())}")
        has_command = environment.run("python", "-c", HAS_COMMAND).strip() == "True"
        said = environment.run("weightd", "--version") if has_command else environment.run("python", "-c", VERSION)
        if said.strip() != f"weightd {wheel.name.split('-')[1]}":
            raise TrialError(f"{wheel.name} says that it is {said.strip()!r}")
        if trial.extras == "daemon":
            socket = Path(folder) / "w.sock"
            with environment.daemon(socket):
                environment.run("weightd", "ping", f"--socket={socket}")
    return ""


def main() -> int:
    """Try the extras and print a table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", action="append", help="an interpreter; repeatable")
    parser.add_argument("--extra", action="append", help="an extra, base for none; repeatable")
    parser.add_argument("--torch", default="torch", help="what is installed first where an extra needs torch")
    parser.add_argument("--index", help="index of packages that has it")
    parser.add_argument("wheel", type=Path)
    options = parser.parse_args()
    wheel = options.wheel.resolve()
    extras = ["", *extras_of(wheel)] if options.extra is None else [name.replace("base", "") for name in options.extra]
    if unknown := [name for name in extras if name not in TRIALS]:
        parser.error(f"nothing says how to try {', '.join(unknown)}: add it to TRIALS")
    torch = [options.torch, *(["--extra-index-url", options.index] if options.index else [])]
    failed = False
    rows = []
    interpreters = options.python or pythons()
    for extra in extras:
        row = [extra or "base"]
        for python in interpreters:
            begun = time.monotonic()
            try:
                left_out = try_extra(python, wheel, TRIALS[extra], torch)
                row.append(f"skipped: {left_out}" if left_out else f"ok, {time.monotonic() - begun:.0f} s")
            except TrialError as error:
                failed = True
                row.append("FAILED")
                print(f"{extra or 'base'} with {python}:\n{error}", file=sys.stderr)
        rows.append(row)
        print(" | ".join(row), file=sys.stderr, flush=True)
    versions = [".".join(map(str, version_of(python) or ("?",))) for python in interpreters]
    print("| extra |", " | ".join(versions), "|")
    print("|---" * (1 + len(versions)) + "|")
    for row in rows:
        print("|", " | ".join(row), "|")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
