"""The corpus: a folder for each target, a file for each hostile input, and MANIFEST.tsv, which says what each tries.

`python -m support.fuzzing.corpus` writes it anew from the ideas. An input that `make fuzz` has found goes into an idea.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from . import file_ideas, kept_ideas, message_ideas
from .ideas import HostileInput, Ideas

FOLDER = Path(__file__).parents[2] / "fuzz" / "corpus"
MOST_BYTES = 16 << 10
"""Longest input that is kept; longer ones are tests of their own (support/malformed.py, tests/fault)."""

IDEAS: dict[str, Callable[[], Ideas]] = {
    "fleet_manifest": message_ideas.fleet_manifests,
    "frames": message_ideas.frames,
    "gguf": file_ideas.gguf,
    "loader_hears": message_ideas.loader_hears,
    "loader_says": message_ideas.loader_says,
    "manifest": message_ideas.manifests,
    "peer_answers": message_ideas.peer_answers,
    "peer_requests": message_ideas.peer_requests,
    "replies": message_ideas.replies,
    "root_log": kept_ideas.root_logs,
    "root_rows": kept_ideas.root_rows,
    "safetensors": file_ideas.safetensors,
    "settings": kept_ideas.settings,
}


def ideas_of(target: str) -> list[HostileInput]:
    """The hostile inputs of a target, each once: of equal ones the first."""
    found: dict[bytes, HostileInput] = {}
    for one in IDEAS[target]():
        if len(one.data) <= MOST_BYTES:
            found.setdefault(one.data, one)
    return sorted(found.values())


def kept_of(target: str) -> dict[str, bytes]:
    """The files of a target's corpus, by name."""
    return {path.name: path.read_bytes() for path in sorted((FOLDER / target).iterdir())}


def manifest() -> str:
    """What MANIFEST.tsv says of all inputs: target, name, bytes, idea."""
    rows = ["target\tname\tbytes\tidea"]
    for target in sorted(IDEAS):
        rows += [
            f"{target}\t{one.name}\t{len(one.data)}\t{one.idea.encode('unicode_escape').decode()}"
            for one in ideas_of(target)
        ]
    return "\n".join(rows) + "\n"


def main() -> None:
    """Write the corpus."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for target in IDEAS:
        (FOLDER / target).mkdir(parents=True)
        for one in ideas_of(target):
            assert re.fullmatch(r"\w+", one.name, re.ASCII), one.name
            path = FOLDER / target / one.name
            assert not path.exists(), f"two ideas are called {path}"
            path.write_bytes(one.data)
    (FOLDER / "MANIFEST.tsv").write_text(manifest())


if __name__ == "__main__":
    main()
