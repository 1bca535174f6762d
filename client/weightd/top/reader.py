"""Asks the daemon once a second, and only for what has changed; survives its end and finds it again."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from weightd.errors import DaemonUnreachableError, WeightdError
from weightd.inspection import SharedPair
from weightd.top.gpu_totals import total_bytes
from weightd.top.private import private_bytes
from weightd.top.snapshot import DaemonAnswers, DaemonSnapshot
from weightd.types import DaemonEvent, Stats

if TYPE_CHECKING:
    from weightd.client import Client

_T = TypeVar("_T")
PERIOD = 1.0
"""Seconds between two rounds of questions."""
_PRIVATE_SECONDS = 10.0
_PRIVATE_SHARE = 0.005
"""The part of a core that reading private copies may take. The kernel walks all pages of a process for it."""
_EVENTS = 100
"""Events that are kept to be shown."""
_PAIRS = 5_000
"""Pairs that are asked for, those with most in common: a page."""
_JOIN_SECONDS = 2.0


class PrivateCopies:
    """The private bytes of processes that hold weights, read rarely, for it costs milliseconds a process.

    Those of new processes and of `first` are read at once, all every ten seconds, or less often if that takes long.
    """

    def __init__(self, read: Callable[[int], int | None] = private_bytes) -> None:
        self._read = read
        self._known: dict[int, int | None] = {}
        self._due = 0.0

    def look(self, pids: Iterable[int], first: Iterable[int], now: float) -> dict[int, int | None]:
        """Return the bytes by process id; `now` is seconds of a clock that only goes forward."""
        held = set(pids)
        every = now >= self._due
        wanted = held if every else {pid for pid in held if pid not in self._known} | (held & set(first))
        started = time.thread_time()
        found = {pid: self._read(pid) for pid in wanted}
        if every:
            cost = time.thread_time() - started
            self._due = now + max(_PRIVATE_SECONDS, cost / _PRIVATE_SHARE)
        known = {pid: count for pid, count in (self._known | found).items() if pid in held}
        if known != self._known:
            self._known = known
        return self._known


@dataclass(slots=True)
class _Asked:
    """What is remembered between two rounds. `revision` is None where everything is to be asked."""

    revision: int | None = None
    answers: DaemonAnswers | None = None
    content: frozenset[tuple[str, ...]] = field(default_factory=frozenset)
    gpus: tuple[str, ...] = ()


class DaemonReader:
    """Reads a daemon in two threads and calls `publish` from one of them, once a second or when `wake` is called.

    `client` is used by these threads alone, so that a question that is slow holds up no key.
    """

    def __init__(
        self,
        client: Client,
        publish: Callable[[DaemonSnapshot], None],
        copies: PrivateCopies | None = None,
        totals: Callable[[Iterable[str]], dict[str, int]] = total_bytes,
    ) -> None:
        self._client = client
        self._publish = publish
        self._copies = copies or PrivateCopies()
        self._totals = totals
        self._known_totals: dict[str, int] = {}
        self._asked = _Asked()
        self._events: deque[DaemonEvent] = deque(maxlen=_EVENTS)
        self._lock = threading.Lock()  # of the events
        self._since: datetime | None = None
        self._anew = threading.Event()
        """Set when another daemon may answer, whose revisions may be the same numbers."""
        self._first: frozenset[int] = frozenset()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, name="weightd-top-ask", daemon=True),
            threading.Thread(target=self._follow, name="weightd-top-events", daemon=True),
        ]

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Close the client, which ends its calls, and wait for the threads for a moment."""
        self._stopped.set()
        self._wake.set()
        self._client.close()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def wake(self, first: Iterable[int] = ()) -> None:
        """Ask now, and read the private copies of the processes `first` again."""
        self._first = frozenset(first)
        self._wake.set()

    def look(self) -> DaemonSnapshot:
        """Ask one round of questions. Errors become the snapshot's problem."""
        now = datetime.now(UTC)
        if self._anew.is_set():
            self._anew.clear()
            self._asked.revision = None
        try:
            answers = self._round()
        except Exception as error:  # noqa: BLE001 - if the thread ended, an old screen would look alive
            problem = str(error) if isinstance(error, WeightdError) else f"{type(error).__name__}: {error}"
            self._anew.set()
            self._since = self._since or now
            return DaemonSnapshot(now, self._asked.answers, self._last_events(), problem, self._since)
        self._since = None
        return DaemonSnapshot(now, answers, self._last_events())

    def _ask(self) -> None:
        while not self._stopped.is_set():
            begun = time.monotonic()
            self._wake.clear()
            snapshot = self.look()
            if self._stopped.is_set():
                return
            self._publish(snapshot)
            self._wake.wait(max(PERIOD - (time.monotonic() - begun), PERIOD / 10))

    def _round(self) -> DaemonAnswers:
        client, asked, before = self._client, self._asked, self._asked.answers
        stats = client.stats()
        # Revision 0 is of a daemon that does not count, or that has nothing yet; the figures are asked first, so that
        # whatever changes meanwhile is asked again in the next round.
        if before is None or asked.revision != stats.revision or stats.revision == 0:
            answers = self._everything(stats)
        else:
            answers = replace(before, stats=stats)
            if before.loads:  # they get on without a new revision
                answers = replace(answers, loads=tuple(client.loads()))
        pids = {lease.pid for lease in answers.leases if lease.pid is not None}
        first, self._first = self._first, frozenset()
        private = self._copies.look(pids, first, time.monotonic())
        answers = replace(answers, private=private, totals=self._known_totals)
        asked.revision, asked.answers = stats.revision, answers
        return answers

    def _everything(self, stats: Stats) -> DaemonAnswers:
        client, asked, before = self._client, self._asked, self._asked.answers
        checkpoints = tuple(client.checkpoints())
        answers = DaemonAnswers(stats, checkpoints, tuple(client.leases()))
        gpus = tuple(device.uuid for device in stats.devices if device.kind != "host")
        if gpus != asked.gpus:
            asked.gpus = gpus
            # In a thread of its own, which a driver that hangs may keep.
            threading.Thread(target=self._learn_totals, args=(gpus,), name="weightd-top-nvml", daemon=True).start()
        content = frozenset((info.device, info.content_digest, info.name, info.state) for info in checkpoints)
        loads, missing = _told(client.loads)
        pairs: tuple[SharedPair, ...] | None
        if before is not None and content == asked.content and asked.revision is not None:
            pairs = before.pairs  # pins and leases change no bytes
        else:
            pairs, why = _told(lambda: client.sharing(most=_PAIRS))
            missing = missing or why
        asked.content = content
        return replace(answers, loads=loads, pairs=pairs, missing=missing)

    def _learn_totals(self, gpus: tuple[str, ...]) -> None:
        self._known_totals = self._totals(gpus)

    def _last_events(self) -> tuple[DaemonEvent, ...]:
        with self._lock:
            return tuple(self._events)

    def _follow(self) -> None:
        """Keep the last events. A stream that ends is opened again; it begins with what the daemon remembers."""
        while not self._stopped.is_set():
            try:
                self._keep(self._client.events(follow=True))
            except DaemonUnreachableError:
                self._anew.set()
            except WeightdError:  # too slow a reader, or too many: what is missed costs no figure
                pass
            self._stopped.wait(PERIOD)

    def _keep(self, stream: Iterator[DaemonEvent]) -> None:
        for at, event in enumerate(stream):
            with self._lock:
                if at == 0:
                    self._events.clear()
                self._events.append(event)


def _told(question: Callable[[], list[_T]]) -> tuple[tuple[_T, ...] | None, str]:
    """Return the answer, or None and why there is none: an older daemon does not know the question."""
    try:
        return tuple(question()), ""
    except DaemonUnreachableError:
        raise
    except WeightdError as error:
        return None, str(error)
