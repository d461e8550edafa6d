"""tools/bench.py: all sides are there. No time is judged."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from porting.cli.commands import bench
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


def test_the_sides_of_a_conversion(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("bench", ["convert", "--model", "efficientdet-lite0", "--repeat", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    torch, convert, read = (
        figures["ratio"][side]
        for side in (
            "import torch",
            "convert efficientdet-lite0, no framework",
            "plain read of the same bytes",
        )
    )
    assert figures["over_import_and_two_reads"] == convert / (torch + 2 * read)
    assert figures["megabytes_kept"] == pytest.approx(13, rel=0.1)
    assert figures["peak_over_kept"] > 1
    bench._draw(Console(), figures)
    assert "× (import torch + 2 plain reads)" in capsys.readouterr().out


def test_the_sides_of_a_cold_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("bench", ["cold", "--model", "efficientdet-lite0", "--repeat", "1", "--json"]) == 0
    ratio = json.loads(capsys.readouterr().out)["ratio"]
    assert set(ratio) == {"import torch", "convert --help", "detect in one image, efficientdet-lite0"}
