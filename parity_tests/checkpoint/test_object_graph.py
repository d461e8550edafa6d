"""TensorFlow 2 object-based checkpoints: of Google's Keras model, written by TensorFlow, and damaged ones."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.helpers.configs import configs
from parity_tests.helpers.object_trees import (
    LISTED,
    VALUE,
    Memory,
    automl_graph,
    automl_paths,
    graph_of,
    keras_names,
)
from parity_tests.helpers.paths import GOLDENS
from parity_tests.helpers.recordings import shared_recording
from parity_tests.helpers.small_models import SHALLOW, seeded, tiny
from porting.checkpoint import Checkpoint, open_checkpoint
from porting.checkpoint.objects.automl_keras import KerasNames
from porting.checkpoint.objects.graph import GRAPH_KEY, Variable
from porting.checkpoint.objects.open import open_object_checkpoint
from porting.checkpoint.v2.bundle import TensorBundle
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import choose_variables, convert, variables_digest
from porting.errors import CheckpointError, ConversionError
from porting.infer import infer_config
from porting.scopes import EMA_SUFFIX
from pytorch_model.config import BackboneConfig, EfficientDetConfig, model_config
from tf_reference.variables import variable_shapes, variables

STATISTICS = ("/moving_mean", "/moving_variance")


def read(memory: Memory) -> Checkpoint:
    return open_object_checkpoint(cast(TensorBundle, memory))


def memory_of(config: EfficientDetConfig, values: dict[str, np.ndarray], **extra: np.ndarray) -> Memory:
    paths = automl_paths(config)
    arrays = {paths[name] + VALUE: value for name, value in values.items()}
    return Memory({**arrays, **extra}, automl_graph(config))


def test_qufpn_is_named() -> None:
    """Its cells have 21 nodes for 5 levels, not 8."""
    nodes = {f"fpn_cells/cells/0/fnodes/{node}/vars/0": Variable(VALUE, "", ()) for node in range(21)}
    heads = {f"box_net/bns/0/{level}/gamma": Variable(VALUE, "", ()) for level in range(5)}
    with pytest.raises(CheckpointError, match="run/ckpt-1 was trained with fpn_name=qufpn"):
        _ = KerasNames({**nodes, **heads}, None, "run/ckpt-1").num_levels


# --- files that Google wrote ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", [".", "ckpt-1", "ckpt-1.index"])
def test_google_keras_checkpoint_holds_the_ema_values(shared: Path, path: str) -> None:
    expected = shared_recording("efficientdet-lite0", 128).variables()
    with open_checkpoint(shared / "oracle/checkpoints/keras-lite0" / path) as checkpoint:
        assert checkpoint.format == "TensorFlow 2 object-based checkpoint"
        assert checkpoint.notes == ()
        assert checkpoint.step is None
        assert checkpoint.keys() == expected.keys()
        for name, array in checkpoint.read_many(checkpoint):
            assert array.dtype == np.float32
            assert array.shape == expected[name].shape == checkpoint.shapes[name], name
            assert array.tobytes() == expected[name].tobytes(), name
            assert array.flags.owndata, name


def test_google_keras_checkpoint_converts(shared: Path) -> None:
    folder = shared / "oracle/checkpoints/keras-lite0"
    with open_checkpoint(folder) as checkpoint:
        config = infer_config(checkpoint.shapes, checkpoint.source).config
        assert config == model_config("efficientdet-lite0")
        conversion = convert(checkpoint, config)
    assert conversion.digest == variables_digest(shared_recording("efficientdet-lite0", 128).variables())
    assert conversion.coverage.unused_count == 0


def test_golden_graph_of_googles_model() -> None:
    """Only the graph decides: the keys of the arrays have no meaning, as in a SavedModel."""
    config = model_config("efficientdet-lite0")
    graph = lzma.decompress((GOLDENS / "keras_graph.xz").read_bytes())
    listed = keras_names()["efficientdet-lite0/ckpt"]
    arrays = {key: np.zeros(shape, np.float32) for key, shape in listed.items() if key != GRAPH_KEY}
    checkpoint = read(Memory(arrays, graph))
    assert dict(checkpoint.shapes) == variable_shapes(config)
    assert checkpoint.notes == ()


@pytest.mark.parametrize("model", LISTED)
def test_listed_keys_are_the_whole_model(model: str) -> None:
    """Without the graph, keys and shapes are enough for AutoML's names, including the backbone's."""
    listed = keras_names()[f"{model}/ckpt"]
    arrays = {key: np.zeros(shape, np.float32) for key, shape in listed.items() if key != GRAPH_KEY}
    checkpoint = read(Memory(arrays))
    assert dict(checkpoint.shapes) == variable_shapes(model_config(model))
    assert checkpoint.notes == ("lowest pyramid level P3 (assumed; the file does not contain it)",)


@pytest.mark.parametrize("model", LISTED)
def test_the_trees_of_these_tests_are_real(model: str) -> None:
    """The tree that the tests below use is the one that Google's code wrote."""
    paths = automl_paths(model_config(model)).values()
    assert {path + VALUE for path in paths} | {GRAPH_KEY} == keras_names()[f"{model}/ckpt"].keys()


