"""Watches the loop of a test's daemon: a step that takes too long is in the log, with its callback and its stack.

A step is one callback of the loop, be it a task's until its next `await`. What counts is wall time less the time
in which its thread waited for a core (/proc/self/task/TID/schedstat), so waiting for a disk, a lock or a peer counts,
and a busy machine does not. What the process's other threads waited is taken off as well: one of them may have had
the interpreter's lock. So is the time in which a hypervisor ran others on this machine's cores (/proc/stat, "steal").
Collections of garbage count: the loop stands still for them, too. A step in which a test stopped the process (SIGSTOP)
does not count. Nor does starting a process. Where the kernel does not say how long a thread waited, its CPU time
counts alone, and the log says so.

Virtual machines lose their cores without a trace in these figures, too: on one with two busy cores, a thread that did
nothing but read the clock missed 45 ms once in 40 s. So a long step in which no other thread of the daemon could look
twice is found when it is the second of its kind in its daemon, or takes very long; all others are found at once.

It watches from the moment in which the daemon is ready until it stops: before, nobody is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from asyncio import events
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from weightd_daemon.operations.notify import ServiceManagerNotifier

MOST_SECONDS = 0.05
_VERY_LONG = 4.0
"""How many times as long a step takes that is found though it is the first of its kind and nobody could look."""
_ENOUGH_SAMPLES = 2
"""How many samples show that a step was at work: one may be taken when the machine gives a core back."""
FOUND = "loop watch: a step of"
"""What a finding begins with; support/daemon.py looks for it."""
FIRST_STEP = "loop watch: the first of its kind, a step of"
ALLOWED_STEP = "loop watch: allowed, a step of"
ALLOWED: dict[str, str] = {}
"""Steps that may take longer, each with the reason: patterns of a line of the callback or of its stack."""
_SAMPLE_SECONDS = 0.01
_STALE_SECONDS = 0.1
"""How old an answer may be about what other threads had waited before a step."""
_FRAMES = 12


def install() -> None:
    """Watch the loop of the daemon that this process is going to be."""
    ready, stop = ServiceManagerNotifier.ready, ServiceManagerNotifier.stop
    watch = Watch()

    def begin(notifier: ServiceManagerNotifier, status: Callable[[], str]) -> None:
        ready(notifier, status)
        asyncio.get_running_loop().call_soon(watch.begin)  # not in the step that serves: that is all of the start

    def end(notifier: ServiceManagerNotifier) -> None:
        watch.end()
        stop(notifier)

    ServiceManagerNotifier.ready, ServiceManagerNotifier.stop = begin, end  # type: ignore[method-assign]  # exchanged


class Watch:
    """Times each step of the loop of the thread that begins."""

    def __init__(self) -> None:
        self._run = events.Handle._run
        self._began = 0.0
        """When the step under way began; 0 when there is none."""
        self._stacks: list[str] = []
        self._collected = 0.0
        self._collects = 0.0
        self._waited: Callable[[], float] = time.perf_counter
        self._on = False
        self._thread = 0
        self._spawning = 0.0
        """Seconds that the step under way has spent on starting processes."""
        self._was_stopped = False
        """Whether the process was stopped, and went on, in the step under way."""
        self._looked = 0.0
        self._others: dict[str, float] = {}
        self._stolen = 0.0
        """When it was last asked what each other thread has waited and a hypervisor has taken, and the two answers."""
        self._latest = 0.0
        """When the latest step began."""
        self._computed = 0.0
        """CPU time of the loop's thread when the step under way began."""
        self._long: set[str] = set()
        """Kinds of steps of which one has taken long."""

    def begin(self) -> None:
        """Time each step from now on."""
        self._thread = threading.get_native_id()
        source = _waited_of(self._thread)
        if source is None:
            _say("loop watch: the kernel has no schedstat: only CPU time counts")
        self._waited = source or (lambda: time.perf_counter() - time.thread_time())
        self._on = True
        gc.callbacks.append(self._collect)
        threading.Thread(target=self._sample, args=(threading.get_ident(),), name="loop-watch", daemon=True).start()
        signal.signal(signal.SIGCONT, self._continued)
        self._watch_spawns()
        watch, run, clock = self, self._run, time.perf_counter

        def timed(handle: events.Handle) -> None:
            if clock() - watch._looked > _STALE_SECONDS:
                watch._look()
            waited = watch._waited()
            watch._collected, watch._spawning, watch._was_stopped, watch._began = 0.0, 0.0, False, (began := clock())
            watch._latest, watch._computed = began, time.thread_time()
            try:
                run(handle)
            finally:
                watch._began = 0.0
                if clock() - began > MOST_SECONDS:
                    watch._ended(handle, clock() - began, watch._waited() - waited)

        events.Handle._run = timed  # type: ignore[method-assign]  # exchanged

    def end(self) -> None:
        """The daemon stops."""
        self._on = False
        events.Handle._run = self._run  # type: ignore[method-assign]  # as it was

    def _ended(self, handle: events.Handle, wall: float, waited: float) -> None:
        computed = time.thread_time() - self._computed
        stacks, self._stacks = self._stacks, []
        if wall - waited <= MOST_SECONDS or self._was_stopped:
            return
        now = _waits(self._thread)
        others = sum(spent - self._others.get(thread, 0.0) for thread, spent in now.items())
        stolen = _stolen() - self._stolen
        took = wall - waited - others - stolen - self._spawning
        if took <= MOST_SECONDS:
            return
        stack = stacks[len(stacks) // 2] if stacks else "  (no stack: nobody else could run meanwhile)\n"
        kind = _kind(handle)
        what = f"{handle!r} of {kind}\n{stack}"
        reasons = [reason for pattern, reason in ALLOWED.items() if re.search(pattern, what)]
        millis = ", ".join(
            f"{name} {seconds * 1e3:.0f} ms"
            for name, seconds in {
                "wall": wall, "computed": computed, "waited for a core": waited, "other threads did": others,
                "stolen": stolen, "starting processes": self._spawning, "garbage": self._collected,
            }.items()
        )  # fmt: skip
        unseen = len(stacks) < _ENOUGH_SAMPLES and took <= _VERY_LONG * MOST_SECONDS
        first = unseen and kind not in self._long
        self._long.add(kind)
        said = ALLOWED_STEP if reasons else FIRST_STEP if first else FOUND
        _say(f"{said} {took * 1e3:.0f} ms ({millis}; {len(stacks)} samples): {what}")

    def _sample(self, thread: int) -> None:
        """Keep the stacks of a step from that moment on in which it takes long."""
        while self._on:
            time.sleep(_SAMPLE_SECONDS)
            began = self._began
            if self._latest > self._looked and (not began or time.perf_counter() - began < _SAMPLE_SECONDS):
                self._look()
            if began and time.perf_counter() - began > MOST_SECONDS / 2:
                frame = sys._current_frames().get(thread)
                if frame is not None and began == self._began and len(self._stacks) < 1000:
                    self._stacks.append(_stack(frame))
            elif self._stacks and not began:
                self._stacks = []

    def _look(self) -> None:
        """Ask while there are steps, and before the next one: most daemons of tests are idle, and there are many."""
        with contextlib.suppress(OSError):  # a test has left no descriptor: the answers before are good enough
            self._others, self._stolen = _waits(self._thread), _stolen()
        self._looked = time.perf_counter()

    def _watch_spawns(self) -> None:
        """Take the time off in which a process is started.

        vfork lasts until the child, too, has got a core, and no other thread of this process can see that meanwhile.
        """
        execute: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]  # not in its types

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return execute(*arguments, **named)
            finally:
                if threading.get_native_id() == self._thread:
                    self._spawning += time.perf_counter() - began

        subprocess.Popen._execute_child = timed  # type: ignore[attr-defined]  # exchanged

    def _continued(self, *_: object) -> None:
        self._was_stopped = True

    def _collect(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._collects = time.perf_counter()
        else:
            self._collected += time.perf_counter() - self._collects


def _waited_of(thread: int) -> Callable[[], float] | None:
    """How long a thread has waited for a core, in seconds, as a function; None if the kernel does not say."""
    try:
        descriptor = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        os.pread(descriptor, 64, 0).split()[1]
    except (OSError, IndexError):
        return None
    return lambda: int(os.pread(descriptor, 64, 0).split()[1]) / 1e9


def _kind(handle: events.Handle) -> str:
    """The name of what a step runs, a task's coroutine or another callback."""
    callback = handle._callback  # type: ignore[attr-defined]  # asyncio has no public way to what a handle calls
    # asyncio shows no task of a first step
    tasks = [task for task in gc.get_referents(callback) if isinstance(task, asyncio.Task)]
    run = tasks[0].get_coro() if tasks else getattr(callback, "func", callback)  # of a functools.partial
    return str(getattr(run, "__qualname__", run))


def _stolen() -> float:
    """Seconds that a hypervisor has had this machine's cores for others, in all."""
    with open("/proc/stat", "rb") as file:
        _, _, stolen = file.readline().partition(b" ")[2].split()[5:8]
    return int(stolen) / os.sysconf("SC_CLK_TCK")


def _waits(but: int) -> dict[str, float]:
    """How long each thread of this process but one has waited for a core, in seconds."""
    found = {}
    for thread in set(os.listdir("/proc/self/task")) - {str(but)}:
        with contextlib.suppress(OSError, IndexError):
            found[thread] = int(Path(f"/proc/self/task/{thread}/schedstat").read_bytes().split()[1]) / 1e9
    return found


def _stack(frame: FrameType) -> str:
    shown = traceback.format_list(traceback.extract_stack(frame)[-_FRAMES:])
    return "".join(re.sub(str(Path(__file__).resolve().parents[2]), "", line) for line in shown)


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode(errors="replace"))
