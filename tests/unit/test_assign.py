"""Tensors put into torch modules: ties, buffers, gradients, and keys as torch reports them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightd
from support.daemon import Daemon
from weightd import _assign


class Tied(nn.Module):
    """An embedding whose weight is the head's as well, a norm with buffers, and a buffer that is in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(ids)))


Attach = Callable[..., weightd.Attachment]


@pytest.fixture
def attach(daemon: Daemon, tmp_path: Path) -> Attach:
    def make(**tensors: torch.Tensor) -> weightd.Attachment:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({name.replace("__", "."): tensor.detach().clone() for name, tensor in tensors.items()}, path)
        return daemon.connect().attach(path)

    return make


def stored(module: nn.Module, *without: str) -> dict[str, torch.Tensor]:
    return {name.replace(".", "__"): t for name, t in module.state_dict().items() if name not in without}


def test_parameters_are_assigned_tied_and_frozen_and_buffers_are_private(attach: Attach) -> None:
    source, module = Tied(), Tied()
    with attach(**stored(source, "head.weight")) as attachment:
        found = attachment.load_into(module)
        assert (found.missing_keys, found.unexpected_keys) == ([], [])
        assert module.head.weight is module.embedding.weight
        assert all(_assign.holds(attachment, parameter) for parameter in module.parameters())
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(_assign.holds(attachment, buffer) for buffer in module.buffers())
    ids = torch.tensor([[0, 1], [5, 2]]).flatten()
    assert torch.equal(module.eval()(ids), source.eval()(ids))
    assert torch.equal(module.norm.running_mean, source.norm.running_mean)


def test_a_module_without_memory_gets_all_of_it(attach: Attach) -> None:
    source = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with attach(**stored(source)) as attachment:
        attachment.load_into(module)
    assert torch.equal(module(torch.ones(3)), source(torch.ones(3)))


def test_keys_are_reported_as_torch_does(attach: Attach) -> None:
    source, module = nn.Linear(3, 4), nn.Linear(3, 4)
    with attach(weight=source.weight, extra=torch.zeros(2)) as attachment:
        with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"bias"(.|\n)*Unexpected key\(s\).*"extra"'):
            attachment.load_into(module)
        found = attachment.load_into(module, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["bias"], ["extra"])
    assert torch.equal(module.weight, source.weight)
    assert module.bias.requires_grad, "it is private, and may be trained"


def test_a_shape_that_does_not_fit_is_an_error(attach: Attach) -> None:
    wide = attach(weight=torch.zeros(4, 5), bias=torch.zeros(4))
    with wide as attachment, pytest.raises(RuntimeError, match="size mismatch for weight"):
        attachment.load_into(nn.Linear(3, 4), strict=False)


def test_only_memory_that_is_attached_is_held(attach: Attach) -> None:
    with attach(a=torch.arange(10.0)) as attachment:
        tensor = attachment.tensor("a")
        assert _assign.holds(attachment, tensor)
        assert _assign.holds(attachment, tensor[3:])
        assert not _assign.holds(attachment, tensor.clone())
        assert not attachment.holds(tensor.data_ptr(), 1 << 40)
    with pytest.raises(weightd.InvalidReferenceError, match="closed"):
        attachment.holds(0, 0)
