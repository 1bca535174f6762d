"""One worker of the demo: a process that serves one checkpoint, as an inference server would.

    python _worker.py attached|private FOLDER NAME

It takes the weights (attached from the daemon under NAME, or read from FOLDER into memory of its own), computes
sentence embeddings, and then does what it is told on standard input, a line at a time: `memory`, `check`. It answers on
standard output, a line of JSON each, and ends when standard input does.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from _minilm import SENTENCES, WEIGHTS, build, embed
from safetensors.torch import load_file

import weightd

KIB = 1024


def memory() -> dict[str, int]:
    """Bytes of this process: PSS counts a page that n processes share as one n-th of it in each."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        key, value, *_ = line.split()
        fields[key.rstrip(":")] = int(value) * KIB
    return {"pss": fields["Pss"], "private_dirty": fields["Private_Dirty"], "daemon_memory_pss": _mapped_pss()}


def _mapped_pss() -> int:
    """The part of PSS that lies in the daemon's segments, which are memfds of this name."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):  # a mapping's first line
            inside = "/memfd:weightd" in line
        elif inside and key == "Pss:":
            total += int(rest[0]) * KIB
    return total


def touch(state: dict[str, torch.Tensor]) -> None:
    """Read every byte, so that all of the weights are in this process's memory, not only what four sentences need."""
    for tensor in state.values():
        tensor.sum()


def equal_bytes(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints have the same tensors, bit by bit."""
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype
        and mine[name].shape == theirs[name].shape
        and torch.equal(mine[name].reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8))
        for name in mine
    )


def same_memory(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    """Whether the model's parameters lie where the attached tensors lie."""
    return all(parameter.data_ptr() == state[name].data_ptr() for name, parameter in model.named_parameters())


def main(kind: str, folder: Path, name: str) -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with ExitStack() as stack:
        if kind == "attached":
            client = stack.enter_context(weightd.connect())
            attachment = stack.enter_context(client.attach(name))
            state = attachment.state_dict()
        else:
            state = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
        model = build(folder, state)
        touch(state)
        embeddings = embed(model, folder, SENTENCES)
        answer({"pid": os.getpid(), "tensors": len(state), "bytes": sum(tensor.nbytes for tensor in state.values())})
        for line in sys.stdin:
            if line.strip() == "memory":
                answer(memory())
            elif line.strip() == "check":
                private = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
                answer(
                    {
                        "weights_equal": equal_bytes(state, private),
                        "embeddings_equal": torch.equal(embeddings, embed(build(folder, private), folder, SENTENCES)),
                        "zero_copy": same_memory(model, state),
                        "similarity": (embeddings @ embeddings[0]).tolist(),
                        "norms": embeddings.norm(dim=1).tolist(),
                    }
                )


def answer(message: object) -> None:
    """Say something to the demo."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
