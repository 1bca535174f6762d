"""What an attachment of several components and files is asked for: names, metadata, bytes, views, addresses."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import weightd
from support import gpu_segments
from weightd._manifest import DTYPES
from weightd._mapping import host
from weightd._proto.v1 import handles_pb2
from weightd._transport.handle_socket import ReceivedDescriptors
from weightd.errors import DaemonUnreachableError, DeviceMismatchError, NotFoundError
from weightd.types import DerivedView, TensorKey

PAGE = 4096
GPU = "GPU-00000000-0000-0000-0000-000000000000"
ROWS = [  # file, name, dtype, shape, segment, offset, length
    (0, "q", "U8", (2, 128), 0, 0, 256),
    (0, "k", "U8", (2, 128), 0, 256, 256),
    (0, "again", "U8", (256,), 0, 256, 256),
    (1, "empty", "F32", (0, 4), 0, 0, 0),
    (2, "w", "U8", (256,), 1, 512, 256),
    (2, "blocks", "GGML_Q8_0", (2, 32), 1, 1024, 68),
]
FILES = [("unet", "a.safetensors", {"format": "pt"}), ("unet", "b.safetensors", None), ("vae", "c.gguf", {"k": "v"})]
CONTENTS = [bytes([number]) + os.urandom(PAGE - 1) for number in range(2)]
Attach = Callable[..., weightd.Attachment]


class Line:
    """A line to a daemon that is not there: what it was told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.detached: list[int] = []
        self._error = error

    def hold(self, lease: int, content_digest: str, device: str, mapping: object) -> None:
        pass

    def detach(self, lease: int) -> bool:
        self.detached.append(lease)
        if self._error is not None:
            raise self._error
        return True


def memfd(data: bytes) -> int:
    descriptor = os.memfd_create("t")
    os.write(descriptor, data)
    return descriptor


def manifest() -> handles_pb2.Manifest:
    return handles_pb2.Manifest(
        form=1, content_digest="sha256:" + "0" * 64, device="host", kind="host", components=["unet", "vae"],
        files=[
            handles_pb2.ManifestFile(
                component=int(component == "vae"), file=file, metadata=told or {}, has_metadata=told is not None
            )
            for component, file, told in FILES
        ],
        segment_bytes=[PAGE, PAGE], names=[row[1] for row in ROWS], file_indices=[row[0] for row in ROWS],
        dtypes=[DTYPES[row[2]] for row in ROWS], ranks=[len(row[3]) for row in ROWS],
        dimensions=[extent for row in ROWS for extent in row[3]], segments=[row[4] for row in ROWS],
        offsets=[row[5] for row in ROWS], lengths=[row[6] for row in ROWS], variants=[0] * len(ROWS),
        digests=bytes(16 * len(ROWS)),
        views=[handles_pb2.DerivedView(name="qk", component=0, members=[0, 1], shape=[4, 128])],
    )  # fmt: skip


def received(message: handles_pb2.Manifest, segments: list[int]) -> ReceivedDescriptors:
    data = message.SerializeToString()
    reply = handles_pb2.AttachReply(lease=7, manifest_bytes=len(data), segments=segments)
    descriptor = memfd(data)
    return ReceivedDescriptors(reply, descriptor, descriptor, [memfd(CONTENTS[number % 2]) for number in segments])


@pytest.fixture
def attach() -> Iterator[Attach]:
    """Attach all, or these components and tensors, with the segments that are sent."""
    made: list[weightd.Attachment] = []

    def of(
        *components: str, keys: list[tuple[str, str]] | None = None, sent: tuple[int, ...] = (0, 1), line: Any = None
    ) -> weightd.Attachment:
        wanted = frozenset(TensorKey(*key) for key in keys or [])
        answer = received(manifest(), list(sent))
        made.append(weightd.Attachment(answer, line or Line(), frozenset(components), wanted))
        return made[-1]

    yield of
    for attachment in made:
        attachment.close()


