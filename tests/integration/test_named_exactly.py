"""What is named is what is loaded, in every door: nothing stands for its parent, links lead where the kernel goes."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import weightd.torch
from support import models
from support.backends import HOST
from support.daemon import Daemon
from support.shared import SharedDaemons
from support.worker import Worker

ATTEMPT = """
import transformers
from support import models; models.quiet()
import weightd.integrations.transformers as ours
import weightd.integrations.diffusers as pipelines
cls = transformers.LlamaForCausalLM
def attempt(call, *arguments, **options):
    try:
        return str(call(*arguments, **options).lm_head.weight.sum().item())
    except Exception as error:
        return type(error).__name__
def installed(reference):
    ours.install()
    try:
        return attempt(cls.from_pretrained, reference)
    finally:
        ours.uninstall()
"""


@pytest.fixture(scope="module")
def importing(shared_daemons: SharedDaemons) -> Iterator[Worker]:
    """A process that has transformers and diffusers in memory, which takes seconds."""
    with shared_daemons.on(HOST) as daemon:
        worker = Worker(daemon.socket)
        worker.run(ATTEMPT)
        yield worker
        worker.close()


@pytest.fixture
def daemon(shared_daemons: SharedDaemons, importing: Worker) -> Iterator[Daemon]:
    with shared_daemons.on(HOST) as found:
        yield found
        importing.run("import gc; gc.collect()")
        gc.collect()


@pytest.fixture
def worker(daemon: Daemon, importing: Worker) -> Worker:
    return importing


def test_nothing_stands_for_its_parent(worker: Worker, tmp_path: Path) -> None:
    """A checkpoint that is gone below a model, a file beside a model's, a component that a pipeline lacks."""
    output = models.write("llama", tmp_path)
    other = models.write("llama-tied", tmp_path)
    shutil.copy(other / "model.safetensors", output / "tuned.safetensors")
    (output / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
    named = [str(output / "checkpoint-500"), str(output / "tuned.safetensors"), str(output)]
    found: Any = worker.run(
        """
result = [[attempt(ours.from_pretrained, one, model_class=cls), attempt(pipelines.from_pretrained, one),
           installed(one), attempt(cls.from_pretrained, one)] for one in named]
""",
        named=named,
    )
    gone, tuned, whole = found
    assert gone == ["NotFoundError", "NotFoundError", "OSError", "OSError"]
    assert tuned[:2] == ["InvalidReferenceError"] * 2
    assert tuned[2] == tuned[3]  # whatever transformers makes of a file
    assert whole[0] == whole[2] == whole[3]


def test_links_lead_where_the_kernel_goes(
    worker: Worker, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTD_SOCKET", str(daemon.socket))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "release/v2").mkdir(parents=True)
    (tmp_path / "current").symlink_to("release/v2")
    shutil.move(models.write("llama", tmp_path), tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "release/m")
    state = safetensors.torch.load_file("m/model.safetensors")
    state["lm_head.weight"] += 1
    safetensors.torch.save_file(state, "release/m/model.safetensors", {"format": "pt"})
    wanted = safetensors.torch.load_file("release/m/model.safetensors")["lm_head.weight"]
    reference = "current/../m/model.safetensors"
    for one in (reference, f"{tmp_path}/{reference}", Path(reference)):
        assert torch.equal(weightd.torch.load_file(one)["lm_head.weight"], wanted)
    daemon.command("load", f"{tmp_path}/current/../m", "--name", "linked")
    with daemon.connect() as client, client.attach("linked") as attachment:
        assert torch.equal(attachment.tensor("lm_head.weight"), wanted)
    found = worker.run("result = [attempt(ours.from_pretrained, one), attempt(cls.from_pretrained, one)]",
                       one=f"{tmp_path}/current/../m")  # fmt: skip
    assert found == [str(wanted.sum().item())] * 2
    os.remove(tmp_path / "m/model.safetensors")
    assert torch.equal(weightd.torch.load_file(reference)["lm_head.weight"], wanted)


def test_an_overlay_is_what_transformers_takes(worker: Worker, daemon: Daemon, tmp_path: Path) -> None:
    """The index names another file for a tensor that a shard still has; a load has made all of it resident before."""
    folder = models.write("llama", tmp_path, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {file: safetensors.torch.load_file(folder / file) for file in set(index["weight_map"].values())}
    old = stored[index["weight_map"]["lm_head.weight"]]["lm_head.weight"]
    safetensors.torch.save_file({"lm_head.weight": old + 1}, folder / "model-overlay.safetensors", {"format": "pt"})
    index["weight_map"]["lm_head.weight"] = "model-overlay.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(folder / "model-overlay.safetensors", folder / "consolidated.safetensors")
    with daemon.connect() as client:
        before = client.load(folder)
        assert (before.tensors, len(stored) > 2) == (len(index["weight_map"]), True)
        weights = "result = [installed(one), str(cls.from_pretrained(one).lm_head.weight.sum().item())]"
        found = worker.run(weights, one=str(folder))
        assert found == [str((old + 1).sum().item())] * 2
        assert [checkpoint.content_digest for checkpoint in client.checkpoints()] == [before.content_digest]
