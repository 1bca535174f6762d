"""Hostile frames, messages and manifests."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from weightd._proto.v1 import handles_pb2
from weightd_daemon.loader._proto import loader_pb2
from weightd_fleet._proto.v1 import peer_pb2
from weightd_fleet.core.encoding import MAX_MANIFEST_BYTES

from . import handle_targets, peer_targets
from .ideas import ODD_NUMBERS, HostileInput, Ideas, bits, cuts, noise, padded
from .scripts import ScriptFrame, script

_Request, _Reply = handles_pb2.HandleRequest, handles_pb2.HandleReply
_DIGEST = "sha256:" + "7" * 64


def _request(**body: Any) -> bytes:
    return _Request(**body).SerializeToString()


def _reply(**body: Any) -> bytes:
    return _Reply(**body).SerializeToString()


HELLO = _request(hello={"protocol": 1})
ATTACH = _request(attach={"reference": "a", "lease_file": True})
_MOST = 2**64 - 1


def frames() -> Ideas:
    """Of a client to the daemon, most behind a hello."""
    yield from _scripts(
        _after_hello={
            "attach_nothing": ([_request(attach={})], "an attach of nothing"),
            "attach_empty_name": ([_request(attach={"reference": ""})], "of an empty name"),
            "attach_long_name": ([_request(attach={"reference": "x" * 9000})], "of a name of 9,000 bytes"),
            "attach_control": ([_request(attach={"reference": "\x1b[2J\n"})], "of a name with control characters"),
            "attach_digest_cut": ([_request(attach={"reference": "sha256:77"})], "of a digest that is cut"),
            "attach_no_device": ([_request(attach={"reference": "a", "device": "cuda:0"})], "on a device that is not there"),
            "attach_odd_device": ([_request(attach={"reference": "a", "device": "\0" * 300})], "on a device of zero bytes"),
            "attach_component": ([_request(attach={"reference": "a", "components": ["x"] * 900})], "of 900 times a component"),
            "attach_tensor": ([_request(attach={"reference": "a", "tensors": [{"name": "x\0"}]})], "of a tensor with a zero"),
            "attach_sources_none": ([_request(attach={"sources": {}})], "of no files"),
            "attach_source_unnamed": ([_request(attach={"sources": {"sources": [{}]}})], "of a file without a name"),
            "attach_source_dots": ([_request(attach={"sources": {"sources": [{"file": "../../etc/passwd"}]}})], "of a path"),
            "attach_source_twice": ([_request(attach={"sources": {"sources": [{"file": "a"}] * 2}})], "of a file twice"),
            "attach_indexes": ([_request(attach={"sources": {"sources": [{"file": "a", "is_index": True}]}})], "of an index alone"),
            "hello_again": ([HELLO], "a second hello"),
            "ack_for_nothing": ([_request(ack={})], "an acknowledgement for nothing"),
            "detach_most": ([_request(detach={"lease": _MOST})], "the end of the greatest lease"),
            "reclaim_most": ([_request(reclaim={"lease": _MOST, "content_digest": _DIGEST, "device": "host"})], "a claim to it"),
            "reclaim_other": ([ATTACH, _request(reclaim={"lease": 1, "content_digest": _DIGEST})], "a claim by another digest"),
            "ended_many": ([_request(ack={}, ended=range(5000))], "5,000 leases that ended, and an acknowledgement"),
            "ended_alone": ([_request(ended=[1, 2, _MOST])], "leases that ended, and no request"),
            "offers": ([_request(offer={})] * 17, "17 offers"),
            "attaches": ([ATTACH] * 20, "20 attaches in a row"),
            "two_bodies": ([ATTACH + _request(offer={})], "two requests in one frame"),
            "unknown_field": ([b"\xa2\x06\x01x"], "an unknown field alone"),
            "group": ([b"\x0b\x0b\x0b\x0c\x0c\x0c"], "groups, which proto3 does not have"),
            "field_0": ([b"\x00\x00"], "field number 0"),
            "not_utf8": ([b"\x12\x04\x0a\x02\xff\xfe"], "a name that is not UTF-8"),
            "empty_frame": ([b""], "an empty frame"),
            "too_long": ([bytes(65535)], "65,535 zero bytes"),
        },
        before=[HELLO],
    )  # fmt: skip
    for name in ("protocol_0", "protocol_2", "protocol_most"):
        protocol = {"protocol_0": 0, "protocol_2": 2, "protocol_most": 2**32 - 1}[name]
        yield HostileInput(name, script([_request(hello={"protocol": protocol})]), f"protocol {protocol}")
    yield HostileInput("attach_before_hello", script([ATTACH]), "an attach before hello")
    yield HostileInput("descriptors", script([ScriptFrame(HELLO, 253)]), "a hello with 253 descriptors")
    yield HostileInput("attach_descriptors", script([HELLO, ScriptFrame(ATTACH, 5)]), "an attach with 5 descriptors")
    read_only = _request(hello={"protocol": 1, "read_only": True})
    yield HostileInput(
        "read_only_offer", script([read_only, _request(offer={})]), "an offer where only reading is allowed"
    )
    for one in (*noise(), *cuts(ATTACH), *bits(HELLO, 4)):
        yield one._replace(data=script([HELLO, one.data]) if "bit" not in one.name else script([one.data]))


def replies() -> Ideas:
    """Of a daemon to a client that attaches."""
    hello = _reply(hello={"protocol": 1, "token": "t", "version": "9"})
    manifest = handle_targets.valid_manifest()

    def attached(**body: Any) -> bytes:
        usual = {
            "lease": 1,
            "content_digest": _DIGEST,
            "manifest_bytes": len(manifest),
            "segments": [0],
            "lease_file": True,
        }
        return _reply(attach={**usual, **body})

    good = ScriptFrame(attached(), 3)
    table: dict[str, tuple[list[ScriptFrame | bytes], str]] = {
        "error_unknown": ([_reply(error={"reason": "NO_SUCH", "message": "m"})], "an error with an unknown reason"),
        "error_empty": ([_reply(error={})], "an error that says nothing"),
        "error_blank": ([_reply(error={"reason": "BUSY", "message": "\v\n"})], "an error of white space"),
        "error_control": ([_reply(error={"reason": "NOT_FOUND", "message": "a\n\x1b[2Jb"})], "an error with control characters"),
        "error_long": ([_reply(error={"reason": "CAPACITY", "message": "m" * 9000})], "an error of 9,000 characters"),
        "offer_instead": ([_reply(offer={"offer_id": 1})], "an offer instead of an attach"),
        "hello_again": ([hello], "a second hello"),
        "no_descriptors": ([ScriptFrame(attached(), 0)], "an attach without descriptors, and the end"),
        "manifest_only": ([ScriptFrame(attached(segments=[]), 1)], "no lease's descriptor"),
        "one_too_many": ([ScriptFrame(attached(), 4)], "a descriptor too many"),
        "many_too_many": ([ScriptFrame(attached(), 250)], "247 descriptors too many"),
        "handles_on_host": ([ScriptFrame(attached(handles=[bytes(64)]), 2)], "a handle of CUDA IPC for host memory"),
        "handles_short": ([ScriptFrame(attached(handles=[b"x"]), 2)], "a handle of one byte"),
        "handles_and_descriptors": ([ScriptFrame(attached(handles=[bytes(64)]), 3)], "handles and descriptors"),
        "segment_twice": ([ScriptFrame(attached(segments=[0, 0]), 4)], "a segment twice"),
        "segment_unknown": ([ScriptFrame(attached(segments=[7]), 3)], "a segment that the manifest does not have"),
        "segment_most": ([ScriptFrame(attached(segments=[2**32 - 1]), 3)], "the greatest segment"),
        "segments_many": ([ScriptFrame(attached(segments=range(4000)), 3)], "4,000 segments, and the end"),
        "manifest_empty": ([ScriptFrame(attached(lease_file=False, manifest_bytes=0), 2)], "the lease is on a manifest of 0 bytes"),
        "no_lease_file": ([ScriptFrame(attached(lease_file=False), 2)], "the lease is on the manifest"),
        "empty_batches": ([ScriptFrame(attached(segments=[0, 1]), 3), *[_reply(batch={})] * 5], "empty batches"),
        "batch_too_many": ([ScriptFrame(attached(segments=[0, 1]), 3), ScriptFrame(_reply(batch={}), 9)], "a batch too many"),
        "batch_descriptors": ([ScriptFrame(_reply(batch={"descriptors": 3}), 3)], "a batch before the attach"),
        "offer_without_intake": ([good, _reply(offer={"offer_id": 1})], "an offer without its intake"),
        "offer_two_intakes": ([good, ScriptFrame(_reply(offer={"offer_id": 1}), 2)], "an offer with two intakes"),
        "offer_is_a_file": ([good, ScriptFrame(_reply(offer={"offer_id": 1}), 1)], "an offer whose intake is a file"),
        "detach_with_descriptor": ([good, ScriptFrame(_reply(detach={}), 1)], "another answer, with a descriptor"),
        "empty_frame": ([b""], "an empty frame"),
        "frame_over_64_kib": ([bytes(65535)], "a frame of 65,535 zero bytes"),
    }  # fmt: skip
    for name, number in ODD_NUMBERS.items():
        if -(2**63) <= number < 2**63:
            lied = ScriptFrame(attached(manifest_bytes=number), 3)
            table[f"manifest_bytes_{name}"] = ([lied], f"a manifest of {number} bytes")
    yield from _scripts(table, before=[hello])
    for protocol, idea in (
        (_reply(hello={}), "says_nothing"),
        (_reply(error={"reason": "BUSY", "message": "m"}), "is_busy"),
    ):
        yield HostileInput(f"hello_{idea}", script([protocol]), f"the hello {idea}".replace("_", " "))
    yield HostileInput("hello_with_descriptor", script([ScriptFrame(hello, 1), good]), "a descriptor with the hello")
    for one in (*noise(), *cuts(attached()), *bits(attached(), 8)):
        yield one._replace(data=script([hello, ScriptFrame(one.data, 3)]))


def _scripts(_after_hello: dict[str, tuple[list[Any], str]], before: list[bytes]) -> Ideas:
    for name, (said, idea) in _after_hello.items():
        yield HostileInput(name, script([*before, *said]), idea)


def manifests() -> Ideas:
    """Of a daemon's manifest."""
    valid = handle_targets.valid_manifest()
    yield from noise()
    yield from cuts(valid)
    yield from bits(valid, 12)
    yield HostileInput("twice", valid * 2, "all of it twice, which protobuf adds up")

    def changed(change: Callable[[Any], object]) -> bytes:
        message = handles_pb2.Manifest.FromString(valid)
        change(message)
        return message.SerializeToString()

    for field in (
        "names",
        "file_indices",
        "dtypes",
        "ranks",
        "dimensions",
        "segments",
        "offsets",
        "lengths",
        "variants",
    ):
        yield HostileInput(
            f"{field}_short", changed(lambda m, f=field: getattr(m, f).pop()), f"{field} lacks its last row"
        )  # type: ignore[misc]  # a lambda with defaults
        yield HostileInput(f"{field}_none", changed(lambda m, f=field: m.ClearField(f)), f"there are no {field}")  # type: ignore[misc]  # a lambda with defaults
    for field, odd in {
        "file_indices": (1, 2**32 - 1), "dtypes": (0, 999), "ranks": (0, 3, 2**32 - 1), "dimensions": (-1, 2**63 - 1),
        "segments": (1, 2**32 - 1), "offsets": (-1, 4000, 2**63 - 1), "lengths": (-1, 5000, 2**63 - 1),
    }.items():  # fmt: skip
        for number in odd:
            yield HostileInput(
                f"{field}_{number}".replace("-", "minus_"),
                changed(lambda m, f=field, n=number: getattr(m, f).__setitem__(0, n)),  # type: ignore[misc]  # a lambda with defaults
                f"the first of {field} is {number}",
            )
    changes: dict[str, Callable[[Any], object]] = {
        "form_2": lambda m: setattr(m, "form", 2),
        "no_components": lambda m: m.ClearField("components"),
        "no_files": lambda m: m.ClearField("files"),
        "no_segments": lambda m: m.ClearField("segment_bytes"),
        "segment_negative": lambda m: m.segment_bytes.__setitem__(0, -1),
        "digests_short": lambda m: setattr(m, "digests", bytes(31)),
        "file_of_no_component": lambda m: setattr(m.files[0], "component", 9),
        "names_equal": lambda m: m.names.__setitem__(1, "q"),
        "names_long": lambda m: m.names.__setitem__(1, "n" * 9000),
        "view_of_nothing": lambda m: m.views[0].ClearField("members"),
        "view_outside": lambda m: m.views[0].members.__setitem__(0, 2**32 - 1),
        "view_of_no_component": lambda m: setattr(m.views[0], "component", 9),
        "view_of_other_component": lambda m: setattr(m.views[0], "component", 1),
        "view_shape": lambda m: m.views[0].shape.__setitem__(0, -2),
        "view_shape_wraps": lambda m: m.views[0].shape.extend([2**32, 2**32]),
        "view_named_as_tensor": lambda m: setattr(m.views[0], "name", "q"),
        "view_twice": lambda m: m.views.append(m.views[0]),
        "view_members_apart": lambda m: m.offsets.__setitem__(1, 512),
        "view_members_twice": lambda m: m.views[0].members.extend([0, 1]),
        "view_of_blocks": lambda m: m.dtypes.__setitem__(slice(0, 2), [handles_pb2.DTYPE_GGML_Q4_0] * 2),
    }
    for name, change in changes.items():
        yield HostileInput(name, changed(change), name.replace("_", " "))


