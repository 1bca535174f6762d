"""What the bytes of an attachment are, wherever they lie."""

from __future__ import annotations

import ctypes

import weightd


def content(attachment: weightd.Attachment, name: str, component: str = "") -> bytes:
    """The bytes of one tensor, copied from the device where they lie on one."""
    memory = attachment.buffer(name, component)
    if isinstance(memory, memoryview):
        return bytes(memory)
    from weightd._mapping import cuda_driver

    found = bytearray(memory.size)
    ordinal = cuda_driver.ordinal_of(attachment.device)
    with cuda_driver.on_device(ordinal):
        target = ctypes.addressof(ctypes.c_char.from_buffer(found))
        cuda_driver.call("cuMemcpyDtoH", target, int(memory.handle), memory.size)
    return bytes(found)
