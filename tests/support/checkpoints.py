"""Checkpoint files with known contents."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

Tensors = Mapping[str, "np.ndarray | tuple[str, tuple[int, ...], bytes]"]
_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "float64": "F64",
    "uint8": "U8",
    "int64": "I64",
    "int32": "I32",
    "bool": "BOOL",
}


def random_bytes(seed: object, size: int) -> bytes:
    """`size` bytes that depend on nothing but `seed`."""
    key = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).bytes(size + -size % 8)[:size]


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file; a tensor is an array, or (dtype, shape, bytes)."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    parts: list[bytes] = []
    offset = 0
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            dtype, shape, data = _NAMES[str(tensor.dtype)], tensor.shape, tensor.tobytes()
        else:
            dtype, shape, data = tensor
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        parts.append(data)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for part in parts:
            file.write(part)
    return path


def index(folder: Path, owners: Mapping[str, str], name: str = "model.safetensors.index.json") -> Path:
    """Write an index: the file of each tensor."""
    path = folder / name
    path.write_text(json.dumps({"metadata": {}, "weight_map": dict(owners)}))
    return path


def describe_pipeline(folder: Path) -> Path:
    """Write the model_index.json of a Diffusers pipeline, with all subfolders as its components."""
    parts = sorted(path for path in folder.iterdir() if path.is_dir())
    kinds = {
        part.name: ["diffusers" if any(part.glob("diffusion_pytorch_model*")) else "transformers", "Component"]
        for part in parts
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline", **kinds}))
    return folder


def write_random(
    path: Path, count: int, size: int, seed: object = 0, shared: Mapping[int, object] | None = None
) -> Path:
    """A checkpoint of `count` U8 tensors "t0", "t1", … of `size` bytes; tensor i has seed `shared[i]` where given."""
    seeds = shared or {}
    tensors = {f"t{i}": ("U8", (size,), random_bytes(seeds.get(i, (seed, i)), size)) for i in range(count)}
    return write(path, tensors)


def rest(*paths: Path) -> None:
    """Make files look as if nobody had touched them for a while, so that their identity can be trusted.

    Only mtime can be set; ctime is now. So this waits until ctime has rested, too.
    """
    newest = max(os.stat(path).st_ctime for path in paths)
    time.sleep(max(0.0, newest + 2.05 - time.time()))
