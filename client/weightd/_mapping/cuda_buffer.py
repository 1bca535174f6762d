"""Wrap GPU memory in a `cuda.core.Buffer`, which every DLPack consumer accepts.

To be imported when the first buffer is made, not before: cuda-core is not installed everywhere. Nobody else is to
import that: a thread which imports it while another does sees half of it.
"""

from __future__ import annotations

from typing import Any

from cuda.core import Buffer

from weightd._libc import address_of
from weightd.errors import DeviceError

from . import cuda_driver


def make_buffer(ordinal: cuda_driver.Ordinal, address: int, length: int, owner: object) -> Any:
    """A buffer that keeps `owner`. Errors: DeviceError, ForkedError."""
    # Its deleter is written in C: it is safe in any thread, and at the interpreter's end.
    buffer = Buffer.from_handle(address, length, owner=owner)
    with cuda_driver.on_device(ordinal):  # this thread may be one in which nobody has used the device so far
        try:
            buffer.__dlpack_device__()  # asks the driver about the address; the answer is kept for DLPack consumers
        except Exception as error:  # cuda.core's own, which is not public
            code = str(error).partition(":")[0]
            raise DeviceError(
                f"cuPointerGetAttributes failed with {code}; see `nvidia-smi`",
                {"call": "cuPointerGetAttributes", "code": code},
            ) from error
    return buffer


def copy_to_host(buffer: Any) -> bytearray:
    """The bytes of a buffer that `make_buffer` made, copied. Errors: DeviceError, ForkedError."""
    found = bytearray(buffer.size)
    with cuda_driver.on_device(buffer.device_id):
        cuda_driver.call("cuMemcpyDtoH", address_of(found), int(buffer.handle), buffer.size)
    return found
