"""Runs a soak: starts clients, and kills, stops, replaces and rewrites at random what they use."""

from __future__ import annotations

import contextlib
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from os import close, kill, pidfd_open
from pathlib import Path

import weightd
from soak.operations import COMPONENTS, PIPELINE_FILE
from soak.plan import Plan
from soak.remains import Remains, remains
from soak.versions import StoredFile, VersionWriter
from support import checkpoints
from support.backends import Backend
from support.daemon import Daemon, environment, eventually
from support.launch import launcher
from support.leash import leashed
from support.manager import Manager
from support.points import POINTS

CONFIG = 'budget = "{budget}"\npool = "{pool}"\nmax_loads = {loads}\nlog_level = "warning"\n'
_SAMPLE_SECONDS = 5.0


@dataclass(frozen=True)
class Options:
    """How hard a soak is. Times are in seconds; `tick` is the pause between two things that happen to the clients."""

    backend: Backend
    seed: int = 1
    seconds: float = 60.0
    clients: int = 12
    pause: float = 0.25
    tick: float = 0.15
    life: float = 40.0
    """The most that a client lives."""
    daemon_life: float = 6.0
    """The mean time to the next end of the daemon, but for the last quarter of the soak, which one daemon serves."""
    budgets_mib: tuple[int, int] = (20, 32)


@dataclass
class Happened:
    """What a soak did, and saw."""

    counts: Counter[str] = field(default_factory=Counter)
    starts: list[float] = field(default_factory=list)
    rss: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds since the start of the soak, the daemon's process id, its resident bytes."""
    at_start: Remains | None = None
    at_end: Remains | None = None
    log: str = ""


class Child:
    """A process that a soak may signal, also after it has ended: no other process gets the signal."""

    def __init__(self, pid: int) -> None:
        self._pidfd = pidfd_open(pid)

    def has_ended(self) -> bool:
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        close(self._pidfd)


