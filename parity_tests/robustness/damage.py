"""Ways to damage files, chosen by a seeded generator.

Stray damage changes any bytes. Sealed damage changes what is inside, and then makes every checksum around it
right again: a stray bit never gets past the checksums, but a file that somebody made has good ones.
"""

from __future__ import annotations

import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from parity_tests.helpers.object_trees import automl_graph
from parity_tests.robustness.samples import CONFIG, with_graph
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
from pytorch_model.formats import wire

# --- stray damage ---------------------------------------------------------------------------------------

#: Numbers at the edges of what fields hold, as 4 or 8 little-endian bytes.
_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_TEXT = b"{}[]()<>:=,;\"'\\#*&!|%@-+.eE0129xnNaAtT \n\t\0\xff\xc3"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """``data`` after one to four changes; never equal to ``data``, unless that is empty."""
    changed = data
    while changed == data and data:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            changed = rng.choice(_MUTATIONS)(changed, rng) if changed else changed
    return changed


_TOKEN = re.compile(rb'"[^"]*"|[\w.+-]+|[^\s\w]')
_TOKENS = (
    *(b"-1", b"0", b"1e400", b"NaN", b"99999999999999999999", b"0.5", b"true", b"null", b"None", b"~"),
    *(b"[]", b"{}", b"[[]]", b'""', b'"x"', b"x", b",", b":", b"=", b"!!python/name:os.system", b"&a", b"*a"),
)


def mutated_text(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one to three of its words, numbers or characters replaced, removed or doubled."""
    changed = data
    while changed == data:
        for _ in range(rng.choice((1, 1, 2, 3))):
            tokens = list(_TOKEN.finditer(changed))
            if not tokens:
                break
            token = rng.choice(tokens)
            new = rng.choice((b"", token[0] * 2, rng.choice(tokens)[0], *rng.sample(_TOKENS, 4)))
            changed = changed[: token.start()] + new + changed[token.end() :]
    return changed


def _place(data: bytes, rng: random.Random) -> int:
    """Any position; half of the time near an end, where headers and footers are."""
    near = min(len(data), 64)
    choice = rng.random()
    if choice < 0.25:
        return rng.randrange(near)
    if choice < 0.5:
        return len(data) - 1 - rng.randrange(near)
    return rng.randrange(len(data))


def _range(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = _place(data, rng)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 64, 512, 4096)))


def _flip_bit(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _set_byte(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _set_text(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([rng.choice(_TEXT)]) + data[at + 1 :]


def _set_number(data: bytes, rng: random.Random) -> bytes:
    at, width = _place(data, rng), rng.choice((1, 4, 8))
    number = rng.choice(_EDGES) % (1 << 8 * width)
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def _remove(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:start] + data[stop:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[at:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:stop] + data[start:stop] + data[stop:]


def _blank(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:start] + bytes([rng.choice((0, 0xFF))]) * (stop - start) + data[stop:]


def _move(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    at = _place(data, rng)
    return data[:at] + data[start:stop] + data[at + stop - start :]


_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip_bit,
    _flip_bit,
    _set_byte,
    _set_text,
    _set_number,
    _cut,
    _remove,
    _insert,
    _repeat,
    _blank,
    _move,
)


# --- behind checksums ------------------------------------------------------------------------------------


def sealed_index(folder: Path, rng: random.Random) -> None:
    """Change one key or value of the index; the header counts as one."""
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


def sealed_blocks(folder: Path, rng: random.Random) -> None:
    """Change the stored bytes of one block, compressed with snappy or not."""
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


def sealed_object_graph(folder: Path, rng: random.Random) -> None:
    """Change the object graph: any bytes, or one number or name in one of its objects."""
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


def sealed_zip_member(folder: Path, rng: random.Random) -> None:
    """Change the file inside the zip and pack it again."""
    path = next(folder.glob("*.zip"))
    with zipfile.ZipFile(path) as archive:
        (name,) = archive.namelist()
        content = archive.read(name)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(name, mutated(content, rng))
