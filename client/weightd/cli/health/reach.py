"""Judges how this user reaches the daemon: socket, folder, who may connect, the daemon that answers, its devices."""

from __future__ import annotations

import stat
from typing import Any

from weightd._sizes import size
from weightd.cli.health.asking import Answer
from weightd.cli.health.finding import Finding, Status

_Facts = dict[str, Any]
_SERVE = "start a daemon with `weightd serve`, or as a service (`weightd unit`); or set WEIGHTD_SOCKET"


def judge_socket(answer: Answer) -> list[Finding]:
    """Judge the answer of the look `socket`."""
    if failed := answer.failed("socket", "socket-folder", "access"):
        return failed
    facts = answer.facts
    if facts["refused"]:
        untold = "no socket may be used"
        return [
            Finding("socket", Status.BAD, facts["refused"], "use another path: --socket, or WEIGHTD_SOCKET"),
            Finding("socket-folder", Status.UNKNOWN, untold),
            Finding("access", Status.UNKNOWN, untold),
        ]
    return [_socket(facts), _folder(facts), _access(facts)]


def _socket(facts: _Facts) -> Finding:
    path, status = facts["socket"], facts["status"]
    if status is not None and status["is_socket"]:
        return Finding("socket", Status.GOOD, path)
    if status is not None:
        return Finding("socket", Status.BAD, f"{path} is not a socket", "move it away, or use another path: --socket")
    if facts["barrier"]:
        return Finding("socket", Status.UNKNOWN, f"{path} is hidden from this user")
    looked = ", ".join(facts["candidates"])
    return Finding("socket", Status.BAD, f"no socket at {looked}", _SERVE)


def _folder(facts: _Facts) -> Finding:
    path, folder = facts["path"], facts["folder"]
    if folder is None:
        why = "is hidden from this user" if facts["barrier"] else "does not exist; a daemon makes it with mode 0700"
        return Finding("socket-folder", Status.UNKNOWN, f"{path} {why}")
    mode, owner = folder["mode"], folder["owner"]
    told = f"{path} has mode {mode:04o}, owner {owner}, group {folder['group']}"
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        remedy = f"any user can put a socket of his own there: `chmod o-w {path}`"
        return Finding("socket-folder", Status.BAD, told, remedy)
    if mode & stat.S_IWOTH:
        remedy = "any user may be the first to put a socket there: choose a folder that others cannot write to"
        return Finding("socket-folder", Status.DOUBTFUL, told, remedy)
    if mode & stat.S_IWGRP:
        remedy = f"group {folder['group']} can put another socket there: `chmod g-w {path}`"
        return Finding("socket-folder", Status.DOUBTFUL, told, remedy)
    trusted = {0, facts["uid"], *([facts["status"]["uid"]] if facts["status"] else [])}
    if folder["uid"] not in trusted:
        remedy = f"{owner} can put another socket there: use a folder of the daemon's user, or of root"
        return Finding("socket-folder", Status.DOUBTFUL, told, remedy)
    return Finding("socket-folder", Status.GOOD, told)


def _access(facts: _Facts) -> Finding:
    status, folder, user = facts["status"], facts["folder"], facts["user"]
    if facts["barrier"]:
        return Finding("access", Status.BAD, f"{user} may not connect", facts["barrier"])
    if status is None or folder is None:
        return Finding("access", Status.UNKNOWN, "there is no socket to connect to")
    if status["mode"] & stat.S_IWOTH and folder["mode"] & stat.S_IXOTH:
        remedy = 'give the socket to a group (`socket_mode = "0660"`), unless that is meant; see docs/security.md'
        return Finding("access", Status.DOUBTFUL, "every user of this machine may connect", remedy)
    allowed = [f"user {status['owner']}"]
    if status["mode"] & stat.S_IWGRP and (folder["mode"] & stat.S_IXOTH or folder["mode"] & stat.S_IXGRP):
        allowed.append(f"group {status['group']}")
    elif status["mode"] & stat.S_IWGRP:
        remedy = f"let the group into the folder: `chmod g+x {facts['path']}`, or set socket_mode to 0600"
        told = f"the socket is for group {status['group']}, and its folder keeps the group out"
        return Finding("access", Status.DOUBTFUL, told, remedy)
    listed = f"{' and '.join(allowed)} may connect"
    return Finding("access", Status.GOOD, listed if status["owner"] == user else f"{listed}; {user} is among them")


def judge_daemon(answer: Answer, ours: str) -> list[Finding]:
    """Judge the answer of the look `daemon`; `ours` is this installation's version."""
    if failed := answer.failed("daemon", "devices"):
        return failed
    facts = answer.facts
    if facts["error"]:
        status = Status.DOUBTFUL if facts["error"] == "DaemonBusyError" else Status.BAD
        remedies = {
            "DaemonBusyError": "try again; see its log (`journalctl -u weightd`) if that does not help",
            "ProtocolMismatchError": "install one version of weightd for the daemon and its clients, and restart it",
        }
        message, _, advice = facts["message"].partition("; ")
        return [
            Finding("daemon", status, message, remedies.get(facts["error"], advice)),
            Finding("devices", Status.UNKNOWN, "no daemon answers"),
        ]
    return [_daemon(facts, ours), _devices(facts["devices"])]


def _daemon(facts: _Facts, ours: str) -> Finding:
    pid = f"pid {facts['pid']}" if facts["pid"] else "of another PID namespace"
    told = f"version {facts['version']} answers, {pid}, user {facts['user']}, up {facts['uptime']:.0f} s"
    if facts["state"] != "serving":
        remedy = "`weightd drain --undo` ends the drain"
        return Finding("daemon", Status.DOUBTFUL, f"{told}; it is {facts['state']} and accepts no loads", remedy)
    if facts["version"] != ours:
        remedy = "restart the daemon after an upgrade (`systemctl restart weightd`), or upgrade this installation"
        return Finding("daemon", Status.DOUBTFUL, f"{told}; this command is version {ours}", remedy)
    return Finding("daemon", Status.GOOD, told)


def _devices(devices: list[_Facts]) -> Finding:
    absent = [f"{each['uuid']}: {each['absence']}" for each in devices if each["absence"]]
    if absent:
        remedy = 'see "Absent GPU" in docs/operations.md; `weightd drain --forget GPU-UUID` gives up what is kept'
        return Finding("devices", Status.DOUBTFUL, f"absent: {'; '.join(absent)}", remedy)
    told = ", ".join(f"{each['uuid']} {size(each['used'])} of {size(each['budget'])}" for each in devices)
    return Finding("devices", Status.GOOD, f"used: {told}")
