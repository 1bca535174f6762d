"""Memory limits of control groups, read from trees that the test makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightd_daemon.devices.cgroup import memory_limit

GIB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712
V1 = "32 31 0:29 {root} {point} rw,relatime shared:9 - cgroup cgroup rw,memory"
V2 = "33 31 0:30 {root} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
CPU = "34 31 0:31 / {point} rw,relatime - cgroup cgroup rw,cpu,cpuacct"


class Tree:
    """A process's files below one folder, and hierarchies mounted below another."""

    def __init__(self, folder: Path) -> None:
        self.process, self.mounted = folder / "proc", folder / "sys fs"
        self.process.mkdir()
        self._mounts: list[str] = []

    def groups(self, *lines: str) -> None:
        (self.process / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def mount(self, line: str, name: str, root: str = "/") -> None:
        """Mount a hierarchy; the kernel writes a space in a path as \\040."""
        point = str(self.mounted / name).replace(" ", "\\040")
        self._mounts.append(line.format(root=root, point=point))
        (self.process / "mountinfo").write_text("".join(f"{line}\n" for line in self._mounts))

    def write(self, path: str, text: object) -> None:
        file = self.mounted / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_nothing_is_known_where_there_is_no_proc(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None


@pytest.mark.parametrize("group", ["/", "/user.slice/a.scope"])
def test_version_2_without_a_limit(tree: Tree, group: str) -> None:
    tree.groups(f"0::{group}")
    tree.mount(V2, "cgroup")
    tree.write("cgroup/user.slice/a.scope/memory.max", "max")
    assert memory_limit(tree.process) is None


@pytest.mark.parametrize(("inner", "outer"), [(3 * GIB, 2 * GIB), (2 * GIB, 3 * GIB), ("max", 2 * GIB)])
def test_version_2_counts_the_lowest_on_the_path(tree: Tree, inner: object, outer: int) -> None:
    tree.groups("0::/a/b")
    tree.mount(V2, "cgroup")
    tree.write("cgroup/a/b/memory.max", inner)
    tree.write("cgroup/a/memory.max", outer)
    tree.write("memory.max", 1)  # above the mount: it is no group
    assert memory_limit(tree.process) == 2 * GIB


@pytest.mark.parametrize(("inner", "outer"), [(3 * GIB, 2 * GIB), (2 * GIB, 3 * GIB), (NO_LIMIT_V1, 2 * GIB)])
def test_version_1_counts_the_lowest_on_the_path(tree: Tree, inner: int, outer: int) -> None:
    tree.groups("5:cpu,cpuacct:/", "4:memory:/a/b", "1:name=systemd:/init")
    tree.mount(CPU, "cpu")
    tree.mount(V1, "memory")
    tree.write("cpu/a/b/memory.limit_in_bytes", 1)
    tree.write("memory/a/b/memory.limit_in_bytes", inner)
    tree.write("memory/a/memory.limit_in_bytes", outer)
    assert memory_limit(tree.process) == 2 * GIB


def test_version_1_asks_the_kernel_which_limits_count(tree: Tree) -> None:
    """With use_hierarchy = 0 outer ones do not; in a container they do, and cannot be seen."""
    tree.groups("4:memory:/a/b")
    tree.mount(V1, "memory")
    tree.write("memory/a/b/memory.limit_in_bytes", 3 * GIB)
    tree.write("memory/a/memory.limit_in_bytes", 2 * GIB)
    tree.write("memory/a/b/memory.stat", f"cache 5\nhierarchical_memory_limit {GIB}\nhierarchical_memsw_limit 7")
    assert memory_limit(tree.process) == GIB


@pytest.mark.parametrize("stat", ["", f"hierarchical_memory_limit {NO_LIMIT_V1}"])
def test_version_1_shows_a_huge_number_for_no_limit(tree: Tree, stat: str) -> None:
    tree.groups("4:memory:/a")
    tree.mount(V1, "memory")
    tree.write("memory/a/memory.limit_in_bytes", NO_LIMIT_V1)
    tree.write("memory/a/memory.stat", stat)
    assert memory_limit(tree.process) is None


@pytest.mark.parametrize(("path", "limit"), [("memory/a/memory.limit_in_bytes", GIB), ("unified/b/memory.max", GIB)])
def test_side_by_side_the_hierarchy_that_limits_memory_counts(tree: Tree, path: str, limit: int) -> None:
    tree.groups("4:memory:/a", "0::/b")
    tree.mount(V1, "memory")
    tree.mount(V2, "unified")
    tree.write("memory/a/memory.limit_in_bytes", NO_LIMIT_V1)
    tree.write("unified/a/memory.max", 1)  # another group, of the same name as that of version 1
    tree.write(path, limit)
    assert memory_limit(tree.process) == GIB


@pytest.mark.parametrize(
    ("group", "root"),
    [
        ("/docker/c0ffee", "/docker/c0ffee"),  # without a namespace of groups the container mounts its own
        ("/docker/c0ffee/..", "/docker/c0ffee"),
        ("/", "/../../docker/c0ffee"),  # with one, and mounted from outside
        ("/../elsewhere", "/"),  # moved out of its namespace
    ],
)
@pytest.mark.parametrize(("number", "line", "file"), [("4:memory", V1, "limit_in_bytes"), ("0:", V2, "max")])
def test_a_container_sees_its_group_at_the_mount_point(
    tree: Tree, group: str, root: str, number: str, line: str, file: str
) -> None:
    tree.groups(f"{number}:{group}")
    tree.mount(line, "group", root)
    tree.write(f"group/memory.{file}", GIB)
    tree.write(f"elsewhere/memory.{file}", 1)
    assert memory_limit(tree.process) == GIB


def test_lines_that_are_none_are_passed_over(tree: Tree) -> None:
    tree.groups("", "memory", "4:memory", "x:y:z", "0::relative", "4:memory:/a")
    tree.mount("31 23 0:28 / /proc", "nothing")
    tree.mount("", "nothing")
    tree.mount("36 35 - cgroup2", "nothing")
    tree.mount(V1, "memory")
    tree.write("memory/a/memory.limit_in_bytes", GIB)
    assert memory_limit(tree.process) == GIB
