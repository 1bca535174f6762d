"""Ping a daemon until standard input ends; print the milliseconds of each ping as a JSON list. For bench/load.py."""

from __future__ import annotations

import json
import select
import sys

import weightd

INTERVAL = 0.005

if __name__ == "__main__":
    found = []
    with weightd.connect(sys.argv[1]) as client:
        client.ping()  # sets up the channel
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], INTERVAL)[0]:
            found.append(client.ping() * 1e3)
    print(json.dumps(found), flush=True)
