"""The table of a load's tensors: what a loader must not say of them."""

from __future__ import annotations

import pytest

from weightd.errors import FormatError
from weightd_daemon.core.manifest import ContentFile
from weightd_daemon.loader._proto import loader_pb2 as wire
from weightd_daemon.loads.tensors import LoadTensors


def rows(file: int, name: str) -> wire.Tensors:
    return wire.Tensors(
        file=file, names=[name], dtypes=["U8"], ranks=[1], dimensions=[8], offsets=[0], lengths=[8],
    )  # fmt: skip


@pytest.mark.parametrize(("component", "where"), [("", ""), ("unet", " of component 'unet'")])
def test_a_tensor_of_a_component_is_in_one_file(component: str, where: str) -> None:
    """The loader sees to that, by the index; it may be broken."""
    tensors = LoadTensors()
    tensors.files += [
        ContentFile(component, "a", None),
        ContentFile(component, "b", None),
        ContentFile("vae", "a", None),
    ]
    tensors.add(rows(0, "w"))
    tensors.add(rows(2, "w"))
    label = f"{component}/b" if component else "b"
    with pytest.raises(FormatError, match=f"^{label}: tensor 'w' is in another file{where} too$"):
        tensors.add(rows(1, "w"))


def test_a_tensor_with_bytes_and_without_a_blob_is_not_sealed() -> None:
    tensors = LoadTensors()
    tensors.files.append(ContentFile("", "a", None))
    tensors.add(rows(0, "w"))
    with pytest.raises(RuntimeError, match="the loader left tensor 'w' without a blob"):
        tensors.content()
