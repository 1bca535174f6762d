"""FastAPI: all worker processes of a server answer from one copy of the weights.

    pip install '.[examples,torch]'
    weightd serve &
    python examples/_network.py network.safetensors
    export PYTHONPATH=examples CHECKPOINT=network.safetensors
    uvicorn --workers 4 fastapi_workers:app

With gunicorn the last line is

    gunicorn --workers 4 --worker-class uvicorn_worker.UvicornWorker fastapi_workers:app

Then: curl 'localhost:8000/scores?text=hello'
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from _network import attached, tokens_of
from fastapi import FastAPI, HTTPException

import weightd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Attach, in the worker: `lifespan` runs after the fork, also where gunicorn imports this file before it."""
    # A server that starts before the daemon waits for it. Nothing is served yet, so waiting holds nobody up.
    with (
        weightd.connect(fallback="wait") as client,
        client.attach(Path(os.environ["CHECKPOINT"]), device="cpu") as attachment,
    ):
        app.state.network = attached(attachment)
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/scores")
def scores(text: str) -> dict[str, object]:
    """Scores of a text, and which worker computed them. FastAPI runs this on a thread: the weights are for reading."""
    try:
        tokens = tokens_of(text)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    with torch.inference_mode():
        return {"pid": os.getpid(), "scores": app.state.network(tokens)[0].tolist()}
