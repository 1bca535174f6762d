"""Attachments and tensors on the fake GPU, made of a manifest and segments without a daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

import weightd
from support import fakecuda
from support.gpu_segments import SIZE, attachment, check
from weightd.errors import FormatError

each_kind = pytest.mark.parametrize("kind", ["cuda_vmm", "cuda_ipc"])


@each_kind
def test_every_dtype_in_many_shapes(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        f"""
import torch
from weightd import _tensors
from support import fake_torch
fake_torch.install()
places, offset = {{}}, 256
for dtype, made in _tensors._DTYPES.items():
    for shape in [(), (8,), (3, 4), (2, 30, 70), (0,), (3, 0, 2)]:
        if dtype == "F4" and not shape:
            continue  # torch counts pairs, so there is no scalar
        elements = torch.Size(shape).numel()
        length = elements // 2 if dtype == "F4" else elements * made.itemsize
        # A truth value is 0 or 1: as the first 256 bytes are. Tensors of equal bytes have one place, too.
        place = 0 if dtype == "BOOL" and length <= 256 else offset
        places[f"{{dtype}} {{shape}}"] = dtype, shape, place, length
        if length and place:
            offset += (length + 255) // 256 * 256
with attachment({kind!r}, places) as attached:
    state = attached.state_dict()
