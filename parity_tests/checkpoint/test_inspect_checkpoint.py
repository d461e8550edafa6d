"""tools/inspect_checkpoint.py, and the functions behind it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.helpers.paths import TOOLS
from porting.checkpoint import Checkpoint, open_checkpoint
from porting.checkpoint.v2.writer import write_bundle
from porting.inspection import Scope, inspect, scope_tree
from porting.scopes import EMA_SUFFIX
from porting.synthetic import synthetic_checkpoint
from pytorch_model.config import MODELS, model_config
from tf_reference.variables import variables

TOOL = TOOLS / "inspect_checkpoint.py"
CONFIG = model_config("efficientdet-lite0")
BETA = "resample_p6/bn/beta"


class Memory(Checkpoint):
    """A checkpoint of given arrays, read in their order."""

    def __init__(self, arrays: dict[str, np.ndarray], source: str = "memory") -> None:
        shapes = {name: array.shape for name, array in arrays.items()}
        super().__init__(source, "arrays", shapes, {name: array.dtype for name, array in arrays.items()})
        self.arrays = arrays
        self.reads: list[str] = []

    def _read(self, name: str) -> np.ndarray:
        self.reads.append(name)
        return self.arrays[name]

    def _reading_order(self, names: list[str]) -> list[str]:
        return [name for name in self.arrays if name in names]


@pytest.fixture(scope="module")
def trained() -> dict[str, np.ndarray]:
    """The content of a training checkpoint: raw values, averages, Momentum slots and global_step."""
    return synthetic_checkpoint(CONFIG, momentum=True)


@pytest.fixture
def arrays(trained: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(trained)


# Findings


def test_a_training_checkpoint(arrays: dict[str, np.ndarray]) -> None:
    checkpoint = Memory(arrays)
    found = inspect(checkpoint)
    declared = list(variables(CONFIG))
    assert found.inference is not None
    assert (found.inference.variant, found.inference.config) == ("efficientdet-lite0", CONFIG)
    assert found.shapes == {variable.name: variable.shape for variable in declared}
    assert found.trainable == sum(math.prod(v.shape) for v in declared if v.trainable)
    assert found.untrained == sum(math.prod(v.shape) for v in declared if not v.trainable)
    assert found.averaged == len(declared) == 588
    assert dict(found.slots) == {"Momentum": sum(v.trainable for v in declared)}
    assert found.unexpected == ()
    assert not any(name.endswith("/Momentum") for name in checkpoint.reads)
    assert len(checkpoint.reads) == 2 * 588  # each once


def test_how_far_the_averages_are(arrays: dict[str, np.ndarray]) -> None:
    found = inspect(Memory(arrays)).averages
    raw = {name: arrays[name].astype(np.float64).ravel() for name in (v.name for v in variables(CONFIG))}
    average = {name: arrays[name + EMA_SUFFIX].astype(np.float64).ravel() for name in raw}

    def apart(names: list[str]) -> float:
        ours = np.concatenate([raw[name] for name in names])
        theirs = np.concatenate([average[name] for name in names])
        return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

    each = {name: apart([name]) for name in raw}
    largest = max(each, key=lambda name: each[name])
    assert found is not None
    assert found.pairs == 588
    assert found.identical == 0
    assert found.relative == pytest.approx(apart(list(raw)), rel=1e-12)
    assert found.largest == largest
    assert found.largest_relative == pytest.approx(each[largest], rel=1e-12)


def test_the_order_of_reading_does_not_matter(arrays: dict[str, np.ndarray]) -> None:
    """In TensorFlow's files a variable comes before its average; in others it may not."""
    backwards = dict(reversed(arrays.items()))
    assert list(backwards) != list(arrays)
    ours, theirs = inspect(Memory(backwards)).averages, inspect(Memory(arrays)).averages
    assert ours is not None
    assert theirs is not None
    assert ours.relative == pytest.approx(theirs.relative)
    assert (ours.largest, ours.pairs) == (theirs.largest, theirs.pairs)


def test_a_released_checkpoint(shared: Path) -> None:
    with open_checkpoint(shared / "oracle/checkpoints/efficientdet-d0") as checkpoint:
        found = inspect(checkpoint)
    assert found.inference is not None
    assert found.inference.variant == "efficientdet-d0"
    assert (found.trainable, found.averaged, dict(found.slots)) == (3_880_067, 709, {})
    assert found.unexpected == ()


