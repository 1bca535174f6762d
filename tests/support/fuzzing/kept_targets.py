"""What the daemon finds at its start: the root record of the one before, and its settings."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from functools import cache
from pathlib import Path

from support.kept_books import DATA, WHO, Books, Keeper
from support.root_forms import write_first_form
from weightd_daemon.config.settings import LoadedSettings, Settings, load, plain
from weightd_daemon.config.toml_file import ConfigError
from weightd_daemon.core.catalog import CatalogTag
from weightd_daemon.persistence.root_record import SLOT_BYTES, PersistentRootRecord, RootRecordContents, read_root

from .target import HungUpError, Target

_folder = tempfile.TemporaryDirectory(prefix="weightd-fuzz-")
_config = Path(_folder.name) / "weightd.toml"


def read_log(data: bytes) -> RootRecordContents:
    """What a memfd says whose first slot begins with these bytes. Errors: HungUpError (nothing)."""
    root = PersistentRootRecord.create()
    try:
        os.pwrite(root.descriptor, data[:SLOT_BYTES], 0)
        found = read_root(root.descriptor)
    finally:
        root.close()
    if found is None:
        raise HungUpError("the root record says nothing")
    assert isinstance(found.body, dict)
    return found


@cache
def kept() -> Keeper:
    """What a daemon has left that held the checkpoints "a" and "b", which share a tensor. One for the process."""
    keeper = Keeper()
    books = Books(keeper)
    for name, tensors in DATA.items():
        books.load(name, tensors)
    books.catalog.pin(WHO, books.catalog.find(WHO, "a"))
    books.catalog.restore("", "dangling", CatalogTag("sha256:" + "0" * 64, 7))
    books.descriptor_store.flip()
    books.end()
    return keeper


def valid_rows() -> bytes:
    """The rows of `kept`, as JSON."""
    record = read_root(kept().kept["root"])
    assert record is not None
    return json.dumps(record.body).encode()


def restore_rows(data: bytes) -> int:
    """Have a daemon start on these rows, in JSON, beside what `kept` has. Returns how many checkpoints it restored.

    Whatever is left is a line of the log. Errors: HungUpError (all of it).
    """
    keeper = Keeper()
    keeper.kept = {name: os.dup(descriptor) for name, descriptor in kept().kept.items() if name != "root"}
    root = PersistentRootRecord.create()
    write_first_form(root.descriptor, 2, data)
    keeper.kept["root"] = root.descriptor
    logging.disable(logging.CRITICAL)
    try:
        books = Books(keeper)
        try:
            restored = len(books.store.checkpoints)
            _check(books)
        finally:
            books.end()
    finally:
        logging.disable(logging.NOTSET)
        keeper.told.clear()
        keeper.close()
    if not restored:
        raise HungUpError("nothing of the root record is taken up")
    return restored


def _check(books: Books) -> None:
    """What is restored is whole, fits its segments, and can be removed, and then nothing is left of it."""
    store, memory = books.store, books.store.memories["host"]
    for checkpoint in list(store.checkpoints.values()):
        for blobs in checkpoint.components.values():
            for blob in blobs:
                assert blob is None or blob.offset + blob.length <= memory.size(blob.segment)
        store.remove(checkpoint, "x", "removed")
    assert store.books.used == 0


def read_settings(data: bytes) -> LoadedSettings:
    """The settings of a configuration file. Errors: ConfigError."""
    _config.write_bytes(data)
    read = load(_config, {}, {})
    assert isinstance(read.settings, Settings)
    json.dumps([plain(value) for value in vars(read.settings).values()]).encode()
    return read


ROOT_LOG = Target(read_log, (HungUpError,), ("weightd_daemon.persistence.root_record",))
ROOT_ROWS = Target(restore_rows, (HungUpError,), ("weightd_daemon.persistence.restore", "weightd_daemon.core.adoption"))
SETTINGS = Target(
    read_settings,
    (ConfigError,),
    ("weightd_daemon.config",),
    peak_bytes=64 << 20,  # of a dotted key tomllib keeps every beginning
)
