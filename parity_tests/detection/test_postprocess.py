"""Detections, compared with those of Google's code, for every recorded configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.helpers.paths import GOLDENS
from parity_tests.helpers.recordings import CONFIGS, GENERATED
from pytorch_model.anchors import generate_anchors
from pytorch_model.config import MODELS, model_config
from pytorch_model.detection import postprocess, suppression
from pytorch_model.detection.postprocess import (
    Detections,
    postprocess_global,
    postprocess_per_class,
)
from pytorch_model.detection.settings import PYFUNC_METHODS, NMSConfig
from pytorch_model.detection.suppression import candidates, host, non_max_suppression
from pytorch_model.detection.suppression.candidates import Candidates, pre_nms
from pytorch_model.detection.suppression.tensors import suppress_tensors
from pytorch_model.errors import ConfigError

# Two float32 implementations of sigmoid and exp differ by an ulp: 6e-8 of a score, and 1e-7 of a box side,
# which is up to 1000 pixels here. A decayed score multiplies some of those.
SCORE_TOLERANCE = 1e-6
BOX_TOLERANCE = 1e-3  # pixels

# Heads recorded in float64, detections made from Google's float32 heads: report.json puts those 3.5e-5 apart.
FLOAT32_SCORE_TOLERANCE = 2e-5
FLOAT32_BOX_TOLERANCE = 1e-2  # pixels

SYNTH_SIZE = (128, 128)


@pytest.fixture(scope="module", params=["on the CPU", "on any device"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs both ways: the one that the CPU takes, and the one of all other devices."""
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "on any device":
            for module in (suppression, candidates):
                patched.setattr(module, "on_host", lambda tensor: False)
        yield


def nms_config(name: str) -> NMSConfig:
    return NMSConfig(**{"max_nms_inputs": 0, **CONFIGS[name]})


class Heads:
    """Head outputs and the other inputs of postprocessing."""

    def __init__(self, classes: list[Tensor], boxes: list[Tensor], image_scales: Tensor, model: str) -> None:
        self.classes, self.boxes, self.image_scales = classes, boxes, image_scales
        self.config = model_config(model)
        heights, widths = (sum(level.shape[axis] for level in boxes) for axis in (2, 3))
        assert heights == widths
        self.image_size = (boxes[0].shape[2] * 8,) * 2
        self.anchors_yxyx = generate_anchors(self.config, self.image_size)

    def per_class(self, nms: NMSConfig) -> Detections:
        return postprocess_per_class(self.classes, self.boxes, self.anchors_yxyx, nms, self.image_scales)

    def across_classes(self, nms: NMSConfig) -> Detections:
        return postprocess_global(
            self.classes, self.boxes, self.anchors_yxyx, self.image_size, nms, self.image_scales
        )


def nchw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def synth_heads(shared: Path) -> tuple[Heads, Mapping[str, np.ndarray]]:
    stored = np.load(shared / "oracle/efficientdet-d0/post_s128.npz")
    classes = [nchw(stored[f"synth/class_outputs/{level}"]) for level in range(3, 8)]
    boxes = [nchw(stored[f"synth/box_outputs/{level}"]) for level in range(3, 8)]
    return Heads(classes, boxes, torch.from_numpy(stored["synth/image_scales"]), "efficientdet-d0"), stored


def golden_heads() -> tuple[Heads, Mapping[str, np.ndarray]]:
    """The same recording, smaller: a very low logit replaces those that never become candidates."""
    stored = np.load(GOLDENS / "detections.npz")
    logits = np.full((2, 3069 * 90), -30, np.float32)
    for image in range(2):
        logits[image, stored[f"synth/logit_indices/{image}"]] = stored[f"synth/logits/{image}"]
    classes, boxes, start = [], [], 0
    for size in (16, 8, 4, 2, 1):
        end = start + size * size * 9
        classes.append(nchw(logits[:, start * 90 : end * 90].reshape(2, size, size, 810)))
        boxes.append(nchw(stored["synth/box_outputs"][:, start:end].reshape(2, size, size, 36)))
        start = end
    return Heads(classes, boxes, torch.from_numpy(stored["synth/image_scales"]), "efficientdet-d0"), stored


@pytest.fixture(scope="module", params=["golden", "shared"])
def synth(request: pytest.FixtureRequest) -> tuple[Heads, Mapping[str, np.ndarray]]:
    """Google's recording on heads that show clustered objects."""
    if request.param == "golden":
        return golden_heads()
    return synth_heads(request.getfixturevalue("shared"))


