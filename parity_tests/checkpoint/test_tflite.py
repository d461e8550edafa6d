"""TFLite files as AutoML checkpoints: the public Lite0, and small files of TensorFlow's converter."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from parity_tests.helpers.tflite_files import KINDS, TINY, golden, pictures, tflite_bytes, tiny_variables
from porting.checkpoint import open_checkpoint
from porting.checkpoint.tflite.checkpoint import TFLiteCheckpoint
from porting.checkpoint.tflite.weights import Layer
from porting.convert import apply_rules, convert
from porting.errors import CheckpointError, EfficientDetError
from porting.infer import infer_config
from porting.rules import rules
from pytorch_model.config import BN_EPSILON, EfficientDetConfig, model_config
from pytorch_model.detection.detector import Detector
from pytorch_model.efficientdet import EfficientDet
from tf_reference.variables import variable_shapes

Variables = Mapping[str, np.ndarray]


def head_outputs(
    variables: Variables, config: EfficientDetConfig, images: np.ndarray, dtype: str
) -> dict[str, np.ndarray]:
    """``class_outputs/3`` … → float64 [N, H, W, C], by our network."""
    model = EfficientDet(config).to(getattr(torch, dtype)).eval()
    model.load_state_dict(apply_rules(rules(config), variables, dtype))
    x = torch.from_numpy(images.astype(dtype)).permute(0, 3, 1, 2)
    with torch.no_grad():
        outputs = dict(zip(("class", "box"), model(x), strict=True))
    return {
        f"{kind}_outputs/{level}": maps[i].permute(0, 2, 3, 1).double().numpy()
        for kind, maps in outputs.items()
        for i, level in enumerate(config.levels)
    }


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    difference = ours.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64)))


def worst(ours: Variables, reference: Variables) -> tuple[float, str]:
    return max((relative(ours[name], reference[name]), name) for name in reference)


# --- the public EfficientDet-Lite0, int8 -----------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0(shared: Path) -> TFLiteCheckpoint:
    return TFLiteCheckpoint(shared / "lite0/efficientdet_lite0.tflite")


def test_public_lite0_format_and_notes(lite0: TFLiteCheckpoint) -> None:
    config = model_config("efficientdet-lite0")
    assert dict(lite0.shapes) == variable_shapes(config)
    inference = infer_config(lite0.shapes, lite0.source, settings=lite0.settings)
    assert inference.config == config
    assert inference.assumed == ()
    assert lite0.format == "TFLite, int8"
    assert len(lite0.notes) == 3
    assert "int8" in lite0.notes[0]
    assert "labelmap.txt" in lite0.notes[1]
    assert "batch norms" in lite0.notes[2]


@pytest.fixture(scope="module")
def recorded(shared: Path) -> dict[str, np.ndarray]:
    """Outputs of Google's code on two photographs, with a checkpoint made from this file in another way."""
    with np.load(shared / "lite0/activations_2images.npz") as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture(scope="module")
def original(shared: Path) -> Variables:
    """That checkpoint's averaged variables."""
    checkpoint = open_checkpoint(shared / "lite0/efficientdet-lite0")
    return convert(checkpoint, model_config("efficientdet-lite0")).variables


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_public_lite0_is_the_function_of_its_checkpoint(
    lite0: TFLiteCheckpoint, recorded: Variables, original: Variables, dtype: str
) -> None:
    """Each level has a differently rounded copy of each head's last bias.

    The checkpoint has the finest copy, we use the middle of the range that all allow. The difference is the
    3e-5 of the boxes.
    """
    config = model_config("efficientdet-lite0")
    ours = head_outputs(convert(lite0, config).variables, config, recorded["input"], dtype)
    theirs = head_outputs(original, config, recorded["input"], dtype)
    for name in theirs:
        print(f"{dtype} {name}: {relative(ours[name], theirs[name]):.1e}")
    assert worst(ours, theirs)[0] <= 1e-4
    google = {name: recorded[name] for name in ours if name in recorded}
    google["class_outputs/3"] = recorded["class_outputs/3@image0_full"]
    ours["class_outputs/3"] = ours["class_outputs/3"][:1]
    assert len(google) == 10
    assert worst(ours, google)[0] <= 1e-4


def test_public_lite0_without_the_shared_biases(
    lite0: TFLiteCheckpoint, recorded: Variables, original: Variables
) -> None:
    """With these two biases from the checkpoint, only float32 rounding remains."""
    config = model_config("efficientdet-lite0")
    biases = ("class_net/class-predict/bias", "box_net/box-predict/bias")
    ours = {**convert(lite0, config).variables, **{name: original[name] for name in biases}}
    images = recorded["input"]
    reference = head_outputs(original, config, images, "float32")
    figure, where = worst(head_outputs(ours, config, images, "float32"), reference)
    print(f"{figure:.1e} at {where}")
    assert figure <= 5e-6


