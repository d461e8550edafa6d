"""The reverse port: TF → PyTorch → TF gives the same function, in files that Google's code reads."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from parity_tests.helpers.configs import configs
from parity_tests.helpers.paths import GOLDENS
from parity_tests.helpers.recordings import golden_recording, normalise
from porting.checkpoint import open_checkpoint
from porting.convert import apply_rules, convert
from porting.errors import ConversionError, EfficientDetError, OutputError, WeightsError
from porting.export import TARGETS, Weights
from porting.export.h5 import keras_layers
from porting.parity.measure import difference
from porting.reverse import reverse, undo_rules, with_averages
from porting.rules import Rule, rules
from porting.scopes import EMA_SUFFIX
from porting.synthetic import synthetic_image, synthetic_variables
from porting.transforms import FOLD_BIAS_INTO_MEAN, IDENTITY, Transform
from pytorch_model.config import MODELS, EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet
from tf_reference.variables import variable_shapes, variables

#: A bias moves from one float64 addition to another, which changes the rounding: about 1e-16 per layer.
SAME_FUNCTION = 1e-12

#: The export targets in TensorFlow's formats.
BACK = ("tf-checkpoint", "h5")

Variables = dict[str, np.ndarray]


def redundant_biases(config: EfficientDetConfig) -> set[str]:
    return {rule.sources[1] for rule in rules(config) if rule.transform is FOLD_BIAS_INTO_MEAN}


def there_and_back(values: Mapping[str, np.ndarray], config: EfficientDetConfig) -> Variables:
    return reverse(apply_rules(rules(config), values, "float64"), config, "float64")


def check_values(values: Mapping[str, np.ndarray], back: Mapping[str, np.ndarray], biases: set[str]) -> None:
    """The expected variables: folded biases are zero and their means are shifted; all others are equal."""
    assert back.keys() == values.keys()
    for name, value in values.items():
        if name in biases:
            assert not back[name].any(), name
        elif not name.endswith("/moving_mean"):
            np.testing.assert_array_equal(back[name], value, err_msg=name)


def largest_difference(
    config: EfficientDetConfig, a: Variables, b: Variables, size: tuple[int, int]
) -> float:
    """The largest relative L2 between the reference's float64 outputs with two sets of variables."""
    from tf_reference.efficientdet import as_tensors, efficientdet

    images = normalise(synthetic_image(*size)[None], config).astype(np.float64)
    outputs = []
    for values in (a, b):
        classes, boxes = efficientdet(as_tensors(values, "float64"), config, images)
        outputs.append([x.numpy() for x in (*classes, *boxes)])
    return max(difference(x, y).relative for x, y in zip(*outputs, strict=True))


FAST = {"efficientdet-d0", "efficientdet-lite0"}
MARKED = [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in MODELS]


@pytest.mark.usefixtures("tensorflow")
@pytest.mark.parametrize("model", MARKED)
def test_every_variant_comes_back_as_the_same_function(model: str) -> None:
    config = model_config(model)
    values = synthetic_variables(config)
    back = there_and_back(values, config)
    biases = redundant_biases(config)
    assert sum(values[name].size for name in biases) > 2000
    assert all(values[name].any() for name in biases)
    check_values(values, back, biases)
    figure = largest_difference(config, values, back, (128, 128))
    dropped = {**back, "resample_p6/bn/moving_mean": values["resample_p6/bn/moving_mean"]}
    fault = largest_difference(config, values, dropped, (128, 128))
    print(f"{model}: {figure:.1e}, with the first bias dropped instead of folded {fault:.1e}")
    assert figure <= SAME_FUNCTION
    assert fault > 1e6 * SAME_FUNCTION


@pytest.mark.usefixtures("tensorflow")
@settings(deadline=None, max_examples=10)
@given(configs())
def test_any_configuration_comes_back_as_the_same_function(config: EfficientDetConfig) -> None:
    values = synthetic_variables(config)
    back = there_and_back(values, config)
    check_values(values, back, redundant_biases(config))
    assert largest_difference(config, values, back, config.image_size) <= SAME_FUNCTION


