"""The commands `pin`, `unpin` and `rm`, which change whether a checkpoint stays resident."""

from __future__ import annotations

import typer

from weightd._sizes import size
from weightd.cli.context import (
    DeviceOption,
    ReferenceArgument,
    ReferencesArgument,
    SilentOption,
    SocketOption,
    VariantOption,
    for_each,
    meant,
    open_client,
)
from weightd.cli.output import emit, printable


def pin(
    context: typer.Context,
    reference: ReferenceArgument,
    device: DeviceOption = None,
    variant: VariantOption = None,
    quiet: SilentOption = False,
    socket: SocketOption = None,
) -> None:
    """Protect a checkpoint from eviction until it is unpinned.

    \b
    Examples:
      weightd pin base
      weightd pin org/name --device cuda:0
    """
    with open_client(context, socket) as client:
        client.pin(meant(reference, variant), device)
    if not quiet:
        emit(f"pinned {printable(reference)}")


def unpin(
    context: typer.Context,
    reference: ReferenceArgument,
    device: DeviceOption = None,
    variant: VariantOption = None,
    quiet: SilentOption = False,
    socket: SocketOption = None,
) -> None:
    """Allow a checkpoint to be evicted again.

    \b
    Examples:
      weightd unpin base
    """
    with open_client(context, socket) as client:
        info = client.unpin(meant(reference, variant), device)
    if not quiet:
        others = "; other users keep it pinned" if info.pinned else ""
        emit(f"unpinned {printable(reference)}{others}")


def rm(
    context: typer.Context,
    references: ReferencesArgument,
    device: DeviceOption = None,
    variant: VariantOption = None,
    quiet: SilentOption = False,
    socket: SocketOption = None,
) -> None:
    """Remove checkpoints.

    Continues after an error, and exits with the code of the first error.

    \b
    Examples:
      weightd rm base tuned
      weightd rm base.safetensors --device host
    """
    with open_client(context, socket) as client:

        def remove(reference: str) -> None:
            freed = client.remove(meant(reference, variant), device)
            if not quiet:
                emit(f"removed {printable(reference)}, freed {size(freed)}")

        code = for_each(context, references, remove)
    raise typer.Exit(code)
