"""A vLLM engine in a process that tests spawn: it answers prompts, and says where its parameters lie.

The engine's core and worker run in the process itself, so that it is the one that maps weights. oneDNN is off in it
(`support.plugins`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support import memory

PROMPTS = ([504, 3575, 282, 4649, 314], [1604, 4128, 24, 94, 725], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
TOKENS = 16

_engine: Any = None


def arguments(path: str, load_format: str, **more: Any) -> dict[str, Any]:
    """What engines of these tests are started with."""
    return {
        "model": path,
        "load_format": load_format,
        "dtype": "bfloat16",
        "max_model_len": 256,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        **more,
    }


def start(path: str, load_format: str, **more: Any) -> None:
    """Start the process's engine."""
    global _engine
    from vllm import LLM

    _engine = LLM(disable_log_stats=True, **arguments(path, load_format, **more))


def answers() -> list[list[Any]]:
    """Tokens that follow each prompt, and the sum of their log-probabilities."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0, ignore_eos=True, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=list(one)) for one in PROMPTS]
    found = [one.outputs[0] for one in _engine.generate(prompts, sampling, use_tqdm=False)]
    return [[list(one.token_ids), one.cumulative_logprob] for one in found]


def in_worker(function: Callable[[Any], Any]) -> Any:
    """What a function of the worker's model returns."""
    (found,) = _engine.apply_model(function)
    return found


def places() -> list[list[Any]]:
    """Name, address and bytes of the storage of each parameter."""

    def look(model: Any) -> list[list[Any]]:
        named = ((name, one.untyped_storage()) for name, one in model.named_parameters())
        return [[name, storage.data_ptr(), storage.nbytes()] for name, storage in named if storage.nbytes()]

    found: list[list[Any]] = in_worker(look)
    return found


def sharing() -> dict[str, Any]:
    """The report on the model."""
    from weightd.integrations.vllm import report

    found = in_worker(report)
    return {"text": str(found), "shared": found.shared_bytes, "private": {one.name: one.reason for one in found.copied}}


def equal_to(files: list[str]) -> list[str]:
    """Stored tensors of files that are equal to the model's parameters of the same name."""
    import torch
    from safetensors.torch import load_file

    def compare(model: Any) -> list[str]:
        parameters = dict(model.named_parameters())
        stored = {name: one for file in files for name, one in load_file(file).items()}
        return [name for name, one in stored.items() if name in parameters and torch.equal(parameters[name], one)]

    found: list[str] = in_worker(compare)
    return found


def errors_of(function: Callable[[], object]) -> list[str]:
    """The class and the message of what a function raises, and of what caused that; empty if nothing."""
    try:
        function()
    except Exception as error:  # noqa: BLE001  # any error is the answer
        found: list[str] = []
        cause: BaseException | None = error
        while cause is not None:
            found.append(f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__ or cause.__context__
        return found
    return []


def refusal(path: str, extra: dict[str, Any], changes: dict[str, Any] | None = None, **more: Any) -> str:
    """The error of a load in this process, whose engine runs: its class and message; empty if there is none.

    `changes` are set in vLLM's configuration, by path (`model_config.enable_sleep_mode`), where it is more than a CPU
    lets it accept.
    """
    return (errors_of(lambda: load(path, extra, changes, **more)) or [""])[0]


def load(path: str, extra: dict[str, Any], changes: dict[str, Any] | None = None, **more: Any) -> Any:
    """Load one more model with weightd's loader, without an engine around it."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    config = configuration(path, extra, **more)
    for place, value in (changes or {}).items():
        *way, last = place.split(".")
        holder = config
        for name in way:
            holder = getattr(holder, name)
        object.__setattr__(holder, last, value)
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def configuration(path: str, extra: dict[str, Any], **more: Any) -> Any:
    """vLLM's configuration for a load from weightd with options."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**arguments(path, "weightd", model_loader_extra_config=extra, **more)).create_engine_config()


def measured_with(path: str) -> dict[str, int]:
    """Let vLLM's worker for GPUs prepare its device, and say what was mapped when it measured memory.

    All of its code runs but for what needs a GPU. `external` are the bytes that it counts as held outside.
    """
    import os
    from types import SimpleNamespace
    from unittest import mock

    import torch
    from vllm.v1.worker import gpu_worker

    config = configuration(path, {})
    config.load_config.device = "cpu"  # the memory that there is
    worker = object.__new__(gpu_worker.Worker)
    worker.__dict__.update(
        vllm_config=config, model_config=config.model_config, parallel_config=config.parallel_config,
        load_config=config.load_config, cache_config=config.cache_config, local_rank=0, rank=0,
        device_config=SimpleNamespace(device_type="cuda", device=None), distributed_init_method="",
        use_v2_model_runner=False,
    )  # fmt: skip
    found: dict[str, int] = {"before": memory.mappings(os.getpid())}

    def snapshot(device: torch.device) -> Any:
        found["measured"] = memory.mappings(os.getpid())
        return SimpleNamespace(device=device)

    def request(taken: Any, cache: Any, external: int = 0) -> int:
        found["external"] = external
        return 0

    nothing = mock.Mock()
    with (
        mock.patch.multiple(
            gpu_worker, init_worker_distributed_environment=nothing, warn_if_flashinfer_kernels_missing=nothing,
            set_random_seed=nothing, MemorySnapshot=snapshot, request_memory=request, current_platform=mock.Mock(
                logical_device_id_to_visible_device_id=lambda rank: rank
            ),
        ),
        mock.patch.multiple(
            torch.accelerator, device_count=lambda: 1, set_device_index=nothing, empty_cache=nothing
        ),
        mock.patch.object(gpu_worker.Worker, "_init_workspace_and_model_runner", nothing),
    ):  # fmt: skip
        worker.init_device()
    return found


def ahead_of_draft(path: str, draft: str) -> dict[str, int]:
    """Ask for the bytes of a model and its draft, then load both: what was said, and what was mapped at each step."""
    import os

    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model, get_model_loader

    speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": 2}
    config = configuration(path, {}, speculative_config=speculative)
    found = {"external": get_model_loader(config.load_config).get_external_weight_memory(config)}
    found["attached"] = memory.mappings(os.getpid())
    with set_current_vllm_config(config):
        models = [
            get_model(vllm_config=config),
            get_model(
                vllm_config=config, model_config=config.speculative_config.draft_model_config, prefix="draft_model"
            ),
        ]
    found["loaded"] = memory.mappings(os.getpid())
    found["parameters"] = sum(one.nbytes for model in models for one in model.parameters())
    return found