def test_identical_averages(arrays: dict[str, np.ndarray]) -> None:
    for name in [name for name in arrays if name.endswith(EMA_SUFFIX)]:
        arrays[name] = arrays[name.removesuffix(EMA_SUFFIX)]
    found = inspect(Memory(arrays)).averages
    assert found is not None
    assert (found.identical, found.relative, found.largest_relative) == (588, 0.0, 0.0)


def test_an_average_of_zeros_is_infinitely_far(arrays: dict[str, np.ndarray]) -> None:
    arrays[BETA + EMA_SUFFIX] = np.zeros_like(arrays[BETA])
    found = inspect(Memory(arrays)).averages
    assert found is not None
    assert (found.largest, found.largest_relative) == (BETA, math.inf)
    assert math.isfinite(found.relative)
    arrays[BETA] = np.zeros_like(arrays[BETA])
    again = inspect(Memory(arrays)).averages
    assert again is not None
    assert again.identical == 1
    assert math.isfinite(again.largest_relative)


def test_raw_values_alone_and_averages_alone(arrays: dict[str, np.ndarray]) -> None:
    raw = {name: array for name, array in arrays.items() if not name.endswith((EMA_SUFFIX, "/Momentum"))}
    found = inspect(Memory(raw))
    assert (found.averaged, found.averages, dict(found.slots), found.unexpected) == (0, None, {}, ())
    averages = {name: array for name, array in arrays.items() if name.endswith(EMA_SUFFIX)}
    found = inspect(Memory(averages))
    assert (found.averaged, found.averages, found.unexpected) == (588, None, ())
    assert found.trainable == inspect(Memory(raw)).trainable


def spoil(arrays: dict[str, np.ndarray], how: str) -> None:
    match how:
        case "stranger":
            arrays["extra/kernel"] = np.zeros((3, 3), np.float32)
            arrays["extra/kernel" + EMA_SUFFIX] = np.ones((3, 3), np.float32)
        case "missing":
            for suffix in ("", EMA_SUFFIX, "/Momentum"):
                del arrays[BETA + suffix]
        case "misshapen":
            for suffix in ("", EMA_SUFFIX):
                arrays[BETA + suffix] = np.ones(65, np.float32)
        case "misshapen average":
            arrays[BETA + EMA_SUFFIX] = np.ones(65, np.float32)
        case "no average":
            del arrays[BETA + EMA_SUFFIX]
        case "no raw value":
            del arrays[BETA]
        case "nan":
            arrays[BETA] = np.full_like(arrays[BETA], np.nan)
        case "infinite average":
            arrays[BETA + EMA_SUFFIX] = np.full_like(arrays[BETA], np.inf)
        case "negative variance":
            arrays["resample_p6/bn/moving_variance"] = -np.ones(64, np.float32)
        case "negative average variance":
            arrays["resample_p6/bn/moving_variance" + EMA_SUFFIX] = -np.ones(64, np.float32)
        case "integers":
            arrays[BETA] = np.ones(64, np.int32)
        case "many":
            for index in range(9):
                arrays[f"extra_{index}/w"] = arrays[f"extra_{index}/w" + EMA_SUFFIX] = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("stranger", "1 variable that efficientdet-lite0 does not have: extra/kernel"),
        ("missing", f"1 variable that efficientdet-lite0 has and this checkpoint does not: {BETA}"),
        ("misshapen", f"1 variable with another shape than in efficientdet-lite0: {BETA}"),
        ("misshapen average", f"1 variable whose moving average has another shape: {BETA}"),
        ("no average", f"1 variable without a moving average, although others have one: {BETA}"),
        (
            "no raw value",
            f"1 variable with a moving average or a slot, but without a raw value: {BETA}",
        ),
        ("nan", f"1 variable holding NaN or infinity: {BETA}"),
        ("infinite average", f"1 variable holding NaN or infinity: {BETA}{EMA_SUFFIX}"),
        ("negative variance", "1 variable holding a negative variance: resample_p6/bn/moving_variance"),
        (
            "negative average variance",
            f"1 variable holding a negative variance: resample_p6/bn/moving_variance{EMA_SUFFIX}",
        ),
        ("integers", f"1 variable whose type is not floating point: {BETA}"),
        ("many", "9 variables that efficientdet-lite0 does not have: extra_0/w, extra_1/w, extra_2/w, …"),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_unexpected_variables(
    how: str, sentence: str, backwards: bool, arrays: dict[str, np.ndarray]
) -> None:
    spoil(arrays, how)
    if backwards and how != "many":
        arrays = dict(reversed(arrays.items()))
    found = inspect(Memory(arrays))
    assert found.unexpected == (sentence,)
    assert found.inference is not None
    assert found.averages is not None
    assert math.isfinite(found.averages.relative)


