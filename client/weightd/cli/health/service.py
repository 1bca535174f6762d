"""Judges systemd, the unit of the daemon, and the descriptor store in which weights outlive the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from weightd.cli.health.asking import Answer
from weightd.cli.health.finding import Finding, Status

UNIT = "weightd.service"
FABRIC = "nvidia-fabricmanager.service"
PERSISTENCE = "nvidia-persistenced.service"
_PROPERTIES = (
    "Id", "LoadState", "ActiveState", "Result", "MainPID", "Type", "FileDescriptorStoreMax", "NFileDescriptorStore",
    "FileDescriptorStorePreserve",
)  # fmt: skip
_NOTIFIES = ("notify", "notify-reload")
_LEASE_SHARE = 16
"""One descriptor in 16 is left for leases: no checkpoint is stored where only those are free."""
_PRESERVES_SINCE = 254

Properties = Mapping[str, str]


def show(*, user: bool) -> list[str]:
    """The command that prints what systemd knows of the units. It starts nothing."""
    options = ["--user"] if user else []
    wanted = f"--property={','.join(_PROPERTIES)}"
    return ["systemctl", *options, "show", "--no-pager", wanted, UNIT, FABRIC, PERSISTENCE]


def units(text: str) -> dict[str, Properties]:
    """What that command prints, as properties by unit."""
    blocks = [dict(line.partition("=")[::2] for line in block.splitlines()) for block in text.split("\n\n")]
    return {block["Id"]: block for block in blocks if "Id" in block}


class Systemd(NamedTuple):
    """What is known of systemd: whether it is this machine's init, its version, and what the two managers print."""

    booted: bool
    version: int | None
    system: Answer
    user: Answer


def judge_service(systemd: Systemd, oldest: int, daemon: Mapping[str, object]) -> list[Finding]:
    """Judge systemd and the unit; `oldest` is the version that the units were checked with.

    `daemon` are the facts of a daemon that answers, empty if none does.
    """
    if not systemd.booted:
        told = "systemd does not run here: loaded weights do not outlive the daemon"
        remedy = "run the daemon under a service manager that stores descriptors, or load again after a restart"
        return [Finding("systemd", Status.DOUBTFUL, told, remedy)]
    if failed := systemd.system.failed("systemd", "unit", "unit-type", "descriptor-store"):
        return failed
    found = [_version(systemd.version, oldest)]
    chosen = _choose(systemd, daemon)
    if chosen is None:
        told = f"there is no {UNIT}, of the system or of this user: loaded weights do not outlive the daemon"
        remedy = f"`weightd unit` prints one (for /etc/systemd/system/{UNIT}), and `weightd unit --user` one for you"
        return [*found, Finding("unit", Status.DOUBTFUL, told, remedy)]
    properties, user = chosen
    return [*found, _unit(properties, daemon, user=user), _type(properties), _store(properties, systemd.version)]


def _version(version: int | None, oldest: int) -> Finding:
    if version is None:
        return Finding("systemd", Status.UNKNOWN, "the version of systemd is not known")
    if version < oldest:
        told = f"systemd {version}; the units were not checked with versions before {oldest}"
        return Finding("systemd", Status.DOUBTFUL, told, "check the unit: `systemd-analyze verify weightd.service`")
    return Finding("systemd", Status.GOOD, f"systemd {version}")


def _choose(systemd: Systemd, daemon: Mapping[str, object]) -> tuple[Properties, bool] | None:
    """The unit of the daemon that answers, else one that is active, else one that is there; and whose it is."""
    both = [(units(answer.facts.get("text", "")).get(UNIT, {}), user) for answer, user in _managers(systemd)]
    there = [(unit, user) for unit, user in both if unit.get("LoadState", "not-found") != "not-found"]
    return max(there, key=lambda each: (_is_of(each[0], daemon), each[0].get("ActiveState") == "active"), default=None)


def _managers(systemd: Systemd) -> list[tuple[Answer, bool]]:
    return [(systemd.system, False), (systemd.user, True)]


def _is_of(unit: Properties, daemon: Mapping[str, object]) -> bool:
    return bool(daemon) and unit.get("MainPID", "0") == str(daemon["pid"]) != "0"


def _unit(unit: Properties, daemon: Mapping[str, object], *, user: bool) -> Finding:
    control = "systemctl --user" if user else "systemctl"
    loaded, active = unit.get("LoadState", ""), unit.get("ActiveState", "")
    told = f"{UNIT} {'of this user' if user else 'of the system'} is {active}"
    if loaded != "loaded":
        remedy = f"correct the unit: `{control} status weightd`"
        return Finding("unit", Status.BAD, f"{UNIT} cannot be used: it is {loaded}", remedy)
    if active == "failed":
        remedy = f"`journalctl{' --user' if user else ''} -u weightd` gives the reason; then `{control} start weightd`"
        return Finding("unit", Status.BAD, f"{told}: {unit.get('Result', 'no result')}", remedy)
    if daemon and daemon["pid"] and not _is_of(unit, daemon):
        remedy = f"stop that daemon and `{control} start weightd`, or choose the socket with WEIGHTD_SOCKET"
        other = f"{told}; the daemon that answers, pid {daemon['pid']}, is another"
        return Finding("unit", Status.DOUBTFUL, other, remedy)
    if active != "active":
        return Finding("unit", Status.DOUBTFUL, told, f"`{control} enable --now weightd`")
    return Finding("unit", Status.GOOD, told)


def _type(unit: Properties) -> Finding:
    kind = unit.get("Type", "")
    if not kind:
        return Finding("unit-type", Status.UNKNOWN, "systemd does not tell the type of the unit")
    if kind in _NOTIFIES:
        return Finding("unit-type", Status.GOOD, f"Type={kind}")
    return Finding("unit-type", Status.BAD, f"Type={kind}: no descriptor is stored", "set Type=notify in the unit")


def _store(unit: Properties, version: int | None) -> Finding:
    check = "descriptor-store"
    most, kept = unit.get("FileDescriptorStoreMax", ""), unit.get("NFileDescriptorStore", "")
    if not most.isdigit() or not kept.isdigit():
        return Finding(check, Status.UNKNOWN, "systemd does not tell what the store holds")
    remedy = "raise FileDescriptorStoreMax= of the unit (`systemctl edit weightd`), and restart the daemon"
    if most == "0":
        return Finding(check, Status.BAD, "the unit stores no descriptors: weights end with the daemon", remedy)
    told = f"{kept} of {most} descriptors are stored"
    free = int(most) - int(kept)
    if free <= 0:
        return Finding(check, Status.BAD, f"{told}: new checkpoints and leases end with the daemon", remedy)
    if free <= int(most) // _LEASE_SHARE:
        return Finding(check, Status.DOUBTFUL, f"{told}: new checkpoints end with the daemon", remedy)
    if version is not None and version >= _PRESERVES_SINCE and unit.get("FileDescriptorStorePreserve") == "no":
        kind = f"{told}; `systemctl stop` empties the store"
        return Finding(check, Status.DOUBTFUL, kind, "set FileDescriptorStorePreserve=yes, as `weightd unit` prints it")
    return Finding(check, Status.GOOD, told)