def test_listed_keys_of_training(tmp_path: Path) -> None:
    """D0 after training: tfa's MovingAverage around SGD with momentum."""
    config = model_config("efficientdet-d0")
    listed = keras_names()["efficientdet-d0/train_ckpt-1"]
    arrays = {
        key: np.zeros(shape, np.int64 if key.endswith("iter" + VALUE) else np.float32)
        for key, shape in listed.items()
        if key != GRAPH_KEY
    }
    write_bundle(tmp_path / "ckpt-1", arrays)
    with open_checkpoint(tmp_path) as checkpoint:
        shapes = dict(checkpoint.shapes)
        assert shapes.pop("global_step") == ()
        for variable in variables(config):
            assert shapes.pop(variable.name) == variable.shape
            assert shapes.pop(variable.name + EMA_SUFFIX) == variable.shape
            if variable.trainable:
                assert shapes.pop(variable.name + "/Momentum") == variable.shape
        assert shapes == {}
        assert checkpoint.step == 0
        assert "left out 2 variables of the training loop" in checkpoint.notes[-1]
        chosen, unused, weights = choose_variables(checkpoint, config, raw=False)
        assert weights == "EMA"
        assert len(chosen) == 709
        assert len(unused["optimizer slot"]) == 493  # all but the statistics of 108 batch norms


# --- structure ------------------------------------------------------------------------------------------


@given(configs())
@settings(max_examples=60, deadline=None)
def test_names_and_back_for_any_configuration(config: EfficientDetConfig) -> None:
    """With Keras's names of the variables: path → name is the inverse of name → path."""
    paths = automl_paths(config)
    shapes = variable_shapes(config)
    tree = {path: Variable(path, name, shapes[name]) for name, path in paths.items()}
    names = KerasNames(tree, len(config.extra_levels))
    assert {path: names.name(path) for path in tree} == {path: name for name, path in paths.items()}
    assert names.notes == []


@given(configs())
@settings(max_examples=60, deadline=None)
def test_names_only_by_structure(config: EfficientDetConfig) -> None:
    """The full names of the variables are not needed; in a process with two models they would differ."""
    config = config.replace(min_level=3, max_level=max(config.max_level, 4))
    paths, shapes = automl_paths(config), variable_shapes(config)
    tree = {path: Variable(path, "", shapes[name]) for name, path in paths.items()}
    names = KerasNames(tree, len(config.extra_levels) or None)
    scope = config.backbone.name
    for name, path in paths.items():
        assert names.name(path) == name.replace(scope, "efficientnet-custom")


@pytest.mark.parametrize(("min_level", "max_level"), [(3, 8), (2, 6), (4, 7)])
def test_pyramid_levels_from_the_number_of_resample_layers(min_level: int, max_level: int) -> None:
    config = tiny(min_level=min_level, max_level=max_level)
    paths, shapes = automl_paths(config), variable_shapes(config)
    graph = automl_graph(config, dict.fromkeys(paths.values(), ""))
    arrays = {path + VALUE: np.zeros(shapes[name], np.float32) for name, path in paths.items()}
    checkpoint = read(Memory(arrays, graph))
    assert dict(checkpoint.shapes) == shapes
    assert infer_config(checkpoint.shapes).config.levels == config.levels


