"""The command group `fleet`: several nodes of weightd. It starts the fleet's programs, for the client imports none."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from weightd._sizes import size
from weightd.cli.context import (
    CommandOptions,
    FormatOption,
    HtmlOption,
    IndexOption,
    OutputFormat,
    VariantOption,
    WideOption,
    WorkloadOption,
    require,
    say,
)
from weightd.cli.output import emit, emit_json, plural
from weightd.cli.plan_page import require_writable, write_report
from weightd.cli.programs import ask
from weightd.cli.progress import byte_bar
from weightd.cli.tables import Column, emit_table, emit_text, terminal_width

NEEDED = ("weightd_fleet", "weightd_daemon", "blake3", "numpy", "xxhash")

_NODE_COLUMNS = (
    Column("NODE"),
    Column("USED", right=True),
    Column("BUDGET", right=True, common=True),
    Column("CHECKPOINT", elided=True),
    Column("SIZE", right=True),
    Column("SHARED", right=True),
    Column("WITH", elided=True, spare=1),
)

fleet = typer.Typer(name="fleet", rich_markup_mode=None)


@fleet.callback(invoke_without_command=True)
def _without_command(context: typer.Context) -> None:
    """Place checkpoints on several nodes, publish and fetch them.

    Commands from `ls` on ask the catalogue of a Ray cluster, which `catalogue` starts.

    \b
    Examples:
      weightd fleet plan --nodes 3 --budget 24GiB org/base org/tuned
      weightd fleet publish org/tuned
      weightd fleet fetch b3:DIGEST --from 10.0.0.5:7411 --tls-dir tls
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def require_fleet(command: str) -> None:
    """Exit with an error if the extra is not installed."""
    require(f"fleet {command}", NEEDED, "fleet")


def ask_fleet(context: typer.Context, module: str, arguments: list[str], *, quiet: bool) -> dict[str, Any]:
    """Run a program of the fleet's and return its answer; a bar shows its progress. Raises the program's error."""
    settings: CommandOptions = context.obj
    options = ["--debug"] if settings.debug else []
    with byte_bar(quiet=quiet) as advance:

        def show(what: str, done: int, total: int) -> None:
            if advance is not None:
                advance(what, done, total)

        return ask(module, [*options, *arguments], show, say)


@fleet.command("plan")
def plan(
    context: typer.Context,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", min=1, max=10_000, help="How many nodes there are.")],
    budget: Annotated[str, typer.Option("--budget", metavar="SIZE", help="Memory of each node, such as 24GiB.")],
    references: Annotated[
        list[str] | None, typer.Argument(metavar="REF", help="Files, directories or org/name[@revision].")
    ] = None,
    manifest: WorkloadOption = None,
    replicas: Annotated[
        int, typer.Option("--replicas", metavar="N", min=1, max=10_000, help="Replicas of each, on different nodes.")
    ] = 1,
    page: Annotated[
        str,
        typer.Option("--page", metavar="SIZE", help="Unit of allocation: 4KiB in host memory, 2MiB on most GPUs."),
    ] = "4KiB",
    html: HtmlOption = None,
    variant: VariantOption = None,
    state_dir: IndexOption = None,
    output: FormatOption = OutputFormat.TABLE,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the summary.")] = False,
    wide: WideOption = False,
) -> None:
    """Compute on which nodes checkpoints take the least memory.

    Checkpoints that share most are placed together, so that few bytes are held twice. This needs no daemon, no engine
    and no other node: the nodes are imagined, all with the same budget. Equal bytes are found as by `weightd plan`.

    \b
    Examples:
      weightd fleet plan --nodes 3 --budget 24GiB org/base org/tuned
      weightd fleet plan --nodes 8 --budget 80GiB --replicas 2 --page 2MiB org/a
      weightd fleet plan --nodes 2 --budget 64GiB --manifest workload.json
      weightd fleet plan --nodes 2 --budget 64GiB --html plan.html org/a org/b
    """
    if not references and not manifest:
        raise typer.BadParameter("give at least one reference, or --manifest", param_hint="REF")
    require_fleet("plan")
    if html is not None:
        require_writable(html)
    arguments = [f"--nodes={nodes}", f"--budget={budget}", f"--replicas={replicas}", f"--page={page}"]
    arguments += [f"--manifest={file}" for file in manifest or ()]
    arguments += [] if variant is None else [f"--variant={variant}"]
    arguments += [] if state_dir is None else [f"--state-dir={state_dir}"]
    arguments += [] if html is None else ["--report"]
    arguments += ["--", *(references or ())]
    answer = ask_fleet(context, "weightd_fleet.planning", arguments, quiet=quiet)
    found = answer["plan"]
    if html is not None:
        report = {**answer["report"], "nodes": _drawn_nodes(found)}
        write_report(html, report, _sentences(found), "weightd fleet plan")
    if output is OutputFormat.JSON:
        emit_json(found)
        return
    width = terminal_width(wide=wide)
    if not quiet:
        _print_nodes(found, width)
        emit("")
    for sentence in _sentences(found):
        emit_text(sentence, width)


