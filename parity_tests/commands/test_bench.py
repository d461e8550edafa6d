"""tools/bench.py detect: the parts of detection are all there. No figure is judged."""

from __future__ import annotations

import json

import pytest

from porting.cli.main import execute

pytest.importorskip("PIL.Image", reason="needs Pillow")


def test_the_parts_of_detection(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["detect", "--model", "efficientdet-lite0", "--repeat", "1", "--batch-size", "1"]
    assert execute("bench", [*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    ratio = figures["ratio"]
    parts = {"decode, pillow", "normalise, resize, pad", "network", "select", "NMS"}
    assert parts <= set(ratio)
    assert ratio["network"] == 1
    assert figures["postprocessing_over_network"] == ratio["select"] + ratio["NMS"]
    assert execute("bench", arguments) == 0
    assert "× the network" in capsys.readouterr().out
