"""Models of every type that transformers knows, loaded through the store and by transformers itself: bit for bit."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import weightd
from support import shrunk
from support.backends import HOST
from support.daemon import Daemon
from support.shared import SharedDaemons

SHARDS = 24
OTHERS = ("bert", "t5", "gpt2", "llama", "llava", "whisper", "clip", "mamba", "dinov3_vit", "vit", "wav2vec2")


@pytest.fixture
def here(shared_daemons: SharedDaemons) -> Iterator[Daemon]:
    with shared_daemons.on(HOST) as daemon:
        yield daemon


def compare(daemon: Daemon, kind: str, dtype: torch.dtype, folder: Path) -> tuple[int, list[str]]:
    """Load each class of a type in both ways. Returns how many were compared, and what is wrong."""
    from weightd.integrations.transformers import from_pretrained

    done, wrong = 0, []
    for cls in shrunk.classes(kind):
        called = f"{kind} {cls.__name__} {dtype}"
        model = shrunk.build(cls, kind, dtype)
        where = folder / cls.__name__
        if model is None or not shrunk.save(model, where):
            continue
        try:
            theirs, told = cls.from_pretrained(where, dtype=dtype, output_loading_info=True)
        except Exception:  # noqa: BLE001  # what transformers cannot load of its own is nobody's to compare with
            continue
        with weightd.connect(daemon.socket) as client:
            ours, said = from_pretrained(where, model_class=cls, client=client, output_loading_info=True)
            made = set(told["missing_keys"])  # at random, by each
            if found := [name for name in shrunk.differences(ours, theirs) if name not in made]:
                wrong.append(f"{called}: {len(found)} differ, as {found[0]}")
            if any(set(said[keys]) != set(told[keys]) for keys in ("missing_keys", "unexpected_keys")):
                wrong.append(f"{called}: other keys are missing or unexpected")
        done += 1
        del model, theirs, ours
        gc.collect()
    return done, wrong


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers warns of much that its own classes do."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.callback(logging.set_verbosity, before)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", OTHERS)
def test_some_types(here: Daemon, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    done, wrong = compare(here, kind, dtype, tmp_path)
    assert not wrong
    assert done


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_type(here: Daemon, shard: int, dtype: torch.dtype, tmp_path: Path) -> None:
    done, wrong = 0, []
    for kind in shrunk.types()[shard::SHARDS]:
        compared, found = compare(here, kind, dtype, tmp_path / kind)
        done += compared
        wrong += found
    assert not wrong
    assert done > 5
