"""A lock that is made at import is renewed in a forked child: the thread that may hold it is not there."""

from __future__ import annotations

import ast
import os
import threading
from collections.abc import Iterator

import pytest

from test_architecture import modules

LOCKS = {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier", "Queue", "SimpleQueue"}


def made_at_import(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names that a module gives, at its top or in a class, to what has a lock in it."""
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    for statement in (statement for body in bodies for statement in body):
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Call):
            called = ast.unparse(statement.value.func).rpartition(".")[2]
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if called in LOCKS:
                yield from ((ast.unparse(target), statement.lineno) for target in targets)


def renewed(tree: ast.Module) -> set[str]:
    """Names that a function assigns which is registered for forked children."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    registered = {
        ast.unparse(keyword.value)
        for call in calls
        if ast.unparse(call.func) == "os.register_at_fork"
        for keyword in call.keywords
        if keyword.arg == "after_in_child"
    }
    found: set[str] = set()
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name in registered:
            shared = {name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names}
            assigned = {
                target.id
                for node in ast.walk(function)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                for target in [node]
            }
            found |= shared & assigned
    return found


def held_by_nobody(source: str) -> list[str]:
    """Locks of a module that a forked child would have as they were."""
    tree = ast.parse(source)
    known = renewed(tree)
    return [f"{name} (line {line})" for name, line in made_at_import(tree) if name not in known]


def test_every_lock_that_is_made_at_import_is_renewed_in_a_forked_child() -> None:
    """Of what may be imported by a process that forks: the library, that is. The daemon and its loaders do not fork."""
    found = {
        module: locks
        for module, path in modules()
        if module.partition(".")[0] == "weightd" and (locks := held_by_nobody(path.read_text()))
    }
    assert found == {}


def test_the_daemon_forks_nothing_of_its_own() -> None:
    forks = {
        module
        for module, path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.fork", "os.forkpty", "multiprocessing.Process")
    }
    assert forks == set()


@pytest.mark.parametrize(
    "source",
    [
        "_lock = threading.Lock()",
        "_lock: threading.RLock = RLock()",
        "class A:\n    lock = threading.Condition()",
        "_lock = threading.Lock()\ndef f():\n    _lock = 1\nos.register_at_fork(after_in_child=f)",
        "_lock = threading.Lock()\ndef f():\n    global _lock\n    _lock = 1",
    ],
)
def test_the_walk_finds_them(source: str) -> None:
    assert held_by_nobody(source)


def test_the_walk_lets_the_rest_pass() -> None:
    good = "_lock = Lock()\ndef f():\n    global _lock\n    _lock = Lock()\nos.register_at_fork(after_in_child=f)"
    assert held_by_nobody(good) == []
    assert held_by_nobody("class A:\n    def __init__(self):\n        self.lock = threading.Lock()") == []


@pytest.mark.parametrize("module", ["cuda_ipc", "cuda_driver"])
def test_a_child_of_a_process_whose_other_thread_holds_the_lock(module: str) -> None:
    from weightd._mapping import cuda_driver, cuda_ipc

    chosen = {"cuda_ipc": cuda_ipc, "cuda_driver": cuda_driver}[module]
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with chosen._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    try:
        child = os.fork()
        if not child:
            os._exit(0 if chosen._lock.acquire(timeout=5) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        done.set()
        thread.join()
