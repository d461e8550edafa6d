"""The Object Detection API's input, anchors and detections: its own recordings, and its formulas in NumPy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parity_tests.helpers.object_trees import pipeline_text
from parity_tests.helpers.paths import GOLDENS
from parity_tests.helpers.small_models import small
from porting.checkpoint.objects.detection_api import (
    anchor_order,
    class_channels,
    notes_about_input,
    settings_of,
)
from porting.checkpoint.objects.pipeline_config import Pipeline, read_pipeline
from porting.hparams import read_hparams
from pytorch_model import load_model
from pytorch_model.anchors import generate_anchors
from pytorch_model.config import EfficientDetConfig, Resizer, model_config
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.postprocess import postprocess_per_class
from pytorch_model.detection.preprocess import ImageError, preprocess, preprocess_batches, scaled
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.errors import ConfigError
from pytorch_model.weights.files import write_weights

TOLERANCE = 1e-5  # of normalised pixels and of normalised coordinates; measured 7e-7 and 2e-7
RESIZERS = {
    "fixed_160x320": "fixed_shape_resizer { height: 256 width: 256 }",
    "keep_aspect_201x333": (
        "keep_aspect_ratio_resizer { min_dimension: 256 max_dimension: 256 pad_to_max_dimension: true }"
    ),
}
SUPPRESSION = """SIGMOID batch_non_max_suppression { score_threshold: 1e-8 iou_threshold: 0.5
    max_detections_per_class: 100 max_total_detections: 100 }"""


def pipeline_of(folder: Path, resizer: str, **changes: Any) -> Pipeline:
    path = folder / "pipeline.config"
    path.write_text(pipeline_text(resizer=resizer, num_classes=3, converter=SUPPRESSION, **changes))
    return read_pipeline(path)


def config_of(pipeline: Pipeline) -> EfficientDetConfig:
    """What a conversion makes of D0 with this pipeline."""
    settings = settings_of(pipeline, (0, 0, 0))
    del settings["endpoints"]
    return model_config("efficientdet-d0", num_classes=pipeline.num_classes, **settings)


def notes_of(pipeline: Pipeline) -> list[str]:
    return list(notes_about_input(pipeline, max_level=7))


# --- recordings of the API ----------------------------------------------------------------------------


@dataclass
class Recording:
    """``pre``: the network's input at ``rows`` and every ``columns``-th column; ``anchors``: every
    ``stride``-th number, in the API's order. ``box``, ``cls``: raw outputs of all anchors, in the API's
    order. ``boxes``: normalised to the image and clipped to it."""

    image: np.ndarray
    pre: np.ndarray
    rows: Any
    columns: int
    anchors: np.ndarray
    stride: int
    box: np.ndarray
    cls: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


def whole(folder: Path, case: str) -> Recording:
    with np.load(folder / "odapi_truth" / f"{case}.npz") as stored:
        boxes, scores, classes = (stored[f"det_detection_{key}"][0] for key in ("boxes", "scores", "classes"))
        image = stored["image"][0].astype(np.uint8)
        assert (image == stored["image"][0]).all()
        parts = (stored["pre"][0], slice(None), 1, stored["anchors"].reshape(-1), 1)
        return Recording(image, *parts, stored["box"][0], stored["cls"][0], boxes, scores, classes)


def golden(case: str) -> Recording:
    with np.load(GOLDENS / "detection_api.npz") as file:
        stored = {key.removeprefix(f"{case}/"): file[key] for key in file.files if key.startswith(case)}
    box, cls = np.zeros((12276, 4), np.float32), np.full((12276, 3), -30, np.float32)
    box[stored["alive"]], cls[stored["alive"]] = stored["box"], stored["cls"]
    boxes, scores, classes = (stored[key] for key in ("boxes", "scores", "classes"))
    parts = (stored["pre"], stored["rows"], 3, stored["anchors"], 97)
    return Recording(stored["image"], *parts, box, cls, boxes, scores, classes)


@pytest.fixture(params=["golden", "whole"])
def recorded(request: pytest.FixtureRequest, case: str) -> Recording:
    return golden(case) if request.param == "golden" else whole(request.getfixturevalue("shared"), case)


@pytest.mark.parametrize("case", RESIZERS)
def test_recorded_input(tmp_path: Path, case: str, recorded: Recording) -> None:
    config = config_of(pipeline_of(tmp_path, RESIZERS[case]))
    found = preprocess([recorded.image], config)
    ours = found.images[0].permute(1, 2, 0).numpy()[recorded.rows, :: recorded.columns]
    assert np.abs(ours - recorded.pre).max() < TOLERANCE
    true_size = (256, 256) if case.startswith("fixed") else (155, 256)
    expected = np.array(recorded.image.shape[:2], np.float32) / true_size
    np.testing.assert_allclose(found.image_scales[0], expected, rtol=1e-7)
    letterboxed = preprocess([recorded.image], config.replace(resizer=Resizer())).images[0].permute(1, 2, 0)
    assert np.abs(letterboxed.numpy()[recorded.rows, :: recorded.columns] - recorded.pre).max() > 1


@pytest.mark.parametrize("case", RESIZERS)
def test_recorded_anchors(tmp_path: Path, case: str, recorded: Recording) -> None:
    """Normalised to the network's input, and at each location in the API's order."""
    pipeline = pipeline_of(tmp_path, RESIZERS[case])
    config = config_of(pipeline)
    back = np.argsort(anchor_order(pipeline))
    ours = generate_anchors(config).numpy().reshape(-1, config.num_anchors, 4)[:, back] / 256
    assert np.abs(ours.reshape(-1)[:: recorded.stride] - recorded.anchors).max() < TOLERANCE


def head_outputs(recorded: Recording, pipeline: Pipeline) -> tuple[list[Tensor], list[Tensor]]:
    """The recorded raw outputs as ours: per level [1, channels, H, W], channels in AutoML's order."""
    config = config_of(pipeline)
    boxes = (anchor_order(pipeline)[:, None] * 4 + np.arange(4)).reshape(-1)
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    start = 0
    for rows, columns in config.feature_sizes().values():
        count = rows * columns * config.num_anchors
        for found, raw, channels in zip(
            outputs, (recorded.cls, recorded.box), (class_channels(pipeline), boxes), strict=True
        ):
            level = raw[start : start + count].reshape(rows, columns, -1)[..., channels]
            found.append(torch.from_numpy(np.ascontiguousarray(level.transpose(2, 0, 1)))[None])
        start += count
    assert start == len(recorded.box)
    return outputs