def test_the_effect_of_quantised_activations(
    shared: Path, lite0: TFLiteCheckpoint, recorded: Variables, tensorflow: object
) -> None:
    """The file run by TensorFlow Lite, compared with its port.

    The only difference is the rounding of activations: a few steps of the outputs' scales (0.087 for the
    logits, 0.018 for the boxes).
    """
    from porting.parity.reference.tflite import tflite_tensors

    path, config = shared / "lite0/efficientdet_lite0.tflite", model_config("efficientdet-lite0")
    theirs = tflite_tensors(path, recorded["input"], TFLiteCheckpoint(path).outputs)
    ours = head_outputs(dict(lite0), config, recorded["input"], "float32")
    assert theirs.keys() == ours.keys()
    for name in ours:
        figure = relative(theirs[name], ours[name])
        print(f"{name}: {figure:.3f}")
        assert figure <= (0.03 if name.startswith("class") else 0.12)


# AP, AP50, AP75, by size; AR at 1, 10, 100, by size: Google's code with the checkpoint on these photographs.
# Ours may differ by the 3e-5 above; one detection more or less in 1424 changes a figure by about 1e-4.
GOOGLE_AP = (0.3159, 0.4984, 0.3464, 0.0896, 0.3295, 0.5486, 0.2755, 0.4049, 0.4163, 0.1218, 0.4516, 0.6758)
AP_TOLERANCE = 2e-4


