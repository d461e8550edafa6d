"""The parity report: complete, valid, self-contained, and indifferent to what names hold."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from parity_tests.helpers.paths import ROOT
from porting.errors import OutputError
from porting.parity import ParityResult, TapResult, compare, difference, tapped
from porting.parity.report import html as html_module
from porting.parity.report import thumbnails as thumbnails_module
from porting.parity.report.content import Report, report_dict, write_json
from porting.parity.report.html import render, write_html
from porting.parity.report.thumbnails import (
    BINS,
    BINS_PER_DECADE,
    HIGHEST,
    LOWEST,
    LOWEST_DECADE,
    MIDDLE,
    NOT_FINITE,
    SIDE,
    Thumbnails,
    bin_edges,
)
from porting.rules import TapPair, taps
from pytorch_model.config import EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet

HOSTILE = "</script><script>alert(1)</script><!--<script>&amp;{{data}}\u2028\udc80\"'`${x}"


@pytest.fixture(scope="module")
def config() -> EfficientDetConfig:
    return model_config("efficientdet-d0", num_classes=2)


def run(
    config: EfficientDetConfig, dtype: str, noise: float, thumbnails: Thumbnails | None = None
) -> ParityResult:
    """Made-up activations of the right names: what a report is made of, without running a network."""
    rng = np.random.default_rng(0)
    results = []
    for pair in taps(config):
        size = (60, 50) if pair.tap.endswith("_outputs/3") else (3, 2)
        reference = rng.normal(size=(1, *size, 4)).astype(dtype)
        ours = (reference * (1 + noise * rng.normal(size=reference.shape))).astype(dtype)
        accumulated, isolated = difference(ours, reference), difference((ours + reference) / 2, reference)
        results.append(TapResult(pair, reference.shape, accumulated, isolated, dtype))
        if thumbnails is not None:
            thumbnails(pair, ours, reference)
    return ParityResult(tuple(results), dtype)


@pytest.fixture(scope="module")
def report(config: EfficientDetConfig) -> Report:
    thumbnails = Thumbnails()
    results = (run(config, "float64", 1e-14), run(config, "float32", 1e-7, thumbnails))
    metadata = {"source": Path("runs/d0"), "step": np.int64(7), "assumed": ("a", "b"), "loss": math.nan}
    return Report(config, results, metadata, None, thumbnails)


def strict_json(text: str) -> Any:
    """Read JSON, but reject the NaN and Infinity that Python's reader accepts."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


