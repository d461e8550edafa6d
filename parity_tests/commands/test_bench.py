"""tools/bench.py: the parts of detection and the sides of the pipeline are all there. No figure is judged."""

from __future__ import annotations

import json

import pytest

from porting.cli.commands import bench
from porting.cli.main import execute

pytest.importorskip("PIL.Image", reason="needs Pillow")


def test_the_pipeline_beside_the_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "EVAL_IMAGES", 3)
    arguments = ["eval", "--model", "efficientdet-lite0", "--repeat", "1", "--batch-size", "2"]
    assert execute("bench", [*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    sides = {f"pipeline, {workers} workers" for workers in (0, 1, 2)}
    assert sides <= set(figures["speeds"])
    assert sides | {"network alone"} <= set(figures["ratio"])
    assert {speed["images"] for speed in figures["speeds"].values()} == {3}
    assert execute("bench", arguments) == 0
    assert "images/s; decode" in capsys.readouterr().out


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