def trained(config: EfficientDetConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """As after training: every tensor is random, and a head's means differ between its levels."""
    generator = torch.Generator().manual_seed(1)
    state_dict = EfficientDet(config).state_dict()
    for key, tensor in state_dict.items():
        if tensor.is_floating_point():
            value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            state_dict[key] = (value.abs() if key.endswith("running_var") else value).to(dtype)
        else:
            state_dict[key] = torch.tensor(12345)  # batches seen in fine-tuning
    return state_dict


@settings(deadline=None, max_examples=10)
@given(config=configs())
@pytest.mark.parametrize("target", BACK)
def test_any_fine_tuned_weights_survive_the_file(
    target: str, tmp_path_factory: pytest.TempPathFactory, config: EfficientDetConfig
) -> None:
    folder = tmp_path_factory.mktemp("any")
    weights = Weights(trained(config), config)
    written = TARGETS[target].write(weights, folder / "out.h5")
    assert all(path.is_file() for path in written.files)
    with open_checkpoint(folder / "out.h5") as checkpoint:
        again = convert(checkpoint, config).state_dict
    given = weights.tensors
    for key, tensor in again.items():
        expected = given[key] if tensor.is_floating_point() else torch.tensor(0)
        assert torch.equal(tensor, expected), key


SHORT = model_config("efficientdet-lite0", num_classes=2, fpn_cell_repeats=1, box_class_repeats=1)


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Variables]:
    """A written checkpoint of a short Lite0, and its expected content."""
    config = SHORT
    state_dict = trained(config)
    folder = tmp_path_factory.mktemp("lite0") / "checkpoint"
    TARGETS["tf-checkpoint"].write(Weights(state_dict, config, {"step": "300000"}), folder)
    return folder, with_averages(reverse(state_dict, config), 300_000)


def test_tensorflow_reads_the_same_values(lite0: tuple[Path, Variables], tensorflow: Any) -> None:
    folder, expected = lite0
    reader = tensorflow.train.load_checkpoint(str(folder))
    assert reader.get_variable_to_shape_map().keys() == expected.keys()
    for name, value in expected.items():
        found = reader.get_tensor(name)
        assert np.asarray(found).dtype == value.dtype, name
        np.testing.assert_array_equal(found, value, err_msg=name)


@pytest.mark.slow
def test_a_graph_restores_its_moving_averages_as_automl_does(
    lite0: tuple[Path, Variables], tensorflow: Any
) -> None:
    """``ExponentialMovingAverage.variables_to_restore`` and a ``Saver`` of all variables, in a TF1 graph."""
    v1 = tensorflow.compat.v1
    folder, expected = lite0
    with tensorflow.Graph().as_default(), v1.Session() as session:
        model = [
            v1.get_variable(v.name, v.shape, trainable=v.trainable, use_resource=True)
            for v in variables(SHORT)
        ]
        step = v1.train.get_or_create_global_step()
        average = tensorflow.train.ExponentialMovingAverage(0.9998, step)
        average.apply(model)
        v1.train.Saver().restore(session, str(folder / "model"))  # training goes on: everything is there
        assert session.run(step) == 300_000
        evaluation = average.variables_to_restore(model)
        assert {name for name in evaluation if name != "global_step"} == {
            name for name in expected if name.endswith(EMA_SUFFIX)
        }
        v1.train.Saver(evaluation).restore(session, v1.train.latest_checkpoint(str(folder)))
        for variable, value in zip(model, session.run(model), strict=True):
            np.testing.assert_array_equal(value, expected[variable.op.name])


def test_the_entries_are_those_of_googles_own_checkpoint(shared: Path, tmp_path: Path) -> None:
    config = model_config("efficientdet-d0")
    TARGETS["tf-checkpoint"].write(Weights(trained(config), config), tmp_path / "d0")
    with (
        open_checkpoint(shared / "oracle" / "checkpoints" / "efficientdet-d0") as google,
        open_checkpoint(tmp_path / "d0") as ours,
    ):
        assert dict(ours.shapes) == dict(google.shapes)
        assert dict(ours.dtypes) == dict(google.dtypes)
        assert list(ours) == list(google)