def _print_nodes(found: dict[str, Any], width: int | None) -> None:
    """Print each node with its checkpoints, a line each; its own figures stand in the first."""
    placed: dict[str, list[dict[str, Any]]] = {}
    for placement in found["placements"]:
        placed.setdefault(placement["node"], []).append(placement)
    rows: list[tuple[str, ...]] = []
    for node in found["nodes"]:
        for number, placement in enumerate(placed.get(node["name"], [])):
            first = not number
            rows.append(
                (
                    node["name"] if first else "",
                    size(node["used_bytes"]) if first else "",
                    size(node["budget_bytes"]),
                    placement["checkpoint"],
                    size(placement["size_bytes"]),
                    size(placement["size_bytes"] - placement["alone_bytes"]),
                    placement["partner"] or "-",
                )
            )
    if rows:
        emit_table(_NODE_COLUMNS, rows, width)


def _drawn_nodes(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes as the page draws them: with the bytes that one of a node's checkpoints has alone.

    The rest of a page that a segment ends in counts as shared, but on a node with one checkpoint.
    """
    alone: Counter[str] = Counter()
    for placement in found["placements"]:
        alone[placement["node"]] += placement["alone_bytes"]
    return [
        {**node, "alone_bytes": alone[node["name"]] if len(node["checkpoints"]) > 1 else node["used_bytes"]}
        for node in found["nodes"]
    ]


def _sentences(found: dict[str, Any]) -> list[str]:
    """What the plan comes to, and why something is left over."""
    return [
        _summary(found),
        *(
            f"{left['checkpoint']}: {plural(left['replicas'], 'replica')} not placed: {left['why']}"
            for left in found["left_over"]
        ),
    ]


def _summary(found: dict[str, Any]) -> str:
    """`6 checkpoints fit on 2 nodes; without sharing 3 nodes are needed. They take 1.70 GiB; without sharing 2.36 GiB.`

    Where not all fit, the last sentence is about those that were placed.
    """
    names = {placement["checkpoint"] for placement in found["placements"]} | set(found["unplaced"])
    apart = sum(placement["size_bytes"] for placement in found["placements"])
    taken = f"{size(found['placed_bytes'])}; without sharing {size(apart)}."
    checkpoints = plural(len(names), "checkpoint")
    if found["least_nodes"] is None:
        unplaced = len(found["unplaced"])
        verb = "does" if unplaced == 1 else "do"
        placed = f" What was placed takes {taken}" if found["placements"] else ""
        return f"{unplaced} of {checkpoints} {verb} not fit on {plural(len(found['nodes']), 'node')}.{placed}"
    least_apart = found["least_nodes_apart"]
    need = "none is large enough" if least_apart is None else f"{plural(least_apart, 'node')} are needed"
    need = need.replace("1 node are", "1 node is")
    fit = "fits" if len(names) == 1 else "fit"
    them = "It takes" if len(names) == 1 else "They take"
    return f"{checkpoints} {fit} on {plural(found['least_nodes'], 'node')}; without sharing {need}. {them} {taken}"


@fleet.command("publish")
def publish(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="REF", help="File, directory or org/name[@revision].")],
    variant: VariantOption = None,
    state_dir: Annotated[
        str | None,
        typer.Option(
            "--state-dir",
            metavar="DIR",
            help="Directory of what this node publishes [default: $WEIGHTD_FLEET_STATE_DIR, else the user's own].",
        ),
    ] = None,
    output: FormatOption = OutputFormat.TABLE,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the digest.")] = False,
) -> None:
    """Read a checkpoint once and name it by its bytes.

    The name, b3: and 64 hex digits, stands for every byte of the checkpoint's files, and of the small files beside
    them. Files in the Hugging Face cache are compared with the digests by which the hub names them. The manifest is
    kept on this node.

    \b
    Examples:
      weightd fleet publish org/tuned
      weightd fleet publish ~/models/tuned --format json
    """
    require_fleet("publish")
    arguments = [] if variant is None else [f"--variant={variant}"]
    arguments += [] if state_dir is None else [f"--state-dir={state_dir}"]
    found = ask_fleet(context, "weightd_fleet.publishing", [*arguments, "--", reference], quiet=quiet)["published"]
    if output is OutputFormat.JSON:
        emit_json(found)
    elif quiet:
        emit(found["digest"])
    else:
        emit(found["digest"])
        origin = found["origin"]
        emit_text(
            f"{plural(found['tensors'], 'tensor')}, {size(found['total_bytes'])} in {plural(found['files'], 'file')}; "
            f"{plural(found['small_files'], 'small file')}, {size(found['small_bytes'])}; "
            + (
                f"{plural(found['checked_files'], 'file')} as the hub has them in "
                f"{origin['repository']}@{origin['commit'][:12]}"
                if origin
                else "not from a hub's cache"
            ),
            terminal_width(wide=False),
        )