@pytest.mark.slow
def test_public_lite0_average_precision(shared: Path, lite0: TFLiteCheckpoint) -> None:
    coco_module = pytest.importorskip("pycocotools.coco", reason="needs pycocotools")
    evaluation = pytest.importorskip("pycocotools.cocoeval", reason="needs pycocotools")
    pytest.importorskip("PIL.Image", reason="needs Pillow")
    pytest.importorskip("simplejpeg", reason="needs simplejpeg for the fast DCT")
    config = infer_config(lite0.shapes, lite0.source, settings=lite0.settings).config
    model = EfficientDet(config)
    model.load_state_dict(convert(lite0, config).state_dict)
    detector = Detector(model, decoder="fast-dct")
    files = sorted((shared / "coco/val2017").glob("*.jpg"))
    assert len(files) == 158
    results: list[dict[str, Any]] = []
    for start in range(0, len(files), 8):
        chunk = files[start : start + 8]
        for file, found in zip(chunk, detector(chunk), strict=True):
            x1, y1, x2, y2 = found["boxes"].T
            boxes_xywh = torch.stack([x1, y1, x2 - x1, y2 - y1], dim=1).tolist()
            for box_xywh, score, label in zip(boxes_xywh, found["scores"], found["labels"], strict=True):
                results.append(
                    {
                        "image_id": int(file.stem),
                        "category_id": int(label),
                        "bbox": box_xywh,
                        "score": float(score),
                    }
                )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO(str(shared / "coco/instances_val2017_158.json"))
        run = evaluation.COCOeval(coco, coco.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    print("AP", " ".join(f"{value:.4f}" for value in run.stats))
    np.testing.assert_allclose(run.stats, GOOGLE_AP, atol=AP_TOLERANCE, rtol=0)


# --- files of TensorFlow's converter ---------------------------------------------------------------------


def folded(layer: Layer, variables: Variables) -> tuple[np.ndarray, np.ndarray]:
    """A layer after folding: float64 kernel with output channels last, and bias [out]."""
    kernel = variables[layer.kernel].astype(np.float64)
    if layer.convolution.depthwise:
        kernel = kernel[..., 0]
    bias = np.float64(0) if layer.bias is None else variables[layer.bias].astype(np.float64)
    if layer.bn is None:
        return kernel, np.broadcast_to(bias, kernel.shape[-1:])
    gamma, beta, mean, variance = (
        variables[f"{layer.bn}/{leaf}"].astype(np.float64)
        for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    scale = gamma / np.sqrt(variance + BN_EPSILON)
    return kernel * scale, (bias - mean) * scale + beta


# Storing a weight rounds it by half a step of its channel: int8's is 1/127 of the largest weight, float16 has
# 11 bits; float32 has 24, and folding rounds a few times. Of a shared kernel each level sees another level's
# rounding in addition to its own: two half steps.
HALF_STEPS = {"int8": 1 / 254, "float16": 2.0**-11, "float32": 2.0**-22}


def check_folded(checkpoint: TFLiteCheckpoint, original: Variables, half_step: float) -> None:
    found = dict(checkpoint)
    for layer in checkpoint.layers:
        (kernel, bias), (expected, expected_bias) = folded(layer, found), folded(layer, original)
        largest = np.abs(expected).reshape(-1, expected.shape[-1]).max(axis=0)
        steps = np.abs(kernel - expected).reshape(-1, expected.shape[-1]).max(axis=0) / (largest * half_step)
        assert steps.max() <= 2.01, f"{layer.kernel} {layer.bn}: {steps.max():.2f} half steps"
        if "bn-" not in (layer.bn or ""):
            assert steps.max() <= 1.01, f"{layer.kernel}: {steps.max():.2f} half steps"
        assert np.abs(bias - expected_bias).max() <= half_step * max(
            np.abs(expected_bias).max(), largest.max()
        )


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_carried_files(kind: str) -> None:
    checkpoint = TFLiteCheckpoint(golden(kind))
    assert dict(checkpoint.shapes) == variable_shapes(TINY)
    assert checkpoint.format == f"TFLite, {kind}"
    config = infer_config(checkpoint.shapes, settings=checkpoint.settings).config
    assert config == TINY
    check_folded(checkpoint, tiny_variables(), HALF_STEPS[kind])


def test_settings_are_from_the_file() -> None:
    settings = dict(TFLiteCheckpoint(golden("int8")).settings)
    graph = ("image_size", "act_type", "survival_prob", "conv_after_downsample")
    names = (*graph, "mean_rgb", "stddev_rgb", "num_scales", "aspect_ratios", "anchor_scale")
    assert settings == {name: getattr(TINY, name) for name in names}
    floating = dict(TFLiteCheckpoint(golden("float32")).settings)
    assert floating == {name: value for name, value in settings.items() if not name.endswith("_rgb")}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_carried_float_file_keeps_the_function(dtype: str) -> None:
    """Up to float32 rounding: the original in float32 differs from its float64 by 3e-6 here."""
    checkpoint, images = TFLiteCheckpoint(golden("float32")), pictures(TINY, 2)
    reference = head_outputs(tiny_variables(), TINY, images, "float64")
    figure, where = worst(head_outputs(dict(checkpoint), TINY, images, dtype), reference)
    print(f"{dtype}: {figure:.1e} at {where}")
    assert figure <= 1e-5


def test_a_levels_batch_norm_is_its_scale_of_the_shared_kernel() -> None:
    """The recovered scales have the ratios of the original batch norms, at every level."""
    checkpoint, original = dict(TFLiteCheckpoint(golden("float32"))), tiny_variables()
    gammas = {}
    for name, source in (("found", checkpoint), ("original", original)):
        bns = [f"class_net/class-1-bn-{level}" for level in TINY.levels]
        gammas[name] = np.stack(
            [source[f"{bn}/gamma"] / np.sqrt(source[f"{bn}/moving_variance"] + BN_EPSILON) for bn in bns]
        )
    np.testing.assert_allclose(
        gammas["found"] / gammas["found"][0], gammas["original"] / gammas["original"][0], rtol=1e-6
    )
    assert np.ptp(gammas["original"] / gammas["original"][0]) > 0.1


def test_closed_checkpoint_raises() -> None:
    with open_checkpoint(golden("int8")) as checkpoint:
        assert isinstance(checkpoint, TFLiteCheckpoint)
        first = checkpoint["class_net/class-predict/bias"]
    assert first.flags.owndata
    assert first.dtype == np.float32
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint["class_net/class-predict/bias"]


def test_a_tflite_file_has_no_step() -> None:
    assert open_checkpoint(golden("int8")).step is None
    with pytest.raises(CheckpointError, match="no steps"):
        open_checkpoint(golden("int8"), step=3)


# --- with TensorFlow: convert again, and run the interpreter ---------------------------------------------


FRESH = [pytest.param(kind, marks=[] if kind in ("float32", "int8") else pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module", params=FRESH)
def converted(request: pytest.FixtureRequest, tensorflow: object, tmp_path_factory: Any) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("tflite") / "lite.tflite"
    # Half of the kinds end with the heads, half with the detection operator.
    path.write_bytes(tflite_bytes(TINY, tiny_variables(), request.param, "float" in request.param))
    return request.param, path


def test_every_kind_of_conversion(converted: tuple[str, Path]) -> None:
    kind, path = converted
    checkpoint = TFLiteCheckpoint(path)
    assert dict(checkpoint.shapes) == variable_shapes(TINY)
    assert checkpoint.format == f"TFLite, {kind.split()[0]}"
    check_folded(checkpoint, tiny_variables(), HALF_STEPS[kind.split()[0]])


def test_outputs_against_the_interpreter(converted: tuple[str, Path]) -> None:
    """The port of a file compared with the file itself, run by TensorFlow Lite."""
    from porting.parity.reference.tflite import tflite_tensors

    kind, path = converted
    images = pictures(TINY, 2)
    theirs = tflite_tensors(path, images, TFLiteCheckpoint(path).outputs)
    ours = head_outputs(dict(TFLiteCheckpoint(path)), TINY, images, "float64")
    figure, where = worst(theirs, ours)
    print(f"{kind}: {figure:.1e} at {where}")
    # float16: one level's kernel is used for all, although each was rounded separately. int8: activations are
    # rounded too, which matters in such a narrow network; below, its single layers must agree to half a step.
    assert figure <= {"float32": 1e-5, "float16": 2e-3, "int8": 0.4, "int8 weights": 0.15}[kind]


def run_layer(layer: Layer, variables: Variables, x: np.ndarray) -> np.ndarray:
    """One convolution with its batch norm and activation, computed from variables: [N, H, W, C], float64."""
    conv = layer.convolution
    kernel = torch.from_numpy(variables[layer.kernel]).double()
    kernel = kernel.permute(2, 3, 0, 1) if conv.depthwise else kernel.permute(3, 2, 0, 1)
    padding: list[int] = []
    for n in (x.shape[2], x.shape[1]):
        total = max((-(-n // conv.stride) - 1) * conv.stride + conv.size - n, 0)
        padding += [total // 2, total - total // 2]
    y = F.pad(torch.from_numpy(x).double().permute(0, 3, 1, 2), padding)
    y = F.conv2d(y, kernel, stride=conv.stride, groups=conv.in_filters if conv.depthwise else 1)
    output = y.permute(0, 2, 3, 1).numpy()
    if layer.bias is not None:
        output = output + variables[layer.bias]
    if layer.bn is not None:
        gamma, beta, mean, variance = (
            variables[f"{layer.bn}/{leaf}"].astype(np.float64)
            for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        output = (output - mean) * gamma / np.sqrt(variance + BN_EPSILON) + beta
    return output.clip(0, 6) if conv.step.activation else output


def steps_apart(layer: Layer, ours: np.ndarray, theirs: np.ndarray, tensors: Any) -> tuple[float, float]:
    """(largest difference in steps of the quantised output, how large rounding can make it).

    TFLite's kernels multiply the int32 sum by q · 2^-n with 0.5 <= q < 1 and may round twice: the product, to
    an integer, and that after a shift by n bits. Together that is up to 1/2 + 2^-(n+1) steps.
    """
    conv = layer.convolution
    x, y = tensors[conv.step.operator.inputs[0]], tensors[conv.output]
    lowest, highest = ((edge - int(y.zero_point[0])) * float(y.scale[0]) for edge in (-128, 127))
    apart = float(np.abs(ours.clip(lowest, highest) - theirs).max() / y.scale[0])
    _, exponent = np.frexp(x.scale.astype(np.float64) * conv.kernel.scale / y.scale)
    shift = max(0, -int(exponent.max()))
    return apart, 0.5 + (2.0 ** -(shift + 1) if shift else 0.0)


def check_every_layer(path: Path, images: np.ndarray) -> None:
    """Each convolution, given the interpreter's input, has the interpreter's output up to rounding."""
    from porting.checkpoint.tflite.graph import read_graph
    from porting.parity.reference.tflite import tflite_tensors

    checkpoint = TFLiteCheckpoint(path)
    variables, tensors = dict(checkpoint), read_graph(path.read_bytes()).tensors
    wanted = {}
    for i, layer in enumerate(checkpoint.layers):
        wanted[f"{i}/in"] = layer.convolution.step.operator.inputs[0]
        wanted[f"{i}/out"] = layer.convolution.output
    values = tflite_tensors(path, images, wanted)
    largest = (0.0, 0.0, "")
    for i, layer in enumerate(checkpoint.layers):
        ours = run_layer(layer, variables, values[f"{i}/in"])
        apart, allowed = steps_apart(layer, ours, values[f"{i}/out"], tensors)
        assert apart <= allowed + 0.04, (
            f"{layer.kernel} {layer.bn}: {apart:.3f} steps, {allowed:.3f} expected"
        )
        largest = max(largest, (apart, allowed, layer.kernel))
    print(f"{len(checkpoint.layers)} convolutions, at most {largest[0]:.3f} steps apart ({largest[2]})")


def test_every_layer_of_the_public_lite0_against_the_interpreter(
    shared: Path, recorded: Variables, tensorflow: object
) -> None:
    check_every_layer(shared / "lite0/efficientdet_lite0.tflite", recorded["input"][:1])


def test_every_layer_of_an_int8_file_against_the_interpreter(tensorflow: object) -> None:
    check_every_layer(golden("int8"), pictures(TINY, 2))


def test_interpreter_rejects_another_size(tensorflow: object) -> None:
    from porting.parity.reference.tflite import tflite_tensors

    with pytest.raises(EfficientDetError, match=r"takes images of \[96, 72, 3\], not \[96, 96, 3\]"):
        tflite_tensors(golden("int8"), np.zeros((1, 96, 96, 3), np.float32), {})
