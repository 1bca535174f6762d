"""Models that SGLang loads by itself and on weightd's memory, in one process, and what differs between the two.

Runs in a process that tests spawn (`support.engines`), without SGLang's scheduler around it: `compare` calls what the
scheduler calls for a model, and computes with it.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from support.memory import Segments
from weightd.integrations.sharing import report

PROMPTS = ((504, 357, 282, 464, 314), (1, 2, 3, 4, 5, 6, 7, 8))
"""Token ids that every vocabulary of the tests has."""
TOKENS = 8

ENGINE = {
    "attention_backend": "torch_native",
    "context_length": 512,
    "device": "cpu",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "dtype": "bfloat16",
    "max_total_tokens": 2048,
    "sampling_backend": "pytorch",
    "skip_tokenizer_init": True,
}
"""Settings of SGLang with which it serves on a CPU, without kernels of its own."""


WEIGHTD = {"model_loader_extra_config": '{"weightd": {}}'}


class Served(NamedTuple):
    """A model that has computed: the likeliest tokens after each prompt, and logits by step, prompt and token."""

    model: torch.nn.Module
    loader: Any
    tokens: list[list[int]]
    logits: torch.Tensor


def compare(path: str, computing: bool = True) -> dict[str, Any]:
    """Load a checkpoint both ways, compute with it, and say what came of it, in JSON's types.

    `unequal` names parameters and buffers that differ. `total` and `shared` are bytes of the parameters after they were
    computed with; `private` has name, bytes and reason of each that is in no segment of the daemon. `tokens` and
    `logits` say whether those are equal. `preloaded` is what SGLang is told was there before it measured its memory.
    """
    own, ours = (serve(path, computing, **options) for options in ({}, WEIGHTD))
    segments = Segments(os.getpid())
    reasons = {one.name: one.reason for one in report(ours.model).copied}
    total, shared, private = 0, 0, []
    for name, parameter in ours.model.named_parameters():
        total += parameter.nbytes
        if segments.hold(parameter.data_ptr(), parameter.nbytes):
            shared += parameter.nbytes
        else:
            private.append((name, parameter.nbytes, reasons.get(name, "")))
    mine, theirs = _values(ours.model), _values(own.model)
    result = {
        "class": type(ours.model).__name__,
        "unequal": sorted(
            name for name in mine.keys() | theirs.keys()
            if name not in mine or name not in theirs or not torch.equal(mine[name], theirs[name])
        ),
        "compared": len(mine),
        "total": total,
        "shared": shared,
        "private": private,
        "tokens": ours.tokens == own.tokens,
        "logits": torch.equal(ours.logits, own.logits),
        "preloaded": ours.loader.preloaded_weights_bytes,
    }  # fmt: skip
    del own, ours, mine, theirs
    gc.collect()
    return result


def serve(
    path: str, computing: bool = True, prompts: Iterable[Iterable[int]] = PROMPTS, tokens: int = TOKENS, **options: Any
) -> Served:
    """Load a model as SGLang's scheduler does, and let it answer prompts, unless it is not to compute."""
    from sglang.benchmark.one_batch import decode, extend
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    runner = load(path, **options)
    if not computing:
        return Served(runner.model, runner.loader, [], torch.empty(0))
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    requests = []
    for number, prompt in enumerate(prompts):
        request = Req(
            rid=number,
            origin_input_text="",
            origin_input_ids=array("q", prompt),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=tokens),
        )
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        request.extend_end = len(request.origin_input_ids)
        requests.append(request)
    chosen, logits, batch = extend(requests, runner)
    steps, every = [chosen.tolist()], [logits]
    for _ in range(tokens - 1):
        chosen, logits = decode(chosen, batch, runner)
        steps.append(chosen.tolist())
        every.append(logits)
    return Served(runner.model, runner.loader, [list(one) for one in zip(*steps, strict=True)], torch.stack(every))


def answer_alone(path: str, prompts: Iterable[Iterable[int]], tokens: int) -> list[tuple[list[int], list[float]]]:
    """The likeliest tokens after each prompt and the logarithms of their probabilities, of SGLang's own load."""
    found = serve(path, prompts=prompts, tokens=tokens)
    likely = found.logits.float().log_softmax(-1)
    return [
        (chosen, [likely[step, number, token].item() for step, token in enumerate(chosen)])
        for number, chosen in enumerate(found.tokens)
    ]


def load(path: str, **options: Any) -> Any:
    """SGLang's runner of a model, which has loaded it."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, get_resources, publish
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    settings = ServerArgs(model_path=path, **ENGINE | options)
    settings.resolve_once()
    publish(settings, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    port = _free_port()
    if not bootstrap._PARALLEL_INITIALISED:
        bootstrap.init_parallel_runtime(server_args=settings, device="cpu", dist_port=port)
    config = ModelConfig.from_server_args(settings)
    bootstrap.init_layer_runtime(model_config=config)
    get_resources().expert_location_metadata = None  # of the model before
    logging.getLogger().setLevel(logging.WARNING)
    return ModelRunner(model_config=config, mem_fraction_static=0.5, gpu_id=0, nccl_port=port, server_args=settings)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
