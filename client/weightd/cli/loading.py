"""The long-running commands `load` and `verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from weightd import remembered
from weightd._sizes import size
from weightd.cli.books import check_books
from weightd.cli.context import (
    CommandInterruptedError,
    DeviceOption,
    FormatOption,
    LoadDeviceOption,
    OutputFormat,
    SilentOption,
    SocketOption,
    VariantOption,
    checkpoint_names,
    for_each,
    meant,
    open_client,
    say,
    saying_what_is_chosen,
)
from weightd.cli.output import device as short_device
from weightd.cli.output import digest, emit, emit_json, plural, printable
from weightd.cli.progress import byte_bar
from weightd.errors import InvalidReferenceError
from weightd.resolve import files_of
from weightd.types import LoadProgress, LoadResult, VerifyProgress


def load(
    context: typer.Context,
    references: Annotated[
        list[str], typer.Argument(metavar="REF...", help="Files, directories or org/name[@revision].")
    ],
    name: Annotated[
        str | None, typer.Option("--name", "-n", metavar="NAME", help="Name of the checkpoint; with one REF only.")
    ] = None,
    variant: VariantOption = None,
    device: LoadDeviceOption = None,
    pin: Annotated[bool, typer.Option("--pin", help="Protect the checkpoint from eviction.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the checkpoint is resident.")] = True,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte, even of known, unchanged files.")] = False,
    output: FormatOption = OutputFormat.TABLE,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the content digest.")] = False,
    socket: SocketOption = None,
) -> None:
    """Load checkpoints into the daemon's memory.

    REF is a safetensors or GGUF file, a directory with the weights of one model or pipeline, or org/name[@revision] in
    the local Hugging Face cache. A directory that contains several models is refused: name each model.

    \b
    Examples:
      weightd load base.safetensors --name base
      weightd load org/name --variant fp16 --pin
      weightd load model.gguf other/ --device host
    """
    if name is not None and len(references) > 1:
        raise typer.BadParameter(f"names one checkpoint, but {len(references)} are given", param_hint="--name")
    found: list[dict[str, Any]] = []

    with open_client(context, socket) as client:

        def load_one(reference: str) -> None:
            try:
                with saying_what_is_chosen(quiet=quiet), byte_bar(quiet=quiet) as advance:

                    def show(progress: LoadProgress) -> None:
                        if advance is not None:
                            advance(f"{progress.phase} {name or reference}", progress.done_bytes, progress.total_bytes)

                    result = client.load_report(
                        reference if variant is None else files_of(reference, variant),
                        name=name,
                        device=device,
                        pin=pin,
                        detached=not wait,
                        verify=verify,
                        groups=remembered.groups_for if remembered.exist() else (),
                        on_progress=None if advance is None else show,
                    )
            except KeyboardInterrupt:
                # The client that closes on the way out is what cancels: the last waiter to leave ends a load.
                raise CommandInterruptedError(
                    f"interrupted: the load of {reference} is cancelled unless other processes wait for it"
                ) from None
            found.append({"name": name or reference, "state": "loading"} if result is None else asdict(result))
            if output is OutputFormat.TABLE:
                _print(name or reference, result, quiet=quiet)

        code = for_each(context, references, load_one)
    if output is OutputFormat.JSON:
        emit_json(found)
    raise typer.Exit(code)


def _print(name: str, result: LoadResult | None, *, quiet: bool) -> None:
    if result is None:
        if not quiet:
            emit(f"loading {printable(name)}; `weightd ls` shows its state, and the daemon's log reports a failure")
    elif quiet:
        emit(result.content_digest)
    else:
        emit(
            f"loaded {printable(result.name) or digest(result.content_digest)} on {short_device(result.device)}: "
            f"{plural(result.tensors, 'tensor')}, {size(result.total_bytes)}, shared {size(result.shared_bytes)}, "
            f"read {size(result.read_bytes)} in {result.seconds:.1f} s"
        )
        others = f"{result.evicted_others} of other users" if result.evicted_others else ""
        if gone := ", ".join(filter(None, (*(digest(name) for name in result.evicted), others))):
            say(f"evicted {gone} to make room")


def verify(
    context: typer.Context,
    reference: Annotated[
        str | None,
        typer.Argument(
            metavar="[REF]",
            autocompletion=checkpoint_names,
            help="Name, content digest, file or directory [default: all checkpoints].",
        ),
    ] = None,
    device: DeviceOption = None,
    variant: VariantOption = None,
    books: Annotated[
        bool, typer.Option("--books", help="Compare the daemon's books with the kernel instead. For admins.")
    ] = False,
    output: FormatOption = OutputFormat.TABLE,
    quiet: SilentOption = False,
    socket: SocketOption = None,
) -> None:
    """Check resident bytes against their digests.

    Reads all resident bytes, and exits with 1 if any differ. With --books, reads none, and compares what the daemon
    believes to hold with the memory, descriptors and locks that the kernel and the devices know of.

    \b
    Examples:
      weightd verify                 every checkpoint
      weightd verify base
      weightd verify --books
    """
    if books:
        if reference is not None or device is not None or variant is not None:
            raise InvalidReferenceError("--books checks the whole daemon: leave REF, --device and --variant out")
        check_books(context, output, socket, quiet=quiet)
        return
    with open_client(context, socket) as client, byte_bar(quiet=quiet) as advance:

        def show(progress: VerifyProgress) -> None:
            if advance is not None:
                advance("verifying", progress.done_bytes, progress.total_bytes)

        asked = None if reference is None else meant(reference, variant)
        result = client.verify(asked, device, on_progress=None if advance is None else show)
    if output is OutputFormat.JSON:
        emit_json({"blobs": result.done_blobs, "bytes": result.done_bytes})
    elif not quiet:
        emit(f"verified {plural(result.done_blobs, 'blob')}, {size(result.done_bytes)}: clean")
