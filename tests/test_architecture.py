"""Imports run one way: an `ast` walk over the sources holds it; subprocesses look what is in memory after an import.

The walk sees every import statement, also those inside functions, and `import_module`/`__import__` of a constant.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = (ROOT / "client", ROOT / "daemon", ROOT / "fleet")
MOST_LINES = 400
# No subject: everything would fit.
VAGUE = {"common", "misc", "helper", "helpers", "util", "utils"}

# Who alone may import a package, as patterns of module names. A package stands for all that is in it, and its own
# modules always may.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "torch": (
        "weightd.torch",
        "weightd._tensors",
        "weightd._assign",
        "weightd.recording",
        "weightd.binding",
        "weightd.integrations*",
    ),
    "weightd._tensors": ("weightd.torch", "weightd.binding", "weightd.integrations*"),
    "weightd._assign": ("weightd.torch", "weightd.integrations*"),
    "weightd.recording": ("weightd.binding", "weightd.integrations*"),
    "weightd.binding": ("weightd.integrations*",),
    "weightd.torch": ("weightd.integrations*",),
    "weightd.integrations": (),
    # `weightd top` writes sizes, names and events as the commands do.
    "weightd.cli": ("weightd.__main__", "weightd.top*"),
    "weightd.top": ("weightd.cli.watching",),
    "textual": ("weightd.top.application", "weightd.top.screens", "weightd.top.widgets"),
    "weightd_daemon": (
        "weightd_fleet.planning",
        "weightd_fleet.publishing*",
        "weightd_fleet.agent*",
        "weightd_fleet.engines.ray_asking",
    ),
    # The front door of a fleet: the only module of the client that opens it, and no other may pass through it.
    "weightd.fleet": (),
    "weightd_fleet": ("weightd.fleet",),
    "weightd_fleet.agent": ("weightd_fleet.service*", "weightd_fleet.engines*"),
    "weightd_fleet.service": ("weightd.fleet", "weightd_fleet.engines*"),
    "weightd_fleet.engines": ("weightd.fleet", "weightd_fleet.agent.__main__"),
    "kubernetes": ("weightd_fleet.engines.kubernetes_node",),
    "blake3": ("weightd_fleet.core.digests",),
    "weightd.page": ("weightd.web.server", "weightd.cli*"),
    "weightd.web": ("weightd.cli.browsing",),
    "aiohttp": ("weightd.web.server",),
    **dict.fromkeys(
        ("grpc", "grpc_health", "grpc_reflection", "grpc_status"),
        (
            "weightd.client",
            "weightd._transport.rpc",
            "weightd_daemon.api.grpc_server",
            "weightd_daemon.api.error_mapping",
            "weightd_fleet.agent.peer",
            "weightd_fleet.agent.peer_service",
            "weightd_fleet.agent.tls",
        ),
    ),
    **dict.fromkeys(("typer", "click"), ("weightd.cli*",)),
    "rich": ("weightd.cli*", "weightd.top*"),
    "cuda": ("weightd._mapping.cuda_*", "weightd_daemon.devices.cuda_*"),
    "pynvml": ("weightd._mapping.cuda_*", "weightd_daemon.devices.cuda_*", "weightd.top.gpu_totals"),
    **dict.fromkeys(("pickle", "marshal", "shelve", "dill", "cloudpickle"), ()),
    "ray": ("weightd_fleet.engines.ray*",),
    "sqlite3": ("weightd_daemon.persistence.digest_index",),
    "zstandard": ("weightd_daemon.plans.near_duplicates",),
    "gguf": ("weightd.gguf", "weightd_daemon.formats.gguf"),
    "prometheus_client": ("weightd_daemon.monitoring.metrics",),
    "ctypes": ("weightd._libc", "weightd._mapping.cuda_driver", "weightd_daemon.libc"),
    "weightd_daemon.app": ("weightd_daemon.__main__",),
    "weightd_daemon.planning": ("weightd_fleet.planning",),
    "weightd_daemon.diagnosis": (),
    **dict.fromkeys(
        (f"weightd_daemon.devices.{name}" for name in ("host", "host_io", "cuda_vmm", "cuda_ipc", "cuda_io")),
        ("weightd_daemon.app", "weightd_daemon.devices*"),
    ),
}
# Which rooms of the daemon a room may import: those below it. The composition roots may import all: app.py with
# bookkeeping.py; planning.py, which `weightd plan` runs without a daemon; and diagnosis.py, for `weightd doctor`.
DAEMON = "weightd_daemon"
ROOMS: dict[str, tuple[str, ...]] = {
    "core": (),
    "config": ("core",),
    "libc": (),
    "answers": ("libc",),
    "lookups": (),
    "log_line": (),
    "wire": ("core", "lookups"),
    "logs": ("config", "log_line"),
    "heap": ("libc",),
    "turns": (),
    "devices": ("core", "config", "libc", "turns"),
    "formats": ("core",),
    "loader": ("core", "devices", "formats", "libc"),
    "loads": ("core", "devices", "heap", "loader", "log_line", "turns"),
    "handles": ("core", "devices", "loads", "log_line", "lookups", "wire"),
    "persistence": ("core", "devices", "handles", "libc", "loads", "log_line"),
    "plans": ("core", "loader", "loads", "persistence"),
    "residency": ("core", "handles", "heap", "loads", "log_line", "persistence"),
    "operations": ("core", "config", "devices", "handles", "loads", "log_line", "persistence"),
    "inspection": ("core", "config", "devices", "handles", "loads", "turns", "wire"),
    "monitoring": (
        "core",
        "config",
        "devices",
        "handles",
        "inspection",
        "loads",
        "log_line",
        "operations",
        "persistence",
        "wire",
    ),
    "api": (
        "config",
        "core",
        "devices",
        "handles",
        "heap",
        "inspection",
        "loads",
        "log_line",
        "monitoring",
        "operations",
        "turns",
        "wire",
    ),
}
ROOTS = ("app", "bookkeeping", "diagnosis", "planning", "__main__")
# Exceptions, good only inside a function or under TYPE_CHECKING: attaching without tensors must not need torch.
LAZILY_IN = dict.fromkeys(("torch", "weightd._tensors", "weightd._assign"), ("weightd.attachment",))

# What is public though it begins with an underscore, so that it cannot be a field.
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}

DYNAMIC = {"import_module", "__import__"}

CORE = "weightd_daemon.core"
FLEET_CORE = "weightd_fleet.core"
# weightd.layouts says what belongs together, to the loader, to the core that lists it and to the client that uses it.
CORE_MAY = {
    CORE: (
        "xxhash",
        "weightd.types",
        "weightd.plan_report",
        "weightd.errors",
        "weightd.layouts",
        "weightd._sizes",
        CORE,
    ),
    FLEET_CORE: (
        "blake3",
        "numpy",
        "weightd.types",
        "weightd.errors",
        "weightd._references.index",
        "weightd._sizes",
        FLEET_CORE,
    ),
}
# Standard library that the pure core has no business with: files, clock, randomness, processes, threads, sockets.
# fmt: off
IMPURE = {
    "asyncio", "concurrent", "ctypes", "fcntl", "glob", "io", "logging", "mmap", "multiprocessing", "os", "pathlib",
    "random", "secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "subprocess", "tempfile",
    "threading", "time", "uuid",
}
# fmt: on


# Imports a module, with `.*` also all modules in it, and prints which of the other arguments are in memory then.
IMPORT_ALL = """
import importlib, pkgutil, sys
name, star, _ = sys.argv[1].partition(".*")
module = importlib.import_module(name)
for found in pkgutil.walk_packages(module.__path__, name + ".") if star else ():
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
print(*sorted(sys.modules.keys() & set(sys.argv[2:])))
"""


class Import(NamedTuple):
    """One imported name, such as `torch.nn`; `lazy` inside a function or under `if TYPE_CHECKING`."""

    name: str
    line: int
    lazy: bool


def imports(module: str, tree: ast.AST, is_package: bool, lazy: bool = False) -> Iterator[Import]:
    """Every import below `tree`; relative ones resolved against `module`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            kept = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join(kept + ([node.module] if node.module else []))
            yield from (Import(f"{base}.{alias.name}", node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in DYNAMIC:
            constants = (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))
            yield from (Import(str(value), node.lineno, lazy) for value in constants)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        yield from imports(module, node, is_package, lazy or function or typing_only)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def may(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What `module` imports and may not, one line each."""
    found = []
    for name, line, lazy in imports(module, ast.parse(source), is_package):
        for package, patterns in ONLY_IN.items():
            allowed = may(module, patterns) or (lazy and may(module, LAZILY_IN.get(package, ())))
            if within(name, package) and not within(module, package) and not allowed:
                found.append(f"{module}:{line} imports {name}; {package} belongs to {', '.join(patterns) or 'nobody'}")
        for core, allowed_there in CORE_MAY.items():
            if within(module, core) and not any(within(name, package) for package in allowed_there):
                top = name.split(".")[0]
                if top in IMPURE or top not in sys.stdlib_module_names:
                    found.append(f"{module}:{line} imports {name}; the core is pure")
        room, other = room_of(module), room_of(name)
        if room and other and room != other and room not in ROOTS and other not in ROOMS.get(room, ()):
            found.append(f"{module}:{line} imports {name}; {room} may import {', '.join(ROOMS.get(room, ()))}")
    return found


def room_of(name: str) -> str:
    """The room of a module of the daemon, or of a name in it; "" for the package's own names and all others."""
    package, _, rest = name.partition(".")
    room = rest.partition(".")[0]
    return room if package == DAEMON and room in (*ROOMS, *ROOTS) else ""


def modules() -> Iterator[tuple[str, Path]]:
    """Every hand-written module: its name and file."""
    for root in SOURCE_ROOTS:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if "_proto" not in parts:
                yield ".".join(part for part in parts if part != "__init__"), path


def test_walk_sees_every_tree() -> None:
    names = {name for name, _ in modules()}
    assert {
        "weightd",
        "weightd.errors",
        "weightd_daemon.app",
        "weightd_daemon.core.store",
        "weightd_fleet.core",
    } <= names


def test_every_room_has_its_place() -> None:
    rooms = {path.name for path in (ROOT / "daemon" / DAEMON).iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= set(ROOMS)
    later = list(ROOMS)
    assert all(later.index(below) < later.index(room) for room, allowed in ROOMS.items() for below in allowed)


def test_imports_run_one_way() -> None:
    found = [
        line
        for module, path in modules()
        for line in violations(module, path.read_text(), is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("weightd.client", "import weightd_daemon.app"),
        ("weightd.cli.serve", "def serve():\n    importlib.import_module('weightd_daemon.app')"),
        ("weightd.attachment", "import torch"),
        ("weightd.client", "def state():\n    import torch"),
        ("weightd.attachment", "def load_into():\n    from .integrations import sharing"),
        ("weightd.attachment", "def tensor():\n    from .torch import make_tensor"),
        ("weightd._mapping.host", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("weightd_daemon.loader.copy", "from torch.utils import dlpack"),
        ("weightd_daemon.loader.copy", "import weightd.torch"),
        ("weightd_daemon.app", "import grpc.aio"),
        ("weightd._transport.handle_socket", "try:\n    import grpc\nexcept ImportError:\n    pass"),
        ("weightd.types", "from rich.table import Table"),
        ("weightd.top.checkpoint_rows", "from textual.app import App"),
        ("weightd.client", "from weightd.top.reader import Reader"),
        ("weightd_daemon.devices.host", "from cuda.bindings import driver"),
        ("weightd._transport.convert", "import pickle"),
        ("weightd_daemon.core.store", "import sqlite3"),
        ("weightd_daemon.formats.split", "def check():\n    import gguf"),
        ("weightd_daemon.core.store", "import time"),
        ("weightd_daemon.core.store", "from weightd import client"),
        ("weightd_daemon.core.store", "from ..devices import device"),
        ("weightd_daemon.core", "from ..formats import safetensors"),
        ("weightd_daemon.loader.job", "from weightd_daemon.devices import host"),
        ("weightd_daemon.loader.job", "from weightd_daemon.persistence.digest_index import PersistentDigestIndex"),
        ("weightd_daemon.loader.job", "if TYPE_CHECKING:\n    from weightd_daemon.loads import flight"),
        ("weightd_daemon.persistence.restore", "from weightd_daemon.api.context import GrpcServiceContext"),
        ("weightd_daemon.api.grpc_server", "from weightd_daemon.app import Daemon"),
        ("weightd_daemon.devices.cuda_io", "def view():\n    import ctypes"),
        ("weightd_daemon.monitoring.http", "from prometheus_client import Counter"),
        ("weightd.cli.fleet_group", "from weightd_fleet import planning"),
        ("weightd.client", "from weightd import fleet"),
        ("weightd.client", "from weightd_fleet.service import results"),
        ("weightd_fleet.service.loading", "import ray"),
        ("weightd_fleet.agent.serving", "from weightd_fleet.service import results"),
        ("weightd_daemon.loads.flight", "from weightd_fleet.core.atoms import Atoms"),
        ("weightd_fleet.agent.serving", "import ray"),
        ("weightd_fleet.core.placing", "import time"),
        ("weightd_fleet.core.placing", "from weightd_fleet.publishing import state"),
        ("weightd_fleet.core.manifest", "from blake3 import blake3"),
        ("weightd_fleet.agent.agent", "def label():\n    from weightd_fleet.engines import kubernetes_node"),
        ("weightd_fleet.engines.kubernetes_labels", "from kubernetes import client"),
        ("weightd_fleet.core.manifest", "from weightd_daemon.core.digest import new_hasher"),
    ],
)
def test_walk_finds_a_violation(module: str, source: str) -> None:
    assert violations(module, source, is_package=module == CORE)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("weightd.torch", "import torch"),
        ("weightd.attachment", "def state_dict():\n    import torch"),
        ("weightd.attachment", "def load_into():\n    from ._assign import assign"),
        ("weightd._transport.rpc", "import grpc"),
        ("weightd.attachment", "from .gguf import GgufTensor\nfrom . import gguf"),
        ("weightd_daemon.api.grpc_server", "import grpc.aio\nfrom weightd._proto.v1 import daemon_pb2_grpc"),
        ("weightd_daemon.core.arena", "import bisect\nfrom . import ranges\nfrom weightd.types import ALIGNMENT"),
        ("weightd_daemon.core", "from . import ranges"),
        ("weightd_daemon.app", "from weightd_daemon.devices import host\nimport weightd_daemon.api.grpc_server"),
        ("weightd_daemon.loader.job", "from weightd_daemon.devices.device import Device\nimport torchlike"),
        ("weightd_fleet.core.placing", "import numpy as np\nfrom .books import PlacementBooks"),
        ("weightd_fleet.publishing.reading", "from weightd_daemon.loader.source import LoaderSource"),
    ],
)
def test_walk_lets_the_rest_pass(module: str, source: str) -> None:
    assert violations(module, source, is_package=module == CORE) == []


def graph() -> dict[str, set[str]]:
    """Which modules a module imports, wherever it does so: in functions and for types as well."""
    paths = dict(modules())
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        tree = ast.parse(path.read_text())
        names = {name for name, *_ in imports(module, tree, path.name == "__init__.py")}
        found[module] = {owner(name, paths) for name in names} - {"", module}
    return found


def owner(name: str, known: Container[str]) -> str:
    """The module that an imported name belongs to; "" where it is none of ours, or a generated one."""
    if "_proto" in name.split("."):
        return ""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Modules that can each be reached from one another, and from themselves."""
    reached: dict[str, set[str]] = {}
    for module in edges:
        seen: set[str] = set()
        ahead = [module]
        while ahead:
            fresh = edges.get(ahead.pop(), set()) - seen
            seen |= fresh
            ahead += fresh
        reached[module] = seen
    found = {frozenset(other for other in seen if module in reached[other]) for module, seen in reached.items()}
    return sorted((set(circle) for circle in found if circle), key=sorted)


def test_there_are_no_circles() -> None:
    found = circles(graph())
    assert not found, "\n".join(", ".join(sorted(circle)) for circle in found)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}) == [{"b", "c"}, {"e"}]
    source = "if TYPE_CHECKING:\n    from ..core.store import Store\ndef f():\n    from . import loads"
    names = {name for name, *_ in imports("weightd_daemon.loads.flight", ast.parse(source), is_package=False)}
    assert {owner(name, graph()) for name in names} == {"weightd_daemon.core.store", "weightd_daemon.loads.loads"}


def reaches(source: str) -> list[str]:
    """Where a module uses an underscore name of what it has not defined itself, such as `store._blobs`."""
    tree = ast.parse(source)
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            own.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if not is_self(node.value) and node.attr not in own | OF_NAMED_TUPLES
    ]


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def test_nobody_in_the_daemon_reaches_into_anothers_underscore() -> None:
    found = [
        f"{module}:{line}" for module, path in modules() if within(module, DAEMON) for line in reaches(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_a_reach_is_found() -> None:
    own = "class Loads:\n    def __init__(self):\n        self._all = {}\n    def like(self, other):\n        "
    assert reaches(own + "return other._all == self._all and other.key._replace(device='')") == []
    assert reaches(own + "return self._store._blobs") == ["5: self._store._blobs"]
    assert reaches("def fit(store):\n    store._evict_one()") == ["2: store._evict_one"]


def namesakes(paths: Iterable[PurePath]) -> list[str]:
    """Modules and folders of one package that cannot be told apart by name, and names that say nothing.

    A folder may hold a module of its own name, such as loads/loads.py.
    """
    where: dict[str, set[PurePath]] = {}
    for path in paths:
        for part in (path, *path.parents[:-1]):
            if part.stem not in {"__init__", "__main__"} and part.stem != part.parent.name:
                where.setdefault(part.stem.strip("_"), set()).add(part)
    found = [", ".join(sorted(map(str, same))) for same in where.values() if len(same) > 1]
    return found + sorted(str(part) for name in VAGUE & where.keys() for part in where[name])


@pytest.mark.parametrize("package", ["client/weightd", "daemon/weightd_daemon", "fleet/weightd_fleet"])
def test_no_two_modules_have_one_name(package: str) -> None:
    files = (path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*.py") if "_proto" not in path.parts)
    assert namesakes(files) == []


def test_namesakes_are_found() -> None:
    paths = ["__init__.py", "api/__init__.py", "loads/__init__.py", "loads/loads.py", "loads/request.py", "app.py"]
    assert namesakes(map(PurePath, paths)) == []
    assert namesakes(map(PurePath, [*paths, "api/request.py"])) == ["api/request.py, loads/request.py"]
    assert namesakes(map(PurePath, [*paths, "core/_app.py"])) == ["app.py, core/_app.py"]
    assert namesakes(map(PurePath, [*paths, "core/api.py"])) == ["api, core/api.py"]
    assert namesakes(map(PurePath, [*paths, "core/misc.py"])) == ["core/misc.py"]
    assert namesakes(map(PurePath, [*paths, "common/x.py"])) == ["common"]


def test_modules_are_small() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in modules()}
    assert {module: lines for module, lines in lengths.items() if lines > MOST_LINES} == {}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("weightd", "torch grpc numpy typer rich weightd_daemon"),
        ("weightd.attachment", "torch grpc numpy gguf typer rich weightd_daemon"),
        ("weightd.torch", "grpc typer rich weightd_daemon"),
        ("weightd.integrations.plugins", "torch grpc numpy vllm sglang weightd_daemon"),
        ("weightd.cli.app", "torch grpc textual weightd.top weightd_daemon"),
        ("weightd_daemon.app", "torch numpy"),
        ("weightd_daemon.planning", "torch grpc typer rich numpy zstandard"),
        ("weightd_daemon.diagnosis", "torch grpc typer rich xxhash cuda pynvml"),
        ("weightd.cli.health.daemon_look", "torch typer rich weightd_daemon"),
        ("weightd_daemon.loader.*", "torch numpy gguf grpc typer rich"),
        ("weightd_fleet.core.*", "torch grpc typer rich weightd_daemon"),
        ("weightd_fleet.service.*", "torch ray typer rich"),
        ("weightd.fleet", "torch grpc numpy ray typer rich weightd_daemon"),
    ],
)
def test_import_brings_no(module: str, absent: str) -> None:
    done = python(IMPORT_ALL, module, *absent.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_package_itself_imports_its_errors_and_nothing_else() -> None:
    """Whoever only catches weightd's errors pays for nothing: no other module, of ours or of the standard library."""
    known = "import __future__, collections.abc, sys, typing\nbefore = set(sys.modules)\n"
    show = f"{known}import weightd\nprint(*set(sys.modules) - before)"
    assert sorted(python(show).stdout.split()) == ["weightd", "weightd.errors"]


def test_import_check_can_fail() -> None:
    assert python(IMPORT_ALL, "weightd", "weightd", "torch").stdout.split() == ["weightd"]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": ":".join(map(str, SOURCE_ROOTS)), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