class Nursery:
    """The process that forks clients (soak/clients.py)."""

    def __init__(self, plan: Plan, backend: Backend) -> None:
        self._process = subprocess.Popen(
            leashed([sys.executable, "-m", "soak.clients", str(plan.save())]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment() | backend.environment,
        )  # fmt: skip
        self._born = 0

    def client(self) -> Child:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._born += 1
        self._process.stdin.write(f"{self._born}\n")
        self._process.stdin.flush()
        return Child(int(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate(timeout=60)


class Soak:
    """One run, in a folder of its own."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.happened = Happened()
        self._chance = random.Random(f"soak {options.seed}")
        self._config, self._armed = folder / "weightd.toml", folder / "armed"
        singles = [StoredFile(folder / "files" / f"c{number}.safetensors", 100 + number) for number in range(8)]
        pipelines = [folder / "files" / f"pipeline{number}" for number in range(2)]
        parts = [
            StoredFile(path / component / PIPELINE_FILE, 200 + 10 * number + at)
            for number, path in enumerate(pipelines)
            for at, component in enumerate(COMPONENTS)
        ]
        self._files = [*singles, *parts]
        self._configure(pool="4MiB")
        self._manager = Manager(folder / "notify")
        self.daemon = Daemon(
            options.backend, launcher(points=self._armed), ("budget", "log_level"), self._manager, config=self._config
        )
        self.plan = Plan(
            str(folder), str(self.daemon.socket), options.seed, [str(one.path) for one in singles],
            [str(path) for path in pipelines], options.pause, options.life, options.backend.is_host,
        )  # fmt: skip
        self._writer = VersionWriter(options.seed, self.plan.register)
        for file in self._files:
            self._writer.replace(file)
        for path in pipelines:
            for component in COMPONENTS:
                (path / component / "config.json").write_text("{}")
            checkpoints.describe_pipeline(path)
        self._nursery = Nursery(self.plan, options.backend)
        self._clients: list[Child] = []
        self._stopped: list[tuple[float, Child]] = []

    def run(self) -> Happened:
        """Let things happen until the time is over, then see what is left. What goes wrong is a finding, too."""
        with weightd.connect(self.daemon.socket, timeout=60.0) as client:
            self.happened.at_start = remains(self.daemon, self._manager, client)
        try:
            self._happen()
            self._finish()
        except (AssertionError, weightd.WeightdError) as error:
            self.plan.find("the soak could not go on", error=f"{type(error).__name__}: {error}"[:3000])
        self.happened.log = self.daemon.logged()
        return self.happened

    def close(self) -> None:
        """Stop what runs, whatever state it is in."""
        self._end_clients()
        self._nursery.close()
        self._writer.close()
        self.daemon.close(check=False)
        self._manager.close()

    # -- what happens ------------------------------------------------------------------------------------------------

    def _happen(self) -> None:
        began = time.monotonic()
        end, last_life = began + self.options.seconds, began + 0.75 * self.options.seconds
        next_end, next_sample = began + self._next_life(), began
        while (now := time.monotonic()) < end:
            self._tend_clients(now)
            self._do_something(now)
            if self.daemon.process is not None and self.daemon.process.poll() is not None:
                self._look_at_end()
            elif next_end < now < last_life:
                self._end_daemon()
                next_end = time.monotonic() + self._next_life()
            elif now < last_life and self._chance.random() < 0.02:
                self._armed.write_text(self._chance.choice(POINTS))
            if now >= next_sample:
                next_sample = now + _SAMPLE_SECONDS
                with contextlib.suppress(StopIteration, OSError):  # it has just been killed at a point
                    self.happened.rss.append((round(now - began, 1), self.daemon.pid, self.daemon.rss()))
            time.sleep(self._chance.uniform(0, 2 * self.options.tick))

    def _tend_clients(self, now: float) -> None:
        """Have as many clients as there are to be, and let go on what was stopped long enough."""
        for stopped in [one for one in self._stopped if one[0] < now]:
            self._stopped.remove(stopped)
            stopped[1].signal(signal.SIGCONT)
        for client in [one for one in self._clients if one.has_ended()]:
            self._clients.remove(client)
            self._stopped = [one for one in self._stopped if one[1] is not client]
            client.close()
        while len(self._clients) < self.options.clients:
            self._clients.append(self._nursery.client())
            self.happened.counts["clients"] += 1

    def _do_something(self, now: float) -> None:
        deeds: dict[str, tuple[float, Callable[[], None]]] = {
            "clients killed": (10, lambda: self._chance.choice(self._clients).signal(signal.SIGKILL)),
            "clients stopped": (8, lambda: self._stop(self._chance.choice(self._clients), now)),
            "loaders killed": (6, lambda: self._signal_loader(signal.SIGKILL)),
            "loaders stopped": (2, lambda: self._signal_loader(signal.SIGSTOP)),
            "files replaced": (10, lambda: self._writer.replace(self._chance.choice(self._files))),
            "files rewritten": (6, lambda: self._writer.rewrite(self._chance.choice(self._files))),
            "settings reloaded": (2, self._reload),
            "nothing": (56, lambda: None),
        }
        names = list(deeds)
        (name,) = self._chance.choices(names, [deeds[one][0] for one in names])
        deeds[name][1]()
        if name != "nothing" and not name.startswith("loaders"):
            self.happened.counts[name] += 1

    def _stop(self, child: Child, now: float) -> None:
        child.signal(signal.SIGSTOP)
        self._stopped.append((now + self._chance.uniform(0.2, 8.0), child))

    def _signal_loader(self, number: signal.Signals) -> None:
        """Kill a loader, or stop it for a moment: where there is one."""
        for pid in self.daemon.loaders()[:1]:
            with contextlib.suppress(ProcessLookupError):
                loader = Child(pid)
                if pid in self.daemon.loaders():  # the number is not another process's by now
                    loader.signal(number)
                    self.happened.counts["loaders killed" if number is signal.SIGKILL else "loaders stopped"] += 1
                if number is signal.SIGSTOP:
                    time.sleep(self._chance.uniform(0.1, 1.0))
                    loader.signal(signal.SIGCONT)
                loader.close()

    def _configure(self, **fixed: object) -> None:
        budget = self._chance.randint(*self.options.budgets_mib)
        chosen = {"budget": f"{budget}MiB", "pool": self._chance.choice(["0", "1MiB", "4MiB"])}
        self._config.write_text(CONFIG.format(**chosen | {"loads": self._chance.randint(1, 4)} | fixed))

    def _reload(self, **fixed: object) -> None:
        self._configure(**fixed)
        kill(self.daemon.pid, signal.SIGHUP)

    # -- ends of the daemon ------------------------------------------------------------------------------------------

    def _next_life(self) -> float:
        return self._chance.expovariate(1 / self.options.daemon_life)

    def _end_daemon(self) -> None:
        if self._chance.random() < 0.85:
            self.daemon.kill()
            self.happened.counts["daemon killed"] += 1
        else:
            code = self.daemon.stop()
            self.happened.counts["daemon terminated"] += 1
            if code and not self._was_killed_at_point(code):
                self.plan.find(f"the daemon ended with {code} after SIGTERM", log=self.daemon.logged()[-2000:])
        time.sleep(self._chance.uniform(0, 0.5))
        self._start_daemon()

    def _look_at_end(self) -> None:
        """The daemon has ended: at a point that was armed, or else by itself, which is a finding."""
        assert self.daemon.process is not None
        code = self.daemon.process.returncode
        if not self._was_killed_at_point(code):
            self.plan.find(f"the daemon ended with {code}", log=self.daemon.logged()[-2000:])
        self.daemon.kill()
        self._start_daemon()

    def _was_killed_at_point(self, code: int) -> bool:
        """A point that is reached is armed no more (support/points.py)."""
        at_point = code == -signal.SIGKILL and not self._armed.exists()
        if at_point:
            self.happened.counts["daemon killed at a point"] += 1
        return at_point

    def _start_daemon(self) -> None:
        self._armed.unlink(missing_ok=True)
        began = time.monotonic()
        self.daemon.start()
        self.happened.starts.append(time.monotonic() - began)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _end_clients(self) -> None:
        for client in self._clients:
            client.signal(signal.SIGKILL)  # it also ends what is stopped
            client.close()
        self._clients.clear()

    def _finish(self) -> None:
        """All clients end; then everything is removed, and what is there must be what was there at the start."""
        self._end_clients()
        self._armed.unlink(missing_ok=True)
        self._reload(
            budget=f"{max(self.options.budgets_mib)}MiB", pool="0"
        )  # which holds for what is freed from then on
        with weightd.connect(self.daemon.socket, timeout=60.0) as client:
            eventually(lambda: self._has_no_pool(client), what="the daemon reads its settings")
            eventually(lambda: not client.leases(), what=f"leases are held by nobody: {client.leases()}")
            eventually(lambda: not client.loads(), what=f"loads go on for nobody: {client.loads()}")
            client.verify()
            self._check_books(client, "when all clients have gone")
            for checkpoint in client.checkpoints():
                client.remove(checkpoint.content_digest)
            self._check_books(client, "when all is removed")
        with contextlib.suppress(AssertionError):  # the report compares
            eventually(self._has_settled)

    def _check_books(self, client: weightd.Client, when: str) -> None:
        for figure in client.check_books():
            if not figure.agrees:
                self.plan.find(f"the books do not agree {when}", figure=figure._asdict())

    @staticmethod
    def _has_no_pool(client: weightd.Client) -> bool:
        return any(setting.key == "pool" and setting.value in ("0", '"0"') for setting in client.settings())

    def _has_settled(self) -> bool:
        with weightd.connect(self.daemon.socket, timeout=60.0) as client:
            self.happened.at_end = remains(self.daemon, self._manager, client)
        time.sleep(0.5)
        return self.happened.at_end == self.happened.at_start
