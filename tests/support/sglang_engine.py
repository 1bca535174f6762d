"""One SGLang engine, with its scheduler and detokenizer in processes of their own, and what it answers.

Runs in a process that tests spawn (`support.engines`); `support.sglang_loads` does without the engine around a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from support.sglang_loads import ENGINE, WEIGHTD


def start(path: str, **options: Any) -> Any:
    """An engine for a checkpoint on weightd's memory. It is up when this returns; its `shutdown` ends it."""
    import sglang

    return sglang.Engine(model_path=path, **ENGINE | WEIGHTD | {"log_level": "info"} | options)


def answer(engine: Any, prompts: Iterable[Iterable[int]], tokens: int) -> list[tuple[list[int], list[float]]]:
    """The likeliest tokens after each prompt and the logarithms of their probabilities."""
    engine.flush_cache()  # or it would take what it has computed before
    answers = engine.generate(
        input_ids=[list(prompt) for prompt in prompts],
        sampling_params={"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        return_logprob=True,
    )
    return [(one["output_ids"], [found[0] for found in one["meta_info"]["output_token_logprobs"]]) for one in answers]