def address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


# -- names -------------------------------------------------------------------------------------------------------------


def test_of_several_components_one_is_to_be_named(attach: Attach) -> None:
    attachment = attach()
    assert attachment.components == ("unet", "vae")
    with pytest.raises(weightd.InvalidReferenceError, match="several components; say which: 'unet', 'vae'"):
        attachment.state_dict()
    with pytest.raises(NotFoundError, match=r"component 'text' is not attached; there are \['unet', 'vae'\]"):
        attachment.state_dict("text")
    state = attachment.state_dict("unet")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "q": (2, 128), "k": (2, 128), "again": (256,), "empty": (0, 4),
    }  # fmt: skip
    assert state["k"].data_ptr() != state["again"].data_ptr()
    assert bytes(state["k"].flatten().tolist()) == bytes(state["again"].tolist()) == CONTENTS[0][256:512]
    assert attach("vae").state_dict().keys() == {"w", "blocks"}


def test_a_tensor_that_is_not_attached_is_named_with_its_component(attach: Attach) -> None:
    attachment = attach(keys=[("unet", "q")])
    with pytest.raises(NotFoundError, match=r"^tensor 'k' of component 'unet' is not attached"):
        attachment.buffer("k", "unet")
    with pytest.raises(NotFoundError, match=r"^tensor 'q' is not attached"):
        attachment.tensor("q")


def test_bytes_are_those_of_the_tensor(attach: Attach) -> None:
    attachment = attach()
    assert bytes(attachment.buffer("w", "vae")) == CONTENTS[1][512:768]
    assert attachment.buffer("empty", "unet") == b""
    blocks = attachment.gguf_tensor("blocks", "vae")
    assert (blocks.type, blocks.shape, bytes(blocks.bytes)) == ("Q8_0", (2, 32), CONTENTS[1][1024:1092])


def test_private_copies_may_be_written_to(attach: Attach) -> None:
    attachment = attach()
    attachment.tensor("q", "unet", writable="copy").zero_()
    assert bytes(attachment.buffer("q", "unet")) == CONTENTS[0][:256]
    refused: Any = "yes"
    with pytest.raises(weightd.InvalidReferenceError, match="writable 'yes': must be None or 'copy'"):
        attachment.tensor("q", "unet", writable=refused)


def test_the_manifest_alone_has_no_bytes(attach: Attach) -> None:
    attachment = attach(sent=())
    for read in (attachment.buffer, attachment.tensor):
        with pytest.raises(NotFoundError, match="tensor 'q': only the manifest is attached"):
            read("q", "unet")
    assert attachment.tensor("empty", "unet").shape == (0, 4)
    attachment.populate()


def test_a_second_name_in_a_segment_that_was_not_sent_needs_no_mapping(attach: Attach) -> None:
    attachment = attach(sent=(1,))
    assert [one.size for one in attachment.ranges()] == [PAGE]
    assert bytes(attachment.buffer("w", "vae")) == CONTENTS[1][512:768]
    with pytest.raises(NotFoundError, match="tensor 'again': only the manifest is attached"):
        attachment.buffer("again", "unet")


# -- metadata ----------------------------------------------------------------------------------------------------------


def test_metadata_is_that_of_one_file(attach: Attach) -> None:
    attachment = attach()
    assert [file.file for file in attachment.files] == ["a.safetensors", "b.safetensors", "c.gguf"]
    assert attachment.metadata("unet", "a.safetensors") == {"format": "pt"}
    assert attachment.metadata("unet", "b.safetensors") is None
    found = attachment.metadata("vae")
    assert found == {"k": "v"}
    found.clear()
    assert attachment.metadata("vae") == {"k": "v"}, "it is the caller's own"


