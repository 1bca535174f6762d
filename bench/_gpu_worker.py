"""The processes of bench/gpu.py: each does one thing on the GPU with torch, and prints what it found as JSON.

hold context|attached|private SOCKET NAME FILE…   say "ready", keep it until stdin ends
attach SOCKET NAME ROUNDS                         milliseconds of each step
compute SOCKET FILE ROUNDS SIDE                   equal results, and milliseconds of a product; weights go to FILE
model SOCKET FILE ROUNDS WIDTH                    the same for a transformers model
rates FILE                                        seconds of a pinned copy and of safetensors.torch.load_file
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

import weightd
import weightd.torch
from weightd import attachment
from weightd._mapping import cuda_driver
from weightd._transport import handle_socket

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "cuda:0"
COPY_PIECE = 64 << 20
STEPS: list[tuple[Any, str, str]] = [
    (handle_socket.SocketClient, "__init__", "connect and hello"),
    (handle_socket.SocketClient, "attach", "request, answer and descriptors"),
    (cuda_driver, "import_descriptor", "import"),
    (cuda_driver.MappedAddressRange, "__init__", "reserve addresses"),
    (cuda_driver.MappedAddressRange, "map", "map"),
    (cuda_driver.MappedAddressRange, "allow", "set access"),
    (cuda_driver, "release", "release"),
    (attachment, "_tensors", "manifest: columns to rows"),
    (attachment.Attachment, "state_dict", "make the tensors"),
]


def ready() -> None:
    """Make torch's context, on which nobody's clock runs."""
    torch.zeros(1, device=DEVICE)
    torch.cuda.synchronize()


def hold(kind: str, socket: str, name: str, *files: str) -> None:
    """Keep a context, an attached checkpoint or a private copy."""
    ready()
    with ExitStack() as stack:
        kept: list[Any] = []
        if kind == "private":
            kept += [load_file(file, device=DEVICE) for file in files]
        elif kind == "attached":
            client = stack.enter_context(weightd.connect(socket))
            attached = stack.enter_context(client.attach(name, device=DEVICE))
            kept += [attached.tensor(each, component) for component, each in attached.tensors]
        torch.cuda.synchronize()
        print("ready", flush=True)
        sys.stdin.read()
        kept.clear()


def attach(socket: str, name: str, rounds: str) -> list[dict[str, float]]:
    """Milliseconds of each round: the whole by itself, then the parts of another one."""
    ready()
    found = []
    for _ in range(int(rounds) + 1):
        total = _attach(socket, name)
        seconds: defaultdict[str, float] = defaultdict(float)
        originals = [getattr(owner, attribute) for owner, attribute, _ in STEPS]
        for (owner, attribute, label), original in zip(STEPS, originals, strict=True):
            setattr(owner, attribute, _timed(original, label, seconds))
        clocked = _attach(socket, name)
        for (owner, attribute, _), original in zip(STEPS, originals, strict=True):
            setattr(owner, attribute, original)
        steps = {label: seconds[label] * 1e3 for _, _, label in STEPS}
        found.append({"total": total, **steps, "everything else": clocked - sum(steps.values())})
    return found[1:]


def _attach(socket: str, name: str) -> float:
    gc.collect()
    start = time.perf_counter()
    client = weightd.connect(socket)
    attached = client.attach(name, device=DEVICE)
    state = attached.state_dict()
    milliseconds = (time.perf_counter() - start) * 1e3
    assert sum(tensor.numel() for tensor in state.values())
    state.clear()
    attached.close()
    client.close()
    return milliseconds


def _timed(function: Callable[..., Any], label: str, seconds: defaultdict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[label] += time.perf_counter() - start

    return timed


def compute(socket: str, file: str, rounds: str, side: str) -> dict[str, Any]:
    """A product with a square matrix of chance, attached and private."""
    ready()
    torch.manual_seed(0)
    private, other = (torch.randn(int(side), int(side), device=DEVICE).to(torch.bfloat16) for _ in range(2))
    save_file({"weight": private.cpu()}, file)
    with weightd.connect(socket) as client, client.attach(file, device=DEVICE) as attached:
        return _compare(lambda weight: other @ weight, attached.tensor("weight"), private, int(rounds))


def _compare(run: Callable[[Any], torch.Tensor], ours: Any, private: Any, rounds: int) -> dict[str, Any]:
    """Both in turns."""
    equal = torch.equal(run(ours), run(private))
    milliseconds: dict[str, list[float]] = {"attached": [], "private": []}
    for _ in range(rounds):
        for label, weights in (("attached", ours), ("private", private)):
            times = []
            for _ in range(5):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run(weights)
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            milliseconds[label].append(statistics.median(times))
    return {"equal": equal, "ms": milliseconds}


def model(socket: str, file: str, rounds: str, width: str) -> dict[str, Any]:
    """A Llama with weights of chance, saved, loaded and attached, beside a private one."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return {"skipped": "transformers is not installed"}
    ready()
    config = LlamaConfig(
        vocab_size=32000, hidden_size=int(width), intermediate_size=int(width) * 3, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=8,
    )  # fmt: skip
    torch.manual_seed(0)
    private = LlamaForCausalLM(config).to(torch.bfloat16).to(DEVICE).eval()
    save_file({key: value.contiguous().cpu() for key, value in private.state_dict().items()}, file)
    tokens = torch.randint(0, 32000, (1, 512), device=DEVICE)
    with weightd.connect(socket) as client, client.attach(file, device=DEVICE) as attached, torch.no_grad():
        ours = LlamaForCausalLM(config).to(torch.bfloat16).to(DEVICE).eval()
        ours.load_state_dict(attached.state_dict(), assign=True)
        return _compare(lambda network: network(tokens).logits, ours, private, int(rounds))


def rates(file: str) -> None:
    """For each line of stdin, "copy" or "load_file", print how many seconds it took."""
    ready()
    size = Path(file).stat().st_size
    buffers = [torch.empty(COPY_PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        if line.strip() == "copy":
            kept: Any = torch.empty(size, dtype=torch.uint8, device=DEVICE)
            for number, piece in enumerate(kept.split(COPY_PIECE)):
                piece.copy_(buffers[number % 2][: piece.numel()], non_blocking=True)
        else:
            kept = load_file(file, device=DEVICE)
        torch.cuda.synchronize()
        print(time.perf_counter() - start, flush=True)
        del kept
        torch.cuda.empty_cache()


if __name__ == "__main__":
    works: dict[str, Callable[..., Any]] = {
        "hold": hold, "attach": attach, "compute": compute, "model": model, "rates": rates,
    }  # fmt: skip
    found = works[sys.argv[1]](*sys.argv[2:])
    if found is not None:
        print(json.dumps(found))
