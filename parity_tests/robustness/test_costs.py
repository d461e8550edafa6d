"""Files whose every byte is in its place, and which would cost more than they are worth.

Each is read in the fuzzer's own process, under its bars: ten seconds, twice the file and what small things
take.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from parity_tests.robustness.fuzz import FAULTS, OBJECTS, REFUSED, SECONDS, _Reader
from parity_tests.robustness.targets import convert_checkpoint, read_yaml

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


COSTLY: dict[str, tuple[Make, Callable[[Path], str]]] = {
    "a state file of empty lines": (state_of_empty_lines, convert_checkpoint),
    "YAML: a number to the base of 60": (
        written("h.yaml", b"num_classes: " + b"1:" * 480_000 + b"1"),
        read_yaml,
    ),
    "YAML: a long list": (written("h.yaml", b"[" + b"1," * 490_000 + b"1]"), read_yaml),
    "YAML: as long as allowed, base 60": (
        written("h.yaml", b"num_classes: " + b"1:" * 12_000 + b"1"),
        read_yaml,
    ),
    "YAML: as long as allowed, a list": (written("h.yaml", b"[" + b"1," * 12_000 + b"1]"), read_yaml),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_file_costs_no_more_than_it_is_worth(name: str, tmp_path: Path) -> None:
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
    assert peaks.traced <= 2 * size + OBJECTS
