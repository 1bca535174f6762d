"""Failures at every named point of weightd (weightd/_failpoints.py): error, delay and kill -9, and what comes of them.

`python -m failpoints --write docs/faults.md` tries all of them and writes the page; `make faults` says so.
"""
