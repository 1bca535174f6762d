"""gunicorn with a WSGI application, such as one of Flask or Django: attach in `post_fork`.

    pip install '.[examples,torch]'
    weightd serve &
    python examples/_network.py network.safetensors
    export PYTHONPATH=examples CHECKPOINT=network.safetensors
    gunicorn --preload --workers 4 --config python:gunicorn_workers gunicorn_workers:app

Then: curl 'localhost:8000/scores?text=hello'

With --preload gunicorn imports this file once, in the process that forks the workers. A client that is connected there
raises ForkedError in every worker, and GPU memory does not survive a fork at all. What is attached there is also held
until gunicorn itself ends, not until its last worker does.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import torch
from _network import Network, attached, tokens_of

import weightd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_client: weightd.Client | None = None
_network: Network | None = None


def post_fork(server: Any, worker: Any) -> None:
    """Attach, in each worker. gunicorn finds this hook by its name."""
    global _client, _network
    _client = weightd.connect(fallback="wait")  # stays open: so a daemon that restarts learns which process this is
    with _client.attach(Path(os.environ["CHECKPOINT"]), device="cpu") as attachment:
        _network = attached(attachment)  # its parameters keep the memory, and the lease


def app(request: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Scores of a text, and which worker computed them."""
    assert _network is not None, "post_fork did not run: --config python:gunicorn_workers is missing"
    try:
        tokens = tokens_of(parse_qs(request["QUERY_STRING"]).get("text", [""])[0])
        with torch.inference_mode():
            status, answer = "200 OK", {"pid": os.getpid(), "scores": _network(tokens)[0].tolist()}
    except ValueError as error:
        status, answer = "422 Unprocessable Entity", {"detail": str(error)}
    body = json.dumps(answer).encode()
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