def compare(
    found: Detections,
    stored: Mapping[str, np.ndarray],
    key: str,
    score_tolerance: float = SCORE_TOLERANCE,
    box_tolerance: float = BOX_TOLERANCE,
) -> None:
    """The same detections in the same order, padding included."""
    np.testing.assert_array_equal(found.valid_len.numpy(), stored[f"{key}/valid_len"])
    np.testing.assert_array_equal(found.classes.numpy(), stored[f"{key}/classes"])
    score_error = np.abs(found.scores.numpy() - stored[f"{key}/scores"]).max()
    box_error = np.abs(found.boxes_yxyx.numpy() - stored[f"{key}/boxes"]).max()
    print(f"{key}: scores {score_error:.1e}, boxes {box_error:.1e} pixels")
    assert score_error <= score_tolerance
    assert box_error <= box_tolerance


def as_rows(found: Detections) -> np.ndarray:
    """[N, M, 6]: x1, y1, x2, y2, score, class, as AutoML's ``generate_detections`` writes them."""
    columns = (found.boxes_yxyx[..., [1, 0, 3, 2]], found.scores[..., None], found.classes[..., None])
    return torch.cat(columns, dim=-1).numpy()


def compare_rows(found: Detections, expected: np.ndarray) -> None:
    rows = as_rows(found)
    np.testing.assert_array_equal(rows[..., 5], expected[..., 5])
    assert np.abs(rows[..., 4] - expected[..., 4]).max() <= SCORE_TOLERANCE
    assert np.abs(rows[..., :4] - expected[..., :4]).max() <= BOX_TOLERANCE


# --- recordings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_per_class(synth: tuple[Heads, Mapping[str, np.ndarray]], name: str) -> None:
    heads, stored = synth
    compare(heads.per_class(nms_config(name)), stored, f"synth/per_class/{name}")


@pytest.mark.parametrize("name", CONFIGS)
def test_global(synth: tuple[Heads, Mapping[str, np.ndarray]], name: str) -> None:
    heads, stored = synth
    compare(heads.across_classes(nms_config(name)), stored, f"synth/global/{name}")


@pytest.mark.parametrize("name", GENERATED)
def test_generate_detections(synth: tuple[Heads, Mapping[str, np.ndarray]], name: str) -> None:
    heads, stored = synth
    expected = stored[f"synth/generate_detections/{name}/id_box_score_class"]
    compare_rows(heads.per_class(NMSConfig(**GENERATED[name])), expected[..., 1:])


def test_more_recorded_paths_of_the_same_detections(shared: Path) -> None:
    heads, stored = synth_heads(shared)
    found = heads.across_classes(nms_config("default_gaussian"))
    compare_rows(found, stored["synth/generate_detections/tf_global/id_box_score_class"][..., 1:])
    expected = stored["synth/det_post_process/detections"][..., [2, 1, 4, 3, 5, 6]]
    compare_rows(found, expected)
    for name, nms in (("tf", NMSConfig()), ("pyfunc", NMSConfig(pyfunc=True))):
        rows = stored[f"synth/det_model_fn_eval/{name}/detections"][..., 1:].copy()
        rows[..., 2:4] += rows[..., :2]  # recorded as x, y, width, height
        compare_rows(heads.per_class(nms), rows)
    heads.image_scales = torch.ones(2)
    found = heads.across_classes(nms_config("default_gaussian"))
    compare(found, stored, "synth/global_noscale/default_gaussian")


def test_tensorflow_combined_nms_over_all_pairs(shared: Path) -> None:
    """TensorFlow's combined operation takes all pairs and clips boxes to the image."""
    heads, stored = synth_heads(shared)
    scales, heads.image_scales = heads.image_scales, torch.ones(2)
    found = heads.per_class(NMSConfig(method="hard", max_nms_inputs=10**9))
    clipped = found.boxes_yxyx.clamp(0, 128) * scales[:, None, None]
    compare(found._replace(boxes_yxyx=clipped), stored, "synth/combined/hard")


def test_recorded_candidates(shared: Path) -> None:
    heads, stored = synth_heads(shared)
    best = pre_nms(heads.classes, heads.boxes, heads.anchors_yxyx, 0)
    np.testing.assert_array_equal(best.classes.numpy(), stored["synth/pre_nms_maxreduce/classes"])
    assert np.abs(best.scores.numpy() - stored["synth/pre_nms_maxreduce/scores"]).max() <= SCORE_TOLERANCE
    assert np.abs(best.boxes_yxyx.numpy() - stored["synth/pre_nms_maxreduce/boxes"]).max() <= BOX_TOLERANCE
    pairs = pre_nms(heads.classes, heads.boxes, heads.anchors_yxyx, 5000)
    assert (pairs.scores.diff(dim=1) <= 0).all()
    for image in range(2):  # recorded in TensorFlow's heap order: every pair must be there once
        ours = np.column_stack([values[image].numpy() for values in pairs])
        parts = ("boxes", "scores", "classes")
        theirs = np.column_stack([stored[f"synth/pre_nms_topk5000/{part}"][image] for part in parts])
        distances = torch.cdist(torch.from_numpy(ours), torch.from_numpy(theirs), p=float("inf"))
        nearest = distances.min(dim=1)
        assert nearest.values.max() <= BOX_TOLERANCE
        assert len(np.unique(nearest.indices)) == 5000