def test_stem_numbered_by_a_second_model(tmp_path: Path) -> None:
    """If a process built a model before, the names of the stem's variables have numbers."""
    config = tiny()
    paths = automl_paths(config)
    counted = {
        path: name.replace("stem/conv2d", "stem_1/conv2d_1").replace("stem/tpu", "stem_1/tpu")
        for name, path in paths.items()
    }
    graph = automl_graph(config, counted)
    values = seeded(config)
    checkpoint = read(Memory({paths[name] + VALUE: value for name, value in values.items()}, graph))
    assert {name: array.tobytes() for name, array in checkpoint.items()} == {
        name: array.tobytes() for name, array in values.items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": BackboneConfig("efficientnet-b0", 8, SHALLOW)},
        {
            "backbone": BackboneConfig("efficientnet-lite0", 8, SHALLOW, se_ratio=0.0),
            "fpn_num_filters": 8,
            "fpn_weight_method": "channel_fastattn",
            "conv_bn_act_pattern": True,
            "min_level": 2,
            "max_level": 4,
        },
    ],
    ids=["P3-P7", "P2-P4"],
)
def test_what_tensorflow_writes(tensorflow: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Objects and an optimizer with averages and momentum, saved by TensorFlow itself."""
    config = tiny(**changes)
    values = seeded(config)
    trainable = {variable.name for variable in variables(config) if variable.trainable}
    checkpoint, expected = tensorflow_checkpoint(tensorflow, config, values, trainable)
    prefix = checkpoint.save(str(tmp_path / "ckpt"))
    with open_checkpoint(prefix) as opened:
        found = {name: array.tobytes() for name, array in opened.read_many(opened)}
        assert opened.step == 77
    assert found == {name: np.asarray(array).tobytes() for name, array in expected.items()}


def tensorflow_checkpoint(
    tf: Any, config: EfficientDetConfig, values: dict[str, np.ndarray], trainable: set[str]
) -> tuple[Any, dict[str, np.ndarray]]:
    """A ``tf.train.Checkpoint`` like the Keras trainer's, and the variables that should be read from it."""

    def optimizer(slot: str, slots: dict[str, Any]) -> Any:
        """The interface that TensorFlow needs for slot variables, which are not attributes of the object."""

        class Optimizer(tf.Module):  # type: ignore[misc]
            def get_slot_names(self) -> list[str]:
                return [slot]

            def get_slot(self, variable: Any, slot: str) -> Any:
                return slots.get(variable.name.removesuffix(":0"))

            def _create_or_restore_slot_variable(self, *_: Any, **__: Any) -> None: ...

        return Optimizer()

    model = tf.Module()
    expected = dict(values)
    averages, momenta = {}, {}
    paths = automl_paths(config)
    for name, value in values.items():
        *parents, leaf = paths[name].split("/")
        at = model
        for part in parents:
            if getattr(at, part, None) is None:
                setattr(at, part, tf.Module())
            at = getattr(at, part)
        setattr(at, leaf, tf.Variable(value, name=name))
        expected[name + EMA_SUFFIX] = value
        if name in trainable:
            expected[name + EMA_SUFFIX], expected[name + "/Momentum"] = value + 1, value - 1
            averages[name] = tf.Variable(value + 1, name=f"{name}/average")
            momenta[name] = tf.Variable(value - 1, name=f"{name}/momentum")
    for i in range(len(config.extra_levels)):
        if getattr(getattr(model, "resample_layers", None), str(i), None) is None:
            if getattr(model, "resample_layers", None) is None:
                model.resample_layers = tf.Module()
            setattr(model.resample_layers, str(i), tf.Module())
    averaging = optimizer("average", averages)
    averaging.awg_optimizer = optimizer("momentum", momenta)
    averaging.iter = tf.Variable(77, dtype=tf.int64, name="iter")
    expected["global_step"] = np.array(77, np.int64)
    return tf.train.Checkpoint(model=model, optimizer=averaging), expected


# --- training state -------------------------------------------------------------------------------------


def slot(path: str, name: str) -> str:
    return f"{path}/.OPTIMIZER_SLOT/optimizer/{name}{VALUE}"


def trained() -> tuple[EfficientDetConfig, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(configuration, values, averages by key) of a model that was trained with averages."""
    config = tiny()
    values, paths = seeded(config), automl_paths(config)
    averages = {
        slot(paths[name], "average"): values[name] + 1 for name in values if not name.endswith(STATISTICS)
    }
    return config, values, averages


def test_statistics_are_their_own_averages() -> None:
    config, values, averages = trained()
    checkpoint = read(memory_of(config, values, **averages))
    for name, value in values.items():
        expected = value if name.endswith(STATISTICS) else value + 1
        assert checkpoint[name + EMA_SUFFIX].tobytes() == expected.tobytes(), name
        assert checkpoint[name].tobytes() == value.tobytes()
    count = sum(name.endswith(STATISTICS) for name in values)
    assert checkpoint.notes == (
        f"the optimizer does not average {count} batch-norm statistics: "
        "their raw values are used as averages",
    )
    assert choose_variables(checkpoint, config, raw=False)[2] == "EMA"


def test_averages_of_statistics_are_stale() -> None:
    """Fine-tuning from a name-based checkpoint creates them, and nothing updates them afterwards."""
    config, values, averages = trained()
    mean = "resample_p6/bn/moving_mean"
    averages[slot(automl_paths(config)[mean], "average")] = values[mean] + 9
    checkpoint = read(memory_of(config, values, **averages))
    assert checkpoint[mean + EMA_SUFFIX].tobytes() == values[mean].tobytes()
    assert "1 averages of batch-norm statistics were left out" in checkpoint.notes[1]


def test_frozen_weights_are_their_own_averages() -> None:
    config, values, averages = trained()
    paths = automl_paths(config)
    frozen = [
        name for name in values if name.startswith("efficientnet-b0/") and not name.endswith(STATISTICS)
    ]
    for name in frozen:
        del averages[slot(paths[name], "average")]
    checkpoint = read(memory_of(config, values, **averages))
    assert f"{len(frozen)} weights that the optimizer never touched" in checkpoint.notes[0]
    assert checkpoint[frozen[0] + EMA_SUFFIX].tobytes() == values[frozen[0]].tobytes()


def test_a_missing_average_is_not_replaced() -> None:
    """A weight with momentum was trained, so it had an average."""
    config, values, averages = trained()
    name = "resample_p6/conv2d/kernel"
    path = automl_paths(config)[name]
    averages[slot(path, "momentum")] = averages.pop(slot(path, "average"))
    checkpoint = read(memory_of(config, values, **averages))
    assert name + EMA_SUFFIX not in checkpoint
    with pytest.raises(ConversionError, match=f"{name} in .* has no moving average while other variables do"):
        choose_variables(checkpoint, config, raw=False)


def test_emackpt_has_a_note() -> None:
    config = tiny()
    memory = memory_of(config, seeded(config))
    memory.source = "folder/emackpt-300"
    assert "emackpt: the trained weights are moving averages" in read(memory).notes[0]


@pytest.mark.parametrize(
    "key",
    [
        "optimizer/iter",
        "optimizer/_iterations",
        "optimizer/base_optimizer/iter",
        "model/optimizer/iter",
        "step",
    ],
)
def test_step(key: str) -> None:
    config = tiny()
    memory = memory_of(config, seeded(config), **{key + VALUE: np.array(300, np.int64)})
    assert read(memory).step == 300
    memory = memory_of(config, seeded(config), **{key + VALUE: np.array([300, 1], np.int64)})
    assert read(memory).step is None


def test_slots_of_adam_and_unknown_ones() -> None:
    config, values, _ = trained()
    path = automl_paths(config)["resample_p6/bn/beta"]
    extra = {slot(path, name): np.full(64, i, np.float32) for i, name in enumerate(("m", "v", "vhat"))}
    checkpoint = read(memory_of(config, values, **extra))
    assert checkpoint["resample_p6/bn/beta/Adam"][0] == 0
    assert checkpoint["resample_p6/bn/beta/Adam_1"][0] == 1
    assert checkpoint.notes == (
        f"left out 1 variable of the optimizer, of an unknown kind, ({path}/.OPTIMIZER_SLOT/optimizer/vhat)",
    )


def test_a_slot_of_a_different_shape_is_rejected() -> None:
    config, values, averages = trained()
    path = automl_paths(config)["resample_p6/bn/beta"]
    averages[slot(path, "average")] = np.zeros(3, np.float32)
    with pytest.raises(CheckpointError, match=rf"{path} of shape \[64\], but its average of shape \[3\]"):
        read(memory_of(config, values, **averages))


# --- trees that do not fit -------------------------------------------------------------------------------


def test_unknown_parts_of_the_model_keep_their_path_and_are_rejected() -> None:
    config = tiny()
    values, paths = seeded(config), automl_paths(config)
    extra = "mask_head/conv_ts/0/kernel"
    arrays = {paths[name] + VALUE: value for name, value in values.items()}
    arrays[extra + VALUE] = np.zeros(3, np.float32)
    checkpoint = read(Memory(arrays, automl_graph(config, {extra: "mask_head/kernel"})))
    assert checkpoint.shapes[extra] == (3,)
    with pytest.raises(ConversionError, match=f"{extra} is not a variable of"):
        choose_variables(checkpoint, config, raw=False)


def test_variables_outside_the_model_are_noted() -> None:
    config = tiny()
    values = seeded(config)
    arrays = {f"model/{path}{VALUE}": values[name] for name, path in automl_paths(config).items()}
    arrays |= {path + VALUE: np.zeros(2, np.float32) for path in ("save_counter", "teacher/w")}
    checkpoint = read(Memory(arrays, automl_graph(config, prefix="model/")))
    assert checkpoint.keys() == values.keys()
    assert checkpoint.notes == (
        "left out 1 variable of the training loop (save_counter)",
        "left out 1 variable outside the detector (teacher/w)",
    )


def test_a_different_model_is_rejected() -> None:
    memory = Memory({"layer/kernel" + VALUE: np.zeros(2, np.float32)}, graph_of({"layer/kernel": "kernel"}))
    with pytest.raises(CheckpointError, match=r"not of an EfficientDet: .* at its top are layer"):
        read(memory)


def test_two_models_are_rejected() -> None:
    config = tiny()
    paths = automl_paths(config)
    graph = graph_of({f"{model}/{path}": name for name, path in paths.items() for model in ("a", "b")})
    arrays = {f"{m}/{path}{VALUE}": np.zeros(1, np.float32) for path in paths.values() for m in ("a", "b")}
    with pytest.raises(CheckpointError, match="holds 2 models; save only one of them"):
        read(Memory(arrays, graph))


def test_swapped_variables_are_rejected() -> None:
    """If two variables of a tree like AutoML's have each other's names, it is a changed model."""
    config = tiny()
    values, paths = seeded(config), automl_paths(config)
    names = {path: name for name, path in paths.items()}
    a, b = paths["box_net/box-0-bn-3/beta"], paths["box_net/box-0-bn-4/beta"]
    names[a], names[b] = names[b], names[a]
    arrays = {paths[name] + VALUE: value for name, value in values.items()}
    with pytest.raises(CheckpointError, match="contradicts itself: box_net/bns/0/0/beta should be"):
        read(Memory(arrays, automl_graph(config, names)))


def test_contradicting_levels_are_rejected() -> None:
    config = tiny()
    paths = automl_paths(config)
    names = {path: name for name, path in paths.items()}
    arrays = {path + VALUE: np.zeros(1, np.float32) for path in names}
    graph = graph_of(names, empty=("resample_layers/1", "resample_layers/2", "resample_layers/3"))
    with pytest.raises(CheckpointError, match="5 pyramid levels, 4 of them above P5, do not begin at P3"):
        read(Memory(arrays, graph))
    del names[paths["box_net/box-0-bn-7/beta"]]
    for name in [n for n in paths if "-bn-7/" in n]:
        names.pop(paths[name], None)
    with pytest.raises(CheckpointError, match="a BiFPN cell of 8 nodes does not fit heads for 4 levels"):
        read(Memory(arrays, graph_of(names)))


def test_the_same_variable_twice_is_rejected() -> None:
    config = tiny()
    paths = automl_paths(config)
    again = "backbone/_blocks/00/_project_conv/kernel"
    arrays = {path + VALUE: np.zeros(1, np.float32) for path in (*paths.values(), again)}
    with pytest.raises(CheckpointError, match="holds efficientnet-b0/blocks_0/conv2d/kernel twice"):
        read(Memory(arrays, automl_graph(config, {again: ""})))


def test_graph_and_index_disagree() -> None:
    config = tiny()
    memory = memory_of(config, dict(list(seeded(config).items())[1:]))
    with pytest.raises(CheckpointError, match=r"lists backbone/_stem/_conv_stem/kernel as .* does not hold"):
        read(memory)


def test_hub_checkpoint() -> None:
    """A layout that is known only from AutoML's code (``load_from_hub_checkpoint``)."""
    config = tiny()
    values = seeded(config)
    keys, names = {}, {}
    for name in values:
        scope, _, leaf = name.rpartition("/")
        predict = {"class_net/class-predict": "classes", "box_net/box-predict": "boxes"}.get(scope)
        path = f"{predict}/{leaf}" if predict else "base_model/" + name.replace("/", ".S") + ":0"
        keys[name], names[path] = path, name
    arrays = {keys[name] + VALUE: value for name, value in values.items()}
    checkpoint = read(Memory(arrays))
    assert {name: array.tobytes() for name, array in checkpoint.items()} == {
        name: array.tobytes() for name, array in values.items()
    }
    assert "this layout was not checked with a real file" in checkpoint.notes[0]


def damaged_graphs() -> Iterator[tuple[str, bytes, str]]:
    yield "nothing", b"", "it holds no object"
    yield "cut", graph_of({"a/b": "b"})[:-3], "runs past the end"
    yield "dangling", b"\x0a\x07\x0a\x05\x08\x07\x12\x01a", "attribute 'a' is object 7 of 1"
    yield "negative", b"\x0a\x10\x0a\x0e\x08" + b"\xff" * 9 + b"\x01\x12\x01a", "is object -1 of 1"
    yield "not UTF-8", b"\x0a\x07\x0a\x05\x08\x00\x12\x01\xff", "not UTF-8"
    yield "a number for a name", b"\x0a\x06\x0a\x04\x08\x00\x10\x05", "field 2 holds a number"


@pytest.mark.parametrize(("graph", "reason"), [pytest.param(g, r, id=i) for i, g, r in damaged_graphs()])
def test_damaged_graph(graph: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"the object graph in folder/ckpt-1 is damaged: .*{reason}"):
        read(Memory({}, graph))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_reported_in_one_sentence(data: st.DataObject) -> None:
    """Flipped bytes give another tree or a CheckpointError; never a different exception, never a hang."""
    config = tiny()
    paths = automl_paths(config)
    graph = bytearray(automl_graph(config))
    for _ in range(data.draw(st.integers(1, 4))):
        graph[data.draw(st.integers(0, len(graph) - 1))] = data.draw(st.integers(0, 255))
    arrays = {path + VALUE: np.zeros(1, np.float32) for path in paths.values()}
    with suppress(CheckpointError):
        read(Memory(arrays, bytes(graph)))


def test_circles_of_attributes_end() -> None:
    """Keras models refer to themselves (``root``), and a forged graph can do so anywhere."""
    node = b"".join(b"\x0a\x05\x08\x00\x12\x01" + bytes([c]) for c in b"abcdefgh")
    with pytest.raises(CheckpointError, match="at its top are a, b, c"):
        read(Memory({}, b"\x0a" + bytes([len(node)]) + node))
