"""How long `weightd plan --scan --headers` takes for a thousand checkpoints.

    python bench/plan.py [--checkpoints 1000] [--families 20]

The checkpoints have the headers of transformer models of 32 layers and files of the right length, which are holes: with
`--headers` nothing else is read. A family has one width; its members could all be fine-tunes of one another.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, VOCABULARY = 32, 32_000


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a model of this width."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        found |= {f"{prefix}.mlp.{name}_proj.weight": (4 * width, width) for name in ("gate", "up")}
        found[f"{prefix}.mlp.down_proj.weight"] = (width, 4 * width)
        found |= {f"{prefix}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (VOCABULARY, width)}


def write(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file in bfloat16 whose tensors are a hole."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.parent.mkdir(parents=True)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    os.truncate(path, 8 + len(encoded) + offset)


def main() -> None:
    """Write the files, and time the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--families", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weightd-bench-") as folder:
        for number in range(options.checkpoints):
            width = 1024 + 64 * (number % options.families)
            write(Path(folder, f"model-{number:04}", "model.safetensors"), shapes(width))
        command = [
            sys.executable,
            "-m",
            "weightd",
            "plan",
            "--scan",
            folder,
            "--headers",
            "--budget=80GiB",
            "--format=json",
        ]
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        seconds = time.perf_counter() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads(done.stdout)
    print(
        f"{len(report['checkpoints'])} checkpoints of {options.families} families: {seconds:.1f} s, "
        f"{used.ru_utime + used.ru_stime:.1f} s of CPU time"
    )
    print(f"total {report['total_bytes'] / 2**40:.1f} TiB, saved at most {report['saved_ratio'] * 100:.1f} %")


if __name__ == "__main__":
    main()
