"""Hostile root records and settings."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from typing import Any

from weightd_daemon.persistence.root_record import PersistentRootRecord, RootRecordChange

from . import kept_targets
from .ideas import ODD_NUMBERS, ODD_VALUES, HostileInput, Ideas, bits, cuts, json_bytes, noise, padded, values

_MAGIC, _HEADER = b"weightd\x02", struct.Struct("<8sIIQQQ32s")


def _frame(payload: bytes, kind: int = 1, number: int = 0, generation: int = 2, length: int | None = None,
           before: bytes = b"", schema: int = 1) -> bytes:  # fmt: skip
    """A frame of the root record with a digest that is right, whatever it says."""
    stated = len(payload) if length is None else length
    digest = hashlib.sha256(before + struct.pack("<IIQQQ", schema, kind, generation, number, stated) + payload).digest()
    return _HEADER.pack(_MAGIC, schema, kind, generation, number, stated, digest) + payload


def _log(*payloads: bytes) -> bytes:
    """A slot of these frames, and the one that says that the base is whole."""
    found = b""
    before = b""
    for number, payload in enumerate((*payloads, b'{"counters":{},"rows":[]}')):
        frame = _frame(payload, 2 if number == len(payloads) else 1, number, before=before)
        before = frame[_HEADER.size - 32 : _HEADER.size]
        found += frame
    return found


def valid_log() -> bytes:
    """A slot as the daemon writes it."""
    root = PersistentRootRecord.create()
    try:
        root.write([RootRecordChange("names", 1, {"name": "a"})], {"last_id": 7})
        root.write([RootRecordChange("names", 1, {"name": "a"})], {"last_id": 7})
        return os.pread(root.descriptor, 4096, 0).rstrip(b"\0")
    finally:
        root.close()


def root_logs() -> Ideas:
    """Of a root record, as bytes of its slot."""
    valid = valid_log()
    yield from noise()
    yield from cuts(valid)
    yield from bits(valid, 12)
    for name, payload in {
        "no_json": b"\xff", "list": b"[]", "no_rows": b'{"counters":{}}', "rows_of_numbers": b'{"counters":{},"rows":[1]}',
        "rows_short": b'{"counters":{},"rows":[["names"]]}', "row_is_text": b'{"counters":{},"rows":[["names",1,"x",false]]}',
        "row_is_list": b'{"counters":{},"rows":[["names",1,[[1]],false]]}', "key_is_list": b'{"counters":{},"rows":[["names",[],{},false]]}',
        "table_is_number": b'{"counters":{},"rows":[[7,1,{},false]]}', "counters_list": b'{"counters":[],"rows":[]}',
        "counters_pairs": b'{"counters":[["a",1]],"rows":[]}', "counters_of_tables": b'{"counters":{"names":7},"rows":[]}',
        "deep": b"[" * 5000, "huge_number": b'{"counters":{"last_id":' + b"9" * 5000 + b'},"rows":[]}', "nan": b'{"counters":{"a":NaN},"rows":[]}',
        "merge_odd": b'{"counters":{},"rows":[["names",1,{},false],["names",1,5,true]]}',
        "surrogate": b'{"counters":{"\\ud800":1},"rows":[]}', "utf16": '{"counters":{},"rows":[]}'.encode("utf-16"),
    }.items():  # fmt: skip
        yield HostileInput(f"payload_{name}", _log(payload), f"a payload with a right digest: {name.replace('_', ' ')}")
    for name, number in ODD_NUMBERS.items():
        odd = number & (2**64 - 1)
        yield HostileInput(f"length_{name}", _frame(b"{}", length=odd), f"a frame says to have {odd} bytes")
        yield HostileInput(f"generation_{name}", _frame(b"{}", 2, generation=odd), f"generation {odd}")
    first = struct.pack("<8sIQQ32s", b"weightd\x01", 1, 2, 2**64 - 1, bytes(32))
    yield HostileInput("first_form_length", first, "the first form, with the greatest length")
    yield HostileInput("unknown_kind", _frame(b'{"counters":{},"rows":[]}', 9), "a kind of frame that is not there")


def root_rows() -> Ideas:
    """Of a root record, as rows in JSON with a right digest."""
    body = json.loads(kept_targets.valid_rows())
    yield from (one for one in noise() if one.name != "zeros")
    yield from cuts(kept_targets.valid_rows())
    yield from padded(kept_targets.valid_rows())
    tables: dict[str, list[Any]] = {name: [name] for name in ("segments", "checkpoints", "names", "last_lease")}
    yield from values(body, tables, ("null", "uint64", "digits", "empty_object", "nested_list"), json_bytes)
    for table, odd in {
        "segments": ("minus_one", "uint65", "half", "surrogate", "empty_list"),
        "checkpoints": ("int64", "nan", "surrogate", "nested_list"),
        "names": ("null", "control", "surrogate", "long_text"),
    }.items():
        fields = {f"{table}_{field}": [table, 0, field] for field in body[table][0]}
        yield from values(body, fields, odd, json_bytes)
    for name in ("segments", "checkpoints", "names"):
        twice = {**body, name: body[name] * 2}
        yield HostileInput(f"{name}_twice", json_bytes(twice), f"every row of {name} twice")
    for name, number in (("pins", 2**32 - 1), ("pins", 2**32), ("pins", -1)):
        changed = json.loads(json.dumps(body))
        changed["checkpoints"][0][name] = [number]
        yield HostileInput(f"pin_{number}".replace("-", "minus_"), json_bytes(changed), f"a pin of uid {number}")
    swapped = json.loads(json.dumps(body))
    rows = swapped["checkpoints"]
    rows[0]["manifest"], rows[1]["manifest"] = rows[1]["manifest"], rows[0]["manifest"]
    yield HostileInput("manifests_swapped", json_bytes(swapped), "each checkpoint has the other's manifest")


def settings() -> Ideas:
    """Of configuration files."""
    yield from noise()
    lines = {
        "number_for_text": "device = 1", "list_for_text": "device = [['host']]", "text_for_number": "max_loads = 'x'",
        "bool_for_number": "max_loads = true", "float_for_number": "max_loads = 1.0", "inf": "max_loads = inf",
        "nan": "max_loads = nan", "negative": "max_loads = -1", "zero": "max_loads = 0", "table": "[max_loads]\nx = 1",
        "huge": "max_loads = 99999999999999999999999999", "digits_5000": "max_loads = '" + "9" * 5000 + "'",
        "other_digits": "max_loads = '٣'", "superscript": "admins = '²'", "date": "max_loads = 1979-05-27", "unknown": "max_load = 1",
        "unknown_odd": '"\\u001b[2J" = 1', "unknown_long": "x" * 3000 + " = 1", "twice": "max_loads = 1\nmax_loads = 2",
        "socket_long": "socket = '/" + "s" * 200 + "'", "socket_relative": "socket = 's'", "socket_nul": 'socket = "/a\\u0000b"',
        "socket_empty": "socket =''", "socket_root": "socket = '/'", "metrics_root": "metrics = '/'",
        "mode_odd": "socket_mode = '0888'", "mode_long": "socket_mode = '00660'", "budget_odd": "budget = 'host'",
        "budget_nan": "budget = 'nan'", "budget_percent": "budget = '101%'", "budget_digits": "budget = '" + "9" * 400 + "%'",
        "budget_twice": "budget = 'host=1GiB,host=2GiB'", "budget_tera": "budget = '999999999999999T'", "pool_odd": "pool = '-1'",
        "metrics_port": "metrics = '127.0.0.1:99999'", "metrics_name": "metrics = 'localhost:80'", "metrics_any": "metrics = '0.0.0.0:9'",
        "metrics_zone": "metrics = '[fe80::1%eth0]:80'", "metrics_path": "metrics = '/" + "m" * 200 + "'",
        "isolation": "isolation = 'none'", "roots_relative": "model_roots = ['a']", "roots_nul": 'model_roots = ["/a\\u0000"]',
        "roots_number": "model_roots = [1]", "preload_no_root": "preload = ['/a']", "preload_number": "preload = [1]",
        "preload_table": "model_roots = ['/']\n[[preload]]\nname = 'x'", "preload_key": "model_roots = ['/']\n[[preload]]\nref = '/a'\npin = 'yes'",
        "preload_relative": "model_roots = ['/']\npreload = ['../a']", "preload_device": "model_roots = ['/']\n[[preload]]\nref='/a'\ndevice='tpu'",
        "preload_odd_key": "model_roots = ['/']\n[[preload]]\nref='/a'\n'\\' = 1", "preload_ref_table": "model_roots = ['/']\npreload = [{ref = {}}]",
        "admins_unknown": "admins = 'nobody-of-this-name'", "admins_huge": "admins = '" + "9" * 5000 + "'", "admins_most": "admins = '4294967295'",
        "admins_nul": 'admins = "a\\u0000b"', "admins_control": 'admins = "\\u001b[2J"', "admins_surrogates": 'admins = "\\U0010FFFF"',
        "device_twice": "device = 'host,host'", "device_auto": "device = 'auto,host'", "device_odd": 'device = "\\u001b"', "device_empty": "device = ''",
        "deep": "a = " + "[" * 3000, "deep_table": "[" + ".".join("a" * 900) + "]", "deep_keys": ".".join("a" * 3000) + " = 1",
        "cr": "max_loads = 1\rbudget = 2", "nul": "max_loads = 1\0", "bom": "\ufeffmax_loads = 0", "open": 'device = "', "log": "log_level = 'trace'",
    }  # fmt: skip
    for name, text in lines.items():
        yield HostileInput(name, text.encode(), name.replace("_", " "))
    yield HostileInput("not_utf8", b"device = '\xff\xfe'", "text that is not UTF-8")
    yield HostileInput("utf16", "max_loads = 1".encode("utf-16"), "UTF-16")
    assert ODD_VALUES