@pytest.mark.usefixtures("tensorflow")
def test_googles_weights_come_back_as_googles_function(tmp_path: Path) -> None:
    """Both files are float32, so each folded mean is rounded: a relative change of 6e-8."""
    recording = golden_recording("efficientdet-d0")
    config, values = recording.config, recording.variables()
    ported = apply_rules(rules(config), values)
    TARGETS["tf-checkpoint"].write(Weights(ported, config), tmp_path / "d0")
    with open_checkpoint(tmp_path / "d0") as checkpoint:
        back = dict(checkpoint.read_many(values))
    check_values(values, back, redundant_biases(config))
    exact = there_and_back(values, config)
    for name, value in exact.items():
        np.testing.assert_array_equal(back[name], value.astype(np.float32), err_msg=name)


# --- the layout of h5 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["efficientdet-d0", "efficientdet-d4", "efficientdet-lite0"])
def test_h5_lists_are_in_the_order_of_googles_file(model: str) -> None:
    golden = json.loads((GOLDENS / "h5_order.json").read_text())[model]
    ours = [
        (layer, hashlib.sha256("\n".join(f"{name}:0" for name in names).encode()).hexdigest())
        for layer, names in keras_layers(model_config(model))
    ]
    assert ours == list(golden.items())


def h5_contents(path: Path) -> dict[str, Any]:
    """Everything that a reader of the file sees: groups, shapes, types, attributes and their storage."""
    h5py = importlib.import_module("h5py")
    found: dict[str, Any] = {}

    def look(name: str, item: Any) -> None:
        found[name] = (getattr(item, "shape", None), str(getattr(item, "dtype", None)))
        for key, value in item.attrs.items():
            dtype = item.attrs.get_id(key).dtype
            found[f"{name}@{key}"] = (str(dtype), h5py.check_string_dtype(dtype), np.array(value).tolist())

    with h5py.File(path) as file:
        look("", file)
        file.visititems(look)
    found.pop("@keras_version", None)
    return found


def test_h5_is_laid_out_as_googles_file(shared: Path, tmp_path: Path) -> None:
    config = model_config("efficientdet-lite0")
    TARGETS["h5"].write(Weights(trained(config), config), tmp_path / "ours.h5")
    google = h5_contents(shared / "oracle" / "checkpoints" / "keras-lite0" / "efficientdet-lite0.h5")
    assert h5_contents(tmp_path / "ours.h5") == google


@pytest.mark.parametrize(
    "model", ["efficientdet-d0", pytest.param("efficientdet-d7x", marks=pytest.mark.slow)]
)
def test_keras_loads_h5_and_would_write_the_same(model: str, tmp_path: Path, tensorflow: Any) -> None:
    """A Keras 2 model with the same layers and variables. D7x has lists that are split into pieces."""
    keras = pytest.importorskip("tf_keras", reason="needs Keras 2: pip install tf-keras")
    config = model_config(model)
    trainable = {v.name: v.trainable for v in variables(config)}
    shapes = variable_shapes(config)
    state_dict = trained(config)
    expected = reverse(state_dict, config)

    class Layer(keras.layers.Layer):  # type: ignore[misc, name-defined]
        def __init__(self, name: str, names: list[str]) -> None:
            super().__init__(name=name)
            for variable in names:
                self.add_weight(variable, shapes[variable], trainable=trainable[variable])

    class Model(keras.Model):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.parts = [Layer(*layer) for layer in keras_layers(config)]
            self.built = True

    TARGETS["h5"].write(Weights(state_dict, config), tmp_path / "ours.h5")
    network = Model()
    network.load_weights(str(tmp_path / "ours.h5"))
    for variable in network.weights:
        np.testing.assert_array_equal(variable.numpy(), expected[variable.name.removesuffix(":0")])
    network.save_weights(str(tmp_path / "keras.h5"))
    assert h5_contents(tmp_path / "ours.h5") == h5_contents(tmp_path / "keras.h5")
    if model == "efficientdet-d7x":
        assert "efficientnet-b7@weight_names1" in h5_contents(tmp_path / "ours.h5")


# --- errors ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> EfficientDetConfig:
    return SHORT


