"""`python -m support.hardened UNIT COMMAND …`: a command under those of a unit's restrictions that need no systemd.

These are NoNewPrivileges=, MemoryDenyWriteExecute=, SystemCallFilter= and RestrictAddressFamilies=, which the kernel
keeps for the process and its children. systemd-analyze says what a group of system calls is, libseccomp makes the
filter. Exits with 77 and a reason where the machine lacks one of them.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CANNOT = 77
_KEPT = (
    "NoNewPrivileges=yes",
    "MemoryDenyWriteExecute=yes",
    "SystemCallFilter=@system-service",
    "RestrictAddressFamilies=AF_UNIX",
)
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_MDWE = 65  # Linux 6.3
_ALLOW, _EPERM, _EAFNOSUPPORT = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 97
_NOT_EQUAL, _EQUAL = 1, 4


class _Compare(ctypes.Structure):
    """libseccomp's `struct scmp_arg_cmp`: what an argument must be for a rule to apply."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def main() -> int:
    """Take the restrictions on, then become the command. The filter is systemd's for the native architecture."""
    unit = Path(sys.argv[1]).read_text().splitlines()
    for line in _KEPT:
        assert line in unit, f"{sys.argv[1]} does not say {line}"
    try:
        calls = {*_system_calls("@default"), *_system_calls("@system-service")}
        seccomp = ctypes.CDLL("libseccomp.so.2")
    except (OSError, subprocess.CalledProcessError) as error:
        return _cannot(str(error))
    libc = ctypes.CDLL(None)
    for option in (_PR_SET_NO_NEW_PRIVS, _PR_SET_MDWE):
        if libc.prctl(option, 1, 0, 0, 0):
            return _cannot(f"prctl({option}) is refused")
    _load(seccomp, calls)
    return os.execvp(sys.argv[2], sys.argv[2:])


def _load(seccomp: ctypes.CDLL, calls: set[str]) -> None:
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(_EPERM))
    for name in calls - {"socket"}:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # others belong to other architectures, or to newer libraries
            assert not seccomp.seccomp_rule_add_array(context, _ALLOW, number, 0, None), name
    number = seccomp.seccomp_syscall_resolve_name(b"socket")
    for operation, action in ((_NOT_EQUAL, _EAFNOSUPPORT), (_EQUAL, _ALLOW)):
        rule = (_Compare * 1)(_Compare(0, operation, socket.AF_UNIX, 0))
        assert not seccomp.seccomp_rule_add_array(context, action, number, 1, rule)
    assert not seccomp.seccomp_load(context)


def _system_calls(group: str) -> Iterator[str]:
    command = ["systemd-analyze", "syscall-filter", "--no-pager", group]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    for name in (line.strip() for line in lines[1:]):
        if name.startswith("@"):
            yield from _system_calls(name)
        elif name and not name.startswith("#"):
            yield name


def _cannot(reason: str) -> int:
    print(reason, file=sys.stderr)
    return CANNOT


if __name__ == "__main__":
    sys.exit(main())
