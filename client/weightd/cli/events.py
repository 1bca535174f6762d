"""The command `events`: a line for people, or one of JSON, for each event. The keys of its JSON are a contract."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, time, timedelta
from difflib import get_close_matches
from typing import Annotated

import typer

from weightd._sizes import size
from weightd.cli.context import OutputFormat, SocketOption, WideOption, open_client
from weightd.cli.output import device as short_device
from weightd.cli.output import digest, emit_json_line
from weightd.cli.tables import elided, emit_line, terminal_width
from weightd.types import DaemonEvent

_CHECKPOINT = ("content_digest", "device", "names")
_PROCESS = ("pid", "uid", "user", "command")
_LEASE = ("lease", *_CHECKPOINT, "total_bytes", *_PROCESS)
_LOAD = ("load", "device", "names", *_PROCESS)
_LOADED = ("content_digest", "total_bytes", "unique_bytes", "read_bytes")
EVENT_KEYS: dict[str, tuple[str, ...]] = {
    "load_begun": _LOAD,
    "load_ended": (*_LOAD, "reason", "message", "seconds", *_LOADED, "evicted", "evicted_others"),
    "load_answered": (*_CHECKPOINT, "total_bytes", *_PROCESS),
    "sealed": (*_CHECKPOINT, "total_bytes", "load", *_PROCESS),
    "attached": _LEASE,
    "detached": _LEASE,
    "evicted": (*_CHECKPOINT, "total_bytes", "reason", "load", *_PROCESS),
    "named": ("content_digest", "names", "previous_digest", *_PROCESS),
    "unnamed": ("content_digest", "names", *_PROCESS),
    "device_lost": ("device", "message"),
    "device_absent": ("device", "message"),
    "device_back": ("device",),
    "draining": (),
    "drained": (),
    "undrained": (),
}
"""Keys of each kind of event in addition to `time` and `event`; a kind that is not known here has no more keys."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_KIND = max(map(len, EVENT_KEYS))
_NARROW = 100
"""Columns of a terminal below which a line has no date."""
_SHORT = 24
"""Columns that names and commands keep in a line that does not fit."""
COLOURS = {
    "sealed": "green",
    "evicted": "yellow",
    "draining": "yellow",
    "drained": "yellow",
    "device_absent": "yellow",
    "device_lost": "red",
    "device_back": "green",
}


def _types(incomplete: str) -> list[str]:
    return [kind for kind in EVENT_KEYS if kind.startswith(incomplete)]


def events(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Also print new events, until Ctrl-C.")] = False,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="TIME",
            help="Only events since then: a duration such as 10m or 1h30m ago, 15:04, or ISO 8601.",
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            autocompletion=_types,
            help="Only events of this type, such as evicted; repeatable.",
        ),
    ] = None,
    output: Annotated[
        OutputFormat | None,
        typer.Option(
            "--format",
            metavar="table|json",
            help="A line for people, or of JSON [default: table in a terminal, else json].",
        ),
    ] = None,
    wide: WideOption = False,
    socket: SocketOption = None,
) -> None:
    """Print recent events, oldest first.

    The daemon remembers the last 1,024 events. In a pipe each is one line of JSON, unless --format says otherwise.

    \b
    Examples:
      weightd events --since 10m
      weightd events -f --type evicted --type device_lost
      weightd events --format json | jq .event
    """
    wanted = _kinds(kinds or ())
    begin = None if since is None else _moment(since, datetime.now().astimezone())
    if output is None:
        output = OutputFormat.TABLE if sys.stdout.isatty() else OutputFormat.JSON
    with open_client(context, socket) as client:
        for event in client.events(follow=follow):
            if (wanted and event.kind not in wanted) or (begin is not None and event.time < begin):
                continue
            if output is OutputFormat.JSON:
                line = {"time": event.time, "event": event.kind}
                emit_json_line(line | {key: getattr(event, key) for key in EVENT_KEYS.get(event.kind, ())})
            else:
                _print(event, terminal_width(wide=wide))


