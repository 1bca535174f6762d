"""What hostile peers do, as source that a process of another user executes (support/worker.py). For bench/attacks.py.

Each defines `attack()`, which is called again and again, on as many threads as it says. It has `socket`, the path of
the daemon's socket, `mine` and `zeros`, files of its own, and `client`.
"""

from __future__ import annotations

from typing import NamedTuple

from support.command_lines import CONNECT, HUGE_LINE


class Attack(NamedTuple):
    """A source, how many threads run it, seconds between two calls, and settings of the daemon."""

    source: str
    threads: int = 1
    pause: float = 0.0
    settings: tuple[tuple[str, object], ...] = ()


_SOCKETS = """
import resource, os
import socket as sockets
from support.wire import Peer
from weightd._proto.v1 import checkpoint_pb2, checkpoint_pb2_grpc, handles_pb2
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 20000), most))
kept = []

def handle_socket():
    made = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
    made.settimeout(2)
    made.connect(f"{socket}.handles")
    return made

def control_socket():
    made = sockets.socket(sockets.AF_UNIX)
    made.settimeout(2)
    made.connect(socket)
    return made
"""
_VERIFY_UNREAD = """
from support.http2 import Unreading
peer, unreading = Peer(socket), Unreading(socket)
message = checkpoint_pb2.VerifyCheckpointRequest(reference="victim").SerializeToString()
begun = iter(range(6))
def attack():
    if next(begun, None) is not None:
        unreading.call("/weightd.v1.CheckpointService/Verify", message, peer.token)
"""
_HOLD = """
def attack():
    kept.append(handle_socket())
    kept[-1].send(handles_pb2.HandleRequest(hello=handles_pb2.HelloRequest(protocol=1)).SerializeToString())
"""
_OFFERS = """
def attack():
    peer = Peer(socket)
    kept.append(peer)
    for _ in range(16):
        peer.ask(offer=handles_pb2.OfferRequest())
"""
_GARBAGE = """
def attack():
    with handle_socket() as made:
        made.send(os.urandom(60000))
"""
_LONG_NAME_ATTACH = """
peer = Peer(socket)
def attack():
    peer.ask(attach=handles_pb2.AttachRequest(reference="\\U000e0001" * 15000))
"""
_LONG_LOAD = """
import grpc
peer = Peer(socket)
calls = checkpoint_pb2_grpc.CheckpointServiceStub(grpc.insecure_channel(f"unix:{socket}"))
file = checkpoint_pb2.SourceFile
sources = [file(component="c" * 1000, file=f"{number:08d}" + "f" * 1000) for number in range(10000)]
message = checkpoint_pb2.LoadRequest(offer_id=1, name="n", sources=sources)
def attack():
    for _ in calls.Load(message, metadata=[("weightd-token", peer.token)]):
        pass
"""
_HEALTH = """
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
calls = health_pb2_grpc.HealthStub(grpc.insecure_channel(f"unix:{socket}"))
def attack():
    kept.append(calls.Watch(health_pb2.HealthCheckRequest(service="x" * 1000)))
"""
_EVENTS = """
clients = [weightd.connect(socket, timeout=20.0) for _ in range(8)]
for one in clients:
    for _ in range(8):
        kept.append(one.events(follow=True))
        next(kept[-1], None)
def attack():
    clients[0].attach("victim").close()
"""
_LEASES = """
peer = Peer(socket)
def attack():
    peer.ask(attach=handles_pb2.AttachRequest(reference="victim", manifest_only=True))
"""
_NAMES = """
from itertools import count
numbers = count()
def attack():
    client.load(mine, name=f"{next(numbers):08d}" + "n" * 1000)
"""
_PINS = """
client.load(mine, name="mine")
def attack():
    client.pin("mine")
    client.unpin("mine")
"""
_ZEROS = """
from itertools import count
numbers = count()
def attack():
    client.load(zeros, name=f"zeros {next(numbers)}")
    client.remove(f"zeros {next(numbers) - 1}")
"""
_ZERO_ATTACH = """
client.load(zeros, name="zeros")
peer = Peer(socket)
def attack():
    peer.ask(attach=handles_pb2.AttachRequest(reference="zeros", tensors=[handles_pb2.TensorKey(name="nope")]))
"""
_SHRINKING = """
import pathlib
file = pathlib.Path(mine)
data = file.read_bytes()
def attack():
    os.truncate(file, len(data) // 2)
    time.sleep(0.004)
    file.write_bytes(data)
    time.sleep(0.02)
import threading
def load():
    while True:
        try:
            client.attach(mine).close()
        except Exception:  # that it is refused is what a bystander must not notice
            pass
threading.Thread(target=load, daemon=True).start()
"""


def _calls(call: str) -> str:
    return f"def attack():\n    {call}\n"


def _command_line(size: int) -> str:
    return f"size = {size}\n{HUGE_LINE}\npath, times = socket, 1\ndef attack():\n    exec({CONNECT!r}, globals())\n"


ATTACKS: dict[str, Attack] = {
    "nothing": Attack(_calls("time.sleep(1)")),
    "a core that computes": Attack(_calls("sum(range(100_000))")),
    "command line of 512 MiB": Attack(_command_line(512 << 20), pause=0.05),
    "verifications, no byte read": Attack(_VERIFY_UNREAD, pause=0.1),
    "verifications without end": Attack(_calls("client.verify()"), threads=8),
    "connections": Attack(_calls("handle_socket().close()")),
    "connections with hello": Attack(_calls("Peer(socket).close()")),
    "garbage": Attack(_GARBAGE),
    "held connections": Attack(_HOLD, pause=0.001),
    "held control connections": Attack(_calls("kept.append(control_socket())"), pause=0.0005),
    "offers": Attack(_OFFERS),
    "references of 4 kB": Attack(_calls("client.inspect('x' * 4000, 'host')")),
    "references of 1 MB": Attack(_calls("client.inspect('x' * 1_000_000, 'host')")),
    "references of 30 MB": Attack(_calls("client.inspect('x' * 30_000_000, 'host')")),
    "long references to attach": Attack(_LONG_NAME_ATTACH),
    "loads with 20 MB of files": Attack(_LONG_LOAD),
    "health streams": Attack(_HEALTH, pause=0.001),
    "lists": Attack(_calls("client.checkpoints()"), threads=4),
    "64 readers of events": Attack(_EVENTS),
    "leases": Attack(_LEASES),
    "names of 1 kB": Attack(_NAMES),
    "pins": Attack(_PINS),
    "loads of 50,000 tensors without bytes": Attack(_ZEROS),
    "the same, refused": Attack(_ZEROS, settings=(("max_user_bytes", "1MiB"),)),
    "attaches to 50,000 tensors": Attack(_ZERO_ATTACH),
    "a file that shrinks": Attack(_SHRINKING),
}
SETUP = _SOCKETS
