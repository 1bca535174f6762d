"""The lines around the table: head, devices, loads, and events. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from weightd._sizes import size
from weightd.cli.events import COLOURS, sentence
from weightd.cli.output import device as short_device
from weightd.cli.output import plural
from weightd.cli.tables import STATES
from weightd.inspection import LoadInfo
from weightd.top.checkpoint_rows import called, short_command
from weightd.top.lines import (
    Glyphs,
    Line,
    Span,
    clean,
    ends,
    flowed,
    padded,
    progress_bar,
    shares,
    shortened,
    width_of,
    wrapped,
)
from weightd.top.memory import DeviceParts, parts
from weightd.top.snapshot import DaemonAnswers, DaemonSnapshot
from weightd.types import DaemonEvent, DeviceStats

_UNITS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
_REFUSAL_AGE = timedelta(minutes=10)
_MOST_LOADS = 4
_NARROW = 60
_LEAST_BAR, _MOST_BAR = 7, 20
_COMMAND = 24
"""Columns that names and commands keep in events."""


def age(moment: datetime | None, now: datetime) -> str:
    """`26 s`, `3 m`, `2 h` or `5 d` since a moment; nothing where there is none."""
    if moment is None:
        return ""
    return duration((now - moment).total_seconds())


def duration(seconds: float) -> str:
    """`26 s`, `3 m`, `2 h` or `5 d`, rounded down."""
    whole = max(int(seconds), 0)
    for length, unit in _UNITS:
        if whole >= length:
            return f"{whole // length} {unit}"
    return "0 s"


def head(snapshot: DaemonSnapshot, width: int, glyphs: Glyphs) -> list[Line]:
    """The first line: the daemon's state and what sharing saves; below it why the daemon does not answer."""
    answers = snapshot.answers
    left: list[Span] = [("weightd top", "title")]
    if snapshot.problem:
        since = "" if snapshot.since is None else f" for {age(snapshot.since, snapshot.at)}"
        left.append((f"  NO ANSWER{since}: what follows is old" if answers else f"  NO ANSWER{since}", "bad"))
    elif answers is None:
        left.append(("  asking", "dim"))
    if answers is not None:
        stats = answers.stats
        if not snapshot.problem:
            left.append((f"  {stats.state}", STATES.get(stats.state, "")))
        counted = f"  {plural(stats.checkpoints, 'checkpoint')}  {plural(stats.leases, 'lease')}"
        saved: Line = (("  saved ", ""), (f"{size(stats.saved_bytes)} ({stats.saved_ratio * 100:.0f} %)", "good"))
        for more in (((counted, ""),), saved):
            if width_of((*left, *more)) <= width:
                left += more
    clock: Line = ((f"{snapshot.at.astimezone():%H:%M:%S}", "dim"),)
    lines = [ends(tuple(left), clock, width)]
    if snapshot.problem:
        lines += wrapped(clean(snapshot.problem, glyphs), width, 2, "bad")
    return lines


