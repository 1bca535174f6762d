"""Checkpoints with the layout, and the duplicates, of real ones, written from manifests in tests/data.

A manifest is {file: [{name, dtype, shape, content}, ...]}. Rows with equal (content, dtype, shape) get equal bytes, in
whatever file they stand; everything else differs. Floats are finite. In `*__s64` the first dimension of every tensor is
a 64th of the original's.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoints

DATA = Path(__file__).resolve().parents[1] / "data"
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "F8_E4M3": 1}
# Without one high exponent bit a float is finite.
_FINITE = {"F16": np.uint16(0xBFFF), "BF16": np.uint16(0xBFFF), "F32": np.uint32(0xBFFFFFFF)}

Row = dict[str, Any]


def manifest(name: str) -> dict[str, list[Row]]:
    """The manifest of a workload, by file."""
    text = gzip.decompress((DATA / f"{name}.json.gz").read_bytes())
    files: dict[str, list[Row]] = json.loads(text)
    return {file.split("(")[0]: rows for file, rows in files.items()}


def nbytes(row: Row) -> int:
    """Bytes of a tensor."""
    return math.prod(row["shape"]) * _ITEMSIZE[row["dtype"]]


def tensor_bytes(row: Row) -> bytes:
    """The bytes of a tensor; they depend on its content, dtype and shape only."""
    content, dtype, shape = row["content"], row["dtype"], tuple(row["shape"])
    seed = hashlib.blake2b(f"{content}|{dtype}|{shape}".encode(), digest_size=16).digest()
    size = nbytes(row)
    data = np.random.Generator(np.random.Philox(key=int.from_bytes(seed, "little"))).bytes(size + -size % 8)[:size]
    mask = _FINITE.get(dtype)
    return data if mask is None else (np.frombuffer(data, mask.dtype) & mask).tobytes()


def scaled(files: dict[str, list[Row]], scale: float) -> dict[str, list[Row]]:
    """A manifest whose tensors have `scale` times the rows, at least one. What was equal is equal still."""
    return {
        file: [
            row | {"shape": [max(1, round(size * scale)) for size in row["shape"][:1]] + row["shape"][1:]}
            for row in rows
        ]
        for file, rows in files.items()
    }


FAMILIES = (
    "flux1_dev_schnell_bf16__s64", "deepfloyd_if_I_II_f32__s64", "llama31_8b_base_plus_qv_lora_merged_bf16__s64",
)  # fmt: skip
"""Three pairs: what the tests of fleets place, six checkpoints of 2.5 GB together."""


def write_models(folder: Path, names: Iterable[str], scale: float = 1.0) -> dict[str, list[Row]]:
    """Write checkpoints of FAMILIES below `folder`, each in the folder of its name. Returns their manifest."""
    files = {file: rows for family in FAMILIES for file, rows in manifest(family).items()}
    files = scaled({file: rows for file, rows in files.items() if file.split("/")[0] in names}, scale)
    write_files(folder, files)
    return files


def write(folder: Path, name: str) -> dict[str, list[Row]]:
    """Write a workload's files below `folder`, pipelines with a model_index.json. Returns its manifest."""
    files = manifest(name)
    write_files(folder, files)
    return files


def write_files(folder: Path, files: dict[str, list[Row]]) -> None:
    """Write the files of a manifest below `folder`, pipelines with a model_index.json."""
    for file, rows in files.items():
        header: dict[str, Row] = {}
        offset = 0
        for row in rows:
            end = offset + nbytes(row)
            header[row["name"]] = {"dtype": row["dtype"], "shape": row["shape"], "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            out.write(struct.pack("<Q", len(encoded)) + encoded)
            for row in rows:
                out.write(tensor_bytes(row))
    for root in {folder / file.split("/")[0] for file in files if file.count("/") == 2}:
        checkpoints.describe_pipeline(root)
