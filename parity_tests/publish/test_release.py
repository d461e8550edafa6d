"""Releases: reproducible, loadable in one line; any changed byte is detected."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parity_tests.helpers.paths import ROOT, TOOLS
from porting import __version__
from porting.checkpoint import open_checkpoint
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import Conversion, apply_rules, convert
from porting.errors import EfficientDetError, OutputError
from porting.infer import infer_config, setting_lines
from porting.parity import ParityResult, compare, tensorflow_reference
from porting.parity.lockstep import Observer
from porting.parity.report.html import _embeddable
from porting.publish.release import ReleaseRequest, make_release
from porting.publish.release_checks import Check, verify_release
from porting.publish.release_folder import (
    CARD,
    METRICS,
    PARITY,
    PARITY_PAGE,
    SUMS,
    card_of,
    check_name,
    origin,
    sums_of,
)
from porting.rules import rules
from porting.scopes import EMA_SUFFIX
from porting.sources.google_releases import GOOGLE_RELEASES
from porting.synthetic import synthetic_checkpoint
from pytorch_model import EfficientDet
from pytorch_model.config import BackboneConfig, EfficientDetConfig, Stage
from pytorch_model.evaluation import metrics as metrics_module
from pytorch_model.evaluation.metrics import Metrics, read_metrics
from pytorch_model.files import new_folder, sha256_of_file
from pytorch_model.weights import CONFIG_FILE, MODEL_FILE
from pytorch_model.weights.files import read_weights, write_weights

pytestmark = pytest.mark.usefixtures("tensorflow")

TOOL = TOOLS / "release.py"

#: Every part of the network, in 30 kB.
TINY = EfficientDetConfig(
    name="tiny",
    backbone=BackboneConfig(
        "efficientnet-b0",
        8,
        tuple(
            Stage(1, kernel, stride, 1 if i == 0 else 2, 4 + 8 * (i % 2))
            for i, (kernel, stride) in enumerate(((3, 1), (3, 2), (5, 2), (3, 2), (5, 1), (5, 2), (3, 1)))
        ),
    ),
    image_size=(64, 64),
    fpn_num_filters=8,
    fpn_cell_repeats=1,
    box_class_repeats=1,
    num_classes=2,
)


def run(
    *arguments: object, cwd: Path, before: str = "", limit_bytes: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the tool after the code ``before``, in one process; ``limit_bytes`` limits any file it writes."""
    code = (
        f"import sys, runpy; sys.path[:1] = {[str(TOOLS), str(ROOT)]}; import porting.cli.process\n{before}\n"
    )
    code += f"sys.argv[0] = {str(TOOL)!r}; runpy.run_path({str(TOOL)!r}, run_name='__main__')"

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, "COLUMNS": "100", **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env, preexec_fn=limit)


def run_many(commands: Sequence[tuple[object, ...]], cwd: Path) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each command, all in one process to import only once."""
    code = """