def devices(answers: DaemonAnswers, width: int, glyphs: Glyphs, *, explained: bool = True) -> list[Line]:
    """A bar for each device; `explained` adds the figures of its parts, which are the bar's legend, too."""
    stats = answers.stats.devices
    titles = [clean(_device_title(device), glyphs) for device in stats]
    label = min(max(map(len, titles), default=0), max(width // 4, 4))
    lines: list[Line] = []
    for device, title in zip(stats, titles, strict=True):
        name = padded(shortened(title, label), label) + " "
        if device.absence:
            lines += wrapped(f"{name}absent: {clean(device.absence, glyphs)}", width, 2, "warn", " " * (label + 1))
            continue
        split = parts(device, answers.totals.get(device.uuid))
        used = f" {size(device.used_bytes)} of {size(device.budget_bytes)}"
        bar = _device_bar(split, device.budget_bytes, width - label - 1 - len(used), glyphs)
        lines.append(((name, "title"), *bar, (used, "")))
        if explained:
            lines += flowed(_legend(split, device, glyphs), width, " " * (label + 1 if width >= _NARROW else 2))
    return lines


def _device_title(device: DeviceStats) -> str:
    return device.name if device.kind == "host" else f"{short_device(device.uuid)} {device.name}".strip()


def _device_bar(split: DeviceParts, budget: int, width: int, glyphs: Glyphs) -> Line:
    named = split.named()
    columns = shares([count for _, count in named], budget, max(width, 4))
    drawn = [(glyphs.parts[name] * count, name) for (name, _), count in zip(named, columns, strict=True) if count]
    rest = max(width, 4) - sum(columns)
    return (*drawn, (glyphs.parts["free"] * rest, "free")) if rest else tuple(drawn)


def _legend(split: DeviceParts, device: DeviceStats, glyphs: Glyphs) -> list[Line]:
    shown: list[Line] = [
        ((glyphs.parts[name], name), (f" {name if name != 'others' else 'used by others'} {size(count)}", ""))
        for name, count in split.named()
        if count or name == "free"
    ]
    if split.outside:
        shown.append(((f"others use {size(split.outside)} of the whole GPU", "dim"),))
    shown.append((("a load can get ", ""), (size(split.room), "title")))
    if split.idle and device.budget_bytes:
        shown[-1] = (*shown[-1], (" (free and idle)", "dim"))
    return shown


def loads(answers: DaemonAnswers, width: int, glyphs: Glyphs) -> list[Line]:
    """A line for each load under way: what, how far, how fast, until when, for whom."""
    found = answers.loads or ()
    if not found:
        return []
    several = len({device.uuid for device in answers.stats.devices}) > 1
    shown = found[:_MOST_LOADS]
    bar = min(max(width // 8, _LEAST_BAR), _MOST_BAR)
    ahead = [_load_figures(load, bar, glyphs, several=several) for load in shown]
    names = [
        clean(", ".join(map(called, load.names)) or load.reference or f"load {load.load}", glyphs) for load in shown
    ]
    room = max(width - max(map(width_of, ahead)) - 2, 12)
    label = min(max(map(len, names)), room)
    lines: list[Line] = []
    for name, figures in zip(names, ahead, strict=True):
        lines.append(((padded(shortened(name, label), label) + "  ", "title"), *figures))
    if len(found) > len(shown):
        lines.append(((f"and {plural(len(found) - len(shown), 'load')} more", "dim"),))
    return lines


def _load_figures(load: LoadInfo, bar: int, glyphs: Glyphs, *, several: bool) -> Line:
    where = f"  to {short_device(load.device)}" if several else ""
    who = f"  by {clean(load.user, glyphs)}" if load.user else ""
    progress = load.progress
    if progress is None:
        return ((f"waits for its turn{where}{who}", "dim"),)
    share = progress.done_bytes / progress.total_bytes if progress.total_bytes else 0.0
    rate = f"  {size(int(load.bytes_per_second))}/s" if load.bytes_per_second else ""
    end = "" if load.remaining_seconds is None else f"  {duration(load.remaining_seconds + 0.5)} left"
    figures = f" {share * 100:3.0f} % of {size(progress.total_bytes)}{rate}{end}"
    return (
        (f"{progress.phase} ", ""),
        *progress_bar(share, bar, glyphs),
        (figures, ""),
        (f"{where}{who}", "dim"),
    )


def refusal(events: Sequence[DaemonEvent], now: datetime) -> DaemonEvent | None:
    """The last load that did not fit, while it is news: for ten minutes, or until the same is loaded after all."""
    for event in reversed(events):
        if now - event.time > _REFUSAL_AGE:
            return None
        if event.kind != "load_ended":
            continue
        if event.reason == "CAPACITY":
            later = [each for each in events if each.time > event.time and each.kind == "load_ended"]
            done = any(each.reason == "OK" and set(each.names) & set(event.names) for each in later)
            return None if done else event
    return None


def recent(snapshot: DaemonSnapshot, width: int, most: int, glyphs: Glyphs) -> list[Line]:
    """The last events in at most `most` lines, the newest last; above them the load that did not fit lately."""
    refused = refusal(snapshot.events, snapshot.at)
    lines: list[Line] = []
    if refused is not None:
        name = shortened(", ".join(map(called, refused.names)) or f"load {refused.load}", _COMMAND)
        text = f"{refused.time.astimezone():%H:%M:%S} not loaded: {name}: {refused.message}"
        lines = wrapped(clean(text, glyphs), width, min(most - 1, 4), "bad", "  ")
    left = most - len(lines)
    others = [event for event in snapshot.events[-most:] if event is not refused] if most else []
    return [*lines, *(_event(event, width, glyphs) for event in others[len(others) - min(left, len(others)) :])]


def _event(event: DaemonEvent, width: int, glyphs: Glyphs) -> Line:
    failed = event.kind == "load_ended" and event.reason != "OK"
    style = "bad" if failed else COLOURS.get(event.kind, "")
    start = f"{event.time.astimezone():%H:%M:%S} "
    kind = f"{event.kind.replace('_', ' ')} "
    event = replace(event, command=short_command(event.command))
    text = clean(sentence(event, None), glyphs)
    if len(start) + len(kind) + len(text) > width:
        text = clean(sentence(event, _COMMAND), glyphs)
    room = max(width - len(start) - len(kind), 1)
    text = text if len(text) <= room else f"{text[: room - 1]}…"
    return (start, "dim"), (kind, style), (text, "")
