"""Two vLLM models behind one budget, switched by a request's model: examples/switched_engines.py, as its user runs it.

oneDNN is off: with it vLLM's CPU backend packs linear weights anew, and shares none of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from support.daemon import ROOT, Daemon, environment, eventually
from support.engine_models import CHANGED, FINE_TUNE, SMOLLM2
from support.leash import leashed

SECONDS = 300.0
"""To wait for an answer that an engine has to be started for: several processes import vLLM."""
OTHER = "llama"
SLACK = 1 << 20
"""Less than any of the models takes, and than what only the fine-tune has; more than what lies between tensors."""
PROMPT = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


class Switch:
    """The script with its engines."""

    def __init__(self, daemon: Daemon, variables: dict[str, str], folder: Path, models: dict[str, Path]) -> None:
        self.log = folder / "log"
        command = [
            sys.executable, str(ROOT / "examples" / "switched_engines.py"), "--port", "0",
            *(f"{name}={path}" for name, path in models.items()), "--", "--enforce-eager", "--max-model-len", "256",
        ]  # fmt: skip
        held = ROOT / "tests" / "support" / "held"  # it holds each engine to the script, also when that is killed
        more = {
            "PYTHONPATH": os.pathsep.join([variables["PYTHONPATH"], str(held)]),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", "XDG_CACHE_HOME": str(folder),
        }  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                leashed(command), stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment(daemon.socket) | variables | more,
            )  # fmt: skip
        self.said: list[str] = []

    def listen(self) -> None:
        """Read what it prints, until it listens."""
        assert self.process.stdout is not None
        while not self.said or not self.said[-1].startswith("listening on "):
            line = self.process.stdout.readline()
            assert line, self.log.read_text()[-4000:]
            self.said.append(line)

    def ask(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer to a request for completions."""
        address = self.said[-1].split()[-1]
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def text(self, model: str) -> str:
        """What a model answers."""
        status, answer = self.ask({"model": model} | PROMPT)
        assert status == 200, (answer, self.log.read_text()[-4000:])
        found: str = answer["choices"][0]["text"]
        return found

    def close(self) -> None:
        """End it, which ends its engines."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.process.kill()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


def stored_bytes(path: Path, names: tuple[str, ...] = ()) -> int:
    """Bytes of a checkpoint's tensors, or of those."""
    with safe_open(path / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in names or file.keys())


@pytest.fixture
def switch(
    start_daemon: Callable[..., Daemon], checkpoints: dict[str, Path], engine_variables: dict[str, str], tmp_path: Path
) -> Iterator[tuple[Switch, Daemon]]:
    """Base and fine-tune behind a budget that holds both, and most of another model."""
    both = stored_bytes(checkpoints[SMOLLM2]) + stored_bytes(checkpoints[FINE_TUNE], CHANGED)
    daemon = start_daemon(budget=both + stored_bytes(checkpoints[OTHER]) - SLACK)
    models = {"base": checkpoints[SMOLLM2], "tuned": checkpoints[FINE_TUNE]}
    switch = Switch(daemon, engine_variables, tmp_path, models)
    yield switch, daemon
    switch.close()


@pytest.mark.slow
def test_a_switch_reads_nothing_and_what_does_not_fit_evicts_the_model_that_is_not_served(
    switch: tuple[Switch, Daemon], checkpoints: dict[str, Path]
) -> None:
    script, daemon = switch
    script.listen()
    base, changed = stored_bytes(checkpoints[SMOLLM2]), stored_bytes(checkpoints[FINE_TUNE], CHANGED)
    assert changed > SLACK, "then the other model fits once the base has gone"

    with daemon.connect() as client:
        read = sum(event.read_bytes for event in client.events())
        assert script.ask({"model": "absent"})[0] == 404
        assert script.ask({"prompt": "for whom?"})[0] == 400
        assert client.leases() == [], "no engine runs until one is asked for"

        assert "Paris" in script.text("base")
        (lease,) = client.leases()
        assert lease.checkpoint == "base"
        tuned = script.text("tuned")
        (lease,) = client.leases()
        assert lease.checkpoint == "tuned", "the engine of the base has ended"

        assert sum(event.read_bytes for event in client.events()) == read, "both engines have found their weights"
        stats = client.stats()
        assert base + changed <= stats.resident_bytes <= base + changed + SLACK, "what is common is stored once"
        assert stats.evictions == 0

        client.load(checkpoints[OTHER], name="other")
        assert {name for one in client.checkpoints() for name in one.names} == {"tuned", "other"}
        (device,) = client.stats().devices
        assert device.used_bytes <= device.budget_bytes
        assert script.text("tuned") == tuned, "what is served stays"

        shares = re.findall(r"weightd: LlamaForCausalLM: ([\d.]+) % of the parameters shared", script.log.read_text())
        assert len(shares) == 2
        assert min(map(float, shares)) > 99
        script.process.send_signal(signal.SIGTERM)
        script.process.wait(SECONDS)
        eventually(
            lambda: "tuned" not in {lease.checkpoint for lease in client.leases()},
            what="the engine has ended",
        )
