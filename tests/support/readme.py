"""What README.md tells a reader to type: its blocks, and a folder in which they are typed one after the other.

`PYTHONPATH=client:daemon:tests python -m support.readme` brings what the blocks say is printed up to date.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from support import checkpoints
from support.daemon import ROOT, environment

README = ROOT / "README.md"
_SECONDS = 60


class Block(NamedTuple):
    """A fenced block: the language behind its fence, and its text."""

    language: str
    text: str


class Step(NamedTuple):
    """A command line, and what README says that it prints."""

    command: str
    printed: str


def blocks(path: Path = README) -> list[Block]:
    """All fenced blocks of a document."""
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)]


def steps(block: Block) -> list[Step]:
    """The command lines of a block. Where they have a prompt, all other lines are what they print."""
    if not block.text.startswith("$ "):
        return [Step(line, "") for line in block.text.splitlines() if line and not block.language]
    parts = re.split(r"^\$ (.*)\n", block.text, flags=re.MULTILINE)
    return [Step(command, printed) for command, printed in zip(parts[1::2], parts[2::2], strict=True)]


def words(command: str) -> str:
    """A command line without the `&` at its end and without a comment."""
    return re.sub(r"\s*(&|\s#.*)*$", "", command)


class Reader:
    """Somebody with an activated environment and an empty folder, who types what README says.

    The environment is the one that runs the tests: what README says of making one is not typed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._background: list[subprocess.Popen[str]] = []
        (folder / "bin").mkdir()
        for name, arguments in (("python", ""), ("weightd", "-m weightd ")):
            script = folder / "bin" / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments}"$@"\n')
            script.chmod(0o755)
        self._work = folder / "work"
        self._work.mkdir()
        for name in ("examples", "tests"):
            (self._work / name).symlink_to(ROOT / name)
        (folder / "run").mkdir(mode=0o700)
        places = {"XDG_RUNTIME_DIR": "run", "XDG_STATE_HOME": "state", "HOME": "home"}
        self._environment = (
            environment()
            | {name: str(folder / place) for name, place in places.items()}
            | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "COLUMNS": "200"}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._background):  # the daemon last
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def write(self, name: str, text: str) -> Path:
        """Write a file of the reader's own."""
        path = self._work / name
        path.write_text(text)
        return path

    def rest(self) -> None:
        """Let a moment pass: a file that was just written would be read again, and nobody types that fast."""
        checkpoints.rest(*self._work.glob("*.safetensors"))

    def type(self, command: str) -> str:
        """Run a command line and return what the terminal shows; of one in the background its first line."""
        if command.rstrip().endswith("&"):
            process = subprocess.Popen(
                ["bash", "-c", f"exec {words(command)}"], cwd=self._work, env=self._environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            self._background.append(process)
            assert process.stdout is not None
            return process.stdout.readline()
        done = subprocess.run(
            ["bash", "-c", command], cwd=self._work, env=self._environment, timeout=_SECONDS, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        return done.stdout


def told(text: str) -> Iterator[list[str]]:
    """Each line's words, without what differs from run to run: times, process ids, leases, the user, the socket,
    sizes below 1 MiB."""
    text = re.sub(r"\d+\.\d+ s\b", "SECONDS", text)
    text = re.sub(r"just now|\d+ seconds? ago", "LATELY", text)
    text = re.sub(r"\S+/weightd\.sock", "SOCKET", text)
    text = re.sub(r"\b\d[\d.]* (KiB|B)\b", "LITTLE", text)
    text = _without_folder(text)
    text = re.sub(r"pid \d+", "PID", text)
    text = re.sub(r"^ *\d+ +\d+ +(\S+) ", "LEASE PID USER ", text, flags=re.MULTILINE)
    text = re.sub(r"resident +\S+", "resident USER", text)
    return (line.split() for line in text.rstrip().splitlines())


def typed(reader: Reader) -> Iterator[tuple[str, str, str]]:
    """Type README in its order; yields each command, what README says that it prints, and what it printed.

    Left out: making the environment, and what needs a GPU, a service manager or somebody else's files.
    """
    example = next(block.text for block in blocks() if block.language == "python")
    for block in blocks():
        for command, expected in steps(block):
            if not re.match(r"python |weightd (?!unit)", command) or "cuda" in command:
                continue
            if command.startswith("python example.py"):
                reader.write("example.py", example + '\nimport time\nprint("here", flush=True)\ntime.sleep(600)\n')
                assert reader.type(command) == "here\n"
                continue
            yield command, expected, reader.type(command)
            if "two_checkpoints" in command:
                reader.rest()


def main() -> None:
    """Put into README's blocks what their commands print now."""
    text, start = README.read_text(), 0
    with tempfile.TemporaryDirectory(prefix="weightd-") as folder, Reader(Path(folder)) as reader:
        for command, expected, printed in typed(reader):
            prompt = f"$ {command}\n"
            if prompt not in text[start:]:  # a block of commands alone
                continue
            start = text.index(prompt, start) + len(prompt)
            shown = re.sub(r"\S+/weightd\.sock", "/run/user/1000/weightd/weightd.sock", printed.strip("\n"))
            text = text[:start] + text[start:].replace(expected.strip("\n"), _without_folder(shown), 1)
    README.write_text(text)


def _without_folder(text: str) -> str:
    return re.sub(r"[^\s(]+/python ", "python ", text)


if __name__ == "__main__":
    main()
