"""The audit: parts and sums equal Google's own counts, the table of releases equals the README's."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parity_tests.helpers.paths import ROOT, TOOLS
from parity_tests.helpers.recordings import RELEASED
from porting.audit import PUBLISHED, audit, audit_parameters, multiply_adds, rounds_to
from porting.publish.zoo import EVIDENCE, SYNTHETIC, markdown, rows
from porting.sources.google_releases import GOOGLE_RELEASES
from pytorch_model.config import MODELS, model_config
from pytorch_model.efficientdet import EfficientDet
from tf_reference.variables import variable_shapes

TOOL = TOOLS / "audit.py"

#: Trainable parameters counted by Google's code while it built each model: after the backbone, the BiFPN and
#: both heads.
GOOGLES_STAGES = {
    "efficientdet-d0": (3_595_388, 3_791_669, 3_880_067),
    "efficientdet-d1": (6_101_024, 6_491_996, 6_625_898),
    "efficientdet-d2": (7_202_562, 7_910_721, 8_097_039),
    "efficientdet-d3": (10_103_336, 11_662_810, 12_032_296),
    "efficientdet-d4": (16_742_216, 20_092_045, 20_723_675),
    "efficientdet-d5": (27_288_112, 32_694_005, 33_653_315),
    "efficientdet-d6": (39_403_992, 49_987_800, 51_871_782),
    "efficientdet-d7": (39_403_992, 49_987_800, 51_871_782),
    "efficientdet-d7x": (62_143_440, 75_255_504, 77_147_166),
    "efficientdet-lite0": (2_958_848, 3_155_072, 3_243_470),
    "efficientdet-lite1": (3_723_520, 4_114_416, 4_248_318),
    "efficientdet-lite2": (4_357_952, 5_066_016, 5_252_334),
    "efficientdet-lite3": (6_422_016, 7_981_376, 8_350_862),
    "efficientdet-lite3x": (6_422_016, 8_755_216, 9_280_862),
    "efficientdet-lite4": (11_149_568, 14_499_264, 15_130_894),
}


@pytest.mark.parametrize("model", MODELS)
def test_parts_equal_googles(model: str) -> None:
    parts = audit_parameters(model_config(model)).automl_parts
    backbone, bifpn, total = GOOGLES_STAGES[model]
    assert parts["backbone"] == backbone
    assert parts["bifpn"] == bifpn - backbone
    assert parts["class_net"] + parts["box_net"] == total - bifpn


@pytest.mark.parametrize("model", MODELS)
def test_our_count_is_the_models_without_redundant_biases(model: str) -> None:
    counted = audit_parameters(model_config(model))
    with torch.device("meta"):
        network = EfficientDet(model_config(model))
    assert counted.ours == sum(p.numel() for p in network.parameters())
    assert counted.our_parts["backbone"] == counted.automl_parts["backbone"]
    assert counted.removed_biases == sum(
        shape[0]
        for name, shape in variable_shapes(model_config(model)).items()
        if name.endswith("/bias") and "predict" not in name and "/se/" not in name
    )


#: Models for which the convolutions alone round to the paper's figure, although it counts more than them.
ROUNDING = {f"efficientdet-d{n}" for n in (0, 2, 3, 4)}


@pytest.mark.parametrize("model", MODELS)
def test_figures_agree_with_torchs_counter_and_the_paper(model: str) -> None:
    found = audit(model)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        EfficientDet(found.config).eval()(torch.empty(1, 3, *found.config.image_size))
    assert 2 * found.multiply_adds == counter.get_total_flops()
    assert found.parameters.agrees
    published = found.published_multiply_adds
    assert published is None or found.multiply_adds < float(published) * 1e9
    assert bool(found.multiply_adds_agree) == (model in ROUNDING)


@pytest.mark.parametrize("model", ["efficientdet-d0", "efficientdet-d7x", "efficientdet-lite3x"])
def test_multiply_adds_equal_tensorflows_count_of_the_reference(model: str, tensorflow: Any) -> None:
    from tensorflow.python.framework import ops

    from tf_reference.efficientdet import efficientdet

    config, v1 = model_config(model), tensorflow.compat.v1
    with tensorflow.Graph().as_default() as graph:
        values = {name: v1.placeholder("float32", shape) for name, shape in variable_shapes(config).items()}
        efficientdet(values, config, v1.placeholder("float32", (1, *config.image_size, 3)))
        flops = sum(
            ops.get_stats_for_node_def(graph, op.node_def, "flops").value
            for op in graph.get_operations()
            if op.type in ("Conv2D", "DepthwiseConv2dNative")
        )
    assert 2 * sum(multiply_adds(config).values()) == flops


def test_an_odd_image_size_is_counted_exactly() -> None:
    config = model_config("efficientdet-d0")
    small, large = (sum(multiply_adds(config, size).values()) for size in ((119, 255), (128, 256)))
    assert small < large
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        EfficientDet(config).eval()(torch.empty(1, 3, 119, 255))
    assert 2 * small == counter.get_total_flops()


@pytest.mark.parametrize(
    ("count", "published", "expected"),
    [
        (3_880_067, "3.9", True),
        (3_849_999, "3.9", False),
        (77_147_166, "77", True),
        (77_147_166, "77.0", False),
    ],
)
def test_rounding_is_to_the_printed_digits(count: int, published: str, expected: bool) -> None:
    assert rounds_to(count, published, 1e6) is expected


def test_the_one_parameter_count_of_automls_readme_that_does_not_round(shared: Path) -> None:
    published = json.loads((shared / "releases.json").read_text())["releases"]
    printed = {entry["name"]: entry.get("params_published", "").removesuffix("M") for entry in published}
    wrong = [
        release.name
        for release in GOOGLE_RELEASES.values()
        if printed[release.name]
        and not rounds_to(audit_parameters(model_config(release.model)).automl, printed[release.name], 1e6)
    ]
    assert wrong == ["efficientdet-d7x"]  # prints 77.0M for 77,147,166; the paper's 77M is right


# --- the table of releases ----------------------------------------------------------------------------


def test_the_readme_holds_the_current_table() -> None:
    assert markdown() in (ROOT / "docs" / "model_zoo.md").read_text(encoding="utf-8"), (
        "run tools/audit.py --markdown and put its table into docs/model_zoo.md"
    )


def test_the_table_claims_only_what_was_seen() -> None:
    table = {row.release.name: row for row in rows()}
    assert list(table) == list(GOOGLE_RELEASES)
    assert len(table) == 26
    assert set(EVIDENCE) <= set(table)
    for name, row in table.items():
        assert SYNTHETIC in row.status or "the release itself was not run" in row.status
        if "index" in row.status:
            assert name in RELEASED.values()
    assert table["efficientdet-d2-640"].image_size == (640, 640)
    assert table["efficientdet-d7x"].image_size == (1536, 1536)


INDEXES = {"d0_ap3429": "d0", "d1": "d1", "d2": "d2", "d3": "d3", "d4": "d4"}


@pytest.mark.parametrize("folder", INDEXES)
def test_an_index_is_called_this_releases_only_where_the_ap_beside_it_is_the_releases(
    folder: str, shared: Path
) -> None:
    release = GOOGLE_RELEASES[f"efficientdet-{INDEXES[folder]}"]
    lines = next((shared / "checkpoint_index" / folder).glob("*_val*.txt")).read_text().splitlines()
    figures = ast.literal_eval(next(line for line in lines if line.startswith("{'AP'")))
    beside = f"{100 * figures['AP']:.1f}"
    if "of this val AP" in EVIDENCE[release.name]:
        assert beside == f"{release.ap_val:.1f}"
    else:
        assert beside != f"{release.ap_val:.1f}"
        assert f"(val AP {beside})" in EVIDENCE[release.name]


# --- the tool -----------------------------------------------------------------------------------------


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys, runpy; sys.path[0] = {str(TOOL.parent)!r}; sys.path.append({str(ROOT)!r}); {before}\n"
    )
    code += f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_json_contains_every_figure() -> None:
    done = run("--models", "efficientdet_d0, efficientdet-lite3x", "--json")
    assert done.returncode == 0, done.stderr
    d0, lite3x = json.loads(done.stdout)
    assert d0["parameters"]["ours"]["total"] == 3_877_763
    assert d0["parameters"]["agrees"] is True
    assert d0["parameters"]["difference"] == pytest.approx(3_880_067 / 3.9e6 - 1)
    assert d0["multiply_adds"]["published_billions"] == PUBLISHED["efficientdet-d0"].multiply_adds == "2.5"
    assert lite3x["model"] == "efficientdet-lite3x"
    assert lite3x["multiply_adds"]["agrees"] is None


def test_no_figure_is_cut_on_a_narrow_terminal() -> None:
    done = run("--models", "efficientdet-d0", before="import os; os.environ['COLUMNS'] = '80'")
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    for figure in ("3,595,388", "194,361", "3,877,763", "3,880,067", "multiply-adds"):
        assert figure in done.stdout


def test_a_count_that_does_not_round_is_a_failed_check() -> None:
    before = "import porting.audit as a; a.PUBLISHED = {**a.PUBLISHED, 'efficientdet-d0': a.Published('4.0')}"
    done = run("--models", "efficientdet-d0", before=before)
    assert done.returncode == 1
    assert "NO" in done.stdout


@pytest.mark.parametrize("arguments", [("--models", "efficientdet-d9"), ("--markdown", "--models", "d0")])
def test_bad_usage_is_one_sentence(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "error: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