import contextlib, io, json, runpy, sys
tool, commands = json.loads(sys.argv[1])
answers = []
for command in commands:
    sys.argv = [tool, *command]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(tool, run_name="__main__")
    except SystemExit as end:
        answers.append([end.code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""
    task = json.dumps([str(TOOL), [[str(part) for part in command] for command in commands]])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[0] = {str(TOOL.parent)!r}{code}", task],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    return [(status, out, err) for status, out, err in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "mine"
    write_bundle(folder / "model", synthetic_checkpoint(TINY))
    return folder


@pytest.fixture(scope="module")
def conversion(checkpoint: Path) -> Conversion:
    with open_checkpoint(checkpoint) as opened:
        return convert(opened, infer_config(opened.shapes, opened.source).config)


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release made by the tool. Tests must not change it; ``release`` is a copy."""
    out = tmp_path_factory.mktemp("built")
    done = run(
        "--ckpt", checkpoint, "--out", out, "--name", "mine", "--size", 64, "--license", "mit", cwd=out
    )
    assert done.returncode == 0, done.stderr
    return out / "mine"


@pytest.fixture
def release(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "mine")
    return tmp_path / "mine"


def problems(folder: Path, conversion: Conversion | None = None) -> list[str]:
    return [check.problem for check in verify_release(folder, conversion) if check.problem]


# --- what is in it ------------------------------------------------------------------------------------


def test_the_same_checkpoint_gives_the_same_bytes(built: Path, checkpoint: Path, tmp_path: Path) -> None:
    """From another folder, under another environment, into another place."""
    arguments = ("--ckpt", "mine/model.index", "--out", tmp_path / "other" / "place", "--name", "mine")
    done = run(
        *arguments,
        "--size",
        "64x64",
        "--license",
        "mit",
        cwd=checkpoint.parent,
        OMP_NUM_THREADS="2",
        TZ="UTC+9",
    )
    assert done.returncode == 0, done.stderr
    again = tmp_path / "other" / "place" / "mine"
    names = sorted(path.name for path in built.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    for name in names:
        assert (again / name).read_bytes() == (built / name).read_bytes(), name


def test_the_folder_is_complete_and_passes_its_checks(built: Path, conversion: Conversion) -> None:
    names = sorted(path.name for path in built.iterdir())
    (weights,) = (name for name in names if name.endswith(".pth"))
    assert re.fullmatch(r"mine-[0-9a-f]{8}\.pth", weights)
    assert set(names) == {weights, MODEL_FILE, CONFIG_FILE, PARITY, PARITY_PAGE, CARD, SUMS}
    assert list(verify_release(built, conversion))
    assert problems(built, conversion) == []
    done = subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=built, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(": OK") == len(names) - 1


def test_no_file_contains_where_or_when_it_was_made(built: Path, checkpoint: Path) -> None:
    for path in built.iterdir():
        content = path.read_bytes()
        for part in (str(checkpoint.parent), str(built.parent)):
            assert part.encode() not in content, path.name
        host = re.escape(os.uname().nodename.encode())
        assert not re.search(rb"[^0-9A-Za-z+/]" + host + rb"[^0-9A-Za-z+/=]", content), (
            path.name
        )  # not in base 64


def test_it_loads_in_every_way(built: Path, conversion: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    (weights,) = built.glob("*.pth")
    plain = torch.load(weights, weights_only=True)
    assert {key: type(value) for key, value in plain.items()} == dict.fromkeys(plain, torch.Tensor)
    monkeypatch.setenv("TORCH_HOME", str(built.parent / "home"))
    fetched = torch.hub.load_state_dict_from_url(weights.as_uri(), check_hash=True, weights_only=True)
    for loaded in (
        plain,
        fetched,
        EfficientDet.from_pretrained(built).state_dict(),
        EfficientDet.from_pretrained(weights).state_dict(),
        EfficientDet.from_pretrained(built / MODEL_FILE).state_dict(),
    ):
        assert loaded.keys() == conversion.state_dict.keys()
        assert all(torch.equal(loaded[key], value) for key, value in conversion.state_dict.items())


def test_the_configuration_file_states_the_origin_of_the_weights(built: Path, conversion: Conversion) -> None:
    about = json.loads((built / CONFIG_FILE).read_text())["metadata"]
    assert about["source"] == "mine/model"
    assert about["weights"] == "EMA"
    assert about["step"] == 300_000
    assert about["variables_sha256"] == conversion.digest
    assert about["tool_version"] == __version__
    assert about["license"] == "mit"
    assert 'attr = "porting.__version__"' in (ROOT / "pyproject.toml").read_text()


def test_a_release_of_google_states_its_published_figures(checkpoint: Path, conversion: Conversion) -> None:
    with open_checkpoint(checkpoint) as opened:
        about = origin(conversion, opened, (), "x", "apache-2.0", GOOGLE_RELEASES["efficientdet-d4"])
    assert (about["published_ap_val"], about["published_ap_test_dev"]) == (49.3, 49.7)


# --- the card -----------------------------------------------------------------------------------------


def front_matter(folder: Path) -> dict[str, Any]:
    _, front, _ = (folder / CARD).read_text(encoding="utf-8").split("---\n", 2)
    loaded: dict[str, Any] = yaml.safe_load(front)
    return loaded


def test_the_card_has_front_matter(built: Path) -> None:
    front = front_matter(built)
    assert front["license"] == "mit"
    assert front["pipeline_tag"] == "object-detection"
    assert "model-index" not in front
    assert "not evaluated here" in (built / CARD).read_text()


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def test_every_number_on_the_card_comes_from_its_file(release: Path) -> None:
    def lines() -> set[str]:
        return set(card_of(release).splitlines())

    before = lines()
    for file, change, shown in (
        (CONFIG_FILE, lambda c: c["metadata"].update(parameters=987_654), "987,654"),
        (CONFIG_FILE, lambda c: c["metadata"].update(automl_parameters=987_655), "987,655, 1 of them"),
        (CONFIG_FILE, lambda c: c["metadata"].update(step=123_456), "123,456"),
        (CONFIG_FILE, lambda c: c["metadata"].update(published_ap_val=12.34), "12.34 on val2017"),
        (CONFIG_FILE, lambda c: c["metadata"].update(batch_norm_statistics="made up"), "statistics: made up"),
        (CONFIG_FILE, lambda c: c["config"].update(num_classes=77), "77 classes"),
        (CONFIG_FILE, lambda c: c["config"].update(resizer={"rule": "fixed_shape"}), "images stretched to"),
        (PARITY, lambda c: c["runs"][1]["worst"]["isolated"].update(relative=1.5e-9), "1.5e-09"),
        (PARITY, lambda c: c["runs"][0]["worst"]["accumulated"].update(relative=7.5e-21), "7.5e-21"),
        (PARITY, lambda c: c["runs"][0].update(activations=4321), "4321"),
    ):
        edit(release / file, change)
        new = lines() - before
        assert any(shown in line for line in new), shown


def metrics_of(weights: Path) -> dict[str, Any]:
    figures = {"AP": 0.3159, "AP50": 0.4984, "AP75": 0.3464, "APs": 0.0896, "APm": 0.3295, "APl": 0.5486}
    return {"ours": figures, "pictures": 158, "settings": {"ours": {"weights": sha256_of_file(weights)}}}


def test_metrics_of_these_weights_are_on_the_card(built: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(metrics_of(built / MODEL_FILE)))
    common = ("--ckpt", checkpoint, "--out", "out", "--name", "mine", "--size", 64, "--license", "mit")
    done = run(*common, "--coco-metrics", "metrics.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "mine"
    assert problems(folder) == []
    assert (folder / METRICS).read_bytes() == (tmp_path / "metrics.json").read_bytes()
    assert "| 0.3159 | 0.4984 |" in (folder / CARD).read_text()
    (result,) = front_matter(folder)["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]} == metrics_of(folder / MODEL_FILE)["ours"]


BAD_METRICS: dict[str, Callable[[dict[str, Any]], object]] = {
    "other weights": lambda m: m["settings"]["ours"].update(weights="0" * 64),
    "no weights": lambda m: m.pop("settings"),
    "no figures": lambda m: m.pop("ours"),
    "no AP": lambda m: m["ours"].pop("AP"),
    "AP in words": lambda m: m["ours"].update(AP="good"),
    "no count": lambda m: m.pop("pictures"),
    "endless count": lambda m: m.update(pictures=float("inf")),
    "AP that is no number": lambda m: m["ours"].update(AP=float("nan")),
    "APs of nothing": lambda m: m["ours"].update(APs=None),
    "AP in percent": lambda m: m["ours"].update(AP=31.59),
    "half an image": lambda m: m.update(pictures=3.5),
    "a short digest": lambda m: m["settings"]["ours"].update(weights="ab"),
}


def test_figures_of_sizes_that_are_not_annotated_are_left_out(release: Path) -> None:
    """COCO's evaluation sets them to -1."""
    metrics = metrics_of(release / MODEL_FILE)
    metrics["ours"]["APs"] = -1.0
    (release / METRICS).write_text(json.dumps(metrics))
    reseal(release)
    assert problems(release) == []
    (result,) = front_matter(release)["model-index"][0]["results"]
    assert [m["type"] for m in result["metrics"]] == ["AP", "AP50", "AP75", "APm", "APl"]
    assert "-1.0" not in (release / CARD).read_text()


def test_the_card_names_the_engine_of_the_figures(release: Path) -> None:
    metrics = metrics_of(release / MODEL_FILE)
    words = {
        ("eager", "float32"): "images (`coco",
        ("onnxruntime", "float32"): "images, computed by onnxruntime (`coco",
        ("folded", "bfloat16"): "images, computed by folded in bfloat16 (`coco",
    }
    for (engine, precision), said in words.items():
        metrics["settings"]["ours"] |= {"engine": engine, "precision": precision}
        (release / METRICS).write_text(json.dumps(metrics))
        reseal(release)
        assert problems(release) == []
        assert said in (release / CARD).read_text()


@pytest.mark.parametrize("fault", BAD_METRICS)
def test_bad_metrics_in_a_folder_are_found(fault: str, release: Path) -> None:
    metrics = metrics_of(release / MODEL_FILE)
    (release / METRICS).write_text(json.dumps(metrics))
    reseal(release)
    assert problems(release) == []
    BAD_METRICS[fault](metrics)
    (release / METRICS).write_text(json.dumps(metrics))
    (release / SUMS).write_text(sums_of(release))
    assert any(problem.startswith(("are ", "lack ")) for problem in problems(release))


# --- every change is detected ---------------------------------------------------------------------------


def flip(path: Path, position: int, bit: int = 0) -> Callable[[], None]:
    """Flip one bit; call the result to restore it."""
    original = path.read_bytes()
    changed = bytearray(original)
    changed[position] ^= 1 << bit
    path.write_bytes(changed)

    def restore() -> None:
        path.write_bytes(original)

    return restore


@pytest.fixture(scope="module")
def scratch(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that restore what they change."""
    folder = tmp_path_factory.mktemp("scratch") / "mine"
    shutil.copytree(built, folder)
    (folder / METRICS).write_text(json.dumps(metrics_of(folder / MODEL_FILE)))
    reseal(folder)
    return folder


def test_a_flipped_byte_in_any_file_is_found(scratch: Path) -> None:
    files = sorted(scratch.iterdir())
    assert len(files) == 8
    for path in files:
        size = path.stat().st_size
        for position in (0, size // 3, size // 2, size - 1):
            restore = flip(path, position)
            assert problems(scratch), f"{path.name} at {position}"
            restore()
    assert problems(scratch) == []


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_is_found(scratch: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(scratch.iterdir())))
    restore = flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(0, 7)))
    try:
        assert problems(scratch)
    finally:
        restore()


def test_missing_and_unexpected_files_are_found(built: Path, tmp_path: Path) -> None:
    for name in sorted(path.name for path in built.iterdir()):
        folder = tmp_path / f"without-{name}"
        shutil.copytree(built, folder)
        (folder / name).unlink()
        assert problems(folder), name
    for name, make in (
        ("extra.txt", Path.touch),
        (".hidden", Path.touch),
        ("extra-01234567.pth", Path.touch),
        ("folder", Path.mkdir),
    ):
        folder = tmp_path / f"with-{name}"
        shutil.copytree(built, folder)
        make(folder / name)
        assert problems(folder), name
    folder = tmp_path / "linked"
    shutil.copytree(built, folder)
    (folder / CARD).unlink()
    (folder / CARD).symlink_to(built / CARD)
    assert problems(folder) == [f"{CARD} is not a plain file"]


def reseal(folder: Path, card: bool = True) -> None:
    """Make the checksums (and the card) consistent again, as a forger would."""
    if card:
        (folder / CARD).write_text(card_of(folder), encoding="utf-8")
    (folder / SUMS).write_text(sums_of(folder))


def change_one_tensor(folder: Path) -> None:
    state_dict, config, about = read_weights(folder)
    state_dict["backbone.stem.bn.bias"] = state_dict["backbone.stem.bn.bias"] + 1
    write_weights(folder / MODEL_FILE, state_dict, config, about)


def rename_weights(folder: Path) -> None:
    (weights,) = folder.glob("*.pth")
    weights.rename(folder / "mine-00000000.pth")


def worsen_parity(folder: Path) -> None:
    def change(content: Any) -> None:
        content["layers"][3]["runs"]["float32"]["isolated"]["relative"] = 0.5

    rewrite_parity(folder, change)


def rewrite_parity(folder: Path, change: Callable[[Any], object]) -> None:
    """Change parity.json, and the page with it."""
    edit(folder / PARITY, change)
    page = (folder / PARITY_PAGE).read_text(encoding="utf-8")
    data = _embeddable({**json.loads((folder / PARITY).read_text()), "thumbnails": None})
    head, tail = page.split('id="report">')[0], page.split("</script>", 1)[1]
    (folder / PARITY_PAGE).write_text(f'{head}id="report">{data}</script>{tail}', encoding="utf-8")


def other_classes(content: Any) -> None:
    content["config"]["num_classes"] = 3


FORGERIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a number on the card": (
        lambda f: (f / CARD).write_text((f / CARD).read_text().replace("parameters: ", "parameters: 1")),
        "it says something else",
    ),
    "a tensor": (change_one_tensor, r"backbone\.stem\.bn\.bias differs"),
    "the name of the .pth": (rename_weights, "SHA-256 different from the one in its name"),
    "the configuration": (lambda f: edit(f / CONFIG_FILE, other_classes), "does not have the configuration"),
    "the parameters": (
        lambda f: edit(f / CONFIG_FILE, lambda c: c["metadata"].update(parameters=1)),
        "something else of the weights' origin",
    ),
    "a layer out of tolerance": (worsen_parity, "is 0.5 off in float32"),
    "a layer that is not a number": (
        lambda f: rewrite_parity(
            f, lambda c: c["layers"][0]["runs"]["float64"]["accumulated"].update(relative="NaN")
        ),
        "is nan off in float64",
    ),
    "a verdict": (lambda f: rewrite_parity(f, lambda c: c.update(passed=False)), "did not pass"),
    "a run left out": (lambda f: rewrite_parity(f, lambda c: c["runs"].pop()), "lacks a run"),
    "a better summary": (
        lambda f: rewrite_parity(f, lambda c: c["runs"][1]["worst"]["isolated"].update(relative=1e-12)),
        "summary of float32 is not that of its layers",
    ),
    "another tolerance": (
        lambda f: rewrite_parity(f, lambda c: c["runs"][1]["tolerances"].update(isolated=1e-12)),
        "summary of float32 is not that of its layers",
    ),
    "a layer left out": (
        lambda f: rewrite_parity(f, lambda c: c["layers"].pop(5)),
        "layers are not those of the network",
    ),
    "another count": (
        lambda f: rewrite_parity(f, lambda c: c["runs"][0].update(activations=1000)),
        "counts other layers",
    ),
    "parity of other values": (
        lambda f: rewrite_parity(f, lambda c: c["metadata"].update(variables_sha256="0")),
        "of other values",
    ),
    "parity of another model": (
        lambda f: rewrite_parity(f, lambda c: c["model"].update(num_classes=3)),
        "of another configuration",
    ),
    "a figure in parity.json alone": (
        lambda f: edit(
            f / PARITY, lambda c: c["layers"][0]["runs"]["float32"]["isolated"].update(relative=0)
        ),
        "it shows something else",
    ),
    "parity.json that nests too deep": (
        lambda f: (f / PARITY).write_text("[" * 100_000),
        "cannot be read",
    ),
    "parity.json that is a list": (lambda f: (f / PARITY).write_text("[]"), "cannot be read"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forgery_with_a_right_checksum_is_found(forgery: str, release: Path) -> None:
    change, message = FORGERIES[forgery]
    change(release)
    reseal(release, card=False)
    found = problems(release)
    assert any(re.search(message, problem) for problem in found), found


def test_another_checkpoint_is_found(built: Path, tmp_path: Path, checkpoint: Path) -> None:
    write_bundle(tmp_path / "mine" / "model", synthetic_checkpoint(TINY, seed=1))
    commands = [("--verify-release", built, "--ckpt", f, "--json") for f in (checkpoint, tmp_path / "mine")]
    (right, found, _), (wrong, differing, _) = run_many(commands, tmp_path)
    assert (right, wrong) == (0, 1)
    assert json.loads(found)["passed"] is True
    problem = json.loads(differing)["checks"]["the checkpoint converts to these very tensors"]
    assert problem == "the checkpoint holds other values"


def test_a_release_of_raw_values_is_compared_with_raw_values(checkpoint: Path, tmp_path: Path) -> None:
    made, checked = run_many(
        [
            ("--ckpt", checkpoint, "--out", ".", "--name", "raw", "--size", 64, "--raw"),
            ("--verify-release", "raw", "--ckpt", checkpoint),
        ],
        tmp_path,
    )
    assert (made[0], checked[0]) == (0, 0), (made, checked)
    assert "the raw values of" in (tmp_path / "raw" / CARD).read_text()


def test_a_release_of_partial_averages_is_compared_with_the_same_values(
    checkpoint: Path, tmp_path: Path
) -> None:
    with open_checkpoint(checkpoint) as opened:
        content = {name: opened[name] for name in opened if not name.endswith(f"moving_mean{EMA_SUFFIX}")}
    write_bundle(tmp_path / "partial/model", content)
    made, checked, refused = run_many(
        [
            ("--ckpt", "partial", "--out", ".", "--name", "some", "--size", 64, "--ema-or-raw"),
            ("--verify-release", "some", "--ckpt", "partial"),
            ("--ckpt", "partial", "--out", ".", "--name", "none", "--size", 64),
        ],
        tmp_path,
    )
    assert (made[0], checked[0], refused[0]) == (0, 0, 2), (made, checked, refused)
    card = (tmp_path / "some" / CARD).read_text()
    assert "the moving averages where the checkpoint has them: EMA (" in card
    assert ", the rest raw) of" in card


# --- the library ---------------------------------------------------------------------------------------


def test_a_release_as_a_library_call(checkpoint: Path, tmp_path: Path) -> None:
    """Without a console: the proof is passed in, a listener gets the checks."""

    def prove(conversion: Conversion, images: np.ndarray, observe: Observer) -> list[ParityResult]:
        results = []
        for dtype in ("float64", "float32"):
            model = EfficientDet(conversion.config).to(getattr(torch, dtype)).eval()
            model.load_state_dict(apply_rules(rules(conversion.config), conversion.variables, dtype))
            inputs = images.astype(dtype)
            reference = tensorflow_reference(conversion.variables, conversion.config, inputs, dtype)
            results.append(compare(model, reference, inputs, lambda _: None, observe))
        return results

    heard: list[Check] = []
    request = ReleaseRequest(out=tmp_path, spec=str(checkpoint), name="mine")
    images = np.zeros((1, 64, 64, 3), np.float32)
    with open_checkpoint(checkpoint) as opened:
        inference = infer_config(opened.shapes, opened.source)
        made = make_release(request, opened, inference, lambda config: images, prove, heard.append)
        assert made.folder == tmp_path / "mine"
        assert problems(made.folder, convert(opened, inference.config)) == []
        assert heard == list(made.checks)
        card = (made.folder / CARD).read_text()
        assert "licence of the weights: unknown" in card
        lines = setting_lines(inference.config, inference.unseen)
        assert f"\nThe port is proven for these assumed settings: {', '.join(lines)}; only the" in card
        known = dataclasses.replace(inference, unseen=())
        again = dataclasses.replace(request, name="known")
        sure = make_release(again, opened, known, lambda config: images, prove)
        assert "proven for these assumed settings" not in (sure.folder / CARD).read_text()
        with pytest.raises(OutputError, match="it is not empty"):
            make_release(request, opened, inference, lambda config: images, prove)


# --- the tool -----------------------------------------------------------------------------------------


def test_the_exit_status_of_a_check(release: Path, built: Path, tmp_path: Path) -> None:
    flip(release / MODEL_FILE, 5000)
    commands = [("--verify-release", folder) for folder in (built, release, tmp_path / "absent")]
    good, bad, absent = run_many(commands, tmp_path)
    assert good[0] == 0
    assert bad[0] == 1
    assert f"differs at {MODEL_FILE}" in bad[1]
    assert absent[0] == 2
    assert absent[2].startswith("error: there is no folder")


def test_a_port_that_differs_is_not_released(checkpoint: Path, tmp_path: Path) -> None:
    before = "import pytorch_model.layers as l; l.BN_EPSILON = 1e-2"
    done = run("--ckpt", checkpoint, "--out", "out", "--name", "x", "--size", 64, cwd=tmp_path, before=before)
    assert done.returncode == 1, done.stderr
    assert "error: the port does not match the reference; nothing was released" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_metrics_of_other_weights_are_not_released(checkpoint: Path, built: Path, tmp_path: Path) -> None:
    metrics = metrics_of(built / MODEL_FILE)
    metrics["settings"]["ours"]["weights"] = "0" * 64
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    common = ("--ckpt", checkpoint, "--out", "out", "--name", "x", "--size", 64)
    done = run(*common, "--coco-metrics", "metrics.json", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "error: the COCO metrics are of another weight file" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


FORMS: dict[str, tuple[Callable[[Any], object], str]] = {
    "no figures": (lambda m: m.pop("ours"), "it lacks 'ours'"),
    "no AP": (lambda m: m["ours"].pop("AP"), "it lacks 'AP'"),
    "figures in a list": (
        lambda m: m.update(ours=["AP"]),
        "its figures, pictures or settings are not objects",
    ),
    "AP in percent": (lambda m: m["ours"].update(AP=31.59), "its AP is 31.59, neither between 0.0 and 1.0"),
    "AP of NaN": (lambda m: m["ours"].update(AP=float("nan")), "its AP is nan, neither"),
    "APl in words": (lambda m: m["ours"].update(APl="1"), "its APl is '1', neither"),
    "half an image": (lambda m: m.update(pictures=3.5), "its number of images is 3.5"),
    "number of images in words": (lambda m: m.update(pictures="158"), "its number of images is '158'"),
    "a short digest": (
        lambda m: m["settings"]["ours"].update(weights="ab"),
        "SHA-256 of its weights is 'ab'",
    ),
}


@pytest.mark.parametrize("fault", FORMS)
def test_the_form_of_metrics_is_checked(fault: str, tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    metrics = metrics_of(tmp_path / "weights")
    (tmp_path / "m.json").write_text(json.dumps(metrics))
    assert read_metrics(tmp_path / "m.json") == (tmp_path / "m.json").read_bytes()
    assert Metrics.parse(read_metrics(tmp_path / "m.json")).weights_sha256 == sha256_of_file(
        tmp_path / "weights"
    )
    change, reason = FORMS[fault]
    change(metrics)
    (tmp_path / "m.json").write_text(json.dumps(metrics))
    with pytest.raises(
        EfficientDetError, match=rf"m\.json is not a metrics\.json: .*{reason}.*; give the one that"
    ):
        read_metrics(tmp_path / "m.json")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "is not a metrics.json: it is not JSON"),
        (b'{"ours": {}, "ours": {}}', "is not a metrics.json: an object in it has the key 'ours' twice"),
        (b"\xef\xbb\xbf{}", "is not a metrics.json: it is not JSON: Unexpected UTF-8 BOM"),
        (b'{"\xff": 1}', "is not a metrics.json: byte 2 is not UTF-8 text"),
    ],
)
def test_metrics_are_json(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(data)
    with pytest.raises(EfficientDetError, match=rf"{reason}.*; give .*tools/eval_coco\.py"):
        read_metrics(tmp_path / "m.json")


def test_metrics_are_a_bounded_file(tmp_path: Path, pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(
            EfficientDetError, match=r"it is a pipe or a device, not a file; give the metrics\.json that"
        ):
            read_metrics(path)
    (tmp_path / "m.json").write_bytes(b" " * 101)
    monkeypatch.setattr(metrics_module, "MOST_BYTES", 100)
    with pytest.raises(EfficientDetError, match="it has more than 100 bytes"):
        read_metrics(tmp_path / "m.json")


def test_a_release_that_fails_its_own_check_is_not_left(checkpoint: Path, tmp_path: Path) -> None:
    before = (
        "import numpy, porting.publish.release_folder as r; write = r.write_weights; "
        "wrong = lambda arrays: {key: numpy.asarray(-array) for key, array in arrays.items()}; "
        "r.write_weights = lambda path, arrays, *more: write(path, wrong(arrays), *more)"
    )
    done = run("--ckpt", checkpoint, "--out", "out", "--name", "x", "--size", 64, cwd=tmp_path, before=before)
    assert done.returncode == 1, done.stderr
    assert "error: out/x was not written: it failed its own check" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    done = run(
        "--ckpt", checkpoint, "--out", ".", "--name", "x", "--size", 64, cwd=tmp_path, limit_bytes=60_000
    )
    assert done.returncode == 2, done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def refusals(checkpoint: Path) -> Iterator[tuple[object, ...]]:
    yield "--ckpt", checkpoint
    yield "--out", "out"
    yield "--ckpt", checkpoint, "--out", "full-parent", "--name", "there"
    yield "--ckpt", checkpoint, "--out", "out", "--name", "a-b"
    yield "--ckpt", checkpoint, "--out", "out", "--coco-metrics", "absent.json"
    yield "--ckpt", checkpoint, "--out", "file"
    yield "--verify-release", "full-parent", "--out", "out"


def test_bad_usage_is_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "full-parent" / "there").mkdir(parents=True)
    (tmp_path / "full-parent" / "there" / "x").touch()
    (tmp_path / "file").touch()
    commands = list(refusals(checkpoint))
    for command, (status, _, stderr) in zip(commands, run_many(commands, tmp_path), strict=True):
        assert status == 2, command
        assert "error: " in stderr.splitlines()[-1], command
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["", "a b", "a-b", "../x", "ä"])
def test_names_that_torch_hub_would_misread_are_rejected(name: str) -> None:
    with pytest.raises(EfficientDetError, match="not a valid name for a release"):
        check_name(name)


def test_a_new_folder_is_complete_or_absent(tmp_path: Path) -> None:

    def interrupted() -> None:
        with new_folder(tmp_path / "a") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with new_folder(tmp_path / "a") as folder:
        (folder / "whole").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["whole"]
    for path, message in ((tmp_path / "a", "it is not empty"), (tmp_path / "no" / "a", "there is no folder")):
        with pytest.raises(OutputError, match=message), new_folder(path):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