class Page(HTMLParser):
    """Every element's name, the title, and the text of each script, as a browser would split them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: dict[str, list[str]] = {"title": [], "script": []}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open = tag
        if tag in self.text:
            self.text[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in self.text:
            self.text[self._open][-1] += data


def embedded(text: str) -> Any:
    return strict_json(Page(text).text["script"][0])


# --- report.json --------------------------------------------------------------------------------------


def test_json_holds_every_layer_in_order(tmp_path: Path, report: Report) -> None:
    write_json(report, tmp_path / "report.json")
    document = strict_json((tmp_path / "report.json").read_text())
    pairs = [TapPair(layer["module"], layer["tap"], layer["output"]) for layer in document["layers"]]
    assert pairs == list(taps(report.config))
    assert document["passed"] is True
    assert EfficientDetConfig.from_dict(
        {key: value for key, value in document["model"].items() if key != "levels"}
    ) == report.config.replace(name=document["model"]["name"])
    for result in report.results:
        for layer, tap in zip(document["layers"], result.taps, strict=True):
            figures = layer["runs"][result.dtype]
            assert figures["accumulated"] == {
                "relative": tap.accumulated.relative,
                "maximum": tap.accumulated.maximum,
            }
            assert figures["isolated"]["relative"] == tap.isolated.relative
            assert figures["passed"] == tap.passed


def test_json_metadata_becomes_plain(report: Report) -> None:
    assert report_dict(report)["metadata"] == {
        "source": str(Path("runs/d0")),
        "step": 7,
        "assumed": ["a", "b"],
        "loss": "NaN",
    }


def test_json_names_the_worst_and_the_first(config: EfficientDetConfig) -> None:
    good = run(config, "float32", 1e-8)
    bad, infinite = difference(np.ones(3), np.full(3, 1.5)), difference(np.ones(3), np.full(3, np.nan))
    spoilt = list(good.taps)
    spoilt[20] = TapResult(spoilt[20].pair, (1, 3), bad, bad, "float32")
    spoilt[30] = TapResult(spoilt[30].pair, (1, 3), infinite, good.taps[30].isolated, "float32")
    document = report_dict(Report(config, (ParityResult(tuple(spoilt), "float32"),)))
    assert document["passed"] is False
    (summary,) = document["runs"]
    assert summary["first_divergence"] == 20
    assert summary["worst"]["accumulated"] == {"layer": 30, "relative": "Infinity"}
    assert summary["worst"]["isolated"] == {"layer": 20, "relative": bad.relative}
    assert float(document["layers"][30]["runs"]["float32"]["accumulated"]["maximum"]) == math.inf
    assert [layer["passed"] for layer in document["layers"]].count(False) == 2


def test_runs_that_do_not_belong_together_are_rejected(config: EfficientDetConfig) -> None:
    result = run(config, "float32", 0.0)
    with pytest.raises(ValueError, match="at least one"):
        Report(config, ())
    with pytest.raises(ValueError, match="one float type"):
        Report(config, (result, result))
    with pytest.raises(ValueError, match="different layers"):
        Report(config, (result, ParityResult(run(config, "float64", 0.0).taps[1:], "float64")))


# --- report.html --------------------------------------------------------------------------------------


def test_html_embeds_the_json_and_the_maps(tmp_path: Path, report: Report) -> None:
    write_html(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text == render(report)
    document = embedded(text)
    pictures = document.pop("thumbnails")
    assert document == report_dict(report)
    assert pictures["dtype"] == "float32"
    assert pictures["maps"].keys() == {pair.tap for pair in taps(report.config)}
    kept = report.thumbnails.maps["class_outputs/3"][0] if report.thumbnails else None
    assert kept is not None
    sent = pictures["maps"]["class_outputs/3"][0]
    assert (sent["height"], sent["width"]) == kept.ours.shape == (30, 25)
    for side in ("ours", "reference", "difference"):
        if sent[side] is not None:
            assert base64.b64decode(sent[side]) == getattr(kept, side).tobytes()


def test_html_leaves_out_what_is_the_same_twice(config: EfficientDetConfig) -> None:
    thumbnails = Thumbnails()
    page = render(Report(config, (run(config, "float32", 0.0, thumbnails),), thumbnails=thumbnails))
    picture = embedded(page)["thumbnails"]["maps"]["class_outputs/3"][0]
    assert picture["reference"] is None
    assert picture["difference"] is None


def test_html_refers_to_nothing_outside(report: Report) -> None:
    page = render(report)
    template = (Path(html_module.__file__).parent / "report.html").read_text(encoding="utf-8")
    assert Page(page).text["script"][1] == Page(template).text["script"][1]
    assert not re.search(
        r"https?:|//[a-z]|\b(src|href|url|@import|import)\s*[=(]", Page(page).text["script"][1]
    )
    assert "://" not in page
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(Page(page).tags)
    assert "default-src 'none'" in page


def test_the_page_never_writes_markup() -> None:
    template = (Path(html_module.__file__).parent / "report.html").read_text(encoding="utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert way not in template
    assert template.count("{{") == 3


def test_hostile_names_stay_text(tmp_path: Path, config: EfficientDetConfig) -> None:
    pair, figures = TapPair(HOSTILE, HOSTILE), difference(np.ones(3), np.ones(3))
    result = ParityResult((TapResult(pair, (1, 1, 1, 3), figures, figures, "float32"),), "float32")
    name = "".join(sign for sign in HOSTILE if sign.isprintable())  # a configuration's is one line of text
    hostile = Report(config.replace(name=name), (result,), {HOSTILE: [HOSTILE]}, HOSTILE)
    write_html(hostile, tmp_path / "report.html")
    harmless = Page(render(Report(config, (result,))))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags == harmless.tags
    assert page.text["title"] == [f"{name}: parity passed"]
    assert not set("<>&") & set(page.text["script"][0])
    document = strict_json(page.text["script"][0])
    assert document["model"]["name"] == name
    assert document["metadata"] == {HOSTILE: [HOSTILE]}
    assert document["diagnosis"] == HOSTILE
    assert document["layers"][0]["module"] == HOSTILE


def test_d7x_fits_in_15_megabytes() -> None:
    """The largest there is: every map at full size, and no two sides alike."""
    config, thumbnails = model_config("efficientdet-d7x"), Thumbnails()
    rng = np.random.default_rng(0)
    ours, reference = rng.normal(size=(2, 1, SIDE, SIDE, 2))
    for pair in taps(config):
        thumbnails(pair, ours, reference)
    results = (run(config, "float64", 1e-14), run(config, "float32", 1e-7))
    page = render(Report(config, results, thumbnails=thumbnails))
    assert len(thumbnails.maps) == 699
    assert 10e6 < len(page) < 15e6


@pytest.mark.parametrize("write", [write_html, write_json])
def test_a_report_is_written_whole_or_not_at_all(
    write: Callable[[Report, Path], None], tmp_path: Path, report: Report, config: EfficientDetConfig
) -> None:
    target = tmp_path / "report"
    target.write_text("old")
    with pytest.raises(TypeError, match="cannot hold a object"):
        write(Report(config, report.results, {"what": object()}), target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(OutputError, match="cannot write"):
        write(report, tmp_path / "missing" / "report")


# --- thumbnails ---------------------------------------------------------------------------------------

PAIR = TapPair("module", "tap")


def observe(ours: np.ndarray, reference: np.ndarray, pair: TapPair = PAIR) -> Thumbnails:
    thumbnails = Thumbnails()
    thumbnails(pair, ours, reference)
    return thumbnails


def test_the_channels_that_differ_and_vary_most_are_kept() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(2, 10, 12, 5))
    reference[:, :, :, 4] += 100  # constant: large, but nothing to see
    reference[1, :, :, 3] *= 7
    ours = reference.copy()
    ours[1, 4, 5, 2] += 0.25
    differs, varies = observe(ours, reference).maps["tap"]
    assert (differs.why, differs.image, differs.channel) == ("differs most", 1, 2)
    assert (varies.why, varies.image, varies.channel) == ("varies most", 1, 3)
    assert differs.largest == pytest.approx(0.25)
    assert differs.difference[4, 5] == HIGHEST
    assert (differs.difference == MIDDLE).sum() == 119
    assert (varies.difference == MIDDLE).all()


def test_two_maps_show_two_channels() -> None:
    reference = np.zeros((1, 2, 2, 3))
    reference[0, 0, 0] = [1, 5, 2]
    differs, varies = observe(reference * 1.5, reference).maps["tap"]
    assert (differs.channel, varies.channel) == (1, 2)


def test_maps_are_shrunk_by_whole_cells() -> None:
    reference = np.zeros((1, 100, 31, 1))
    reference[0, 99, 30, 0] = 8  # the last row of cells is one pixel high, the last column one wide
    reference[0, 0, 0, 0] = -9
    ours = reference.copy()
    ours[0, 50, 10, 0] = -0.5
    (kept,) = observe(ours, reference).maps["tap"]
    assert kept.cell == 3
    assert kept.ours.shape == kept.reference.shape == kept.difference.shape == (34, 11)
    assert (kept.lowest, kept.highest, kept.largest) == (-1.0, 8.0, 0.5)
    assert (kept.reference[0, 0], kept.reference[33, 10]) == (LOWEST, HIGHEST)
    assert kept.difference[16, 3] == LOWEST
    assert (kept.difference == MIDDLE).sum() == 34 * 11 - 1


def test_what_is_not_finite_shows() -> None:
    reference = np.ones((1, 4, 4, 3), np.float32)
    ours = reference.copy()
    ours[0, 1, 2, 1] = np.nan
    ours[0, 3, 3, 1] = -np.inf
    differs, _ = observe(ours, reference).maps["tap"]
    assert differs.channel == 1
    assert np.argwhere(differs.ours == NOT_FINITE).tolist() == [[1, 2], [3, 3]]
    assert np.argwhere(differs.difference == NOT_FINITE).tolist() == [[1, 2], [3, 3]]
    assert (differs.reference == MIDDLE).all()


def test_a_channel_that_is_not_finite_does_not_vary() -> None:
    reference = np.zeros((1, 2, 2, 3))
    reference[0, 0, 0] = [np.nan, np.inf, 1]
    differs, varies = observe(reference, reference).maps["tap"]
    assert (differs.channel, varies.channel) == (0, 2)


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=60)
@given(
    arrays=hnp.array_shapes(min_dims=4, max_dims=4, max_side=9).flatmap(
        lambda shape: st.tuples(*[hnp.arrays(np.float32, shape, elements=st.floats(width=32))] * 2)
    )
)
def test_any_values_give_maps_and_a_histogram(arrays: tuple[np.ndarray, np.ndarray]) -> None:
    ours, reference = arrays
    kept = observe(ours, reference, TapPair("class_net", "class_outputs/3", 0))
    for picture in kept.maps["class_outputs/3"]:
        assert math.isfinite(picture.lowest)
        assert picture.lowest <= picture.highest < math.inf
        finite = np.isfinite(ours[picture.image, :, :, picture.channel].astype(np.float64))
        np.testing.assert_array_equal(picture.ours != NOT_FINITE, finite)
    histogram = kept.histograms["class_outputs/3"]
    assert histogram.counts.sum() + histogram.equal + histogram.not_finite == ours.size
    broken = ~(np.isfinite(ours) & np.isfinite(reference))
    assert histogram.not_finite == broken.sum()
    assert histogram.equal == (ours == reference)[~broken].sum()


def test_histogram_bins() -> None:
    delta = np.array([3e-7, -3e-7, 1.01e-3, 0.0, 1e-30, 1e30, np.nan])
    kept = observe(delta.reshape(1, 1, 7, 1), np.zeros((1, 1, 7, 1)), TapPair("box_net", "box_outputs/7", 4))
    histogram, edges = kept.histograms["box_outputs/7"], bin_edges()
    assert len(edges) == BINS + 1
    assert (histogram.equal, histogram.not_finite) == (1, 1)
    expected = {0: 1, BINS - 1: 1, (-7 - LOWEST_DECADE) * BINS_PER_DECADE + 1: 2, edges.index(-3.0): 1}
    assert {int(i): int(histogram.counts[i]) for i in np.flatnonzero(histogram.counts)} == expected


def test_work_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ours, reference = rng.normal(size=(2, 2, 9, 7, 6)).astype(np.float32)
    pair = TapPair("class_net", "class_outputs/3", 0)
    whole = observe(ours, reference, pair)
    monkeypatch.setattr(thumbnails_module, "_BLOCK", 1)
    pieces = observe(ours, reference, pair)
    chosen = [[(p.image, p.channel) for p in kept.maps[pair.tap]] for kept in (whole, pieces)]
    assert chosen[0] == chosen[1]
    np.testing.assert_array_equal(whole.histograms[pair.tap].counts, pieces.histograms[pair.tap].counts)


def test_sides_of_different_shapes_are_passed_over() -> None:
    kept = observe(np.zeros((1, 2, 2, 3)), np.zeros((1, 2, 3, 3)))
    assert kept.maps == {}


def test_thumbnails_watch_a_real_run() -> None:
    """With PyTorch standing in for the reference: every tap is seen, on its accumulated activations."""
    config = model_config("efficientdet-lite0", num_classes=2, fpn_cell_repeats=1, box_class_repeats=1)
    model = EfficientDet(config).eval()
    recorded: dict[str, np.ndarray] = {}

    def record(pair: TapPair, x: torch.Tensor) -> torch.Tensor:
        recorded[pair.tap] = x.permute(0, 2, 3, 1).numpy().copy()
        return x

    def replay(emit: Callable[[str, np.ndarray], None]) -> None:
        for name, value in recorded.items():
            emit(name, value)

    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    with tapped(model, record), torch.no_grad():
        model(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    thumbnails = Thumbnails()
    result = compare(model, replay, images, observe=thumbnails)
    assert thumbnails.maps.keys() == {pair.tap for pair in taps(config)}
    assert thumbnails.dtype == "float32"
    assert set(thumbnails.histograms) == {f"{k}_outputs/{n}" for k in ("class", "box") for n in config.levels}
    document = report_dict(Report(config, (result,), thumbnails=thumbnails))
    size = recorded["class_outputs/3"].size
    counts = document["histograms"]["taps"]["class_outputs/3"]
    assert sum(counts["counts"]) + counts["equal"] == size


def test_the_template_travels_with_the_package() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11's TOML reader")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "report.html" in project["tool"]["setuptools"]["package-data"]["porting.parity.report"]
