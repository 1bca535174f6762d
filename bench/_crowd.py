"""Clients of bench/clients.py: SOCKET hold COUNT, or SOCKET attach THREADS SECONDS.

`hold` attaches with COUNT clients, each with a connection and a lease of its own, says so, and keeps them until its
standard input ends. `attach` waits for a line, then attaches and lets go with THREADS threads, each with a client of
its own, for SECONDS, and prints what each attach took, in ms.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import weightd

NAME = "crowded"


def hold(socket: str, count: int) -> None:
    """Hold so many leases."""
    clients = [weightd.connect(socket, timeout=60.0) for _ in range(count)]
    held = [client.attach(NAME) for client in clients]
    print(json.dumps(len(held)), flush=True)
    sys.stdin.read()


def attach(socket: str, threads: int, seconds: float) -> None:
    """Attach again and again."""
    clients = [weightd.connect(socket, timeout=60.0) for _ in range(threads)]
    times: list[list[float]] = [[] for _ in clients]
    for client in clients:
        client.attach(NAME).close()  # warms it up
    print(json.dumps(threads), flush=True)
    sys.stdin.readline()
    end = time.monotonic() + seconds

    def repeat(client: weightd.Client, found: list[float]) -> None:
        while time.monotonic() < end:
            start = time.perf_counter()
            attachment = client.attach(NAME)
            found.append(1e3 * (time.perf_counter() - start))
            attachment.close()

    running = [threading.Thread(target=repeat, args=pair) for pair in zip(clients, times, strict=True)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    print(json.dumps([taken for found in times for taken in found]))


if __name__ == "__main__":
    _, socket, what, number, *rest = sys.argv
    if what == "hold":
        hold(socket, int(number))
    else:
        attach(socket, int(number), float(rest[0]))