def _kinds(said: list[str] | tuple[()]) -> frozenset[str]:
    """Return the types to print; none is all. Errors: BadParameter."""
    wanted = frozenset(kind.strip() for text in said for kind in text.split(","))
    for kind in sorted(wanted - set(EVENT_KEYS)):
        near = get_close_matches(kind, EVENT_KEYS, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(EVENT_KEYS)}"
        raise typer.BadParameter(f"{kind!r} is no type of event{hint}", param_hint="--type")
    return wanted


def _moment(text: str, now: datetime) -> datetime:
    """Return the time that `text` says, in UTC. Errors: BadParameter."""
    text = text.strip()
    if re.fullmatch(r"(\d{1,9}[smhdw])+", text):
        seconds = sum(int(count) * _UNITS[unit] for count, unit in re.findall(r"(\d+)([smhdw])", text))
        try:
            return (now - timedelta(seconds=seconds)).astimezone(UTC)
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)
    try:
        if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text):  # of today, or of yesterday if that is still to come
            moment = datetime.combine(now.date(), time.fromisoformat(text.zfill(5 if text.count(":") == 1 else 8)))
            moment = moment.astimezone()
            return (moment - timedelta(days=1) if moment > now else moment).astimezone(UTC)
        return datetime.fromisoformat(text).astimezone(UTC)  # without a zone it is local time
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{text!r} is neither a duration such as 10m, nor a time such as 15:04 or 2026-01-31T15:04:05Z",
            param_hint="--since",
        ) from None


def _print(event: DaemonEvent, width: int | None) -> None:
    """Write one line, cut at `width` columns; names and commands are shortened first."""
    moment = event.time.astimezone()
    start = f"{moment:%H:%M:%S}" if width is not None and width < _NARROW else f"{moment:%Y-%m-%d %H:%M:%S}"
    rest = sentence(event, None)
    if width is not None and len(start) + _KIND + 4 + len(rest) > width:
        rest = sentence(event, _SHORT)
    failed = event.kind == "load_ended" and event.reason != "OK"
    colour = "red" if failed else COLOURS.get(event.kind, "")
    emit_line([(f"{start}  ", ""), (f"{event.kind:<{_KIND}}  ", colour), (rest, "")], width)


def sentence(event: DaemonEvent, most: int | None) -> str:
    """Describe an event: `org/base on host, 2.00 GiB, lease 7, by ada (pid 4242: python serve.py)`.

    Names and commands take at most `most` columns each, if it is given.
    """

    def short(text: str) -> str:
        return text if most is None else elided(text, most)

    keys = EVENT_KEYS.get(event.kind, ())
    name = short(", ".join(event.names) or digest(event.content_digest)) if "names" in keys else ""
    device = short_device(event.device) if "device" in keys else ""
    parts = [" on ".join(filter(None, (name, device)))]
    parts += _details(event)
    if "pid" in keys and (event.user or event.pid is not None):
        command = f": {short(event.command)}" if event.command else ""
        parts.append(f"by {event.user or '?'} (pid {'unknown' if event.pid is None else event.pid}{command})")
    return ", ".join(filter(None, parts))


def _details(event: DaemonEvent) -> list[str]:
    """What the event says beside names, device and process."""
    if event.kind == "load_ended":
        if event.reason != "OK":
            said = [f"{event.reason}: {event.message}" if event.message else event.reason]
        else:
            said = [f"{size(event.total_bytes)}, read {size(event.read_bytes)} in {event.seconds:.1f} s"]
        others = f"{event.evicted_others} of other users" if event.evicted_others else ""
        gone = ", ".join(filter(None, (*map(digest, event.evicted), others)))
        return [*said, f"evicted {gone}" if gone else ""]
    if event.kind == "named":
        before = f", before {digest(event.previous_digest)}" if event.previous_digest else ""
        return [f"means {digest(event.content_digest)}{before}"]
    if event.kind == "unnamed":
        return [f"meant {digest(event.content_digest)}"]
    if event.kind.startswith("device_"):
        return [event.message]
    keys = EVENT_KEYS.get(event.kind, ())
    return [
        size(event.total_bytes) if "total_bytes" in keys else "",
        f"lease {event.lease}" if "lease" in keys else "",
        f"load {event.load}" if event.kind == "load_begun" else "",
        event.reason if event.kind == "evicted" else "",
    ]
