"""SavedModels and frozen graphs: written by TensorFlow here, and of AutoML's release."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.helpers.exported.models import keras_model
from parity_tests.helpers.paths import ROOT
from parity_tests.helpers.small_models import assert_same, seeded, shallow
from porting.checkpoint import open_checkpoint
from porting.checkpoint.v2.index import read_index
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import choose_variables
from porting.errors import CheckpointError
from porting.infer import infer_config
from porting.scopes import EMA_SUFFIX
from pytorch_model.config import EfficientDetConfig

# --- SavedModels ----------------------------------------------------------------------------------------


def test_a_release_serves_the_plain_variables(shared: Path) -> None:
    """Checked by the checksums of a released D0.

    The plain variables of its SavedModel are the checkpoint's averages; the averages in the SavedModel are
    neither the checkpoint's averages nor its plain values.
    """
    served = read_index(shared / "checkpoint_index/d0_savedmodel/variables.index").entries
    released = read_index(shared / "checkpoint_index/d0_ap3429/model.index").entries
    names = [name for name in served if not name.endswith(EMA_SUFFIX) and name != "global_step"]
    assert len(names) == 709
    for name in names:
        assert served[name].crc32c == released[name + EMA_SUFFIX].crc32c, name
        assert served[name + EMA_SUFFIX].crc32c not in (
            released[name].crc32c,
            released[name + EMA_SUFFIX].crc32c,
        ), name


def written(folder: Path) -> tuple[EfficientDetConfig, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A SavedModel folder like AutoML's: (configuration, served values, stale averages)."""
    config = shallow()
    values = seeded(config)
    stale = {name + EMA_SUFFIX: value + 1 for name, value in values.items()}
    step = {"global_step": np.array(5, np.int64)}
    write_bundle(folder / "variables" / "variables", {**values, **stale, **step})
    (folder / "saved_model.pb").write_bytes(b"\x08\x01")
    return config, {**values, **step}, stale


@pytest.mark.parametrize(
    "inside", ["", "saved_model.pb", "variables", "variables/variables", "variables/variables.index"]
)
def test_stale_averages_are_left_out(tmp_path: Path, inside: str) -> None:
    config, values, stale = written(tmp_path / "export")
    with open_checkpoint(tmp_path / "export" / inside) as checkpoint:
        assert_same(dict(checkpoint), values)
        assert checkpoint.format == "TensorFlow SavedModel"
        assert checkpoint.step == 5
        assert checkpoint.notes == (
            f"left out {len(stale)} moving averages: a SavedModel computes with the plain variables, which "
            "AutoML set to the averages when it exported the model",
        )
        assert choose_variables(checkpoint, config, raw=False)[2] == "raw"


def test_the_classifier_of_a_backbone_is_left_out(tmp_path: Path) -> None:
    """AutoML's Keras exporter saves it, although no detector runs it."""
    config, values, _ = written(tmp_path / "export")
    head = {"backbone/_head/_conv_head/kernel": np.ones((1, 1, 8, 1280), np.float32)}
    write_bundle(tmp_path / "export" / "variables" / "variables", {**values, **head})
    with open_checkpoint(tmp_path / "export") as checkpoint:
        chosen, unused, _ = choose_variables(checkpoint, config, raw=False)
    assert set(chosen.values()) == values.keys() - {"global_step"}
    assert unused["the backbone's own classifier, which a detector does not run"] == tuple(head)


def test_exported_like_automl(tensorflow: Any, tmp_path: Path) -> None:
    """A checkpoint restored and exported with the steps of AutoML's ``inference.py``.

    TensorFlow also saves averages that were never assigned.
    """
    tf, v1 = tensorflow, tensorflow.compat.v1
    averages = dict(list(seeded(shallow()).items())[:20])
    raw = {name: value + 2 for name, value in averages.items()}
    twins = {name + EMA_SUFFIX: value for name, value in averages.items()}
    write_bundle(tmp_path / "trained" / "model", {**raw, **twins})
    with tf.Graph().as_default(), v1.Session() as session:
        placed = [v1.get_variable(name, value.shape) for name, value in averages.items()]
        ema = v1.train.ExponentialMovingAverage(decay=0.0)
        restored = ema.variables_to_restore(placed)
        ema.apply(placed)
        session.run(v1.global_variables_initializer())
        v1.train.Saver(restored).restore(session, str(tmp_path / "trained" / "model"))
        builder = v1.saved_model.Builder(str(tmp_path / "export"))
        builder.add_meta_graph_and_variables(session, ["serve"])
        builder.save()
    index = read_index(tmp_path / "export/variables/variables.index")
    assert index.entries.keys() == raw.keys() | twins.keys()
    with open_checkpoint(tmp_path / "export") as checkpoint:
        assert_same(dict(checkpoint), averages)
        assert f"left out {len(twins)} moving averages" in checkpoint.notes[0]


@pytest.mark.parametrize("keras", [False, True], ids=["attributes", "lists"])
def test_tensorflow_2_saved_model(tensorflow: Any, tmp_path: Path, keras: bool) -> None:
    """Objects with attributes like AutoML's.

    Keras objects also list their variables, and in a SavedModel the keys come from these lists
    (``model/variables/0``) and have no meaning.
    """
    tf, config = tensorflow, shallow()
    values, module = seeded(config), tf.Module()
    module.model, by_name = keras_model(tf, config, values)
    placed = list(by_name.values())
    if keras:
        module.model.variables = placed
    module.serve = tf.function(lambda: tf.add_n([tf.reduce_sum(v) for v in placed]), input_signature=[])
    tf.saved_model.save(module, str(tmp_path / "export"))
    keys = read_index(tmp_path / "export/variables/variables.index").entries
    assert any(key.startswith("model/variables/0/") for key in keys) == keras
    with open_checkpoint(tmp_path / "export") as checkpoint:
        assert_same(dict(checkpoint), values)
        assert checkpoint.format == "TensorFlow SavedModel"
        assert checkpoint.notes == ()
        assert infer_config(checkpoint.shapes).config.backbone == config.backbone


def test_a_saved_model_without_variables(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01")
    for path in (tmp_path, tmp_path / "saved_model.pb"):
        with pytest.raises(
            CheckpointError, match=r"is a SavedModel without variables: .*; fetch the whole folder"
        ):
            open_checkpoint(path)


def test_readers_need_neither_tensorflow_nor_h5py(tmp_path: Path) -> None:
    """Opening a SavedModel imports every reader, and nothing heavy."""
    written(tmp_path / "export")
    script = (
        "import sys; from porting.checkpoint import open_checkpoint; "
        f"assert open_checkpoint({str(tmp_path / 'export')!r}).step == 5; "
        "print(sorted({'tensorflow', 'h5py', 'keras'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