@pytest.mark.parametrize("case", RESIZERS)
def test_recorded_detections(tmp_path: Path, case: str, recorded: Recording) -> None:
    """The same first detections of the same raw outputs, in the same order.

    Compared are scores, class ids and boxes. The API's boxes are fractions of the image and are clipped to
    it, and boxes outside it are dropped; the same is done to ours, after our suppression with the settings of
    the conversion's note.
    """
    pipeline = pipeline_of(tmp_path, RESIZERS[case])
    config = config_of(pipeline)
    class_outputs, box_outputs = head_outputs(recorded, pipeline)
    nms = NMSConfig("hard", iou_thresh=0.5, score_thresh=1e-8, max_output_size=160)
    scales = preprocess([recorded.image], config).image_scales
    found = postprocess_per_class(class_outputs, box_outputs, generate_anchors(config), nms, scales)
    sides = np.array(recorded.image.shape[:2] * 2, np.float32)
    boxes = (found.boxes_yxyx[0].numpy() / sides).clip(0, 1)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    chosen = np.flatnonzero(inside)[: len(recorded.scores)]
    assert len(chosen) == len(recorded.scores) >= 12
    np.testing.assert_array_equal(found.classes[0].numpy()[chosen], recorded.classes + 1)
    np.testing.assert_allclose(found.scores[0].numpy()[chosen], recorded.scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose(boxes[chosen], recorded.boxes, rtol=0, atol=TOLERANCE)


def test_the_note_about_suppression_can_be_typed(tmp_path: Path) -> None:
    [note] = [each for each in notes_of(pipeline_of(tmp_path, RESIZERS["fixed_160x320"])) if "hard" in each]
    text = note.partition("--hparams ")[2]
    expected = {"method": "hard", "iou_thresh": 0.5, "score_thresh": 1e-8, "max_output_size": 100}
    assert read_hparams(text).nms == expected


@pytest.mark.parametrize(
    ("field", "what"),
    [
        ("soft_nms_sigma: 0.5", "soft_nms_sigma"),
        ("use_class_agnostic_nms: true", "use_class_agnostic_nms"),
        ("max_detections_per_class: 20", "max_detections_per_class: 20"),
    ],
)
def test_another_suppression_is_named(tmp_path: Path, field: str, what: str) -> None:
    path = tmp_path / "pipeline.config"
    path.write_text(pipeline_text(converter=f"SIGMOID batch_non_max_suppression {{ {field} }}"))
    assert any(f"its suppression ({what}) is not available" in note for note in notes_of(read_pipeline(path)))


@pytest.mark.parametrize(
    ("resizer", "words"),
    [
        ("", "has no image_resizer: AutoML's way of resizing is assumed"),
        ("fixed_shape_resizer {}", "only on inputs whose sides are multiples of 128 pixels"),
        ("keep_aspect_ratio_resizer { min_dimension: 512 max_dimension: 1024 }", "multiples of 128 pixels"),
        (RESIZERS["fixed_160x320"], ""),
    ],
)
def test_notes_about_the_input(tmp_path: Path, resizer: str, words: str) -> None:
    notes = notes_of(pipeline_of(tmp_path, resizer))
    assert len(notes) == (2 if words else 1)
    assert words in notes[0]


def test_recorded_photograph(shared: Path) -> None:
    """Image 139, 640 x 426, in 512 x 512: 341 rows, where AutoML has 340."""
    pytest.importorskip("PIL.Image", reason="needs Pillow")
    config = model_config("efficientdet-d0", resizer=Resizer("keep_aspect_ratio"))
    found = preprocess([shared / "coco/val2017/000000000139.jpg"], config).images[0].permute(1, 2, 0).numpy()
    with np.load(shared / "odapi_truth/resize_139.npz") as stored:
        assert np.abs(found.reshape(-1)[::7] - stored["strided"]).max() < TOLERANCE
    assert scaled((426, 640), (512, 512), Resizer("keep_aspect_ratio"))[0] == (341, 512)
    assert scaled((426, 640), (512, 512), Resizer())[0] == (340, 512)


# --- the API's formulas, said again in NumPy ------------------------------------------------------------

MEAN, STDDEV = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def api_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """TensorFlow 1's bilinear resizing: four neighbours with weights; pixel i lies at i * old / new."""
    places = [
        np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
        for old, new in ((image.shape[0], height), (image.shape[1], width))
    ]
    result = np.zeros((height, width, 3))
    for down in (0, 1):
        for across in (0, 1):
            rows, columns = (
                place.astype(int) + more for place, more in zip(places, (down, across), strict=True)
            )
            dy, dx = (
                np.abs(1 - more - place % 1) for place, more in zip(places, (down, across), strict=True)
            )
            rows, columns = rows.clip(max=image.shape[0] - 1), columns.clip(max=image.shape[1] - 1)
            result += image[np.ix_(rows, columns)] * dy[:, None, None] * dx[None, :, None]
    return result


def api_input(image: np.ndarray, resizer: Resizer, size: tuple[int, int]) -> np.ndarray:
    """Normalise, resize, pad with the value, pad to the multiple with 0."""
    normalised = (image / 255 - MEAN) / STDDEV
    height, width = image.shape[:2]
    if resizer.rule == "fixed_shape":
        resized = api_resize(normalised, *size)
    else:
        longest = size[0]
        shortest = resizer.min_dimension or longest
        box = (shortest, longest) if height < width else (longest, shortest)
        scale = min(np.float32(box[0]) / np.float32(height), np.float32(box[1]) / np.float32(width))
        sides = [round(float(np.float32(side) * scale)) for side in (height, width)]  # halves to even
        resized = api_resize(normalised, *sides)
    if resizer.pad:
        padded = np.zeros((*size, 3)) + resizer.pad_value
        padded[: resized.shape[0], : resized.shape[1]] = resized
        resized = padded
    more = [-side % resizer.pad_to_multiple for side in resized.shape[:2]]
    return np.pad(resized, ((0, more[0]), (0, more[1]), (0, 0)))


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


WAYS = [
    ("fixed_shape_resizer { height: 96 width: 160 }", {}),
    ("fixed_shape_resizer { height: 160 width: 96 }", {"padding": "pad_to_multiple: 128"}),
    ("keep_aspect_ratio_resizer { min_dimension: 128 max_dimension: 128 pad_to_max_dimension: true }", {}),
    ("keep_aspect_ratio_resizer { min_dimension: 96 max_dimension: 160 pad_to_max_dimension: true }", {}),
    (
        "keep_aspect_ratio_resizer { min_dimension: 128 max_dimension: 128 pad_to_max_dimension: 1 "
        "per_channel_pad_value: [1, -2, 0.5] }",
        {"padding": "pad_to_multiple: 32"},
    ),
    ("keep_aspect_ratio_resizer { min_dimension: 128 max_dimension: 256 }", {}),
]


@pytest.mark.parametrize(("resizer", "more"), WAYS)
@pytest.mark.parametrize("size", [(75, 128), (151, 256), (153, 256), (256, 153), (90, 90), (40, 300)])
def test_the_apis_formulas_of_the_input(
    tmp_path: Path, resizer: str, more: dict[str, str], size: tuple[int, int]
) -> None:
    """Also sizes whose half is not whole: 151 x 256 becomes 76 x 128, and 153 x 256 76 x 128."""
    config = config_of(pipeline_of(tmp_path, resizer, **more))
    image = picture(*size)
    found = preprocess([image], config)
    expected = api_input(image, config.resizer, config.image_size)
    assert found.images.shape[2:] == expected.shape[:2]
    assert np.abs(found.images[0].permute(1, 2, 0).numpy() - expected).max() < 2 * TOLERANCE  # float32
    if config.resizer.pad:
        assert found.images.shape[2:] == config.input_size


@pytest.mark.parametrize("size", [(301, 512), (303, 512), (512, 301), (77, 64), (33, 500)])
def test_tensorflow_rounds_to_the_same_sizes(tensorflow: Any, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((*size, 3), np.float32) * 4 - 2
    resize = tensorflow.compat.v1.image.resize_images
    expected = resize(image, (256, 256), preserve_aspect_ratio=True).numpy()
    assert scaled(size, (256, 256), Resizer("keep_aspect_ratio"))[0] == expected.shape[:2]
    np.testing.assert_allclose(api_resize(image, *expected.shape[:2]), expected, atol=TOLERANCE)


def api_anchors(config: EfficientDetConfig, size: tuple[int, int]) -> np.ndarray:
    """The grid of each level, one anchor after the other, in AutoML's order. float64 [A, 4], yxyx, pixels."""
    height, width = (
        -(-side // config.resizer.pad_to_multiple) * config.resizer.pad_to_multiple for side in size
    )
    anchors = []
    for level in config.levels:
        stride = 2**level
        offsets = [stride / 2 if side % stride == 0 else 0 for side in size]
        for row in range(-(-height // stride)):
            for column in range(-(-width // stride)):
                y, x = row * stride + offsets[0], column * stride + offsets[1]
                for scale in range(3):
                    for ratio in (1.0, 2.0, 0.5):
                        side = 4 * stride * 2 ** (scale / 3)
                        h, w = side / ratio**0.5 / 2, side * ratio**0.5 / 2
                        anchors.append((y - h, x - w, y + h, x + w))
    return np.array(anchors)


@pytest.mark.parametrize(("height", "width", "multiple"), [(128, 256, 1), (96, 160, 1), (160, 320, 128)])
def test_the_apis_formulas_of_the_anchors(tmp_path: Path, height: int, width: int, multiple: int) -> None:
    """With a size that is not a multiple of the stride, centres start at 0 on that axis."""
    resizer = f"fixed_shape_resizer {{ height: {height} width: {width} }}"
    config = config_of(pipeline_of(tmp_path, resizer, padding=f"pad_to_multiple: {multiple}"))
    ours = generate_anchors(config).numpy()
    expected = api_anchors(config, (height, width))
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() < 1e-4  # pixels: float32 of up to 1,500
    other = generate_anchors(config.replace(anchor_stride="size_ratio")).numpy()
    assert np.array_equal(ours, other) == (height % 128 == 0)


# --- what follows from the resizer ----------------------------------------------------------------------


class OneAnchor:
    """A network that finds one object of the first class in each image, exactly its anchor ``index``."""

    def __init__(self, config: EfficientDetConfig, index: int) -> None:
        self.config, self.index, self.shapes = config, index, list[tuple[int, ...]]()

    def __call__(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        self.shapes.append(tuple(images.shape))
        config, left = self.config, self.index
        class_outputs, box_outputs = [], []
        for rows, columns in config.feature_sizes((images.shape[2], images.shape[3])).values():
            size = len(images), rows, columns, config.num_anchors
            logits = torch.full((*size, config.num_classes), -20.0)
            if 0 <= left < rows * columns * config.num_anchors:
                logits.view(len(images), -1, config.num_classes)[:, left, 0] = 3
            left -= rows * columns * config.num_anchors
            class_outputs.append(logits.flatten(3).permute(0, 3, 1, 2))
            box_outputs.append(torch.zeros(*size[:3], 4 * config.num_anchors).permute(0, 3, 1, 2))
        return class_outputs, box_outputs


def detector_of(**changes: Any) -> Detector:
    return Detector(EfficientDet(small(**changes)), score_threshold=0.5)


def test_boxes_are_scaled_back_on_each_axis() -> None:
    """An image of 50 x 320 stretched to 128 x 160."""
    detector = detector_of(
        resizer=Resizer("fixed_shape"), image_size=(128, 160), anchor_stride="power_of_two"
    )
    batch = detector.preprocess([picture(50, 320)])
    [found] = detector.detect(batch, OneAnchor(detector.model.config, 1000))
    top, left, bottom, right = generate_anchors(detector.model.config)[1000].tolist()
    expected = [left * 320 / 160, top * 50 / 128, right * 320 / 160, bottom * 50 / 128]
    np.testing.assert_allclose(found["boxes"][0], expected, rtol=1e-5)
    detector.tta = "flip"
    [fused] = detector.detect(batch, OneAnchor(detector.model.config, 1000))
    mirrored = [320 - expected[2], expected[1], 320 - expected[0], expected[3]]
    np.testing.assert_allclose(fused["boxes"][:2].sum(dim=0), np.add(expected, mirrored), rtol=1e-4)


def test_the_input_may_be_larger_than_what_images_are_resized_into() -> None:
    resizer = Resizer("fixed_shape", pad_to_multiple=128)
    detector = detector_of(resizer=resizer, image_size=(160, 160), anchor_stride="power_of_two")
    assert detector.model.config.input_size == (256, 256)
    network = OneAnchor(detector.model.config, 0)
    [found] = detector.detect(detector.preprocess([picture(80, 80)]), network)
    assert network.shapes == [(1, 3, 256, 256)]
    expected = generate_anchors(detector.model.config)[0][[1, 0, 3, 2]] / 2
    torch.testing.assert_close(found["boxes"][0], expected)
    assert len(detector([picture(80, 80)])) == 1


def test_images_that_are_not_padded_are_detected_size_by_size() -> None:
    """Neighbours of one size share a batch; each size has its own anchors."""
    detector = detector_of(
        resizer=Resizer("keep_aspect_ratio", pad=False), image_size=(256, 256), anchor_stride="power_of_two"
    )
    images = [picture(128, 256), picture(64, 128), picture(256, 256)]
    batches = detector.batches(images)
    assert [tuple(batch.images.shape) for batch in batches] == [(2, 3, 128, 256), (1, 3, 256, 256)]
    assert [batch.decoders for batch in batches] == [("none", "none"), ("none",)]
    network = OneAnchor(detector.model.config, 200)
    found = [each for batch in batches for each in detector.detect(batch, network)]
    wide, square = (generate_anchors(detector.model.config, size)[200] for size in ((128, 256), (256, 256)))
    for each, anchor, scale in zip(found, (wide, wide, square), (1, 0.5, 1), strict=True):
        torch.testing.assert_close(each["boxes"][0], anchor[[1, 0, 3, 2]] * scale)
    assert len(detector(images)) == 3
    with pytest.raises(ImageError, match=r"network inputs of 256 x 128 and 256 x 256 pixels, .* one by one"):
        detector.preprocess(images)
    assert len(preprocess_batches(torch.zeros(2, 3, 128, 256, dtype=torch.uint8), detector.model.config)) == 1


@pytest.mark.parametrize("rule", ["automl", "keep_aspect_ratio"])
def test_an_image_that_is_too_thin(rule: str) -> None:
    with pytest.raises(ImageError, match="4000 x 1 pixels is too long and thin"):
        preprocess([picture(1, 4000)], model_config("efficientdet-d0", resizer=Resizer(rule)))


# --- the configuration --------------------------------------------------------------------------------


def test_the_weight_file_carries_the_resizer(tmp_path: Path) -> None:
    resizer = Resizer("keep_aspect_ratio", 96, pad_value=(1.0, 2.0, 3.0), pad_to_multiple=64)
    config = small(resizer=resizer, anchor_stride="power_of_two")
    model = EfficientDet(config)
    write_weights(tmp_path / "model.safetensors", model.state_dict(), config, {})
    again = load_model(tmp_path / "model.safetensors").config
    assert again == config
    assert again.resizer == resizer


def test_a_configuration_with_automls_input_is_written_as_before() -> None:
    fields = json.loads(json.dumps(small().to_dict()))
    assert not {"resizer", "anchor_stride", "class_names"} & fields.keys()
    assert EfficientDetConfig.from_dict(fields) == small()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rule": "crop"}, "rule is 'crop', must be one of automl, fixed_shape, keep_aspect_ratio"),
        ({"min_dimension": 0}, "min_dimension is 0, must be a whole number from 1 to"),
        ({"pad_to_multiple": 1.5}, r"pad_to_multiple is 1\.5, must be a whole number"),
        ({"pad_value": [0, 0]}, r"pad_value is \(0, 0\), must be three numbers"),
        ({"pad_value": [0, 0, float("inf")]}, "must be three numbers"),
        ({"pad": False}, "pad is False, must be true, or false with the rule keep_aspect_ratio"),
        ({"rule": "keep_aspect_ratio", "pad": 0}, "pad is 0, must be true"),
        ({"rule": "keep_aspect_ratio", "pad": False, "pad_to_multiple": 2}, "without pad_to_multiple"),
        ({"colour": "grey"}, "not an EfficientDet configuration: .*colour"),
    ],
)
def test_impossible_resizers(changes: dict[str, Any], reason: str) -> None:
    fields = {**small().to_dict(), "resizer": changes}
    with pytest.raises(ConfigError, match=reason):
        EfficientDetConfig.from_dict(fields)


@pytest.mark.parametrize("changes", [{"anchor_stride": "other"}, {"resizer": "automl"}])
def test_impossible_rules(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(changes))} is "):
        small(**changes)


def test_resizers_in_words() -> None:
    resizer = Resizer("keep_aspect_ratio", 96, pad_value=(1.0, 2.0, 3.5), pad_to_multiple=64)
    assert str(resizer) == (
        "fitted into the input as the Object Detection API does, the shorter side at most 96 pixels, padded "
        "with 1/2/3.5, then padded to a multiple of 64 pixels"
    )
    assert str(Resizer("keep_aspect_ratio", pad=False)).endswith(
        "not padded, so that the input's size varies"
    )