def test_metadata_of_no_file_and_of_several_is_refused(attach: Attach) -> None:
    attachment = attach()
    with pytest.raises(weightd.InvalidReferenceError, match=r"'unet' has 2 files; say which: 'a.safetensors', 'b.safe"):
        attachment.metadata("unet")
    with pytest.raises(NotFoundError, match=r"file 'c\.gguf' of component 'unet' is not in the checkpoint"):
        attachment.metadata("unet", "c.gguf")


# -- views -------------------------------------------------------------------------------------------------------------


def test_a_view_lies_on_its_members(attach: Attach) -> None:
    attachment = attach()
    assert attachment.views == {("unet", "qk"): DerivedView("unet", "qk", ("q", "k"), (4, 128))}
    view = attachment.view("qk", "unet")
    assert (tuple(view.shape), view.data_ptr()) == ((4, 128), attachment.tensor("q", "unet").data_ptr())
    assert bytes(view.flatten().tolist()) == CONTENTS[0][:512]
    copied = attachment.view("qk", "unet", writable="copy")
    assert copied.data_ptr() != view.data_ptr()
    assert torch.equal(copied, view)


def test_a_view_that_is_not_attached_is_named(attach: Attach) -> None:
    attachment = attach(keys=[("unet", "q")])
    with pytest.raises(NotFoundError, match=r"^view 'qk' of component 'unet' is not attached"):
        attachment.view("qk", "unet")
    with pytest.raises(NotFoundError, match=r"^view 'qk' is not attached"):
        attachment.view("qk")


# -- addresses ---------------------------------------------------------------------------------------------------------


def test_a_span_is_any_run_of_attached_bytes(attach: Attach) -> None:
    attachment = attach()
    at = address(attachment.buffer("q", "unet"))
    assert bytes(attachment.span(at + 200, 100) or b"") == CONTENTS[0][200:300]
    assert bytes(attachment.span(at, PAGE) or b"") == CONTENTS[0]
    first = min(one.address for one in attachment.ranges())
    for start, length in ((at, 0), (at, -1), (at, PAGE + 1), (first - 1, 1), (id(attachment), 1)):
        assert attachment.span(start, length) is None, (start - at, length)


def test_a_tensor_is_located_by_the_bytes_from_its_first_to_its_last_element(attach: Attach) -> None:
    attachment = attach()
    q, w = attachment.tensor("q", "unet"), attachment.tensor("w", "vae")
    both = attachment.view("qk", "unet")
    names = [TensorKey("unet", name) for name in ("q", "k")]
    assert attachment.locate(q) == (q.data_ptr(), 256, (names[0],))
    assert attachment.locate(both) == (q.data_ptr(), 512, tuple(names))
    assert attachment.locate(both[1:3, 5:9]) == (q.data_ptr() + 133, 132, tuple(names))
    assert attachment.locate(both[2:]) == (q.data_ptr() + 256, 256, (names[1],))
    blocks = attachment.tensor("blocks", "vae")
    assert attachment.locate(blocks) == (blocks.data_ptr(), 68, (TensorKey("vae", "blocks"),))
    assert attachment.locate(w[::2]) == (w.data_ptr(), 255, (TensorKey("vae", "w"),))
    elsewhere = [torch.ones(4), torch.ones(4, device="meta"), q[:0], attachment.tensor("empty", "unet")]
    assert [attachment.locate(tensor) for tensor in elsewhere] == [None] * 4


def test_attached_bytes_of_no_tensor_have_a_place_and_no_name(attach: Attach) -> None:
    attachment = attach()
    gap = attachment.span(address(attachment.buffer("w", "vae")) - 256, 16)
    assert isinstance(gap, memoryview)
    assert attachment.locate(torch.frombuffer(gap, dtype=torch.uint8)) == (address(gap), 16, ())