def change(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(state_dict: dict[str, torch.Tensor]) -> None:
        state_dict[key] = torch.full_like(state_dict[key], value)

    return apply


REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], type[EfficientDetError], str]] = {
    "missing": (lambda s: s.pop("backbone.stem.bn.weight"), WeightsError, "lacks tensor backbone.stem.bn.w"),
    "unknown": (lambda s: s.update(extra=torch.zeros(1)), WeightsError, "unknown tensor extra"),
    "misshapen": (
        lambda s: s.update({"backbone.stem.bn.weight": torch.zeros(3, dtype=torch.float64)}),
        WeightsError,
        r"is \[3\]",
    ),
    "NaN": (change("backbone.stem.bn.weight", np.nan), WeightsError, "NaN or infinite"),
    "negative variance": (
        change("backbone.stem.bn.running_var", -1.0),
        ConversionError,
        "stem/tpu_batch_normalization/moving_variance would hold a negative variance",
    ),
    "overflow": (change("backbone.stem.bn.weight", 1e300), ConversionError, "gamma overflows float32"),
}


@pytest.mark.parametrize("target", BACK)
@pytest.mark.parametrize("fault", REFUSED)
def test_weights_that_cannot_be_ported_back_are_rejected(
    fault: str, target: str, small: EfficientDetConfig, tmp_path: Path
) -> None:
    spoil, error, message = REFUSED[fault]
    state_dict = trained(small, torch.float64)
    spoil(state_dict)
    with pytest.raises(error, match=message):
        TARGETS[target].write(Weights(state_dict, small), tmp_path / "out.h5")
    assert list(tmp_path.iterdir()) == []


def test_head_biases_that_differ_between_levels_are_rejected(small: EfficientDetConfig) -> None:
    """They would differ if an inverse tried to guess a bias from each level's mean."""
    guess = Transform("guess", FOLD_BIAS_INTO_MEAN.forward, lambda mean, count: (np.zeros_like(mean), -mean))
    table = [r._replace(transform=guess) if r.transform is FOLD_BIAS_INTO_MEAN else r for r in rules(small)]
    with pytest.raises(ConversionError, match=r"class_net.bns.0.1.running_mean makes another class_net"):
        undo_rules(table, trained(small))


def test_rules_that_lack_a_variable_are_rejected(
    small: EfficientDetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = [rule for rule in rules(small) if rule.target != "resample.p6.bn.weight"]
    monkeypatch.setattr("porting.reverse.rules", lambda config: iter(table))
    with pytest.raises(ConversionError, match="disagree about resample_p6/bn/gamma"):
        reverse(trained(small), small)


@pytest.mark.parametrize("target", BACK)
def test_a_fault_in_the_reverse_port_leaves_no_file(
    target: str, small: EfficientDetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transform with a wrong inverse: reading the file back finds it before the target is replaced."""

    def broken(config: EfficientDetConfig) -> list[Rule]:
        wrong = Transform("wrong", IDENTITY.forward, lambda a, n: (a * 2,))
        name = "resample.p6.bn.bias"
        return [r._replace(transform=wrong) if r.target == name else r for r in rules(config)]

    monkeypatch.setattr("porting.reverse.rules", broken)
    with pytest.raises(ConversionError, match=r"resample\.p6\.bn\.bias differs after writing"):
        TARGETS[target].write(Weights(trained(small), small), tmp_path / "out.h5")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_replaced(small: EfficientDetConfig, tmp_path: Path) -> None:
    (tmp_path / "model.index").write_text("a training run")
    with pytest.raises(OutputError, match="it is not empty; choose another folder"):
        TARGETS["tf-checkpoint"].write(Weights(trained(small), small), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.index"]
    with pytest.raises(OutputError, match=r"ends in \.h5"):
        TARGETS["h5"].write(Weights(trained(small), small), tmp_path / "x.keras")


def test_the_rounding_of_float64_weights_is_reported(small: EfficientDetConfig, tmp_path: Path) -> None:
    written = TARGETS["h5"].write(Weights(trained(small, torch.float64), small), tmp_path / "x.h5")
    assert any("float64 tensors were rounded" in fact for fact in written.facts)
    state_dict = trained(small, torch.bfloat16)
    written = TARGETS["h5"].write(Weights(state_dict, small), tmp_path / "y.h5")
    assert not any("rounded" in fact for fact in written.facts)
