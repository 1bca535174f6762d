"""SGLang engines with all of their processes on weightd's memory: alone, beside vLLM, and without the daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.daemon import Daemon, eventually
from support.engine_models import SMOLLM2
from support.engines import EngineProcess, sglang_environment
from support.memory import segments_of, written

TOKENS = 16
PROMPTS = ((504, 357, 282, 464, 314), (1, 2, 3, 4, 5, 6, 7, 8))
"""Token ids that a tiny vocabulary has, too."""
TEXT = (504, 3575, 282, 4649, 314)
"""SmolLM2's tokens of "The capital of France is", after which the likeliest tokens are likely by far."""


class Serving(NamedTuple):
    """A front end of SGLang with one engine on weightd's memory, and what SGLang's own load answers to prompts."""

    process: EngineProcess
    prompts: tuple[tuple[int, ...], ...]
    alone: list[Any]
    weights: int

    def answers_as_alone(self) -> bool:
        """Whether tokens are equal, and logarithms of probabilities but for the order in which they are summed."""
        found = self.process.run(
            "result = sglang_engine.answer(engine, prompts, tokens)", prompts=self.prompts, tokens=TOKENS
        )
        return len(found) == len(self.alone) and all(
            mine == theirs and len(mine) == TOKENS and likely == pytest.approx(alone, abs=1e-5)
            for (mine, likely), (theirs, alone) in zip(found, self.alone, strict=True)
        )


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    found = Daemon()
    yield found
    found.close(check=False)


@pytest.fixture(scope="module")
def front_end(daemon: Daemon, engine_folder: Path) -> Iterator[EngineProcess]:
    """A process in which engines of SGLang are started, one after the other."""
    found = EngineProcess(daemon.socket, engine_folder, sglang_environment(engine_folder))
    try:
        found.run("from support import sglang_engine, sglang_loads")
        yield found
    finally:
        found.close()


def serve(front_end: EngineProcess, path: Path, *prompts: tuple[int, ...]) -> Serving:
    """Let SGLang answer that loads by itself, then start an engine on weightd's memory."""
    alone = front_end.run(
        "result = sglang_loads.answer_alone(path, prompts, tokens)", path=str(path), prompts=prompts, tokens=TOKENS
    )
    front_end.run("engine = sglang_engine.start(path)")
    return Serving(front_end, prompts, alone, (path / "model.safetensors").stat().st_size)


def scheduler_of(daemon: Daemon) -> int:
    """The process of the only lease, by `weightd ps`."""
    with daemon.connect() as client:
        (lease,) = client.leases()
    assert lease.command.startswith("sglang::scheduler")
    assert lease.pid is not None
    return lease.pid


def test_experts_are_served_as_sglang_does_alone(
    daemon: Daemon, front_end: EngineProcess, checkpoints: dict[str, Path]
) -> None:
    serving = serve(front_end, checkpoints["mixtral"], *PROMPTS)
    assert serving.answers_as_alone()
    assert segments_of(scheduler_of(daemon)) >= 0.99 * serving.weights
    front_end.run("engine.shutdown()")
    with daemon.connect() as client:
        eventually(lambda: not client.leases(), what="the lease ends with the engine")


@pytest.fixture(scope="module")
def serving(front_end: EngineProcess, checkpoints: dict[str, Path]) -> Serving:
    """SmolLM2, for all tests below."""
    return serve(front_end, checkpoints[SMOLLM2], TEXT, *PROMPTS)


def test_it_answers_as_sglang_does_alone(serving: Serving) -> None:
    assert serving.answers_as_alone()


def test_the_lease_is_the_schedulers_and_its_weights_are_the_stores(daemon: Daemon, serving: Serving) -> None:
    assert serving.answers_as_alone()
    scheduler = scheduler_of(daemon)
    assert scheduler != serving.process.pid
    assert segments_of(scheduler) >= 0.99 * serving.weights
    assert written(scheduler) == 0
    assert segments_of(serving.process.pid) == 0, "the front end attaches nothing"


def test_new_weights_are_refused_and_the_engine_goes_on(serving: Serving, checkpoints: dict[str, Path]) -> None:
    refused = serving.process.run(
        "done, why, *_ = engine.update_weights_from_disk(path); result = [done, why]", path=str(checkpoints[SMOLLM2])
    )
    assert refused[0] is False
    assert "lie on weightd's memory" in refused[1]
    assert serving.answers_as_alone()


@pytest.fixture(scope="module")
def beside(
    daemon: Daemon, serving: Serving, engine_folder: Path, checkpoints: dict[str, Path]
) -> Iterator[EngineProcess]:
    """A process with vLLM on the same checkpoint, while SGLang serves."""
    found = EngineProcess(daemon.socket, engine_folder)
    try:
        found.run(
            "from support import vllm_serving; vllm_serving.start(path, 'weightd')", path=str(checkpoints[SMOLLM2])
        )
        yield found
    finally:
        found.close()


def answer_of_vllm(process: EngineProcess) -> list[int]:
    """The likeliest tokens after the text."""
    found: list[int] = process.run("result = vllm_serving.answers()[vllm_serving.PROMPTS.index(text)][0]", text=TEXT)
    return found


def test_vllm_and_sglang_serve_one_copy(daemon: Daemon, serving: Serving, beside: EngineProcess) -> None:
    """Each has the whole checkpoint mapped, and nothing of it is its own. oneDNN is off in vLLM."""
    assert serving.answers_as_alone()
    assert answer_of_vllm(beside) == serving.alone[0][0]
    with daemon.connect() as client:
        leases = client.leases()
    assert len(leases) == 2
    assert len({lease.checkpoint for lease in leases}) == 1
    pids = [lease.pid for lease in leases if lease.pid is not None]
    assert beside.pid in pids
    assert all(segments_of(pid) >= 0.99 * serving.weights for pid in pids)
    assert sum(written(pid) for pid in pids) == 0
    assert sum(segments_of(pid, "Pss") for pid in pids) <= 1.01 * serving.weights, "one copy in both"


def test_both_go_on_without_the_daemon(daemon: Daemon, serving: Serving, beside: EngineProcess) -> None:
    daemon.kill()
    assert serving.answers_as_alone()
    assert answer_of_vllm(beside) == serving.alone[0][0]
