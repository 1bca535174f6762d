"""A client that imports nothing of weightd, as docs/protocol.md says: it lists, attaches, and reads a tensor.

It needs grpcio, grpcio-tools and the protos, which lie in the wheel (`weightd/protos`) and in the checkout (`protos`):

    mkdir weightd_wire
    cp PROTOS/weightd/v1/*.proto weightd_wire
    sed -i 's|"weightd/v1/|"weightd_wire/|' weightd_wire/*.proto
    python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. weightd_wire/*.proto
    PYTHONPATH=. python wire_client.py /run/weightd/weightd.sock NAME

The stubs are in a package of another name than the protos': one called weightd would hide the library. A process that
imports these stubs cannot import the library as well, for both register the same messages.
"""

import hashlib
import mmap
import socket
import sys
from typing import Any
from urllib.parse import quote

import grpc
from weightd_wire import checkpoint_pb2, checkpoint_pb2_grpc, handles_pb2

MAX_FRAME, MAX_DESCRIPTORS = 1 << 16, 253


def ask(connection: socket.socket, **body: Any) -> tuple[Any, list[int]]:
    """Send one request on the handle socket. Returns its answer and the descriptors that came with it."""
    connection.send(handles_pb2.HandleRequest(**body).SerializeToString())
    data, descriptors, flags, _ = socket.recv_fds(connection, MAX_FRAME, MAX_DESCRIPTORS)
    if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        sys.exit("the daemon hung up, or this process is out of descriptors")
    reply = handles_pb2.HandleReply.FromString(data)
    kind = reply.WhichOneof("body")
    if kind == "error":
        sys.exit(f"{reply.error.reason}: {reply.error.message}")
    return getattr(reply, kind), list(descriptors)


def main(path: str, name: str) -> None:
    """List the daemon's checkpoints, attach the one of that name in host memory, and read its first tensor."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(f"{path}.handles")
    hello, _ = ask(connection, hello=handles_pb2.HelloRequest(protocol=1))

    with grpc.insecure_channel(f"unix:{quote(path)}") as channel:
        checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        token = (("weightd-token", hello.token),)
        for one in checkpoints.List(checkpoint_pb2.ListCheckpointsRequest(), metadata=token).checkpoints:
            print(f"{', '.join(one.names) or one.content_digest}: {one.tensors} tensors, {one.total_bytes} bytes")

    attach = handles_pb2.AttachRequest(reference=name, device="host")  # no lease file: the manifest is the lease
    attached, descriptors = ask(connection, attach=attach)
    while len(descriptors) < 1 + len(attached.segments):
        _, more = ask(connection, ack=handles_pb2.BatchAck())
        descriptors += more
    # This mapping is the lease: it must be there as long as any segment is in use.
    lease = mmap.mmap(descriptors[0], attached.manifest_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ)
    manifest = handles_pb2.Manifest.FromString(lease[:])
    if manifest.form > 1 or manifest.kind not in ("", "host"):
        sys.exit("this client reads manifests of form 1, and host memory")

    row = next(row for row, length in enumerate(manifest.lengths) if length)
    number, begin, length = manifest.segments[row], manifest.offsets[row], manifest.lengths[row]
    descriptor = descriptors[1 + list(attached.segments).index(number)]
    segment = mmap.mmap(descriptor, manifest.segment_bytes[number], mmap.MAP_PRIVATE, mmap.PROT_READ)
    first = sum(manifest.ranks[:row])
    shape = list(manifest.dimensions[first : first + manifest.ranks[row]])
    dtype = handles_pb2.DType.Name(manifest.dtypes[row]).removeprefix("DTYPE_")
    with memoryview(segment)[begin : begin + length] as data:
        print(f"{manifest.names[row]}: {dtype} {shape}, sha256 {hashlib.sha256(data).hexdigest()}")
    segment.close()
    lease.close()  # last


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: wire_client.py SOCKET NAME")
    main(sys.argv[1], sys.argv[2])