def test_pages_of_attached_tensors_are_populated(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(host, "populate_read", lambda address, size: asked.append((address, size)))
    attachment = attach("vae")
    attachment.populate()
    assert asked == [(address(attachment.buffer("w", "vae")) - 512, PAGE)]


# -- the end -----------------------------------------------------------------------------------------------------------


def test_a_closed_attachment_says_so_and_tensors_live_on(attach: Attach) -> None:
    with attach() as attachment:
        tensor = attachment.tensor("q", "unet")
        assert repr(attachment) == "<weightd.Attachment sha256:000000000000 on host: 6 tensors>"
        assert (attachment.torch_device, attachment.peers) == ("cpu", ())
    assert repr(attachment).endswith("on host: closed>")
    for use in (
        lambda: attachment.torch_device, lambda: attachment.peers, attachment.populate, attachment.ranges,
        lambda: attachment.buffer("q", "unet"), lambda: attachment.tensor("q", "unet"), attachment.state_dict,
        lambda: attachment.span(0, 1), lambda: attachment.locate(tensor), lambda: attachment.holds(0, 1),
    ):  # fmt: skip
        with pytest.raises(weightd.InvalidReferenceError, match="this attachment is closed; attach again"):
            use()
    assert bytes(tensor.flatten().tolist()) == CONTENTS[0][:256]


def test_the_end_is_told_once(attach: Attach) -> None:
    line = Line()
    attachment = attach(line=line)
    attachment.close()
    attachment.close()
    assert line.detached == [7]


@pytest.mark.parametrize("error", [BrokenPipeError("gone"), DaemonUnreachableError("gone")])
def test_a_daemon_that_has_gone_is_no_reason_not_to_close(error: Exception, attach: Attach) -> None:
    line = Line(error)
    attach(line=line).close()
    assert line.detached == [7]


def test_what_is_dropped_open_is_warned_of_and_the_daemon_hears_nothing() -> None:
    line: Any = Line()
    attachment = weightd.Attachment(received(manifest(), [0, 1]), line)
    with pytest.warns(ResourceWarning, match="unclosed <weightd.Attachment sha256:000000000000 on host: 6 tensors>"):
        del attachment
    assert line.detached == []


# -- answers that cannot be used ---------------------------------------------------------------------------------------


def refused(answer: ReceivedDescriptors, kind: type[Exception], says: str) -> None:
    """Nothing is left of it: descriptors are closed, nothing is mapped, and nobody warns of what was never attached."""
    line: Any = Line()
    with pytest.raises(kind, match=says):
        weightd.Attachment(answer, line)
    for descriptor in answer.descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_segment_that_the_manifest_does_not_have_is_refused() -> None:
    refused(received(manifest(), [0, 2]), weightd.ServerError, "has 2 segments, and the daemon sent others")


def test_a_lease_that_cannot_be_mapped_is_refused() -> None:
    answer = received(manifest(), [0, 1])
    reading, writing = os.pipe()
    os.close(writing)
    refused(answer._replace(lease=reading), OSError, r"mapping \d+ bytes failed: No such device")


def test_a_manifest_that_is_none_is_refused() -> None:
    answer = received(manifest(), [0, 1])
    os.pwrite(answer.manifest, b"\xff" * answer.reply.manifest_bytes, 0)
    refused(answer, weightd.ServerError, "the manifest cannot be decoded")


@pytest.mark.parametrize("sends", ["host", "handle"])  # of what kind its handles are, nobody knows
def test_a_kind_of_a_newer_daemon_is_refused(sends: str) -> None:
    with pytest.raises(DeviceMismatchError, match=r"GPU-.* shares its memory by 'cuda_fabric', which this version"):
        gpu_segments.attachment(sends, {"a": ("U8", (4,), 256, 4)}, says="cuda_fabric", device=GPU)


@pytest.mark.parametrize(("says", "sends"), [("cuda_ipc", "host"), ("cuda_vmm", "handle"), ("host", "handle")])
def test_handles_of_another_kind_are_refused(says: str, sends: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(weightd.ServerError, match=f"handles that are not those of {says}"):
        gpu_segments.attachment(sends, {"a": ("U8", (4,), 256, 4)}, says=says, device=GPU)
    assert set(os.listdir("/proc/self/fd")) == before
