"""tools/bench.py detect: the parts of detection are all there. No figure is held to anything."""

from __future__ import annotations

import json
import sys

import pytest

from parity_tests.helpers.paths import TOOLS

sys.path.insert(0, str(TOOLS))

import bench

pytest.importorskip("PIL.Image", reason="needs Pillow")


def test_the_parts_of_detection(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["detect", "--model", "efficientdet-lite0", "--repeat", "1", "--batch-size", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments, "--json"])
    assert bench.main() == 0
    figures = json.loads(capsys.readouterr().out)
    ratio = figures["ratio"]
    parts = {"decode, pillow", "normalise, resize, pad", "network", "select", "NMS"}
    assert parts <= set(ratio)
    assert ratio["network"] == 1
    assert figures["postprocessing_over_network"] == ratio["select"] + ratio["NMS"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    assert bench.main() == 0
    assert "× the network" in capsys.readouterr().out
