"""Write two made-up checkpoints that share most of their bytes, to try weightd with. It needs nothing but Python.

    python examples/two_checkpoints.py [FOLDER]

`base.safetensors` has 37 tensors. `tuned.safetensors` is what a LoRA on q and v of the last layer leaves behind when it
is merged, with a classifier: 2 tensors differ, and there is one more. The bytes are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import struct
from pathlib import Path

WIDTH, LAYERS, VOCABULARY, CLASSES = 512, 6, 32_000, 1024

Shapes = dict[str, tuple[int, ...]]


def shapes() -> Shapes:
    """The base's tensors."""
    tensors: Shapes = {"embed.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        tensors[f"layers.{layer}.norm.weight"] = (WIDTH,)
        for projection in ("q", "k", "v"):
            tensors[f"layers.{layer}.attn.{projection}.weight"] = (WIDTH, WIDTH)
        tensors[f"layers.{layer}.mlp.up.weight"] = (4 * WIDTH, WIDTH)
        tensors[f"layers.{layer}.mlp.down.weight"] = (WIDTH, 4 * WIDTH)
    return tensors


def bfloat16(seed: str, count: int) -> bytes:
    """Numbers between 0.0078 and 0.031 in bfloat16, little-endian, half of them negative."""
    chance = random.Random(seed)
    numbers = bytearray(2 * count)
    numbers[0::2] = chance.randbytes(count)
    numbers[1::2] = chance.randbytes(count).translate(b"\x3c\xbc" * 128)  # sign and exponent
    return bytes(numbers)


def write(path: Path, tensors: Shapes, tuned: tuple[str, ...] = ()) -> None:
    """A safetensors file: the length of its header, the header as JSON, and the tensors' bytes."""
    header, parts, offset = {}, [], 0
    for name, shape in tensors.items():
        parts.append(bfloat16(f"tuned {name}" if name in tuned else name, math.prod(shape)))
        end = offset + len(parts[-1])
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(b"".join([struct.pack("<Q", len(encoded)), encoded, *parts]))
    print(f"wrote {path}: {len(tensors)} tensors, {offset / 2**20:.1f} MiB")


def write_both(folder: Path) -> None:
    """Write base.safetensors and tuned.safetensors."""
    base = shapes()
    last = f"layers.{LAYERS - 1}.attn"
    write(folder / "base.safetensors", base)
    more: Shapes = {"classifier.weight": (CLASSES, WIDTH)}
    write(folder / "tuned.safetensors", base | more, tuned=(f"{last}.q.weight", f"{last}.v.weight"))


def main() -> None:
    """Write both where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="where to [default: here]")
    write_both(parser.parse_args().folder)


if __name__ == "__main__":
    main()