assert list(state) == list(places)
pointers = set()
for name, (dtype, shape, offset, length) in places.items():
    tensor = state[name]
    assert tensor.dtype == _tensors._DTYPES[dtype], name
    assert tuple(tensor.shape) == ((*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape), name
    assert tensor.is_contiguous() and tensor.storage_offset() == 0, name
    assert tensor.untyped_storage().nbytes() == tensor.nbytes == length, name
    assert not tensor.requires_grad, name
    if length:
        there = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert there == contents(0)[offset : offset + length], name
        pointers.add(tensor.data_ptr())
assert len(pointers) == sum(bool(length) for *_, length in places.values()), "each name has its own address"
""",
    )


@each_kind
def test_private_copies_may_be_written_and_keep_nothing(kind: str, fake_driver: Path) -> None:
    output = check(
        fake_driver,
        f"""
from support import fake_torch
fake_torch.install()
attached = attachment({kind!r}, {{"a": ("U8", (256,), 256, 256), "b": ("F32", (2, 3), 512, 24)}})
copy, copies = attached.tensor("a", writable="copy"), attached.state_dict(writable="copy")
shared = attached.tensor("a")
for tensor in (copy, *copies.values()):
    tensor.zero_()
assert shared.tolist() == list(range(256))
del shared
attached.close()
assert mapped() == 0
assert not copy.any() and copies["b"].shape == (2, 3)
try:
    attached.tensor("a")
except weightd.InvalidReferenceError as error:
    print(error)
with attachment({kind!r}, {{"a": ("U8", (256,), 256, 256)}}) as attached:
    try:
        attached.tensor("a", writable="yes")
    except weightd.InvalidReferenceError as error:
        print(error)
""",
    )
    assert output.splitlines() == [
        "this attachment is closed; attach again",
        "writable 'yes': must be None or 'copy'",
    ]


@each_kind
def test_a_buffer_is_for_any_dlpack_consumer_and_needs_no_torch(kind: str, fake_driver: Path) -> None:
    output = check(
        fake_driver,
        f"""
import sys
with attachment({kind!r}, {{"a": ("U8", (256,), 256, 256), "empty": ("U8", (0,), 0, 0)}}) as attached:
    print(attached.kind, attached.device, attached)
    buffer = attached.buffer("a")
    assert attached.buffer("empty") == b""
assert type(buffer).__name__ == "Buffer" and buffer.__dlpack_device__() == (2, 0)
assert read(buffer) == bytes(range(256)), "after the attachment was closed"
assert "torch" not in sys.modules
""",
    )
    uuid = fakecuda.uuid(0)
    assert output == f"{kind} {uuid} <weightd.Attachment sha256:000000000000 on {uuid}: 2 tensors>\n"


@each_kind
def test_tensors_keep_memory_and_lease(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        f"""
import torch
from support import fake_torch
fake_torch.install()
with attachment({kind!r}, {{"a": ("U8", (256,), 256, 256), "b": ("U8", (256,), 512, 256)}}) as attached:
    tensor = torch.nn.Parameter(attached.tensor("a"), requires_grad=False)
part = tensor[5:10].detach()
del tensor
assert part.tolist() == [5, 6, 7, 8, 9]
assert mapped() == manifests() == 1
del part
assert mapped() == manifests() == 0
""",
    )


@each_kind
def test_the_interpreter_ends_silently_with_live_tensors(kind: str, fake_driver: Path) -> None:
    check(
        fake_driver,
        f"""
import sys, torch
from support import fake_torch
fake_torch.install()
attached = attachment({kind!r}, {{"a": ("U8", (256,), 256, 256), "b": ("U8", (256,), 256, 256)}})
state = attached.state_dict()
torch.kept = sys.kept = [torch.nn.Parameter(state["a"], requires_grad=False), state["b"][3:]]
state["cycle"] = state
attached.close()
""",
    )


@each_kind
def test_an_attach_that_fails_ends_its_lease_at_once(kind: str, fake_driver: Path) -> None:
    """Not when the last traceback is forgotten, which in a notebook may take for ever."""
    output = check(
        fake_driver,
        f"""
found = received({kind!r}, {fakecuda.uuid(0)!r}, {{"a": ("U8", (256,), 256, 256)}})
try:
    weightd.Attachment(found, None)
except weightd.DeviceMismatchError as error:
    kept = error
    print(str(error).partition(" (")[0])
assert mapped() == manifests() == 0
assert not any(os.path.exists(f"/proc/self/fd/{{number}}") for number in found.descriptors)
""",
        devices=2,
        visible="1",
    )
    assert output == f"{fakecuda.uuid(0)} is not visible to this process\n"


def test_a_torch_that_cannot_use_the_device_is_said_so(fake_driver: Path) -> None:
    output = check(
        fake_driver,
        """
with attachment("cuda_vmm", {"a": ("U8", (256,), 256, 256), "empty": ("U8", (0,), 0, 0)}) as attached:
    for name in ("a", "empty"):
        try:
            attached.tensor(name)
        except weightd.DeviceMismatchError as error:
            print(str(error).partition(": ")[0])
""",
    )
    assert output == "torch cannot use cuda:0\n" * 2


# -- without a driver --------------------------------------------------------------------------------------------------


def test_a_daemon_that_does_not_say_how_it_shares_has_host_memory() -> None:
    with attachment("host", {"a": ("U8", (4,), 256, 4)}, says="") as attached:
        assert attached.kind == "host"
        assert bytes(attached.buffer("a")) == bytes([0, 1, 2, 3])
        copy, shared = attached.tensor("a", writable="copy"), attached.tensor("a")
        copy.zero_()
        assert shared.tolist() == [0, 1, 2, 3]


def test_four_bit_floats_that_torch_cannot_pair_are_refused() -> None:
    with attachment("host", {"a": ("F4", (2, 3), 0, 3), "s": ("F4", (), 0, 1)}) as attached:
        for name in ("a", "s"):
            with pytest.raises(FormatError, match=rf"'{name}': torch holds F4 in pairs"):
                attached.tensor(name)


def test_only_the_manifest_gives_names_and_no_bytes() -> None:
    with attachment("host", {"a": ("U8", (SIZE,), 0, SIZE), "empty": ("U8", (0,), 0, 0)}, attach=False) as attached:
        assert [key.name for key in attached.tensors] == ["a", "empty"]
        with pytest.raises(weightd.NotFoundError, match="only the manifest"):
            attached.buffer("a")
        assert attached.tensor("empty").shape == (0,)
