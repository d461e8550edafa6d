"""Damage behind checksums: what is inside is changed, then every checksum around it is made good again.

A stray bit never gets past the checksums; what a stranger made has good ones.
"""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

from parity_tests.robustness.mutate import mutated
from porting.checkpoint import wire
from porting.checkpoint.v2.table import (
    FOOTER_SIZE,
    MAGIC,
    _append_block,
    _BlockBuilder,
    _entries,
    _read_block,
    _read_footer,
    _read_handle,
    read_table,
    write_table,
)


def index(folder: Path, rng: random.Random) -> None:
    """One key or value of the index, the header included."""
    path = next(folder.glob("*.index"))
    items = dict(read_table(path.read_bytes()))
    key = rng.choice((b"", *items))
    value = items.pop(key)
    if rng.random() < 0.25:
        key = mutated(key, rng)
    else:
        value = mutated(value, rng) or b"\0"
    items[key] = value
    path.write_bytes(write_table(sorted(items.items())))


def blocks(folder: Path, rng: random.Random) -> None:
    """The bytes of one block as they are stored, behind snappy or not."""
    path = next(folder.glob("*.index"))
    data = path.read_bytes()
    end = len(data) - FOOTER_SIZE
    _, _, offset, size = _read_footer(data[end:])
    stored = [
        (separator, *_read_handle(handle, offset))
        for separator, handle in _entries(_read_block(data, offset, size, end), offset)
    ]
    chosen = rng.randrange(len(stored))
    table, handles = bytearray(), _BlockBuilder(1)
    for number, (separator, start, length) in enumerate(stored):
        contents = data[start : start + length]
        if number == chosen:
            contents = mutated(contents, rng)
        handles.add(separator, _append_block(table, contents, data[start + length]))
    footer = _append_block(table, _BlockBuilder(16).finish()) + _append_block(table, handles.finish())
    path.write_bytes(table + footer.ljust(FOOTER_SIZE - 8, b"\0") + MAGIC.to_bytes(8, "little"))


def object_graph(folder: Path, rng: random.Random) -> None:
    """The object graph: its bytes, or one number or name in one of its objects."""
    from parity_tests.helpers.object_trees import automl_graph
    from parity_tests.robustness.targets import CONFIG, with_graph

    graph = automl_graph(CONFIG)
    if rng.random() < 0.25:
        with_graph(folder, mutated(graph, rng))
        return
    nodes = [bytes(wire.expect_bytes(n, value)) for n, _, value in wire.read_fields(graph)]
    chosen = rng.choice([at for at, node in enumerate(nodes) if node])
    fields = [
        (number, bytes(wire.expect_bytes(number, value))) for number, _, value in _bytes_of(nodes[chosen])
    ]
    at = rng.randrange(len(fields))
    number, field = fields[at]
    if number == 1 and rng.random() < 0.5:  # a reference to another object, or to none
        child = rng.choice((rng.randrange(len(nodes)), len(nodes), 1 << 31, (1 << 64) - 1))
        name = wire.last_values(field, 2).get(2, b"")
        field = wire.int_field(1, child) + wire.bytes_field(2, wire.expect_bytes(2, name))
    else:
        field = mutated(field, rng)
    fields[at] = number, field
    nodes[chosen] = b"".join(wire.bytes_field(number, field) for number, field in fields)
    with_graph(folder, b"".join(wire.bytes_field(1, node) for node in nodes))


def _bytes_of(message: bytes) -> list[tuple[int, int, int | bytes]]:
    return [field for field in wire.read_fields(message) if field[1] == wire.BYTES]


def zip_member(folder: Path, rng: random.Random) -> None:
    """What lies in the zip, packed again."""
    path = next(folder.glob("*.zip"))
    with zipfile.ZipFile(path) as archive:
        (name,) = archive.namelist()
        content = archive.read(name)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(name, mutated(content, rng))