def test_not_an_efficientdet_at_all() -> None:
    found = inspect(Memory({"dense/kernel": np.ones((3, 4), np.float32), "global_step": np.array(3)}))
    assert found.inference is None
    assert (found.trainable, found.untrained, dict(found.shapes)) == (12, 0, {"dense/kernel": (3, 4)})
    assert len(found.unexpected) == 1
    assert "this is not an AutoML EfficientDet" in found.unexpected[0]


def test_nothing_at_all() -> None:
    found = inspect(Memory({}))
    assert (found.inference, found.averages, found.trainable, len(found.unexpected)) == (None, None, 0, 1)


# The tree


def leaves(scopes: tuple[Scope, ...]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(repeats of all above, parameters, shape) of each variable."""
    for scope in scopes:
        if scope.shape is not None:
            yield 1, math.prod(scope.shape), scope.shape
        for repeats, parameters, shape in leaves(scope.children):
            yield repeats * scope.repeats, parameters, shape


def check_tree(shapes: dict[str, tuple[int, ...]]) -> tuple[Scope, ...]:
    """Check that splitting and merging lose nothing."""
    tree = scope_tree(shapes)
    assert sum(scope.variables for scope in tree) == len(shapes)
    assert sum(scope.parameters for scope in tree) == sum(map(math.prod, shapes.values()))
    found = sorted(shape for repeats, _, shape in leaves(tree) for _ in range(repeats))
    assert found == sorted(shapes.values())
    return tree


@pytest.mark.parametrize("model", MODELS)
def test_the_tree_of_every_model(model: str) -> None:
    config = model_config(model)
    tree = check_tree({variable.name: variable.shape for variable in variables(config)})
    backbone, resample = config.backbone.name, "resample_p6"
    assert [scope.label for scope in tree] == ["box_net", "class_net", backbone, "fpn_cells", resample]
    cells = [scope.label for scope in tree[3].children]
    assert cells == ["cell_0", f"cell_1…{config.fpn_cell_repeats - 1}"]
    assert [scope.repeats for scope in tree[3].children] == [1, config.fpn_cell_repeats - 1]


def test_alike_neighbours_are_one_line() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        f"blocks_{i}/{leaf}": (8, i // 9) for i in range(12) for leaf in ("kernel", "bias")
    }
    shapes |= {"blocks_20/kernel": (8, 1), "blocks_20/bias": (8, 1), "stem": (), "w_1": (3,), "w_2": (3,)}
    tree = check_tree(shapes)
    assert [(scope.label, scope.repeats, scope.variables) for scope in tree] == [
        ("blocks_0…8", 9, 18),
        ("blocks_9…11", 3, 6),
        ("blocks_20", 1, 2),
        ("stem", 1, 1),
        ("w_1", 1, 1),
        ("w_2", 1, 1),
    ]
    assert [child.label for child in tree[0].children] == ["bias", "kernel"]


def test_names_that_differ_are_not_alike() -> None:
    tree = check_tree(
        {"a_1/x": (1,), "a_2/y": (1,), "b_1/x/z": (1,), "b_2/x": (1,), "c_1/x": (1,), "d_2/x": (1,)}
    )
    assert [scope.label for scope in tree] == ["a_1", "a_2", "b_1", "b_2", "c_1", "d_2"]


NAMES = st.text("ab_/…12", max_size=12) | st.text(max_size=6)


@given(st.dictionaries(NAMES, st.lists(st.integers(0, 3), max_size=3).map(tuple), max_size=12))
@settings(deadline=None)
def test_any_names_make_a_tree(shapes: dict[str, tuple[int, ...]]) -> None:
    tree = scope_tree(shapes)
    assert sum(scope.variables for scope in tree) == len(shapes)
    assert sum(scope.parameters for scope in tree) == sum(map(math.prod, shapes.values()))


def test_a_name_of_a_thousand_scopes() -> None:
    check_tree({"a/" * 5000 + "x": (2,), "a/" * 5000 + "y": (3,)})


# From the command line


def run(*arguments: object, cwd: Path, columns: int = 80) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    env = {**os.environ, "COLUMNS": str(columns)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, trained: dict[str, np.ndarray]) -> Path:
    """A folder whose name looks like markup, which must be printed as it is."""
    folder = tmp_path_factory.mktemp("t") / "[red]run" / "efficientdet-lite0"
    write_bundle(folder / "model", trained)
    return folder


@pytest.mark.parametrize("columns", [80, 140])
def test_the_printed_text(columns: int, folder: Path, tmp_path: Path) -> None:
    done = run("--ckpt", folder.relative_to(folder.parents[1]), cwd=folder.parents[1], columns=columns)
    assert (done.returncode, done.stderr) == (0, "")
    rows = done.stdout.splitlines()
    assert all(len(row.rstrip()) <= columns for row in rows)
    text = " ".join(done.stdout.split())
    assert "checkpoint [red]run/efficientdet-lite0/model format" in text
    assert "TensorFlow V2 checkpoint, 1,549 entries, step" in text
    assert "model efficientdet-lite0: 90 classes, P3–P7, efficientnet-lite0, BiFPN 3×64 (sum)" in text
    assert "parameters 3,243,470 trained, 47,136 batch-norm statistics, in 588 variables" in text
    assert "588 of 588 variables have a moving average (EMA); raw and EMA are 0." in text
    assert "optimizer 372 × Momentum" in text
    assert "unexpected nothing" in text
    assert "box_net 72 20,964 ├─ box-0 3 4,736 ├─ box-0-bn-3…7 ×5 20 1,280" in text
    assert "fpn_cells" in text
    assert "fnode0" not in text


def test_depth(folder: Path, tmp_path: Path) -> None:
    none = run("--ckpt", folder, "--depth", 0, cwd=tmp_path)
    assert "box_net" not in none.stdout
    deep = run("--ckpt", folder, "--depth", 9, cwd=tmp_path)
    text = " ".join(deep.stdout.split())
    assert "│ ├─ depthwise_kernel 576 3×3×64×1" in text
    assert "fnode0" in text


def test_json(folder: Path, tmp_path: Path) -> None:
    done = run("--ckpt", folder, "--json", "--depth", 1, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads(done.stdout)
    assert summary["variant"] == "efficientdet-lite0"
    assert summary["config"]["image_size"] == [320, 320]
    assert summary["averages"]["pairs"] == 588
    assert summary["slots"] == {"Momentum": 372}
    assert summary["variables"][BETA] == [64]
    assert [scope["scope"] for scope in summary["scopes"]][:2] == ["box_net", "class_net"]
    assert summary["scopes"][0]["scopes"] == []
    assert summary["unexpected"] == []


def test_something_unexpected(folder: Path, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    arrays[BETA + EMA_SUFFIX] = np.zeros_like(arrays[BETA])
    spoil(arrays, "stranger")
    write_bundle(tmp_path / "odd" / "model", arrays)
    done = run("--ckpt", "odd", "--depth", 0, cwd=tmp_path, columns=200)
    assert (done.returncode, done.stderr) == (1, "")
    assert "unexpected  1 variable that efficientdet-lite0 does not have: extra/kernel" in done.stdout
    assert f"most of all {BETA}, infinitely far" in done.stdout
    json_done = run("--ckpt", "odd", "--json", cwd=tmp_path)
    assert json_done.returncode == 1
    assert json.loads(json_done.stdout)["averages"]["largest_relative_l2"] is None
    assert "Infinity" not in json_done.stdout


def test_not_an_efficientdet(tmp_path: Path) -> None:
    write_bundle(tmp_path / "model", {"dense/kernel": np.ones((3, 4), np.float32)})
    done = run("--ckpt", "model", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    text = " ".join(done.stdout.split())
    assert "model not one that can be ported" in text
    assert "unexpected this is not an AutoML EfficientDet" in text
    assert "averages no moving averages (EMA) optimizer no slots" in text
    assert "dense 1 12 └─ kernel 12 3×4" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt", "absent"], "error: neither absent nor absent.index exists; check the path\n"),
        (
            ["--ckpt", "efficientdet-d99"],
            "error: efficientdet-d99 is neither an existing path nor a Google release",
        ),
        (["--ckpt", "x", "--depth", "-1"], "--depth is -1, must be 0 or more"),
        ([], "--ckpt"),
    ],
)
def test_rejected_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_damage_is_an_error_not_a_finding(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = tmp_path / "model.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[0] ^= 255  # of the first variable; optimizer slots are not read
    data.write_bytes(bytes(content))
    done = run("--ckpt", ".", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is damaged at variable" in done.stderr


def test_help(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert "exit status: 0 nothing unexpected; 1 something unexpected" in done.stdout
