"""Well-formed files that would cost far more memory or time than their size.

Each is read in the fuzzer's process, with its limits: processor time, and twice the file plus a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from parity_tests.robustness.fuzz import FAULTS, OBJECTS, REFUSED, SECONDS, _Reader
from parity_tests.robustness.samples import with_graph
from parity_tests.robustness.targets import convert_checkpoint, read_yaml
from porting.checkpoint.v2.table import MAGIC, _append_block, _BlockBuilder, write_table
from porting.checkpoint.v2.writer import _entry, _header
from pytorch_model.formats.wire import bytes_field, int_field, write_varint

#: Memory allowed for the longest lists that are read (variables, objects), whatever the size of the file.
LISTS = 32 << 20

Make = Callable[[Path], Path]


def written(name: str, content: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def state_of_empty_lines(folder: Path) -> Path:
    (folder / "model.index").write_bytes(b"x")
    written("checkpoint", b"\n" * (1 << 20))(folder)
    return folder


def index(items: dict[bytes, bytes]) -> Make:
    return written("model.index", write_table([(b"", _header(1)), *items.items()]))


def snappy_index(folder: Path) -> Path:
    """One entry of 5 million two-byte fields, which snappy compresses to a twentieth."""
    fields = 5_000_000
    head = b""
    for key, value in ((b"", _header(1)), (b"a", b"")):
        head += b"\0" + write_varint(len(key)) + write_varint(len(value) or 2 * fields) + key + value
    head += b"\x18\0"
    copies, rest = divmod(2 * fields - 2, 64)
    packed = bytes([len(head) - 1 << 2]) + head + bytes([63 << 2 | 2, 2, 0]) * copies
    packed += bytes([rest - 1 << 2 | 2, 2, 0]) + bytes([7 << 2]) + bytes(4) + b"\1\0\0\0"
    packed = write_varint(len(head) + 2 * fields - 2 + 8) + packed
    table, handles = bytearray(), _BlockBuilder(1)
    handles.add(b"b", _append_block(table, packed, 1))
    footer = _append_block(table, _BlockBuilder(16).finish()) + _append_block(table, handles.finish())
    table += footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")
    return written("model.index", bytes(table))(folder)


def graph(*nodes: tuple[list[tuple[bytes, int]], int]) -> Make:
    """An object graph. Each of ``nodes``: its attributes (name, object), and how often it is repeated.

    For a repeated node, object numbers count from the node itself.
    """
    message, at = b"", 0
    for children, times in nodes:
        parts = []
        for number in range(times):
            references = [
                bytes_field(1, int_field(1, child + (at + number if times > 1 else 0)) + bytes_field(2, name))
                for name, child in children
            ]
            parts.append(bytes_field(1, b"".join(references)))
        message += b"".join(parts)
        at += times
    return lambda folder: with_graph(folder, message)


WIDE = graph(([(b"x" * 1_000_000, 1)], 1), ([(b"%d" % n, 2 + n) for n in range(8_000)], 1), ([], 8_000))
KEYS = {b"a" * (n + 1): _entry(np.zeros(1, np.float32), 0, 0) for n in range(6_000)}
COSTLY: dict[str, tuple[Make, Callable[[Path], str]]] = {
    "a state file of empty lines": (state_of_empty_lines, convert_checkpoint),
    "a graph of two-byte fields": (
        written("g.pb", bytes_field(1, b"\x18\1" * 500_000)),
        convert_checkpoint,
    ),
    "a graph of two-byte fields at its top": (written("g.pb", b"\x10\1" * 500_000), convert_checkpoint),
    "a graph of attributes of any number": (
        written(
            "g.pb",
            bytes_field(
                1, bytes_field(5, b"".join(write_varint(n << 3) + b"\1" for n in range(16, 150_000)))
            ),
        ),
        convert_checkpoint,
    ),
    "a shape of many dimensions": (index({b"a": bytes_field(2, b"\x12\0" * 400_000)}), convert_checkpoint),
    "an entry behind snappy": (snappy_index, convert_checkpoint),
    "keys that grow": (index(KEYS), convert_checkpoint),
    "objects under a long name": (WIDE, convert_checkpoint),
    "objects in a long chain": (graph(([(b"a" * 100, 1)], 30_000), ([], 1)), convert_checkpoint),
    "more objects than any model": (graph(([], 300_000)), convert_checkpoint),
    "YAML: a number to the base of 60": (
        written("h.yaml", b"num_classes: " + b"1:" * 480_000 + b"1"),
        read_yaml,
    ),
    "YAML: a long list": (written("h.yaml", b"[" + b"1," * 490_000 + b"1]"), read_yaml),
    "YAML: as long as allowed, base 60": (
        written("h.yaml", b"num_classes: " + b"1:" * 32_000 + b"1"),
        read_yaml,
    ),
    "YAML: as long as allowed, a list": (written("h.yaml", b"[" + b"1," * 32_000 + b"1]"), read_yaml),
    "YAML: as many values as allowed": (written("h.yaml", b"[" + b"1," * 9_990 + b"1]"), read_yaml),
}


@pytest.mark.parametrize("name", COSTLY)
def test_the_cost_of_a_file_is_bounded_by_its_size(name: str, tmp_path: Path) -> None:
    make, use = COSTLY[name]
    path = make(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    reader = _Reader(use)
    try:
        for _ in range(2):  # the first reading also loads the code
            status, text, peaks = reader.read(path, SECONDS)
            assert status not in FAULTS, text
    finally:
        reader.stop()
    print(f"{name}: {size:,} bytes, {peaks.traced:,} at most: {text[:100]}")
    assert status == REFUSED
    assert peaks.traced <= 2 * size + (LISTS if "objects" in name else OBJECTS)
