"""The command `plan` computes savings from files alone. It needs neither a running daemon nor a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from weightd._sizes import size
from weightd.cli.context import CommandOptions, FormatOption, OutputFormat, VariantOption, WideOption, say
from weightd.cli.daemon import require_daemon
from weightd.cli.output import emit, emit_json, plural
from weightd.cli.progress import byte_bar
from weightd.cli.tables import Column, emit_table, emit_text, terminal_width
from weightd.errors import WeightdError, from_wire

_Json = dict[str, Any]

_CHECKPOINT_COLUMNS = (
    Column("CHECKPOINT", elided=True),
    Column("TENSORS", right=True, spare=2),
    Column("SIZE", right=True),
    Column("SHARED", right=True),
    Column("WITH", spare=1),
)
_COMPONENT_COLUMNS = (
    Column("COMPONENT", elided=True),
    Column("OF", elided=True),
    Column("TENSORS", right=True, spare=1),
    Column("SIZE", right=True),
    Column("SHARED", right=True),
)
_PAIR_COLUMNS = (
    Column("SHARED", right=True),
    Column("BETWEEN", elided=True),
    Column("AND", elided=True),
    Column("WHAT", elided=True),
)


def plan(
    context: typer.Context,
    references: Annotated[
        list[str] | None, typer.Argument(metavar="REF", help="Files, directories or org/name[@revision].")
    ] = None,
    manifest: Annotated[
        list[str] | None,
        typer.Option("--manifest", metavar="FILE", help="Plan the checkpoints of a workload manifest; repeatable."),
    ] = None,
    variant: VariantOption = None,
    state_dir: Annotated[
        str | None,
        typer.Option("--state-dir", metavar="DIR", help="Directory of the digest index [default: as for `serve`]."),
    ] = None,
    output: FormatOption = OutputFormat.TABLE,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the total.")] = False,
    wide: WideOption = False,
) -> None:
    """Report what sharing would save, without a daemon.

    REF is a safetensors or GGUF file, a directory with the weights of one model or pipeline, or org/name[@revision] in
    the local Hugging Face cache. A directory that contains several models is refused: name each model.

    \b
    Examples:
      weightd plan base.safetensors tuned.safetensors
      weightd plan org/base org/tuned --format json
      weightd plan --manifest workload.json
    """
    if not references and not manifest:
        raise typer.BadParameter("give at least one reference, or --manifest", param_hint="REF")
    require_daemon("plan")
    settings: CommandOptions = context.obj
    arguments = [f"--manifest={file}" for file in manifest or ()]
    arguments += [] if state_dir is None else [f"--state-dir={state_dir}"]
    arguments += [] if variant is None else [f"--variant={variant}"]
    arguments += ["--debug"] if settings.debug else []
    with byte_bar(quiet=quiet) as advance:

        def show(done: int, total: int) -> None:
            if advance is not None:
                advance("hashing", done, total)

        found = _ask([*arguments, "--", *(references or ())], show)
    if output is OutputFormat.JSON:
        emit_json(found)
        return
    width = terminal_width(wide=wide)
    if not quiet:
        _print_checkpoints(found["checkpoints"], width)
        _print_pairs(found["pairs"], width)
        emit("")
    emit_text(
        f"{plural(len(found['checkpoints']), 'checkpoint')}, total {size(found['total_bytes'])}, "
        f"unique {size(found['unique_bytes'])}, "
        f"saved {size(found['saved_bytes'])} ({found['saved_ratio'] * 100:.1f} %)",
        width,
    )


def _ask(arguments: list[str], show: Callable[[int, int], None]) -> _Json:
    """Run the process that reads the files and return its answer. The process ends with this call in any case.

    The code that reads and hashes files belongs to the daemon, which the client may not import.
    """
    # -P: a weightd_daemon that lies in the current directory must not be what starts. The group is the process's own,
    # so that Ctrl-C reaches this one only, which then says so.
    parent = f"--parent={os.getpid()}"
    command = [sys.executable, "-P", "-m", "weightd_daemon.planning", parent, *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                message: _Json = json.loads(line)
                if "plan" in message:
                    answer: _Json = message["plan"]
                    return answer
                if "note" in message:
                    say(message["note"])
                    continue
                if "error" in message:
                    raise from_wire(message["error"], message["message"])
                show(message["done"], message["total"])
            process.wait()
        finally:
            process.kill()
    raise WeightdError(f"the process that reads the files ended without an answer (exit code {process.returncode})")


def _print_checkpoints(checkpoints: list[_Json], width: int | None) -> None:
    rows = [
        (
            found["name"],
            str(found["tensors"]),
            size(found["total_bytes"]),
            size(found["shared_bytes"]),
            plural(found["shared_with"], "other") if found["shared_with"] else "-",
        )
        for found in checkpoints
    ]
    emit_table(_CHECKPOINT_COLUMNS, rows, width)
    if any(component["name"] for found in checkpoints for component in found["components"]):
        emit("")
        emit_table(
            _COMPONENT_COLUMNS,
            [
                (
                    component["name"] or "-",
                    found["name"],
                    str(component["tensors"]),
                    size(component["total_bytes"]),
                    size(component["shared_bytes"]),
                )
                for found in checkpoints
                for component in sorted(found["components"], key=lambda part: -part["shared_bytes"])
            ],
            width,
        )


def _print_pairs(pairs: list[_Json], width: int | None) -> None:
    if pairs:
        emit("")
        rows = [(size(pair["shared_bytes"]), *pair["checkpoints"], _parts(pair["parts"])) for pair in pairs]
        emit_table(_PAIR_COLUMNS, rows, width)


def _parts(parts: list[_Json]) -> str:
    """`text_encoder 17.7 GiB, vae = unet/vae 317 MiB`, the biggest first; a dash if there are no components."""
    if not any(name for part in parts for name in part["components"]):
        return "-"
    return ", ".join(f"{_named(*part['components'])} {size(part['shared_bytes'])}" for part in parts)


def _named(first: str, second: str) -> str:
    return first or "-" if first == second else f"{first or '-'} = {second or '-'}"
