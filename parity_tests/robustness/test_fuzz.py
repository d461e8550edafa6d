"""Damaged files of every kind, a few of each; ``python -m parity_tests.robustness.fuzz`` tries more."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from parity_tests.robustness.damage import mutated, mutated_text
from parity_tests.robustness.fuzz import FAULTS, IDENTICAL, REFUSED, _Sample, fuzz, resident_measured
from parity_tests.robustness.targets import TARGETS, Target
from porting.errors import CheckpointError, EfficientDetError

SEED, INPUTS = 20260, 30


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_rejected_or_changes_nothing(name: str) -> None:
    tally = fuzz([TARGETS[name]], INPUTS, SEED)[name]
    print(f"{name}: {dict(tally.counts)}")
    assert not tally.faults, tally.examples[:3]
    assert tally.counts[REFUSED]


# The fuzzer itself sees each kind of fault.


def sample(folder: Path) -> Path:
    (folder / "file").write_bytes(bytes(range(256)))
    return folder / "file"


def sound(path: Path) -> bool:
    return path.read_bytes() == bytes(range(256))


def raises(path: Path) -> str:
    return "" if sound(path) else [][1]


def differs(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hangs(path: Path) -> str:
    if not sound(path):
        time.sleep(600)
    return ""


def computes(path: Path) -> str:
    while not sound(path):
        pass
    return ""


def swells(path: Path) -> str:
    return str(np.zeros(1 if sound(path) else 30 << 20, np.uint8)[0])


def swells_beside_python(path: Path) -> str:
    """Uses an allocator that tracemalloc does not see."""
    return str(torch.ones(1 if sound(path) else 300 << 20, dtype=torch.uint8)[0])


def dies(path: Path) -> str:
    if not sound(path):
        os._exit(11)
    return ""


class Talkative(CheckpointError):  # noqa: N818
    def __str__(self) -> str:
        return "two\nlines"


def talks(path: Path) -> str:
    if not sound(path):
        raise Talkative
    return ""


def refuses(path: Path) -> str:
    if not sound(path):
        raise CheckpointError("damaged")
    return ""


def same(path: Path) -> str:
    return ""


@pytest.mark.parametrize(
    ("use", "verdict"),
    [
        (raises, "another exception"),
        (talks, "another exception"),
        (differs, "silent difference"),
        (hangs, "too slow"),
        (computes, "too slow"),
        (swells, "too much memory"),
        pytest.param(
            swells_beside_python,
            "too much memory",
            marks=pytest.mark.skipif(not resident_measured(), reason="the system does not report the peak"),
        ),
        (dies, "process died"),
        (refuses, REFUSED),
        (same, IDENTICAL),
    ],
)
def test_every_fault_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Path], str], verdict: str
) -> None:
    monkeypatch.setattr("parity_tests.robustness.fuzz.SECONDS", 1.0)
    if use is hangs:
        monkeypatch.setattr("parity_tests.robustness.fuzz.PATIENCE", 2)
    with _Sample(Target("sample", sample, use, vouched=True), tmp_path / "s") as files:
        for seed in range(2):  # twice, because the process may have been replaced
            assert files.attempt(seed)[0] == verdict
    assert (verdict in FAULTS) == (verdict not in (REFUSED, IDENTICAL))


def test_damage_depends_only_on_the_seed() -> None:
    data = b"num_classes=20,image_size=640x480\n" * 5
    for damage in (mutated, mutated_text):
        found = [damage(data, random.Random(seed)) for seed in range(200)]
        assert found == [damage(data, random.Random(seed)) for seed in range(200)]
        assert data not in found
        assert len(set(found)) > 150


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.seal])
def test_sealed_damage_passes_every_checksum(tmp_path: Path, name: str) -> None:
    """It differs from the sound file, and no checksum of a file, block or member rejects it."""
    target = TARGETS[name]
    assert target.seal
    path = target.make(tmp_path)
    sound = {file: file.read_bytes() for file in tmp_path.iterdir()}
    refused = []
    for seed in range(10):
        target.seal(tmp_path, random.Random(seed))
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} != sound
        try:
            target.use(path)
        except EfficientDetError as error:
            refused.append(str(error))
        for file, content in sound.items():
            file.write_bytes(content)
    assert refused
    assert not [text for text in refused if re.search(r"block .*CRC32C|OBJECT_GRAPH.*CRC32C|Bad CRC", text)]