def loader_hears() -> Ideas:
    """Of the daemon to a loader."""

    def framed(message: bytes, length: int | None = None) -> bytes:
        return struct.pack("<I", len(message) if length is None else length) + message

    segments = [{"number": number, "size": 4096} for number in range(300)]
    grant = loader_pb2.ToLoader(grant={"segment": 1, "length": 4096}, segments=segments[:1]).SerializeToString()
    many = loader_pb2.ToLoader(grant={}, segments=segments).SerializeToString()
    load = loader_pb2.ToLoader(load={"kind": "host", "device": "host"}).SerializeToString()
    table: dict[str, tuple[list[Any], str]] = {
        "no_descriptors": ([framed(grant)], "a segment whose descriptor does not come"),
        "too_many_descriptors": ([ScriptFrame(framed(grant), 2)], "a descriptor too many"),
        "most_descriptors": ([ScriptFrame(framed(grant), 253)], "252 descriptors too many"),
        "batches_short": ([ScriptFrame(framed(many), 250), ScriptFrame(b"", 49)], "300 segments and 299 descriptors"),
        "load_without_intake": ([framed(load)], "a load without its intake"),
        "load_with_two": ([ScriptFrame(framed(load), 2)], "a load with two intakes"),
        "length_most": ([framed(b"", 2**32 - 1)], "a message of 4 GiB"),
        "length_over": ([framed(b"", (256 << 20) + 1)], "a message of a byte over the most"),
        "length_never_comes": ([framed(b"x", 256 << 20)], "a message of the most bytes that ends at once"),
        "empty_message": ([framed(b"")] * 3, "empty messages"),
        "cut_length": ([b"\x01\x00"], "half a length"),
        "segment_negative": ([ScriptFrame(framed(loader_pb2.ToLoader(segments=[{"number": 1, "size": -1}]).SerializeToString()), 1)],
                             "a segment of -1 bytes"),
        "segment_twice": ([ScriptFrame(framed(grant), 1)] * 2, "a segment twice"),
    }  # fmt: skip
    yield from _scripts(table, before=[])
    for one in (*noise(), *cuts(grant), *bits(grant, 6)):
        yield one._replace(data=script([ScriptFrame(framed(one.data), 1)]))


