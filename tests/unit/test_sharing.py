"""Reports of what a module shares: they look, so casts, moves, replacements and writes are in them."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightd
from support.daemon import Daemon
from support.descriptors import open_descriptors
from weightd._mapping import ranges
from weightd.integrations import sharing

WIDE = 64 * 1024
"""Bytes of each weight below: whole pages, whatever a page is."""


class Pair(nn.Module):
    """Two weights of the same size, and a buffer of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.rand(64, 256))
        self.other = nn.Parameter(torch.rand(64, 256))
        self.register_buffer("scale", torch.ones(3))


@pytest.fixture
def load(daemon: Daemon, tmp_path: Path) -> Callable[[nn.Module], nn.Module]:
    def of(module: nn.Module) -> nn.Module:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({name: tensor.detach().clone() for name, tensor in module.state_dict().items()}, path)
        with daemon.connect().attach(path) as attachment:
            attachment.load_into(module)
            sharing.remember(module, attachment, lambda name, _: f"because of {name}")
        return module

    return of


Load = Callable[[nn.Module], nn.Module]


def private(module: nn.Module) -> dict[str, tuple[int, str]]:
    return {one.name: (one.nbytes, one.reason) for one in sharing.report(module).copied}


def test_a_module_that_was_just_loaded_is_shared(load: Load) -> None:
    found = sharing.report(load(Pair()))
    assert (found.shared_bytes, found.copied, found.missing, found.writes_seen) == (2 * WIDE, (), (), True)
    assert str(found) == "100 % of the parameters shared: 128 KiB, 0 B private"


