"""The client processes of a soak: `python -m soak.clients PLAN` forks one for each number that it is told.

They are forked, for a client that is started anew costs a quarter of a second, and before anything has threads.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import weightd
from soak.operations import OPERATIONS, Operations
from soak.plan import Plan
from support.leash import hold
from weightd import errors

SURPRISES = (
    errors.ServerError,
    errors.DigestMismatchError,
    errors.ForkedError,
    errors.PermissionDeniedError,
    errors.ProtocolMismatchError,
    errors.ResourceLimitError,
)
"""Errors that nothing in a soak is a reason for. All others tell of its kills, its removals and its tight budget."""


def live(plan: Plan, seed: int) -> None:
    """Do one operation after the other until the client's time is over; some clients leave without a word."""
    chance = random.Random(f"{plan.seed} client {seed}")
    end = time.monotonic() + chance.uniform(plan.life / 10, plan.life)
    try:
        client = weightd.connect(plan.socket, timeout=20.0, fallback="wait")
    except errors.WeightdError as error:
        plan.record("connect", type(error).__name__, 0, 0.0)
        return
    operations = Operations(plan, client, chance)
    names = [name for name in OPERATIONS if plan.can_fork or name not in ("fork", "scribble")]
    weights = [OPERATIONS[name] for name in names]
    while time.monotonic() < end:
        (name,) = chance.choices(names, weights)
        began, refusal, compared = time.monotonic(), None, 0
        try:
            compared = getattr(operations, name)()
        except SURPRISES as error:
            plan.find(f"{type(error).__name__} of {name}", error=str(error)[:500])
        except errors.WeightdError as error:
            refusal = type(error).__name__
        plan.record(name, refusal, compared, time.monotonic() - began)
        time.sleep(chance.uniform(0, 2 * plan.pause))
    if chance.random() < 0.5:
        operations.close()


def main() -> None:
    """Fork until nobody asks for more, and print the pid of each."""
    plan = Plan.read(Path(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for clients
    for line in sys.stdin:
        parent, pid = os.getpid(), os.fork()
        if pid:
            print(pid, flush=True)
            continue
        try:
            hold()
            if os.getppid() == parent:
                live(plan, int(line))
        except BaseException:  # noqa: BLE001  # a finding, whatever it is
            plan.find("a client failed", error=traceback.format_exc()[-2000:])
        finally:
            os._exit(0)


if __name__ == "__main__":
    main()