def loader_says() -> Ideas:
    """Of a loader to the daemon."""
    said = loader_pb2.ToDaemon(
        tensors={"names": ["a"], "dtypes": ["U8"], "ranks": [1], "dimensions": [2], "offsets": [0], "lengths": [2]}
    ).SerializeToString()
    for one in (*noise(), *cuts(said), *bits(said, 10)):
        yield one._replace(data=struct.pack("<I", len(one.data)) + one.data)
    framed = struct.pack("<I", len(said)) + said
    yield from (one._replace(name=f"frame_{one.name}") for one in (*cuts(framed), *padded(framed)))
    yield HostileInput("length_most", b"\xff" * 4, "a message of 4 GiB")
    yield HostileInput("length_over", struct.pack("<I", (256 << 20) + 1), "a message of a byte over the most")


def peer_answers() -> Ideas:
    """Of a peer to a node that fetches: an inventory, a manifest, rows."""
    served = peer_targets.served()
    inventory = peer_pb2.Inventory(entries=[{"name": served.name, "total_bytes": 2000}]).SerializeToString()
    manifest = peer_pb2.ManifestPiece(data=served.manifest.encoded).SerializeToString()
    rows = [peer_pb2.RowPiece(row=0, data=bytes(1000)), peer_pb2.RowPiece(row=1, data=bytes(1000))]

    def answers(*pieces: peer_pb2.RowPiece | bytes) -> bytes:
        said = [piece if isinstance(piece, bytes) else piece.SerializeToString() for piece in pieces]
        return script([inventory, manifest, *said])

    def row(number: int = 0, offset: int = 0, length: int = 1000) -> peer_pb2.RowPiece:
        return peer_pb2.RowPiece(row=number, offset=offset, data=bytes(length))

    for name, data, idea in (
        ("no_rows", answers(), "no rows"),
        ("one_row", answers(rows[0]), "one row of two"),
        ("rows_swapped", answers(rows[1], rows[0]), "the rows in the wrong order"),
        ("row_twice", answers(rows[0], rows[0]), "a row twice"),
        ("row_more", answers(*rows, row(2)), "a row too many"),
        ("row_most", answers(row(2**32 - 1)), "the greatest row"),
        ("row_empty", answers(row(length=0)), "a piece without bytes"),
        ("row_short", answers(row(length=999), rows[1]), "a row of a byte less"),
        ("row_long", answers(row(length=1001)), "a row of a byte more"),
        ("offset_ahead", answers(row(length=10), row(offset=11, length=10)), "a hole between two pieces"),
        ("offset_back", answers(row(length=10), row(offset=9, length=10)), "pieces that overlap"),
        ("offset_most", answers(row(offset=2**64 - 1)), "the greatest offset"),
        ("rows_garbled", answers(b"\xff\xff"), "a piece that is no message"),
        ("manifest_other", script([inventory, peer_pb2.ManifestPiece(data=b"x").SerializeToString()]), "another manifest"),
        ("manifest_none", script([inventory, b""]), "an empty manifest"),
        ("manifest_cut", script([inventory, manifest[: len(manifest) // 2]]), "a manifest that is cut"),
        ("nothing", script([]), "nothing at all"),
        ("entry_empty", script([peer_pb2.Inventory(entries=[{}]).SerializeToString()]), "an entry without a name"),
    ):  # fmt: skip
        yield HostileInput(name, data, idea)
    yield from (one._replace(data=script([one.data])) for one in noise())


def peer_requests() -> Ideas:
    """Of a peer to an agent: the first byte chooses the call."""
    name = peer_targets.served().name
    digest = peer_targets.served().wanted[0][0]
    order = {"name": name, "sources": ["127.0.0.1:1"], "sink": peer_pb2.SINK_FILES}
    for title, call, message, idea in (
        ("manifest_no_name", 1, peer_pb2.GetManifestRequest(), "no name"),
        ("manifest_dots", 1, peer_pb2.GetManifestRequest(name="b3:../../../etc/passwd"), "a name that is a path"),
        ("manifest_upper", 1, peer_pb2.GetManifestRequest(name=name.upper()), "a name in upper case"),
        ("manifest_newline", 1, peer_pb2.GetManifestRequest(name=f"{name}\n"), "a name with a line's end"),
        ("manifest_unknown", 1, peer_pb2.GetManifestRequest(name="b3:" + "0" * 64), "a name that is not there"),
        ("manifest_long", 1, peer_pb2.GetManifestRequest(name="b3:" + "0" * 9000), "a name of 9,000 digits"),
        ("rows_no_name", 2, peer_pb2.ReadRowsRequest(digests=[digest]), "rows of no checkpoint"),
        ("rows_short_digest", 2, peer_pb2.ReadRowsRequest(name=name, digests=[b"x"]), "a digest of one byte"),
        ("rows_long_digest", 2, peer_pb2.ReadRowsRequest(name=name, digests=[digest * 99]), "a digest of 3,168 bytes"),
        ("rows_unknown", 2, peer_pb2.ReadRowsRequest(name=name, digests=[bytes(32)]), "a row that is not there"),
        ("rows_empty_digest", 2, peer_pb2.ReadRowsRequest(name=name, digests=[b""]), "an empty digest"),
        ("rows_reader", 2, peer_pb2.ReadRowsRequest(name=name, serves_at="a:b:c"), "a reader whose address is none"),
        ("rows_reader_port", 2, peer_pb2.ReadRowsRequest(name=name, serves_at="a:99999"), "a reader at port 99999"),
        ("rows_reader_digits", 2, peer_pb2.ReadRowsRequest(name=name, serves_at="a:٣٣"), "a port in other digits"),
        ("fetch_no_sink", 3, peer_pb2.FetchRequest(name=name, sources=["a:1"]), "no sink"),
        ("fetch_odd_sink", 3, peer_pb2.FetchRequest(**{**order, "sink": 99}), "a sink that is not there"),
        ("fetch_no_source", 3, peer_pb2.FetchRequest(**{**order, "sources": []}), "no sources"),
        ("fetch_sources", 3, peer_pb2.FetchRequest(**{**order, "sources": ["a:1"] * 65}), "65 sources"),
        ("fetch_odd_source", 3, peer_pb2.FetchRequest(**{**order, "sources": ["[::1"]}), "a source that is no address"),
        ("fetch_control", 3, peer_pb2.FetchRequest(**{**order, "sources": ["\x1b[2J\n:1"]}), "control characters"),
    ):  # fmt: skip
        yield HostileInput(title, bytes([call]) + message.SerializeToString(), idea)
    for call in range(4):
        yield from (one._replace(name=f"{one.name}_{call}", data=bytes([call]) + one.data) for one in noise())


def fleet_manifests() -> Ideas:
    """Of a fleet's manifest."""
    valid = peer_targets.served().manifest.encoded
    yield from noise()
    yield from cuts(valid, (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9))
    yield from padded(valid)
    yield from bits(valid, 24)
    magic = len(b"weightd-manifest\x01")
    for place, at in (("repository", magic), ("commit", magic + 8), ("files", magic + 16)):
        for name, number in ODD_NUMBERS.items():
            changed = bytearray(valid)
            changed[at : at + 8] = struct.pack("<Q", number & (2**64 - 1))
            yield HostileInput(f"{place}_{name}", bytes(changed), f"the length of {place} is {number & (2**64 - 1)}")
    assert len(valid) < MAX_MANIFEST_BYTES
    for old, new, idea in (
        (b"model.safetensors", b"../../etc/passwds", "a path above the folder"),
        (b"model.safetensors", b"/odel.safetensors", "an absolute path"),
        (b"model.safetensors", b"model.safetens\0rs", "a path with a zero byte"),
        (b"model.safetensors", b"\xff\xfedel.safetensors", "a path that is not UTF-8"),
        (b"model.safetensors", b"config.json/s.tsr", "a file below another file"),
        (b"config.json", b"config\x1b[2Jn", "a path with control characters"),
    ):
        yield HostileInput(f"path_{len(idea)}_{new[:3].hex()}", valid.replace(old, new), idea)