@pytest.mark.parametrize(
    ("change", "reason", "size"),
    [
        (lambda module: module.half(), "cast to float16 since it was loaded", WIDE // 2),
        (lambda module: module.to("meta"), "on torch's meta device: it has no bytes", WIDE),
        (
            lambda module: setattr(module, "one", nn.Parameter(torch.ones(64, 256))),
            "replaced since it was loaded",
            WIDE,
        ),
        (
            lambda module: setattr(module, "one", nn.Parameter(torch.ones(2, 3))),
            "replaced since it was loaded by one of shape (2, 3)",
            24,
        ),
        (lambda module: setattr(module.one, "data", module.one.data.clone()), "replaced since it was loaded", WIDE),
    ],
)
def test_what_was_changed_since_is_private(
    load: Load, change: Callable[[nn.Module], object], reason: str, size: int
) -> None:
    module = load(Pair())
    change(module)
    assert private(module)["one"] == (size, reason)


def test_what_is_added_is_named(load: Load) -> None:
    module = load(Pair())
    module.adapter = nn.Linear(2, 2, bias=False)
    assert private(module) == {"adapter.weight": (16, "added since it was loaded")}


def test_what_is_written_to_is_private_by_the_page(load: Load) -> None:
    module = load(Pair())
    page = mmap.PAGESIZE
    with torch.no_grad():
        module.one[0, 0] = 7
        module.one[-1, -1] = 7
    why = "written to, or beside it in a page of memory"
    assert private(module) == {"one": (2 * page, why)}
    with torch.no_grad():
        module.one.mul_(2)
    assert private(module) == {"one": (WIDE, why)}
    found = sharing.report(module)
    assert (found.shared_bytes, found.shared_ratio) == (WIDE, 0.5)
    assert str(found) == f"50 % of the parameters shared: 64.0 KiB, 64.0 KiB private: one ({why})"


def test_memory_that_is_gone_makes_nothing_shared_that_comes_to_lie_there(load: Load) -> None:
    """What is mapped anew may get an address that was attached memory before."""
    module = load(Pair())
    place = sharing._place(module.one)
    assert place is not None
    (before,) = [one for one in sharing._alive() if sharing._inside(ranges.MappedExtents([one]), place)]
    module.float()
    module.half()
    gc.collect()
    assert before.owner() is None
    assert not sharing._inside(ranges.MappedExtents(sharing._alive()), place)
    assert not sharing.is_shared(module)


def test_a_part_and_a_whole_of_what_was_loaded(load: Load) -> None:
    whole = nn.Sequential(load(Pair()), nn.Linear(2, 2, bias=False))
    assert private(whole) == {"1.weight": (16, "it was not loaded through weightd, or is private now")}
    inner = nn.Sequential(Pair())
    assert sharing.report(load(inner)[0]).shared_ratio == 1.0


def test_a_private_module_may_be_trained_and_keeps_no_lease(load: Load, daemon: Daemon) -> None:
    module = load(Pair())
    module.other.requires_grad_(False)
    assert sharing.is_shared(module)
    sharing.make_private(module)
    assert module.one.requires_grad
    assert not sharing.is_shared(module)
    with pytest.raises(weightd.InvalidReferenceError, match="was not loaded through weightd, or is private now"):
        sharing.report(module)
    gc.collect()
    assert daemon.connect().leases() == []


def test_reasons_and_what_the_checkpoint_lacks(daemon: Daemon, tmp_path: Path) -> None:
    module = Pair()
    save_file({"one": module.one.detach()}, tmp_path / "one.safetensors")
    with daemon.connect().attach(tmp_path / "one.safetensors") as attachment:
        attachment.load_into(module, strict=False)
        sharing.remember(module, attachment, lambda name, _: f"because of {name}", ["other", "scale"])
    found = sharing.report(module)
    assert found.copied == (sharing.CopiedTensor("other", WIDE, "because of other"),)
    assert found.missing == ("other", "scale")
    assert found.buffers == (sharing.CopiedTensor("scale", 12, "not in the checkpoint: the framework has made it"),)
    assert str(found) == (
        "50 % of the parameters shared: 64.0 KiB, 64.0 KiB private: other (because of other); "
        "the checkpoint lacks scale"
    )


def test_hundred_percent_is_all_of_it() -> None:
    almost = sharing.SharingReport((1 << 30) - 1, (sharing.CopiedTensor("bias", 1, "why"),))
    assert str(almost) == "99.9 % of the parameters shared: 1.00 GiB, 1 B private: bias (why)"
    assert sharing.SharingReport(0).shared_ratio == 1.0


def test_where_the_kernel_does_not_tell_the_report_says_so(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "written", lambda address, length: None)
    found = sharing.report(load(Pair()))
    assert (found.shared_ratio, found.writes_seen) == (1.0, False)
    assert str(found).endswith("; this system does not tell what has been written to since")


def test_written_pages_count_by_the_bytes_that_are_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_CHUNK", 2)  # pages; so that several reads are put together
    page = mmap.PAGESIZE
    descriptor = os.memfd_create("pages")
    try:
        os.ftruncate(descriptor, 8 * page)
        memory = mmap.mmap(descriptor, 8 * page, mmap.MAP_PRIVATE)
    finally:
        os.close(descriptor)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    start = tensor.data_ptr()
    assert int(tensor.sum()) == 0  # read, and not written
    assert ranges.written(start, 8 * page) == 0
    tensor[3 * page] = 1
    tensor[7 * page] = 1
    assert ranges.written(start, 8 * page) == 2 * page
    assert ranges.written(start, 7 * page) == page
    assert ranges.written(start + 3 * page + 10, 20) == 20
    assert ranges.written(start + 2 * page + 10, page) == 10
    assert ranges.written(start + 3 * page + 10, page) == page - 10


def refuse(*_: object) -> int:
    raise PermissionError("/proc is restricted")


@pytest.mark.parametrize(("name", "answer"), [("open", refuse), ("pread", refuse), ("pread", lambda *_: b"short")])
def test_what_was_written_is_not_known_where_the_kernel_does_not_tell(
    name: str, answer: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    with monkeypatch.context() as restricted:
        restricted.setattr(os, name, answer)
        assert ranges.written(id(before), 1) is None
    assert open_descriptors() == before
