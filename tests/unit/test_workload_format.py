"""Workload manifests: what is read, and what is refused."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from weightd.errors import FormatError
from weightd_daemon.formats import workload
from weightd_daemon.formats.workload import WorkloadFormatTensor, placed, read_workload

ROW: dict[str, Any] = {"name": "w", "dtype": "F32", "shape": [2, 3], "content": "base|w"}


def encoded(document: object) -> bytes:
    return json.dumps(document).encode()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_manifest_is_read_packed_or_not(pack: Any) -> None:
    raw = encoded({"pipe/unet/model.safetensors": [ROW, ROW | {"name": "n", "shape": [], "extra": 1}], "empty": []})
    assert read_workload("m", pack(raw)) == {
        "pipe/unet/model.safetensors": [
            WorkloadFormatTensor("w", "F32", (2, 3), "base|w", 24),
            WorkloadFormatTensor("n", "F32", (), "base|w", 4),
        ],
        "empty": [],
    }


def test_folders_are_checkpoint_and_component() -> None:
    assert placed("pipe/unet/a.safetensors") == ("pipe", "unet")
    assert placed("pipe/a/b/c.safetensors") == ("pipe", "a/b")
    assert placed("plain/model.safetensors") == ("plain", "")
    assert placed("model.safetensors") == ("model.safetensors", "")


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "not a JSON object"),
        (b'{"a": [], "a": []}', "a key twice"),
        (encoded({"a": {}}), "list of tensors"),
        (encoded({"/a": []}), "not a plain relative path"),
        (encoded({"a/../b": []}), "not a plain relative path"),
        (encoded({"": []}), "not a plain relative path"),
        (encoded({"a" * 4097: []}), "a file's path must be text"),
        (encoded({"a": [1]}), "must be an object"),
        (encoded({"a": [{"name": "w"}]}), "must be an object"),
        (encoded({"a": [ROW | {"name": 1}]}), "name must be text"),
        (encoded({"a": [ROW | {"name": "\ud800"}]}), "name must be text"),
        (encoded({"a": [ROW | {"content": None}]}), "content must be text"),
        (encoded({"a": [ROW | {"content": "ä" * 2049}]}), "content must be text"),
        (encoded({"a": [ROW | {"dtype": "F31"}]}), "dtype 'F31' is not known"),
        (encoded({"a": [ROW | {"dtype": []}]}), "dtype must be text"),
        (encoded({"a": [ROW | {"shape": 3}]}), "shape must be a list"),
        (encoded({"a": [ROW | {"shape": [1] * 65}]}), "shape must be a list"),
        (encoded({"a": [ROW | {"shape": [True]}]}), "whole numbers"),
        (encoded({"a": [ROW | {"shape": [-1]}]}), "whole numbers"),
        (encoded({"a": [ROW | {"shape": [1.0]}]}), "whole numbers"),
        (encoded({"a": [ROW | {"shape": [2**62, 2**62]}]}), "below 2**63"),
        (encoded({"a": [ROW | {"dtype": "F4", "shape": [3]}]}), "not a whole number of bytes"),
        (b'{"a": [' + b"9" * 5000 + b"]}", "not valid JSON"),
        (gzip.compress(encoded({"a": []}), mtime=0)[:-9], "damaged gzip"),
        (b"\x1f\x8bnonsense", "damaged gzip"),
    ],
)
def test_what_is_no_manifest_is_refused(raw: bytes, fault: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_workload("the/manifest.json", raw)
    assert fault in str(caught.value)
    assert str(caught.value).startswith("the/manifest.json: ")
    assert len(str(caught.value)) < 500


def test_the_key_of_a_long_name_is_cut_in_messages() -> None:
    with pytest.raises(FormatError) as caught:
        read_workload("m", encoded({"a": [ROW | {"name": "n" * 4000, "dtype": "?"}]}))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("limit", "value", "fault"),
    [("MAX_BYTES", 100, "longer than 100 bytes"), ("MAX_VALUES", 10, "JSON values"), ("MAX_TENSORS", 2, "2 tensors")],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_sizes_are_bounded(limit: str, value: int, fault: str, pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encoded({"a": [ROW, ROW | {"name": "n"}], "b": [ROW]})
    read_workload("m", pack(raw))
    monkeypatch.setattr(workload, limit, value)
    with pytest.raises(FormatError, match=fault):
        read_workload("m", pack(raw))


def test_a_small_file_that_unpacks_to_a_large_one_costs_no_more_than_the_limit() -> None:
    with pytest.raises(FormatError, match="longer than"):
        read_workload("m", gzip.compress(bytes(workload.MAX_BYTES + 1)))
