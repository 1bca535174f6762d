"""The files of a soak: each version of each file has a mark among its tensors, and stands in a register.

So a client that attached something can tell from its bytes alone which version it is, and what every tensor of that
version must be. A file that is rewritten in place has a mark of its own at each step, for a whole load may fit between
two of them: its bytes must be those of one step.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import xxhash

from support import checkpoints

MARK = "mark"
MARK_BYTES = 24
_TORN = "torn."
"""Begins the mark of a file that is being written over."""
_STEPS = 6
_TUNED, _TIED = 0.3, 0.3
_LARGE = (1 << 20, 700_001, 256 << 10, 65_536, 65_537, 131_072, 1_500_000, 900_000, 524_288, 300_007, 80_000, 2_000_000)
_SMALL = (1, 2, 3, 63, 64, 65, 4095, 4096, 4097, 30_000, 65_535)
"""Lengths on both sides of those at which weightd treats tensors in another way: 256 bytes, a page, 64 KiB."""


class StoredFile(NamedTuple):
    """A checkpoint file; `shape` decides its tensors' names and lengths, which are those of every version of it."""

    path: Path
    shape: int


class VersionWriter:
    """Writes versions of files, the seed's first, second, third, … one. Versions of all files have layers in common."""

    def __init__(self, seed: int, register: Path) -> None:
        self.written = 0
        self._seed = seed
        self._layers = [checkpoints.random_bytes((seed, size), size) for size in _LARGE]
        self._register = register.open("a")

    def replace(self, file: StoredFile) -> None:
        """Put the next version in a file's place by renaming."""
        data, _ = self._next(file.shape)
        file.path.parent.mkdir(parents=True, exist_ok=True)
        beside = file.path.with_name(f".{file.path.name}.new")
        beside.write_bytes(data)
        beside.rename(file.path)

    def rewrite(self, file: StoredFile) -> None:
        """Write the next version over a file, piece by piece, its mark last."""
        now = bytearray(file.path.read_bytes())
        new, places = self._next(file.shape)  # places of what is there, too
        at, _ = places[MARK]
        size = len(new) // _STEPS + 1
        descriptor = os.open(file.path, os.O_WRONLY)
        try:
            for step in range(_STEPS):
                mark = _mark(f"{_TORN}{self._seed}.{self.written}.{step}.")
                body = _marked(new, at, mark)
                piece = slice(step * size, (step + 1) * size)
                before = _marked(now, at, mark)
                now[:] = before
                now[piece] = body[piece]
                self._enter(mark, [_digests(before, places), _digests(now, places)])
                os.pwrite(descriptor, mark, at)
                os.pwrite(descriptor, body[piece], piece.start)
                time.sleep(0.005)  # no synchronisation: readers are to meet a file that is half written
            os.pwrite(descriptor, new[at : at + MARK_BYTES], at)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        self._register.close()

    def _next(self, shape: int) -> tuple[bytes, dict[str, tuple[int, int]]]:
        """A safetensors file, and where in it each tensor begins and ends."""
        self.written += 1
        mark = _mark(f"{self._seed}.{self.written}.")
        tensors = {MARK: mark, **self._tensors(shape)}
        header: dict[str, object] = {}
        length = 0
        for name, data in tensors.items():
            header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [length, length + len(data)]}
            length += len(data)
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        places = {}
        begin = 8 + len(encoded)
        for name, data in tensors.items():
            places[name] = begin, begin + len(data)
            begin += len(data)
        file = struct.pack("<Q", len(encoded)) + encoded + b"".join(tensors.values())
        self._enter(mark, [_digests(file, places)])
        return file, places

    def _enter(self, mark: bytes, versions: list[dict[str, str]]) -> None:
        """Tell clients what has a mark, before any of them can meet it."""
        self._register.write(json.dumps({"mark": mark.decode(), "versions": versions}) + "\n")
        self._register.flush()

    def _tensors(self, shape: int) -> dict[str, bytes]:
        """Layers, some tuned, so that they differ from others' in one byte; some tied; small tensors; empty ones."""
        form, chance = random.Random(f"{self._seed} {shape}"), random.Random(f"{self._seed} {self.written} {shape}")
        found: dict[str, bytes] = {}
        for number in range(form.randint(3, 7)):
            data = form.choice(self._layers)
            if chance.random() < _TUNED:
                tuned = bytearray(data)
                tuned[chance.choice([0, -1, len(data) // 2])] ^= chance.randint(1, 255)
                data = bytes(tuned)
            found[f"layer{number}"] = data
            if form.random() < _TIED:
                found[f"layer{number}.tied"] = data
        for number in range(form.randint(1, 12)):
            size = form.choice(_SMALL)
            constant = bytes([chance.choice([0, 7])]) * size
            found[f"small{number}"] = constant if chance.random() < 0.6 else chance.randbytes(size)
        for number in range(form.randint(0, 3)):
            found[f"empty{number}"] = b""
        names = list(found)
        form.shuffle(names)
        return {name: found[name] for name in names}


def _mark(text: str) -> bytes:
    return text.encode().ljust(MARK_BYTES, b".")


def _marked(file: bytes | bytearray, at: int, mark: bytes) -> bytes:
    return bytes(file[:at]) + mark + bytes(file[at + MARK_BYTES :])


def _digests(file: bytes | bytearray, places: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The digest of each tensor of a file."""
    view = memoryview(file)
    return {name: xxhash.xxh3_128_hexdigest(view[begin:end]) for name, (begin, end) in places.items()}


class VersionReader:
    """What a client knows of the versions that were written."""

    def __init__(self, register: Path) -> None:
        self._register = register
        self._known: dict[str, list[dict[str, str]]] = {}
        self._read = 0

    def versions(self, mark: bytes) -> list[dict[str, str]]:
        """The versions with a mark, one or two, as digests by tensor; none where it was never written."""
        key = mark.decode(errors="replace")
        if key not in self._known:
            with self._register.open() as file:
                file.seek(self._read)
                while (line := file.readline()).endswith("\n"):
                    entry = json.loads(line)
                    self._known[entry["mark"]] = entry["versions"]
                    self._read = file.tell()
        return self._known.get(key, [])


def mark_of(path: Path) -> bytes | None:
    """The mark in a file; None where it is being written, or gone."""
    with contextlib.suppress(OSError, KeyError, ValueError, struct.error), path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        start, end = json.loads(file.read(length))[MARK]["data_offsets"]
        file.seek(8 + length + start)
        mark = file.read(end - start)
        return None if mark.startswith(_TORN.encode()) else mark
    return None
