"""Two vLLM models behind one address, one engine at a time: a request for the other model switches, as llama-swap does.

    pip install '.[daemon,torch]' vllm
    weightd serve --budget 20GiB &
    python examples/switched_engines.py --port 8000 base=org/name tuned=/models/tuned -- --max-model-len 4096

What comes after `--` goes to both servers. Then:

    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "tuned", "prompt": "Hello"}'

The weights of all models are loaded into weightd before the first request, and stay there when an engine ends: the next
engine attaches to them and reads no file. What models have in common is stored once. Weights that nobody uses give way
where the daemon's budget needs their memory, and come back from the files with the next switch; `--pin` keeps them.

A switch still takes what a start of vLLM takes without its weights: on a CPU most of that is importing it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple

import weightd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

START_SECONDS = 600.0
STOP_SECONDS = 60.0
_CHUNK = 64 << 10
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class EngineError(Exception):
    """A server of vLLM that does not start; the message says which."""


class _Running(NamedTuple):
    name: str
    port: int
    process: subprocess.Popen[bytes]


class Engines:
    """Servers of vLLM by the name of their model, of which one runs at a time. Used by many threads."""

    def __init__(self, models: Mapping[str, str], arguments: Sequence[str]) -> None:
        self.models = dict(models)
        self._arguments = list(arguments)
        self._turn = threading.Lock()  # held while a request waits for its engine: the requests behind it wait, too
        self._changed = threading.Condition()
        self._requests = 0
        # Not by a request's thread: the kernel may tie a process to the thread that has started it (PR_SET_PDEATHSIG).
        self._starter = ThreadPoolExecutor(1)
        self._running: _Running | None = None

    @contextlib.contextmanager
    def serving(self, name: str) -> Iterator[int]:
        """The port of the server for a model, which runs until the end of the block. Errors: EngineError."""
        with self._turn:
            running = self._running
            if running is None or running.name != name or running.process.poll() is not None:
                with self._changed:
                    self._changed.wait_for(lambda: self._requests == 0)
                self.stop()
                running = self._start(name)
            with self._changed:
                self._requests += 1
        try:
            yield running.port
        finally:
            with self._changed:
                self._requests -= 1
                self._changed.notify_all()

    def stop(self) -> None:
        """End the server that runs, with all of its processes: their memory must be free before the next one starts."""
        running, self._running = self._running, None
        if running is None:
            return
        running.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()

    def _start(self, name: str) -> _Running:
        start = time.monotonic()
        port = _free_port()
        # `vllm serve` is the same. The servers' log goes to ours.
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.models[name],
            "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), "--load-format", "weightd",
            *self._arguments,
        ]  # fmt: skip
        started = self._starter.submit(subprocess.Popen, command, stdout=sys.stderr, start_new_session=True)
        self._running = _Running(name, port, started.result())
        while not _is_healthy(port):
            if self._running.process.poll() is not None or time.monotonic() > start + START_SECONDS:
                self.stop()
                raise EngineError(f"the server of {name} did not start; its log says why")
            time.sleep(0.1)
        print(f"{name} is served after {time.monotonic() - start:.1f} s", flush=True)
        return self._running


class Handler(BaseHTTPRequestHandler):
    """Passes requests on to the server of the model that they name."""

    protocol_version = "HTTP/1.1"
    engines: Engines

    def do_GET(self) -> None:
        """List the models."""
        if self.path != "/v1/models":
            self._answer(404, {"error": {"message": f"{self.path}: only /v1/models can be read here"}})
            return
        self._answer(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.engines.models]})

    def do_POST(self) -> None:
        """Pass a request on, and what comes back as it comes, so that streams are streams."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            name = json.loads(body)["model"]
        except (ValueError, KeyError, TypeError):
            self._answer(400, {"error": {"message": 'the request must be a JSON object with a "model"'}})
            return
        if name not in self.engines.models:
            self._answer(404, {"error": {"message": f"no model {name!r}: there are {', '.join(self.engines.models)}"}})
            return
        try:
            with self.engines.serving(name) as port:
                self._pass_on(port, body)
        except EngineError as error:
            self._answer(503, {"error": {"message": str(error)}})

    def _pass_on(self, port: int, body: bytes) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            connection.request("POST", self.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            self.send_response(answer.status)
            for header, value in answer.getheaders():
                if header.lower() not in _HOP_BY_HOP:
                    self.send_header(header, value)
            self.send_header("Connection", "close")  # the end of the connection is that of the answer
            self.end_headers()
            while data := answer.read1(_CHUNK):
                self.wfile.write(data)
                self.wfile.flush()
        except (OSError, http.client.HTTPException) as error:
            self.log_error("the answer was cut off: %s", error)
        finally:
            self.close_connection = True
            connection.close()

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def load(models: Mapping[str, str], pin: bool) -> None:
    """Have the weights of all models in weightd before anybody asks for them."""
    with weightd.connect(fallback="wait") as client:
        for name, model in models.items():
            found = client.load_report(model, name=name, device="cpu", pin=pin)
            assert found is not None
            print(
                f"{name}: {found.total_bytes / 2**20:.1f} MiB, {found.read_bytes / 2**20:.1f} MiB read, "
                f"{found.unique_bytes / 2**20:.1f} MiB of memory taken", flush=True,
            )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _model(text: str) -> tuple[str, str]:
    name, separator, model = text.partition("=")
    if not (name and separator and model):
        raise argparse.ArgumentTypeError(f"{text!r}: must be NAME=MODEL")
    return name, model


def main() -> None:
    """Serve until a signal to end."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, for_engines = sys.argv[1:at], sys.argv[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=_model, metavar="NAME=MODEL", help="a folder, or org/name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free")
    parser.add_argument("--pin", action="store_true", help="never give up weights for other checkpoints")
    options = parser.parse_args(own)
    models = dict(options.models)
    load(models, options.pin)
    engines = Engines(models, for_engines)
    handler = type("Handler", (Handler,), {"engines": engines})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        with ThreadingHTTPServer((options.host, options.port), handler) as server:
            server.daemon_threads = True
            print(f"listening on http://{options.host}:{server.server_address[1]}", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        engines.stop()


if __name__ == "__main__":
    main()
