"""Wrap GPU memory in a `cuda.core.Buffer`, which every DLPack consumer accepts.

To be imported when the first buffer is made, not before: cuda-core is not installed everywhere. Nobody else is to
import that: a thread which imports it while another does sees half of it.
"""

from __future__ import annotations

from typing import Any, Final

from cuda.core import Buffer

from weightd._libc import address_of
from weightd.errors import DeviceError

from . import cuda_driver, cuda_streams

_CUDA: Final = 2
"""DLPack's kDLCUDA."""


def make_buffer(ordinal: cuda_driver.Ordinal, address: int, length: int, owner: object) -> Any:
    """A buffer that keeps `owner`. Errors: DeviceError, ForkedError."""
    # Its deleter is written in C: it is safe in any thread, and at the interpreter's end.
    buffer = Buffer.from_handle(address, length, owner=owner)
    with cuda_driver.on_device(ordinal):  # this thread may be one in which nobody has used the device so far
        try:
            kind, number = map(int, buffer.__dlpack_device__())  # asks the driver, and keeps the answer for consumers
        except Exception as error:  # cuda.core's own, which is not public
            code = str(error).partition(":")[0]
            raise DeviceError(
                f"cuPointerGetAttributes failed with {code}; see `nvidia-smi`",
                {"call": "cuPointerGetAttributes", "code": code},
            ) from error
    if (kind, number) != (_CUDA, ordinal):  # such as (1, 0), of which consumers make a tensor on the CPU
        raise DeviceError(
            f"the driver says that memory attached on cuda:{ordinal} is of another device: DLPack's ({kind}, {number})",
            {"call": "cuPointerGetAttributes"},
        )
    return buffer


def copy_to_host(buffer: Any) -> bytearray:
    """The bytes of a buffer that `make_buffer` made, copied. Errors: DeviceError, ForkedError."""
    found = bytearray(buffer.size)
    with (
        cuda_driver.on_device(buffer.device_id),
        cuda_streams.relaxed(),
        cuda_streams.own_stream() as stream,  # the default stream must not be used while a blocking one is captured
    ):
        cuda_driver.call("cuMemcpyDtoHAsync", address_of(found), int(buffer.handle), buffer.size, stream)
    return found
