"""One SGLang engine, with its scheduler and detokenizer in processes of their own, and what it answers.

Runs in a process that tests spawn (`support.engines`); `support.sglang_loads` does without the engine around a model.
"""

from __future__ import annotations

from typing import Any

from support.sglang_loads import ENGINE, PROMPTS

TOKENS = 16


def start(path: str, **options: Any) -> Any:
    """An engine for a checkpoint. It is up when this returns; `shutdown` ends it."""
    import sglang

    return sglang.Engine(model_path=path, **ENGINE | {"log_level": "warning"} | options)


def answer(engine: Any) -> list[tuple[list[int], list[float]]]:
    """The tokens after each prompt, the most likely ones, and the logarithms of their probabilities."""
    engine.flush_cache()  # or it would remember what it has computed
    answers = engine.generate(
        input_ids=[list(prompt) for prompt in PROMPTS],
        sampling_params={"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
        return_logprob=True,
    )
    return [(one["output_ids"], [found[0] for found in one["meta_info"]["output_token_logprobs"]]) for one in answers]


def alone(path: str) -> list[tuple[list[int], list[float]]]:
    """What SGLang answers that has loaded a checkpoint by itself."""
    engine = start(path)
    try:
        return answer(engine)
    finally:
        engine.shutdown()