@pytest.mark.parametrize("model", MODELS)
def test_suppression_of_googles_own_candidates(
    shared: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every model with random weights, whose scores are much closer together than a trained model's."""
    size = 256 if model == "efficientdet-d7x" else 128
    stored = np.load(shared / "oracle" / model / f"post_s{size}.npz")
    scales = torch.from_numpy(stored["image_scales"])
    compared = 0
    for name in CONFIGS:
        source = "pre_nms_topk5000" if "topk" in name else "pre_nms_maxreduce"
        if f"{source}/boxes" not in stored.files or f"per_class/{name}/boxes" not in stored.files:
            continue
        recorded = (torch.from_numpy(stored[f"{source}/{x}"]) for x in ("boxes", "scores", "classes"))
        candidates = Candidates(*recorded)
        candidates = candidates._replace(classes=candidates.classes.long())
        monkeypatch.setattr(postprocess, "pre_nms", lambda *_, found=candidates: found)
        none: Any = None
        nms = nms_config(name)
        compare(postprocess_per_class(none, none, none, nms, scales), stored, f"per_class/{name}")
        compare(postprocess_global(none, none, none, (size, size), nms, scales), stored, f"global/{name}")
        compared += 1
    if model == "efficientdet-d7x":
        assert compared == 0, "recorded with a stride, so there are no candidates to take"
        pytest.skip("this model's candidates were recorded with a stride")
    assert compared >= 2


@pytest.mark.parametrize("name", ["gaussian_topk5000", "default_gaussian"])
def test_heads_of_random_weights(shared: Path, name: str) -> None:
    """Here, unlike among clustered objects, a location's second-best classes reach the global result too."""
    with np.load(shared / "oracle/efficientdet-d0/acts_fp64_s128.npz") as recorded:
        classes, boxes = (
            [nchw(recorded[f"{kind}_outputs/{level}"].astype(np.float32)) for level in range(3, 8)]
            for kind in ("class", "box")
        )
    stored = np.load(shared / "oracle/efficientdet-d0/post_s128.npz")
    heads = Heads(classes, boxes, torch.from_numpy(stored["image_scales"]), "efficientdet-d0")
    tolerances = (FLOAT32_SCORE_TOLERANCE, FLOAT32_BOX_TOLERANCE)
    compare(heads.per_class(nms_config(name)), stored, f"per_class/{name}", *tolerances)
    compare(heads.across_classes(nms_config(name)), stored, f"global/{name}", *tolerances)


def test_trained_weights_on_two_photographs(shared: Path) -> None:
    """Head outputs of the released Lite0, and Google's detections from them."""
    stored = np.load(shared / "lite0/activations_2images.npz")
    boxes = [nchw(stored[f"box_outputs/{level}"]) for level in range(3, 8)]
    classes = [nchw(stored[f"class_outputs/{level}"]) for level in range(4, 8)]
    full = nchw(stored["class_outputs/3@image0_full"])  # level 3 is recorded in full for one image
    one = Heads(
        [full, *(level[:1] for level in classes)],
        [level[:1] for level in boxes],
        torch.from_numpy(stored["image_scale"][:1]),
        "efficientdet-lite0",
    )
    for name, nms in (("tf", NMSConfig()), ("pyfunc", NMSConfig(pyfunc=True))):
        compare_rows(one.per_class(nms), stored[f"detections_xyxy_{name}"][:1, :, 1:])
    # The best class of every anchor is recorded for both.
    best = torch.full((2, 14400, 90), -30.0)
    index = torch.from_numpy(stored["class_outputs/3@argmax_over_90"].astype(np.int64))[..., None]
    best.scatter_(2, index, torch.from_numpy(stored["class_outputs/3@max_over_90"])[..., None])
    level3 = best.reshape(2, 40, 40, 810).permute(0, 3, 1, 2).contiguous()
    both = Heads([level3, *classes], boxes, torch.from_numpy(stored["image_scale"]), "efficientdet-lite0")
    compare_rows(both.per_class(NMSConfig(max_nms_inputs=0)), stored["detections_xyxy_tf_maxreduce"][..., 1:])


def test_goldens_are_the_recording(shared: Path) -> None:
    _, stored = synth_heads(shared)
    with np.load(GOLDENS / "detections.npz") as golden:
        for key in golden.files:
            if key in stored:
                np.testing.assert_array_equal(golden[key], stored[key])


# --- TensorFlow's operation ---------------------------------------------------------------------------


def boxes_and_scores(rows: Sequence[tuple[float, ...]]) -> tuple[Tensor, Tensor]:
    values = torch.tensor([list(rows)], dtype=torch.float32)
    return values[..., :4], values[..., 4]


def suppress_one_class(boxes: Tensor, scores: Tensor, nms: NMSConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Suppression as TensorFlow's operation does it: every box acts on every other."""
    return non_max_suppression(boxes, scores, torch.zeros(scores.shape, dtype=torch.int64), nms)


QUIRK_BOXES = [
    (0.0, 0.0, 10.0, 10.0, 0.9),
    (0.0, 0.0, 9.0, 10.0, 0.8),  # overlaps the first by 0.9
    (50.0, 50.0, 60.0, 60.0, 0.7),
    (0.0, 0.0, 4.0, 10.0, 0.6),  # overlaps the first by 0.4
]


def test_recorded_quirks() -> None:
    """``quirks.json``: soft and hard suppression of the same four boxes, padded to four."""
    boxes, scores = boxes_and_scores(QUIRK_BOXES)
    indices, found, count = suppress_one_class(boxes, scores, NMSConfig(max_output_size=4))
    assert indices.tolist() == [[0, 2, 3, 1]]
    expected = [[0.8999999761581421, 0.699999988079071, 0.43568941950798035, 0.10664975643157959]]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert count.tolist() == [4]
    indices, found, count = suppress_one_class(boxes, scores, NMSConfig(method="hard", max_output_size=4))
    assert (indices.tolist(), count.tolist()) == ([[0, 2, 3, 0]], [3])
    np.testing.assert_array_equal(found.numpy(), np.array([[0.9, 0.7, 0.6, 0]], np.float32))


def test_a_score_equal_to_the_threshold_is_dropped() -> None:
    boxes, scores = boxes_and_scores([(0, 0, 1, 1, 0.5), (5, 5, 6, 6, 0.5), (9, 9, 10, 10, 0.5)])
    for method in ("gaussian", "hard"):
        indices, found, count = suppress_one_class(
            boxes, scores, NMSConfig(method=method, score_thresh=0.5, max_output_size=5)
        )
        assert (indices.tolist(), found.tolist(), count.tolist()) == ([[0] * 5], [[0.0] * 5], [0])


def test_equal_scores_keep_the_lower_index_and_pad() -> None:
    boxes, scores = boxes_and_scores([(0, 0, 1, 1, 0.5), (5, 5, 6, 6, 0.5), (9, 9, 10, 10, 0.5)])
    indices, found, count = suppress_one_class(boxes, scores, NMSConfig(max_output_size=5))
    assert (indices.tolist(), count.tolist()) == ([[0, 1, 2, 0, 0]], [3])
    assert found.tolist() == [[0.5, 0.5, 0.5, 0.0, 0.0]]


def test_an_overlap_equal_to_the_threshold_keeps_both() -> None:
    boxes, scores = boxes_and_scores([(0, 0, 1, 1, 0.9), (0, 0, 0.5, 1, 0.8)])
    indices, _, count = suppress_one_class(boxes, scores, NMSConfig(method="hard", max_output_size=2))
    assert (indices.tolist(), count.tolist()) == ([[0, 1]], [2])


def test_a_decayed_score_equal_to_the_threshold_is_dropped() -> None:
    boxes, scores = boxes_and_scores(QUIRK_BOXES[:2])
    _, found, _ = suppress_one_class(boxes, scores, NMSConfig(max_output_size=2))
    decayed = float(found[0, 1])
    for threshold, expected in ((decayed, 1), (np.nextafter(np.float32(decayed), np.float32(0)), 2)):
        nms = NMSConfig(score_thresh=float(threshold), max_output_size=2)
        assert suppress_one_class(boxes, scores, nms)[2].tolist() == [expected]


def test_equal_scores_go_to_the_lower_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoML concatenates the lists of all classes in class order before it takes the best."""
    boxes, scores = boxes_and_scores([(i, i, i + 1, i + 1, 0.5) for i in range(0, 50, 10)])
    chosen = Candidates(boxes, scores, torch.tensor([[3, 0, 3, 1, 0]]))
    monkeypatch.setattr(postprocess, "pre_nms", lambda *_: chosen)
    none: Any = None
    found = postprocess_per_class(none, none, none, NMSConfig(max_output_size=5))
    assert found.classes.tolist() == [[1, 1, 2, 4, 4]]
    assert found.boxes_yxyx[0, :, 0].tolist() == [10.0, 40.0, 30.0, 0.0, 20.0]


def test_the_numpy_variant_keeps_what_equals_the_threshold_and_the_best_of_each_class() -> None:
    rows = [(0, 0, 1, 1, 0.5), (20, 20, 21, 21, 0.25), (40, 40, 41, 41, 0.2), (60, 60, 61, 61, 0.1)]
    boxes, scores = boxes_and_scores(rows)
    classes = torch.tensor([[0, 0, 0, 1]])
    for nms, expected in (
        (NMSConfig(score_thresh=0.25, max_output_size=4, pyfunc=True), [0, 1, 3]),
        (NMSConfig(score_thresh=0.25, max_output_size=4), [0]),
    ):
        indices, _, count = non_max_suppression(boxes, scores, classes, nms)
        assert indices[0, : int(count)].tolist() == expected


def test_the_global_path_clips_each_axis_to_its_own_side() -> None:
    heads = random_heads(1)
    heads.image_size = (20, 40)
    heads.image_scales = torch.tensor([2.0])
    boxes_yxyx = heads.across_classes(NMSConfig()).boxes_yxyx[0]
    assert boxes_yxyx.amin(dim=0).tolist() == [0.0, 0.0, 0.0, 0.0]
    assert boxes_yxyx.amax(dim=0).tolist() == [40.0, 80.0, 40.0, 80.0]


# A coarse grid makes equal scores, equal boxes, touching boxes, empty boxes and overlaps of exactly 1/2.
grid_rows = st.lists(
    st.tuples(*[st.integers(0, 4)] * 2, *[st.integers(0, 3)] * 2, st.integers(1, 8)).map(
        lambda r: (r[0], r[1], r[0] + r[2], r[1] + r[3], r[4] / 8)
    ),
    min_size=1,
    max_size=30,
)
# TensorFlow takes numbers below 1e-38 as 0, and areas are products.
fine = st.floats(0, 100, width=32).map(lambda value: value if value > 1e-15 else 0.0)
fine_rows = st.lists(
    st.tuples(fine, fine, fine, fine, st.floats(0, 1, width=32)).map(
        lambda r: (r[0], r[1], r[0] + r[2], r[1] + r[3], r[4])
    ),
    min_size=1,
    max_size=40,
)


def tensorflow_nms(tf: Any, rows: list[tuple[float, ...]], nms: NMSConfig) -> tuple[Any, Any, int]:
    boxes, scores = boxes_and_scores(rows)
    indices, found, count = tf.raw_ops.NonMaxSuppressionV5(
        boxes=boxes[0].numpy(),
        scores=scores[0].numpy(),
        max_output_size=nms.max_output_size,
        iou_threshold=nms.effective_iou_thresh,
        score_threshold=nms.effective_score_thresh,
        soft_nms_sigma=nms.effective_sigma / 2 if nms.method == "gaussian" else 0.0,
        pad_to_max_output_size=True,
    )
    return indices.numpy(), found.numpy(), int(count)


@settings(max_examples=150, deadline=None)
@given(rows=grid_rows, iou=st.sampled_from([0.25, 0.5, 0.75]), threshold=st.sampled_from([0.0, 0.25]))
def test_hard_suppression_is_tensorflows(
    tensorflow: Any, rows: list[tuple[float, ...]], iou: float, threshold: float
) -> None:
    nms = NMSConfig(method="hard", iou_thresh=iou, score_thresh=threshold, max_output_size=12)
    expected_indices, expected_scores, expected_count = tensorflow_nms(tensorflow, rows, nms)
    indices, scores, count = suppress_one_class(*boxes_and_scores(rows), nms)
    assert int(count) == expected_count
    np.testing.assert_array_equal(indices[0].numpy(), expected_indices)
    np.testing.assert_array_equal(scores[0].numpy(), expected_scores)


@settings(max_examples=150, deadline=None)
@given(rows=fine_rows, sigma=st.sampled_from([0.2, 0.5, 1.0]))
def test_soft_suppression_is_tensorflows(
    tensorflow: Any, rows: list[tuple[float, ...]], sigma: float
) -> None:
    """Scores always; indices only if no other score is so close that the last bit decides the order.

    TensorFlow multiplies the weights of several selected boxes in another order than we do.
    """
    nms = NMSConfig(sigma=sigma, max_output_size=15)
    expected_indices, expected_scores, expected_count = tensorflow_nms(tensorflow, rows, nms)
    indices, scores, count = suppress_one_class(*boxes_and_scores(rows), nms)
    near_threshold = np.abs(expected_scores - 0.001).min() < 1e-7
    if not near_threshold:
        assert int(count) == expected_count
    np.testing.assert_allclose(scores[0].numpy(), expected_scores, rtol=1e-5, atol=1.001e-3 * near_threshold)
    gaps = np.abs(np.diff(expected_scores, append=-1))
    clear = (gaps > 1e-5) & (np.abs(np.diff(expected_scores, prepend=2)) > 1e-5)
    clear &= np.cumprod(clear).astype(bool)  # after one exchange the rest may differ
    np.testing.assert_array_equal(indices[0].numpy()[clear], expected_indices[clear])


# --- what must hold for any input ---------------------------------------------------------------------


def slow_reference(
    boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, nms: NMSConfig
) -> list[tuple[int, float]]:
    """The definition, one class after the other, one box after the other: (index, score), best first."""
    found: list[tuple[int, float]] = []
    for label in np.unique(classes):
        alive = {int(i): float(scores[i]) for i in np.flatnonzero(classes == label)}
        if not nms.pyfunc:
            alive = {i: s for i, s in alive.items() if s > nms.effective_score_thresh}
        while alive:
            best = max(alive, key=lambda i: (alive[i], -i))
            found.append((best, alive.pop(best)))
            for i in list(alive):
                alive[i] *= _weight(boxes[best], boxes[i], nms)
                threshold = nms.effective_score_thresh
                kept = alive[i] >= threshold if nms.pyfunc else alive[i] > threshold
                if not kept or alive[i] == -np.inf:
                    del alive[i]
    order = sorted(found, key=lambda pair: (-pair[1], classes[pair[0]], pair[0]))
    return order[: nms.max_output_size]


def _weight(one: np.ndarray, other: np.ndarray, nms: NMSConfig) -> float:
    extra = 1.0 if nms.pyfunc else 0.0
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    height, width = np.maximum(high - low + extra, 0)
    areas = [float(np.prod(box[2:] - box[:2] + extra)) for box in (one, other)]
    overlap = height * width / (sum(areas) - height * width) if height * width else 0.0
    if nms.method == "gaussian":
        return float(np.exp(-(overlap**2) / nms.effective_sigma))
    if nms.method == "linear":
        return 1 - overlap if overlap > nms.effective_iou_thresh else 1.0
    if nms.method == "diou":
        centres = ((one[:2] + one[2:]) - (other[:2] + other[2:])) / 2
        diagonal = np.maximum(one[2:], other[2:]) - np.minimum(one[:2], other[:2])
        overlap -= float((centres**2).sum() / ((diagonal**2).sum() + 1e-10))
    return -np.inf if overlap > nms.effective_iou_thresh else 1.0


ALL_METHODS = [
    NMSConfig(max_output_size=20),
    NMSConfig(method="hard", max_output_size=20),
    NMSConfig(method="hard", score_thresh=0.3, max_output_size=20),
    *(NMSConfig(method=method, pyfunc=True, max_output_size=20) for method in PYFUNC_METHODS),
]


@pytest.mark.parametrize("nms", ALL_METHODS, ids=lambda nms: f"{nms.method}-{nms.pyfunc}-{nms.score_thresh}")
def test_one_loop_over_all_classes_is_one_loop_per_class(
    nms: NMSConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public function on a batch, compared with a naive float64 reference."""
    rng = np.random.default_rng(5)
    corners = rng.uniform(0, 60, (3, 200, 2))
    boxes = np.concatenate((corners, corners + rng.uniform(1, 40, (3, 200, 2))), axis=2).astype(np.float32)
    scores = rng.uniform(0, 1, (3, 200)).astype(np.float32)
    classes = rng.integers(0, 6, (3, 200))
    chosen = Candidates(*(torch.from_numpy(array) for array in (boxes, scores, classes)))
    monkeypatch.setattr(postprocess, "pre_nms", lambda *_: chosen)
    none: Any = None
    found = postprocess_per_class(none, none, none, nms)
    for image in range(3):
        expected = slow_reference(boxes[image].astype(np.float64), scores[image], classes[image], nms)
        indices = [index for index, _ in expected]
        assert int(found.valid_len[image]) == len(expected)
        np.testing.assert_allclose(
            found.scores[image, : len(expected)], [score for _, score in expected], rtol=1e-5
        )
        np.testing.assert_array_equal(found.classes[image, : len(expected)], classes[image][indices] + 1)
        np.testing.assert_array_equal(found.boxes_yxyx[image, : len(expected)], boxes[image][indices])


@settings(max_examples=150, deadline=None)
@given(
    nms=st.sampled_from(ALL_METHODS),
    count=st.integers(1, 900),
    classes=st.integers(1, 5),
    outputs=st.integers(1, 30),
    crowded=st.booleans(),
    levels=st.sampled_from([4, 1000, 1 << 24]),
    seed=st.integers(0, 2**31),
)
def test_both_ways_select_the_same(
    nms: NMSConfig, count: int, classes: int, outputs: int, crowded: bool, levels: int, seed: int
) -> None:
    """Bit for bit. Few ``levels`` make equal scores; in a crowd every box acts on many."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 6 if crowded else 300, (2, count, 2))
    sides = rng.uniform(0, 30, (2, count, 2)) * rng.integers(0, 2, (2, count, 1))  # some have no area
    boxes = torch.from_numpy(np.concatenate((corners, corners + sides), axis=2).astype(np.float32))
    scores = torch.from_numpy((rng.integers(0, levels + 1, (2, count)) / levels).astype(np.float32))
    groups = torch.from_numpy(rng.integers(0, classes, (2, count)))
    few = dataclasses.replace(nms, max_output_size=outputs)
    found = host.suppress_on_host(boxes, scores, groups, few)
    for ours, expected in zip(found, suppress_tensors(boxes, scores, groups, few), strict=True):
        assert torch.equal(ours, expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 200),
    st.integers(0, 2**31),
    st.booleans(),
    st.data(),
)
def test_candidates_are_the_best_pairs_in_order(
    locations: int, num_classes: int, count: int, seed: int, half: bool, data: st.DataObject
) -> None:
    """Two small selections, compared with one stable sort of everything, with many equal logits."""
    anchors = data.draw(st.integers(1, 3))
    rng = np.random.default_rng(seed)
    # Two levels of one row each; a few values only make ties, and -0.0 must equal 0.0.
    widths = [locations, data.draw(st.integers(1, 5))]
    values = np.array([-1.5, -0.5, -0.0, 0.0, 0.5, 2.0], np.float32)
    levels = [torch.from_numpy(rng.choice(values, (2, anchors * num_classes, 1, width))) for width in widths]
    if half:
        levels = [level.half() for level in levels]
    boxes = [torch.zeros(2, anchors * 4, 1, width) for width in widths]
    anchors_yxyx = torch.arange(float(sum(widths) * anchors))[:, None] + torch.tensor([0.0, 0, 1, 1])
    found = pre_nms(levels, boxes, anchors_yxyx, count)
    flat = [level.permute(0, 2, 3, 1).reshape(2, -1, num_classes) for level in levels]
    logits = torch.cat(flat, dim=1).flatten(1).float()
    best, pairs = logits.sort(dim=1, descending=True, stable=True)
    kept = min(count, logits.shape[1])
    torch.testing.assert_close(found.scores, best[:, :kept].sigmoid())
    assert torch.equal(found.classes, pairs[:, :kept] % num_classes)
    assert torch.equal(found.boxes_yxyx[..., 0].round().long(), pairs[:, :kept] // num_classes)


def random_heads(batch: int, num_classes: int = 7, seed: int = 0) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    sizes = (8, 4, 2, 1, 1)

    def draw(channels: int) -> list[Tensor]:
        return [torch.randn(batch, channels, size, size, generator=generator) for size in sizes]

    return Heads(
        draw(9 * num_classes), draw(36), torch.rand(batch, generator=generator) + 0.5, "efficientdet-d0"
    )


EVERY_PATH = [
    pytest.param(lambda heads: heads.per_class(NMSConfig()), id="per class"),
    pytest.param(lambda heads: heads.per_class(NMSConfig(max_nms_inputs=0, method="hard")), id="hard"),
    pytest.param(lambda heads: heads.per_class(NMSConfig(pyfunc=True)), id="pyfunc"),
    pytest.param(lambda heads: heads.across_classes(NMSConfig()), id="global"),
]


@pytest.mark.parametrize("path", EVERY_PATH)
def test_an_image_does_not_see_its_batch(path: Any) -> None:
    heads = random_heads(3)
    together = path(heads)
    classes, boxes, scales = heads.classes, heads.boxes, heads.image_scales
    for image in range(3):
        heads.classes = [level[image : image + 1] for level in classes]
        heads.boxes = [level[image : image + 1] for level in boxes]
        heads.image_scales = scales[image : image + 1]
        for batched, alone in zip(together, path(heads), strict=True):
            assert torch.equal(batched[image : image + 1], alone)


@pytest.mark.parametrize("path", EVERY_PATH)
def test_memory_layout_does_not_matter(path: Any) -> None:
    heads = random_heads(2)
    expected = path(heads)
    heads.classes = [level.contiguous(memory_format=torch.channels_last) for level in heads.classes]
    heads.boxes = [level.contiguous(memory_format=torch.channels_last) for level in heads.boxes]
    for before, after in zip(expected, path(heads), strict=True):
        assert torch.equal(before, after)


class EverythingOn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on any operation that makes a tensor on another device."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                assert value.device.type == self.device, f"{func} works on the {value.device}"
        return result


@pytest.mark.parametrize("path", EVERY_PATH)
def test_everything_stays_on_the_device(path: Any) -> None:
    """On PyTorch's meta device, which has no values: reading a value raises an error."""
    heads = random_heads(2)
    heads.classes, heads.boxes = [x.to("meta") for x in heads.classes], [x.to("meta") for x in heads.boxes]
    heads.anchors_yxyx, heads.image_scales = heads.anchors_yxyx.to("meta"), heads.image_scales.to("meta")
    with EverythingOn("meta"):
        found = path(heads)
    assert found.boxes_yxyx.shape == (2, 100, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("path", EVERY_PATH)
def test_a_gpu_finds_the_same(path: Any) -> None:
    heads = random_heads(3)
    expected = path(heads)
    heads.classes, heads.boxes = [x.cuda() for x in heads.classes], [x.cuda() for x in heads.boxes]
    heads.anchors_yxyx, heads.image_scales = heads.anchors_yxyx.cuda(), heads.image_scales.cuda()
    for before, after in zip(expected, path(heads), strict=True):
        torch.testing.assert_close(after.cpu(), before, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("error")
def test_boxes_of_zero_or_infinite_size_give_no_nan() -> None:
    """exp() of a wild regression gives a box of zero or infinite size: finite scores, no NaN, no warning."""
    boxes, scores = boxes_and_scores(
        [
            (5, 5, 5, 5, 0.9),
            (5, 5, 5, 5, 0.8),
            (-np.inf, 0, np.inf, 9, 0.7),
            (0, 0, 9, 9, 0.6),
            (-1e30, -1e30, 1e30, 1e30, 0.5),
        ]
    )
    for nms in ALL_METHODS:
        _, found, count = suppress_one_class(boxes, scores, nms)
        assert found.isfinite().all()
        assert int(count) >= 2


# --- rejections -----------------------------------------------------------------------------------------


BAD_CONFIGS = [
    pytest.param({"method": "greedy"}, "method", id="unknown method"),
    pytest.param({"method": "linear"}, "method", id="linear is pyfunc's"),
    pytest.param({"max_nms_inputs": -1}, "max_nms_inputs", id="negative inputs"),
    pytest.param({"max_output_size": 0}, "max_output_size", id="no output"),
    pytest.param({"scope": "all"}, "scope of suppression is 'all'", id="unknown scope"),
    pytest.param({"scope": "global", "pyfunc": True}, "suppresses per class", id="pyfunc global"),
    pytest.param({"sigma": 0.0}, "sigma", id="no sigma"),
    pytest.param({"pyfunc": True, "method": "hard", "score_thresh": 0.1}, "no threshold", id="pyfunc hard"),
]


@pytest.mark.parametrize(("values", "named"), BAD_CONFIGS)
def test_bad_configurations_are_rejected(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        NMSConfig(**values)


def test_anchors_of_another_size_are_rejected() -> None:
    heads = random_heads(1)
    heads.anchors_yxyx = generate_anchors(heads.config, (128, 128))
    with pytest.raises(ValueError, match="anchors for the image size"):
        heads.per_class(NMSConfig())
    heads = random_heads(1)
    heads.classes[1] = heads.classes[1][:, :-1]
    with pytest.raises(ValueError, match="number 1 do not belong together"):
        heads.per_class(NMSConfig())


def test_the_recorded_configurations_are_all_here(shared: Path) -> None:
    report = json.loads((shared / "oracle/efficientdet-d0/report.json").read_text())
    assert report["post_s128"]["nms_configs"].keys() == CONFIGS.keys()
    for name, values in report["post_s128"]["nms_configs"].items():
        assert nms_config(name) == NMSConfig(**{"max_nms_inputs": 0, **values})
